"""What the command lines of the experiments share: one-line errors, and their exit codes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from experiments.parts import UserError


class Parser(argparse.ArgumentParser):
    """A parser whose errors are a `UserError`, and whose help shows the defaults."""

    def __init__(self, prog: str, description: str):
        super().__init__(
            prog=prog,
            description=description,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def positive(text: str) -> int:
    """A positive whole number, as the type of an argument."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return int(text)


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
