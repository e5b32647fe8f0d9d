"""What does attention cost here, by each route of `pallas_kernels` and by the codes around it?

Forward, forward with the gradients of query, key and value, and forward with the tangent of the
output where all three move (jvp, in forward mode), over a list of shapes. All
contenders of a shape take turns, each timed right after an untimed execution of its own: what
the one before left to be freed, a gigabyte of scores perhaps, is not its cost. Reported are
medians, TFLOP/s, the compiled program's temporary memory, and the error against the next wider
dtype. TFLOP/s count 4 B N T S d operations forward and 2.5 times as many more for the gradients, or
the tangent, half of all under a causal mask, whatever a code computes.

``--tune`` times what the routes offer for their blocks instead, kernel by kernel, and ``--write``
saves the fastest for the chip it runs on in the file that the routes read.
"""

from __future__ import annotations

import functools
import io
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track

from experiments.parts import (
    UserError,
    attention_contenders,
    attention_tuning,
    environment,
    report,
    store,
)
from experiments.parts.attention_contenders import Shape
from experiments.parts.attention_tuning import Trial
from experiments.parts.command_line import Parser, exit_code, positive
from experiments.parts.figures import COLOURS
from pallas_kernels.attention import tuning

BASE = "jax.nn xla"
PASSES = ("forward", "gradient", "jvp")


def flops(shape: Shape, which: str) -> float:
    forward = 4 * shape.batch * shape.heads * shape.length**2 * shape.head_dim
    return forward * (1 if which == "forward" else 3.5) / (2 if shape.causal else 1)


def passes(fn: Any) -> dict[str, Callable[..., Any]]:
    """The programs that are timed; the output's cotangent is given, so nothing is constant."""

    def gradient(q: Any, k: Any, v: Any, cotangent: Any, *tangents: Any) -> Any:
        del tangents
        output, vjp = jax.vjp(fn, q, k, v)
        return output, vjp(cotangent)

    def jvp(q: Any, k: Any, v: Any, cotangent: Any, *tangents: Any) -> Any:
        del cotangent
        return jax.jvp(fn, (q, k, v), tangents)

    return {"forward": lambda q, k, v, *others: fn(q, k, v), "gradient": gradient, "jvp": jvp}


def draw(shape: Shape) -> tuple[jax.Array, ...]:
    """Query, key and value, the output's cotangent, and tangents of query, key and value."""
    structs = shape.structs()
    drawn = (*structs, structs[0], *structs)
    keys = jax.random.split(jax.random.key(0), len(drawn))
    return tuple(jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, drawn))


def compile_one(program: Any, arrays: tuple[jax.Array, ...]) -> Any:
    """Returns the compiled program, run once, or the error that came instead."""
    try:
        compiled = jax.jit(program).lower(*arrays).compile()
        jax.block_until_ready(compiled(*arrays))
    except Exception as error:
        # A contender that a shape breaks is a result, not the end of the benchmark.
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return compiled


def compile_all(fns: dict[str, Any], arrays: tuple[jax.Array, ...]) -> dict[str, dict[str, Any]]:
    """Returns for each contender its compiled passes, or the errors."""
    return {
        name: {which: compile_one(program, arrays) for which, program in passes(fn).items()}
        for name, fn in fns.items()
    }


def measure(shape: Shape, rounds: int) -> dict[str, Any]:
    """Times all contenders of a shape, one execution of each a round."""
    found = attention_contenders.contenders(shape)
    refused = {name: reason for name, reason in found.items() if isinstance(reason, str)}
    arrays = draw(shape)
    programs = compile_all({k: v for k, v in found.items() if k not in refused}, arrays)
    exact = attention_contenders.exact(shape, *arrays[:3])
    results: dict[str, Any] = {}
    for name, compiled in programs.items():
        results[name] = {"errors": {k: v for k, v in compiled.items() if isinstance(v, str)}}
        if not isinstance(compiled["forward"], str):
            output = compiled["forward"](*arrays).astype(jnp.float32)
            error = jnp.linalg.norm(output - exact) / jnp.linalg.norm(exact)
            results[name]["error"] = float(error)
        for which in PASSES:
            if which in results[name]["errors"]:
                continue
            memory = compiled[which].memory_analysis()
            results[name][which] = {"seconds": [], "temporary_bytes": memory.temp_size_in_bytes}
    for _ in range(rounds):
        for name, compiled in programs.items():
            for which in PASSES:
                if which in results[name]:
                    program = functools.partial(compiled[which], *arrays)
                    results[name][which]["seconds"].append(attention_tuning.seconds_of(program))
    return {"shape": str(shape), "refused": refused, "results": results}


def speed(base: dict[str, Any], run: dict[str, Any]) -> float:
    """How many times as fast `run` is as `base`: the median of the ratios within a round."""
    pairs = zip(base["seconds"], run["seconds"])
    return statistics.median(theirs / ours for theirs, ours in pairs)


def rows(shape: Shape, measured: dict[str, Any]) -> list[list[str]]:
    """One line a contender and pass: TFLOP/s, speed beside `jax.nn`'s, memory, and error."""
    lines = []
    base = measured["results"].get(BASE, {})
    for name, result in measured["results"].items():
        for which in PASSES:
            if which not in result:
                lines.append([name, which, result["errors"][which][:40], "", "", ""])
                continue
            seconds = statistics.median(result[which]["seconds"])
            ratio = f"{speed(base[which], result[which]):.2f}" if which in base else ""
            memory = result[which]["temporary_bytes"] / 1e6
            error = f"{result['error']:.1e}" if which == "forward" else ""
            tera = f"{flops(shape, which) / seconds / 1e12:.3g}"
            lines.append([name, which, tera, ratio, f"{memory:.1f}", error])
    return lines


HEADER = ["code", "pass", "TFLOP/s", "speed / jax.nn", "temporary MB", "relative error"]


def picture(shapes: list[Shape], all_measured: list[dict[str, Any]]) -> bytes:
    """Bars of TFLOP/s, a group a shape."""
    figure = Figure(figsize=(12, 4.5 * len(PASSES)), layout="constrained")
    names = list(dict.fromkeys(name for m in all_measured for name in m["results"]))
    for axes, which in zip(figure.subplots(len(PASSES), 1, sharex=True), PASSES):
        for index, name in enumerate(names):
            speeds = []
            for shape, measured in zip(shapes, all_measured):
                run = measured["results"].get(name, {}).get(which)
                seconds = statistics.median(run["seconds"]) if run else float("inf")
                speeds.append(flops(shape, which) / seconds / 1e12)
            width = 0.8 / len(names)
            at = [i + (index - (len(names) - 1) / 2) * width for i in range(len(shapes))]
            axes.bar(at, speeds, width, color=COLOURS[index % len(COLOURS)], label=name)
        axes.set_ylabel(f"{which}, TFLOP/s")
        axes.set_xticks(range(len(shapes)), [str(s) for s in shapes], rotation=60, ha="right")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(ncols=len(names), frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def tune(names: list[str], shapes: list[Shape], rounds: int, console: Console) -> list[Trial]:
    """Times what the named routes, or all that serve a shape here, offer for their blocks."""
    for name in names:
        if name not in attention_contenders.ROUTES:
            known = ", ".join(attention_contenders.ROUTES)
            raise UserError(f"--tune {name}: no route with blocks; expected some of {known}")
    trials: list[Trial] = []
    for shape in shapes:
        arrays = draw(shape)

        def compiled(fn: Any, which: str, arrays: Any = arrays) -> Any:
            program = compile_one(passes(fn)[which], arrays)
            return program if isinstance(program, str) else functools.partial(program, *arrays)

        for name, reason in attention_tuning.refusals(shape).items():
            if names and name not in names:
                continue
            if reason is not None:
                if names:
                    console.print(f"{shape}: {name} {reason}")
                continue
            with console.status(f"tuning {name} on {shape}"):
                found = attention_tuning.tune(name, shape, rounds, compiled)
            title, header = f"{name}, {shape}", attention_tuning.HEADER
            console.print(report.terminal_table(title, header, [x.row() for x in found]))
            for trial in found:
                for blocks, error in trial.errors.items():
                    words = f"{trial.kernel} {attention_tuning.written(blocks)}: {error}"
                    console.print(words, markup=False, highlight=False)
            trials += found
    if not trials:
        raise UserError("--tune: none of these routes serves any of these shapes here")
    return trials


def write(trials: list[Trial], table: Path, console: Console) -> None:
    """Saves the fastest blocks for the chip that they were measured on."""
    kind = jax.devices()[0].device_kind
    record = environment.environment(sys.argv[1:])
    note = f"{kind} measured on {record['date'][:10]} with jax {record['versions']['jax']}"
    tuning.save([x.entry(kind) for x in trials if x.best is not None], note, table)
    console.print(f"wrote {table}")


def chosen(pattern: str, platform: str) -> list[Shape]:
    every = attention_contenders.shapes(platform)
    found = [shape for shape in every if all(word in str(shape) for word in pattern.split(","))]
    if not found:
        raise UserError(f"--shapes {pattern}: matches none of {'; '.join(map(str, every))}")
    return found


def main(argv: list[str] | None = None) -> int:
    def action() -> None:
        parser = Parser("python -m experiments.bench_attention", (__doc__ or "").split("\n\n")[0])
        parser.add_argument("--rounds", type=positive, default=7, help="executions of each program")
        parser.add_argument(
            "--shapes", default="", help="words that a shape's name contains, joined by commas"
        )
        parser.add_argument("--list", action="store_true", help="list the shapes and stop")
        parser.add_argument("--out", type=Path, default=Path("results/bench-attention"))
        parser.add_argument(
            "--tune", nargs="*", metavar="ROUTE", help="find the blocks of these routes, or of all"
        )
        parser.add_argument("--write", action="store_true", help="save what --tune finds")
        parser.add_argument("--table", type=Path, default=tuning.TABLE, help="where --write saves")
        options = parser.parse_args(argv)
        console = Console()
        shapes = chosen(options.shapes, jax.default_backend())
        if options.list:
            console.print("\n".join(map(str, shapes)))
            return
        if options.tune is not None:
            plain = [shape for shape in shapes if shape.feature is None]
            trials = tune(options.tune, plain, options.rounds, console)
            if options.write:
                write(trials, options.table, console)
            return
        all_measured = []
        for shape in track(shapes, "timing", console=console, transient=True):
            measured = measure(shape, options.rounds)
            all_measured.append(measured)
            console.print(report.terminal_table(str(shape), HEADER, rows(shape, measured)))
        options.out.mkdir(parents=True, exist_ok=True)
        record = {
            "kind": "bench_attention",
            "environment": environment.environment(sys.argv[1:]),
            "shapes": all_measured,
        }
        store.write_json(options.out / "bench_attention.json", record)
        (options.out / "bench_attention.png").write_bytes(picture(shapes, all_measured))
        console.print(f"wrote bench_attention.json and .png to {options.out}")

    return exit_code("bench_attention", action)


if __name__ == "__main__":
    sys.exit(main())
