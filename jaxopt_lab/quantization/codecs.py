r"""Codecs: how one array is kept in fewer bytes.

    bfloat16      2 bytes an entry, rounded stochastically or to nearest
    int8          1 byte an entry and one float32 scale for each block of a row (the last axis):
                  x ~ scale * level[code], with dynamic-exponent or uniform levels

Dettmers et al., "8-bit Optimizers via Block-wise Quantization", ICLR 2022, arXiv:2110.02861,
section 2.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, NamedTuple, Protocol, cast

import jax
import jax.numpy as jnp

from jaxopt_lab import _checks, _compat
from jaxopt_lab.quantization._dynamic import (
    compute_levels,
    levels_by_table,
    levels_of,
    nearest,
    nearest_by_table,
    round_to_integer,
)
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
        """Returns the array that `encoded` stands for, in `dtype`."""
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
    _checks.check_flag(stochastic=stochastic)
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
        return Blocks(self._entrywise(self._codes, self._floats(x), scales), scales)

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

        def decoded(codes: Any, scales: Any, spread: Any, tables: bool) -> jax.Array:
            return self._values(codes, scales, spread, levels_by_table if tables else levels_of)

        return self._entrywise(decoded, codes, scales).astype(dtype)

    # Of tiles: what `scales`, `encode` and `decode` do, of operations that kernels have; with
    # `tables` by look-up, which they have not. A row of a tile is a block, whole or the rest of an
    # array's row; its scales have shape (rows, 1).

    def tiling(self, shape: tuple[int, ...]) -> Tiling:
        """Returns the blocks of an array as a matrix; if all are whole, each is a row of it."""
        leading, length, count = self._rows(shape)
        rows = math.prod(leading)
        if length == count * self.block_size:
            return Tiling(rows * count, self.block_size, 1, self.block_size)
        return Tiling(rows, length, count, self.block_size)

    def measure_tile(self, x: jax.Array) -> jax.Array:
        """Returns the scales of a floating tile."""
        x = self._floats(x) if self._signed else jnp.maximum(self._floats(x), 0)
        if self._signed and self.code == "dynamic":
            high, low = jnp.max(x, -1, keepdims=True), jnp.min(x, -1, keepdims=True)
            nan = _compat.has_nan(x, -1, keepdims=True)
            return jnp.where(nan, jnp.nan, self._scale(jnp.maximum(high, 0), low))
        size = _compat.max_magnitude(x, -1, keepdims=True)
        return self._scale(size, -size)

    def encode_tile(self, x: jax.Array, scales: jax.Array, tables: bool) -> Blocks:
        """Encodes a floating tile, given what `measure_tile` returned."""
        return Blocks(self._codes(self._floats(x), scales, lambda value: value, tables), scales)

    def decode_tile(self, encoded: Blocks, dtype: Any, tables: bool) -> jax.Array:
        """Decodes what `encode_tile` returned."""
        codes, scales = encoded
        levels = levels_by_table if tables else compute_levels
        return self._values(codes, scales, lambda value: value, levels).astype(dtype)

    def _codes(self, x: Any, scales: Any, spread: Any, tables: bool) -> jax.Array:
        """Returns the codes of entries; `spread` gives each entry what its block has."""
        # 4 / scale is a normal number for each scale that is one.
        inverse = 4 / jnp.where(scales == 0, 1, scales)
        dynamic = self.code == "dynamic"
        if dynamic and tables:
            codes = nearest_by_table(x, spread(inverse), self._signed)
        else:
            # Infinity times _TINY is infinite and every other number times _TINY**2 too small for a
            # code. With their dtype: where values pass through a branch, a Python number's is not
            # weak any more, and with x64 it is float64.
            infinite = jnp.isinf(scales)
            inverse = jnp.where(infinite, jnp.sign(scales) * _TINY, inverse)
            unit = jnp.where(infinite, jnp.float32(_TINY), jnp.float32(self._top / 4))
            units = (x * spread(inverse)) * spread(unit)
            codes = nearest(units, self._signed) if dynamic else self._nearest_linear(units)
        codes = codes.astype(jnp.int8 if self._signed and not dynamic else jnp.uint8)
        if self._signed:
            return codes
        # A positive entry does not become zero.
        least = jnp.minimum(x, spread(scales)) > 0
        return jnp.maximum(codes, least.astype(jnp.uint8))

    def _nearest_linear(self, units: jax.Array) -> jax.Array:
        # NaN, which is less than nothing, gets a code that is not zero.
        low = -self._top if self._signed else 0
        units = jnp.where(units < self._top, jnp.maximum(units, low), self._top)
        return round_to_integer(units)

    def _values(self, codes: Any, scales: Any, spread: Any, dynamic_levels: Any) -> jax.Array:
        """Returns what codes stand for; `spread` gives each entry what its block has."""
        if self.code == "dynamic":
            levels = dynamic_levels(codes, self._signed)
            # Also below a scale that is infinite.
            return jnp.where(levels == 0, 0, levels * spread(scales))
        # Two factors for each block, because a compiler would merge a constant with the scale and
        # round the product.
        infinite = jnp.isinf(scales)
        unit = jnp.where(infinite, jnp.float32(_HUGE), jnp.float32(1 / self._top))
        scales = jnp.where(infinite, jnp.sign(scales) * _HUGE, scales)
        return (codes.astype(jnp.float32) * spread(unit)) * spread(scales)

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
        # With dynamic levels what is negative goes later: a CPU then writes a new second moment
        # once, where it would look up the old one in each kernel that reads the new.
        return x if self._signed or self.code == "dynamic" else jnp.maximum(x, 0)

    def _entrywise(self, fn: Any, x: jax.Array, scales: jax.Array) -> jax.Array:
        """Returns `fn(entries, scales, spread, tables)`, which works entry by entry.

        Both forms compute the same. On a CPU, blocks as an axis of their own would keep XLA from
        working in place; on a GPU it fuses that form into fewer kernels.
        """
        leading, length, count = self._rows(x.shape)
        padded = count * self.block_size
        like, x = x, _compat.unshard(x)

        def flat(x: jax.Array, scales: jax.Array) -> jax.Array:
            def spread(value: jax.Array) -> jax.Array:
                shape = (*leading, count, self.block_size)
                blocks = jax.lax.broadcast_in_dim(value, shape, range(value.ndim))
                rows = blocks.reshape(*leading, padded)
                return (rows[..., :length] if padded > length else rows).reshape(x.shape)

            return fn(x, scales, spread, tables=True)

        def blocked(x: jax.Array, scales: jax.Array) -> jax.Array:
            rows = x.reshape(*leading, length)
            if padded > length:
                rows = jnp.pad(rows, [(0, 0)] * len(leading) + [(0, padded - length)])
            blocks = rows.reshape(*leading, count, self.block_size)
            found = fn(blocks, scales, lambda value: value[..., None], tables=False)
            return found.reshape(*leading, padded)[..., :length].reshape(x.shape)

        found = _compat.platform_dependent(x, _compat.unshard(scales), cpu=flat, default=blocked)
        return _compat.reshard_like(found, like)

    def _largest(self, blocks: jax.Array) -> jax.Array:
        # One reduction of two operands: a CPU fuses it with what makes the entries, but not two,
        # nor one of one operand, which it leaves to a library.
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
        if not self._signed:
            scale = jnp.maximum(high, low)
        else:
            scale = jnp.where(high >= -low, high, low if self.code == "dynamic" else -low)
        # The quotient of numbers below it is unreliable where a device flushes them to zero.
        return jnp.where(jnp.abs(scale) <= _TINY, 0, scale)


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
        below that go up to :math:`s / 255`): off by 60% there.
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
