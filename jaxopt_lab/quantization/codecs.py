r"""Codecs: how one array is kept in fewer bytes.

    bfloat16      2 bytes an entry, rounded stochastically or to nearest
    int8          1 byte an entry and one float32 scale for each block of a row (the last axis):
                  x ~ scale * level[code], with dynamic-exponent or uniform levels

Dettmers et al., "8-bit Optimizers via Block-wise Quantization", ICLR 2022, arXiv:2110.02861,
section 2.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal, NamedTuple, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_lab import _checks, _compat
from jaxopt_lab.quantization.rounding import round_seeded, stochastic_round

Code = Literal["dynamic", "linear"]
_CODES = ("dynamic", "linear")
_HUGE = 2.0**127
_TINY = float(jnp.finfo(jnp.float32).tiny)


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

    def encode(
        self, x: jax.Array, key: jax.Array | None, seeds: jax.Array | None = None
    ) -> jax.Array:
        """Returns `x` in bfloat16.

        Args:
          x: floating array.
          key: one random key; not used if rounding is to nearest or `seeds` are given.
          seeds: of the key, if they are known.
        """
        if not self.stochastic:
            return x.astype(jnp.bfloat16)
        return round_seeded(x, seeds) if seeds is not None else stochastic_round(x, cast(Any, key))

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
    scales: jax.Array  # float32, shape (*leading axes, blocks in a row)


class Tiling(NamedTuple):
    """How matrices are cut into blocks along their rows, of which the last may be shorter."""

    rows: int
    length: int
    blocks: int  # of a row
    block_size: int

    @property
    def whole(self) -> int:
        """Blocks of a row that have the full size."""
        return self.length // self.block_size


@dataclasses.dataclass(frozen=True)
class Int8:
    """See `int8`."""

    block_size: int
    code: Code
    signed: bool | None

    def scales(self, x: jax.Array) -> jax.Array:
        """Returns the scales of the floating array `x`, shape (*leading axes, blocks of a row)."""
        x = _compat.unshard(self._floats(x))
        leading, length, _ = self._rows(x.shape)
        rows = x.reshape(*leading, length)
        full = length - length % self.block_size
        blocks = rows[..., :full].reshape(*leading, full // self.block_size, self.block_size)
        # The rest apart, because XLA does not vectorise the reduction of a padded array on a CPU.
        parts = [self._largest(blocks)]
        if full < length:
            parts.append(self._largest(rows[..., None, full:]))
        return jnp.concatenate(parts, axis=-1)

    def encode(
        self, x: jax.Array, key: jax.Array | None = None, scales: jax.Array | None = None
    ) -> Blocks:
        """Returns codes and scales of the floating array `x`; `key` is not used.

        Args:
          x: floating array.
          key: not used.
          scales: of `x`, if they are known.
        """
        del key
        scales = self.scales(x) if scales is None else scales
        x = self._floats(x)
        return Blocks(self._entrywise(self._codes, x, *self._divisors(scales)), scales)

    def decode(self, encoded: Blocks, dtype: Any) -> jax.Array:
        """Returns the array of dtype `dtype` that `encoded` stands for.

        Raises:
          ValueError: the number of scales does not fit the codes.
        """
        codes, scales = encoded
        leading, _, count = self._rows(codes.shape)
        if scales.shape != (*leading, count):
            raise ValueError(
                f"codes of shape {codes.shape} need scales of shape {(*leading, count)} "
                f"(block_size {self.block_size}), got shape {scales.shape}: was one of them split "
                "over devices?"
            )
        return self._entrywise(self._values, codes, *self._factors(scales)).astype(dtype)

    # Of tiles: what `scales`, `encode` and `decode` do, of operations that kernels have. A row of a
    # tile is a block, whole or the rest of an array's row; its scales have shape (rows, 1).

    def tiling(self, shape: tuple[int, ...]) -> Tiling:
        """Returns the blocks of an array as a matrix; if all are whole, each is a row of it."""
        leading, length, count = self._rows(shape)
        rows = math.prod(leading)
        if length == count * self.block_size:
            return Tiling(rows * count, self.block_size, 1, self.block_size)
        return Tiling(rows, length, count, self.block_size)

    def measure_tile(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """Returns the scales of a floating tile, and what its codes need."""
        x = self._floats(x)
        if self._signed and self.code == "dynamic":
            high, low = jnp.max(x, -1, keepdims=True), jnp.min(x, -1, keepdims=True)
            nan = _compat.has_nan(x, -1, keepdims=True)
            scales = jnp.where(nan, jnp.nan, self._scale(jnp.maximum(high, 0), low))
        else:
            size = _compat.max_magnitude(x, -1, keepdims=True)
            scales = self._scale(size, -size)
        return scales, *self._divisors(scales)

    def encode_tile(self, x: jax.Array, scales: jax.Array, *divisors: jax.Array) -> Blocks:
        """Encodes a floating tile, given what `measure_tile` returned."""
        return Blocks(self._codes(self._floats(x), *divisors), scales)

    def decode_tile(self, encoded: Blocks, dtype: Any) -> jax.Array:
        """Decodes what `encode_tile` returned."""
        codes, scales = encoded
        dynamic = self.code == "dynamic"
        levels = _dynamic_levels(codes, self._signed) if dynamic else codes.astype(jnp.float32)
        unit, scales = self._factors(scales)
        return ((levels * unit) * scales).astype(dtype)

    def _divisors(self, scales: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns two factors that make units of entries, and the least code of a positive one."""
        infinite = jnp.isinf(scales)
        zero = scales == 0
        # 4 / scale is a normal number for each scale that is one; infinity times _TINY is infinite
        # and every other number times _TINY**2 too small for a code. No infinity of our own: the
        # setting debug_infs would find it.
        inverse = jnp.where(zero, 0, 4 / jnp.where(zero, 1, scales))
        inverse = jnp.where(infinite, jnp.sign(scales) * _TINY, inverse)
        # With their dtype: where values pass through a branch, a Python number's is not weak any
        # more, and with x64 it is float64.
        unit = jnp.where(infinite, jnp.float32(_TINY), jnp.float32(self._top / 4))
        return inverse, unit, jnp.where(zero, jnp.float32(0), jnp.float32(1))

    def _factors(self, scales: jax.Array) -> tuple[jax.Array, jax.Array]:
        # Zero is a code of its own also below a scale that is infinite. Two factors for each block,
        # because a compiler would merge a constant with the scale and round the product.
        infinite = jnp.isinf(scales)
        unit = jnp.where(infinite, jnp.float32(_HUGE), jnp.float32(1 / self._top))
        return unit, jnp.where(infinite, jnp.sign(scales) * _HUGE, scales)

    def _codes(self, x: Any, inverse: Any, unit: Any, least: Any) -> jax.Array:
        units = (x * inverse) * unit
        if self.code == "dynamic":
            return _nearest_dynamic(units, x > 0, least, self._signed)
        low = -self._top if self._signed else jnp.where(x > 0, least, 0)
        codes = _round(jnp.clip(units, low, self._top))
        return codes.astype(jnp.int8 if self._signed else jnp.uint8)

    def _values(self, codes: Any, unit: Any, scales: Any) -> jax.Array:
        dynamic = self.code == "dynamic"
        levels = self._dynamic_levels(codes) if dynamic else codes.astype(jnp.float32)
        return (levels * unit) * scales

    def _dynamic_levels(self, codes: jax.Array) -> jax.Array:
        # Only a GPU looks up as fast as it reads, and fuses more of what follows.
        return _compat.platform_dependent(
            codes,
            cuda=lambda codes: jnp.asarray(dynamic_code(self._signed))[codes.astype(jnp.int32)],
            default=lambda codes: _dynamic_levels(codes, self._signed),
        )

    @property
    def _signed(self) -> bool:
        return self.signed is not False

    @property
    def _top(self) -> float:
        if self.code == "dynamic":
            return 1.0
        return 127.0 if self._signed else 255.0

    def _rows(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], int, int]:
        """Returns the leading axes, and length and number of blocks of each of their rows."""
        axes = max(len(shape) - 1, 0)
        while axes and math.prod(shape[axes:]) < self.block_size:
            axes -= 1
        length = math.prod(shape[axes:])
        return shape[:axes], length, -(-length // self.block_size)

    def _floats(self, x: jax.Array) -> jax.Array:
        # Codes have no derivative; that of the scales alone would be misleading.
        x = jax.lax.stop_gradient(x).astype(jnp.float32)
        return x if self._signed else jnp.maximum(x, 0)

    def _entrywise(self, fn: Any, x: jax.Array, *values: jax.Array) -> jax.Array:
        """Returns `fn(entry, *values of its block)` for each entry of `x`.

        Both forms compute the same. On a CPU, blocks as an axis of their own would keep XLA from
        working in place; on a GPU it fuses that form into fewer kernels.
        """
        leading, length, count = self._rows(x.shape)
        padded = count * self.block_size
        like, x = x, _compat.unshard(x)

        def flat(x: jax.Array, *values: jax.Array) -> jax.Array:
            def spread(value: jax.Array) -> jax.Array:
                blocks = jnp.broadcast_to(value[..., None], (*leading, count, self.block_size))
                return blocks.reshape(*leading, padded)[..., :length].reshape(x.shape)

            return fn(x, *map(spread, values))

        def blocked(x: jax.Array, *values: jax.Array) -> jax.Array:
            rows = x.reshape(*leading, length)
            if padded > length:
                rows = jnp.pad(rows, [(0, 0)] * len(leading) + [(0, padded - length)])
            blocks = rows.reshape(*leading, count, self.block_size)
            found = fn(blocks, *(value[..., None] for value in values))
            return found.reshape(*leading, padded)[..., :length].reshape(x.shape)

        values = tuple(map(_compat.unshard, values))
        found = _compat.platform_dependent(x, *values, cpu=flat, default=blocked)
        return _compat.reshard_like(found, like)

    def _largest(self, blocks: jax.Array) -> jax.Array:
        # One reduction of two operands: a CPU fuses it with what makes the entries, but not two.
        high, low = jax.lax.reduce(
            (blocks, blocks),
            (jnp.float32(0), jnp.float32(0)),
            lambda x, y: (jnp.maximum(x[0], y[0]), jnp.minimum(x[1], y[1])),
            (blocks.ndim - 1,),
        )
        return self._scale(high, low)

    def _scale(self, high: jax.Array, low: jax.Array) -> jax.Array:
        # The dynamic levels have 1 and lack -1: the largest entry gives the scale its sign. The
        # linear ones have both, and two entries can round to them.
        scale = jnp.where(high >= -low, high, low if self.code == "dynamic" else -low)
        # The quotient of numbers below it is unreliable where a device flushes them to zero.
        return jnp.where(jnp.abs(scale) <= _TINY, 0, scale)


def _round(x: jax.Array) -> jax.Array:
    """Rounds to nearest, ties to even; a conversion of floating numbers would saturate first."""
    return jax.lax.bitcast_convert_type(x + 1.5 * 2**23, jnp.int32)


def _nearest_dynamic(units: Any, positive: Any, least: Any, signed: bool) -> jax.Array:
    """Returns indices of the nearest levels in `dynamic_code`; arithmetic vectorises, search not.

    The number in units of its decade's lower end, less 1, times cells / 9, is a position in cells
    from there. The middle between the last level of a decade and the first of the next is 0.2.
    """
    book = dynamic_code(signed=signed).astype(np.float64)
    book = book[book >= 0]
    size = jnp.abs(units)
    lead, cells = size, jnp.float32(64 if signed else 128)
    for step in (4, 2, 1):
        lower = lead < 10.0**-step
        lead = jnp.where(lower, lead * 10.0**step, lead)
        cells = jnp.where(lower, cells * 0.5**step, cells)
    position = (lead * 10 - 1) * (cells / 9)
    first = 1 if signed else 2
    inside = jnp.where(position < 0.2, -1, jnp.minimum(jnp.floor(position), cells - 1))
    index = jnp.maximum(cells - first + 1 + inside, 1)
    index = jnp.where(size >= float((book[-2] + 1) / 2), len(book) - 1.0, index)
    index = jnp.where(size < float(book[1] / 2), 0, index)
    if signed:
        index = 127 + jnp.where(units < 0, -index, index)
    else:
        index = jnp.maximum(index, jnp.where(positive, least, 0))
    return _round(index).astype(jnp.uint8)


def _dynamic_levels(codes: jax.Array, signed: bool) -> jax.Array:
    """Returns `dynamic_code(signed)[codes]` to the last bits, without a look-up an entry.

    Of index + first - 1 = first * 2**k + cell, exponent and mantissa are the decade k and the place
    in it.
    """
    first = 1 if signed else 2
    offset = codes.astype(jnp.int32) - (127 if signed else 0)
    index = jnp.abs(offset)
    bits = jax.lax.bitcast_convert_type((index + (first - 1)).astype(jnp.float32), jnp.int32)
    decade = (bits >> 23) - (127 + first - 1)
    place = jax.lax.bitcast_convert_type((bits & 0x7FFFFF) | (127 << 23), jnp.float32)
    half_cell = jax.lax.bitcast_convert_type(((127 - first + 1) - decade) << 23, jnp.float32)
    power = jnp.where(decade & 4 != 0, 1e-3, 1e-7)
    power = power * jnp.where(decade & 2 != 0, 100.0, 1.0) * jnp.where(decade & 1 != 0, 10.0, 1.0)
    levels = power * (9 * place - 8 + 4.5 * half_cell)
    levels = jnp.where(index == (128 if signed else 255), 1, levels)
    levels = jnp.where(index == 0, 0, levels)
    return jnp.where(offset < 0, -levels, levels)


def int8(block_size: int = 256, code: Code = "dynamic", signed: bool | None = None) -> Int8:
    r"""Codec that keeps an array in 1 byte an entry and 4 bytes a block.

    Each row along the last axis is cut into blocks; trailing axes with fewer than `block_size`
    entries are taken together with the axis before. A block is divided by its entry of largest
    magnitude :math:`s` (linear: by its magnitude), and each quotient is replaced by the nearest of
    256 levels (255 if linear and signed):

    .. math::
      x_i \approx s \, l[c_i], \qquad c_i = \arg\min_c |x_i / s - l[c]|

    The largest entry and zeros are exact. Without a sign, a positive entry never becomes zero but
    at least the smallest positive level, since a second moment of zero below a first moment that
    is none makes Adam divide by `eps`; negative entries become zero. NaN turns its own block into
    NaN and touches no other; infinity stays, the finite entries of its block become zero or, if
    positive and without a sign, infinite. A block of numbers of magnitude 1.2e-38 or less becomes
    zero. Derivatives do not pass.

    Args:
      block_size: entries a block, from 1 on; the last block of a row may have fewer.
      code: "dynamic" for `dynamic_code`, which covers 7 decades: AdamW's movement over ten steps is
        off by 7% in rms where the gradients of a block span three decades. "linear" for levels at
        equal distance, within :math:`|s| / 254` of the entry (signed) or :math:`s / 510` (entries
        below that go up to :math:`s / 255`): off by 60% there, and on a CPU a third faster.
      signed: whether the levels reach from -1 to 1 or from 0 to 1, which has twice the resolution.
        None leaves the choice to `quantize_state`, and means signed elsewhere.

    Returns:
      A codec.

    Raises:
      ValueError: `block_size` is below 1, or `code` unknown.
      TypeError: `block_size` is no integer, or `signed` neither a boolean nor None.

    Examples:
      >>> import jax.numpy as jnp
      >>> codec = int8(block_size=4, code="linear")
      >>> x = jnp.array([1.27, -0.5, 0.0, 0.333, 1e-3, -1e-3])
      >>> codec.encode(x).codes
      Array([ 127,  -50,    0,   33,  127, -127], dtype=int8)
      >>> [round(float(value), 4) for value in codec.decode(codec.encode(x), jnp.float32)]
      [1.27, -0.5, 0.0, 0.33, 0.001, -0.001]

    References:
      Dettmers et al., `8-bit Optimizers via Block-wise Quantization
      <https://arxiv.org/abs/2110.02861>`_, ICLR 2022, section 2.
    """
    _checks.check_positive_integer(block_size=block_size)
    _checks.check_choice(_CODES, code=code)
    if signed is not None and not isinstance(signed, bool):
        raise TypeError(f"signed must be True, False or None, got {signed!r}")
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
