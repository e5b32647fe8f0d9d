"""A product of quantised operands, with the derivative of the plain one.

    forward        y = s_a s_b (q_a q_b),  or a sum of that over blocks of the contraction
    backward       da = g b^T,  db = a^T g: as if nothing were rounded

Each product of the backward pass can be quantised in the same way: it is a product of `g` and an
operand, and its scales lie along its own contraction.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._dtypes import wide
from pallas_kernels.matmul.formats import FORMATS, Quantized, quantize

INT32 = 2**31 - 1


class Settings(NamedTuple):
    """What is known when the function is made."""

    formats: tuple[str, str]  # of the two operands
    granularity: str | int
    gradient_format: str
    backward: tuple[bool, bool]  # whether the gradient of lhs, of rhs is a quantised product
    stochastic: bool  # whether the gradient is rounded at random there
    keeps_quantized: bool


class Product(NamedTuple):
    """One product: its settings, and how it was called."""

    settings: Settings
    contracting: tuple[tuple[int, ...], tuple[int, ...]]
    batch: tuple[tuple[int, ...], tuple[int, ...]]
    operands: tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]
    precision: Any  # of products of floats
    dtype: Any  # of the result

    def free(self, side: int) -> tuple[int, ...]:
        """Returns the axes of an operand that are neither contracted nor of the batch."""
        taken = (*self.contracting[side], *self.batch[side])
        return tuple(axis for axis in range(self.operands[side].ndim) if axis not in taken)


Keys = tuple[jax.Array | None, jax.Array | None]  # of rounding lhs here, and of gradients


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def multiply(product: Product, lhs: jax.Array, rhs: jax.Array, keys: Keys) -> jax.Array:
    """Returns the product of quantised operands, in the layout of `jax.lax.dot_general`."""
    return _multiplied(product, *_quantized(product, lhs, rhs, keys))


def _forward(product: Product, lhs: jax.Array, rhs: jax.Array, keys: Keys) -> Any:
    settings = product.settings
    if settings.stochastic and keys[1] is None:
        raise ValueError(
            "key=None; expected a key of jax.random, as gradients are taken of a product with "
            "stochastic_rounding=True: dot_general(..., key=key)"
        )
    kept: Any = lhs, rhs
    if settings.keeps_quantized:
        kept = lax.stop_gradient(_quantized(product, lhs, rhs, keys))
    # As a product of its own, of which a derivative of the derivative is not that of rounding.
    return multiply(product, lhs, rhs, keys), (kept, keys[1])


def _backward(product: Product, kept: Any, cotangent: jax.Array) -> Any:
    operands, key = kept
    if product.settings.keeps_quantized:
        operands = [_dequantized(product, side, x) for side, x in enumerate(operands)]
    keys = (None, None) if key is None else jax.random.split(key)
    lhs, rhs = (_gradient(product, side, cotangent, operands, keys[side]) for side in range(2))
    return lhs, rhs, None


multiply.defvjp(_forward, _backward)


def _gradient(
    product: Product, side: int, cotangent: jax.Array, operands: Any, key: jax.Array | None
) -> jax.Array:
    """Returns the gradient of an operand: a product of the cotangent and the other one."""
    settings, other = product.settings, 1 - side
    count = len(product.batch[0])
    start = count if other == 0 else count + len(product.free(0))
    summed = tuple(range(start, start + len(product.free(other))))
    contracting = summed, product.free(other)
    batch = tuple(range(count)), product.batch[other]
    dtype = operands[side].dtype
    if settings.backward[side]:
        own = settings._replace(
            formats=(settings.gradient_format, settings.formats[other]),
            backward=(False, False), stochastic=False, keeps_quantized=False,
        )  # fmt: skip
        pair = jax.ShapeDtypeStruct(cotangent.shape, cotangent.dtype), product.operands[other]
        of_side = Product(own, contracting, batch, pair, product.precision, dtype)
        found: jax.Array = multiply(of_side, cotangent, operands[other], (key, None))
    else:
        found = lax.dot_general(
            cotangent.astype(dtype), operands[other].astype(dtype), (contracting, batch),
            precision=product.precision, preferred_element_type=dtype,
        )  # fmt: skip
    # The contracted axes of the operand come in the order of the other one's.
    matching = dict(zip(product.contracting[other], product.contracting[side], strict=True))
    order = (*product.batch[side], *product.free(side), *(matching[x] for x in sorted(matching)))
    return found.transpose([order.index(axis) for axis in range(len(order))])


def _quantized(
    product: Product, lhs: jax.Array, rhs: jax.Array, keys: Keys
) -> tuple[Quantized, Quantized]:
    """Returns the operands in few bits, with an axis of blocks before the last contracted one."""
    found = []
    for side, (x, key) in enumerate(((lhs, keys[0]), (rhs, None))):
        axes = product.contracting[side]
        if _blocks(product) > 1:
            x = _in_blocks(product, side, x)
            axes = tuple(axis + (axis >= axes[-1]) for axis in axes)
        if product.settings.granularity == "tensor":
            axes = tuple(range(x.ndim))
        found.append(quantize(x, product.settings.formats[side], axes, key))
    return found[0], found[1]


def _blocks(product: Product) -> int:
    """Returns how many blocks the contraction has."""
    size, axes = product.settings.granularity, product.contracting[0]
    if isinstance(size, str) or not axes:
        return 1
    return -(-product.operands[0].shape[axes[-1]] // size)


def _in_blocks(product: Product, side: int, x: jax.Array) -> jax.Array:
    """Returns an operand whose last contracted axis is two: blocks, and what is in each."""
    axis, count = product.contracting[side][-1], _blocks(product)
    size = int(product.settings.granularity)
    missing = count * size - x.shape[axis]
    if missing:
        x = jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])
    return x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :])


def _dequantized(product: Product, side: int, x: Quantized) -> jax.Array:
    """Returns the rounded operand in its own shape and dtype."""
    like = product.operands[side]
    found = x.values.astype(x.scales.dtype) * x.scales
    if _blocks(product) > 1:
        axis = product.contracting[side][-1]
        found = found.reshape(*found.shape[:axis], -1, *found.shape[axis + 2 :])
        found = lax.slice_in_dim(found, 0, like.shape[axis], axis=axis)
    return found.astype(like.dtype)


def _multiplied(product: Product, lhs: Quantized, rhs: Quantized) -> jax.Array:
    """Returns the sum of the products of all blocks."""
    _check_sums(product)
    count = _blocks(product)
    if count <= 1:
        return _scaled(product, lhs, rhs).astype(product.dtype)

    def block(i: Any) -> jax.Array:
        def part(x: jax.Array, axis: int) -> jax.Array:
            return lax.dynamic_index_in_dim(x, i, axis, keepdims=False)

        of_lhs, of_rhs = (axes[-1] for axes in product.contracting)
        return _scaled(
            product,
            Quantized(part(lhs.values, of_lhs), part(lhs.scales, of_lhs)),
            Quantized(part(rhs.values, of_rhs), part(rhs.scales, of_rhs)),
        )

    total = lax.fori_loop(1, count, lambda i, total: total + block(i), block(0))
    return total.astype(product.dtype)


def _scaled(product: Product, lhs: Quantized, rhs: Quantized) -> jax.Array:
    """Returns the product of two operands without blocks, in the dtype of sums of floats."""
    dtype = wide(lhs.scales.dtype, rhs.scales.dtype)
    integers = jnp.issubdtype(lhs.values.dtype, jnp.integer)
    of_lhs, of_rhs = (x.values.astype(jnp.int8) if integers else x.values for x in (lhs, rhs))
    found = lax.dot_general(
        of_lhs, of_rhs, (product.contracting, product.batch),
        precision=None if integers else product.precision,
        preferred_element_type=jnp.int32 if integers else jnp.float32,
    ).astype(dtype)  # fmt: skip
    for side, scales in enumerate((lhs.scales, rhs.scales)):
        axes = product.batch[side], product.free(side), product.contracting[side]
        found *= along_result(scales, *axes, found.ndim, of_rhs=side == 1).astype(dtype)
    return found


def along_result(
    scales: jax.Array,
    batch: Sequence[int],
    free: Sequence[int],
    contracting: Sequence[int],
    rank: int,
    *,
    of_rhs: bool,
) -> jax.Array:
    """Returns scales of an operand with the axes of a product's result: batch, lhs, rhs."""
    sizes = [scales.shape[axis] for axis in (*batch, *free)]
    place = len(batch) if of_rhs else len(sizes)
    sizes[place:place] = [1] * (rank - len(sizes))
    return scales.transpose(*batch, *free, *contracting).reshape(sizes)


def _check_sums(product: Product) -> None:
    """Raises ValueError where a sum of integers may leave int32."""
    kinds = [FORMATS[name] for name in product.settings.formats]
    shape = product.operands[0].shape
    length = math.prod(shape[axis] for axis in product.contracting[0])
    if _blocks(product) > 1:
        length = length // shape[product.contracting[0][-1]] * int(product.settings.granularity)
    most = int(INT32 // (kinds[0].largest * kinds[1].largest))
    # In a program to be exported a length may be a symbol, of which nothing is known.
    if kinds[0].is_integer and isinstance(length, int) and length > most:
        raise ValueError(
            f"the contraction sums {length} products of {product.settings.formats[0]}; expected at "
            f"most {most}, which int32 holds: blocks as granularity, a part of the batch at a "
            "time, or a format of floats"
        )
