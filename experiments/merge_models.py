"""What is left of three fine-tuned models when they are merged into one?

    python -m experiments.merge_models
    python -m experiments.merge_models --packages json,asyncio,xml,logging --seeds 5
    python -m experiments.merge_models --method lora --rank 8

Pre-trains a small language model on the documentation of Python, fine-tunes it on the source of
packages of the standard library, one model each, and merges these by averaging, task arithmetic,
TIES and Breadcrumbs. `README.md` beside this file says what is measured. Interrupt it at any time;
the same command goes on with what is missing.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.parts import UserError
from experiments.parts.command_line import Parser, exit_code, positive

if TYPE_CHECKING:
    import argparse

    from experiments.parts.merging import MergeStudy

STEPS = 300
PRETRAIN_STEPS = 1500
PACKAGES = "email,asyncio,encodings"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = Parser(
        prog="python -m experiments.merge_models",
        description="Fine-tune a small language model on several texts and merge the models.",
    )
    p.add_argument(
        "--packages",
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
        "--pretrain-text",
        metavar="FILE",
        help="UTF-8 text to pre-train on (the topics of Python's documentation)",
    )
    p.add_argument(
        "--method", default="full", help="of fine-tuning, as in python -m experiments.finetune"
    )
    p.add_argument("--rank", type=positive, default=4, help="of LoRA, for methods with adapters")
    p.add_argument(
        "--size", default="0.15M", help="of the language model, 0.15M to 100M parameters"
    )
    p.add_argument("--seeds", type=positive, default=3, help="of the fine-tuning")
    p.add_argument(
        "--budget",
        type=positive,
        default=STEPS,
        metavar="STEPS",
        help="steps of fine-tuning on each text, a multiple of 20",
    )
    p.add_argument(
        "--pretrain-budget",
        type=positive,
        default=PRETRAIN_STEPS,
        metavar="STEPS",
        help="steps of the pre-training, a multiple of 20",
    )
    p.add_argument("--batch-size", type=positive, help="windows per step (by size)")
    p.add_argument(
        "--out",
        type=Path,
        default=Path("results") / "merge_models",
        metavar="DIR",
        help="where results are kept",
    )
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiment; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)

    def action() -> None:
        began = time.monotonic()
        options = parser().parse_args(arguments)
        # Importing jax and flax takes seconds on a cold disk; nobody should wonder.
        print("merge_models: loading jax, optax and flax ...", flush=True)
        _merge_models(options, arguments, began)

    return exit_code("merge_models", action)


def _texts(options: argparse.Namespace) -> dict[str, str]:
    """The texts that are fine-tuned on, by name."""
    from experiments.parts.texts import read_text, standard_library

    if options.text:
        names = [Path(path).stem for path in options.text]
        texts = {name: read_text(path) for name, path in zip(names, options.text, strict=True)}
        what = "--text"
    else:
        names = [name.strip() for name in options.packages.split(",") if name.strip()]
        for name in names:
            if not name.isidentifier():
                raise UserError(f"--packages: {name!r} is not the name of a package")
        texts = {name: standard_library(name) for name in names}
        what = "--packages"
    if len(texts) < len(names):
        raise UserError(f"{what}: a name occurs twice in {', '.join(names)}")
    if len(texts) < 2:
        raise UserError(f"{what}: expected two or more to merge, got {', '.join(names) or 'none'}")
    return texts


def _merge_models(options: argparse.Namespace, arguments: list[str], began: float) -> None:
    from rich.console import Console

    from experiments.parts.environment import environment
    from experiments.parts.finetuning_study import check_budget
    from experiments.parts.merging import MergeStudy
    from experiments.parts.optimizers import fingerprint
    from experiments.parts.progress import Progress
    from experiments.parts.store import Store, read_json
    from experiments.parts.texts import read_text, workloads
    from jaxopt_lab import adapters

    out = options.out
    check_budget("--budget", options.budget)
    check_budget("--pretrain-budget", options.pretrain_budget)
    texts = _texts(options)
    before = read_text(options.pretrain_text, "--pretrain-text")
    sources = {f"--pretrain-text {options.pretrain_text}": before, **texts}
    first, *others = workloads(options.size, sources, options.batch_size).values()
    tasks = dict(zip(texts, others, strict=True))
    origin = environment(arguments)
    code = (adapters.task_arithmetic, adapters.ties_merge, adapters.breadcrumbs_merge)
    settings = {
        **first.identity,
        "texts": {name: task.identity["text_sha256"] for name, task in tasks.items()},
        "method": options.method,
        "rank": options.rank,
        "pretrain_steps": options.pretrain_budget,
        "steps": options.budget,
        "code": fingerprint(Path(__file__).parent / "parts" / "merging.py", *code),
        "device": origin["device"],
        **{name: origin["versions"][name] for name in ("jax", "optax", "flax")},
    }

    def study(store: Any) -> MergeStudy:
        return MergeStudy(
            first, tasks, store, method=options.method, rank=options.rank,
            pretrain_steps=options.pretrain_budget, steps=options.budget, seeds=options.seeds,
        )  # fmt: skip

    study(None)  # a mistake in the options is found before anything is written
    store = Store(out, settings)
    if (out / "results.json").exists():
        read_json(out / "results.json", "merge_models")  # never overwrite what is not ours
    found = study(store)
    console = Console()
    if not console.is_terminal:
        console.width = 100
    console.print(
        f"{first.name}: {settings['parameters']:,} parameters, {options.budget} steps on each of "
        f"{', '.join(tasks)} and on all together, {options.seeds} seeds, after "
        f"{options.pretrain_budget} steps of pre-training; results in {out}",
        highlight=False,
        soft_wrap=True,
    )
    with Progress(found.total_steps, console) as progress:
        results = found.run(progress)
    _report(found, results, {**origin, "settings": settings}, console)
    console.print(f"{time.monotonic() - began:.0f} s in all", highlight=False)


def _report(
    study: MergeStudy, results: list[dict[str, Any]], origin: dict[str, Any], console: Any
) -> None:
    from experiments.parts import merging_summary as summary
    from experiments.parts.report import html_page, terminal_table
    from experiments.parts.store import write_atomically, write_json

    out, unit, tasks = study.store.out, study.first.loss_unit, list(study.tasks)
    rows = summary.table(results, tasks)
    sentences = summary.verdict(rows, tasks)
    columns, cells = header(tasks), [row_cells(row) for row in rows]
    drawn = summary.picture(results, rows, tasks, unit)
    record = {**origin, "seeds": study.seeds, "learning_rate": study.rate}
    content = {
        "kind": "merge_models",
        **record,
        "verdict": sentences,
        "table": rows,
        "results": results,
    }
    title = "Merged models"
    caption = "Mean loss by the scale of each rule, and what is left of each text's fine-tuning"
    page = html_page(title=title, verdict=sentences, header=columns, cells=cells,
                     method=method(study), pictures={caption: drawn}, record=record)  # fmt: skip
    write_atomically(out / "merged.png", drawn)
    write_atomically(out / "report.html", page)
    write_json(out / "results.json", content)
    console.print(terminal_table(f"{title} (loss in {unit})", columns, cells))
    for line in sentences:
        console.print(line, highlight=False)
    console.print(f"written: {out}/results.json, merged.png, report.html",
                  highlight=False, soft_wrap=True)  # fmt: skip


def header(tasks: Sequence[str]) -> list[str]:
    """The columns of the table."""
    return ["model", "scale", *tasks, "mean of these", "gain kept", "text of the pre-training"]


def row_cells(row: dict[str, Any]) -> list[str]:
    """One row of the table as text, under `header`."""
    from experiments.parts.merging_summary import loss_text

    *on_tasks, before = (f"{loss:.4f}" for loss in row["losses"].values())
    ends = [f"{end(row['scales']):g}" for end in (min, max)] if row["scales"] else ["-"]
    scale = " to ".join(dict.fromkeys(ends))
    return [row["model"], scale, *on_tasks, loss_text(row), f"{row['kept']:.0%}", before]


def method(study: MergeStudy) -> list[str]:
    """How it was done, in paragraphs."""
    from experiments.parts.merging import MERGES, SCALES

    rules = "; ".join(f"{name}: {text}" for name, (_, text) in MERGES.items())
    return [
        f"The model is pre-trained with AdamW for {study.pretrain_steps} steps. From its weights "
        f"one model is trained on each text for {study.steps} steps ({study.method.text}, Adam at "
        f"a rate of {study.rate:g}), and one on all texts for "
        f"{len(study.tasks)} times as many. The last tenth of each text is held out.",
        f"The average weighs all fine-tuned models alike. The other rules add to the pre-trained "
        f"weights (times the scale): {rules}. Each tries the scales "
        f"{', '.join(f'{scale:g}' for scale in SCALES)} and takes the one with the lowest mean "
        "loss on every second held-out window. All losses of the table are on the other windows.",
        "Gain kept: how far the loss on a text has come from the pre-trained model's to that of "
        "the model fine-tuned on this text alone, mean over the texts.",
    ]


if __name__ == "__main__":
    sys.exit(main())
