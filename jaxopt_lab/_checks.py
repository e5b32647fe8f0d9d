"""Checks of hyper-parameters, at construction: what was given is named, and what was expected."""

from __future__ import annotations

import difflib
import inspect
import math
import os
from collections.abc import Callable, Iterable, Mapping
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
            raise TypeError(f"{name} must be a number, got {shown(value)}{hint}")
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
    check_interface("an optax.GradientTransformation", ("init", "update"), **values)


def check_interface(kind: str, attributes: Iterable[str], **values: Any) -> None:
    """Refuses what lacks one of `attributes`, and classes and factories of what has them, by name.

    Raises:
      TypeError: the message says what was given, what `kind` is expected, and that a factory wants
        to be called.
    """
    for name, value in values.items():
        if not isinstance(value, type) and all(hasattr(value, x) for x in attributes):
            continue
        called = getattr(value, "__name__", "make")
        hint = f": call it first, as in {called}(...)" if callable(value) else ""
        raise TypeError(f"{name} must be {kind}, got {shown(value)}{hint}")


def check_function(**values: Any) -> None:
    """Refuses what cannot be called, by name.

    Raises:
      TypeError: the message says what was given.
    """
    for name, value in values.items():
        if not callable(value):
            raise TypeError(f"{name} must be a function, got {shown(value)}")


def check_mapping(what: str, **values: Any) -> None:
    """Refuses what is no mapping, by name; `what` says of what to what it should be.

    Raises:
      TypeError: the message says what was given.
    """
    for name, value in values.items():
        if not isinstance(value, Mapping):
            raise TypeError(f"{name} must be a dict, {what}, got {shown(value)}")


def check_names(**values: Any) -> None:
    """Refuses what is neither text nor a list, tuple or set of texts, by name.

    Raises:
      TypeError: the message says what was given.
    """
    for name, value in values.items():
        entries = (value,) if isinstance(value, str) else value
        if not isinstance(entries, (list, tuple, set, frozenset)) or not all(
            isinstance(entry, str) for entry in entries
        ):
            raise TypeError(f"{name} must be text or a list of texts, got {shown(value)}")


def check_path(**values: Any) -> None:
    """Refuses what is no path of the file system, by name.

    Raises:
      TypeError: the message says what was given.
    """
    for name, value in values.items():
        if not isinstance(value, (str, os.PathLike)):
            raise TypeError(f"{name} must be a path, got {shown(value)}")


def as_numbers(name: str, values: Any) -> np.ndarray:
    """Returns a sequence of numbers in float64.

    Raises:
      TypeError: no numbers; the message says what was given.
    """
    try:
        return np.asarray(values, np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a sequence of numbers, got {shown(values)}") from error


def check_per_leaf(leaves: str = "True and False", **values: Any) -> None:
    """Refuses what says nothing of any leaf, by name: a number or text in the place of a tree.

    `leaves` says what a tree should have; it is compared with the parameters at init.

    Raises:
      TypeError: no tree, no function and not None; the message says what was given.
    """
    for name, value in values.items():
        number = isinstance(value, (*_NUMBERS, complex, str)) and not isinstance(value, bool)
        if number or isinstance(value, type):
            raise TypeError(
                f"{name} must be a tree of {leaves}, a function of the parameters that returns "
                f"one, or None, got {shown(value)}"
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
            found = value if is_number(value) else shown(value)
            raise TypeError(f"{name} must be a positive integer, got {found}")
        if value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value}")


def check_flag(**values: Any) -> None:
    """Refuses what is neither True nor False, by name: an argument in another's place.

    Raises:
      TypeError: the message says what was given.
    """
    for name, value in values.items():
        if not isinstance(value, (bool, np.bool_)):
            raise TypeError(f"{name} must be True or False, got {shown(value)}")


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
        elif not takes_a_count(value):
            called = getattr(value, "__name__", "make")
            raise TypeError(
                f"{name} must be a number or a function of the step, got {shown(value)}: if it "
                f"makes schedules call it first, as in {called}(...)"
            )


def check_choice(options: tuple[str, ...], **values: Any) -> None:
    """Refuses what is none of `options`, by name.

    Raises:
      ValueError: the message has the options.
    """
    for name, value in values.items():
        if not isinstance(value, str) or value not in options:
            near = difflib.get_close_matches(str(value).lower(), options, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{name} must be one of {', '.join(options)}, got {value!r}{hint}")


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


def takes_a_count(schedule: Callable[..., Any]) -> bool:
    """Whether a function can be called with a step alone, as far as its signature tells."""
    if isinstance(schedule, type):
        return False
    try:
        inspect.signature(schedule).bind(0)
    except TypeError:
        return False
    except ValueError:  # a function that is not Python's tells nothing
        return True
    return True


def shown(value: Any) -> str:
    """Returns a short description of a wrong argument."""
    text = repr(value)
    name = type(value).__name__
    if callable(value):
        return f"the {name} {getattr(value, '__name__', text)!r}"
    return f"{text} ({name})" if len(text) <= 60 and name not in text else name
