"""What a run of the contract found, and how it reads."""

from __future__ import annotations

import collections
import dataclasses
import textwrap
from typing import Literal

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
    """

    name: str
    group: str
    promise: str
    status: Status
    detail: str
    seconds: float


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

    def __str__(self) -> str:
        counts = collections.Counter(result.status for result in self.results)
        parts = [f"{counts['passed']} of {len(self.results)} checks passed"]
        parts += [
            f"{counts[status]} {status}"
            for status in ("failed", "excepted", "not run")
            if counts[status]
        ]
        seconds = sum(result.seconds for result in self.results)
        lines = [f"Contract of {self.subject}: {', '.join(parts)} ({seconds:.1f} s)"]
        width = max((len(result.name) for result in self.results), default=0)
        group = None
        for result in self.results:
            if result.group != group:
                group = result.group
                lines += ["", group]
            lines.append(f"  {_MARKS[result.status]:8}  {result.name:{width}}  {result.promise}")
            if result.detail:
                lines.append(
                    textwrap.fill(
                        result.detail,
                        width=110,
                        initial_indent=" " * 12 + "> ",
                        subsequent_indent=" " * 14,
                        break_on_hyphens=False,
                    )
                )
        return "\n".join(lines)


class ContractError(AssertionError):
    """A transformation breaks its contract; the text is the report, kept as `report` too."""

    def __init__(self, report: Report):
        super().__init__(str(report))
        self.report = report
