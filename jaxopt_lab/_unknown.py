"""What is said of a name that a module does not have: where it is, or what it may be a slip for."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence

# All of which have an `__all__`.
_ROOT = "jaxopt_lab"
FOLDERS = (
    "adapters",
    "diagnostics",
    "distributed",
    "quantization",
    "regularizers",
    "schedules",
    "subspace",
)


def error(module: str, public: Sequence[str], name: str) -> AttributeError:
    """Returns the error for `module.name`, whose names are `public`."""
    hint = _hint(module, public, name)
    return AttributeError(f"module {module!r} has no attribute {name!r}{hint}")


def _hint(module: str, public: Sequence[str], name: str) -> str:
    # Tools ask for many private names, and an import statement for each file before it imports it.
    if name.startswith("_") or importlib.util.find_spec(f"{module}.{name}"):
        return ""
    import difflib

    import optax

    for place in (_ROOT, *(f"{_ROOT}.{folder}" for folder in FOLDERS)):
        if place != module and name in importlib.import_module(place).__all__:
            return f"; it is {place}.{name}"
    own = {known.lower(): known for known in public}
    theirs = {
        known.lower(): f"{source.__name__}.{known}"
        for source in (optax.contrib, optax)
        for known in dir(source)
        if callable(getattr(source, known))
    }
    near = name.lower()
    if near not in own and near in theirs:
        return f"; that one is optax's: {theirs[near]}"
    found = difflib.get_close_matches(near, own, n=1)
    return f"; did you mean {own[found[0]]}?" if found else ""
