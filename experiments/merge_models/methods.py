"""The rules that merge models, each with one scale."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jaxopt_lab import adapters

SCALES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8)
BEFORE, TOGETHER = "pre-trained", "one model on all"

Merge = Callable[[Any, Sequence[Any], float], Any]


def _arithmetic(base: Any, models: Sequence[Any], scale: float) -> Any:
    return adapters.task_arithmetic(base, models, [scale] * len(models))


def _ties(density: float) -> Merge:
    return lambda base, models, scale: adapters.ties_merge(base, models, density, scale=scale)


def _breadcrumbs(keep: float) -> Merge:
    return lambda base, models, scale: adapters.breadcrumbs_merge(base, models, keep, scale=scale)


MERGES: dict[str, tuple[Merge, str]] = {
    "task arithmetic": (_arithmetic, "the sum of all changes"),
    "ties 0.2": (_ties(0.2), "a fifth of each change, the mean of what agrees in sign"),
    "ties 0.5": (_ties(0.5), "the same with half of each change"),
    "breadcrumbs 0.15": (
        _breadcrumbs(0.15),
        "the sum of 15% of each row's changes, without its largest",
    ),
    "breadcrumbs 0.5": (_breadcrumbs(0.5), "the same with half of each row"),
}
"""Rules with a scale, which is chosen; the plain average has none."""
