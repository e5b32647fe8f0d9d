"""Checks of hyper-parameters, and the numbers and the last links of a chain that rules share."""

from __future__ import annotations

import math
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxopt_lab import _tree

Scalar = float | jax.Array


def is_number(value: Any) -> TypeGuard[float]:
    """Whether `value` is known while tracing; arrays and tracers are taken as they are."""
    return isinstance(value, (int, float, np.number))


def check_scalar(**values: Any) -> None:
    """Refuses what is no single real number, by name.

    Arrays and tracers of shape () pass, whatever their value, which is not known while tracing.

    Raises:
      TypeError: text, None, a boolean, a container, a function or a complex number.
      ValueError: an array with axes, which would change the shape of what it is multiplied with.
    """
    for name, value in values.items():
        if isinstance(value, (bool, np.bool_)) or not isinstance(
            value, (int, float, np.number, np.ndarray, jax.Array)
        ):
            hint = ""
            if isinstance(value, (tuple, list)):
                hint = "; optax takes each number as an argument of its own, such as b1 and b2"
            elif callable(value):
                hint = "; for a schedule here wrap the optimizer in optax.inject_hyperparams"
            raise TypeError(f"{name} must be a number, got {_shown(value)}{hint}")
        if jnp.shape(value) != ():
            raise ValueError(f"{name} must have shape (), got an array of shape {value.shape}")
        dtype = getattr(value, "dtype", None)
        if dtype is not None and not (
            jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.floating)
        ):
            raise TypeError(f"{name} must be a real number, got an array of dtype {dtype}")


def check_transformation(**values: Any) -> None:
    """Refuses what is no optax transformation, by name.

    Raises:
      TypeError: the message says what was given, and that a factory wants to be called.
    """
    for name, value in values.items():
        if callable(getattr(value, "init", None)) and callable(getattr(value, "update", None)):
            continue
        called = getattr(value, "__name__", "make")
        hint = f": call it first, as in {called}(...)" if callable(value) else ""
        raise TypeError(
            f"{name} must be an optax.GradientTransformation, got {_shown(value)}{hint}"
        )


def check_decay(**values: Scalar) -> None:
    """Refuses decay rates outside [0, 1), by name.

    Raises:
      ValueError: out of range, or an array too narrow to tell 0.999 from 1.
      TypeError: see `check_scalar`.
    """
    check_scalar(**values)
    for name, value in values.items():
        _check_width(name, value)
        if is_number(value) and not 0.0 <= value < 1.0:
            raise ValueError(f"{name} must be in [0, 1), got {value}")


def check_positive(**values: Scalar) -> None:
    """Refuses values that are not above zero, by name."""
    check_scalar(**values)
    for name, value in values.items():
        _check_width(name, value)
        if is_number(value) and not 0.0 < value < math.inf:
            raise ValueError(f"{name} must be positive, got {value}")


def check_non_negative(**values: Scalar) -> None:
    """Refuses values below zero, infinite ones and NaN, by name."""
    check_scalar(**values)
    for name, value in values.items():
        if is_number(value) and not value >= 0.0:
            raise ValueError(f"{name} must be non-negative, got {value}")
        if is_number(value) and value == math.inf:
            raise ValueError(f"{name} must be finite, got {value}")


def check_fraction(**values: Scalar) -> None:
    """Refuses values outside [0, 1], by name."""
    check_scalar(**values)
    for name, value in values.items():
        if is_number(value) and not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} must be in [0, 1], got {value}")


def check_positive_integer(**values: Any) -> None:
    """Refuses what is not a whole number from 1 on, by name.

    Raises:
      TypeError: not an integer.
      ValueError: below 1.
    """
    for name, value in values.items():
        if is_number(value) and not isinstance(value, (int, np.integer)):
            raise TypeError(f"{name} must be a positive integer, got {value}")
        if is_number(value) and value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value}")


def check_choice(options: tuple[str, ...], **values: Any) -> None:
    """Refuses what is none of `options`, by name.

    Raises:
      ValueError: the message has the options.
    """
    for name, value in values.items():
        if value not in options:
            raise ValueError(f"{name} must be one of {', '.join(options)}, got {value!r}")


def check_seed(seed: Any) -> None:
    """Refuses a seed that is no integer.

    Raises:
      TypeError: the message has its type.
    """
    if not isinstance(seed, (int, np.integer)):
        raise TypeError(f"seed must be an integer, got {type(seed).__name__}")


def canonical_mu_dtype(mu_dtype: Any) -> np.dtype | None:
    """Returns `mu_dtype` as a dtype, or None.

    Raises:
      ValueError: not a real floating dtype.
    """
    if mu_dtype is None:
        return None
    dtype = jax.dtypes.canonicalize_dtype(mu_dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"mu_dtype must be floating, got {dtype}")
    return dtype


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


def log_power(b: Scalar, count: jax.Array, dtype: Any) -> jax.Array:
    """Returns `count * log(b)`, the logarithm of `b**count`."""
    t = count.astype(dtype)
    if is_number(b):
        # exp of the lowest number is 0, and unlike -inf it survives a product with a zero count.
        log_b = math.log(b) if b > 0 else float(jnp.finfo(dtype).min)
        return jnp.maximum(t * log_b, jnp.finfo(dtype).min)
    return t * jnp.log(jnp.asarray(b).astype(dtype))


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


def decay_weights(
    weight_decay: Scalar, mask: _tree.Mask, method: str, sign: float = 1.0
) -> optax.GradientTransformation:
    """Adds `sign * weight_decay * parameter` to the updates of the leaves that `mask` selects."""
    check_non_negative(weight_decay=weight_decay)

    def init_fn(params: optax.Params) -> optax.EmptyState:
        _tree.mask_leaves(mask, params)
        return optax.EmptyState()

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        params = _tree.require_params(params, method)

        def decay(u: jax.Array, theta: jax.Array, selected: bool) -> tuple[jax.Array]:
            return (u + jnp.asarray(sign * weight_decay, u.dtype) * theta if selected else u,)

        selected = _tree.mask_leaves(mask, params)
        (updates,) = _tree.map_leaves(decay, updates, params=params, static=selected)
        return updates, state

    return optax.GradientTransformation(init_fn, update_fn)


def scale_by_learning_rate(
    learning_rate: optax.ScalarOrSchedule,
) -> optax.GradientTransformation:
    """Multiplies by `-learning_rate`, as `optax.scale_by_learning_rate`, and keeps the dtype.

    With a rate that is an array, as under `optax.inject_hyperparams`, optax's would turn bfloat16
    updates into float32.
    """
    if not callable(learning_rate):
        check_non_negative(learning_rate=learning_rate)

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
            rate = learning_rate(state.count)
            state = optax.ScaleByScheduleState(count=increment(state.count))
        (updates,) = _tree.map_leaves(lambda u: (-jnp.asarray(rate, u.dtype) * u,), updates)
        return updates, state

    return optax.GradientTransformation(init_fn, update_fn)


def ready_made(
    rule: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: Scalar = 0.0,
    mask: _tree.Mask = None,
    *,
    method: str,
    coupled: bool = False,
) -> optax.GradientTransformation:
    """Chains weight decay (left out if it is the number 0), a rule, and the learning rate.

    A coupled decay joins the gradient before the rule, a decoupled one the update after it.
    """
    links = [rule]
    if not is_number(weight_decay) or weight_decay != 0:
        decay = decay_weights(weight_decay, mask, method)
        links = [decay, rule] if coupled else [rule, decay]
    return optax.chain(*links, scale_by_learning_rate(learning_rate))


def _check_width(name: str, value: Any) -> None:
    dtype = getattr(value, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32:
        raise ValueError(
            f"{name} arrived as {dtype}, in which 0.999 is 1 and 1e-8 may be 0; with "
            "optax.inject_hyperparams pass hyperparam_dtype=jax.numpy.float32"
        )


def _shown(value: Any) -> str:
    """A short description of a wrong argument."""
    text = repr(value)
    name = type(value).__name__
    if callable(value):
        return f"the {name} {getattr(value, '__name__', text)!r}"
    return f"{text} ({name})" if len(text) <= 60 and name not in text else name
