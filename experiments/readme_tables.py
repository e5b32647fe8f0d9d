"""Which tables do the README and the site show? Prints them, or writes them there.

`python -m experiments.readme_tables [--write]`: the methods, with the bytes measured from the
arrays of each state, and the measurements, from the files under `experiments/results`. A table
stands between `<!-- name -->` and `<!-- /name -->`, on whatever page.
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jaxopt_lab
from experiments import first_layer, product_errors, quantized_training, weight_traffic
from experiments.bench_attention import summary as bench_attention
from experiments.bench_update.methods import FUSED
from experiments.compare import summary as compare
from experiments.finetune import summary as finetune
from experiments.harness import runs, store
from experiments.low_communication import summary as low_communication
from experiments.memory import summary as memory
from experiments.merge_models import summary as merge_models

ROOT = pathlib.Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
RESULTS = ROOT / "experiments" / "results"

# By purpose: the paper of each method, and when to pick it.
METHODS = {
    "for all parameters": {
        "lion": (
            "[Chen et al. 2023](https://arxiv.org/abs/2302.06675)",
            "half of Adam's state; large batches; a rate 3 to 10 times below AdamW's",
        ),
        "adabelief": (
            "[Zhuang et al. 2020](https://arxiv.org/abs/2010.07468)",
            "drop-in for Adam; GANs and small transformers at eps 1e-16, CNNs at 1e-8",
        ),
        "adamp": (
            "[Heo et al. 2021](https://arxiv.org/abs/2006.08217)",
            "weights followed by normalisation, whose norm Adam lets grow",
        ),
        "sgdp": (
            "[Heo et al. 2021](https://arxiv.org/abs/2006.08217)",
            "the same where momentum SGD is the baseline",
        ),
        "exadam": (
            "[Adly 2024](https://arxiv.org/abs/2412.20302)",
            "steps about twice Adam's, growing with time; wants warm-up, a smaller rate and a "
            "schedule that ends at 0",
        ),
        "diffgrad": (
            "[Dubey et al. 2020](https://arxiv.org/abs/1909.11015)",
            "small convolutional nets with gradients of order one",
        ),
        "muon": (
            "[Jordan et al. 2024](https://kellerjordan.github.io/posts/muon/), "
            "[Liu et al. 2025](https://arxiv.org/abs/2502.16982)",
            "hidden matrices of transformers and CNNs; fewest steps, at the price of matrix "
            "products",
        ),
    },
    "with state for a part": {
        "frugal_adamw": (
            "[Zmushko et al. 2025](https://arxiv.org/abs/2411.07837)",
            "a quarter of Adam's state (by `density`), the rest moves by its sign; pre-training",
        ),
        "galore_adamw": (
            "[Zhao et al. 2024](https://arxiv.org/abs/2403.03507)",
            "updates of low rank (here 128 of 512); the published code's rule, not "
            "`optax.contrib`'s",
        ),
        "dct_adamw": (
            "[Modoranu et al. 2025](https://arxiv.org/abs/2505.17967)",
            "the same without a decomposition: columns of a fixed cosine basis",
        ),
        "badam": (
            "[Luo et al. 2024](https://arxiv.org/abs/2404.02827)",
            "fine-tuning one layer at a time (here 8 equal layers)",
        ),
    },
    "around or before another rule": {
        "clip_coordinates": (
            "[Pan and Li 2023](https://arxiv.org/abs/2306.00204)",
            "before SGD on transformers: takes the few largest coordinates back",
        ),
        "cautious": (
            "[Liang et al. 2024](https://arxiv.org/abs/2411.16085)",
            "around a bare rule: no step where momentum and gradient disagree in sign",
        ),
    },
}


def state_bytes_per_parameter(tx: optax.GradientTransformation) -> float:
    """Bytes of the state's arrays for float32 matrices, by parameter."""
    params = {f"layer{index}": jax.ShapeDtypeStruct((512, 512), jnp.float32) for index in range(8)}
    return jaxopt_lab.state_bytes(tx, params).bytes_per_parameter


def methods() -> str:
    lines = [
        "| method | paper | state, bytes per parameter | when to pick it |",
        "| --- | --- | --: | --- |",
    ]
    for purpose, rules in METHODS.items():
        lines.append(f"| *{purpose}* | | | |")
        for name, (paper, when) in rules.items():
            # A wrapper has the state of what it wraps.
            tx = getattr(jaxopt_lab, name)(optax.identity() if name == "cautious" else 0.1)
            lines.append(f"| `{name}` | {paper} | {state_bytes_per_parameter(tx):.0f} | {when} |")
    return "\n".join(lines)


def comparison() -> str:
    """The table of the main job's committed run."""
    return _study(compare, "compare", "adamw")


def budgets() -> str:
    """The table of the committed run on optimizer state."""
    return _study(memory, "memory", "adamw")


def communication() -> str:
    """The table of the committed run on replicas."""
    return _study(low_communication, "low_communication", "sync")


def finetuning() -> str:
    """The table of the committed run on adapters."""
    return _study(finetune, "finetune", "full")


def merging() -> str:
    """The table of the committed run on merged models."""
    results = store.read_json(RESULTS / "merge_models.json", "merge_models")
    tasks = list(results["settings"]["texts"])
    return _table(merge_models.header(tasks), map(merge_models.row_cells, results["table"]))


def _study(summary: Any, name: str, baseline: str) -> str:
    """The table of the committed run of a study; what it did not measure is left out."""
    results = store.read_json(RESULTS / f"{name}.json", name)
    timing = runs.Timing(results["seconds_per_step"], results.get("cpu_seconds_per_step", {}))
    rows = []
    for row in results["table"]:
        # Runs from before quartiles were kept have the seconds that they are made from.
        times = runs.times(row["optimizer"], timing, baseline)
        rows.append(summary.row_cells({**times, **row}))
    columns = [i for i in range(len(rows[0])) if any(cells[i] != "-" for cells in rows)]
    header = [summary.HEADER[i] for i in columns]
    return _table(header, ([cells[i] for i in columns] for cells in rows))


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(header)} |", "| --- |" + " --: |" * (len(header) - 1)]
    return "\n".join([*lines, *(f"| {' | '.join(cells)} |" for cells in rows)])


def cost() -> str:
    """Bytes moved on an H200 beside time on a CPU, from the committed runs of both scripts."""
    traffic = store.read_json(RESULTS / "update_traffic_h200.json", "update_traffic")
    bench = store.read_json(RESULTS / "bench_update_cpu.json", "bench_update")
    ratios = bench["ratios"] | bench["average_ratios"]
    moved = traffic["bytes_per_parameter"]
    lines = [
        "| step | bytes per parameter, H200 | floor | time, CPU |",
        "| --- | --: | --: | --: |",
    ]
    others = (
        "galore_adamw_gram", "products_of_dct", "products_of_galore", "int8_linear_adamw",
        "int8_dynamic_adamw", *FUSED, "bfloat16_adamw",
    )  # fmt: skip
    methods = (name for rules in METHODS.values() for name in rules)
    for name in ("optax.lion", "optax.adabelief", *methods, *others):
        if name in ratios:
            floor = traffic["floor"].get(name, "")
            bytes_moved = f"{moved[name]:.2f}" if name in moved else ""
            lines.append(f"| `{name}` | {bytes_moved} | {floor} | {ratios[name]:.2f} |")
    by_gap = bench["galore_ratios_by_gap"]
    gaps = next(iter(by_gap.values()))
    header = ["time beside `optax.contrib.galore`, CPU", *(f"gap {gap}" for gap in gaps)]
    rows = ([f"`{name}`", *(f"{x:.2f}" for x in by_gap[name].values())] for name in by_gap)
    lines += ["", _table(header, rows)]
    return "\n".join(lines)


def attention() -> str:
    """The default route of `pallas_kernels.attention` on a CPU beside `jax.nn`'s, by shape."""
    bench = store.read_json(RESULTS / "bench_attention_cpu.json", "bench_attention")
    header = [
        "shape", "forward, times as fast", "with gradients", "temporary memory, part of `jax.nn`'s",
        "with gradients",
    ]  # fmt: skip
    rows = []
    for measured in bench["shapes"]:
        ours, theirs = (measured["results"][name] for name in ("chunked", bench_attention.BASE))
        speeds, memory = [], []
        for which in ("forward", "gradient"):
            speeds.append(f"{bench_attention.speed(theirs[which], ours[which]):.2f}")
            part = theirs[which]["temporary_bytes"] / ours[which]["temporary_bytes"]
            memory.append(f"1/{part:.0f}" if part >= 2 else f"{1 / part:.1f}")
        rows.append([measured["shape"], *speeds, *memory])
    return _table(header, rows)


def norms_on_a_chip() -> str:
    """Bytes moved by norms and by their plain forms, in arrays like the input."""
    found = store.read_json(RESULTS / "norm_traffic_h200.json", "norm_traffic")["figures"]
    return _figures("norm", found)


def norms_on_a_cpu() -> str:
    """The plain forms' processor time divided by that of norms, and what they keep."""
    found = store.read_json(RESULTS / "bench_norm_cpu.json", "bench_norm")["figures"]
    return _figures("norm", found)


def products() -> str:
    """The plain product's processor time divided by that of `gram`, and for a step of Muon."""
    figures = store.read_json(RESULTS / "bench_gram_cpu.json", "bench_gram")["figures"]
    rows = (
        [shape, *(f"{row[c]:.2f}" if c in row else "" for c in ("gram", "muon"))]
        for shape, row in figures.items()
    )
    return _table(["shape", "`gram`, times as fast", "a step of `muon(gram=gram)`"], rows)


def first_layers() -> str:
    """A small CNN trained plainly and with TrAct in its first layer."""
    figures = store.read_json(RESULTS / "first_layer.json", "first_layer")["figures"]
    return _table(first_layer.HEADER, map(first_layer.cells, figures, figures.values()))


def _figures(first: str, found: dict[str, dict[str, float]]) -> str:
    columns = list(next(iter(found.values())))
    rows = ([f"`{name}`", *(f"{row[c]:.2f}" for c in columns)] for name, row in found.items())
    return _table([first, *columns], rows)


def errors_of_products() -> str:
    """Errors against float64, by format and by what shares a scale."""
    measured = store.read_json(RESULTS / "product_errors.json", "product_errors")["errors"]
    return _table(product_errors.HEADER, product_errors.rows(measured))


def training_in_few_bits() -> str:
    """Losses of the language model with products in few bits."""
    record = store.read_json(RESULTS / "quantized_training.json", "quantized_training")
    return _table(quantized_training.HEADER, quantized_training.rows(record["losses"]))


def bytes_of_weights() -> str:
    """Bytes that a product of a few tokens moves, as a part of those with a bfloat16 weight."""
    measured = store.read_json(RESULTS / "weight_traffic.json", "weight_traffic")["bytes"]
    return _table(weight_traffic.header(measured), weight_traffic.rows(measured))


SECTIONS = {
    "methods": methods,
    "compare": comparison,
    "memory": budgets,
    "low communication": communication,
    "fine-tuning": finetuning,
    "merging": merging,
    "cost": cost,
    "attention": attention,
    "norms on an H200": norms_on_a_chip,
    "norms on a CPU": norms_on_a_cpu,
    "gram": products,
    "first layer": first_layers,
    "errors of products": errors_of_products,
    "training in few bits": training_in_few_bits,
    "bytes of weights": bytes_of_weights,
}


def with_tables(text: str) -> str:
    """Puts each table that a page shows between its two marks."""
    for name, table in SECTIONS.items():
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if start in text:
            before, rest = text.split(start)
            if end not in rest:
                raise ValueError(f"the table {name} begins with {start!r} and does not end")
            text = f"{before}{start}{table()}\n{end}{rest.split(end)[1]}"
    return text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--write", action="store_true", help="write them where they stand")
    if parser.parse_args(argv).write:
        for page in PAGES:
            page.write_text(with_tables(page.read_text()))
    else:
        print("\n\n".join(table() for table in SECTIONS.values()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
