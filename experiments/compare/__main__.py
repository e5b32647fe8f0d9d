"""Which optimizer reaches the target loss first, and at what cost?

    python -m experiments.compare
    python -m experiments.compare --workload digits --seeds 5
    python -m experiments.compare --optimizers adamw,lion --optimizer-from my_module:my_optimizer
    python -m experiments.compare --workload-from my_module:my_workload

Trains a small model on real data with every optimizer: a learning-rate search under an equal
budget, then several seeds at the best rate. `experiments/README.md` says what is measured.
Interrupt it at any time; the same command goes on with the runs that are missing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.harness.command_line import Call, Parser, check_steps, loading, run

DEFAULT = ("adamw", "lion", "adabelief", "adamp", "muon")


def parser() -> Parser:
    """The command line."""
    p = Parser("compare", "Train a model with several optimizers: which reaches the target first?")
    p.add_names("--optimizers", DEFAULT, "adamw is")
    p.add_argument(
        "--optimizer-from",
        action="append",
        default=[],
        metavar="MODULE:FUNCTION",
        help="your own: function(learning_rate) -> optax.GradientTransformation, where "
        "learning_rate is an optax schedule; repeatable",
    )
    p.add_workload()
    p.add_study(seeds=2, budget=None)
    p.add_argument(
        "--target",
        type=float,
        metavar="LOSS",
        help="target loss (adamw's own after 90%% of its budget)",
    )
    p.add_out(None, "where results are kept (results/compare-WORKLOAD)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiment; returns the exit code."""
    return run(parser(), argv, _compare, _list)


def _compare(options: argparse.Namespace, call: Call) -> None:
    loading(call.script)
    from experiments.compare.methods import contenders
    from experiments.compare.summary import report
    from experiments.harness.candidates import WEIGHT_DECAY
    from experiments.harness.experiment import Experiment
    from experiments.harness.study import Study
    from experiments.workloads.choice import chosen

    workload = chosen(options)
    steps = options.budget or workload.steps
    check_steps("--budget", steps)
    found = contenders(options.optimizers, options.optimizer_from, workload)
    settings = {**workload.identity, "steps": steps, "weight_decay": WEIGHT_DECAY}
    out = options.out or Path("results") / f"compare-{workload.name}"
    experiment = Experiment(call, out, settings, width=120)
    study = Study(
        workload, found, experiment.store, steps=steps, rates=options.rates, seeds=options.seeds
    )
    with experiment.progress(study.announcement("optimizers"), study.total_steps) as progress:
        runs, timing = study.run(progress), study.time(progress)
    experiment.publish(report(study, runs, timing, options.target))


def _list() -> None:
    from experiments.compare.methods import METHODS
    from experiments.workloads.language_model import SIZES

    print("optimizers (centre of the grid, relative to adamw's):")
    for name, known in METHODS.items():
        print(f"  {name:10} {known.rate_factor:<8.3g} {known.reason}")
    print("sizes of the language model (adamw's centre):")
    for name, size in SIZES.items():
        print(f"  {name:6} {size.layers} layers, width {size.width}, context {size.context}, "
              f"batch {size.batch_size}, learning rate {size.learning_rate:g}")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
