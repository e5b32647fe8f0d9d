"""How many bytes must replicas send to end at the loss of synchronous training?

    python -m experiments.low_communication
    python -m experiments.low_communication --methods diloco,noloco --replicas 4 --sync-every 40
    python -m experiments.low_communication --warm-start 400
    python -m experiments.low_communication --methods diloco --processes 4

Trains a small language model on several replicas, each with its own part of the text, by methods
that send less than all gradients at every step. `experiments/README.md` says what is measured.
Interrupt it at any time; the same command goes on with the runs that are missing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.harness import UserError, processes
from experiments.harness.command_line import Call, Parser, check_steps, loading, positive, run

DEFAULT = (
    "sync", "one-bit-adam", "ef21-top1", "ef-int8", "diloco", "noloco", "co2", "gossip"
)  # fmt: skip


def parser() -> Parser:
    """The command line."""
    p = Parser("low_communication", "Train a language model on replicas that send little.")
    p.add_names("--methods", DEFAULT, "sync is")
    p.add_argument("--replicas", type=positive, default=8, help="copies of the model")
    p.add_argument(
        "--sync-every", type=positive, default=20, metavar="STEPS", help="local steps in a round"
    )
    p.add_model(batch_size=False)
    p.add_study(seeds=2, budget=200)
    p.add_argument(
        "--warm-start",
        type=_steps,
        default=0,
        metavar="STEPS",
        help="synchronous steps from whose weights every run starts, a multiple of 20",
    )
    p.add_argument(
        "--processes",
        type=positive,
        metavar="K",
        help="train in K real processes on this machine, with a CPU device for each replica "
        "(replicas simulated on one device)",
    )
    p.add_out(Path("results") / "low_communication")
    return p


def _steps(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is neither 0 nor a positive whole number")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiment; returns the exit code."""
    return run(parser(), argv, _start, _list)


def _start(options: argparse.Namespace, call: Call) -> None:
    if not processes.is_child():
        loading(call.script)
        if options.processes:
            if options.replicas % options.processes:
                raise UserError(
                    f"--processes {options.processes}: does not divide --replicas "
                    f"{options.replicas}"
                )
            devices = options.replicas // options.processes
            module = f"experiments.{call.script}"
            processes.run_processes(module, call.arguments, options.processes, devices)
            return
    processes.join_processes()
    _low_communication(options, call)


def _low_communication(options: argparse.Namespace, call: Call) -> None:
    import jax

    from experiments.harness.candidates import WEIGHT_DECAY
    from experiments.harness.experiment import Experiment
    from experiments.low_communication.methods import AXIS, Setting, contenders, shards
    from experiments.low_communication.study import ReplicaStudy
    from experiments.low_communication.summary import report
    from experiments.workloads.language_model import SIZES, language_model
    from jaxopt_lab.distributed import device_replicas, simulated_replicas

    check_steps("--budget", options.budget)
    check_steps("--warm-start", options.warm_start)
    setting = Setting(options.budget, options.replicas, options.sync_every, options.warm_start)
    # A replica has an eighth of the batch of a single model of this size.
    batch_size = max(1, SIZES[options.size].batch_size // 8) if options.size in SIZES else None
    workload = language_model(options.size, options.text, batch_size)
    found = contenders(options.methods, setting, workload)
    shards(workload, options.replicas)
    settings = {
        **workload.identity,
        **setting._asdict(),
        "processes": options.processes or 0,
        "weight_decay": WEIGHT_DECAY,
    }
    follows = jax.process_index() > 0
    experiment = Experiment(call, options.out, settings, width=140, follows=follows)
    replicas = (
        device_replicas(AXIS) if options.processes else simulated_replicas(options.replicas, AXIS)
    )
    study = ReplicaStudy(
        workload, found, experiment.store, setting=setting, replicas=replicas,
        rates=options.rates, seeds=options.seeds,
    )  # fmt: skip
    where = f"{options.processes} processes" if options.processes else "one device"
    warm = f" after {options.warm_start} synchronous ones" if options.warm_start else ""
    more = f"{warm}, {options.replicas} replicas on {where}"
    with experiment.progress(study.announcement("methods", more), study.total_steps) as progress:
        runs, timing = study.run(progress), study.time(progress)
    if not follows:
        experiment.publish(report(study, runs, timing))


def _list() -> None:
    from experiments.low_communication.methods import METHODS
    from experiments.workloads.language_model import SIZES

    print("methods:")
    for name, method in METHODS.items():
        print(f"  {name:14} {method.text}")
    print("sizes of the language model: " + ", ".join(SIZES))


if __name__ == "__main__":
    sys.exit(main())
