"""What do the schedules of this package look like over a run?

`python -m experiments.plot_schedules` evaluates each of them, trains a small classifier of digits
twice (once for the gradient norms that a refined schedule is made from, once a learning rate that
corrects itself), and writes one picture and one JSON file into `--out`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.parts import UserError
from experiments.parts.command_line import Parser, exit_code, positive

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEADER = ("schedule", "first", "highest", "half way", "last", "mean / highest")
PHIS = (0.25, 1.0, 2.0, 5.0, 20.0)
START_RATES = (0.01, 0.1, 1.0)
META_RATE = 0.05
SHOWN = 50  # values of each curve in the JSON file


def parser() -> Parser:
    """The command line."""
    p = Parser(
        prog="python -m experiments.plot_schedules",
        description="Draw every learning-rate schedule of this package.",
    )
    p.add_argument("--steps", type=positive, default=400, help="updates of a run, from 40 on")
    p.add_argument(
        "--out",
        type=Path,
        default=Path("results") / "schedules",
        metavar="DIR",
        help="where schedules.png and schedules.json are written",
    )
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiment; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)

    def action() -> None:
        options = parser().parse_args(arguments)
        if options.steps < 40:
            raise UserError(f"--steps {options.steps}: expected 40 or more")
        _plot(options.steps, options.out, arguments)

    return exit_code("plot_schedules", action)


def _plot(steps: int, out: Path, arguments: list[str]) -> None:
    from rich.console import Console

    from experiments.parts.environment import environment
    from experiments.parts.figures import png
    from experiments.parts.report import terminal_table
    from experiments.parts.store import write_atomically, write_json

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror})") from error
    norms, adaptive = _recorded_norms(steps), _adaptive_rates(steps)
    panels = tables(steps, norms)
    panels["A rate that corrects itself (hypergradient)"] = adaptive
    rows = [summary(name, rates) for found in panels.values() for name, rates in found.items()]
    write_atomically(out / "schedules.png", png(figure(panels, norms)))
    every = max(steps // SHOWN, 1)
    record = {
        "kind": "schedules",
        **environment(arguments),
        "steps": steps,
        "meta_rate": META_RATE,
        "table": rows,
        "updates_shown": list(range(0, steps, every)),
        "gradient_norms": _rounded(norms[::every]),
        "rates": {
            panel: {name: _rounded(rates[::every]) for name, rates in found.items()}
            for panel, found in panels.items()
        },
    }
    write_json(out / "schedules.json", record)
    console = Console()
    if not console.is_terminal:
        console.width = 100
    cells = [[row["schedule"], *(f"{row[key]:.3f}" for key in list(row)[1:])] for row in rows]
    console.print(terminal_table(f"Learning rates over {steps} updates", HEADER, cells))
    console.print(f"written: {out}/schedules.png, schedules.json", highlight=False, soft_wrap=True)


def tables(steps: int, norms: Any) -> dict[str, dict[str, Any]]:
    """Panel -> name of a schedule -> its rate at each step; the highest is 1."""
    from jaxopt_lab import schedules as s

    warmup, decay = steps // 20, steps // 4
    stable = steps - warmup - decay
    trunk = s.wsd_schedule(1.0, warmup)
    shapes = {
        f"WSD, {shape}": s.wsd_schedule(
            1.0, warmup, stable, decay, end_value=0.02, decay_shape=shape
        )
        for shape in ("linear", "cosine", "sqrt", "exponential")
    }
    branches = {
        f"branch at {start}": s.branch_decay(trunk, start, steps // 8)
        for start in (steps // 4, steps // 2, steps - steps // 8)
    }
    thirds = [steps // 2, steps // 4, steps - steps // 2 - steps // 4]
    panels = {
        "Budget-aware (UBA), by phi": {
            f"phi = {phi:g}{', the cosine' if phi == 2 else ''}": s.uba_schedule(
                1.0, 0.01, steps, phi
            )
            for phi in PHIS
        },
        "Warm-up, stable, decay": shapes,
        "Cooling down later": {"stable for ever": trunk, **branches},
        "Without an end, and again and again": {
            "inverse square root": s.inverse_sqrt_schedule(1.0, warmup),
            "re-warmed, 3 phases": s.rewarmed_schedule((1.0, 0.6, 0.6), thirds, warmup),
        },
        "Refined from gradient norms": {
            "linear decay": s.wsd_schedule(1.0, 0, 0, steps, decay_shape="linear"),
            "refined for Adam (l1)": s.refined_schedule(norms, steps, 1.0, "l1"),
            "the same, not smoothed": s.refined_schedule(norms, steps, 1.0, "l1", smoothing=0.0),
        },
    }
    return {
        panel: {name: s.as_table(schedule, steps) for name, schedule in found.items()}
        for panel, found in panels.items()
    }


def summary(name: str, rates: Any) -> dict[str, Any]:
    """One row of the table; only the first entry is no number."""
    return {
        "schedule": name,
        "first": float(rates[0]),
        "highest": float(rates.max()),
        "half_way": float(rates[len(rates) // 2]),
        "last": float(rates[-1]),
        "mean_over_highest": float(rates.mean() / rates.max()),
    }


def figure(panels: dict[str, dict[str, Any]], norms: Any) -> Any:
    """Six panels; the names stand in a legend each."""
    from matplotlib.figure import Figure

    from experiments.parts.figures import LINES, style

    drawn = Figure(figsize=(14, 9), layout="constrained")
    grid = drawn.subplots(2, 3).ravel()
    for axes, (panel, found) in zip(grid, panels.items(), strict=True):
        for index, (name, rates) in enumerate(found.items()):
            look = {**style(index), "marker": "", "linestyle": LINES[index % len(LINES)]}
            axes.plot(rates, label=name, lw=0.8 if "not smoothed" in name else 1.6, **look)
        axes.set_title(panel, fontsize=11)
        axes.set_xlabel("update")
        axes.grid(alpha=0.3)
        axes.set_xlim(0, len(norms) - 1)
        axes.set_ylim(0, 1.05)
    for axes in grid[::3]:
        axes.set_ylabel("learning rate / peak")
    _finish(grid, norms)
    for axes in grid:
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.15), "ncols": 2}
        axes.legend(fontsize=9, frameon=False, **below)
    return drawn


def _finish(grid: Sequence[Axes], norms: Any) -> None:
    """The norms behind the refined schedules, and a logarithmic axis for rates of any size."""
    refined, adaptive = grid[4], grid[5]
    refined.plot(norms / norms.max(), color="0.75", lw=0.8, zorder=0, label="gradient norm / max.")
    adaptive.set_yscale("log")
    adaptive.autoscale(axis="y")
    adaptive.set_ylabel("learning rate")


def _digits() -> tuple[Any, Any]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return (images - images.mean(0)) / (images.std(0) + 1e-3), labels


def _run(tx: Any, steps: int) -> tuple[Any, Any]:
    """Trains softmax regression on the digits; returns the last state and all of the rates."""
    import jax
    import jax.numpy as jnp
    import optax

    x, y = map(jnp.asarray, _digits())

    def loss(params: Any, batch: jax.Array) -> jax.Array:
        logits = x[batch] @ params["kernel"] + params["bias"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y[batch]).mean()

    def step(carry: Any, key: jax.Array) -> Any:
        params, state = carry
        grads = jax.grad(loss)(params, jax.random.randint(key, (64,), 0, x.shape[0]))
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), getattr(state, "learning_rate", 0.0)

    params = {"kernel": jnp.zeros((64, 10)), "bias": jnp.zeros(10)}
    keys = jax.random.split(jax.random.key(0), steps)
    (_, state), rates = jax.jit(lambda: jax.lax.scan(step, (params, tx.init(params)), keys))()
    return state, rates


def _recorded_norms(steps: int) -> Any:
    import numpy as np
    import optax

    from jaxopt_lab import schedules

    tx = optax.chain(schedules.record_norms("l1", steps), optax.adam(3e-3))
    return np.asarray(_run(tx, steps)[0][0].norms)


def _adaptive_rates(steps: int) -> dict[str, Any]:
    import numpy as np
    import optax

    from jaxopt_lab import schedules

    return {
        f"from {rate:g}": np.asarray(
            _run(
                schedules.hypergradient(optax.identity(), rate, META_RATE, "multiplicative"), steps
            )[1]
        )
        for rate in START_RATES
    }


def _rounded(values: Any) -> list[float]:
    return [float(f"{value:.6g}") for value in values]


if __name__ == "__main__":
    sys.exit(main())
