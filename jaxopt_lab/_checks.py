"""Checks of hyper-parameters, at construction: what was given is named, and what was expected."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

_NUMBERS = (int, float, np.number)


def is_number(value: Any) -> TypeGuard[float]:
    """Whether `value` is known while tracing; jax's arrays are taken as they are."""
    return isinstance(value, (*_NUMBERS, np.ndarray)) and np.ndim(value) == 0


def check_scalar(**values: Any) -> None:
    """Refuses what is no single real number, by name.

    A `jax.Array` of shape () passes, whatever its value, which is not known while tracing.

    Raises:
      TypeError: text, None, a boolean, a container, a function or a complex number.
      ValueError: an array with axes, which would change the shape of what it is multiplied with.
    """
    for name, value in values.items():
        known = isinstance(value, (*_NUMBERS, np.ndarray, jax.Array))
        if isinstance(value, (bool, np.bool_)) or not known:
            hint = ""
            if isinstance(value, (tuple, list)):
                hint = "; optax takes each number as an argument of its own, such as b1 and b2"
            elif callable(value):
                hint = "; for a schedule here wrap the optimizer in optax.inject_hyperparams"
            raise TypeError(f"{name} must be a number, got {_shown(value)}{hint}")
        if jnp.shape(value) != ():
            raise ValueError(f"{name} must have shape (), got an array of shape {jnp.shape(value)}")
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


def check_decay(**values: Any) -> None:
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


def check_positive(**values: Any) -> None:
    """Refuses values that are not above zero, by name."""
    check_scalar(**values)
    for name, value in values.items():
        _check_width(name, value)
        if is_number(value) and not 0.0 < value < math.inf:
            raise ValueError(f"{name} must be positive, got {value}")


def check_non_negative(**values: Any) -> None:
    """Refuses values below zero, infinite ones and NaN, by name."""
    check_scalar(**values)
    for name, value in values.items():
        if is_number(value) and not value >= 0.0:
            raise ValueError(f"{name} must be non-negative, got {value}")
        if is_number(value) and value == math.inf:
            raise ValueError(f"{name} must be finite, got {value}")


def check_finite(**values: Any) -> None:
    """Refuses infinite values and NaN, by name."""
    check_scalar(**values)
    for name, value in values.items():
        if is_number(value) and not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")


def check_fraction(**values: Any) -> None:
    """Refuses values outside [0, 1], by name."""
    check_scalar(**values)
    for name, value in values.items():
        if is_number(value) and not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} must be in [0, 1], got {value}")


def check_positive_integer(**values: Any) -> None:
    """Refuses what is not a whole number from 1 on, by name.

    Raises:
      TypeError: not an integer.
      ValueError: below 1, or an array with axes.
    """
    for name, value in values.items():
        if isinstance(value, (jax.Array, np.ndarray)):
            check_scalar(**{name: value})
        if isinstance(value, jax.Array):
            continue
        if isinstance(value, np.ndarray):
            value = value[()]
        if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
            shown = value if is_number(value) else _shown(value)
            raise TypeError(f"{name} must be a positive integer, got {shown}")
        if value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value}")


def check_flag(**values: Any) -> None:
    """Refuses what is neither True nor False, by name: an argument in another's place.

    Raises:
      TypeError: the message says what was given.
    """
    for name, value in values.items():
        if not isinstance(value, (bool, np.bool_)):
            raise TypeError(f"{name} must be True or False, got {_shown(value)}")


def check_scalar_or_schedule(**values: Any) -> None:
    """Refuses what is neither a number from zero on nor a schedule, by name.

    What a schedule returns is looked at by `value_at`, while tracing.

    Raises:
      TypeError: see `check_scalar`; also a function that is not one of the step alone, such as an
        `optax.linear_schedule` that was not called.
      ValueError: negative, infinite or NaN, or an array with axes.
    """
    for name, value in values.items():
        if not callable(value):
            check_non_negative(**{name: value})
        elif not _takes_a_count(value):
            called = getattr(value, "__name__", "make")
            raise TypeError(
                f"{name} must be a number or a function of the step, got {_shown(value)}: if it "
                f"makes schedules call it first, as in {called}(...)"
            )


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
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
        raise TypeError(f"seed must be an integer, got {type(seed).__name__}")


def canonical_mu_dtype(mu_dtype: Any, name: str = "mu_dtype") -> np.dtype | None:
    """Returns `mu_dtype` as a dtype, or None; `name` is the argument's.

    Raises:
      ValueError: not a real floating dtype.
    """
    if mu_dtype is None:
        return None
    try:
        dtype = jax.dtypes.canonicalize_dtype(mu_dtype)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be a dtype such as 'bfloat16', got {mu_dtype!r}") from error
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{name} must be floating, got {dtype}")
    return dtype


def _check_width(name: str, value: Any) -> None:
    dtype = getattr(value, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32:
        raise ValueError(
            f"{name} arrived as {dtype}, in which 0.999 is 1 and 1e-8 may be 0; with "
            "optax.inject_hyperparams pass hyperparam_dtype=jax.numpy.float32"
        )


def _takes_a_count(schedule: Callable[..., Any]) -> bool:
    if isinstance(schedule, type):
        return False
    try:
        inspect.signature(schedule).bind(0)
    except TypeError:
        return False
    except ValueError:  # a function that is not Python's tells nothing
        return True
    return True


def _shown(value: Any) -> str:
    """A short description of a wrong argument."""
    text = repr(value)
    name = type(value).__name__
    if callable(value):
        return f"the {name} {getattr(value, '__name__', text)!r}"
    return f"{text} ({name})" if len(text) <= 60 and name not in text else name
