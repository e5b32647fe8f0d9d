"""Reading schedules: a table of their values, and the rate that a running optimizer has."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

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
        steps = jnp.arange(_phases.as_steps("steps", steps), dtype=jnp.int32)
    if np.ndim(steps) != 1:
        raise ValueError(f"steps must be a number or have shape (n,), got {np.shape(steps)}")
    rates = jax.vmap(lambda step: jnp.asarray(schedule(step)))(_phases.as_count(jnp.asarray(steps)))
    if rates.ndim != 1:
        raise ValueError(f"schedule must return a scalar, got shape {rates.shape[1:]}")
    return np.asarray(rates)


def current_learning_rate(opt_state: optax.OptState, schedule: optax.Schedule) -> jax.Array:
    r"""The rate of the next update, from the count in an optimizer's state.

    .. math::
      \eta(t) \quad \text{with } t \text{ updates done}

    The count is the one of the state that holds a schedule's count (`optax.scale_by_schedule`,
    `optax.scale_by_learning_rate`, `optax.inject_hyperparams`), however deep it lies; without any,
    the only other `count` there is, such as Adam's. Equal counts, as in the groups of `muon` or
    `lora_plus`, are one count. Before the first update it is the rate of step 0; after an update it
    is *not* the rate which that update had but the one of the next.

    Args:
      opt_state: the state of any optax optimizer, also as `flax.nnx.Optimizer` holds it
        (`optimizer.opt_state`). Traced states are fine, in `jit` and `scan`.
      schedule: the schedule that the optimizer was made with, a function of the step. It is called
        with int32 (int64 if there is one), whatever integer a restored count is.

    Returns:
      `schedule(count)`; for states mapped by `jax.vmap`, one rate for each. Traced counts cannot be
      compared before they are known: where several differ, the rate is NaN.

    Raises:
      ValueError: no count, or several that differ; the message has their paths. Pass the part of
        the state that is meant, such as one group of `optax.partition`.
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
    counts = _counts(opt_state, ())
    found = [count for count in counts if count.owner in _OF_SCHEDULES] or counts
    if not found:
        raise ValueError(
            "opt_state has no count: the learning rate was made without a schedule, or this is no "
            "state of an optimizer"
        )
    steps = [_phases.as_count(count.value) for count in found]
    traced = any(isinstance(step, Tracer) for step in steps)
    alike = [
        jnp.shape(step) == jnp.shape(steps[0]) and (traced or bool(jnp.all(step == steps[0])))
        for step in steps
    ]
    if not all(alike):
        listed = ", ".join(
            f"opt_state{jax.tree_util.keystr(count.path)}"
            + ("" if traced else f" ({np.asarray(step).tolist()})")
            for count, step in zip(found, steps)
        )
        raise ValueError(
            f"opt_state has {len(found)} counts that could be meant, and they differ: {listed}; "
            "pass the part of the state that the schedule belongs to"
        )
    rate = jnp.asarray(schedule(steps[0]))
    if not traced:
        return rate
    for step in steps[1:]:
        rate = jnp.where(step == steps[0], rate, jnp.asarray(jnp.nan).astype(rate.dtype))
    return rate


class _Count(NamedTuple):
    """A field `count` of a state."""

    owner: str  # type of the state
    path: tuple[Any, ...]
    value: Any


def _counts(node: Any, path: tuple[Any, ...]) -> list[_Count]:
    """Returns the counts of states: fields of named tuples, not parameters of that name."""
    below, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
    found = []
    for key, child in below:
        if not key:  # the node is a leaf
            continue
        if hasattr(node, "_fields") and getattr(key[0], "name", None) == "count":
            # One array, or a container around it such as a variable of Flax.
            found += [_Count(type(node).__name__, (*path, *key), x) for x in jax.tree.leaves(child)]
        else:
            found += _counts(child, (*path, *key))
    return found
