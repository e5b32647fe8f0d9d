"""`help()` of a public name describes each of its arguments there, and points nowhere else."""

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


# Other named tuples are made by functions, and their fields commented where they stand.
RECORDS = ("ChunkedConfig", "Exchange")


def is_called_by_users(value: Any) -> bool:
    record = isinstance(value, type) and issubclass(value, tuple)
    protocol = getattr(value, "_is_protocol", False)
    return callable(value) and not protocol and (not record or value.__name__ in RECORDS)


def public() -> Iterator[tuple[str, Callable[..., Any]]]:
    seen = set()
    for module in map(importlib.import_module, PUBLIC):
        for name in module.__all__:
            value = getattr(module, name)
            if id(value) not in seen and is_called_by_users(value):
                seen.add(id(value))
                yield f"{module.__name__}.{name}", value


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
