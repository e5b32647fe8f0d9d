"""How numbers are kept in few bits: q = round(x / s), with a scale s for each group of entries.

    s = max |x| / edge        x is about s q,  |x - s q| <= s / 2 for integers

`edge` is where the last bucket ends: 127.5 for int8, whose largest value is 127 on both sides, so
that -x is always the negative of x; for the 8-bit floats it is their largest value. A group of
zeros, or of numbers whose scale is no normal number, has s = 1 and is 0. A group with NaN or an
infinity has that for a scale, and whatever is made of it is NaN.

To round at random, q = floor(x / s + u) with u uniform in [0, 1), counted in spacings of the
format. Then s = max |x| / (largest value): the mean of s q is x for each entry, the largest too.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels._dtypes import wide
from pallas_kernels._options import index


class Format(NamedTuple):
    """A dtype of few bits."""

    dtype: Any
    largest: float  # the largest value that is used
    edge: float  # what the largest entry of a group is moved to

    @property
    def is_integer(self) -> bool:
        """Whether products are made of integers."""
        return jnp.issubdtype(self.dtype, jnp.integer)


FORMATS = MappingProxyType(
    {
        "int8": Format(jnp.int8, 127, 127.5),
        "int4": Format(jnp.int4, 7, 7.5),
        "float8_e4m3fn": Format(jnp.float8_e4m3fn, 448, 448),
        "float8_e5m2": Format(jnp.float8_e5m2, 57344, 57344),
    }
)


class Quantized(NamedTuple):
    """Values of few bits, whose meaning is values * scales."""

    values: jax.Array
    scales: jax.Array  # `wide`, size 1 in every axis that shares a scale


def quantize(
    x: jax.Array, name: str, axes: tuple[int, ...], key: jax.Array | None = None
) -> Quantized:
    """Returns `x` in a format, with one scale for all entries along `axes`.

    Rounds to the nearest, ties to even, or at random with a key.
    """
    format = FORMATS[name]
    dtype = wide(x.dtype)
    x = x.astype(dtype)
    largest = jnp.max(jnp.abs(x), axis=axes, keepdims=True, initial=0)
    scales = largest / (format.edge if key is None else format.largest)
    scales = jnp.where(scales < jnp.finfo(dtype).tiny, 1, scales)  # NaN stays
    y = jnp.clip(x / scales, -format.largest, format.largest)
    if key is not None:
        spacing = _spacing(y, format)
        y = jnp.floor(y / spacing + jax.random.uniform(key, x.shape, dtype)) * spacing
        y = jnp.clip(y, -format.largest, format.largest)
    elif format.is_integer:
        y = jnp.round(y)
    return Quantized(y.astype(format.dtype), scales)


def _spacing(y: jax.Array, format: Format) -> Any:
    """Returns the distance between the neighbours of `y` in a format."""
    if format.is_integer:
        return 1
    info = jnp.finfo(format.dtype)
    exponent = jnp.maximum(jnp.frexp(y)[1] - 1, int(info.minexp))
    return jnp.ldexp(jnp.ones_like(y), exponent - info.nmant)


def format_name(argument: str, value: Any) -> str:
    """Returns the checked name of a format."""
    if not isinstance(value, str) or value not in FORMATS:
        raise ValueError(f"{argument}={value!r}; expected one of {tuple(FORMATS)}")
    return value


def granularity(value: Any) -> str | int:
    """Returns a checked choice of what shares a scale."""
    if isinstance(value, str):
        if value in ("tensor", "row"):
            return value
        raise ValueError(
            f"granularity={value!r}; expected 'tensor', 'row', or the integer length of a block "
            "along the contraction"
        )
    size = index("granularity", value)
    if size < 1:
        raise ValueError(f"granularity={size}; expected a positive length of blocks")
    return size
