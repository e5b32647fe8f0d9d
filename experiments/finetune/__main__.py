"""Which adapter reaches full fine-tuning's loss, in how many steps, and what does it forget?

    python -m experiments.finetune
    python -m experiments.finetune --methods lora-ga,pissa --rank 8 --seeds 5
    python -m experiments.finetune --text my.txt --size 1M --budget 1000

Pre-trains a small language model on the documentation of Python and fine-tunes it on the source
of its standard library, by all weights and by adapters with equally many parameters.
`experiments/README.md` says what is measured. Interrupt it at any time; the same command goes on
with what is missing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.harness import UserError
from experiments.harness.command_line import Call, Parser, check_steps, loading, positive, run

DEFAULT = (
    "full", "lora", "lora-ga", "lora-ga-1024", "lora-plus", "pissa", "olora", "corda", "bone",
)  # fmt: skip


def parser() -> Parser:
    """The command line."""
    p = Parser("finetune", "Fine-tune a small language model by all weights and by adapters.")
    p.add_names("--methods", DEFAULT, "full and lora are")
    p.add_argument("--rank", type=positive, default=4, help="of LoRA; the others train as much")
    p.add_model(text="UTF-8 text to fine-tune on (the standard library's source)")
    p.add_study(seeds=3, budget=300)
    p.add_pretraining(1500)
    p.add_argument(
        "--memory-size",
        default="30M",
        metavar="SIZE",
        help="size that memory is reported for, compiled and not run; none for no report",
    )
    p.add_out(Path("results") / "finetune")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiment; returns the exit code."""
    return run(parser(), argv, _finetune, _list)


def _finetune(options: argparse.Namespace, call: Call) -> None:
    loading(call.script)
    import jax

    from experiments.finetune.methods import contenders, trainable
    from experiments.finetune.study import FineTuneStudy
    from experiments.finetune.summary import report
    from experiments.harness.experiment import Experiment
    from experiments.workloads.language_model import SIZES, read_text
    from experiments.workloads.texts import standard_library, workloads

    check_steps("--budget", options.budget)
    check_steps("--pretrain-budget", options.pretrain_budget)
    if options.memory_size not in (*SIZES, "none"):
        raise UserError(
            f"--memory-size {options.memory_size}: unknown; expected none or one of "
            f"{', '.join(SIZES)}"
        )
    before = read_text(options.pretrain_text, "--pretrain-text")
    text = standard_library() if options.text is None else read_text(options.text)
    texts = {f"--pretrain-text {options.pretrain_text}": before, f"--text {options.text}": text}
    first, new = workloads(options.size, texts, options.batch_size).values()
    found = contenders(options.methods, new)
    weights = jax.eval_shape(new.init, jax.random.key(0))
    trained = {c.name: trainable(c.name, options.rank, weights) for c in found}
    settings = {
        **new.identity,
        "pretrain_text_sha256": first.identity["text_sha256"],
        "pretrain_characters": first.identity["characters"],
        "pretrain_steps": options.pretrain_budget,
        "steps": options.budget,
        "rank": options.rank,
    }
    experiment = Experiment(call, options.out, settings, width=120)
    study = FineTuneStudy(
        first, new, found, experiment.store, pretrain_steps=options.pretrain_budget,
        steps=options.budget, rank=options.rank, rates=options.rates, seeds=options.seeds,
    )  # fmt: skip
    after = f" after {options.pretrain_budget} of pre-training"
    with experiment.progress(study.announcement("methods", after), study.total_steps) as progress:
        runs = study.run(progress)
        small = study.small_rates(progress)
        timing = study.time(progress)
        memory = study.memory(options.memory_size, progress)
    experiment.publish(report(study, runs, small, timing, trained, memory))


def _list() -> None:
    from experiments.finetune.methods import METHODS
    from experiments.workloads.language_model import SIZES

    print("methods (centre of the grid, relative to the size's rate for pre-training):")
    for name, found in METHODS.items():
        print(f"  {name:10} {found.rate:<6.2g} {found.text}")
    print("  lora-ga-GAMMA      lora-ga at another gamma")
    print("sizes of the language model: " + ", ".join(SIZES))


if __name__ == "__main__":
    sys.exit(main())
