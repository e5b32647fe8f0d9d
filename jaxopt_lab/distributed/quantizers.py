"""Quantisers: all entries of a vector travel, in 1, 4 or 8 bits each, with their scales.

They are compressors, see `compressors`.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxopt_lab import _checks, _compat

_SCALES = ("l1", "l2")


class SignPayload(NamedTuple):
    """Payload of `sign`."""

    bits: jax.Array  # uint8, shape (ceil(size / 8),); a set bit is a sign that is not negative
    scale: jax.Array  # shape ()


@dataclasses.dataclass(frozen=True)
class Sign:
    """See `sign`."""

    scale: str
    linear = False

    def compress(self, x: jax.Array, key: jax.Array) -> SignPayload:
        """Returns the signs and their scale."""
        del key
        size = max(x.size, 1)
        if self.scale == "l1":
            scale = jnp.sum(jnp.abs(x)) / size
        else:
            scale = jnp.sqrt(jnp.sum(jnp.square(x)) / size)
        return SignPayload(jnp.packbits(x >= 0), scale)

    def decompress(self, payload: SignPayload, size: int, key: jax.Array) -> jax.Array:
        """Returns scale times sign."""
        del key
        positive = jnp.unpackbits(payload.bits, count=size) != 0
        return jnp.where(positive, payload.scale, -payload.scale)

    def payload_bytes(self, size: int) -> int:
        """Returns a byte for each 8 entries and 4 for the scale."""
        return -(-size // 8) + 4

    def contraction(self, size: int) -> float | None:
        """Returns 1 / size with the L1 scale: the constant of a vector with a single entry."""
        return 1 / max(size, 1) if self.scale == "l1" else None

    def variance(self, size: int) -> None:
        """Returns None."""
        del size


class BlockPayload(NamedTuple):
    """Payload of `stochastic_int8` and `stochastic_int4`."""

    codes: jax.Array  # int8, shape (size,), or two codes in a uint8, shape (ceil(size / 2),)
    scales: jax.Array  # shape (ceil(size / block_size),)


@dataclasses.dataclass(frozen=True)
class StochasticInteger:
    """See `stochastic_int8` and `stochastic_int4`."""

    bits: int
    block_size: int
    linear = False

    def compress(self, x: jax.Array, key: jax.Array) -> BlockPayload:
        """Returns randomly rounded multiples of the blocks' scales."""
        blocks = jnp.pad(x, (0, -x.size % self.block_size)).reshape(-1, self.block_size)
        scales = _compat.max_magnitude(blocks, axis=1) / self._largest
        units = blocks / jnp.where(scales == 0, jnp.ones_like(scales), scales)[:, None]
        units = units.reshape(-1)[: x.size]
        codes = jnp.floor(units + jax.random.uniform(key, x.shape, x.dtype))
        # The sum of 127 and the largest number below 1 rounds to 128.
        codes = jnp.clip(codes, -self._largest, self._largest).astype(jnp.int8)
        return BlockPayload(_pack(codes) if self.bits == 4 else codes, scales)

    def decompress(self, payload: BlockPayload, size: int, key: jax.Array) -> jax.Array:
        """Returns code times scale."""
        del key
        codes = _unpack(payload.codes, size) if self.bits == 4 else payload.codes
        codes = jnp.pad(codes, (0, -size % self.block_size)).reshape(-1, self.block_size)
        return (codes.astype(payload.scales.dtype) * payload.scales[:, None]).reshape(-1)[:size]

    def payload_bytes(self, size: int) -> int:
        """Returns the bytes of the codes and 4 for each block."""
        return -(-size * self.bits // 8) + 4 * -(-size // self.block_size)

    def contraction(self, size: int) -> float | None:
        """Returns 1 - omega, or None if that is not positive."""
        alpha = 1 - self.variance(size)
        return alpha if alpha > 0 else None

    def variance(self, size: int) -> float:
        """Returns (entries a block - 1) / (4 largest^2): a block's largest entry is exact."""
        return max(min(self.block_size, size) - 1, 0) / (4 * self._largest**2)

    @property
    def _largest(self) -> int:
        return 2 ** (self.bits - 1) - 1


def sign(scale: Literal["l1", "l2"] = "l1") -> Sign:
    r"""Sends one bit an entry, its sign, and one scale.

    .. math::
      C(x) = \frac{\|x\|_1}{d} \mathrm{sgn}(x) \quad \text{or} \quad
      \frac{\|x\|_2}{\sqrt d} \mathrm{sgn}(x), \qquad \mathrm{sgn}(0) = 1

    With the L1 scale, :math:`\|C(x) - x\|^2 = \|x\|_2^2 - \|x\|_1^2 / d`, so that the compressor is
    contractive for every vector. With the L2 scale the norm is kept and the error of a vector with
    few entries is up to :math:`2 \|x\|`: 1-bit Adam uses it on momenta, which have many.

    Args:
      scale: "l1" or "l2".

    Returns:
      A `Compressor`. A NaN or infinity turns the whole vector into NaN or infinity.

    Raises:
      ValueError: an unknown scale.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jaxopt_lab.distributed.quantizers import sign
      >>> x, key = jnp.array([1.0, -2.0, 3.0]), jax.random.key(0)
      >>> sign().decompress(sign().compress(x, key), 3, key)
      Array([ 2., -2.,  2.], dtype=float32)
      >>> sign().payload_bytes(1_000_000)
      125004
    """
    _checks.check_choice(_SCALES, scale=scale)
    return Sign(scale)


def stochastic_int8(block_size: int = 256) -> StochasticInteger:
    r"""Sends a byte an entry and a scale a block, rounded at random so that the mean is right.

    .. math::
      s = \max_j |x_j| / 127, \quad C(x)_j = s \lfloor x_j / s + r_j \rfloor, \quad
      r_j \sim U[0, 1)

    Unbiased, with :math:`\omega = (b - 1) / (4 \cdot 127^2)` for blocks of b entries. Zero is
    exact; a NaN or infinity turns its own block into NaN.

    Args:
      block_size: b; the last block may have fewer entries.

    Returns:
      A `Compressor`.

    Raises:
      ValueError: a block size below 1.
      TypeError: a block size that is no integer.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jaxopt_lab.distributed.quantizers import stochastic_int8
      >>> stochastic_int8().compress(jnp.array([-1.27, 0.0, 0.5]), jax.random.key(0)).codes
      Array([-127,    0,   50], dtype=int8)
    """
    return _stochastic(8, block_size)


def stochastic_int4(block_size: int = 64) -> StochasticInteger:
    r"""Sends half a byte an entry and a scale a block: `stochastic_int8` with 7 in place of 127.

    Unbiased, with :math:`\omega = (b - 1) / (4 \cdot 7^2)` for blocks of b entries. Two codes from
    -7 to 7 share a byte, the first in its low half.

    Args:
      block_size: b; the last block may have fewer entries.

    Returns:
      A `Compressor`.

    Raises:
      ValueError: a block size below 1.
      TypeError: a block size that is no integer.

    Examples:
      >>> from jaxopt_lab.distributed.quantizers import stochastic_int4
      >>> stochastic_int4(block_size=64).payload_bytes(1024)
      576
    """
    return _stochastic(4, block_size)


def _stochastic(bits: int, block_size: int) -> StochasticInteger:
    _checks.check_positive_integer(block_size=block_size)
    return StochasticInteger(bits, block_size)


def _pack(codes: jax.Array) -> jax.Array:
    pairs = jnp.pad((codes + 8).astype(jnp.uint8), (0, codes.size % 2), constant_values=8)
    return pairs[::2] | (pairs[1::2] << 4)


def _unpack(packed: jax.Array, size: int) -> jax.Array:
    pairs = jnp.stack([packed & 15, packed >> 4], axis=1)
    return pairs.reshape(-1)[:size].astype(jnp.int8) - 8
