"""The experiments with a model that compiles fast, on short texts; the process tests start it."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from experiments.harness import timing
from experiments.workloads.language_model import SIZES, Size

SIZES["tiny"] = Size(1, 16, 2, 16, 16, 6e-3)

FIRST = "The quick brown fox jumps over the lazy dog; nothing else happens.\n" * 120
SECOND = "".join(
    f"def f{i}(x): return x + {i}  # \N{GREEK SMALL LETTER ALPHA}\n" for i in range(400)
)
THIRD = "".join(f"{i * 37 % 1000:04d} {i * 11 % 97:02d} | " for i in range(1000))
# Of equal length, so that what is compiled for one serves the others.
TEXTS = {"first": FIRST[:8000], "second": SECOND[:8000], "third": THIRD[:8000]}


class Script(NamedTuple):
    """An experiment with settings that end soon.

    Attributes:
      name: of the script.
      options: its tiny settings; {first}, {second} and {third} are the paths of the texts.
      pictures: that it writes.
      lost: pattern of a kept run, and the rates and seeds that are trained again without it.
      methods: option that names the contenders, and one that is unknown.
    """

    name: str
    options: str
    pictures: Sequence[str]
    lost: tuple[str, list[tuple[float, int]]] | None
    methods: tuple[str, str]

    @property
    def main(self) -> Callable[[Sequence[str]], int]:
        return importlib.import_module(f"experiments.{self.name}.__main__").main

    def run(self, out: Path, *more: str) -> int:
        """Runs the command; the texts are in the folder above `out` or above that."""
        texts = next(folder for folder in out.parents if (folder / "first.txt").exists())
        paths = {name: texts / f"{name}.txt" for name in TEXTS}
        return self.main([*self.options.format(**paths).split(), f"--out={out}", *more])

    def refused(self, out: Path, capsys: pytest.CaptureFixture, *options: str) -> str:
        """The one line that is said of wrong options, before anything is written."""
        assert self.run(out, *options) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"{self.name}: error: ")
        assert error.count("\n") == 1
        assert not (out / "runs").exists()
        return error


STUDY = "--size tiny --budget 20 --rates 1 --seeds 2"
SCRIPTS = {
    script.name: script
    for script in (
        Script(
            "compare",
            f"{STUDY} --rates 2 --optimizers adamw,lion --batch-size 2 --text={{first}}",
            ("curves.png", "rates.png"),
            ("lion*seed1.json", [(0.00346, 1)]),
            ("--optimizers", "adamz"),
        ),
        Script(
            "memory",
            f"{STUDY} --contenders galore-0.25 --batch-size 2 --text={{first}}",
            ("budget.png", "curves.png", "rates.png"),
            ("galore*seed1.json", [(0.018, 1)]),
            ("--contenders", "adamz"),
        ),
        Script(
            "low_communication",
            f"{STUDY} --methods diloco --replicas 2 --sync-every 5 --text={{first}}",
            ("bytes.png", "rates.png"),
            ("diloco*seed1.json", [(0.006, 1)]),
            ("--methods", "dilocos"),
        ),
        Script(
            "finetune",
            f"{STUDY} --methods lora-ga --pretrain-budget 20 --memory-size none "
            "--text={second} --pretrain-text={first}",
            ("curves.png", "rates.png", "equal_rates.png"),
            ("lora-ga*seed1.json", [(0.002, 1)]),
            ("--methods", "lora-gas"),
        ),
        Script(
            "merge_models",
            "--size tiny --budget 20 --seeds 1 --pretrain-budget 20 "
            "--text={second} --text={third} --pretrain-text={first}",
            ("merged.png",),
            None,
            ("--method", "lorra"),
        ),
    )
}


def results(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())


def write_texts(folder: Path) -> None:
    for name, text in TEXTS.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    timing.ROUNDS = (1, 1)
    if os.environ.get("KILLED_PROCESS") == os.environ["EXPERIMENT_PROCESS"].split()[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(SCRIPTS["low_communication"].main(sys.argv[1:]))
