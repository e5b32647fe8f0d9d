r"""Compressors: what of a vector travels, exact in a few entries.

A compressor C is contractive with constant alpha, or unbiased with relative variance omega, if

    E |C(x) - x|^2 <= (1 - alpha) |x|^2,          E C(x) = x,  E |C(x) - x|^2 <= omega |x|^2

Error feedback wants the first; a mean without memory wants the second.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_lab import _checks


class Compressor(Protocol):
    """What a vector is turned into before it is sent; instances are hashable and hold no arrays."""

    @property
    def linear(self) -> bool:
        """Whether payloads made with one key may be averaged in place of the vectors."""
        ...

    def compress(self, x: jax.Array, key: jax.Array) -> Any:
        """Returns what goes over the wire.

        Args:
          x: shape (size,), float32 or float64.
          key: a random key.

        Returns:
          A tree of arrays, whose floating dtype is that of `x`.
        """
        ...

    def decompress(self, payload: Any, size: int, key: jax.Array) -> jax.Array:
        """Returns the vector that a payload stands for.

        Args:
          payload: what `compress` returned.
          size: number of entries of the vector.
          key: the key that `compress` was given.

        Returns:
          An array of shape (size,).
        """
        ...

    def payload_bytes(self, size: int) -> int:
        """Returns the bytes of the payload of a float32 vector with `size` entries."""
        ...

    def contraction(self, size: int) -> float | None:
        """Returns alpha for vectors of `size` entries, or None if some of them do not contract."""
        ...

    def variance(self, size: int) -> float | None:
        """Returns omega for vectors of `size` entries, or None if the mean is another vector."""
        ...


def check_compressor(compressor: Any) -> None:
    """Refuses what is no `Compressor`.

    Raises:
      TypeError: the message says what was given, and that a factory wants to be called.
    """
    methods = ("compress", "decompress", "payload_bytes", "contraction", "variance")
    has_all = all(callable(getattr(compressor, name, None)) for name in methods)
    if has_all and hasattr(compressor, "linear") and not isinstance(compressor, type):
        return
    name = getattr(compressor, "__name__", None)
    hint = f": call it first, as in {name}(...)" if name and callable(compressor) else ""
    found = name or repr(compressor)
    raise TypeError(f"compressor must be a Compressor, such as top_k(0.01), got {found}{hint}")


class TopKPayload(NamedTuple):
    """Payload of `top_k`."""

    values: jax.Array  # shape (k,)
    indices: jax.Array  # int32, shape (k,)


@dataclasses.dataclass(frozen=True)
class TopK:
    """See `top_k`."""

    fraction: float | None
    count: int | None
    linear = False

    def kept(self, size: int) -> int:
        """Returns the number of entries kept of `size`."""
        if self.count is not None:
            return min(self.count, size)
        return _share(self.fraction or 0.0, size)

    def compress(self, x: jax.Array, key: jax.Array) -> TopKPayload:
        """Returns the entries of largest magnitude and their places."""
        del key
        _check_addressable(x.size)
        _, indices = jax.lax.top_k(jnp.abs(x), self.kept(x.size))
        # XLA:CPU selects only where the result is used as a whole. In a simulation the replicas'
        # payloads are parts of one result, and without the barrier it sorts, 10 to 30 times slower.
        indices = jax.lax.optimization_barrier(indices)
        return TopKPayload(x[indices], indices)

    def decompress(self, payload: TopKPayload, size: int, key: jax.Array) -> jax.Array:
        """Returns the vector that is zero elsewhere."""
        del key
        return _scatter(payload.values, payload.indices, size)

    def payload_bytes(self, size: int) -> int:
        """Returns 8 k."""
        return 8 * self.kept(size)

    def contraction(self, size: int) -> float:
        """Returns k / size."""
        return self.kept(size) / max(size, 1)

    def variance(self, size: int) -> None:
        """Returns None."""
        del size


@dataclasses.dataclass(frozen=True)
class RandomK:
    """See `random_k`."""

    fraction: float
    unbiased: bool
    linear = True

    def compress(self, x: jax.Array, key: jax.Array) -> jax.Array:
        """Returns the entries at the places that the key gives, shape (k,)."""
        _check_addressable(x.size)
        indices, lengths = self._draw(x.size, key)
        return x[indices] * lengths.astype(x.dtype) if self.unbiased else x[indices]

    def decompress(self, payload: jax.Array, size: int, key: jax.Array) -> jax.Array:
        """Returns the vector that is zero elsewhere."""
        return _scatter(payload, self._draw(size, key)[0], size)

    def payload_bytes(self, size: int) -> int:
        """Returns 4 k."""
        return 4 * _share(self.fraction, size)

    def contraction(self, size: int) -> float | None:
        """Returns one over the length of the longest interval, k / size where that is whole."""
        return None if self.unbiased else 1 / self._longest(size)

    def variance(self, size: int) -> float | None:
        """Returns the length of the longest interval less 1."""
        return self._longest(size) - 1.0 if self.unbiased else None

    def _longest(self, size: int) -> int:
        return -(-size // max(_share(self.fraction, size), 1)) if size else 1

    def _draw(self, size: int, key: jax.Array) -> tuple[jax.Array, np.ndarray]:
        """Returns one place in each of k intervals, and their lengths."""
        k = _share(self.fraction, size)
        length, longer = divmod(size, max(k, 1))
        lengths = length + (np.arange(k) < longer).astype(np.int32)
        starts = (np.cumsum(lengths) - lengths).astype(np.int32)
        return jnp.asarray(starts) + jax.random.randint(key, (k,), 0, lengths), lengths


@dataclasses.dataclass(frozen=True)
class Identity:
    """See `identity`."""

    linear = True

    def compress(self, x: jax.Array, key: jax.Array) -> jax.Array:
        """Returns `x`."""
        del key
        return x

    def decompress(self, payload: jax.Array, size: int, key: jax.Array) -> jax.Array:
        """Returns the payload."""
        del size, key
        return payload

    def payload_bytes(self, size: int) -> int:
        """Returns 4 size."""
        return 4 * size

    def contraction(self, size: int) -> float:
        """Returns 1."""
        del size
        return 1.0

    def variance(self, size: int) -> float:
        """Returns 0."""
        del size
        return 0.0


def top_k(fraction: float | None = None, *, count: int | None = None) -> TopK:
    r"""Keeps the k entries of largest magnitude, exactly: 8 bytes each.

    .. math::
      \|C(x) - x\|^2 \le (1 - k/d) \|x\|^2

    Each replica keeps other entries, so that payloads are gathered: N - 1 of them leave each
    replica, which is less than an all-reduce of float32 only for k / d < 1 / N. Of equal
    magnitudes, the lowest index wins. Selecting is a sort on most backends.

    Args:
      fraction: k / d in (0, 1]; k is rounded and at least 1.
      count: k itself, in place of `fraction`.

    Returns:
      A `Compressor`.

    Raises:
      ValueError: a fraction outside (0, 1], a count below 1, or not exactly one of the two.
      TypeError: a count that is no integer.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jaxopt_lab.distributed.compressors import top_k
      >>> x, key = jnp.array([0.1, -3.0, 2.0, 0.5]), jax.random.key(0)
      >>> top_k(0.5).decompress(top_k(0.5).compress(x, key), 4, key)
      Array([ 0., -3.,  2.,  0.], dtype=float32)
    """
    if (fraction is None) == (count is None):
        raise ValueError(
            f"top_k needs either fraction or count, got fraction={fraction} and count={count}"
        )
    if fraction is not None:
        _check_share(fraction)
    else:
        _checks.check_positive_integer(count=count)
    return TopK(fraction, count)


def random_k(fraction: float, *, unbiased: bool = False) -> RandomK:
    r"""Keeps one random entry of each of k intervals: 4 bytes each, and payloads can be averaged.

    All replicas draw the same places from a shared key, so that these are not sent. The d entries
    are cut into k intervals whose lengths differ by at most one; an entry is kept with probability
    one over its interval's length, whatever the others do. With l the longest,

    .. math::
      E \|C(x) - x\|^2 \le (1 - 1/l) \|x\|^2 \quad \text{or, unbiased,} \quad
      E \|C(x) - x\|^2 \le (l - 1) \|x\|^2

    the constants of k places drawn at once, where k divides d. Drawing costs O(k) instead of the
    O(d) of a permutation.

    Args:
      fraction: k / d in (0, 1]; k is rounded and at least 1.
      unbiased: multiplies what is kept by its interval's length. For a mean without memory; with
        error feedback the error would grow.

    Returns:
      A `Compressor`.

    Raises:
      ValueError: a fraction outside (0, 1].

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jaxopt_lab.distributed.compressors import random_k
      >>> random_k(0.25).compress(3 * jnp.ones(8), jax.random.key(0))
      Array([3., 3.], dtype=float32)
    """
    _check_share(fraction)
    _checks.check_flag(unbiased=unbiased)
    return RandomK(fraction, unbiased)


def identity() -> Identity:
    """Keeps everything: a method with this compressor is the method without compression.

    Returns:
      A `Compressor`.

    Examples:
      >>> from jaxopt_lab.distributed.compressors import identity
      >>> identity().payload_bytes(1000)
      4000
    """
    return Identity()


def _share(fraction: float, size: int) -> int:
    return min(max(round(fraction * size), 1), size)


def _check_share(fraction: float) -> None:
    _checks.check_scalar(fraction=fraction)
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"fraction must be in (0, 1], got {fraction}")


def _check_addressable(size: int) -> None:
    largest = np.iinfo(np.int32).max
    if size > largest:
        raise ValueError(
            f"a vector of {size} entries cannot be addressed by int32 (at most {largest}); "
            "partition the parameters (optax.partition)"
        )


def _scatter(values: jax.Array, indices: jax.Array, size: int) -> jax.Array:
    zeros = jnp.zeros(size, values.dtype)
    return zeros.at[indices].set(values, unique_indices=True, mode="promise_in_bounds")
