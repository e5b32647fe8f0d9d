"""What does one update step cost beside optax's, on the machine at hand?

`python -m experiments.bench_update` times the jitted step (update and apply_updates, parameters and
state donated) of every rule on a tree of about 25M parameters shaped like a transformer. All steps
run in turn in one process, so that whatever else the machine does meets them all; reported are the
medians of the ratios of one round. Beside the time stands what explains it on a CPU: the bytes that
XLA needs beyond arguments and results, and how many copies it made to protect a donated buffer that
one kernel overwrites while another still reads it.

Projections are renewed every 200 steps. Their step is timed between two refreshes; the table says
what it takes on average over a period, with the measured time of a refresh. Beside those of low
rank stand the two products of each gradient with a basis, which no such step is without. For GaLore
a second table does so for other gaps, at a quarter of the width and at the published rank of 128.

`--compile` tells instead how long each step takes to trace, lower and compile, for trees of 20, 200
and 800 leaves, half kernels and half biases, beside `optax.adamw`'s on the same tree.
"""

from __future__ import annotations

import argparse
import pathlib
import re
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.progress import track
from rich.table import Table

import jaxopt_lab
from experiments.parts import compile_times, environment, store

# Ours, each beside the step that its ratio is taken to.
RATIOS = {
    "optax.lion": "optax.adamw",
    "optax.adabelief": "optax.adamw",
    "lion": "optax.adamw",
    "adabelief": "optax.adamw",
    "exadam": "optax.adamw",
    "diffgrad": "optax.adamw",
    "adamp": "optax.adamw",
    "sgdp": "optax.adamw",
    "cautious_lion": "optax.adamw",
    "muon": "optax.contrib.muon",
    "frugal_adamw": "optax.adamw",
    "badam": "optax.adamw",
    "dct_adamw": "optax.adamw",
    "int8_linear_adamw": "optax.adamw",
    "int8_dynamic_adamw": "optax.adamw",
    "fused_int8_linear_adamw": "optax.adamw",
    "fused_int8_dynamic_adamw": "optax.adamw",
    "bfloat16_adamw": "optax.adamw",
    "products_of_dct": "optax.adamw",
    "products_of_galore": "optax.contrib.galore",
    "galore_adamw": "optax.contrib.galore",
    "galore_adamw_gram": "optax.contrib.galore",
    "galore_adamw_gram_128": "optax.contrib.galore_128",
}
GAP = 200  # steps between two refreshes of a projection
GALORE_GAPS = (10, 50, GAP)


RATE = 1e-4
# Their rank is this part of the width; with it grow the two products of a step.
DCT_RANK, GALORE_RANK = 12, 4


def optimizers(width: int) -> dict[str, optax.GradientTransformation]:
    rate = RATE
    rank = width // GALORE_RANK
    gram = jaxopt_lab.subspace.svd(method="gram")
    quantize, quantization = jaxopt_lab.quantize_state, jaxopt_lab.quantization
    return {
        "optax.adamw": optax.adamw(rate),
        "optax.lion": optax.lion(rate),
        "optax.adabelief": optax.adabelief(rate),
        "lion": jaxopt_lab.lion(rate, weight_decay=1e-3),
        "adabelief": jaxopt_lab.adabelief(rate),
        "exadam": jaxopt_lab.exadam(rate),
        "diffgrad": jaxopt_lab.diffgrad(rate),
        "adamp": jaxopt_lab.adamp(rate, weight_decay=1e-3),
        "sgdp": jaxopt_lab.sgdp(rate, momentum=0.9, nesterov=True),
        "cautious_lion": optax.chain(
            jaxopt_lab.cautious(jaxopt_lab.scale_by_lion()),
            optax.add_decayed_weights(1e-3),
            optax.scale_by_learning_rate(rate),
        ),
        "optax.contrib.muon": optax.contrib.muon(
            rate, muon_weight_dimension_numbers=jaxopt_lab.muon_dimension_numbers
        ),
        "muon": jaxopt_lab.muon(rate),
        "frugal_adamw": jaxopt_lab.frugal_adamw(rate, update_gap=GAP),
        "badam": jaxopt_lab.badam(rate, update_gap=GAP),
        "dct_adamw": jaxopt_lab.dct_adamw(rate, rank=width // DCT_RANK, update_gap=GAP),
        "int8_linear_adamw": quantize(optax.adamw(rate), quantization.int8(code="linear")),
        "int8_dynamic_adamw": quantize(optax.adamw(rate), quantization.int8()),
        "bfloat16_adamw": quantize(optax.adamw(rate), quantization.bfloat16()),
        "optax.contrib.galore": optax.contrib.galore(rate, rank=rank, update_proj_gap=GAP),
        "galore_adamw": jaxopt_lab.galore_adamw(rate, rank, GAP),
        "galore_adamw_gram": jaxopt_lab.galore_adamw(rate, rank, GAP, projection=gram),
        "optax.contrib.galore_128": optax.contrib.galore(rate, rank=128, update_proj_gap=GAP),
        "galore_adamw_gram_128": jaxopt_lab.galore_adamw(rate, 128, GAP, projection=gram),
    }


# Steps that apply their updates themselves, by the optimizer that makes their state.
FUSED = {
    "fused_int8_linear_adamw": "int8_linear_adamw",
    "fused_int8_dynamic_adamw": "int8_dynamic_adamw",
}


def steps(width: int) -> dict[str, tuple[Callable[..., Any], Callable[..., Any]]]:
    """Returns for each name its init, and its step from parameters, state and gradients."""

    def fused(name: str) -> Callable[..., Any]:
        codec = jaxopt_lab.quantization.int8(code="dynamic" if "dynamic" in name else "linear")
        step = jaxopt_lab.quantization.fused_step(optax.adamw(RATE), codec)
        return lambda params, state, grads: step(grads, state, params)

    def products(rank: int) -> Callable[..., Any]:
        """Projects each matrix and back, without a state and without choosing a subspace."""

        def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
            def move(p: jax.Array, g: jax.Array) -> jax.Array:
                if g.ndim < 2 or width not in g.shape:
                    return p
                basis = jnp.full((width, rank), 1e-3)
                if g.shape[0] == width:
                    return p - basis @ (basis.T @ g)
                return p - (g @ basis) @ basis.T

            return jax.tree.map(move, params, grads), state

        return step

    found = optimizers(width)
    bare = {"products_of_dct": width // DCT_RANK, "products_of_galore": width // GALORE_RANK}
    return (
        {name: compile_times.separate(tx) for name, tx in found.items()}
        | {name: (found[base].init, fused(name)) for name, base in FUSED.items()}
        | {name: (optax.identity().init, products(rank)) for name, rank in bare.items()}
    )


def has_refresh(name: str) -> bool:
    return not name.startswith("products") and any(
        part in name for part in ("frugal", "badam", "dct", "galore")
    )


def parameters(width: int, layers: int, vocabulary: int) -> dict[str, Any]:
    """A decoder's parameters: about 12 * layers * width**2 + vocabulary * width of them."""
    shapes: dict[str, Any] = {"embedding": (vocabulary, width)}
    for layer in range(layers):
        shapes[f"layer{layer}"] = {
            "norm1": (width,),
            "query": (width, width),
            "key": (width, width),
            "value": (width, width),
            "out": (width, width),
            "norm2": (width,),
            "up": {"kernel": (width, 4 * width), "bias": (4 * width,)},
            "down": {"kernel": (4 * width, width), "bias": (width,)},
        }
    leaves, structure = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    arrays = [0.02 * jax.random.normal(key, shape) for key, shape in zip(keys, leaves)]
    return jax.tree.unflatten(structure, arrays)


def timed(step: Callable[..., Any], carry: list[Any], grads: Any) -> float:
    begin = time.perf_counter()
    carry[:] = jax.block_until_ready(step(*carry, grads))
    return time.perf_counter() - begin


def measure(
    names: list[str], params: Any, rounds: int, refreshes: int, width: int, console: Console
) -> dict[str, Any]:
    """Runs every step once a round; returns seconds and what the compiler says, by name."""
    chosen = {name: pair for name, pair in steps(width).items() if name in names}
    grads = jax.tree.map(lambda p: 0.1 * p, params)
    runs = {}
    for name, (init, step) in track(chosen.items(), "compiling", console=console, transient=True):
        step = jax.jit(step, donate_argnums=(0, 1))
        compiled = step.lower(params, jax.eval_shape(init, params), grads).compile()
        runs[name] = {"step": compiled, "init": jax.jit(init), "seconds": [], "refresh_seconds": []}
    for _ in track(range(refreshes + 1), "first steps", console=console, transient=True):
        for run in runs.values():
            run["carry"] = [jax.tree.map(jnp.copy, params), run["init"](params)]
            run["refresh_seconds"].append(timed(run["step"], run["carry"], grads))
    for _ in track(range(rounds), "timing", console=console, transient=True):
        for run in runs.values():
            run["seconds"].append(timed(run["step"], run["carry"], grads))
    return {
        name: {
            "seconds": run["seconds"],
            # The very first execution also loads the program.
            "refresh_seconds": run["refresh_seconds"][1:] if has_refresh(name) else [],
            "temporary_bytes": run["step"].memory_analysis().temp_size_in_bytes,
            "copies": len(re.findall(r" copy\(", run["step"].as_text())),
        }
        for name, run in runs.items()
    }


def ratio(runs: dict[str, Any], name: str) -> float | None:
    """The median over rounds of the ratio of two steps between refreshes."""
    base = RATIOS.get(name)
    if base is None or base not in runs:
        return None
    pairs = zip(runs[name]["seconds"], runs[base]["seconds"])
    return statistics.median(ours / theirs for ours, theirs in pairs)


def average_seconds(run: dict[str, Any], gap: int = GAP) -> float:
    """A step's time on average over a period between two refreshes."""
    ordinary = statistics.median(run["seconds"])
    if not run["refresh_seconds"]:
        return ordinary
    return ordinary + (statistics.median(run["refresh_seconds"]) - ordinary) / gap


def average_ratio(runs: dict[str, Any], name: str, gap: int = GAP) -> float | None:
    base = RATIOS.get(name)
    if base is None or base not in runs or not runs[name]["refresh_seconds"]:
        return None
    return average_seconds(runs[name], gap) / average_seconds(runs[base], gap)


def galore_ratios(runs: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The average ratios of GaLore by gap: the steps are the same, the refreshes more or fewer."""
    return {
        name: {str(gap): found for gap in GALORE_GAPS if (found := average_ratio(runs, name, gap))}
        for name in runs
        if name.startswith("galore") and RATIOS[name] in runs
    }


def leaf_counts(text: str) -> tuple[int, ...]:
    counts = tuple(map(int, text.split(",")))
    if min(counts) < 2:
        raise argparse.ArgumentTypeError(f"expected numbers from 2 on, got {text}")
    return counts


def compile_only(names: list[str], options: argparse.Namespace, console: Console) -> int:
    """Times the compiler; the widths of projections are those of the kernels there."""
    chosen = {
        name: step
        for name, step in steps(width=160).items()
        if name in [*names, compile_times.BASE] and not name.startswith("products")
    }

    def tracked(items: Any, description: str) -> Any:
        return track(items, description, console=console, transient=True)

    runs = compile_times.measure(chosen, options.leaves, options.rounds, tracked)
    found = compile_times.summary(runs)
    compile_times.show(found, console)
    if options.out is not None:
        store.write_json(
            options.out,
            {
                "kind": "bench_update_compile",
                "compile": found,
                "rounds": options.rounds,
                "environment": environment.environment(sys.argv[1:]),
            },
        )
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    known = list(steps(width=48))
    parser.add_argument("--optimizers", default=",".join(known), help="comma list")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compile", action="store_true", help="time the compiler instead")
    parser.add_argument(
        "--leaves", default=compile_times.LEAVES, type=leaf_counts, help="comma list"
    )
    parser.add_argument("--refreshes", type=int, default=3, help="refreshes timed")
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--out", type=pathlib.Path, help="write the figures to this JSON file")
    options = parser.parse_args(argv)
    names = options.optimizers.split(",")
    unknown = sorted(set(names) - set(known))
    if unknown:
        parser.error(f"unknown optimizer {unknown[0]!r}; known are {', '.join(known)}")
    for option in ("rounds", "refreshes"):
        if getattr(options, option) < 1:
            parser.error(f"--{option} must be positive, got {getattr(options, option)}")
    console = Console()
    if options.compile:
        return compile_only(names, options, console)
    params = parameters(options.width, options.layers, options.vocabulary)
    total = sum(x.size for x in jax.tree.leaves(params))
    console.print(f"{total / 1e6:.1f}M parameters on {jax.devices()[0].device_kind}")
    runs = measure(names, params, options.rounds, options.refreshes, options.width, console)

    table = Table("optimizer", "median ms", "ratio", "on average", "to", "temporary MB", "copies")
    for name, run in runs.items():
        found = ratio(runs, name)
        table.add_row(
            name,
            f"{1e3 * statistics.median(run['seconds']):.1f}",
            "" if found is None else f"{found:.2f}",
            "" if (average := average_ratio(runs, name)) is None else f"{average:.2f}",
            "" if found is None else RATIOS[name],
            f"{run['temporary_bytes'] / 1e6:.1f}",
            str(run["copies"]),
        )
    console.print(table)
    galore = galore_ratios(runs)
    if galore:
        by_gap = Table("of optax.contrib.galore", *(f"gap {gap}" for gap in GALORE_GAPS))
        for name, ratios in galore.items():
            by_gap.add_row(name, *(f"{found:.2f}" for found in ratios.values()))
        console.print(by_gap)
    if options.out is not None:
        ratios, averages = (
            {name: found for name in runs if (found := of(runs, name)) is not None}
            for of in (ratio, average_ratio)
        )
        store.write_json(
            options.out,
            {
                "kind": "bench_update",
                "parameters": total,
                "ratios": ratios,
                "average_ratios": averages,
                "galore_ratios_by_gap": galore,
                "update_gap": GAP,
                "runs": runs,
                "environment": environment.environment(sys.argv[1:]),
            },
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
