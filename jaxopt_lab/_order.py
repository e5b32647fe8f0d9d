"""The k-th largest magnitude of many arrays together, without a sort and without joining them."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxopt_lab import _compat


def bit_patterns(magnitudes: Sequence[jax.Array]) -> list[jax.Array]:
    """Returns non-negative floats as unsigned integers, which have their order."""
    dtype = jnp.result_type(*magnitudes)
    unsigned = jnp.dtype(f"uint{jnp.finfo(dtype).bits}")
    return [jax.lax.bitcast_convert_type(x.astype(dtype), unsigned) for x in magnitudes]


def pattern_at(patterns: Sequence[jax.Array], index: jax.Array) -> jax.Array:
    """Returns the pattern at `index` of all together, the largest first; 0 past the end.

    It is bisected, bit by bit: the largest pattern that more than `index` entries reach.

    Args:
      patterns: from `bit_patterns`; below 2**32 entries.
      index: uint32, shape ().

    Returns:
      A pattern, shape ().
    """
    unsigned = patterns[0].dtype
    bits = 8 * unsigned.itemsize

    def set_bit(step: jax.Array, found: jax.Array) -> jax.Array:
        # Without jit the loop counts with Python's numbers.
        shift = jnp.asarray(bits - 2 - step, unsigned)
        candidate = found | jax.lax.shift_left(jnp.ones((), unsigned), shift)
        reached = sum(jnp.sum(x >= candidate, dtype=jnp.uint32) for x in patterns)
        return jnp.where(reached > index, candidate, found)

    return _compat.fori_loop(0, bits - 1, set_bit, jnp.zeros((), unsigned))
