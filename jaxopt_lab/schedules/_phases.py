"""What the schedules share: steps as numbers, warm-up and decay between two values, checks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_lab import _hyperparams, _tree

Scalar = _hyperparams.Scalar
WARMUP_SHAPES = ("linear", "cosine", "sqrt")
DECAY_SHAPES = ("linear", "cosine", "sqrt", "exponential")


def since(step: Any, start: Any = 0) -> jax.Array:
    """Returns `step - start` in float32, or in float64 for a step in float64.

    The difference of integers is taken before it is rounded: counts above 2**24 stay apart.

    Raises:
      TypeError: `step` is not a real number.
    """
    t = jnp.asarray(step)
    if not (jnp.issubdtype(t.dtype, jnp.integer) or jnp.issubdtype(t.dtype, jnp.floating)):
        raise TypeError(f"step must be an integer or a real number, got dtype {t.dtype}")
    if jnp.issubdtype(t.dtype, jnp.floating):
        t = t.astype(_tree.compute_dtype(t.dtype))
    return (t - jnp.asarray(start, t.dtype)).astype(_tree.compute_dtype(t.dtype))


def warmed_up(
    t: jax.Array,
    after: jax.Array,
    init_value: Scalar,
    peak_value: Scalar,
    warmup_steps: int,
    *,
    shape: str = "linear",
    zero_based: bool = False,
) -> jax.Array:
    """Returns the warm-up from `init_value` to `peak_value` before `warmup_steps`, else `after`."""
    if warmup_steps == 0:
        return after
    p = jnp.clip((t + (0 if zero_based else 1)) / warmup_steps, 0, 1)
    rise = {
        "linear": lambda: p,
        "cosine": lambda: jnp.square(jnp.sin(0.5 * jnp.pi * p)),  # (1 - cos(pi p)) / 2
        "sqrt": lambda: 1 - jnp.sqrt(1 - p),
    }[shape]()
    low, high = (jnp.asarray(x, t.dtype) for x in (init_value, peak_value))
    return jnp.where(t < warmup_steps, low + (high - low) * rise, after)


def decayed(q: jax.Array, start_value: Scalar, end_value: Scalar, shape: str) -> jax.Array:
    """Returns the value at the fraction `q` of the way from `start_value` down to `end_value`."""
    q = jnp.clip(q, 0, 1)
    start, end = (jnp.asarray(x, q.dtype) for x in (start_value, end_value))
    if shape == "exponential":
        return start ** (1 - q) * end**q
    rest = {
        "linear": lambda: 1 - q,
        "cosine": lambda: jnp.square(jnp.cos(0.5 * jnp.pi * q)),  # (1 + cos(pi q)) / 2
        "sqrt": lambda: 1 - jnp.sqrt(q),
    }[shape]()
    return end + (start - end) * rest


def check_rate(**values: Scalar) -> None:
    """Refuses learning rates that are negative, infinite or NaN, by name.

    Raises:
      ValueError: see above.
      TypeError: neither a number nor an array.
    """
    for name, value in values.items():
        if not _hyperparams.is_number(value) and not isinstance(value, (jax.Array, np.ndarray)):
            raise TypeError(f"{name} must be a number or an array, got {type(value).__name__}")
        if _hyperparams.is_number(value) and not 0 <= value < math.inf:
            raise ValueError(f"{name} must be finite and non-negative, got {value}")


def check_steps(least: int = 0, **values: Any) -> None:
    """Refuses numbers of steps that are no integers from `least` on, by name.

    Raises:
      ValueError: too small.
      TypeError: not an integer.
    """
    for name, value in values.items():
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
            raise TypeError(f"{name} must be an integer, got {value!r}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def check_not_above(name: str, value: Scalar, bound_name: str, bound: Scalar) -> None:
    """Refuses a number above another one.

    Raises:
      ValueError: the message has both.
    """
    if _hyperparams.is_number(value) and _hyperparams.is_number(bound) and value > bound:
        raise ValueError(f"{name} must not exceed {bound_name}, got {value} > {bound}")


def check_decay(shape: str, end_value: Scalar) -> None:
    """Refuses an unknown shape, and an exponential decay to zero, which takes for ever.

    Raises:
      ValueError: see above.
    """
    _hyperparams.check_choice(DECAY_SHAPES, decay_shape=shape)
    if shape == "exponential" and _hyperparams.is_number(end_value) and end_value == 0:
        raise ValueError("decay_shape exponential needs end_value above 0, got 0")


def check_schedule(**values: Callable[..., Any]) -> None:
    """Refuses what cannot be called with a step, by name.

    Raises:
      TypeError: see above.
    """
    for name, value in values.items():
        if not callable(value):
            raise TypeError(f"{name} must be a function of the step, got {type(value).__name__}")
