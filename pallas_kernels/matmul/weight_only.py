"""Weights in few bits, which are widened where they are multiplied.

    y = (x q) s        for scales of output channels or of the whole weight
    y = x (s q)        for scales of blocks along the contraction

When a model decodes, a product reads its weight once for a handful of tokens, and its time is that
of the bytes. Nothing is a product of few bits here: `q` becomes the dtype of `x` in the tile.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from pallas_kernels._dtypes import wide
from pallas_kernels._options import floating, index
from pallas_kernels.matmul import formats
from pallas_kernels.matmul.formats import quantize
from pallas_kernels.matmul.products import along_result


class QuantizedWeight(NamedTuple):
    """A weight of few bits: values * scales, each scale for a block of values.

    Attributes:
      values: int8, int4 or an 8-bit float, in the shape of the weight.
      scales: float32 (float64 of a float64 weight), with as many axes: 1 where all entries of an
        axis share a scale, or the number of blocks along the contraction.
    """

    values: jax.Array
    scales: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return self.values.shape

    @property
    def ndim(self) -> int:
        """The number of axes of the weight."""
        return self.values.ndim


def quantize_weight(
    kernel: ArrayLike, format: str = "int8", granularity: str | int = "row", *, axis: int = -2
) -> QuantizedWeight:
    r"""Returns a kernel in few bits, for `weight_only_dot_general`.

    For each group of entries that has one scale,

    .. math::
      q = \mathrm{round}(w / s), \qquad s = \max |w| / B

    with :math:`B` = 127.5 for int8, 7.5 for int4, 448 and 57344 for the floats; an entry of
    integers is off by at most :math:`s / 2`. A group of zeros has :math:`s = 1`; one with NaN or an
    infinity is NaN. The result is a pytree of two arrays, which can be saved, sharded and scanned
    over as the kernel was. Under `jax.jit` the kernel itself need not stay in memory.

    Args:
      kernel: floating, of any shape with the axis; (inputs, outputs) for a dense layer, and a stack
        of those has axes in front.
      format: ``"int8"``, ``"int4"``, ``"float8_e4m3fn"`` or ``"float8_e5m2"``.
      granularity: what has one scale: ``"tensor"``, the whole array; ``"row"``, all inputs of an
        output channel; or the length of blocks along `axis`, which it divides.
      axis: the axis that products contract.

    Returns:
      A `QuantizedWeight`.

    Raises:
      TypeError: `kernel` is not floating, or `granularity` or `axis` no integer.
      ValueError: a name is not known, or blocks do not divide the axis.

    Examples:
      >>> import jax, jax.numpy as jnp, pallas_kernels
      >>> kernel = jnp.array([[1.0, -3.0], [0.5, 0.0]])
      >>> weight = pallas_kernels.quantize_weight(kernel)
      >>> weight.values.tolist()
      [[127, -127], [64, 0]]
      >>> weight.scales.shape
      (1, 2)

    References:
      The scales are those of `AQT <https://github.com/google/aqt>`_ and
      `Qwix <https://github.com/google/qwix>`_.
    """
    kernel = floating("kernel", kernel)
    name, size = formats.format_name("format", format), formats.granularity(granularity)
    place = index("axis", axis)
    if not -kernel.ndim <= place < kernel.ndim:
        raise ValueError(f"axis={axis}; expected an axis of a kernel of shape {kernel.shape}")
    place %= kernel.ndim
    if size == "tensor":
        return QuantizedWeight(*quantize(kernel, name, tuple(range(kernel.ndim))))
    if isinstance(size, str):
        return QuantizedWeight(*quantize(kernel, name, (place,)))
    length = kernel.shape[place]
    if length % size:
        raise ValueError(
            f"granularity={size}; expected a divisor of {length}, the length of axis {axis} of a "
            f"kernel of shape {kernel.shape}"
        )
    split = kernel.reshape(*kernel.shape[:place], -1, size, *kernel.shape[place + 1 :])
    found = quantize(split, name, (place + 1,))
    return QuantizedWeight(found.values.reshape(kernel.shape), found.scales.squeeze(place + 1))


def weight_only_dot_general(
    lhs: ArrayLike,
    rhs: QuantizedWeight,
    dimension_numbers: Any,
    precision: jax.lax.PrecisionLike = None,
    preferred_element_type: Any = None,
) -> jax.Array:
    r"""Multiplies by a weight of few bits, which is widened in the product.

    .. math::
      y = s \, (x q) \qquad \text{or, with blocks,} \qquad y = x \, (s q)

    for x in its own dtype and sums in float32. XLA fuses the conversion into the product, so that
    the weight is read as it is kept, on GPUs and TPUs. Scales of blocks cannot leave the sum:
    TPUs fuse their product with the values too, while on GPUs XLA writes the widened weight to
    memory, more bytes than a bfloat16 weight has; scales of rows are for those.

    Derivatives in `lhs` are of every kind; the weight is a constant.

    Args:
      lhs: floating, what is multiplied.
      rhs: what `quantize_weight` made. Where its blocks are not along a contracted axis, the
        scales are taken into the sum too.
      dimension_numbers: axes that are contracted, and of the batch, as in `jax.lax.dot_general`:
        ``(((1,), (0,)), ((), ()))`` for tokens (n, inputs) and a kernel (inputs, outputs).
      precision: of the product, as in `jax.lax.dot_general`.
      preferred_element_type: the dtype of the result, by default that of `lhs`.

    Returns:
      The product, its axes in the order of `jax.lax.dot_general`.

    Raises:
      TypeError: `lhs` is not floating, or `rhs` no `QuantizedWeight`.
      ValueError: the scales of `rhs` are no blocks of its values.

    Examples:
      >>> import jax, jax.numpy as jnp, pallas_kernels
      >>> kernel = jax.random.normal(jax.random.key(0), (256, 64), jnp.bfloat16)
      >>> weight = pallas_kernels.quantize_weight(kernel)
      >>> x = jnp.ones((2, 256), jnp.bfloat16)
      >>> y = pallas_kernels.weight_only_dot_general(x, weight, (((1,), (0,)), ((), ())))
      >>> y.shape, str(y.dtype)
      ((2, 64), 'bfloat16')

    References:
      Dettmers et al., *LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale*
      (`arXiv 2208.07339 <https://arxiv.org/abs/2208.07339>`_), for scales of rows.
    """
    lhs = floating("lhs", lhs)
    if not isinstance(rhs, QuantizedWeight):
        raise TypeError(f"rhs is a {type(rhs).__name__}; expected what quantize_weight returns")
    shapes = rhs.shape, rhs.scales.shape
    if len(shapes[0]) != len(shapes[1]) or any(n and (not k or n % k) for n, k in zip(*shapes)):
        raise ValueError(
            f"rhs has values {shapes[0]} and scales {shapes[1]}; expected a scale for each block "
            "of values, as quantize_weight returns them"
        )
    sums = wide(lhs.dtype)
    product = functools.partial(
        lax.dot_general,
        dimension_numbers=dimension_numbers,
        precision=precision,
        preferred_element_type=sums,
    )
    dtype = lhs.dtype if preferred_element_type is None else preferred_element_type
    jax.eval_shape(product, lhs, jax.ShapeDtypeStruct(rhs.shape, lhs.dtype))  # checks the axes
    (_, contracting), (_, batch) = dimension_numbers
    free = [axis for axis in range(rhs.ndim) if axis not in (*contracting, *batch)]
    summed = all(rhs.scales.shape[axis] == 1 for axis in contracting)
    if summed and all(rhs.scales.shape[axis] in (1, rhs.shape[axis]) for axis in range(rhs.ndim)):
        found = product(lhs, rhs.values.astype(lhs.dtype))
        scales = along_result(rhs.scales, batch, free, contracting, found.ndim, of_rhs=True)
        return (found * scales.astype(sums)).astype(dtype)
    # One rounding: a scale alone may be too small for 16 bits.
    weight = (rhs.values.astype(sums) * _of_entries(rhs).astype(sums)).astype(lhs.dtype)
    return product(lhs, weight).astype(dtype)


def _of_entries(rhs: QuantizedWeight) -> jax.Array:
    """Returns the scale of each value."""
    scales = rhs.scales
    for axis, size in enumerate(rhs.shape):
        scales = jnp.repeat(scales, size // scales.shape[axis], axis)
    return scales
