"""Checks the options that say which keys are hidden."""

from __future__ import annotations

import numbers
from typing import Any

from pallas_kernels._options import flag


def window(size: Any, is_causal: bool) -> tuple[int | None, int | None]:
    """Returns how many keys a query sees before and after its own position, None for all."""
    is_causal = flag("is_causal", is_causal)
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
