"""The dtypes that sums are kept in."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp


def wide(*dtypes: Any) -> Any:
    """Returns the dtype of scores, sums and lse: float64 if one is float64, else float32.

    Not `jnp.promote_types`, which refuses to mix dtypes under strict promotion.
    """
    return jnp.float64 if any(x == jnp.float64 for x in dtypes) else jnp.float32
