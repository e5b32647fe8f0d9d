"""Checks the options that must be known while tracing, and that arrays are arrays."""

from __future__ import annotations

import functools
import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def array(name: str, value: Any) -> jax.Array:
    """Returns what was given as an array, or raises a TypeError that names the argument."""
    try:
        if isinstance(value, str):  # JAX takes some letters for dtypes
            raise TypeError(value)
        return jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} is a {type(value).__name__}; expected an array") from error


def floating(name: str, value: Any) -> jax.Array:
    """Returns a checked array of floats."""
    x = array(name, value)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{name} has dtype {x.dtype}; expected a floating dtype")
    return x


def flag(name: str, value: Any) -> bool:
    """Returns a checked choice that is known while tracing."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}={value!r}; expected True or False, known while tracing")
    return bool(value)


def index(name: str, value: Any) -> int:
    """Returns a checked integer that is known while tracing."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}={value!r}; expected an integer")
    return int(value)


def positive_index(name: str, value: Any) -> int:
    """Returns a checked integer of at least 1 that is known while tracing."""
    found = index(name, value)
    if found < 1:
        raise ValueError(f"{name}={found}; expected a positive integer")
    return found


def indices(name: str, values: Any) -> tuple[int, ...]:
    """Returns a checked sequence of integers that are known while tracing."""
    if not isinstance(values, (tuple, list, np.ndarray)):
        raise TypeError(f"{name}={values!r}; expected a sequence of integers")
    return tuple(index(f"{name}[{i}]", x) for i, x in enumerate(values))


def precision(value: Any) -> Any:
    """Returns what `jax.lax.dot_general` knows as the precision of its product."""
    try:
        _product(hashable("precision", value))
    except ValueError as error:
        raise ValueError(
            f"precision={value!r}; expected None, a jax.lax.Precision or its name, such as "
            "'highest', or a pair of them"
        ) from error
    return value


@functools.lru_cache
def _product(precision: Any) -> None:
    x = jax.ShapeDtypeStruct((1, 1), jnp.float32)
    jax.eval_shape(lambda x: jax.lax.dot(x, x, precision=precision), x)


def soft_cap(cap: Any) -> float | None:
    """Returns a checked soft cap, or None where there is none."""
    if cap is None:
        return None
    cap = number("logits_soft_cap", cap)
    if not cap > 0:
        raise ValueError(f"logits_soft_cap={cap}; expected a positive number or None")
    # There the quotient of a score and the cap is lost, and cap * tanh(z / cap) is z to rounding.
    return cap if cap < 1e30 else None


def number(name: str, value: Any) -> float:
    """Returns a checked number that is known while tracing."""
    is_array = isinstance(value, (np.ndarray, jax.Array)) and not isinstance(value, Tracer)
    if not isinstance(value, numbers.Real) and not (is_array and value.ndim == 0):
        raise TypeError(f"{name}={value!r}; expected a number that is known while tracing")
    value = float(value)
    if math.isnan(value):
        raise ValueError(f"{name} is NaN")
    return value


def positive(name: str, value: Any) -> float:
    """Returns a checked number above 0 that is known while tracing."""
    found = number(name, value)
    if not 0 < found < math.inf:
        raise ValueError(f"{name}={found}; expected a positive number")
    return found


def hashable(name: str, value: Any) -> Any:
    """Returns a checked static value."""
    try:
        hash(value)
    except TypeError as error:
        raise TypeError(f"{name}={value!r} is not hashable; expected a static value") from error
    return value
