r"""`rms_norm`, `layer_norm` and `add_rms_norm`.

    y = x (mean x^2 + epsilon)^-1/2 (scale_offset + scale)

Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, arXiv:1910.07467; Ba, Kiros and
Hinton, "Layer Normalization", 2016, arXiv:1607.06450.

These are the plain form, of which the compilers for GPUs and TPUs make one kernel a pass, under
`jax.checkpoint`: a backward pass in another program, as that of a scan over layers, gets x and the
statistics and not the normalised x in float32. So derivatives exist in both modes, of any order.
`python -m experiments.bench_norm` has the figures.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax

from pallas_kernels._options import floating, number
from pallas_kernels.norm import formula

Casting = Literal["gemma", "llama"]


def rms_norm(
    x: jax.Array,
    scale: jax.Array | None = None,
    *,
    epsilon: float = 1e-6,
    scale_offset: float = 0.0,
    casting: Casting = "gemma",
) -> jax.Array:
    r"""Root mean square normalisation over the last axis.

    .. math::
      y = \frac{x}{\sqrt{\tfrac{1}{d} \sum_i x_i^2 + \epsilon}} (o + w)

    For the backward pass x and one number a row are kept, of 16-bit inputs a quarter of what JAX
    keeps of the formula; the derivatives exist in both modes and of any order.

    Args:
      x: (..., d), floating.
      scale: w, (d,), floating; by default none.
      epsilon: added to the mean square, at least 0.
      scale_offset: o: 1 where scales are stored around 0, as in Gemma.
      casting: where 16-bit inputs are rounded: "gemma" computes in float32 and rounds once,
        "llama" also rounds the normalised x before it multiplies by the scale.

    Returns:
      (..., d), in the dtype of x.

    Raises:
      TypeError: something is no array or number, or no floating one.
      ValueError: `scale` is not (d,), `epsilon` is negative, or `casting` unknown.

    Examples:
      >>> import jax.numpy as jnp, pallas_kernels
      >>> y = pallas_kernels.rms_norm(jnp.array([3.0, 4.0]), jnp.array([1.0, 2.0]))
      >>> print(", ".join(f"{v:.3f}" for v in y))
      0.849, 2.263

    References:
      Zhang and Sennrich, `Root Mean Square Layer Normalization
      <https://arxiv.org/abs/1910.07467>`_, 2019, equation 4.
    """
    x, (scale,) = _checked("x", x, scale=scale)
    return _rms(epsilon, scale_offset, casting)(x, scale)


def add_rms_norm(
    x: jax.Array,
    residual: jax.Array,
    scale: jax.Array | None = None,
    *,
    epsilon: float = 1e-6,
    scale_offset: float = 0.0,
    casting: Casting = "gemma",
) -> tuple[jax.Array, jax.Array]:
    r"""The sum of a branch and the residual stream, and its root mean square normalisation.

    .. math::
      s = x + r, \qquad y = \frac{s}{\sqrt{\tfrac{1}{d} \sum_i s_i^2 + \epsilon}} (o + w)

    Pre-LN uses both: y goes into the next branch and s is the new residual. Post-LN uses y for
    both. In Peri-LN x is normalised too: ``add_rms_norm(rms_norm(x, scale_out), residual, scale)``.

    Args:
      x: what the branch returns, (..., d), floating.
      residual: r, like x.
      scale: w, (d,), floating; by default none.
      epsilon: added to the mean square, at least 0.
      scale_offset: o: 1 where scales are stored around 0, as in Gemma.
      casting: where 16-bit inputs are rounded: "gemma" computes in float32 and rounds once,
        "llama" also rounds the normalised s before it multiplies by the scale. The norm is of the
        sum as it is returned, rounded to the dtype of x.

    Returns:
      y and s, both (..., d), in the dtype of x.

    Raises:
      TypeError: something is no array or number, or no floating one.
      ValueError: `residual` or `scale` does not fit x, `epsilon` is negative, or `casting` unknown.

    Examples:
      >>> import jax.numpy as jnp, pallas_kernels
      >>> y, s = pallas_kernels.add_rms_norm(jnp.array([1.0, 2.0]), jnp.array([2.0, 2.0]))
      >>> print(s, ", ".join(f"{v:.3f}" for v in y))
      [3. 4.] 0.849, 1.131

    References:
      Kim et al., `Peri-LN: Revisiting Normalization Layer in the Transformer Architecture
      <https://arxiv.org/abs/2502.02732>`_, ICML 2025, for where norms stand.
    """
    x, (scale,) = _checked("x", x, scale=scale)
    residual, _ = _checked("residual", residual)
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(
            f"residual has shape {residual.shape} and dtype {residual.dtype}; expected those of x, "
            f"{x.shape} and {x.dtype}"
        )
    total = x + residual
    return _rms(epsilon, scale_offset, casting)(total, scale), total


def layer_norm(
    x: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    epsilon: float = 1e-6,
) -> jax.Array:
    r"""Layer normalisation over the last axis.

    .. math::
      y = \frac{x - \mu}{\sqrt{\tfrac{1}{d} \sum_i (x_i - \mu)^2 + \epsilon}} w + b, \qquad
      \mu = \tfrac{1}{d} \sum_i x_i

    Computed in float32 and rounded once; the variance is that of the centred x. For the backward
    pass x and two numbers a row are kept; the derivatives exist in both modes and of any order.

    Args:
      x: (..., d), floating.
      scale: w, (d,), floating; by default none.
      bias: b, (d,), floating; by default none.
      epsilon: added to the variance, at least 0.

    Returns:
      (..., d), in the dtype of x.

    Raises:
      TypeError: something is no array or number, or no floating one.
      ValueError: `scale` or `bias` is not (d,), or `epsilon` is negative.

    Examples:
      >>> import jax.numpy as jnp, pallas_kernels
      >>> y = pallas_kernels.layer_norm(jnp.array([1.0, 3.0]), bias=jnp.array([0.5, 0.5]))
      >>> print(", ".join(f"{v:.3f}" for v in y))
      -0.500, 1.500

    References:
      Ba, Kiros and Hinton, `Layer Normalization <https://arxiv.org/abs/1607.06450>`_, 2016,
      equation 4.
    """
    x, weights = _checked("x", x, scale=scale, bias=bias)
    norm = functools.partial(formula.layer_norm, epsilon=_epsilon(epsilon))
    return _statistics_kept(norm)(x, *weights)


def _rms(epsilon: Any, scale_offset: Any, casting: Any) -> Callable[..., jax.Array]:
    if casting not in ("gemma", "llama"):
        raise ValueError(f"casting={casting!r}; expected 'gemma' or 'llama'")
    norm = functools.partial(
        formula.rms_norm,
        epsilon=_epsilon(epsilon),
        scale_offset=number("scale_offset", scale_offset),
        casting=casting,
    )
    return _statistics_kept(norm)


def _statistics_kept(norm: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Returns `norm`, whose backward pass gets the arguments and the statistics alone."""
    policy = jax.checkpoint_policies.save_only_these_names(*formula.KEPT)
    # Where both passes are one program the compiler may keep what it likes.
    return jax.checkpoint(norm, policy=policy, prevent_cse=False)


def _epsilon(epsilon: Any) -> float:
    epsilon = number("epsilon", epsilon)
    if not 0 <= epsilon < math.inf:
        raise ValueError(f"epsilon={epsilon}; expected a number of at least 0")
    return epsilon


def _checked(name: str, x: Any, **weights: Any) -> tuple[jax.Array, tuple[jax.Array | None, ...]]:
    x = floating(name, x)
    if x.ndim == 0:
        raise ValueError(f"{name} has shape (); expected (..., d)")
    found = []
    for of, weight in weights.items():
        if weight is not None:
            weight = floating(of, weight)
            if weight.shape != x.shape[-1:]:
                raise ValueError(
                    f"{of} has shape {weight.shape}; expected {x.shape[-1:]}, as {name} has shape "
                    f"{x.shape}"
                )
        found.append(weight)
    return x, tuple(found)
