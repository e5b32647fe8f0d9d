"""Checks of arguments that several files of this folder share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxopt_lab import _checks


def check_static(**values: Any) -> None:
    """Refuses arrays where shapes, or which program is traced, depend on the value.

    Raises:
      ValueError: the message says what to do under `optax.inject_hyperparams`.
    """
    arrays = [name for name, x in values.items() if isinstance(x, (jax.Array, np.ndarray))]
    if arrays:
        raise ValueError(
            f"{', '.join(arrays)} must be a number of Python's, no array, because shapes or the "
            "program depend on it; with optax.inject_hyperparams list it in static_args"
        )


def check_density(density: Any) -> None:
    """Refuses what is neither a fraction nor a function.

    Raises:
      ValueError: out of range, or an array.
      TypeError: not a number.
    """
    if callable(density):
        return
    check_static(density=density)
    _checks.check_fraction(density=density)


def check_seed(seed: Any) -> None:
    """Refuses a seed that is neither an integer nor, as under injection, an array with one.

    Raises:
      TypeError: the message has its type.
    """
    is_array = isinstance(seed, (jax.Array, np.ndarray))
    if not (is_array and seed.shape == () and np.issubdtype(seed.dtype, np.integer)):
        _checks.check_seed(seed)


def check_function(**values: Callable[..., Any] | None) -> None:
    """Refuses what is neither None nor can be called, by name.

    Raises:
      TypeError: the message says what was given.
    """
    for name, value in values.items():
        if value is not None and not callable(value):
            raise TypeError(f"{name} must be a function or None, got {value!r}")


def check_whole_number(**values: Any) -> None:
    """Refuses what is no integer from 0 on, by name.

    Raises:
      TypeError: not an integer.
      ValueError: below 0.
    """
    check_static(**values)
    _checks.check_non_negative(**values)
    for name, value in values.items():
        if not isinstance(value, (int, np.integer)):
            raise TypeError(f"{name} must be an integer, got {value}")
