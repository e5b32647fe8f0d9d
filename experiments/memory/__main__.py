"""What does each byte of optimizer state buy?

    python -m experiments.memory
    python -m experiments.memory --contenders adamw,frugal-0.5,galore-0.5 --seeds 5
    python -m experiments.memory --text my.txt --size 10M --budget 2000

Trains a small language model with budgets of optimizer state from none to AdamW's: a learning-rate
search under an equal budget, then several seeds at the best rate. `experiments/README.md` says what
is measured. Interrupt it at any time; the same command goes on with the runs that are missing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.harness.command_line import Call, Parser, check_steps, loading, run

DEFAULT = (
    "adamw", "adamw-int8", "adamw-bf16", "frugal-0.25", "frugal-0.125", "frugal-0",
    "galore-0.25", "dct-0.25", "badam", "lion", "sgd",
)  # fmt: skip


def parser() -> Parser:
    """The command line."""
    p = Parser("memory", "Train a language model under several budgets of optimizer state.")
    p.add_names("--contenders", DEFAULT, "adamw is")
    p.add_model()
    p.add_study(seeds=3, budget=300)
    p.add_out(Path("results") / "memory")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiment; returns the exit code."""
    return run(parser(), argv, _memory, _list)


def _memory(options: argparse.Namespace, call: Call) -> None:
    loading(call.script)
    from experiments.harness.candidates import WEIGHT_DECAY
    from experiments.harness.experiment import Experiment
    from experiments.harness.study import Study
    from experiments.memory.methods import Shape, contenders
    from experiments.memory.summary import report
    from experiments.workloads.language_model import SIZES, language_model

    steps = options.budget
    check_steps("--budget", steps)
    workload = language_model(options.size, options.text, options.batch_size)
    shape = Shape(steps, SIZES[options.size].width)
    found = contenders(options.contenders, workload, shape)
    settings = {**workload.identity, "steps": steps, "weight_decay": WEIGHT_DECAY}
    experiment = Experiment(call, options.out, settings, width=120)
    study = Study(
        workload, found, experiment.store, steps=steps, rates=options.rates, seeds=options.seeds
    )
    with experiment.progress(study.announcement("contenders"), study.total_steps) as progress:
        runs, timing = study.run(progress), study.time(progress)
    experiment.publish(report(study, shape, runs, timing))


def _list() -> None:
    from experiments.memory.methods import METHODS, names
    from experiments.workloads.language_model import SIZES

    print("contenders (centre of the grid, relative to adamw's):")
    for name, budget in zip(names(), METHODS.values(), strict=True):
        print(f"  {name:18} {budget.rate_factor:<8.3g} {budget.reason}")
    print("sizes of the language model: " + ", ".join(SIZES))


if __name__ == "__main__":
    sys.exit(main())
