"""The workload that the command line asks for."""

from __future__ import annotations

import argparse

from experiments.harness import UserError
from experiments.harness.workload import Workload
from experiments.workloads.digits import digits
from experiments.workloads.language_model import language_model
from experiments.workloads.own import own_workload


def chosen(options: argparse.Namespace) -> Workload:
    """That of `Parser.add_workload`'s options."""
    if options.workload_from is not None:
        for name in ("workload", "size", "text", "batch_size"):
            if getattr(options, name) is not None:
                option = f"--{name.replace('_', '-')}"
                raise UserError(f"{option} cannot be chosen beside --workload-from")
        return own_workload(options.workload_from)
    if options.workload == "digits":
        for name in ("size", "text"):
            if getattr(options, name) is not None:
                raise UserError(f"--{name} is for the language model, not for digits")
        return digits(options.batch_size)
    return language_model(options.size or "0.15M", options.text, options.batch_size)
