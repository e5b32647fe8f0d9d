"""Facts about jax and its compilers that the packages rely on or work around."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxopt_lab import _compat


@pytest.mark.parametrize("shape", [(3, 4), (64, 256)])
@pytest.mark.parametrize("axis", [None, 0, -1, (-2, -1)])
def test_largest_magnitude_keeps_nan(shape, axis):
    """Compiled for a CPU, `jnp.max` of the larger shape does not."""
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    find = jax.jit(lambda x: _compat.max_magnitude(x, axis, keepdims=True))
    np.testing.assert_array_equal(find(x), np.max(np.abs(x), axis, keepdims=True))
    for bad in (np.nan, np.inf, -np.inf):
        x[1, 2] = bad
        np.testing.assert_array_equal(find(x), np.max(np.abs(x), axis, keepdims=True))
