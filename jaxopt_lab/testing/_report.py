"""What a run of the contract found, and how it reads."""

from __future__ import annotations

import collections
import dataclasses
import textwrap
from typing import Literal

from jaxopt_lab.testing._registry import Level

Status = Literal["passed", "failed", "excepted", "not run"]

_MARKS: dict[Status, str] = {
    "passed": "ok",
    "failed": "FAILED",
    "excepted": "excepted",
    "not run": "not run",
}


@dataclasses.dataclass(frozen=True)
class Result:
    """The outcome of one check.

    Attributes:
      name: name of the check.
      group: its theme.
      promise: what is promised, in one line.
      status: `passed`, `failed`, `excepted` (declared, and indeed not kept) or `not run`.
      detail: empty if passed, else the message or the reason.
      seconds: wall-clock time.
      level: `must` or `library`, see `Check`.
      cause: equal for failures of one cause, such as one line of the user's code that raises.
    """

    name: str
    group: str
    promise: str
    status: Status
    detail: str
    seconds: float
    level: Level = "must"
    cause: str = ""


@dataclasses.dataclass(frozen=True)
class Report:
    """The outcomes of all checks for one transformation; `str(report)` is a readable table.

    Attributes:
      subject: how the transformation was made, e.g. `adamw(0.001)`.
      results: one entry per check, in the order of the contract.
    """

    subject: str
    results: tuple[Result, ...]

    @property
    def ok(self) -> bool:
        """True if no check failed."""
        return not self.failures

    @property
    def failures(self) -> tuple[Result, ...]:
        """The results with status `failed`."""
        return tuple(result for result in self.results if result.status == "failed")

    def __getitem__(self, name: str) -> Result:
        """The result of the check called `name`."""
        for result in self.results:
            if result.name == name:
                return result
        raise KeyError(name)

    @property
    def causes(self) -> dict[str, tuple[Result, ...]]:
        """The failures by what caused them, the most frequent first.

        The key is the line that the report prints, such as `the update cannot be traced:
        FILE:LINE: ...` with a place in the code of whoever wrote the transformation.
        """
        by_cause = collections.defaultdict(list)
        for result in self.failures:
            by_cause[result.cause or result.detail].append(result)
        ranked = sorted(by_cause.values(), key=lambda results: -len(results))
        return {results[0].detail: tuple(results) for results in ranked}

    def __str__(self) -> str:
        counts = collections.Counter(result.status for result in self.results)
        parts = [f"{counts['passed']} of {len(self.results)} checks passed"]
        parts += [
            f"{counts[status]} {status}"
            for status in ("failed", "excepted", "not run")
            if counts[status]
        ]
        broken = collections.Counter(result.level for result in self.failures)
        if broken:
            parts[1] += f" ({broken['must']} must, {broken['library']} of the library's own)"
        seconds = sum(result.seconds for result in self.results)
        lines = [f"Contract of {self.subject}: {', '.join(parts)} ({seconds:.1f} s)"]
        shared = {text: found for text, found in self.causes.items() if len(found) > 1}
        for text, results in shared.items():
            lines += ["", *_wrapped(f"{_MARKS['failed']}  {len(results)} checks: {text}", 2)]
            names = [result.name for result in results]
            more = [f"and {len(names) - _NAMED} more"] if len(names) > _NAMED else []
            lines += _wrapped(", ".join([*names[:_NAMED], *more]), 12)
        told = {result.name for results in shared.values() for result in results}
        listed = [result for result in self.results if result.name not in told]
        width = max((len(result.name) for result in listed), default=0)
        group = None
        for result in listed:
            if result.group != group:
                group = result.group
                lines += ["", group]
            mark, own = _MARKS[result.status], " [library]" if result.level == "library" else ""
            lines.append(f"  {mark:8}  {result.name:{width}}  {result.promise}{own}")
            if result.detail:
                lines += _wrapped(f"> {result.detail}", 12)
        return "\n".join(lines)


# Names of checks that a line for one cause lists before it only counts.
_NAMED = 12


def _wrapped(text: str, indent: int) -> list[str]:
    """Lines of some 110 characters; a path is never broken, so that an editor finds it."""
    return textwrap.wrap(
        text,
        width=110,
        initial_indent=" " * indent,
        subsequent_indent=" " * (indent + 2),
        break_on_hyphens=False,
        break_long_words=False,
    )


class ContractError(AssertionError):
    """A transformation breaks its contract.

    Args:
      report: the outcomes; the error's text, and kept as `report`.
    """

    def __init__(self, report: Report):
        super().__init__(str(report))
        self.report = report
