"""The numbers and the last links of a chain that rules share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxopt_lab import _checks, _tree

Scalar = float | jax.Array


def value_at(name: str, value: optax.ScalarOrSchedule, count: jax.Array | None) -> Scalar:
    """Returns a hyper-parameter at a step: itself, or the value of the schedule that it is.

    Raises:
      TypeError: see `check_scalar`; the message has `name`.
      ValueError: the schedule gave an array with axes, which would change the updates' shape.
    """
    if not callable(value):
        return value
    found: Any = value(count)  # type: ignore[arg-type]
    try:
        _checks.check_scalar(**{name: found})
    except (TypeError, ValueError) as error:
        raise type(error)(f"the schedule given as {name} returned no number: {error}") from error
    return found


def increment(count: jax.Array, by: int = 1) -> jax.Array:
    """Returns `count + by`, or the largest int32 for ever."""
    largest = jnp.iinfo(count.dtype).max
    return jnp.where(count < largest - by, count + by, jnp.asarray(largest, count.dtype))


def one_minus_power(b: Scalar, count: jax.Array, dtype: Any) -> jax.Array:
    """Returns `1 - b**count`, the bias correction of a moving average.

    For a Python number the logarithm is taken in double precision while tracing: `1 - b**count` in
    float32 inherits the rounding of `b` and is off by 2e-5 at b = 0.999, this form by 3e-7.
    """
    return -jnp.expm1(log_power(b, count, dtype))


def bias_corrections(
    b1: Scalar, b2: Scalar, count: jax.Array
) -> Callable[[Any], tuple[jax.Array, jax.Array]]:
    """Returns `(1 - b1**count, 1 - b2**count)` as a function of the dtype, for `map_leaves`."""
    return lambda dtype: (one_minus_power(b1, count, dtype), one_minus_power(b2, count, dtype))


def log_power(b: Scalar, count: jax.Array, dtype: Any) -> jax.Array:
    """Returns `count * log(b)`, the logarithm of `b**count`."""
    t = count.astype(dtype)
    # In place of 0, whose logarithm is infinite, stands what is 0 beside 1.
    tiny = float(jnp.finfo(dtype).tiny)
    if _checks.is_number(b):
        return t * math.log(max(b, tiny))
    return t * jnp.log(jnp.maximum(jnp.asarray(b).astype(dtype), tiny))


@jax.custom_jvp
def sqrt(x: jax.Array) -> jax.Array:
    """Square root whose derivative at zero is zero instead of infinite.

    A gradient that is exactly zero leaves a second moment of zero, where the true slope would turn
    every derivative through the update (meta-learning) into NaN.
    """
    return jnp.sqrt(x)


@sqrt.defjvp
def _sqrt_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (x,), (dx,) = primals, tangents
    root = sqrt(x)
    is_zero = x == 0
    return root, jnp.where(is_zero, jnp.zeros_like(dx), dx / (2 * jnp.where(is_zero, 1, root)))


class WeightDecayScheduleState(NamedTuple):
    """State of a weight decay that follows a schedule."""

    count: jax.Array  # steps taken; int32, shape ()


def decay_weights(
    weight_decay: optax.ScalarOrSchedule,
    mask: _tree.Mask,
    method: str,
    sign: float = 1.0,
    name: str = "weight_decay",
) -> optax.GradientTransformation:
    """Adds `sign * weight_decay * parameter` to the updates of the leaves that `mask` selects.

    The number 0 needs no parameters and leaves the updates alone; its state is that of any number.
    """
    _checks.check_scalar_or_schedule(**{name: weight_decay})
    _checks.check_per_leaf(mask=mask)

    def init_fn(params: optax.Params) -> optax.OptState:
        _tree.mask_leaves(mask, params)
        if callable(weight_decay):
            return WeightDecayScheduleState(count=jnp.zeros((), jnp.int32))
        return optax.EmptyState()

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        rate = weight_decay
        if callable(weight_decay):
            state = _tree.check_state(state, WeightDecayScheduleState)
            rate = value_at(name, weight_decay, state.count)
            state = WeightDecayScheduleState(count=increment(state.count))
        elif _checks.is_number(rate) and rate == 0:
            return updates, state
        params = _tree.require_params(params, method)

        def decay(
            u: jax.Array, theta: jax.Array, selected: bool, rate: jax.Array
        ) -> tuple[jax.Array]:
            return (u + rate * theta if selected else u,)

        (updates,) = _tree.map_leaves(
            decay,
            updates,
            params=params,
            static=_tree.mask_leaves(mask, params),
            shared=lambda dtype: sign * jnp.asarray(rate, dtype),
        )
        return updates, state

    return optax.GradientTransformation(init_fn, update_fn)


def scale_by_learning_rate(
    learning_rate: optax.ScalarOrSchedule, name: str = "learning_rate"
) -> optax.GradientTransformation:
    """Multiplies by `-learning_rate`, as `optax.scale_by_learning_rate`, and keeps the dtype.

    With a rate that is an array, as under `optax.inject_hyperparams`, optax's would turn bfloat16
    updates into float32.
    """
    _checks.check_scalar_or_schedule(**{name: learning_rate})

    def init_fn(params: optax.Params) -> optax.OptState:
        del params
        if callable(learning_rate):
            return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))
        return optax.EmptyState()

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        del params
        rate = learning_rate
        if callable(learning_rate):
            state = _tree.check_state(state, optax.ScaleByScheduleState)
            rate = value_at(name, learning_rate, state.count)
            state = optax.ScaleByScheduleState(count=increment(state.count))
        (updates,) = _tree.map_leaves(
            lambda u, rate: (rate * u,),
            updates,
            shared=lambda dtype: -jnp.asarray(rate, dtype),
        )
        return updates, state

    return optax.GradientTransformation(init_fn, update_fn)


def mask_of(weight_decay: optax.ScalarOrSchedule, mask: _tree.Mask) -> _tree.Mask:
    """Returns what a rule with a decay of its own decays: nothing if the decay is the number 0."""
    if not (_checks.is_number(weight_decay) and weight_decay == 0):
        return mask

    def nothing(params: optax.Params) -> Any:
        _tree.mask_leaves(mask, params)
        return jax.tree.map(lambda _: False, params)

    return nothing


def in_full_precision(
    inner: optax.GradientTransformation, *, lifts_gradients: bool = True
) -> optax.GradientTransformation:
    """Runs `inner` on gradients of at least float32 and rounds its updates once, at the end.

    Between the links of a chain nothing is rounded, so that a decay of 1e-4 beside a sign of 1 and
    a learning rate of 1e-6 keep their digits. The updates have the wider of the gradient's dtype
    and the parameter's: float32 weights lose nothing to bfloat16 gradients, and a tree that is
    bfloat16 throughout has bfloat16 updates. Without parameters, what the first state holds as
    `mu` knows their dtypes. Extra arguments are handed to whoever takes them. Without
    `lifts_gradients` the first link of `inner` is given the gradients as they are.
    """
    inner = optax.with_extra_args_support(inner)

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        seen = jax.tree.map(_lifted, updates) if lifts_gradients else updates
        new, new_state = inner.update(seen, state, params, **extra_args)
        like = params
        if like is None:
            mu = getattr(state[0] if isinstance(state, tuple) and state else None, "mu", None)
            like = mu if jax.tree.structure(mu) == jax.tree.structure(updates) else None
        wanted = iter(_tree.update_dtypes(updates, like))
        return jax.tree.map(lambda u: u.astype(next(wanted)), new), new_state

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)


def _lifted(g: Any) -> Any:
    # What is no real floating point is refused by the rule, by name.
    if not jnp.issubdtype(getattr(g, "dtype", np.void), jnp.floating):
        return g
    return jnp.asarray(g).astype(_tree.compute_dtype(g.dtype))


def check_links(state: Any, links: Sequence[str], method: str) -> None:
    """Refuses what is not a tuple with a state for each of `links`, as that of a chain is.

    Raises:
      TypeError: the message says what was given.
    """
    if isinstance(state, tuple) and len(state) == len(links):
        return
    found = type(state).__name__
    found += f" of length {len(state)}" if isinstance(state, tuple) else ""
    *first, last = (f"the {link}'s" for link in links)
    raise TypeError(
        f"{method} expected a state of type tuple, of {', '.join(first)} and {last} State, "
        f"got {found}: was it made by another transformation's init?"
    )


def ready_made(
    rule: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: _tree.Mask = None,
    *,
    method: str,
    decays: Literal["direction", "gradient", "weights"] = "direction",
    prefix: str = "",
    lifts_gradients: bool = True,
) -> optax.GradientTransformation:
    """A rule, weight decay and the learning rate, with nothing rounded in between.

    The state is `(rule, decay, rate)` whatever the numbers are and wherever the decay acts.

    Args:
      rule: the bare rule.
      learning_rate: step size or schedule.
      weight_decay: decay rate or schedule.
      mask: what decays.
      method: the name for messages.
      decays: what the decay is added to: the rule's direction, before the learning rate
        (decoupled); the gradient, before the rule (coupled); or, whatever the learning rate, the
        weights themselves.
      prefix: of the arguments' names in messages.
      lifts_gradients: whether the rule is given gradients in at least float32; else only its
        direction is lifted, for a rule beside whose memory a copy of the gradients is too much.
    """
    # After the learning rate the updates descend already, so the decay is subtracted.
    sign = -1.0 if decays == "weights" else 1.0
    links = (
        optax.with_extra_args_support(rule),
        decay_weights(weight_decay, mask, method, sign, f"{prefix}weight_decay"),
        scale_by_learning_rate(learning_rate, f"{prefix}learning_rate"),
    )
    order = {"direction": (0, 1, 2), "gradient": (1, 0, 2), "weights": (0, 2, 1)}[decays]

    def init_fn(params: optax.Params) -> tuple[optax.OptState, ...]:
        return tuple(link.init(params) for link in links)

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, tuple[optax.OptState, ...]]:
        check_links(state, ("rule", "decay", "rate"), method)
        new = list(state)
        for index in order:
            extra = extra_args if index == 0 else {}
            updates, new[index] = links[index].update(updates, state[index], params, **extra)
            updates = jax.tree.map(_lifted, updates)
        return updates, tuple(new)

    return in_full_precision(
        optax.GradientTransformationExtraArgs(init_fn, update_fn), lifts_gradients=lifts_gradients
    )
