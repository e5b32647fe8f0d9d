"""Flax's `linen.RMSNorm` and `linen.LayerNorm`, computed by `rms_norm` and `layer_norm`.

    from pallas_kernels.norm import linen as norms
    y = norms.RMSNorm()(x)

They are the same layers with the same parameters. A call with a mask, over other axes than the last
or over devices is left to Flax.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen
from flax.linen.dtypes import canonicalize_dtype

from pallas_kernels.norm import norms

__all__ = ["LayerNorm", "RMSNorm"]


class RMSNorm(linen.RMSNorm):
    """`flax.linen.RMSNorm`, whose backward pass keeps its input and one number a row.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from pallas_kernels.norm.linen import RMSNorm
      >>> layer, x = RMSNorm(), jnp.ones((2, 8))
      >>> layer.apply(layer.init(jax.random.key(0), x), x).shape
      (2, 8)
    """

    @linen.compact
    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        """Normalises x (..., d)."""
        if mask is not None or is_special(self):
            return super().__call__(x, mask=mask)
        scale = None
        if self.use_scale:
            scale = self.param("scale", self.scale_init, x.shape[-1:], self.param_dtype)
        # The result is rounded to the layer's dtype, and the input is not.
        dtype = canonicalize_dtype(x, scale, dtype=self.dtype)
        x = x.astype(jnp.promote_types(x.dtype, dtype))
        return norms.rms_norm(x, scale, epsilon=self.epsilon).astype(dtype)


class LayerNorm(linen.LayerNorm):
    """`flax.linen.LayerNorm`, whose backward pass keeps its input and two numbers a row.

    The variance is that of the centred input; Flax's default subtracts the square of the mean,
    which loses digits where the mean is large.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from pallas_kernels.norm.linen import LayerNorm
      >>> layer, x = LayerNorm(), jnp.ones((2, 8))
      >>> layer.apply(layer.init(jax.random.key(0), x), x).shape
      (2, 8)
    """

    @linen.compact
    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        """Normalises x (..., d)."""
        if mask is not None or is_special(self):
            return super().__call__(x, mask=mask)
        scale = bias = None
        if self.use_scale:
            scale = self.param("scale", self.scale_init, x.shape[-1:], self.param_dtype)
        if self.use_bias:
            bias = self.param("bias", self.bias_init, x.shape[-1:], self.param_dtype)
        dtype = canonicalize_dtype(x, scale, bias, dtype=self.dtype)
        x = x.astype(jnp.promote_types(x.dtype, dtype))
        return norms.layer_norm(x, scale, bias, epsilon=self.epsilon).astype(dtype)


def is_special(layer: Any) -> bool:
    """Whether a layer does not normalise the last axis, on each device alone, in float32."""
    axes = (layer.reduction_axes, layer.feature_axes)
    in_float32 = getattr(layer, "force_float32_reductions", True)  # nnx has no choice
    return layer.axis_name is not None or not in_float32 or any(a not in (-1, (-1,)) for a in axes)
