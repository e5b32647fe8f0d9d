r"""PiSSA: the factors start as the principal part of the kernel, the base keeps the rest.

    K = U S V^T,    a = U_r (S_r / s)^(1/2),    b = (S_r / s)^(1/2) V_r^T,    K_0 = K - s a b

Meng, Wang and Zhang, "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large
Language Models", NeurIPS 2024, arXiv:2404.02948, equations 2 to 4.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxopt_lab import _checks
from jaxopt_lab.adapters import _svd
from jaxopt_lab.adapters._kernels import Kernel
from jaxopt_lab.adapters.adapt import Initializer


def pissa(method: _svd.Method = "auto", *, power_iterations: int = 4) -> Initializer:
    r"""Starts from the r leading singular triplets of the kernel.

    .. math::
      K = U \Sigma V^\top, \quad a = U_r (\Sigma_r / s)^{1/2}, \quad
      b = (\Sigma_r / s)^{1/2} V_r^\top, \quad K_0 = K - s\, a b

    The division by the scaling makes :math:`s a b` the best approximation of rank r for any alpha,
    and the lengths of the columns of `a` and the rows of `b` are the same.

    Args:
      method: "full" for the exact decomposition, "randomized" for a random range with
        max(2 r, r + 10) test vectors (`peft` takes r of them, with larger errors), "auto" for full
        up to a smaller side of 2048.
      power_iterations: of "randomized".

    Returns:
      An initialiser for `init_adapters`; "randomized" needs its key.

    Raises:
      ValueError: an unknown method or a negative number.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxopt_lab import adapters
      >>> params = {"w": jnp.diag(jnp.array([3.0, 2.0, 1.0]))}
      >>> config = adapters.LoraConfig(target_modules=["w"], r=1, lora_alpha=1)
      >>> base, lora = adapters.init_adapters(params, config, init=adapters.pissa())
      >>> jnp.diagonal(base.params["w"]).round(6)
      Array([0., 2., 1.], dtype=float32)

    References:
      Meng, Wang and Zhang, `PiSSA <https://arxiv.org/abs/2404.02948>`_, NeurIPS 2024.
    """
    _svd.check_method(method)
    _checks.check_non_negative(power_iterations=power_iterations)

    def init(kernel: Kernel, matrices: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        u, s, vt = _svd.leading(matrices, kernel.r, method, power_iterations, key)
        root = jnp.sqrt(s / kernel.scaling)
        return u * root[:, None, :], root[:, :, None] * vt

    return init
