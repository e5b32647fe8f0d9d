"""The user's own functions, named on the command line as module:function."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from experiments.harness import UserError, one_line


def function_of(spec: str, option: str) -> Callable[..., Any]:
    """The function that `option` names as module:function.

    Raises:
      UserError: it is not written so, cannot be imported, or cannot be called.
    """
    said = f"{option} {spec}"
    module, colon, name = spec.partition(":")
    if not (module and colon and name.isidentifier()):
        raise UserError(f"{said}: expected module:function")
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:  # the user's module may raise anything while it is imported
        raise UserError(f"{said}: {type(error).__name__}: {one_line(error)}") from error
    if not callable(function):
        raise UserError(f"{said}: not callable: {type(function).__name__}")
    return function
