"""Checks the options that must be known while tracing."""

from __future__ import annotations

import math
import numbers
from typing import Any

import jax
import numpy as np
from jax.core import Tracer


def window(size: Any, is_causal: bool) -> tuple[int | None, int | None]:
    """Returns how many keys a query sees before and after its own position, None for all."""
    if not isinstance(is_causal, (bool, np.bool_)):
        raise TypeError(f"is_causal={is_causal!r}; expected True or False, known while tracing")
    pair = size if isinstance(size, (tuple, list)) else (size, size)
    if len(pair) != 2:
        raise ValueError(f"local_window_size={size!r}; expected a number or (left, right)")
    for x in pair:
        if x is not None and (not isinstance(x, numbers.Integral) or isinstance(x, bool) or x < 0):
            raise ValueError(
                f"local_window_size={size!r}; expected integers of at least 0, keys before and "
                "after a query's own position, known while tracing"
            )
    left, right = (None if x is None else int(x) for x in pair)
    return left, 0 if is_causal else right


def check_prefix(given: bool, right: int | None) -> None:
    """Raises ValueError where a prefix is given, and no key after a query's own is hidden."""
    if given and right is None:
        raise ValueError(
            "prefix_lengths was given where nothing is hidden on the right; expected "
            "is_causal=True or a local_window_size with a right side"
        )


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
    concrete = isinstance(value, (numbers.Real, np.ndarray, jax.Array))
    if not concrete or isinstance(value, Tracer):
        raise TypeError(f"{name}={value!r}; expected a number that is known while tracing")
    value = float(value)
    if math.isnan(value):
        raise ValueError(f"{name} is NaN")
    return value


def hashable(name: str, value: Any) -> Any:
    """Returns a checked static value."""
    try:
        hash(value)
    except TypeError as error:
        raise TypeError(f"{name}={value!r} is not hashable; expected a static value") from error
    return value
