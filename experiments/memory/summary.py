"""What the bytes of state bought: a table and sentences, from the runs alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax

import jaxopt_lab
from experiments.harness import charts, figures, timing
from experiments.harness.candidates import BASELINE, Candidate
from experiments.harness.report import Report
from experiments.harness.runs import (
    Row,
    Run,
    Timing,
    diverged_seeds,
    edge_warning,
    number,
    rate_text,
    ratio_text,
    row_of,
)
from experiments.harness.study import Study
from experiments.harness.workload import Workload
from experiments.memory.charts import best_for_their_state, state_charts
from experiments.memory.methods import REFRESHES, Shape
from experiments.memory.pictures import loss_by_state

COMPACT = ("adamw-int8", "adamw-bf16")
HEADER = (
    "optimizer",
    "best rate",
    "final loss",
    "lowest to highest seed",
    "difference in spreads of adamw",
    "state bytes / param.",
    "ms per step",
    "time / adamw (quartiles)",
    "CPU time / adamw (quartiles)",
)


def report(
    study: Study, shape: Shape, runs: Mapping[str, Sequence[Run]], measured: Timing
) -> Report:
    """The outcome."""
    unit = study.workload.loss_unit
    rows = table(study.candidates, runs, measured)
    return Report(
        title="What each byte of optimizer state buys",
        unit=unit,
        verdict=verdict(rows),
        caption=study.caption("optimizers"),
        header=HEADER,
        units={"final loss": unit, "lowest to highest seed": unit},
        cells=[row_cells(row) for row in rows],
        calls=study.calls(),
        method=_method(shape, study.workload),
        charts=[
            *state_charts(runs, rows, unit),
            *charts.loss_charts(runs, rows, unit),
            *charts.rate_charts(runs, rows, unit),
        ],
        pictures={
            "budget.png": figures.png(loss_by_state(rows, unit)),
            "curves.png": figures.loss_curves(runs, rows, None, unit),
            "rates.png": figures.rate_search(runs, rows, unit),
        },
        record=study.record(),
        results=study.results(rows, runs, measured),
    )


def table(
    candidates: Sequence[Candidate],
    runs: Mapping[str, Sequence[Run]],
    measured: Timing,
) -> list[Row]:
    """One line for each contender.

    Beside the figures of `runs.row_of`: `excess`, the final loss less the baseline's;
    `excess_in_spreads`, the same in sample standard deviations of the baseline's seeds; and
    `best_for_its_state`: nothing with as little state ends as low.
    """
    rows = [row_of(c.name, runs[c.name], measured, BASELINE) for c in candidates]
    base = next(line for line in rows if line["optimizer"] == BASELINE)
    for line in rows:
        line["excess"] = line["excess_in_spreads"] = None
        if line["final_loss"] is not None and base["final_loss"] is not None:
            line["excess"] = line["final_loss"] - base["final_loss"]
            if base["final_loss_spread"]:
                line["excess_in_spreads"] = line["excess"] / base["final_loss_spread"]
        line["best_for_its_state"] = line["final_loss"] is not None and not any(
            _dominates(other, line) for other in rows
        )
    return rows


def _dominates(other: Row, row: Row) -> bool:
    """Whether `other` ends as low with as little state, and is better in one of the two."""
    if other["final_loss"] is None:
        return False
    names = ("final_loss", "state_bytes_per_parameter")
    own, others = [row[name] for name in names], [other[name] for name in names]
    return others != own and all(a <= b for a, b in zip(others, own))


def row_cells(row: Row) -> list[str]:
    """One row of the table as text, under `HEADER`."""
    diverged = row["final_loss"] is None
    ends = f"{number(row, 'final_loss_low', '.4f')} to {number(row, 'final_loss_high', '.4f')}"
    return [
        row["optimizer"],
        rate_text(row),
        "diverged" if diverged else number(row, "final_loss", ".4f"),
        "-" if diverged else ends,
        number(row, "excess_in_spreads", "+.1f"),
        number(row, "state_bytes_per_parameter", ".2f"),
        number(row, "seconds_per_step", ".2f", 1e3),
        ratio_text(row),
        ratio_text(row, "cpu"),
    ]


def verdict(rows: Sequence[Row]) -> list[str]:
    """What the table says, in sentences.

    A difference counts if it exceeds the baseline's spread, the sample standard deviation over its
    seeds.
    """
    by_name = {row["optimizer"]: row for row in rows}
    base = by_name[BASELINE]
    if base["final_loss"] is None:
        return [f"{BASELINE} diverged at every learning rate: there is nothing to compare with."]
    lines = []
    if base["final_loss_spread"] is None:
        lines.append(
            f"One seed of {BASELINE} has no spread, so that no difference can be judged: "
            "--seeds 3 or more."
        )
    else:
        lines.append(
            f"{BASELINE} ends at {base['final_loss']:.4f}; its spread over {_finished(base)} seeds "
            f"(standard deviation) is {base['final_loss_spread']:.4f}."
        )
        lines += [_reaches(by_name[name], base) for name in COMPACT if name in by_name]
    for name, row in by_name.items():
        rival = by_name.get(name.replace("frugal-", "galore-"))
        if name.startswith("frugal-") and rival is not None:
            lines.append(_between(base, row, rival))
    lines.append(best_for_their_state(rows))
    return [*lines, *diverged_seeds(rows), *edge_warning(rows)]


def _finished(row: Row) -> int:
    return row["seeds"] - row["seeds_diverged"]


def _reaches(row: Row, base: Row) -> str:
    """Whether compact state costs anything."""
    name, spread = row["optimizer"], base["final_loss_spread"]
    if row["final_loss"] is None:
        return f"{name} does not reach {BASELINE}'s loss: it diverged."
    figures = f"{row['final_loss']:.4f}, a difference of {row['excess']:+.4f}"
    if row["excess"] > spread:
        return f"{name} does not reach {BASELINE}'s loss within its spread over seeds: {figures}."
    if row["excess"] < -spread:
        return f"{name} ends below {BASELINE} by more than its spread over seeds: {figures}."
    return f"{name} reaches {BASELINE}'s loss within its spread over seeds: {figures}."


def _between(base: Row, frugal: Row, galore: Row) -> str:
    """Whether FRUGAL lies between GaLore with the same moments and full AdamW, as in its paper."""
    names = frugal["optimizer"], galore["optimizer"]
    claim = f"its paper's order {BASELINE}, {names[0]}, {names[1]}"
    if frugal["final_loss"] is None or galore["final_loss"] is None:
        return f"Of {claim} nothing can be said: one of them diverged."
    above_base = frugal["final_loss"] - base["final_loss"]
    below_galore = galore["final_loss"] - frugal["final_loss"]
    figures = (
        f"{base['final_loss']:.4f}, {frugal['final_loss']:.4f}, {galore['final_loss']:.4f} "
        f"with {base['state_bytes_per_parameter']:.2f}, "
        f"{frugal['state_bytes_per_parameter']:.2f} and "
        f"{galore['state_bytes_per_parameter']:.2f} bytes a parameter"
    )
    if above_base >= 0 and below_galore >= 0:
        text = f"{names[0]} lies between {names[1]} and full {BASELINE}, as in its paper: {figures}"
    else:
        faults = [f"below full {BASELINE}"] if above_base < 0 else []
        faults += [f"above {names[1]}"] if below_galore < 0 else []
        text = (
            f"{names[0]} does not lie between {names[1]} and full {BASELINE}, as it does in its "
            f"paper: it ends {' and '.join(faults)} ({figures})"
        )
    spread = base["final_loss_spread"]
    pairs = ((above_base, BASELINE), (below_galore, names[1]))
    alike = [name for gap, name in pairs if spread is not None and abs(gap) <= spread]
    return text + (
        f"; the difference to {' and to '.join(alike)} is within the spread." if alike else "."
    )


def _method(shape: Shape, workload: Workload) -> list[str]:
    """How it was done, in paragraphs."""
    params = jax.eval_shape(workload.init, jax.random.key(0))
    found = jaxopt_lab.subspace.treatments(jaxopt_lab.frugal_adamw(1e-3), params).parameters
    full = sum(math.prod(one.leaf.shape) for one in found if one.kind == "full")
    share = full / workload.identity["parameters"]
    return [
        "Every contender trains from the same initial weights, on the same batches, under the same "
        "schedule (linear warm-up over a tenth of the steps, then a cosine to a tenth of the peak) "
        "and with the same number of learning rates, a factor of 3 apart around a centre of its "
        "own. The rate whose run with seed 0 ends lowest is trained with the other seeds too. "
        "Weight decay applies to leaves with two or more axes; rate times decay is the same for "
        "every contender at the centre of its grid.",
        "State is counted from the arrays of the optimizer's state, selections, bases, scales and "
        "counters included, and divided by the number of all parameters. FRUGAL, GaLore and DCT "
        "split hidden matrices only: embeddings, output layer and norms keep Adam's moments, here "
        f"{share:.1%} of the parameters, which is {8 * share:.2f} bytes a parameter; in a large "
        "model this share is small. The number after the name is the density: the fraction of a "
        f"hidden matrix that has moments, for GaLore and DCT by a rank of density times "
        f"{shape.width}. GaLore also keeps its bases.",
        "int8 is block-wise with dynamic levels, bf16 is rounded stochastically; leaves with fewer "
        "than 4,096 elements, the norms, stay exact.",
        f"FRUGAL, GaLore and BAdam change what has state every {shape.update_gap} steps, "
        f"{REFRESHES} times a run, and DCT at every step. The papers wait 50 to 200 steps in runs "
        "of ten thousand and more. GaLore's scale is 1, and its "
        "directions are found as eigenvectors of the Gram matrix. BAdam trains one layer at a "
        "time, a method for fine-tuning; sgd has no momentum.",
        "Differences are given in sample standard deviations of adamw's seeds, and count in the "
        "sentences above if they exceed one.",
        timing.how(BASELINE),
    ]
