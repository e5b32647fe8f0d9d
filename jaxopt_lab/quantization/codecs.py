r"""Codecs: how one array is kept in fewer bytes.

    bfloat16      2 bytes an entry, rounded stochastically or to nearest
    int8          1 byte an entry and one float32 scale for each block of the flattened array:
                  x ~ scale * level[code], with uniform or dynamic-exponent levels

Dettmers et al., "8-bit Optimizers via Block-wise Quantization", ICLR 2022, arXiv:2110.02861,
section 2.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_lab import _compat, _hyperparams
from jaxopt_lab.quantization.rounding import stochastic_round

_CODES = ("linear", "dynamic")


class Codec(Protocol):
    """What `quantize_state` needs of a codec; instances must be hashable, as jit compares them."""

    def encode(self, x: jax.Array, key: jax.Array) -> Any:
        """Returns arrays that stand for the floating array `x`; `key` is one typed random key."""
        ...

    def decode(self, encoded: Any, dtype: Any) -> jax.Array:
        """Returns the array that `encoded` stands for."""
        ...


@dataclasses.dataclass(frozen=True)
class Bfloat16:
    """See `bfloat16`."""

    stochastic: bool

    def encode(self, x: jax.Array, key: jax.Array) -> jax.Array:
        """Returns `x` in bfloat16; `key` is used if rounding is stochastic."""
        return stochastic_round(x, key) if self.stochastic else x.astype(jnp.bfloat16)

    def decode(self, encoded: jax.Array, dtype: Any) -> jax.Array:
        """Returns `encoded` in another dtype."""
        return encoded.astype(dtype)


def bfloat16(stochastic: bool = True) -> Bfloat16:
    """Codec that keeps an array in bfloat16.

    Args:
      stochastic: round without bias (`stochastic_round`) instead of to nearest. A moving average
        with a decay of 0.999 changes by less than half a unit of bfloat16 a step and stands still
        under rounding to nearest.

    Returns:
      A codec.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> codec = bfloat16()
      >>> codec.decode(codec.encode(jnp.array([1.0, -0.5]), jax.random.key(0)), jnp.float32)
      Array([ 1. , -0.5], dtype=float32)
    """
    return Bfloat16(stochastic)


class Blocks(NamedTuple):
    """An array encoded by `int8`."""

    codes: jax.Array  # int8 (signed and linear) or uint8; the array's shape
    scales: jax.Array  # float32, shape (number of blocks,)


@dataclasses.dataclass(frozen=True)
class Int8:
    """See `int8`."""

    block_size: int
    code: str
    signed: bool | None

    def encode(self, x: jax.Array, key: jax.Array | None = None) -> Blocks:
        """Returns codes and scales of the floating array `x`; `key` is not used."""
        del key
        # Codes have no derivative; that of the scales alone would be misleading.
        x = jax.lax.stop_gradient(x)
        blocks = self._split(x.astype(jnp.float32))
        scales = self._scales(blocks)
        # The quotient of subnormal numbers is unreliable where a device flushes them to zero.
        scales = jnp.where(jnp.abs(scales) < jnp.finfo(jnp.float32).tiny, 0, scales)
        column = scales[:, None]
        units = blocks / jnp.where(column == 0, 1, column)
        units = jnp.where(jnp.isinf(blocks), jnp.sign(blocks) * jnp.sign(column), units)
        units = jnp.where(jnp.isnan(column), 1, jnp.where(column == 0, 0, units))
        codes = self._nearest(units)
        if not self._signed:
            codes = jnp.where((blocks > 0) & (column != 0), jnp.maximum(codes, 1), codes)
        codes = _unsplit(codes, x)
        return Blocks(codes, scales)

    def decode(self, encoded: Blocks, dtype: Any) -> jax.Array:
        """Returns the array of dtype `dtype` that `encoded` stands for.

        Raises:
          ValueError: the number of scales does not fit the codes.
        """
        codes, scales = encoded
        blocks = self._split(codes)
        if scales.shape != blocks.shape[:1]:
            raise ValueError(
                f"codes of shape {codes.shape} need {blocks.shape[0]} scales (block_size "
                f"{self.block_size}), got shape {scales.shape}: was one of them split over devices?"
            )
        if self.code == "dynamic":
            levels = _dynamic_levels(blocks, self._signed)
        else:
            levels = blocks.astype(jnp.float32) / (127 if self._signed else 255)
        # Zero is a code of its own also below a scale that is infinite.
        values = jnp.where(levels == 0, 0, levels * scales[:, None])
        return _unsplit(values.astype(dtype), codes)

    @property
    def _signed(self) -> bool:
        return self.signed is not False

    def _split(self, x: jax.Array) -> jax.Array:
        # Blocks do not follow the axes of an array.
        flat = _compat.unshard(x).reshape(-1)
        count = -(-x.size // self.block_size)
        padding = count * self.block_size - x.size
        return jnp.pad(flat, (0, padding)).reshape(count, self.block_size)

    def _scales(self, blocks: jax.Array) -> jax.Array:
        high = jnp.max(blocks, axis=1, initial=0)
        if not self._signed:
            return high
        # The entry of largest magnitude with its sign: its level is then +1, which both books have
        # (the dynamic one lacks -1), so that it is exact and encoding twice changes nothing.
        low = jnp.min(blocks, axis=1, initial=0)
        return jnp.where(high >= -low, high, low)

    def _nearest(self, units: jax.Array) -> jax.Array:
        if self.code == "dynamic":
            return _nearest_dynamic(units, self._signed)
        if self._signed:
            return jnp.round(jnp.clip(units, -1, 1) * 127).astype(jnp.int8)
        return jnp.round(jnp.clip(units, 0, 1) * 255).astype(jnp.uint8)


def _nearest_dynamic(units: jax.Array, signed: bool) -> jax.Array:
    # Arithmetic in place of a search, because eight dependent look-ups an entry do not vectorise.
    book = dynamic_code(signed=signed)
    book = book[book >= 0].astype(np.float64)  # 0, the centres of the cells by decade, 1
    first = 1 if signed else 2  # cells of the lowest decade
    size = jnp.abs(units) if signed else jnp.maximum(units, 0)
    cells, slope = jnp.float32(first), jnp.float32(first * 1e6 / 0.9)
    for k in range(1, 7):
        start = first * 2**k - first + 1  # of decade k in the book
        upper = size >= float((book[start - 1] + book[start]) / 2)
        cells = jnp.where(upper, float(first * 2**k), cells)
        slope = jnp.where(upper, first * 2**k * 10.0 ** (6 - k) / 0.9, slope)
    inside = jnp.clip(jnp.floor(size * slope - cells / 9), 0, cells - 1)
    index = cells - first + 1 + inside
    index = jnp.where(size >= float((book[-2] + 1) / 2), len(book) - 1, index)
    index = jnp.where(size < float(book[1] / 2), 0, index)
    if signed:
        index = 127 + jnp.where(units < 0, -index, index)
    return index.astype(jnp.uint8)


def _dynamic_levels(codes: jax.Array, signed: bool) -> jax.Array:
    # `dynamic_code(signed)[codes]` to the last bit or two, without a look-up an entry.
    first = 1 if signed else 2
    signed_index = codes.astype(jnp.float32) - (127 if signed else 0)
    index = jnp.abs(signed_index)
    step, offset = jnp.zeros_like(index), jnp.zeros_like(index)
    for k in range(7):
        cells, start = first * 2**k, first * 2**k - first + 1
        width = 0.9 * 10.0 ** (k - 6) / cells
        step = jnp.where(index >= start, width, step)
        offset = jnp.where(index >= start, 10.0 ** (k - 7) + width / 2 - start * width, offset)
    levels = index * step + offset
    levels = jnp.where(index == (128 if signed else 255), 1, levels)
    return jnp.where(signed_index < 0, -levels, levels)


def _unsplit(blocks: jax.Array, like: jax.Array) -> jax.Array:
    x = blocks.reshape(-1)[: like.size].reshape(like.shape)
    x = _compat.reshard_like(x, like)
    # Folded away after placement; it ties the result to the sharding of `like`.
    return jnp.where(jnp.zeros((), bool), like.astype(x.dtype), x)


def int8(block_size: int = 256, code: str = "linear", signed: bool | None = None) -> Int8:
    r"""Codec that keeps an array in 1 byte an entry and 4 bytes a block.

    The flattened array is cut into blocks. Each is divided by its entry of largest magnitude
    :math:`s`, and each quotient is replaced by the nearest of 256 levels (255 if linear and
    signed):

    .. math::
      x_i \approx s \, l[c_i], \qquad c_i = \arg\min_c |x_i / s - l[c]|

    The largest entry and zeros are exact. Without a sign, a positive entry never becomes zero but
    at least the smallest positive level, since a second moment of zero below a first moment that
    is none makes Adam divide by `eps`; negative entries become zero. NaN turns its own block into
    NaN and touches no other; infinity stays, the finite entries of its block become zero or, if
    positive and without a sign, infinite. A block of subnormal numbers becomes zero. Derivatives
    do not pass.

    Args:
      block_size: entries a block; the last block may have fewer.
      code: "linear" for levels at equal distance, within :math:`|s| / 254` of the entry (signed)
        or :math:`s / 510` (entries below that go up to :math:`s / 255`); "dynamic" for
        `dynamic_code`, which covers 7 decades.
      signed: whether the levels reach from -1 to 1 or from 0 to 1, which has twice the resolution.
        None leaves the choice to `quantize_state`, and means signed elsewhere.

    Returns:
      A codec.

    Raises:
      ValueError: `block_size` is below 1, or `code` unknown.
      TypeError: `block_size` is no integer.

    Examples:
      >>> import jax.numpy as jnp
      >>> codec = int8(block_size=4)
      >>> x = jnp.array([1.27, -0.5, 0.0, 0.333, 1e-3, -1e-3])
      >>> codec.encode(x).codes
      Array([ 127,  -50,    0,   33,  127, -127], dtype=int8)
      >>> [round(float(value), 4) for value in codec.decode(codec.encode(x), jnp.float32)]
      [1.27, -0.5, 0.0, 0.33, 0.001, -0.001]

    References:
      Dettmers et al., `8-bit Optimizers via Block-wise Quantization
      <https://arxiv.org/abs/2110.02861>`_, ICLR 2022, section 2.
    """
    _hyperparams.check_positive_integer(block_size=block_size)
    if code not in _CODES:
        raise ValueError(f"code must be one of {_CODES}, got {code!r}")
    return Int8(int(block_size), code, signed)


@functools.cache
def dynamic_code(signed: bool) -> np.ndarray:
    r"""The 256 levels of the dynamic-exponent code: finer steps for larger numbers.

    For each decade :math:`[10^{k-7}, 10^{k-6}]`, :math:`k = 0 \dots 6`, the levels are the centres
    of :math:`2^k` equal cells (:math:`2^{k+1}` without a sign); then come their negatives, 0 and 1.
    In a byte this is a sign, a run of zeros that gives the decade, a one, and the cell's number in
    the bits that are left.

    Args:
      signed: from -1 to 1 (-1 itself is no level), or from 0 to 1.

    Returns:
      A float32 array of shape (256,), strictly increasing.

    Examples:
      >>> dynamic_code(signed=False)[[0, 1, 128, 255]]
      array([0.0000000e+00, 3.2500000e-07, 1.1054687e-01, 1.0000000e+00],
            dtype=float32)
    """
    positive = []
    for k in range(7):
        cells = 2 ** (k if signed else k + 1)
        centres = 0.1 + 0.9 * (np.arange(cells) + 0.5) / cells
        positive.append(centres * 10.0 ** (k - 6))
    levels = np.concatenate([*positive, [0.0, 1.0]])
    if signed:
        levels = np.concatenate([levels, *[-decade for decade in positive]])
    book = np.sort(levels).astype(np.float32)
    book.setflags(write=False)
    return book
