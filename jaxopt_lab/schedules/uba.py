r"""UBA, the unified budget-aware schedule: from a rate held high to one that drops early.

    eta = end + (peak - end) 2 (1 + cos theta) / (2 phi + (2 - phi) (1 + cos theta))
    theta = pi t / T, or the Chebyshev angles pi (2 t + 1) / (2 T)

phi / 2 is the condition number of the quadratic for which the Chebyshev angles give the best steps.
arXiv:2505.24452, 2025.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax

from jaxopt_lab import _checks
from jaxopt_lab.schedules import _phases

Angle = Literal["continuous", "chebyshev"]
ANGLES: tuple[Angle, ...] = get_args(Angle)


def uba_schedule(
    peak_value: _phases.Scalar,
    end_value: _phases.Scalar,
    total_steps: int,
    phi: _phases.Scalar,
    angle: Angle = "continuous",
    warmup_steps: int = 0,
) -> optax.Schedule:
    r"""Decays from `peak_value` to `end_value` over a budget of steps; `phi` says how early.

    .. math::
      \eta_t = \eta_{end} + (\eta_{peak} - \eta_{end})
        \frac{2 (1 + \cos \theta_t)}{2 \varphi + (2 - \varphi)(1 + \cos \theta_t)}

    with :math:`\theta_t = \pi t / T` (continuous) or :math:`\theta_t = \pi (2 t + 1) / (2 T)`
    (Chebyshev, the first update is :math:`t = 0`). It is computed as
    :math:`c / (c + \frac{\varphi}{2} s)` with :math:`c = \cos^2(\theta / 2)` and
    :math:`s = \sin^2(\theta / 2)`, the same number without cancellation.

    :math:`\varphi = 2` is the cosine; a smaller one holds the rate high longer, a larger one drops
    it early: half way, :math:`1 / (1 + \varphi / 2)` of the decay is left. With the Chebyshev
    angles, :math:`\eta_{peak} = 1 / \lambda_{min}`, :math:`\eta_{end} = 1 / \lambda_{max}` and
    :math:`\varphi = 2 \lambda_{max} / \lambda_{min}` the steps are the reciprocals of the Chebyshev
    nodes of :math:`[\lambda_{min}, \lambda_{max}]`, the best ones for a quadratic with these
    eigenvalues. No default for :math:`\varphi` could be verified, so that there is none.

    Several cycles are several schedules, joined by `optax.join_schedules`.

    Args:
      peak_value: the highest rate, reached after the warm-up; a scalar.
      end_value: the rate at `total_steps` (continuous) or just below the last one (Chebyshev); at
        most `peak_value`.
      total_steps: :math:`T` and the warm-up together, in updates.
      phi: :math:`\varphi`, above 0; a scalar.
      angle: `"continuous"` starts at `peak_value` and would reach `end_value` at the update after
        the last; `"chebyshev"` lies strictly between them.
      warmup_steps: updates of a linear warm-up, `peak_value * (t + 1) / warmup_steps`, which does
        not waste the first update on a rate of zero.

    Returns:
      A function of the step, an integer or a real number of any shape, to the rate in float32 (in
      float64 for a step in float64). Outside of its range the rate stays as it is at the end.

    Raises:
      ValueError: a rate that is negative, not finite or an array with axes, `end_value` above
        `peak_value`, `phi` not above 0, `total_steps` not above `warmup_steps`, or an unknown
        `angle`.
      TypeError: steps that are no integers, rates that are no real numbers.

    Examples:
      >>> schedule = uba_schedule(1.0, 0.1, total_steps=10, phi=2.0)  # a cosine
      >>> [round(float(schedule(t)), 3) for t in (0, 5, 10)]
      [1.0, 0.55, 0.1]
      >>> long_high = uba_schedule(1.0, 0.1, total_steps=10, phi=0.25)
      >>> round(float(long_high(5)), 3)
      0.9

    References:
      `Unified budget-aware learning rate schedule <https://arxiv.org/abs/2505.24452>`_, 2025.
    """
    _phases.check_rate(peak_value=peak_value, end_value=end_value)
    _phases.check_not_above("end_value", end_value, "peak_value", peak_value)
    _checks.check_positive(phi=phi)
    _checks.check_choice(ANGLES, angle=angle)
    warmup = _phases.as_steps("warmup_steps", warmup_steps)
    budget = _phases.as_steps("total_steps", total_steps, 1) - warmup
    if budget <= 0:
        raise ValueError(f"total_steps must exceed warmup_steps, got {total_steps} <= {warmup}")

    def schedule(step: Any) -> jax.Array:
        t = _phases.since(step)
        after = _phases.since(step, warmup)
        if angle == "continuous":
            half = 0.5 * jnp.pi * (jnp.clip(after, 0, budget) / budget)
        else:
            half = 0.5 * jnp.pi * ((jnp.clip(after, 0, budget - 1) + 0.5) / budget)
        cosine = jnp.square(jnp.cos(half))
        fraction = cosine / (cosine + 0.5 * jnp.asarray(phi, t.dtype) * jnp.square(jnp.sin(half)))
        peak, end = (jnp.asarray(x, t.dtype) for x in (peak_value, end_value))
        decay = end + (peak - end) * fraction
        return _phases.warmed_up(t, decay, 0.0, peak, warmup)

    return schedule
