"""`help()` of a public name says what it takes, holds and does, and points nowhere else."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.test_docs import PUBLIC

# A description that says nothing but where another one is.
POINTER = re.compile(r"(?i)(see|as( for| in| of)?|likewise|the same( as)?)\b.{0,60}")


def every() -> Iterator[tuple[str, Any]]:
    seen = set()
    for module in map(importlib.import_module, PUBLIC):
        for name in module.__all__:
            value = getattr(module, name)
            if id(value) not in seen:
                seen.add(id(value))
                yield f"{module.__name__}.{name}", value


def public() -> Iterator[tuple[str, Callable[..., Any]]]:
    for name, value in every():
        if callable(value) and not getattr(value, "_is_protocol", False):
            yield name, value


def members() -> Iterator[tuple[str, Callable[..., Any], str]]:
    """Public methods and properties of public classes, with what describes them beside themselves.

    That is their class, of which bases may be private, and the protocols that have them.
    """
    protocols = [value for _, value in every() if getattr(value, "_is_protocol", False)]
    packages = {name.split(".")[0] for name in PUBLIC}
    for place, value in every():
        if not isinstance(value, type):
            continue
        for base in value.__mro__:
            if base.__module__.split(".")[0] not in packages:
                continue
            for name, member in vars(base).items():
                function = getattr(member, "fget", getattr(member, "__func__", member))
                if inspect.isfunction(function) and not name.startswith("_"):
                    shared = (base, *(p for p in protocols if hasattr(p, name)))
                    yield f"{place}.{name}", function, "\n".join(x.__doc__ or "" for x in shared)


def described(docstring: str) -> dict[str, str]:
    """Returns what the sections of arguments and attributes say, by name."""
    found = {}
    text = inspect.cleandoc(docstring)
    for section in re.findall(r"(?ms)^(?:Args|Attributes):\n(.*?)(?=^\S|\Z)", text):
        for names, what in re.findall(r"(?ms)^  (\*{0,2}\w[\w, ]*?):(.*?)(?=^  \S|\Z)", section):
            found |= dict.fromkeys(names.split(", "), " ".join(what.split()))
    return {name.lstrip("*"): what for name, what in found.items()}


def parameters(value: Callable[..., Any]) -> list[str]:
    try:
        return list(inspect.signature(value).parameters)
    except ValueError:  # a type such as a Callable has none
        return []


@pytest.mark.parametrize(("name", "value"), [pytest.param(n, v, id=n) for n, v in public()])
def test_every_argument_is_described(name, value):
    texts = described(value.__doc__ or "")
    for parameter in parameters(value):
        assert parameter in texts, f"{name}: {parameter} is not described"
        assert not POINTER.fullmatch(texts[parameter]), f"{name}: {parameter}: {texts[parameter]}"


def is_named(parameter: str, docstring: str) -> bool:
    return parameter in described(docstring) or bool(
        re.search(rf"`\*{{0,2}}{parameter}\b", docstring)
    )


def test_every_method_says_what_it_does_and_names_what_it_is_given():
    silent = []
    for name, function, shared in members():
        own = inspect.getdoc(function) or ""
        silent += [] if own else [name]
        for parameter in parameters(function):
            if parameter not in ("self", "cls") and not is_named(parameter, f"{own}\n{shared}"):
                silent.append(f"{name}: {parameter}")
    assert not silent


def test_every_field_is_described():
    """Those of protocols too, which nobody calls."""
    for name, value in every():
        if isinstance(value, type):
            texts = described(value.__doc__ or "")
            fields = [*getattr(value, "__annotations__", {})]
            assert [f for f in fields if not f.startswith("_") and f not in texts] == [], name


def test_a_pointer_is_told_from_a_description():
    texts = described(
        """F.

        Args:
          a: see `G`.
          b, c: as for `G`.
          d: as many as the matrix has rows, which
            are no more than its columns are, or one for all.
        """
    )
    assert list(texts) == ["a", "b", "c", "d"]
    assert [bool(POINTER.fullmatch(text)) for text in texts.values()] == [True, True, True, False]
