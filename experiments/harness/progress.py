"""A progress bar with the remaining time, and one printed line per finished piece of work."""

from __future__ import annotations

import time
from types import TracebackType

import rich.progress
from rich.console import Console


class Progress:
    """Progress in training steps; a context manager.

    On a terminal a bar is drawn below the printed lines. Elsewhere only the lines appear, each with
    the share that is done and the remaining time.

    Args:
      total: steps of all the work.
      console: where to print.
    """

    def __init__(self, total: int, console: Console):
        self._console = console
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.TaskProgressColumn(),
            rich.progress.TextColumn("{task.completed:.0f}/{task.total:.0f} steps"),
            rich.progress.TextColumn("{task.fields[remaining]} left"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total, remaining="?")
        self._total, self._done, self._worked, self._began = total, 0, 0, time.monotonic()

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def note(self, what: str) -> None:
        """Says what is being done."""
        self._bar.update(self._task, description=what)

    def advance(self, steps: int, what: str) -> None:
        """Counts `steps` as just done."""
        self._worked += steps
        self._count(steps)
        self.note(what)

    def skip(self, steps: int) -> None:
        """Counts `steps` as not needed: they say nothing about the speed."""
        self._count(steps)

    def found_again(self, found: int, total: int, what: str) -> None:
        """Says how much of the work is there already, if any of it is."""
        if found:
            self.line(f"found again: {found} of {total} {what}")

    def line(self, text: str) -> None:
        """Prints a line that stays."""
        self._console.print(f"[{self._done / self._total:4.0%}, {self._remaining()} left] {text}",
                            highlight=False, markup=False, soft_wrap=True)  # fmt: skip

    def _count(self, steps: int) -> None:
        self._done += steps
        self._bar.update(self._task, advance=steps, remaining=self._remaining())

    def _remaining(self) -> str:
        if not self._worked:
            return "?"
        speed = self._worked / (time.monotonic() - self._began)
        seconds = round((self._total - self._done) / speed)
        return f"{seconds // 60}:{seconds % 60:02d}"
