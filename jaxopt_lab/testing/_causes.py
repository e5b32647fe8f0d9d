"""Why a check failed: one line that points into the user's code, and what equal causes share."""

from __future__ import annotations

import sys
import traceback
from typing import NamedTuple

import jax

_KIT = __name__.rpartition(".")[0]
# Frames in here only carry the error on.
_CARRIERS = {"jax", "jaxlib", "numpy", "flax"} | set(sys.stdlib_module_names) - {"__main__"}
# Where nobody else's frame is left, these are whose fault it is.
_LIBRARIES = ("jaxopt_lab", "optax")
_UNTRACEABLE = (
    jax.errors.ConcretizationTypeError,
    jax.errors.NonConcreteBooleanIndexError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.UnexpectedTracerError,
)
# From here on a message of JAX tells which function of this kit it was in, and how to read it.
_ENDS = ("The error occurred while tracing", "This concrete value", "See https://", "----------")


class Cause(NamedTuple):
    """Two failures with one `key` have the same cause, though messages may name other arrays."""

    text: str
    key: str


def cause_of(error: BaseException, what: str = "") -> Cause:
    """The line for an error: what cannot be done, where, and the first sentences of the error."""
    if not what and isinstance(error, _UNTRACEABLE):
        what = "cannot be traced"
    where = _place(error)
    parts = [part for part in (what, where) if part]
    text = ": ".join([*parts, describe(error)])
    return Cause(text, f"{where}: {type(error).__name__}" if where else text)


def describe(error: BaseException, limit: int = 300) -> str:
    """The type and the first `limit` characters of an error, on one line."""
    text = str(error)
    for end in _ENDS:
        text = text.partition(end)[0] or text
    text = " ".join(text.split())
    return f"{type(error).__name__}: {text[:limit]}{'...' if len(text) > limit else ''}"


def _place(error: BaseException) -> str:
    """`FILE:LINE` of the innermost frame that belongs to whoever wrote the transformation."""
    found = {}
    for frame, line in traceback.walk_tb(error.__traceback__):
        module = frame.f_globals.get("__name__") or ""
        package = module.partition(".")[0]
        if package in _CARRIERS or module == _KIT or module.startswith(f"{_KIT}."):
            continue
        owner = package if package in _LIBRARIES else ""
        found[owner] = f"{frame.f_code.co_filename}:{line}"
    return next((found[owner] for owner in ("", *_LIBRARIES) if owner in found), "")
