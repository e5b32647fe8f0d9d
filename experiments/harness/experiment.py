"""One execution of an experiment: its folder, its console, and what it publishes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.harness.command_line import Call
from experiments.harness.environment import environment
from experiments.harness.progress import Progress
from experiments.harness.report import Report, html, terminal_table
from experiments.harness.store import Store, read_json, write_atomically, write_json

VERSIONS = ("jax", "optax", "flax")


class Experiment:
    """The frame of an execution: what was asked for, where results are kept, how they are shown.

    Args:
      call: how it was started; the script's name is the kind of its results.
      out: the folder of the results.
      settings: what decides a result; device and versions are added.
      width: of the tables where there is no terminal.
      follows: whether another process writes and prints, and this one only computes.
    """

    def __init__(
        self,
        call: Call,
        out: Path,
        settings: Mapping[str, Any],
        *,
        width: int = 100,
        follows: bool = False,
    ):
        self.call, self.out = call, out
        origin = environment(call.arguments)
        versions = {name: origin["versions"][name] for name in VERSIONS}
        self.settings = {**settings, "device": origin["device"], **versions}
        self.origin = {**origin, "settings": self.settings}
        self.store = Store(out, self.settings, follows=follows)
        if (out / "results.json").exists():
            read_json(out / "results.json", call.script)  # never overwrite what is not ours
        self.console = Console(quiet=follows)
        if not self.console.is_terminal:
            self.console.width = width

    def say(self, text: str) -> None:
        """Prints a line, however long."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def progress(self, what: str, steps: int) -> Progress:
        """Announces the work of so many steps; a context manager."""
        self.say(f"{what}; results in {self.out}")
        return Progress(steps, self.console)

    def publish(self, report: Report) -> None:
        """Writes pictures, page and results, and prints table and sentences."""
        record = {**self.origin, **report.record}
        for name, picture in report.pictures.items():
            write_atomically(self.out / name, picture)
        write_atomically(self.out / "report.html", html(report.page(record)))
        results = {"kind": self.call.script, **record, "verdict": report.verdict}
        write_json(self.out / "results.json", {**results, **report.results})
        title = f"{report.title} (loss in {report.unit})"
        self.console.print(terminal_table(title, report.header, report.cells))
        for line in report.verdict:
            self.console.print(line, highlight=False)
        files = ", ".join(["results.json", *report.pictures, "report.html"])
        self.say(f"written: {self.out}/{files}")
        self.say(f"{time.monotonic() - self.call.began:.0f} s in all")
