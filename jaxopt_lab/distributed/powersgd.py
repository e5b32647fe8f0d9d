r"""PowerSGD: the mean of the gradients' matrices as two thin factors, by a step of power iteration.

    M_i = g_i + e_i,   P = orthonormal(mean_i M_i Q),   Q = mean_i M_i^T P
    update = P Q^T,    e_i = M_i - P Q^T

Vogels, Karimireddy, Jaggi, "PowerSGD: Practical Low-Rank Gradient Compression for Distributed
Optimization", NeurIPS 2019, arXiv:1905.13727, algorithms 1 and 2, and its authors' code.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxopt_lab import _checks, _hyperparams, _matrices, _treatments, _tree
from jaxopt_lab.distributed import _axes, _flat, _weights, exchange


class PowerSGDState(NamedTuple):
    """State of `powersgd`: 4 bytes an entry of a compressed leaf in float32, and 4 r columns.

    Leaves that are not compressed have an `optax.MaskedNode`. Under `shard_map` the error is each
    replica's own (a spec with the axis).

    Attributes:
      count: steps taken; int32, shape (); with the seed it gives the step's random key.
      error: e_i; shapes of the parameters, at least float32.
      query: Q, (columns, r), a stack's (matrices, columns, r); equal on all replicas.
    """

    count: jax.Array
    error: optax.Updates
    query: optax.Updates


def powersgd(
    rank: int,
    axis_name: _axes.AxisName,
    *,
    min_compression_rate: float = 2.0,
    warm_start: bool = True,
    dimension_numbers: _matrices.DimensionNumbers = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Averages gradients as matrices of low rank, with error feedback.

    .. math::
      M_i = g_i + e_i, \quad \hat P = \mathrm{orthonormal}\Big(\frac{1}{N} \sum_i M_i Q\Big), \quad
      Q' = \frac{1}{N} \sum_i M_i^\top \hat P

    The update is :math:`\hat P Q'^\top = \hat P \hat P^\top M` with M the mean of the matrices, and
    the error is what it leaves of the replica's own, :math:`e_i' = M_i - \hat P Q'^\top`. All is
    linear: the update is that of one replica with the mean gradient. A kernel is an inputs x
    outputs matrix, a convolution one of (window and channels) x outputs, and a stack of layers or
    experts many matrices, each with factors of its own. A step has two messages: all first factors
    with the leaves that are not compressed, and all second factors. A NaN or infinity stays in its
    matrix, and a step with one leaves errors and factors as they were.
    `jaxopt_lab.treatments(powersgd(...), params)` says which leaves are compressed.

    Args:
      rank: r, the columns of a factor; no more than the matrix has rows or columns.
      axis_name: the mapped axis, or a tuple of several, which count as one.
      min_compression_rate: a leaf is compressed only if its entries are more than this many times
        those of its factors, r (rows + columns). All others are averaged as they are, as are
        biases, scales and what nobody knows the axes of.
      warm_start: starts from the Q of the last step, so that the factors follow the largest
        singular vectors; else from a random one each step.
      dimension_numbers: which axes are inputs and outputs, all others count matrices: a tree of
        `optax.contrib.MuonDimensionNumbers` with None for what is not compressed, or a function of
        the parameters that returns one, or a mapping of patterns of paths to them, with all other
        leaves by default. By default names, shapes and neighbours decide, as
        `jaxopt_lab.muon_dimension_numbers` describes; embeddings and output layers count too.
      seed: of random starts. A column of Q that has become zero, as after a zero gradient, is
        drawn anew: multiplied by a matrix it would stay zero for ever.

    Returns:
      A `GradientTransformationExtraArgs`; call `init` under the mapped axis. Its update takes
      `weight` as `sync_gradients` does.

    Raises:
      ValueError: a rank below 1, `min_compression_rate` below 0; at init, an axis that is not
        bound, axes that a parameter does not have, or a pattern that matches nothing; at update,
        gradients that do not match or that `jax.grad` has already summed (see `vary`).
      TypeError: a rank or a seed that is no integer; parameters or gradients that are not real
        floating point.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jaxopt_lab.distributed.powersgd import powersgd
      >>> tx = powersgd(1, "replica")
      >>> column = jnp.arange(1.0, 9.0)[:, None]
      >>> grads = jnp.stack([column * jnp.ones(8), 3 * column * jnp.ones(8)])
      >>> mean = jax.vmap(lambda g: tx.update(g, tx.init(g))[0], axis_name="replica")(grads)
      >>> bool(jnp.allclose(mean[0], 2 * column * jnp.ones(8), rtol=1e-5))
      True

    References:
      Vogels, Karimireddy, Jaggi, `PowerSGD <https://arxiv.org/abs/1905.13727>`_, NeurIPS 2019.
    """
    _checks.check_seed(seed)
    axis_name = _axes.canonical(axis_name)
    _checks.check_positive_integer(rank=rank)
    _matrices.check(dimension_numbers)
    _checks.check_flag(warm_start=warm_start)
    _checks.check_non_negative(min_compression_rate=min_compression_rate)

    def factors(choice: _matrices.Choice) -> tuple[int, int, int] | None:
        """Returns rows, columns and rank, or None for a leaf that is not compressed."""
        if choice.axes is None or not math.prod(choice.shape):
            return None
        sides = (choice.axes.reduction, choice.axes.output)
        rows, columns = (math.prod(choice.shape[a] for a in side) for side in sides)
        r = min(rank, rows, columns)
        is_smaller = rows * columns > min_compression_rate * r * (rows + columns)
        return (rows, columns, r) if is_smaller else None

    def decided(tree: Any) -> list[_matrices.Choice]:
        found = _matrices.choices(dimension_numbers, tree, default=_matrices.any_matrix)
        # The axes are None of all that is not compressed.
        return [
            choice
            if factors(choice)
            else choice._replace(
                axes=None, reason="too small" if choice.axes is not None else choice.reason
            )
            for choice in found
        ]

    def drawn(index: int, count: jax.Array, like: Any) -> jax.Array:
        key = jax.random.fold_in(exchange.round_key(seed, count), index)
        return jax.random.normal(key, like.shape, like.dtype)

    def init_fn(params: optax.Params) -> PowerSGDState:
        choices = decided(params)
        _treatments.report_choices("powersgd", choices, matrix="powersgd", other="mean")
        _axes.size(axis_name)
        count = jnp.zeros((), jnp.int32)
        leaves, structure = jax.tree.flatten(_tree.zeros_like(params, at_least_float32=True))
        error, query = [], []
        for index, (leaf, choice) in enumerate(zip(leaves, choices)):
            found = factors(choice)
            if found is None or choice.axes is None:
                error.append(optax.MaskedNode())
                query.append(optax.MaskedNode())
                continue
            stack = [math.prod(leaf.shape[a] for a in choice.axes.batch)][: len(choice.axes.batch)]
            like = jax.ShapeDtypeStruct((*stack, *found[1:]), leaf.dtype)
            error.append(_axes.vary(leaf, axis_name))
            query.append(drawn(index, count, like))
        return PowerSGDState(count, structure.unflatten(error), structure.unflatten(query))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        weight: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, PowerSGDState]:
        del params, extra_args
        state = _tree.check_state(state, PowerSGDState)
        _axes.require_own(updates, axis_name, "powersgd")
        for name, leaf in _tree.leaves_with_names(updates):
            _tree.check_gradient(name, leaf)
        updates = _weights.for_mean(updates, weight, axis_name)
        leaves, structure = jax.tree.flatten(updates)
        axes = {index: c.axes for index, c in enumerate(decided(updates)) if c.axes is not None}
        matrices = list(axes)
        kept = structure.unflatten(
            [leaf if index in matrices else optax.MaskedNode() for index, leaf in enumerate(leaves)]
        )
        _tree.check_updates(kept, state.error)
        if jax.tree.structure(kept) != jax.tree.structure(state.error):
            raise ValueError(
                f"updates do not match the tree given to init: found {structure}, of which "
                f"{jax.tree.structure(state.error)} has an error"
            )
        errors, queries = jax.tree.leaves(state.error), jax.tree.leaves(state.query)

        own, start = [], []
        for index, e, q in zip(matrices, errors, queries):
            m = _matrices.to_matrices(leaves[index].astype(e.dtype) + e, axes[index])
            own.append(m if axes[index].batch else m[0])
            random = drawn(index, state.count, q)
            alive = jnp.any(q != 0, axis=-2, keepdims=True)
            start.append(jnp.where(alive, q, random) if warm_start else random)

        products = [_dot(m, q) for m, q in zip(own, start)]
        whole = [leaf for index, leaf in enumerate(leaves) if index not in matrices]
        products, whole = _mean((products, whole), axis_name)
        bases = [jnp.linalg.qr(p)[0] for p in products]
        new = _mean([_dot(m.mT, p) for m, p in zip(own, bases)], axis_name)

        found, error, whole = list(leaves), [], iter(whole)
        # Both factors are the same on all replicas: they agree on which steps leave no trace.
        kept = functools.partial(exchange.remembered, (bases, new))
        for index in range(len(leaves)):
            if index not in matrices:
                found[index] = next(whole)
        for index, m, p, q, e in zip(matrices, own, bases, new, errors):
            mean = _dot(p, q.mT)
            found[index], left = (
                _matrices.from_matrices(x, axes[index], e.shape) for x in (mean, m - mean)
            )
            found[index] = found[index].astype(leaves[index].dtype)
            error.append(kept(left, e))
        query = list(map(kept, new, queries))
        return structure.unflatten(found), PowerSGDState(
            count=_hyperparams.increment(state.count),
            error=jax.tree.unflatten(jax.tree.structure(state.error), error),
            query=jax.tree.unflatten(jax.tree.structure(state.query), query),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    # Accelerators would round the factors of a product to fewer bits than they send.
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _mean(tree: Any, axis_name: _axes.AxisName) -> Any:
    """Returns the mean over the replicas, as one message."""
    return _flat.unravel(_axes.pmean(_flat.ravel(tree), axis_name), tree)
