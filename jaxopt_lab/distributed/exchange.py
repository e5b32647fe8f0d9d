"""How compressed vectors become a mean on every replica.

A transformation here has one message a step: all leaves as one vector, from which each replica
sends a payload. A NaN or infinity in one leaf may so reach all others, as far as the compressor
lets it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxopt_lab import _compat, _tree
from jaxopt_lab.distributed import _axes, _flat, _weights
from jaxopt_lab.distributed.compressors import Compressor

# What a key is for; the keys of a round are apart by these.
_SHARED, _WORKER, _SERVER = range(3)


def average(
    compressor: Compressor,
    x: jax.Array,
    key: jax.Array,
    axis_name: _axes.AxisName,
    weights: Sequence[float] | np.ndarray | None = None,
) -> tuple[jax.Array, jax.Array]:
    r"""Returns the mean of the replicas' compressed vectors, and the replica's own.

    .. math::
      \frac{1}{N} \sum_i w_i C(x_i), \quad C(x_i)

    Payloads of a linear compressor are averaged as they are: an all-reduce, 2 (N - 1) / N payloads
    sent. All others are gathered, N - 1 payloads sent, and added up one at a time in the order of
    the replicas: the memory does not grow with N but for the payloads, and all replicas have the
    same bits.

    Args:
      compressor: C. A linear one is given the same key on all replicas, others a
        key of the replica's own.
      x: the replica's vector, shape (d,), float32 or float64.
      key: a key of this exchange, equal on all replicas.
      axis_name: the mapped axis, or a tuple of several, which count as one.
      weights: N numbers; 1 by default.

    Returns:
      Two arrays of shape (d,); the mean is equal on all replicas, and known to be.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jaxopt_lab.distributed.compressors import top_k
      >>> from jaxopt_lab.distributed.exchange import average
      >>> def mean(x):
      ...     return average(top_k(count=1), x, jax.random.key(0), "replica")
      >>> jax.vmap(mean, axis_name="replica")(jnp.array([[4.0, 1.0], [0.0, -2.0]]))[0]
      Array([[ 2., -1.],
             [ 2., -1.]], dtype=float32)
    """
    size, replicas = x.size, _axes.size(axis_name)
    if not size:
        return jnp.zeros(0, x.dtype), x
    weigh = None if weights is None else jnp.asarray(weights, x.dtype)
    index = lax.axis_index(axis_name)
    if compressor.linear:
        key = jax.random.fold_in(key, _SHARED)
        payload = compressor.compress(x, key)
        own = compressor.decompress(payload, size, key)
        if weigh is not None:
            payload = jax.tree.map(lambda p: weigh[index] * p, payload)
        return compressor.decompress(_axes.pmean(payload, axis_name), size, key), own
    key = jax.random.fold_in(key, _WORKER)
    payload = compressor.compress(x, jax.random.fold_in(key, index))
    own = compressor.decompress(payload, size, jax.random.fold_in(key, index))
    gathered = jax.tree.map(lambda p: _axes.all_gather(p, axis_name), payload)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(replicas))
    return _mean_of_payloads(compressor, gathered, keys, size, weigh), own


def two_phase_average(
    compressor: Compressor,
    x: jax.Array,
    server_error: jax.Array,
    key: jax.Array,
    axis_name: _axes.AxisName,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    r"""Averages compressed vectors in parts, and compresses the mean of each part again.

    .. math::
      z_j = \frac{1}{N} \sum_i C(x_{i,j}) + \delta_j, \quad \delta_j' = z_j - C(z_j)

    and the mean is :math:`(C(z_1), \dots, C(z_N))`, where replica j averages part j of all vectors.
    Each replica sends 2 (N - 1) / N payloads, where gathering would take N - 1: the way for dense
    codes, which do not add up, such as signs.

    Args:
      compressor: C; it sees the parts.
      x: the replica's vector, shape (d,), float32 or float64.
      server_error: :math:`\delta_j` of the replica's part, shape (ceil(d / N),).
      key: a key of this exchange, equal on all replicas.
      axis_name: the mapped axis, or a tuple of several, which count as one.

    Returns:
      The mean and the replica's own compressed vector, shape (d,), and the new server error, whose
      entries behind the end of the vector are zero. The mean is equal on all replicas, and known to
      be. On one replica, where nothing is sent, it is `x`, and no error changes.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jaxopt_lab.distributed.exchange import two_phase_average
      >>> from jaxopt_lab.distributed.quantizers import sign
      >>> def mean(x):
      ...     return two_phase_average(sign(), x, jnp.zeros(2), jax.random.key(0), "replica")[0]
      >>> jax.vmap(mean, axis_name="replica")(jnp.array([[2.0, -4.0, 0.5], [4.0, -2.0, 1.5]]))[0]
      Array([ 3. , -3. ,  0.25], dtype=float32)
    """
    size, replicas = x.size, _axes.size(axis_name)
    if replicas == 1 or not size:
        mean = _axes.pmean(x, axis_name) if size else jnp.zeros(0, x.dtype)
        return mean, x, server_error
    part_size = -(-size // replicas)
    index = lax.axis_index(axis_name)
    worker, server = (jax.random.fold_in(key, purpose) for purpose in (_WORKER, _SERVER))
    keys = jax.vmap(jax.random.fold_in, (None, 0))
    every = jnp.arange(replicas)

    def decompress(payload: Any, key: jax.Array) -> jax.Array:
        return compressor.decompress(payload, part_size, key)

    to_parts = keys(worker, index * replicas + every)
    parts = _flat.padded(x, replicas).reshape(replicas, part_size)
    payloads = jax.vmap(compressor.compress)(parts, to_parts)
    own = jax.vmap(decompress)(payloads, to_parts).reshape(-1)[:size]
    received = jax.tree.map(
        lambda p: lax.all_to_all(p, axis_name, split_axis=0, concat_axis=0, tiled=True), payloads
    )
    from_workers = keys(worker, every * replicas + index)
    z = _mean_of_payloads(compressor, received, from_workers, part_size)
    exists = index * part_size + jnp.arange(part_size) < size
    z = jnp.where(exists, z + server_error, 0)

    payload = compressor.compress(z, jax.random.fold_in(server, index))
    sent = decompress(payload, jax.random.fold_in(server, index))
    gathered = jax.tree.map(lambda p: _axes.all_gather(p, axis_name), payload)
    mean = jax.vmap(decompress)(gathered, keys(server, every))
    return mean.reshape(-1)[:size], own, jnp.where(exists, z - sent, 0)


def message(
    updates: Any, like: Any, axis_name: _axes.AxisName, method: str, weight: Any = None
) -> jax.Array:
    """Returns the replica's gradients as one vector, shape (d,), in at least float32.

    Args:
      updates: the gradients.
      like: a tree of the state whose paths and shapes they must have, or None.
      axis_name: the mapped axis, or a tuple of several, which count as one.
      method: whose gradients these are, for messages.
      weight: of the replica in the mean, shape (), or None; see `sync_gradients`.

    Raises:
      ValueError: gradients that do not match, or that autodiff has summed over the replicas.
      TypeError: a gradient that is not real floating point.
    """
    _axes.require_own(updates, axis_name, method)
    if like is not None:
        _tree.check_updates(updates, like)
    for name, leaf in _tree.leaves_with_names(updates):
        _tree.check_gradient(name, leaf)
    return _weights.for_mean(_flat.ravel(updates), weight, axis_name)


def remembered(mean: Any, new: jax.Array, old: jax.Array) -> jax.Array:
    """Returns the new memory, or the old one where a step was not finite.

    If the mean that all replicas received has a NaN or infinity anywhere, the step is to be skipped
    as a whole, and so are all memories of it: they agree without a message.

    Args:
      mean: arrays with the same bits on all replicas.
      new: the replica's memory after the step, any shape; entries that are not finite, of what was
        not sent, stay as they were.
      old: the memory before.
    """
    finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(mean)]
    return jnp.where(functools.reduce(jnp.logical_and, finite, jnp.isfinite(new)), new, old)


def round_key(seed: int, count: jax.Array) -> jax.Array:
    """Returns the random key of a step, equal on all replicas."""
    return jax.random.fold_in(jax.random.key(seed), count)


def check_server_error(server_error: jax.Array, length: int, axis_name: _axes.AxisName) -> None:
    """Refuses the state of another number of replicas.

    Args:
      server_error: of the replica's part of a vector.
      length: of the part.
      axis_name: the mapped axis.

    Raises:
      ValueError: another length.
    """
    if server_error.shape != (length,):
        raise ValueError(
            f"server_error has shape {server_error.shape}; expected ({length},), a part for each "
            f"of the {_axes.size(axis_name)} replicas of axis {axis_name!r}: was the state made by "
            "another number of them? Replicas.resize goes on with it"
        )


def check_contractive(compressor: Compressor, size: int, method: str) -> None:
    """Refuses compressors under whose repeated use an error is bound to grow."""
    omega = compressor.variance(size)
    if omega is not None and compressor.contraction(size) is None:
        raise ValueError(
            f"{method} needs a contractive compressor, but {compressor} only has its mean right, "
            f"with a relative variance of {omega:g} for {size} entries; for random_k pass "
            "unbiased=False, for a quantizer smaller blocks, or use compressed_mean"
        )


def _mean_of_payloads(
    compressor: Compressor,
    payloads: Any,
    keys: jax.Array,
    size: int,
    weights: jax.Array | None = None,
) -> jax.Array:
    """Returns the mean of decompressed payloads, whose leading axis is the replicas'."""

    def vector(replica: Any) -> jax.Array:
        payload, key, weight = replica
        found = compressor.decompress(payload, size, key)
        return found if weight is None else weight * found

    stack = payloads, keys, weights
    first, others = (jax.tree.map(lambda x, i=i: x[i], stack) for i in (0, slice(1, None)))
    total, _ = _compat.scan(lambda sum_, one: (sum_ + vector(one), None), vector(first), others)
    return total / keys.shape[0]
