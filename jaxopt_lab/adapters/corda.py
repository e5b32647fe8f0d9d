r"""CorDA: the factors start from the kernel's directions as the inputs weigh them.

    F = C + d mean(diag C) I,    F K = U S V^T,    a = F^-1 U_sel (S_sel / s)^(1/2),
    b = (S_sel / s)^(1/2) V_sel^T,    K_0 = K - s a b

Yang et al., "CorDA: Context-Oriented Decomposition Adaptation of Large Language Models for
Task-Aware Parameter-Efficient Fine-tuning", NeurIPS 2024, arXiv:2406.05223, equations 2 to 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from jaxopt_lab import _checks, _compat
from jaxopt_lab.adapters import _kernels
from jaxopt_lab.adapters._kernels import Kernel
from jaxopt_lab.adapters.adapt import Initializer

Method = Literal["ipm", "kpm"]
_METHODS = get_args(Method)
# Each failure to invert doubles the damping; from 0.01 on, 40 doublings dwarf any matrix.
_DOUBLINGS = 40


def corda(covariances: Mapping[str, Any], corda_method: Method = "ipm") -> Initializer:
    r"""Starts from the singular triplets of the kernel times its inputs' second moment.

    .. math::
      F = C + d\, \overline{\mathrm{diag}\, C}\, I, \quad F K = U \Sigma V^\top, \quad
      a = F^{-1} U_{sel} (\Sigma_{sel} / s)^{1/2}, \quad b = (\Sigma_{sel} / s)^{1/2} V_{sel}^\top

    The damping d is 0.01, doubled until :math:`\| F F^{-1} - I \|_F < 0.05`. "ipm" trains what the
    given inputs use most: among all matrices of rank r, :math:`s a b` is the nearest to K under F.
    "kpm" trains what they use least, so that the knowledge behind them is preserved. C is a sum
    over the tokens of a product, as in the authors' code; its scale c leaves :math:`s a b` alone,
    but makes `a` smaller by :math:`c^{-1/2}` and `b` larger by :math:`c^{1/2}`.

    Args:
      covariances: second moment of each kernel's inputs, by its path: from `estimate_covariances`,
        of the task at hand for "ipm", of what must not be forgotten for "kpm".
      corda_method: "ipm" for the r leading triplets, "kpm" for the r last ones.

    Returns:
      An initialiser for `init_adapters`; it draws nothing.

    Raises:
      ValueError: an unknown method; at init, a kernel without a moment or one of another shape.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxopt_lab import adapters
      >>> params = {"w": jnp.eye(3)}
      >>> config = adapters.LoraConfig(target_modules=["w"], r=1, lora_alpha=1)
      >>> moments = {"w": jnp.diag(jnp.array([1.0, 5.0, 2.0]))[None]}  # the second input is large
      >>> base, _ = adapters.init_adapters(params, config, init=adapters.corda(moments))
      >>> jnp.diagonal(base.params["w"]).round(6)
      Array([1., 0., 1.], dtype=float32)

    References:
      Yang et al., `CorDA <https://arxiv.org/abs/2406.05223>`_, NeurIPS 2024.
    """
    _checks.check_mapping("of covariances, from estimate_covariances", covariances=covariances)
    if corda_method not in _METHODS:
        raise ValueError(f"corda_method must be one of {_METHODS}, got {corda_method!r}")

    def init(kernel: Kernel, matrices: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        del key
        damped = _damped(_moment_of(covariances, kernel).astype(matrices.dtype))
        u, s, vt = jnp.linalg.svd(_kernels.product(damped, matrices), full_matrices=False)
        chosen = slice(None, kernel.r) if corda_method == "ipm" else slice(-kernel.r, None)
        root = jnp.sqrt(s[:, chosen] / kernel.scaling)
        factor = jnp.linalg.cholesky(damped)
        a = jax.scipy.linalg.cho_solve((factor, True), u[:, :, chosen])
        return a * root[:, None, :], root[:, :, None] * vt[:, chosen]

    return init


def _damped(moments: jax.Array) -> jax.Array:
    """Returns F for each of (matrices, inputs, inputs)."""
    identity = jnp.eye(moments.shape[-1], dtype=moments.dtype)

    def one(moment: jax.Array) -> jax.Array:
        mean = jnp.mean(jnp.diagonal(moment))

        def damped(damping: jax.Array) -> jax.Array:
            return moment + damping * mean * identity

        def fails(state: tuple[jax.Array, jax.Array]) -> jax.Array:
            damping, count = state
            matrix = damped(damping)
            error = jnp.linalg.norm(_kernels.product(matrix, jnp.linalg.inv(matrix)) - identity)
            return ~(error < 0.05) & (count < _DOUBLINGS)

        first = jnp.asarray(0.01, moment.dtype), jnp.zeros((), jnp.int32)
        damping, _ = _compat.while_loop(fails, lambda s: (2 * s[0], s[1] + 1), first)
        return damped(damping)

    return jax.lax.map(one, moments)


def _moment_of(covariances: Mapping[str, Any], kernel: Kernel) -> jax.Array:
    if kernel.name not in covariances:
        raise ValueError(
            f"corda: no second moment of the inputs of kernel '{kernel.name}' is given; "
            "estimate_covariances makes one for each kernel of the same config"
        )
    moment = jnp.asarray(covariances[kernel.name])
    expected = (kernel.count, kernel.matrix[0], kernel.matrix[0])
    if moment.shape != expected:
        raise ValueError(
            f"corda: the second moment of the inputs of kernel '{kernel.name}' has shape "
            f"{moment.shape}; expected {expected}"
        )
    return moment
