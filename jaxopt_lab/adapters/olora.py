r"""OLoRA: the factors start as the leading part of an orthogonal-triangular decomposition.

    K^T = Q R,    a = R[:r]^T,    b = Q[:, :r]^T,    K_0 = K - s a b

Büyükakyüz, "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models", 2024,
arXiv:2406.01775.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxopt_lab.adapters._kernels import Kernel
from jaxopt_lab.adapters.adapt import Initializer


def olora() -> Initializer:
    r"""Starts from the first r steps of the decomposition of the transposed kernel.

    .. math::
      K^\top = Q R, \quad a = R_{:r}^\top, \quad b = Q_{:,:r}^\top, \quad K_0 = K - s\, a b

    The rows of `b` are orthonormal, and :math:`a b` is right for the first r inputs of the kernel:
    what is kept depends on the order of the inputs. Nothing is divided by the scaling, so that
    alpha decides how much leaves the base, as in `peft`.

    Returns:
      An initialiser for `init_adapters`; it draws nothing.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxopt_lab import adapters
      >>> params = {"w": jnp.array([[2.0, 0.0], [1.0, 5.0]])}
      >>> config = adapters.LoraConfig(target_modules=["w"], r=1, lora_alpha=1)
      >>> base, lora = adapters.init_adapters(params, config, init=adapters.olora())
      >>> base.params["w"].round(6) + 0.0
      Array([[0., 0.],
             [0., 5.]], dtype=float32)

    References:
      Büyükakyüz, `OLoRA <https://arxiv.org/abs/2406.01775>`_, 2024.
    """

    def init(kernel: Kernel, matrices: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        del key
        q, r = jnp.linalg.qr(jnp.swapaxes(matrices, -1, -2))
        a = jnp.swapaxes(r[:, : kernel.r], -1, -2)
        return a, jnp.swapaxes(q[:, :, : kernel.r], -1, -2)

    return init
