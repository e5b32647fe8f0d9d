"""The list of checks: a name, a group, a promise in one line, and a function of a `Subject`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from jaxopt_lab.testing._subject import Subject


Level = Literal["must", "library"]
LEVELS: tuple[Level, ...] = ("must", "library")


class BreachError(AssertionError):
    """A promise is broken; the text says what was found and what was promised."""


class NotApplicableError(Exception):
    """A check cannot be run on this subject or machine; the text says why."""


@dataclasses.dataclass(frozen=True)
class Check:
    """One promise of the contract.

    Attributes:
      name: what `checks=` and `exceptions=` call it.
      group: the theme under which a report lists it.
      promise: one line that says what a transformation keeps.
      run: raises if the promise is broken or the check does not apply.
      level: `must` if optax's own transformations keep it by and large and its wrappers, JAX's
        transformations or Flax rely on it; `library` if it is a promise of this library.
      traced: whether a transformation that cannot be traced breaks it in any case.
    """

    name: str
    group: str
    promise: str
    run: Callable[[Subject], None] = dataclasses.field(repr=False)
    level: Level = "must"
    traced: bool = True


GROUPS = (
    "trees",
    "dtypes",
    "numerics",
    "composition",
    "transformations",
    "devices",
    "settings",
    "flax",
    "refusals",
)

CHECKS: dict[str, Check] = {}


def check(
    group: str,
    *,
    name: str | None = None,
    promise: str | None = None,
    level: Level = "must",
    traced: bool = True,
) -> Callable[[Callable[[Subject], None]], Callable[[Subject], None]]:
    """Adds a function to the contract under its own name and the first line of its docstring."""

    def add(run: Callable[[Subject], None]) -> Callable[[Subject], None]:
        key = name or run.__name__
        line = promise or (run.__doc__ or "").strip().splitlines()[0].rstrip(".")
        if key in CHECKS or group not in GROUPS:
            raise ValueError(f"check {key!r} is registered twice, or its group {group!r} is new")
        CHECKS[key] = Check(key, group, line, run, level, traced)
        return run

    return add
