r"""LoRA-GA: the factors start where their first step follows that of full fine-tuning.

    G = U S V^T,    a = c U_A,    b = c V_B^T,    K_0 = K - s a b

G is the mean gradient of some batches, and A and B choose r each of its 2 r leading triplets.

Wang, Yu and Li, "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", NeurIPS 2024,
arXiv:2407.05000, theorem 3.1 and algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_lab import _checks
from jaxopt_lab.adapters import _kernels, _svd
from jaxopt_lab.adapters._kernels import Kernel
from jaxopt_lab.adapters.adapt import Initializer

Direction = Literal["ArB2r", "A2rBr", "ArBr", "random"]
Scale = Literal["stable", "gd", "unit", "weight_svd"]
_DIRECTIONS, _SCALES = get_args(Direction), get_args(Scale)


def lora_ga(
    gradients: Mapping[str, Any],
    *,
    direction: Direction = "ArB2r",
    scale: Scale = "stable",
    stable_gamma: float = 16,
    method: _svd.Method = "auto",
    power_iterations: int = 4,
    norm_clip: bool = False,
    compat: Literal["peft"] | None = None,
) -> Initializer:
    r"""Starts from the 2 r leading singular directions of the gradient, with equal lengths c.

    .. math::
      G = U \Sigma V^\top, \quad a = c\, U_A, \quad b = c\, V_B^\top, \quad K_0 = K - s\, a b

    One step of gradient descent on both factors changes the kernel by
    :math:`-\eta s^2 c^2 (U_A U_A^\top G + G V_B V_B^\top)` at first order: the best approximation
    of G of rank 2 r where A and B are the two halves of the leading triplets. The directions do not
    depend on the scale of the loss.

    Args:
      gradients: mean gradient of each kernel, by its path: from `estimate_gradients`.
      direction: which triplets are whose: "ArB2r", the first r for `a` and the next r for `b`;
        "A2rBr", the other way round; "ArBr", every second for each; "random", a random half each.
      scale: c: "stable" for :math:`m^{1/4} \gamma^{-1/2}` with m outputs, which keeps the
        activations' scale whatever the rank (for `use_rslora=True`); "gd" for 1/s; "unit" for 1;
        "weight_svd" for the mean of :math:`(\sigma_i(K) / s)^{1/2}` over the first r.
      stable_gamma: :math:`\gamma`; 16 in the authors' code, 64 in its language model runs.
      method: "full", "randomized" with max(4 r, 2 r + 10) test vectors, or "auto" for full up to
        a smaller side of 2048.
      power_iterations: of "randomized".
      norm_clip: shrinks both factors where an entry of s a b is larger than all of the kernel.
      compat: None for the authors' definition; "peft" for that of `peft` 0.21, which multiplies the
        rows of `b` by the gradient's singular values, and scales `b` alone but with "gd": the start
        depends on the scale of the loss, and its first step is not aligned.

    Returns:
      An initialiser for `init_adapters`; "random" and "randomized" need its key.

    Raises:
      ValueError: an unknown option; at init, a kernel without a gradient, a gradient of another
        shape, one that is zero or not finite, or 2 r above the smaller side of a kernel.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jaxopt_lab import adapters
      >>> params = {"w": jnp.ones((4, 4))}
      >>> loss = lambda params, x: jnp.sum((x @ params["w"]) ** 2)
      >>> config = adapters.LoraConfig(target_modules=["w"], r=1, use_rslora=True)
      >>> gradients = adapters.estimate_gradients(loss, params, [jnp.eye(4)], config)
      >>> base, lora = adapters.init_adapters(params, config, init=adapters.lora_ga(gradients))
      >>> bool(jnp.allclose(adapters.apply_adapters(base, lora)["w"], params["w"], atol=1e-6))
      True

    References:
      Wang, Yu and Li, `LoRA-GA <https://arxiv.org/abs/2407.05000>`_, NeurIPS 2024, theorem 3.1.
    """
    _checks.check_choice(_DIRECTIONS, direction=direction)
    _checks.check_choice(_SCALES, scale=scale)
    if compat not in (None, "peft"):
        raise ValueError(f"compat must be None or 'peft', got {compat!r}")
    _svd.check_method(method)
    _checks.check_mapping("of gradients by kernel, from estimate_gradients", gradients=gradients)
    _checks.check_flag(norm_clip=norm_clip)
    _checks.check_positive(stable_gamma=stable_gamma)
    _checks.check_non_negative(power_iterations=power_iterations)

    def init(kernel: Kernel, matrices: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        r, s = kernel.r, kernel.scaling
        if 2 * r > min(kernel.matrix):
            raise ValueError(
                f"lora_ga takes 2 r = {2 * r} directions of the gradient, but kernel "
                f"'{kernel.name}' with {kernel.matrix[0]} inputs and {kernel.matrix[1]} outputs "
                f"has {min(kernel.matrix)}"
            )
        gradient = kernel.matrices(_gradient_of(gradients, kernel)).astype(matrices.dtype)
        split, sketch = (None, None) if key is None else jax.random.split(key)
        found = _svd.leading(gradient, 2 * r, method, power_iterations, sketch)
        for_a, for_b = _choose(direction, r, split, same=compat == "peft")
        a, b = found.u[:, :, for_a], found.vt[:, for_b]
        first = None
        if scale == "weight_svd":
            first = _svd.leading(matrices, r, method, power_iterations, sketch).s
        stable = kernel.matrix[1] ** 0.25 / math.sqrt(stable_gamma)
        constant = {"stable": stable, "gd": 1 / s}.get(scale, 1.0)
        if compat == "peft":
            sigma = found.s[:, for_b, None]
            b = sigma * b
            if first is not None:
                return a, first[:, :1, None] / sigma[:, :1] * b
            return (a / s if scale == "gd" else a), constant * b
        if first is not None:
            c = jnp.mean(jnp.sqrt(first / s), -1)[:, None, None]
        else:
            c = jnp.full((len(a), 1, 1), constant, a.dtype)
        if norm_clip:
            c = c * _clip(matrices, c**2 * s * _kernels.product(a, b))
        return c * a, c * b

    return init


def _choose(direction: str, r: int, key: jax.Array | None, same: bool) -> tuple[Any, Any]:
    """Returns the triplets of `a` and those of `b`, out of 2 r."""
    if direction == "random":
        if key is None:
            raise ValueError("direction='random' needs the key of init_adapters")
        order = jax.random.permutation(key, 2 * r)
        return order[:r], order[:r] if same else order[r:]
    every = np.arange(2 * r)
    return {
        "ArB2r": (every[:r], every[r:]),
        "A2rBr": (every[r:], every[:r]),
        "ArBr": (every[1::2], every[0::2]),
    }[direction]


def _clip(matrices: jax.Array, offset: jax.Array) -> jax.Array:
    """Returns the factor of `a` and `b` that keeps the offset within the kernel's largest entry."""
    largest = jnp.max(jnp.abs(matrices), (-2, -1), keepdims=True)
    return jnp.sqrt(jnp.minimum(1, largest / jnp.max(jnp.abs(offset), (-2, -1), keepdims=True)))


def _gradient_of(gradients: Mapping[str, Any], kernel: Kernel) -> jax.Array:
    if kernel.name not in gradients:
        raise ValueError(
            f"lora_ga: no gradient of kernel '{kernel.name}' is given; estimate_gradients makes "
            "one for each kernel of the same config"
        )
    gradient = gradients[kernel.name]
    if jnp.shape(gradient) != kernel.shape:
        raise ValueError(
            f"lora_ga: the gradient of kernel '{kernel.name}' has shape {jnp.shape(gradient)}, the "
            f"kernel {kernel.shape}"
        )
    if isinstance(gradient, np.ndarray) and not (np.isfinite(gradient).all() and gradient.any()):
        raise ValueError(f"lora_ga: the gradient of kernel '{kernel.name}' is zero or not finite")
    return jnp.asarray(gradient)
