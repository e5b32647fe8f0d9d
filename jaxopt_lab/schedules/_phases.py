"""What the schedules share: steps as numbers, warm-up and decay between two values, checks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxopt_lab import _checks, _hyperparams, _tree

Scalar = _hyperparams.Scalar
WarmupShape = Literal["linear", "cosine", "sqrt"]
DecayShape = Literal["linear", "cosine", "sqrt", "exponential"]
WARMUP_SHAPES: tuple[WarmupShape, ...] = get_args(WarmupShape)
DECAY_SHAPES: tuple[DecayShape, ...] = get_args(DecayShape)
_HALF = 16  # bits


def since(step: Any, *starts: Any) -> jax.Array:
    """Returns `step` minus all `starts` in float32, or in float64 for a step in float64.

    The difference of integers of any width, signed or not, is that of the numbers, and is taken
    before it is rounded: counts above 2**24 stay apart, and none below a start wraps around.

    Args:
      step: an integer or a real number, of any shape.
      *starts: integers, from `as_start`.

    Raises:
      TypeError: `step` is not a real number.
    """
    dtype = _dtype_of(step)
    if jnp.issubdtype(dtype, jnp.floating):
        t = jnp.asarray(step).astype(_tree.compute_dtype(dtype))
        return t - sum(jnp.asarray(start).astype(t.dtype) for start in starts)
    high, low = _halves(step)
    for start in starts:
        start_high, start_low = _halves(start)
        high, low = high - start_high, low - start_low
    return high.astype(jnp.float32) * 2**_HALF + low.astype(jnp.float32)


def as_count(step: Any) -> Any:
    """Returns a step as foreign schedules expect it, which subtract from it in its own dtype.

    Integer arrays become int32, or int64 if they are wider and there is one; what does not fit
    becomes the largest number.

    Raises:
      TypeError: `step` is not a real number.
    """
    dtype = _dtype_of(step)
    if isinstance(step, int):
        return step
    if jnp.issubdtype(dtype, jnp.floating) or dtype in (jnp.int32, jnp.int64):
        return jnp.asarray(step)
    high, low = _halves(step)
    high, low = (x.astype(jnp.int32) for x in (high, low)) if dtype.itemsize < 4 else (high, low)
    largest = jnp.iinfo(high.dtype).max
    return jnp.where(high > largest >> _HALF, largest, (high << _HALF) | low)


def _halves(x: Any) -> tuple[jax.Array, jax.Array]:
    """Splits integers into `2**16 high + low`, two signed numbers whose differences do not wrap."""
    wide = jax.dtypes.canonicalize_dtype(jnp.int64)
    x = x if isinstance(x, jax.Array) else np.asarray(x)
    if x.dtype.itemsize < 4:
        x = x.astype(wide)
    return jnp.asarray(x >> _HALF).astype(wide), jnp.asarray(x & (2**_HALF - 1)).astype(wide)


def _dtype_of(step: Any) -> Any:
    dtype = jnp.result_type(step)
    if jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.floating):
        return dtype
    raise TypeError(f"step must be an integer or a real number, got dtype {dtype}")


def warmed_up(
    t: jax.Array,
    after: jax.Array,
    init_value: Scalar,
    peak_value: Scalar,
    warmup_steps: int,
    *,
    shape: WarmupShape = "linear",
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


def decayed(q: jax.Array, start_value: Scalar, end_value: Scalar, shape: DecayShape) -> jax.Array:
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
    """Refuses learning rates that are no single number, negative, infinite or NaN, by name.

    Raises:
      ValueError: see above; of an array only the shape is looked at.
      TypeError: neither a real number nor an array of them.
    """
    for name, value in values.items():
        if not _checks.is_number(value) and not isinstance(value, (jax.Array, np.ndarray)):
            raise TypeError(f"{name} must be a number or an array, got {type(value).__name__}")
        _checks.check_scalar(**{name: value})
        if _checks.is_number(value) and not 0 <= value < math.inf:
            raise ValueError(f"{name} must be finite and non-negative, got {value}")


def as_steps(name: str, value: Any, least: int = 0) -> int:
    """Returns a number of steps that is known while tracing, from whatever holds one integer.

    Raises:
      ValueError: below `least`.
      TypeError: not an integer, or traced.
    """
    if not _is_integer(value) or isinstance(value, Tracer):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if int(value) < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return int(value)


def as_start(name: str, value: Any) -> int | jax.Array:
    """Returns a count at which something begins, such as a restored or a traced one.

    Raises:
      ValueError: below 0.
      TypeError: not an integer.
    """
    if isinstance(value, Tracer) and _is_integer(value):
        return value
    return as_steps(name, value)


def _is_integer(value: Any) -> bool:
    if isinstance(value, (int, np.integer)):
        return not isinstance(value, bool)
    if not isinstance(value, (np.ndarray, jax.Array)):
        return False
    return value.shape == () and bool(jnp.issubdtype(value.dtype, jnp.integer))


def check_not_above(name: str, value: Scalar, bound_name: str, bound: Scalar) -> None:
    """Refuses a number above another one.

    Raises:
      ValueError: the message has both.
    """
    if _checks.is_number(value) and _checks.is_number(bound) and value > bound:
        raise ValueError(f"{name} must not exceed {bound_name}, got {value} > {bound}")


def check_decay(shape: str, end_value: Scalar) -> None:
    """Refuses an unknown shape, and an exponential decay to zero, which takes for ever.

    Raises:
      ValueError: see above.
    """
    _checks.check_choice(DECAY_SHAPES, decay_shape=shape)
    if shape == "exponential" and _checks.is_number(end_value) and end_value == 0:
        raise ValueError("decay_shape exponential needs end_value above 0, got 0")


def check_schedule(**values: Callable[..., Any]) -> None:
    """Refuses what cannot be called with a step, by name.

    Raises:
      TypeError: see above.
    """
    for name, value in values.items():
        if not callable(value):
            raise TypeError(f"{name} must be a function of the step, got {type(value).__name__}")
        if not _checks.takes_a_count(value):
            raise TypeError(
                f"{name} must be a function of the step alone, got "
                f"{getattr(value, '__name__', type(value).__name__)!r}: if it makes schedules call "
                "it first"
            )
