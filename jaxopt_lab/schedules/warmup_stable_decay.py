r"""Warm-up, a stable rate of any length, and a decay that can be branched off it later.

    eta_t = init + (peak - init) rise((t + 1) / W)      t < W
          = peak                                         t < W + S
          = end + (peak - end) fall((t - W - S) / D)     after that

Hu et al., "MiniCPM", 2024, arXiv:2404.06395; the shape 1 - sqrt(q) is the one of Hägele et al.,
"Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations", 2024, arXiv:2405.18392.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxopt_lab import _checks
from jaxopt_lab.schedules import _phases


def wsd_schedule(
    peak_value: _phases.Scalar,
    warmup_steps: int,
    stable_steps: int | None = None,
    decay_steps: int | None = None,
    *,
    init_value: _phases.Scalar = 0.0,
    end_value: _phases.Scalar = 0.0,
    warmup_shape: _phases.WarmupShape = "linear",
    decay_shape: _phases.DecayShape = "sqrt",
    zero_based_warmup: bool = False,
) -> optax.Schedule:
    r"""Warms up, keeps the rate, and decays; or keeps it for ever.

    .. math::
      \eta_t = \begin{cases}
        \eta_{init} + (\eta_{peak} - \eta_{init})\, r(\frac{t + 1}{W}) & t < W \\
        \eta_{peak} & W \le t < W + S \\
        \eta_{end} + (\eta_{peak} - \eta_{end})\, f(\frac{t - W - S}{D}) & W + S \le t
      \end{cases}

    with :math:`r(p) = p`, :math:`\frac{1}{2}(1 - \cos \pi p)` or :math:`1 - \sqrt{1 - p}`, and
    :math:`f(q) = 1 - q`, :math:`\frac{1}{2}(1 + \cos \pi q)` or :math:`1 - \sqrt{q}`. The
    exponential decay is :math:`\eta_{peak}^{1 - q} \eta_{end}^{q}`; MiniCPM's half-life
    :math:`T_{1/2}` is :math:`\eta_{end} = \eta_{peak}\, 2^{-D / T_{1/2}}`.

    With `stable_steps=0` it is a warm-up and a linear or cosine decay. The schedules of that name
    in transformers, with `min_lr_ratio=m`, are `init_value = end_value = m * peak_value` and
    `zero_based_warmup=True`.

    Args:
      peak_value: the stable rate; a scalar.
      warmup_steps: :math:`W`, updates of the warm-up; the last of them has the peak. 0 for none.
      stable_steps: :math:`S`, updates at the peak; None for a rate that stays until a
        `branch_decay`.
      decay_steps: :math:`D`, updates of the decay, from 1 on; None exactly if `stable_steps` is.
      init_value: where the warm-up starts from. The first update is already above it.
      end_value: the rate after the decay. The last update of the decay is still above it.
      warmup_shape: `"linear"`, `"cosine"` or `"sqrt"`.
      decay_shape: `"linear"`, `"cosine"`, `"sqrt"` or `"exponential"`, which needs a positive
        `end_value`.
      zero_based_warmup: count :math:`t / W`, so that the first update has `init_value`.

    Returns:
      A function of the step, an integer or a real number of any shape, to the rate in float32 (in
      float64 for a step in float64). Outside of its range the rate stays as it is at the end.

    Raises:
      ValueError: a rate that is negative, not finite or an array with axes, `init_value` or
        `end_value` above `peak_value`, an unknown shape, or only one of `stable_steps` and
        `decay_steps`.
      TypeError: steps that are no integers, rates that are no real numbers.

    Examples:
      >>> schedule = wsd_schedule(1.0, 2, 4, 4, decay_shape="linear")
      >>> [float(schedule(t)) for t in range(11)]
      [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]

    References:
      Hu et al., `MiniCPM <https://arxiv.org/abs/2404.06395>`_, 2024. Hägele et al., `Scaling Laws
      and Compute-Optimal Training Beyond Fixed Training Durations
      <https://arxiv.org/abs/2405.18392>`_, 2024.
    """
    _phases.check_rate(peak_value=peak_value, init_value=init_value, end_value=end_value)
    _phases.check_not_above("init_value", init_value, "peak_value", peak_value)
    _phases.check_not_above("end_value", end_value, "peak_value", peak_value)
    _checks.check_choice(_phases.WARMUP_SHAPES, warmup_shape=warmup_shape)
    _checks.check_flag(zero_based_warmup=zero_based_warmup)
    warmup = _phases.as_steps("warmup_steps", warmup_steps)
    if (stable_steps is None) != (decay_steps is None):
        raise ValueError(
            "stable_steps and decay_steps must both be given, or both be None for a stable rate "
            f"without end (see branch_decay); got {stable_steps} and {decay_steps}"
        )
    start = decay = None
    if stable_steps is None or decay_steps is None:
        _checks.check_choice(_phases.DECAY_SHAPES, decay_shape=decay_shape)
    else:
        _phases.check_decay(decay_shape, end_value)
        start = warmup + _phases.as_steps("stable_steps", stable_steps)
        decay = _phases.as_steps("decay_steps", decay_steps, 1)

    def schedule(step: Any) -> jax.Array:
        t = _phases.since(step)
        if start is None or decay is None:
            rate = jnp.broadcast_to(jnp.asarray(peak_value, t.dtype), t.shape)
        else:
            q = _phases.since(step, start) / decay
            rate = _phases.decayed(q, peak_value, end_value, decay_shape)
        return _phases.warmed_up(
            t,
            rate,
            init_value,
            peak_value,
            warmup,
            shape=warmup_shape,
            zero_based=zero_based_warmup,
        )

    return schedule


def branch_decay(
    schedule: optax.Schedule,
    start_step: int | np.integer | np.ndarray | jax.Array,
    decay_steps: int,
    end_value: _phases.Scalar = 0.0,
    decay_shape: _phases.DecayShape = "sqrt",
) -> optax.Schedule:
    r"""Follows a schedule up to a step and cools down from the rate that it has there.

    .. math::
      \eta_t = \eta_{end} + (\eta(t_0) - \eta_{end})\, f\!\left(\frac{t - t_0}{D}\right),
      \quad t \ge t_0

    A checkpoint of the stable phase is cooled down this way as often as one likes: the count of its
    optimizer goes on from :math:`t_0`, the length of training need not be known before.

    Args:
      schedule: what is followed before `start_step`, any function of the step.
      start_step: :math:`t_0`, the first update of the decay, still at the schedule's rate; an
        integer, or what a count is restored as: an integer array of shape `()` of NumPy or JAX,
        signed or not, traced or not.
      decay_steps: :math:`D`, updates of the decay, from 1 on.
      end_value: the rate after the decay; a scalar.
      decay_shape: `"linear"`, `"cosine"`, `"sqrt"` (:math:`1 - \sqrt{q}`) or `"exponential"`, which
        needs a positive `end_value`.

    Returns:
      A function of the step, an integer or a real number of any shape, to the rate in float32 (in
      float64 for a step in float64). `schedule` is called with int32 (int64 if there is one) or
      with a real number. After the decay the rate stays at `end_value`.

    Raises:
      ValueError: `end_value` that is negative, not finite or an array with axes, an unknown shape,
        or steps too small.
      TypeError: steps that are no integers, or `schedule` that is no function.

    Examples:
      >>> endless = wsd_schedule(1.0, warmup_steps=2)
      >>> cooled = branch_decay(endless, start_step=100, decay_steps=4, decay_shape="linear")
      >>> [float(cooled(t)) for t in (0, 50, 100, 101, 104, 200)]
      [0.5, 1.0, 1.0, 0.75, 0.0, 0.0]

    References:
      Hägele et al., `Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations
      <https://arxiv.org/abs/2405.18392>`_, 2024.
    """
    _phases.check_schedule(schedule=schedule)
    _phases.check_rate(end_value=end_value)
    _phases.check_decay(decay_shape, end_value)
    decay = _phases.as_steps("decay_steps", decay_steps, 1)
    start = _phases.as_start("start_step", start_step)

    def branched(step: Any) -> jax.Array:
        after = _phases.since(step, start)
        start_value = jnp.asarray(schedule(_phases.as_count(start)), after.dtype)
        cooling = _phases.decayed(after / decay, start_value, end_value, decay_shape)
        before = jnp.asarray(schedule(_phases.as_count(step)), after.dtype)
        return jnp.where(after < 0, before, cooling)

    return branched


def inverse_sqrt_schedule(
    peak_value: _phases.Scalar,
    warmup_steps: int,
    timescale: int | None = None,
    *,
    init_value: _phases.Scalar = 0.0,
    zero_based_warmup: bool = False,
) -> optax.Schedule:
    r"""Warms up linearly and falls with the inverse square root of the step, without an end.

    .. math::
      \eta_t = \eta_{peak} \left(\frac{t - W + W'}{W'}\right)^{-1/2}, \quad t \ge W

    Args:
      peak_value: the rate at the end of the warm-up; a scalar.
      warmup_steps: :math:`W`, updates of the warm-up; the last of them has the peak. 0 for none.
      timescale: :math:`W'`, in updates from 1 on; by default `warmup_steps`.
      init_value: where the warm-up starts from. The first update is already above it.
      zero_based_warmup: count :math:`t / W`, so that the first update has `init_value`.

    Returns:
      A function of the step, an integer or a real number of any shape, to the rate in float32 (in
      float64 for a step in float64).

    Raises:
      ValueError: a rate that is negative, not finite or an array with axes, `init_value` above
        `peak_value`, or neither a warm-up nor a `timescale`.
      TypeError: steps that are no integers, rates that are no real numbers.

    Examples:
      >>> schedule = inverse_sqrt_schedule(1.0, warmup_steps=4)
      >>> [float(schedule(t)) for t in (0, 3, 4, 16, 64)]
      [0.25, 1.0, 1.0, 0.5, 0.25]

    References:
      Vaswani et al., `Attention Is All You Need <https://arxiv.org/abs/1706.03762>`_, 2017.
    """
    _phases.check_rate(peak_value=peak_value, init_value=init_value)
    _phases.check_not_above("init_value", init_value, "peak_value", peak_value)
    _checks.check_flag(zero_based_warmup=zero_based_warmup)
    warmup = _phases.as_steps("warmup_steps", warmup_steps)
    if timescale is None and warmup == 0:
        raise ValueError("timescale is needed if warmup_steps is 0, got None")
    scale = warmup if timescale is None else _phases.as_steps("timescale", timescale, 1)

    def schedule(step: Any) -> jax.Array:
        t = _phases.since(step)
        peak = jnp.asarray(peak_value, t.dtype)
        rate = peak * jax.lax.rsqrt(jnp.maximum(_phases.since(step, warmup), 0) / scale + 1)
        return _phases.warmed_up(t, rate, init_value, peak, warmup, zero_based=zero_based_warmup)

    return schedule
