"""Bars of TFLOP/s by shape."""

from __future__ import annotations

import statistics
from typing import Any

from matplotlib.figure import Figure

from experiments.bench_attention.methods import Shape
from experiments.bench_attention.study import PASSES
from experiments.bench_attention.summary import flops
from experiments.harness.figures import COLOURS, png


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
    return png(figure)
