"""Which tables does the README show? Prints them, or writes them into it.

`python -m experiments.readme_tables [--write]`: the methods, with the bytes measured from the
arrays of each state, and the measurements, from the files under `experiments/results`.
"""

from __future__ import annotations

import argparse
import pathlib
import re

import jax
import jax.numpy as jnp
import optax

import jaxopt_lab
from experiments import compare
from experiments.parts import store

ROOT = pathlib.Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "experiments" / "results"

WHEN = {
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
        "steps about twice Adam's; wants warm-up and a smaller rate",
    ),
    "diffgrad": (
        "[Dubey et al. 2020](https://arxiv.org/abs/1909.11015)",
        "small convolutional nets with gradients of order one",
    ),
    "muon": (
        "[Jordan et al. 2024](https://kellerjordan.github.io/posts/muon/), "
        "[Liu et al. 2025](https://arxiv.org/abs/2502.16982)",
        "hidden matrices of transformers and CNNs; fewest steps, at the price of matrix products",
    ),
    "clip_coordinates": (
        "[Pan and Li 2023](https://arxiv.org/abs/2306.00204)",
        "before SGD on transformers: takes the few largest coordinates back",
    ),
}


def state_bytes_per_parameter(tx: optax.GradientTransformation) -> float:
    """Bytes of the state's arrays for a float32 matrix, by parameter."""
    params = {"kernel": jax.ShapeDtypeStruct((512, 512), jnp.float32)}
    state = jax.eval_shape(tx.init, params)
    arrays = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state) if x.ndim > 0)
    return arrays / params["kernel"].size


def methods() -> str:
    lines = [
        "| method | paper | state, bytes a parameter | when to pick it |",
        "| --- | --- | --: | --- |",
    ]
    for name, (paper, when) in WHEN.items():
        tx = getattr(jaxopt_lab, name)(0.1)
        lines.append(f"| `{name}` | {paper} | {state_bytes_per_parameter(tx):.0f} | {when} |")
    return "\n".join(lines)


def comparison() -> str:
    """The table of the main job's committed run."""
    results = store.read_json(RESULTS / "compare.json", "compare")
    lines = [f"| {' | '.join(compare.HEADER)} |", "| --- |" + " --: |" * (len(compare.HEADER) - 1)]
    lines += [f"| {' | '.join(cells)} |" for cells in map(compare.row_cells, results["table"])]
    return "\n".join(lines)


def cost() -> str:
    """Bytes moved on an H200 beside time on a CPU, from the committed runs of both scripts."""
    traffic = store.read_json(RESULTS / "update_traffic_h200.json", "update_traffic")
    ratios = store.read_json(RESULTS / "bench_update_cpu.json", "bench_update")["ratios"]
    moved = traffic["bytes_per_parameter"]
    lines = ["| step | bytes a parameter, H200 | floor | time, CPU |", "| --- | --: | --: | --: |"]
    for name in ("optax.lion", "optax.adabelief", *WHEN):
        if name in ratios:
            floor = traffic["floor"].get(name, "")
            bytes_moved = f"{moved[name]:.2f}" if name in moved else ""
            lines.append(f"| `{name}` | {bytes_moved} | {floor} | {ratios[name]:.2f} |")
    return "\n".join(lines)


SECTIONS = {"methods": methods, "compare": comparison, "cost": cost}


def with_tables(text: str) -> str:
    """Puts each table between its two marks."""
    for name, table in SECTIONS.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"the README has no section {name}")
        text = pattern.sub(lambda m, table=table: f"{m[1]}{table()}\n{m[2]}", text)
    return text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--write", action="store_true", help="write them into README.md")
    if parser.parse_args(argv).write:
        README.write_text(with_tables(README.read_text()))
    else:
        print("\n\n".join(table() for table in SECTIONS.values()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
