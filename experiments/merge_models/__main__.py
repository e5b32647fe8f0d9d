"""What is left of three fine-tuned models when they are merged into one?

    python -m experiments.merge_models
    python -m experiments.merge_models --packages json,asyncio,xml,logging --seeds 5
    python -m experiments.merge_models --method lora --rank 8

Pre-trains a small language model on the documentation of Python, fine-tunes it on the source of
packages of the standard library, one model each, and merges these by averaging, task arithmetic,
TIES and Breadcrumbs. `experiments/README.md` says what is measured. Interrupt it at any time; the
same command goes on with what is missing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.harness import UserError
from experiments.harness.command_line import (
    Call,
    Parser,
    check_steps,
    loading,
    names,
    positive,
    run,
)

PACKAGES = "email,asyncio,encodings"


def parser() -> Parser:
    """The command line."""
    p = Parser("merge_models", "Fine-tune a small language model on several texts; merge them.")
    p.add_argument(
        "--packages",
        type=names,
        default=PACKAGES,
        metavar="A,B,...",
        help="packages of the standard library whose source is fine-tuned on, two or more",
    )
    p.add_argument(
        "--text",
        action="append",
        default=[],
        metavar="FILE",
        help="UTF-8 text to fine-tune on, instead of packages; repeatable",
    )
    p.add_argument(
        "--method", default="full", help="of fine-tuning, as in python -m experiments.finetune"
    )
    p.add_argument("--rank", type=positive, default=4, help="of LoRA, for methods with adapters")
    p.add_model(text=None)
    p.add_study(seeds=3, budget=300, rates=None)
    p.add_pretraining(1500)
    p.add_out(Path("results") / "merge_models")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiment; returns the exit code."""
    return run(parser(), argv, _merge_models)


def _texts(options: argparse.Namespace) -> dict[str, str]:
    """The texts that are fine-tuned on, by name."""
    from experiments.workloads.language_model import read_text
    from experiments.workloads.texts import standard_library

    if options.text:
        option, named = "--text", [Path(path).stem for path in options.text]
        texts = dict(zip(named, map(read_text, options.text), strict=True))
    else:
        option, named = "--packages", options.packages
        for name in named:
            if not name.isidentifier():
                raise UserError(f"--packages: {name!r} is not the name of a package")
        texts = {name: standard_library(name) for name in named}
    if len(texts) < len(named):
        raise UserError(f"{option}: a name occurs twice in {', '.join(named)}")
    if len(texts) < 2:
        raise UserError(f"{option}: expected two or more to merge, got {', '.join(named)}")
    return texts


def _merge_models(options: argparse.Namespace, call: Call) -> None:
    loading(call.script)
    import jax

    from experiments.finetune.methods import trainable
    from experiments.harness.candidates import fingerprint
    from experiments.harness.experiment import Experiment
    from experiments.merge_models.study import MergeStudy
    from experiments.merge_models.summary import report
    from experiments.workloads.language_model import read_text
    from experiments.workloads.texts import workloads
    from jaxopt_lab import adapters

    check_steps("--budget", options.budget)
    check_steps("--pretrain-budget", options.pretrain_budget)
    texts = _texts(options)
    before = read_text(options.pretrain_text, "--pretrain-text")
    sources = {f"--pretrain-text {options.pretrain_text}": before, **texts}
    first, *others = workloads(options.size, sources, options.batch_size).values()
    tasks = dict(zip(texts, others, strict=True))
    weights = jax.eval_shape(first.init, jax.random.key(0))
    trainable(options.method, options.rank, weights)  # refuses a rank that does not fit
    code = (adapters.task_arithmetic, adapters.ties_merge, adapters.breadcrumbs_merge)
    settings = {
        **first.identity,
        "texts": {name: task.identity["text_sha256"] for name, task in tasks.items()},
        "method": options.method,
        "rank": options.rank,
        "pretrain_steps": options.pretrain_budget,
        "steps": options.budget,
        "code": fingerprint(Path(__file__).parent, *code),
    }
    experiment = Experiment(call, options.out, settings)
    study = MergeStudy(
        first, tasks, experiment.store, method=options.method, rank=options.rank,
        pretrain_steps=options.pretrain_budget, steps=options.budget, seeds=options.seeds,
    )  # fmt: skip
    with experiment.progress(study.announcement(), study.total_steps) as progress:
        results = study.run(progress)
    experiment.publish(report(study, results))


if __name__ == "__main__":
    sys.exit(main())
