"""How a contender's optimizer is made, as text: the calls of libraries with every argument.

The text is recorded while the optimizer is made, so that it cannot differ from the code: the
function that makes it is run once under a profiler that notes the library functions it calls.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

LIBRARIES = ("optax", "jaxopt_lab")


def call_text(make: Callable[[Any], Any]) -> str:
    """The call that makes `make(learning_rate)`, with defaults and nested calls spelled out.

    Args:
      make: a schedule -> what is made of it. Its own name is the answer where what it returns is
        made by none of `LIBRARIES`.
    """

    def learning_rate(count: Any) -> float:
        del count
        return 1e-3

    texts: dict[int, tuple[Any, str]] = {}  # identity -> the object, which stays alive, and text
    calls: dict[FrameType, str] = {}

    def note(frame: FrameType, event: str, result: Any) -> None:
        if event == "call" and _from_outside(frame):
            calls[frame] = _call(frame, texts)
        elif event == "return" and frame in calls:
            texts[id(result)] = result, calls.pop(frame)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        made = make(learning_rate)
    finally:
        sys.setprofile(before)
    found = texts.get(id(made))
    return getattr(make, "__name__", repr(make)) if found is None else found[1]


def _from_outside(frame: FrameType) -> bool:
    """Whether a public function of a library is called by code that is of none."""
    caller = frame.f_back
    return (
        _library(frame) is not None
        and not frame.f_code.co_name.startswith(("_", "<"))
        and (caller is None or _library(caller) is None)
    )


def _library(frame: FrameType) -> str | None:
    name = frame.f_globals.get("__name__", "").partition(".")[0]
    return name if name in LIBRARIES else None


def _call(frame: FrameType, texts: dict[int, tuple[Any, str]]) -> str:
    """The call that a frame has just begun."""
    arguments = inspect.getargvalues(frame)
    values = {name: _value(arguments.locals[name], texts) for name in arguments.args}
    code = frame.f_code
    only_named = code.co_varnames[code.co_argcount : code.co_argcount + code.co_kwonlyargcount]
    values |= {name: _value(arguments.locals[name], texts) for name in only_named}
    several = arguments.locals[arguments.varargs] if arguments.varargs else ()
    more = arguments.locals[arguments.keywords] if arguments.keywords else {}
    written = [_value(value, texts) for value in several]
    written += [text if text == name else f"{name}={text}" for name, text in values.items()]
    written += [f"{name}={_value(value, texts)}" for name, value in more.items()]
    return f"{_name(frame)}({', '.join(written)})"


def _name(frame: FrameType) -> str:
    """The function as a user calls it."""
    library, *inner = frame.f_globals["__name__"].split(".")
    name = frame.f_code.co_name
    if inner and not hasattr(importlib.import_module(library), name):
        return f"{library}.{inner[0]}.{name}"
    return f"{library}.{name}"


def _value(value: Any, texts: dict[int, tuple[Any, str]]) -> str:
    if id(value) in texts:
        return texts[id(value)][1]
    if callable(value) and hasattr(value, "__name__"):
        return value.__name__
    return f"{value:.6g}" if isinstance(value, float) else repr(value)
