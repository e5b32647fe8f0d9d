"""What the experiment scripts share: workloads, training loop, store of results, report."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in the input that the script reports as one line, with exit code 2."""
