"""Reading schedules: a table of their values, and the rate that a running optimizer has."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxopt_lab.schedules import _phases

# States of optax whose count is what a schedule is called with.
_OF_SCHEDULES = ("ScaleByScheduleState", "WrappedScheduleState")


def as_table(schedule: optax.Schedule, steps: Any) -> np.ndarray:
    r"""Evaluates a schedule at many steps at once.

    .. math::
      (\eta_0, \eta_1, \dots, \eta_{n-1})

    Args:
      schedule: a function of the step that `jax.vmap` can map.
      steps: the number of steps :math:`n`, for steps 0 to n - 1; or the steps themselves, `(n,)`,
        integers or real numbers. Steps in float64 give this package's schedules in float64.

    Returns:
      The rates, `(n,)`, in the dtype of the schedule.

    Raises:
      ValueError: a negative number of steps, steps of another rank, or a schedule whose value is no
        scalar.
      TypeError: `schedule` that is no function.

    Examples:
      >>> import optax
      >>> as_table(optax.linear_schedule(1.0, 0.0, 4), 5).tolist()
      [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    _phases.check_schedule(schedule=schedule)
    if np.ndim(steps) == 0:
        _phases.check_steps(steps=steps)
        steps = jnp.arange(steps, dtype=jnp.int32)
    if np.ndim(steps) != 1:
        raise ValueError(f"steps must be a number or have shape (n,), got {np.shape(steps)}")
    rates = jax.vmap(lambda step: jnp.asarray(schedule(step)))(jnp.asarray(steps))
    if rates.ndim != 1:
        raise ValueError(f"schedule must return a scalar, got shape {rates.shape[1:]}")
    return np.asarray(rates)


def current_learning_rate(opt_state: optax.OptState, schedule: optax.Schedule) -> jax.Array:
    r"""The rate of the next update, from the count in an optimizer's state.

    .. math::
      \eta(t) \quad \text{with } t \text{ updates done}

    The count is the one of the state that holds a schedule's count (`optax.scale_by_schedule`,
    `optax.scale_by_learning_rate`, `optax.inject_hyperparams`), however deep it lies; without any,
    the only other `count` there is, such as Adam's. Before the first update it is the rate of step
    0; after an update it is *not* the rate which that update had but the one of the next.

    Args:
      opt_state: the state of any optax optimizer. Traced states are fine, in `jit` and `scan`.
      schedule: the schedule that the optimizer was made with.

    Returns:
      `schedule(count)`; for states mapped by `jax.vmap`, one rate for each.

    Raises:
      ValueError: no count, or several that could be meant; the message has their paths. Pass the
        part of the state that is meant, such as one group of `optax.partition`.
      TypeError: `schedule` that is no function.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> schedule = optax.linear_schedule(1.0, 0.0, 10)
      >>> tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
      >>> state = tx.init(jnp.zeros(3))
      >>> _, state = tx.update(jnp.ones(3), state)
      >>> print(f"{current_learning_rate(state, schedule):.2f}")
      0.90
    """
    _phases.check_schedule(schedule=schedule)
    every = optax.tree_utils.tree_get_all_with_path(opt_state, "count")
    # A field of a state, not a parameter that happens to be called so.
    owners = [(getattr(path[-1], "tuple_name", None), path, count) for path, count in every]
    counts = [owner for owner in owners if owner[0] is not None]
    found = [owner for owner in counts if owner[0] in _OF_SCHEDULES] or counts
    if not found:
        raise ValueError(
            "opt_state has no count: the learning rate was made without a schedule, or this is no "
            "state of an optimizer"
        )
    if len(found) > 1:
        paths = ", ".join(jax.tree_util.keystr(tuple(path)) for _, path, _ in found)
        raise ValueError(
            f"opt_state has {len(found)} counts that could be meant: {paths}; pass the part of the "
            "state that the schedule belongs to"
        )
    return jnp.asarray(schedule(found[0][2]))
