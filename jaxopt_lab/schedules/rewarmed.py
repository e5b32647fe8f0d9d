r"""Re-warming: each phase of continued pre-training starts with a warm-up of its own.

    eta_t = peak (u + 1) / W                                        u < W
          = end + (peak - end) (1 + cos(pi (u - W) / (L - W))) / 2  u < L

with u the updates since the phase began and L its length. Gupta et al., "Continual Pre-Training of
Large Language Models: How to (re)warm your model?", 2023, arXiv:2308.04014.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxopt_lab import _checks
from jaxopt_lab.schedules import _phases


def rewarmed(
    make_schedule: Callable[[int, int], optax.Schedule],
    phase_steps: Sequence[int],
    start_step: int | np.integer | np.ndarray | jax.Array = 0,
) -> optax.Schedule:
    r"""Starts a schedule again at the beginning of each phase.

    .. math::
      \eta_t = \eta^{(k)}(t - t_k), \quad t_k = t_{start} + L_0 + \dots + L_{k-1}, \quad
      t_k \le t < t_{k+1}

    Args:
      make_schedule: `make_schedule(phase, steps)` returns the schedule of a phase, whose own step 0
        is its first update; `phase` counts from 0.
      phase_steps: the length :math:`L_k` of each phase, in updates.
      start_step: :math:`t_{start}`, the count that the optimizer has when the first phase begins. A
        checkpoint restored with its count goes on counting, so that a new run of phases after 1000
        updates has `start_step=1000`. An integer, or what a count is restored as: an integer array
        of shape `()` of NumPy or JAX, signed or not, traced or not.

    Returns:
      A function of the step to the rate in float32 (in float64 for a step in float64). Steps before
      `start_step` get the first phase's step 0; after the last phase its schedule goes on.

    Raises:
      ValueError: no phase, a phase without an update, or a negative `start_step`.
      TypeError: lengths or a `start_step` that are no integers, or `make_schedule` that is no
        function.

    Examples:
      >>> import optax
      >>> halves = rewarmed(lambda phase, n: optax.linear_schedule(0.5**phase, 0.0, n), [4, 4])
      >>> [float(halves(t)) for t in range(9)]
      [1.0, 0.75, 0.5, 0.25, 0.5, 0.375, 0.25, 0.125, 0.0]
    """
    _checks.check_function(make_schedule=make_schedule)
    begin = _phases.as_start("start_step", start_step)
    lengths = _lengths(phase_steps)
    schedules = [make_schedule(phase, steps) for phase, steps in enumerate(lengths)]
    for phase, schedule in enumerate(schedules):
        _phases.check_schedule(**{f"make_schedule({phase}, {lengths[phase]})": schedule})
    offsets = list(itertools.accumulate([0, *lengths[:-1]]))

    def joined(step: Any) -> jax.Array:
        rate = None
        for offset, schedule in zip(offsets, schedules):
            own = _phases.since(step, begin, offset)
            value = jnp.asarray(schedule(jnp.maximum(own, 0)), own.dtype)
            rate = value if rate is None else jnp.where(own < 0, rate, value)
        return jnp.asarray(rate)

    return joined


def rewarmed_schedule(
    peak_value: _phases.Scalar | Sequence[_phases.Scalar],
    phase_steps: Sequence[int],
    warmup_steps: int | Sequence[int],
    *,
    init_value: _phases.Scalar = 0.0,
    end_value: _phases.Scalar | None = None,
    start_step: int | np.integer | np.ndarray | jax.Array = 0,
) -> optax.Schedule:
    r"""Warms up linearly and decays along a cosine, anew in each phase.

    .. math::
      \eta_t = \begin{cases}
        \eta_{init} + (\eta_{peak} - \eta_{init}) \frac{u + 1}{W} & u < W \\
        \eta_{end} + \frac{1}{2} (\eta_{peak} - \eta_{end})
          \left(1 + \cos \pi \frac{u - W}{L - W}\right) & W \le u < L
      \end{cases}

    with :math:`u` the updates since the phase began. The rate jumps where phases meet: from just
    above :math:`\eta_{end}` to the first step of the next warm-up.

    Args:
      peak_value: the highest rate, one for all phases or one for each.
      phase_steps: the length :math:`L` of each phase, in updates.
      warmup_steps: :math:`W`, updates of the warm-up, one number for all phases or one for each,
        below the phase's length. The last of them has the peak.
      init_value: where each warm-up starts from. The first update is already above it.
      end_value: where each decay ends; by default a tenth of the phase's peak.
      start_step: the count that the optimizer has when the first phase begins: an integer, or an
        integer array of shape `()` of NumPy or JAX, signed or not, traced or not.

    Returns:
      A function of the step, an integer or a real number of any shape, to the rate in float32 (in
      float64 for a step in float64). Before `start_step` the rate is the first one, after the last
      phase it is `end_value`.

    Raises:
      ValueError: a rate that is negative, not finite or an array with axes, `init_value` or
        `end_value` above a peak, a warm-up as long as its phase, or another number of values than
        of phases.
      TypeError: steps that are no integers, rates that are no real numbers.

    Examples:
      >>> schedule = rewarmed_schedule((1.0, 0.5), (100, 100), warmup_steps=10, start_step=1000)
      >>> [round(float(schedule(t)), 3) for t in (1000, 1009, 1099, 1100, 1109, 1200)]
      [0.1, 1.0, 0.1, 0.05, 0.5, 0.05]

    References:
      Gupta et al., `Continual Pre-Training of Large Language Models: How to (re)warm your model?
      <https://arxiv.org/abs/2308.04014>`_, 2023.
    """
    lengths = _lengths(phase_steps)
    peaks = _per_phase("peak_value", peak_value, len(lengths))
    warmups = _per_phase("warmup_steps", warmup_steps, len(lengths))
    for phase, peak in enumerate(peaks):
        _phases.check_rate(**{f"peak_value of phase {phase}": peak})
    ends = [0.1 * peak for peak in peaks] if end_value is None else [end_value] * len(lengths)
    _phases.check_rate(init_value=init_value)
    warmups = [_phases.as_steps(f"warmup_steps of phase {k}", n) for k, n in enumerate(warmups)]
    for phase, (peak, end, warmup, steps) in enumerate(zip(peaks, ends, warmups, lengths)):
        _phases.check_rate(end_value=end)
        _phases.check_not_above("init_value", init_value, "peak_value", peak)
        _phases.check_not_above("end_value", end, "peak_value", peak)
        if warmup >= steps:
            raise ValueError(
                f"warmup_steps of phase {phase} must be below its length, got {warmup} >= {steps}"
            )

    def make_schedule(phase: int, steps: int) -> optax.Schedule:
        peak, end, warmup = peaks[phase], ends[phase], warmups[phase]

        def schedule(step: Any) -> jax.Array:
            u = _phases.since(step)
            decay = _phases.decayed((u - warmup) / (steps - warmup), peak, end, "cosine")
            return _phases.warmed_up(u, decay, init_value, peak, warmup)

        return schedule

    return rewarmed(make_schedule, lengths, start_step)


def _lengths(phase_steps: Sequence[int]) -> list[int]:
    if not isinstance(phase_steps, (Sequence, np.ndarray)) or isinstance(phase_steps, str):
        raise TypeError(f"phase_steps must be a sequence of integers, got {phase_steps!r}")
    if len(phase_steps) == 0:
        raise ValueError("phase_steps must have at least one phase, got none")
    return [_phases.as_steps(f"phase_steps[{k}]", steps, 1) for k, steps in enumerate(phase_steps)]


def _per_phase(name: str, value: Any, phases: int) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        return [value] * phases
    if len(value) != phases:
        raise ValueError(f"{name} must have one value for each of {phases} phases, got {value}")
    return list(value)
