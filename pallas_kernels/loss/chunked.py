"""Rows of logits, block of classes by block of classes: memory of one block, on every device.

Forward, over blocks v of the vocabulary (Wijmans et al. 2024, https://arxiv.org/abs/2411.09009):

    s = cap tanh((h W_v + b_v) / cap);   m' = max(m, rowmax s)
    mass = exp(m - m') mass + rowsum exp(s - m');   lse = m + log mass

Backward, where mu, lam and sigma are the cotangents of lse, of the label's logit and of the sum of
all logits, u their weights there:

    ds = mu exp(s - lse) + lam [v = label] + sigma u_v;   dx = (1 - (s / cap)^2) ds
    dh += dx W_v^T;   dW_v = h^T dx;   db_v = sum dx
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import _compat
from pallas_kernels._dtypes import wide
from pallas_kernels.loss.problem import Operands, Rows, Settings, product_dtype


class Gradients(NamedTuple):
    """Of what logits are made of. Loops add to them in `wide`; the weight's may be narrower."""

    hidden: jax.Array
    weight: jax.Array
    bias: jax.Array | None


class _Running(NamedTuple):
    """Sums over the blocks before this one, each (...)."""

    peak: jax.Array
    mass: jax.Array
    picked: jax.Array
    total: jax.Array | None


def row_sums(settings: Settings, operands: Operands) -> Rows:
    """Returns the sums over all classes of these operands."""
    hidden = operands.hidden.astype(product_dtype(operands.hidden))

    def step(start: Any, size: int, running: _Running) -> _Running:
        s = logits(settings, operands, hidden, start, size)
        return add_block(settings, operands, running, s, start)

    return finished(over_blocks(settings, operands, step, empty(settings, operands)))


def gradients(
    settings: Settings, operands: Operands, lse: jax.Array, cotangents: Rows
) -> Gradients:
    """Returns the gradients, from logits that are made again; `lse` is that of `row_sums`."""
    hidden = operands.hidden.astype(product_dtype(operands.hidden))
    dtype = wide(hidden.dtype)
    # Each block of the weight's gradient is made at once, so nothing is added in a narrow dtype.
    nothing = zeros(operands, dtype, operands.weight.dtype)

    def step(start: Any, size: int, found: Gradients) -> Gradients:
        s = logits(settings, operands, hidden, start, size)
        dx = of_logits(settings, operands, s, lse, cotangents, start)
        return add_products(settings, operands, found, dx, start, overwrite=True)

    return over_blocks(settings, operands, step, nothing)


def over_blocks(
    settings: Settings, operands: Operands, step: Callable[[Any, int, Any], Any], carry: Any
) -> Any:
    """Returns ``step(start, size, carry)`` after all blocks; the last one may be smaller."""
    block, axis = settings.block_vocabulary, settings.vocabulary_axis
    whole, rest = divmod(operands.weight.shape[axis], block)
    if whole > 1:
        carry = lax.fori_loop(0, whole, lambda i, x: step(i * block, block, x), carry)
    elif whole:
        carry = step(0, block, carry)
    return step(whole * block, rest, carry) if rest else carry


def logits(
    settings: Settings, operands: Operands, hidden: jax.Array, start: Any, size: int
) -> jax.Array:
    """Returns a block of logits (..., size), in float32 or wider."""
    axis, dtype = settings.vocabulary_axis, wide(hidden.dtype)
    block = _block(settings, operands, start, size, hidden.dtype)
    contracted = (((hidden.ndim - 1,), (1 - axis,)), ((), ()))
    s = lax.dot_general(
        hidden, block, contracted, precision=settings.precision, preferred_element_type=dtype
    )
    if operands.bias is not None:
        s += _of_classes(operands.bias, start, size, s)
    if settings.soft_cap is None:
        return s
    # A bias of -inf takes a class away, also under a cap.
    return jnp.where(s == -jnp.inf, s, settings.soft_cap * jnp.tanh(s / settings.soft_cap))


def empty(settings: Settings, operands: Operands) -> _Running:
    """Returns the sums over no class."""
    dtype, shape = wide(operands.hidden.dtype), operands.labels.shape
    nothing = _vary(operands, jnp.zeros(shape, dtype))
    peak = _vary(operands, jnp.full(shape, -jnp.inf, dtype))
    return _Running(peak, nothing, nothing, nothing if settings.smooths else None)


def add_block(
    settings: Settings, operands: Operands, running: _Running, s: jax.Array, start: Any
) -> _Running:
    """Returns the sums with those of one more block of logits."""
    peak = jnp.maximum(running.peak, s.max(axis=-1))
    shift = jnp.where(peak == -jnp.inf, 0, peak)
    mass = jnp.exp(running.peak - shift) * running.mass
    mass += jnp.exp(s - shift[..., None]).sum(axis=-1)
    picked = running.picked + jnp.where(_hits(operands, start, s), s, 0).sum(axis=-1)
    total = running.total
    if total is not None:
        u = operands.class_weights
        weighted = s if u is None else s * _of_classes(u, start, s.shape[-1], s)
        total = total + weighted.sum(axis=-1)
    return _Running(peak, mass, picked, total)


def finished(running: _Running) -> Rows:
    """Returns the sums over all blocks."""
    lse = jnp.where(running.mass == 0, -jnp.inf, running.peak + jnp.log(running.mass))
    return Rows(lse, running.picked, running.total)


def of_logits(
    settings: Settings,
    operands: Operands,
    s: jax.Array,
    lse: jax.Array,
    cotangents: Rows,
    start: Any,
) -> jax.Array:
    """Returns the gradient of a block of logits before the cap, from those after it."""
    # A shard may have classes of -inf only.
    p = jnp.exp(s - jnp.where(lse == -jnp.inf, 0, lse)[..., None])
    ds = cotangents.lse[..., None] * p
    ds += jnp.where(_hits(operands, start, s), cotangents.picked[..., None], 0)
    if cotangents.total is not None:
        total, u = cotangents.total[..., None], operands.class_weights
        ds += total if u is None else total * _of_classes(u, start, s.shape[-1], s)
    if settings.soft_cap is None:
        return ds
    return ds * jnp.where(s == -jnp.inf, 0, 1 - jnp.square(s / settings.soft_cap))


def zeros(operands: Operands, dtype: Any, weight_dtype: Any) -> Gradients:
    """Returns what loops add gradients to."""
    shapes = operands.hidden.shape, operands.weight.shape
    hidden, weight = (jnp.zeros(x, y) for x, y in zip(shapes, (dtype, weight_dtype)))
    bias = None if operands.bias is None else jnp.zeros(operands.bias.shape, dtype)
    return jax.tree.map(lambda x: _vary(operands, x), Gradients(hidden, weight, bias))


def add_products(
    settings: Settings,
    operands: Operands,
    found: Gradients,
    dx: jax.Array,
    start: Any,
    *,
    overwrite: bool,
) -> Gradients:
    """Adds what a block of logits is a gradient of; `overwrite` where no other has its classes."""
    axis, dtype = settings.vocabulary_axis, wide(operands.hidden.dtype)
    bias = found.bias
    if bias is not None:
        summed = dx.sum(axis=range(dx.ndim - 1))
        bias = add_at(bias, summed, start, 0, overwrite)
    narrow = product_dtype(operands.hidden, backward=True)
    hidden, dx = operands.hidden.astype(narrow), dx.astype(narrow)
    block = _block(settings, operands, start, dx.shape[-1], narrow)

    def product(a: jax.Array, b: jax.Array, contracted: Any) -> jax.Array:
        return lax.dot_general(
            a,
            b,
            (contracted, ((), ())),
            precision=settings.precision,
            preferred_element_type=dtype,
        )

    last, leading = dx.ndim - 1, tuple(range(dx.ndim - 1))
    d_hidden = found.hidden + product(dx, block, ((last,), (axis,)))
    pair = (hidden, dx) if axis == 1 else (dx, hidden)
    d_block = product(*pair, (leading, leading))
    return Gradients(d_hidden, add_at(found.weight, d_block, start, axis, overwrite), bias)


def add_at(total: jax.Array, part: jax.Array, start: Any, axis: int, overwrite: bool) -> jax.Array:
    """Adds `part` to a slice of `total`, or puts it there."""
    start = jnp.asarray(start, jnp.int32)
    if not overwrite:
        part += lax.dynamic_slice_in_dim(total, start, part.shape[axis], axis)
    return lax.dynamic_update_slice_in_dim(total, part.astype(total.dtype), start, axis)


def _block(settings: Settings, operands: Operands, start: Any, size: int, dtype: Any) -> jax.Array:
    axis = settings.vocabulary_axis
    weight, start = operands.weight, jnp.asarray(start, jnp.int32)
    if weight.dtype != dtype:  # else XLA casts the whole weight before the loop
        weight, start = lax.optimization_barrier((weight, start))
    block = lax.dynamic_slice_in_dim(weight, start, size, axis)
    # First to what the hidden states are: more digits of some weights would be no other model.
    return block.astype(operands.hidden.dtype).astype(dtype)


def _of_classes(x: jax.Array, start: Any, size: int, like: jax.Array) -> jax.Array:
    """Returns a block of an array over classes, to be broadcast over tokens."""
    part = lax.dynamic_slice_in_dim(x, jnp.asarray(start, jnp.int32), size, 0)
    return jnp.expand_dims(part.astype(like.dtype), range(like.ndim - 1))


def _hits(operands: Operands, start: Any, s: jax.Array) -> jax.Array:
    classes = jnp.asarray(start, jnp.int32) + lax.broadcasted_iota(jnp.int32, s.shape, s.ndim - 1)
    return operands.labels[..., None] == classes


def _vary(operands: Operands, x: jax.Array) -> jax.Array:
    """The first value of a loop has the type of the later ones."""
    return _compat.vary_like(x, *jax.tree.leaves(operands))
