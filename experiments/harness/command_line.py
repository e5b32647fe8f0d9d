"""What the command lines of the experiments share: options, one-line errors, exit codes."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from experiments.harness import EVALUATIONS, UserError

TOPICS = "the topics of Python's documentation"
SIZES = "0.15M, 1M, 10M, 30M or 100M parameters"


class Call(NamedTuple):
    """How an experiment was started."""

    script: str
    arguments: list[str]
    began: float  # of time.monotonic()


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default, unless it says nothing."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, []):
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are a `UserError`, and whose help shows the defaults."""

    def __init__(self, script: str, description: str):
        super().__init__(
            prog=f"python -m experiments.{script}", description=description, formatter_class=_Help
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def add_names(self, option: str, default: Sequence[str], always: str) -> None:
        """The contenders, and `--list`, which shows what there is."""
        self.add_argument(
            option,
            type=names,
            default=",".join(default),
            metavar="A,B,...",
            help=f"names separated by commas; {always} always added",
        )
        self.add_argument("--list", action="store_true", help="list names and sizes, and end")

    def add_model(
        self,
        text: str | None = f"UTF-8 text ({TOPICS})",
        batch_size: bool = True,
        size: str | None = "0.15M",
    ) -> None:
        """The language model, its text and its batches, as far as they are chosen."""
        self.add_argument("--size", default=size, help=f"of the language model: {SIZES}")
        if text is not None:
            self.add_argument("--text", metavar="FILE", help=text)
        if batch_size:
            self.add_argument("--batch-size", type=positive, help="examples per step (by size)")

    def add_workload(self) -> None:
        """A choice of workloads; `workloads.choice.chosen` reads it."""
        self.add_argument(
            "--workload", choices=("language_model", "digits"), help="what is trained (the former)"
        )
        self.add_argument(
            "--workload-from",
            metavar="MODULE:FUNCTION",
            help="your own: function() -> experiments.harness.workload.Workload",
        )
        self.add_model(size=None)

    def add_study(self, *, seeds: int, budget: int | None, rates: int | None = 3) -> None:
        """How much is trained: seeds, rates and steps."""
        self.add_argument("--seeds", type=positive, default=seeds, help="seeds at the best rate")
        if rates is not None:
            self.add_argument(
                "--rates", type=positive, default=rates, help="learning rates in each search"
            )
        self.add_argument(
            "--budget",
            type=positive,
            default=budget,
            metavar="STEPS",
            help=f"steps of one run, a multiple of {EVALUATIONS}",
        )

    def add_pretraining(self, budget: int) -> None:
        """What is trained before."""
        self.add_argument(
            "--pretrain-text",
            metavar="FILE",
            help=f"UTF-8 text to pre-train on ({TOPICS})",
        )
        self.add_argument(
            "--pretrain-budget",
            type=positive,
            default=budget,
            metavar="STEPS",
            help=f"steps of the pre-training, a multiple of {EVALUATIONS}",
        )

    def add_out(self, out: Path | None, help: str = "where results are kept") -> None:
        self.add_argument("--out", type=Path, default=out, metavar="DIR", help=help)


def positive(text: str) -> int:
    """A positive whole number, as the type of an argument."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return int(text)


def names(text: str) -> list[str]:
    """Names separated by commas, as the type of an argument."""
    found = [name.strip() for name in text.split(",")]
    if "" in found:
        raise argparse.ArgumentTypeError(f"{text!r}: a name is empty; expected A,B,...")
    for name in found:
        if found.count(name) > 1:
            raise argparse.ArgumentTypeError(f"{text!r}: {name} occurs twice")
    return found


def check_steps(option: str, steps: int) -> None:
    """Refuses a number of steps that the evaluations do not divide."""
    if steps % EVALUATIONS:
        raise UserError(
            f"{option} {steps}: expected a multiple of {EVALUATIONS}, the number of evaluations"
        )


def run(
    parser: Parser,
    argv: Sequence[str] | None,
    action: Callable[[argparse.Namespace, Call], None],
    listing: Callable[[], None] | None = None,
) -> int:
    """Reads the command line and runs `action`, or `listing` after `--list`; the exit code."""
    script = parser.prog.rpartition(".")[2]
    arguments = list(sys.argv[1:] if argv is None else argv)

    def started() -> None:
        began = time.monotonic()
        options = parser.parse_args(arguments)
        if listing is not None and options.list:
            listing()
        else:
            action(options, Call(script, arguments, began))

    return exit_code(script, started)


def exit_code(script: str, action: Callable[[], None]) -> int:
    """Runs `action`; returns 0, 2 after a mistake in the input, or 130 when interrupted."""
    try:
        action()
    except UserError as error:
        print(f"{script}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            f"\n{script}: interrupted; finished runs are kept, the same command goes on from here",
            file=sys.stderr,
        )
        return 130
    return 0


def loading(script: str) -> None:
    """Says what takes seconds on a cold disk, so that nobody wonders."""
    print(f"{script}: loading jax, optax and flax ...", flush=True)
