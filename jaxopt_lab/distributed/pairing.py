"""Who exchanges with whom: static tables, because a permutation is part of the compiled program.

A table has a row a round and a column a replica: `table[r, i]` is whose value replica i gets in
round r. Each row is a permutation; a replica with nothing to do gets its own value.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_lab import _checks, _compat
from jaxopt_lab.distributed import _axes


def round_robin(replicas: int) -> np.ndarray:
    """Returns perfect matchings in which each pair meets exactly once (the circle method).

    Args:
      replicas: N, at least 1.

    Returns:
      An int array of shape (N - 1, N) for even N, and (N, N) for odd N, where in each round another
      replica sits out. Each row is its own inverse.

    Raises:
      ValueError: `replicas` below 1.
      TypeError: not an integer.

    Examples:
      >>> round_robin(4).tolist()
      [[3, 2, 1, 0], [1, 0, 3, 2], [2, 3, 0, 1]]
    """
    _checks.check_positive_integer(replicas=replicas)
    chairs = replicas - 1 + replicas % 2
    turns, chair = np.arange(chairs)[:, None], np.arange(chairs)
    table = (turns - chair) % chairs
    if chairs == replicas:
        return table
    # The one whose partner would be itself meets the replica in the middle of the circle.
    alone = table == chair
    middle = np.argmax(alone, axis=1)[:, None]
    return np.concatenate([np.where(alone, chairs, table), middle], axis=1)


def matchings(replicas: int, limit: int = 32, seed: int = 0) -> np.ndarray:
    """Returns perfect matchings to draw from: the round robin, or `limit` random ones.

    A program holds a branch for each row, so that the round robin of thousands is out of reach.

    Args:
      replicas: N, at least 1.
      limit: largest number of rows.
      seed: of the random matchings.

    Returns:
      An int array of shape (rounds, N). Each row is its own inverse; for odd N one replica of each
      row sits out.

    Raises:
      ValueError: `replicas` or `limit` below 1.
      TypeError: not an integer.

    Examples:
      >>> matchings(8).shape, matchings(3072).shape
      ((7, 8), (32, 3072))
    """
    _checks.check_positive_integer(replicas=replicas, limit=limit)
    if replicas - 1 + replicas % 2 <= limit:
        return round_robin(replicas)
    generator = np.random.default_rng(seed)
    table = np.tile(np.arange(replicas), (limit, 1))
    for row in table:
        half = replicas // 2
        order = generator.permutation(replicas)
        left, right = order[:half], order[half : 2 * half]
        row[left], row[right] = right, left
    return table


def hypercube(replicas: int) -> np.ndarray:
    """Returns the dimensions of a hypercube: in round r, i meets i XOR 2^r.

    Averaging with each partner in turn gives the mean of all after log2(N) rounds.

    Args:
      replicas: N, a power of two.

    Returns:
      An int array of shape (max(log2(N), 1), N). Each row is its own inverse.

    Raises:
      ValueError: `replicas` is no power of two.
      TypeError: not an integer.

    Examples:
      >>> hypercube(4).tolist()
      [[1, 0, 3, 2], [2, 3, 0, 1]]
    """
    _checks.check_positive_integer(replicas=replicas)
    if replicas & (replicas - 1):
        raise ValueError(f"replicas must be a power of two for a hypercube, got {replicas}")
    bits = 1 << np.arange(_rounds(replicas))[:, None]
    return (np.arange(replicas) ^ bits) % replicas


def exponential(replicas: int) -> np.ndarray:
    """Returns the shifts of the one-peer exponential graph: in round r, i gets from i + 2^r.

    Args:
      replicas: N, at least 1.

    Returns:
      An int array of shape (max(ceil(log2(N)), 1), N).

    Raises:
      ValueError: `replicas` below 1.
      TypeError: not an integer.

    Examples:
      >>> exponential(3).tolist()
      [[1, 2, 0], [2, 0, 1]]

    References:
      Ying et al., `Exponential Graph is Provably Efficient for Decentralized Deep Training
      <https://arxiv.org/abs/2110.13363>`_, NeurIPS 2021.
    """
    _checks.check_positive_integer(replicas=replicas)
    shifts = 1 << np.arange(_rounds(replicas))[:, None]
    return (np.arange(replicas) + shifts) % replicas


def torus(shape: Sequence[int]) -> np.ndarray:
    """Returns the neighbours on a torus of any number of dimensions; a ring has one.

    Args:
      shape: replicas along each dimension; replica i stands where row-major order puts it.

    Returns:
      An int array of shape (neighbours, N): a row for each step to a neighbour. Steps that lead to
      the same replica everywhere, as both of a dimension of size 2, are listed once, and steps that
      lead nowhere not at all.

    Raises:
      ValueError: no dimension, or one below 1.
      TypeError: not an integer.

    Examples:
      >>> torus((4,)).tolist()
      [[1, 2, 3, 0], [3, 0, 1, 2]]
      >>> torus((2, 2)).tolist()
      [[2, 3, 0, 1], [1, 0, 3, 2]]
    """
    if not shape:
        raise ValueError("shape must have at least one dimension, got ()")
    for size in shape:
        _checks.check_positive_integer(shape=size)
    grid = np.arange(math.prod(shape)).reshape(shape)
    rows: list[np.ndarray] = []
    for axis, size in enumerate(shape):
        steps = {1, size - 1} if size > 1 else set()
        rows += [np.roll(grid, -step, axis).ravel() for step in sorted(steps)]
    return np.array(rows, dtype=grid.dtype).reshape(-1, grid.size)


def most_square(replicas: int) -> tuple[int, int]:
    """Returns the two factors of `replicas` that are closest to each other, the smaller first.

    Examples:
      >>> most_square(12), most_square(7)
      ((3, 4), (1, 7))
    """
    _checks.check_positive_integer(replicas=replicas)
    short = next(k for k in range(math.isqrt(replicas), 0, -1) if replicas % k == 0)
    return short, replicas // short


def receive(tree: Any, row: np.ndarray, axis_name: _axes.AxisName) -> Any:
    """Returns the arrays of replica `row[i]`, on replica i: one permute a leaf.

    Args:
      tree: arrays.
      row: a permutation of the replicas; int, shape (N,).
      axis_name: the mapped axis, or a tuple of several, which count as one.

    Returns:
      A tree like `tree`.

    Raises:
      ValueError: the axis is not bound or has another size, or `row` is no permutation.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> jax.vmap(lambda x: receive(x, np.array([1, 2, 0]), "replica"), axis_name="replica")(
      ...     jnp.array([10, 11, 12]))
      Array([11, 12, 10], dtype=int32)
    """
    replicas = _axes.size(axis_name)
    if sorted(np.asarray(row).tolist()) != list(range(replicas)):
        raise ValueError(
            f"row must be a permutation of the {replicas} replicas of axis {axis_name!r}, got "
            f"{np.asarray(row).tolist()}"
        )
    return jax.tree.map(lambda x: _axes.permute(x, axis_name, row.tolist()), tree)


def exchange_with(
    tree: Any, index: jax.typing.ArrayLike, table: np.ndarray, axis_name: _axes.AxisName
) -> Any:
    """Returns the partner's arrays, by a row of a table that is chosen while running.

    Args:
      tree: arrays.
      index: of the row; int, shape (), equal on all replicas.
      table: permutations of the replicas; int, shape (rounds, N).
      axis_name: the mapped axis, or a tuple of several, which count as one.

    Returns:
      A tree like `tree`; it varies over the axis. The program has one `jax.lax.switch` with a
      permute a leaf and row.

    Raises:
      ValueError: the axis is not bound or has another size, or a row is no permutation.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> def partner(x, index):
      ...     return exchange_with(x, index, round_robin(4), "replica")
      >>> jax.vmap(partner, (0, None), axis_name="replica")(jnp.arange(4), 1)
      Array([1, 0, 3, 2], dtype=int32)
    """
    branches = [functools.partial(receive, row=row, axis_name=axis_name) for row in table]
    if len(branches) == 1:
        return branches[0](tree)
    return _compat.switch(jnp.asarray(index), branches, tree)


def receive_from_random(
    tree: Any, count: jax.typing.ArrayLike, axis_name: _axes.AxisName, seed: int
) -> Any:
    """Returns the arrays of a partner drawn at random, from the seed and `count` alone.

    Args:
      tree: arrays.
      count: of the draw; int, shape (), equal on all replicas.
      axis_name: the mapped axis, or a tuple of several, which count as one.
      seed: equal on all replicas, so that they agree without a message.

    Returns:
      A tree like `tree`.
    """
    table = matchings(_axes.size(axis_name), seed=seed)
    if len(table) == 1:
        return exchange_with(tree, 0, table, axis_name)
    key = jax.random.fold_in(jax.random.key(seed), count)
    return exchange_with(tree, jax.random.randint(key, (), 0, len(table)), table, axis_name)


def _rounds(replicas: int) -> int:
    """Returns ceil(log2(replicas)), and at least 1."""
    return max((replicas - 1).bit_length(), 1)
