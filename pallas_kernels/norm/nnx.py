"""Flax's `nnx.RMSNorm` and `nnx.LayerNorm`, computed by `rms_norm` and `layer_norm`.

    from pallas_kernels.norm import nnx as norms
    layer = norms.RMSNorm(64, rngs=rngs)

They are the same layers with the same parameters. A call with a mask, over other axes than the last
or over devices is left to Flax.
"""

from __future__ import annotations

import jax
from flax import nnx

from pallas_kernels.norm import norms
from pallas_kernels.norm.linen import is_special

__all__ = ["LayerNorm", "RMSNorm"]


class RMSNorm(nnx.RMSNorm):
    """`flax.nnx.RMSNorm`, whose backward pass keeps its input and one number a row.

    Examples:
      >>> from flax import nnx
      >>> import jax.numpy as jnp
      >>> from pallas_kernels.norm.nnx import RMSNorm
      >>> RMSNorm(8, rngs=nnx.Rngs(0))(jnp.ones((2, 8))).shape
      (2, 8)
    """

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Normalises x (..., d)."""
        if mask is not None or is_special(self):
            return super().__call__(x, mask=mask)
        scale = None if self.scale is None else self.scale[...]
        x, scale = self.promote_dtype((x, scale), dtype=self.dtype)
        return norms.rms_norm(x, scale, epsilon=self.epsilon)


class LayerNorm(nnx.LayerNorm):
    """`flax.nnx.LayerNorm`, whose backward pass keeps its input and two numbers a row.

    The variance is that of the centred input; Flax's default subtracts the square of the mean,
    which loses digits where the mean is large.

    Examples:
      >>> from flax import nnx
      >>> import jax.numpy as jnp
      >>> from pallas_kernels.norm.nnx import LayerNorm
      >>> LayerNorm(8, rngs=nnx.Rngs(0))(jnp.ones((2, 8))).shape
      (2, 8)
    """

    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        """Normalises x (..., d)."""
        if mask is not None or is_special(self):
            return super().__call__(x, mask=mask)
        scale = None if self.scale is None else self.scale[...]
        bias = None if self.bias is None else self.bias[...]
        x, scale, bias = self.promote_dtype((x, scale, bias), dtype=self.dtype)
        return norms.layer_norm(x, scale, bias, epsilon=self.epsilon)
