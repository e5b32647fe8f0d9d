"""What the experiments share: command line, candidates, training loop, store of results, report."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in the input that the script reports as one line, with exit code 2."""


def one_line(error: BaseException) -> str:
    """The first line of the error's message."""
    return (str(error).splitlines() or [""])[0]


EVALUATIONS = 20
"""The validation loss is measured this many times in a run, at equal distances."""
