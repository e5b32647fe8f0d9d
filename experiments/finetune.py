"""Which adapter reaches full fine-tuning's loss, in how many steps, and what does it forget?

    python -m experiments.finetune
    python -m experiments.finetune --methods lora-ga,pissa --rank 8 --seeds 5
    python -m experiments.finetune --text my.txt --size 1M --budget 1000

Pre-trains a small language model on the documentation of Python and fine-tunes it on the source
of its standard library, by all weights and by adapters with equally many parameters. `README.md`
beside this file says what is measured. Interrupt it at any time; the same command goes on with what
is missing.
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

    from experiments.parts.finetuning_study import FineTuneStudy
    from experiments.parts.study import Run

STEPS = 300
PRETRAIN_STEPS = 1500
DEFAULT = (
    "full", "lora", "lora-ga", "lora-ga-1024", "lora-plus", "pissa", "olora", "corda", "bone",
)  # fmt: skip
HEADER = (
    "method",
    "parameters trained",
    "state bytes",
    "best rate",
    "loss on the new text",
    "part of lora's steps",
    "steps to full's loss",
    "loss on the first text",
    "ms per step",
)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = Parser(
        prog="python -m experiments.finetune",
        description="Fine-tune a small language model by all weights and by adapters.",
    )
    p.add_argument(
        "--methods",
        metavar="A,B,...",
        help="names separated by commas (--list shows them); full and lora are always added",
    )
    p.add_argument("--list", action="store_true", help="list methods and sizes, and end")
    p.add_argument("--rank", type=positive, default=4, help="of LoRA; the others train as much")
    p.add_argument(
        "--size", default="0.15M", help="of the language model, 0.15M to 100M parameters"
    )
    p.add_argument(
        "--text", metavar="FILE", help="UTF-8 text to fine-tune on (the standard library's source)"
    )
    p.add_argument(
        "--pretrain-text",
        metavar="FILE",
        help="UTF-8 text to pre-train on (the topics of Python's documentation)",
    )
    p.add_argument("--seeds", type=positive, default=3, help="seeds at the best learning rate")
    p.add_argument("--rates", type=positive, default=3, help="learning rates in each search")
    p.add_argument(
        "--budget",
        type=positive,
        default=STEPS,
        metavar="STEPS",
        help="steps of one run, a multiple of 20",
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
        "--memory-size",
        default="30M",
        metavar="SIZE",
        help="size that memory is reported for, compiled and not run; none for no report",
    )
    p.add_argument(
        "--out",
        type=Path,
        default=Path("results") / "finetune",
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
        print("finetune: loading jax, optax and flax ...", flush=True)
        if options.list:
            _list()
        else:
            _finetune(options, arguments, began)

    return exit_code("finetune", action)


def _finetune(options: argparse.Namespace, arguments: list[str], began: float) -> None:
    import jax
    from rich.console import Console

    from experiments.parts import finetuning, finetuning_study
    from experiments.parts.environment import environment
    from experiments.parts.language_model import SIZES
    from experiments.parts.progress import Progress
    from experiments.parts.store import Store, read_json
    from experiments.parts.texts import read_text, standard_library, workloads

    out = options.out
    finetuning_study.check_budget("--budget", options.budget)
    finetuning_study.check_budget("--pretrain-budget", options.pretrain_budget)
    if options.memory_size not in (*SIZES, "none"):
        raise UserError(
            f"--memory-size {options.memory_size}: unknown; expected none or one of "
            f"{', '.join(SIZES)}"
        )
    texts = {
        f"--pretrain-text {options.pretrain_text}": read_text(
            options.pretrain_text, "--pretrain-text"
        ),
        f"--text {options.text}": standard_library()
        if options.text is None
        else read_text(options.text),
    }
    first, new = workloads(options.size, texts, options.batch_size).values()
    names = [n.strip() for n in (options.methods or ",".join(DEFAULT)).split(",")]
    found = finetuning.contenders([name for name in names if name], new)
    weights = jax.eval_shape(new.init, jax.random.key(0))
    trained = {c.name: finetuning.trainable(c.name, options.rank, weights) for c in found}
    origin = environment(arguments)
    settings = {
        **new.identity,
        "pretrain_text_sha256": first.identity["text_sha256"],
        "pretrain_characters": first.identity["characters"],
        "pretrain_steps": options.pretrain_budget,
        "steps": options.budget,
        "rank": options.rank,
        "device": origin["device"],
        **{name: origin["versions"][name] for name in ("jax", "optax", "flax")},
    }
    store = Store(out, settings)
    if (out / "results.json").exists():
        read_json(out / "results.json", "finetune")  # never overwrite what is not ours
    study = finetuning_study.FineTuneStudy(
        first, new, found, store, pretrain_steps=options.pretrain_budget, steps=options.budget,
        rank=options.rank, rates=options.rates, seeds=options.seeds,
    )  # fmt: skip
    console = Console()
    if not console.is_terminal:
        console.width = 100
    console.print(
        f"{new.name}: {settings['parameters']:,} parameters, {len(found)} methods x "
        f"({options.rates} learning rates + {options.seeds - 1} more seeds) x {options.budget} "
        f"steps after {options.pretrain_budget} of pre-training; results in {out}",
        highlight=False,
        soft_wrap=True,
    )
    with Progress(study.total_steps, console) as progress:
        runs = study.run(progress)
        small = study.small_rates(progress)
        seconds = study.time(progress)
        memory = study.memory(options.memory_size, progress)
    origin = {**origin, "settings": settings}
    _report(study, runs, small, seconds, trained, memory, origin, console)
    console.print(f"{time.monotonic() - began:.0f} s in all", highlight=False)


def _report(
    study: FineTuneStudy,
    runs: dict[str, list[Run]],
    small: dict[str, list[Run]],
    seconds: dict[str, list[float]],
    trained: dict[str, int],
    memory: dict[str, Any] | None,
    origin: dict[str, Any],
    console: Any,
) -> None:
    from experiments.parts import finetuning_summary as summary
    from experiments.parts.figures import rate_search
    from experiments.parts.report import html_page, terminal_table
    from experiments.parts.store import write_atomically, write_json

    out, unit = study.store.out, study.workload.loss_unit
    rows = summary.table(study.candidates, runs, seconds, trained, origin["settings"]["parameters"])
    every = {name: [*found, *small.get(name, [])] for name, found in runs.items()}
    same_rate = summary.equal_rates(every)
    sentences = summary.verdict(rows, same_rate, study.before)
    if memory is not None:
        sentences += summary.memory_verdict(memory)
    cells = [row_cells(row) for row in rows]
    pictures = {
        "curves.png": (
            "Validation loss on both texts at the best learning rate: mean of the seeds, their "
            "range shaded",
            summary.curves(runs, rows, study.before, unit),
        ),
        "rates.png": ("Search of the learning rate", rate_search(runs, rows, unit)),
    }
    if same_rate:
        pictures["equal_rates.png"] = (
            "LoRA and LoRA-GA at equal learning rates",
            summary.shared_rates(same_rate, unit),
        )
    grids = {c.name: c.grid(study.rates) for c in study.candidates}
    record = {**origin, "rates": study.rates, "seeds": study.seeds, "learning_rates": grids}
    results = {
        "kind": "finetune",
        **record,
        "verdict": sentences,
        "table": rows,
        "equal_rates": same_rate,
        "memory": memory,
        "pretraining": study.pretraining,
        "seconds_per_step": seconds,
        "runs": [run for found in every.values() for run in found],
    }
    title = "Fine-tuning by adapters"
    page = html_page(
        title=title,
        verdict=sentences,
        header=HEADER,
        cells=cells,
        method=method(study),
        pictures=dict(pictures.values()),
        record=record,
    )
    for name, (_, picture) in pictures.items():
        write_atomically(out / name, picture)
    write_atomically(out / "report.html", page)
    write_json(out / "results.json", results)
    console.print(terminal_table(f"{title} (loss in {unit})", HEADER, cells))
    for line in sentences:
        console.print(line, highlight=False)
    console.print(f"written: {out}/results.json, {', '.join(pictures)}, report.html",
                  highlight=False, soft_wrap=True)  # fmt: skip


def row_cells(row: dict[str, Any]) -> list[str]:
    """One row of the table as text, under `HEADER`."""
    from experiments.parts.summary import loss_text

    def number(key: str, form: str, scale: float = 1.0) -> str:
        return "-" if row[key] is None else format(row[key] * scale, form)

    return [
        row["optimizer"],
        number("trained", ",d", 1),
        number("state_bytes", ",d", 1),
        number("learning_rate", "g") + ("*" if row["learning_rate_at_edge"] else ""),
        loss_text(row),
        number("part_of_lora", ".2f"),
        number("steps_to_full", ".0f"),
        number("first_loss", ".4f"),
        number("seconds_per_step", ".2f", 1e3),
    ]


def method(study: FineTuneStudy) -> list[str]:
    """How it was done, in paragraphs."""
    from experiments.parts import finetuning

    return [
        f"The model is pre-trained with AdamW for {study.pretrain_steps} steps on the first text. "
        "Its alphabet is the characters that this text has at least ten times, and one more for "
        "all others. Every method starts from these weights, sees the same batches of the new text "
        "under the same schedule (linear warm-up over a tenth of the steps, then a cosine to a "
        "tenth of the peak) and tries the same number of learning rates, a factor of 3 apart "
        "around a centre of its own, with seed 0; the best rate is trained with the other seeds "
        "too. A seed decides the batches and what is drawn at the start. The optimizer is Adam "
        "without weight decay. The last tenth of each text is held out.",
        f"Adapters are on all kernels but those of embeddings and output layer. LoRA has rank "
        f"{study.rank}, the same for all that have factors; bone has blocks of {2 * study.rank} "
        f"rows, which are as many parameters. LoRA, LoRA-GA and LoRA+ scale by "
        f"{finetuning.ALPHA} / sqrt(r); PiSSA, OLoRA and CorDA by 1, as their authors do. LoRA-GA "
        f"takes the mean gradient of {finetuning.ESTIMATION_BATCHES} batches of the new text at "
        f"gamma {finetuning.GAMMA}, CorDA the moments of as many. That is not counted as steps. "
        f"LoRA+ trains lora_b {finetuning.RATIO} times as fast.",
        "Part of lora's steps: where the mean curve of the seeds, interpolated between its 20 "
        "evaluations, is first at LoRA's mean final loss, as a part of a run; a dash says never. "
        "Steps to full's loss likewise.",
        "LoRA and LoRA-GA are also trained at equal small rates with seed 0; the table leaves them "
        "out and the last picture shows them.",
    ]


def _list() -> None:
    from experiments.parts.finetuning import METHODS
    from experiments.parts.language_model import SIZES

    print("methods (centre of the grid, relative to the size's rate for pre-training):")
    for name, found in METHODS.items():
        print(f"  {name:10} {found.rate:<6.2g} {found.text}")
    print("  lora-ga-GAMMA      lora-ga at another gamma")
    print("sizes of the language model: " + ", ".join(SIZES))


if __name__ == "__main__":
    sys.exit(main())
