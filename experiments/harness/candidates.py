"""A contender of an experiment: how it is made, where its rates are searched, which code it is.

The centre of a grid is a factor on the workload's rate for `optax.adamw`, and the weight decay is
divided by that factor: at its centre every method shrinks the weights by the same fraction per
step. Only leaves with two or more axes are decayed.
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from experiments.harness import UserError, one_line
from experiments.harness.workload import Workload

BASELINE = "adamw"
WEIGHT_DECAY = 0.1
"""Decoupled decay of the baseline, per unit of learning rate."""
GRID_SPACING = 3.0
"""Neighbouring rates of every search differ by this factor."""

MakeOptimizer = Callable[[optax.Schedule], optax.GradientTransformation]
MakeWithDecay = Callable[[optax.Schedule, float, Any], optax.GradientTransformation]


@dataclass(frozen=True)
class Known:
    """An optimizer that can be asked for by name.

    Attributes:
      make: (schedule, weight decay, decay mask) -> transformation.
      rate_factor: centre of its grid divided by that of `optax.adamw`.
      reason: where that factor comes from.
    """

    make: MakeWithDecay
    rate_factor: float
    reason: str


@dataclass(frozen=True)
class Candidate:
    """One contender of an experiment.

    Attributes:
      name: label in tables and file names.
      make: schedule -> transformation.
      learning_rate: centre of its grid.
      reason: where the centre comes from.
      fingerprint: checksum of the code that defines the method; a finished run of other code is
        not taken for a run of this one.
    """

    name: str
    make: MakeOptimizer
    learning_rate: float
    reason: str
    fingerprint: str

    def grid(self, rates: int) -> list[float]:
        """`rates` peak rates around the centre, neighbours a factor `GRID_SPACING` apart."""
        exponents = np.arange(rates) - (rates - 1) / 2
        return [float(f"{self.learning_rate * GRID_SPACING**e:.3g}") for e in exponents]


def decay_mask(params: optax.Params) -> Any:
    """True for the leaves that weight decay applies to: those with two or more axes."""
    return jax.tree.map(lambda leaf: np.ndim(leaf) >= 2, params)


def with_decay(alias: Callable[..., optax.GradientTransformation]) -> MakeWithDecay:
    """What makes a ready-made optimizer that takes `weight_decay` and `mask`."""
    return lambda rate, decay, mask: alias(rate, weight_decay=decay, mask=mask)


def candidate(
    name: str, known: Known, workload: Workload, *sources: Callable[..., Any] | Path
) -> Candidate:
    """The contender `name`, with its grid centred for `workload`; see `fingerprint` for sources."""

    def make(learning_rate: optax.Schedule) -> optax.GradientTransformation:
        return known.make(learning_rate, WEIGHT_DECAY / known.rate_factor, decay_mask)

    rate = float(f"{workload.learning_rate * known.rate_factor:.3g}")
    return Candidate(name, make, rate, known.reason, fingerprint(Path(__file__), *sources))


ADAMW = Known(with_decay(optax.adamw), 1, "the baseline")


def baseline(workload: Workload) -> Candidate:
    """`optax.adamw`, which most others are compared with."""
    return candidate(BASELINE, ADAMW, workload, optax.adamw)


def check_candidate(candidate: Candidate, workload: Workload) -> None:
    """Traces one update of `candidate`, so that a mistake shows before anything is trained."""

    def one_update(key: jax.Array) -> optax.Updates:
        params = workload.init(key)
        tx = candidate.make(lambda count: 1e-3)
        if not (hasattr(tx, "init") and hasattr(tx, "update")):
            raise TypeError(f"expected an optax.GradientTransformation, got {type(tx).__name__}")
        return optax.apply_updates(params, tx.update(params, tx.init(params), params)[0])

    try:
        jax.eval_shape(one_update, jax.random.key(0))
    except Exception as error:  # the user's function may raise anything
        raise UserError(f"{candidate.name}: {type(error).__name__}: {one_line(error)}") from error


def fingerprint(*sources: Callable[..., Any] | Path) -> str:
    """Checksum of code.

    Args:
      sources: a file, a folder for the Python files in it, or a function for the file that defines
        it, where there is such a file.
    """
    checksum = hashlib.sha256()
    for path in itertools.chain.from_iterable(map(source_files, sources)):
        checksum.update(path.read_bytes())
    return checksum.hexdigest()[:16]


def source_files(source: Callable[..., Any] | Path) -> list[Path]:
    """The files of one source of `fingerprint`."""
    if isinstance(source, Path):
        return sorted(source.glob("*.py")) if source.is_dir() else [source]
    try:
        path = Path(inspect.getsourcefile(inspect.unwrap(source)) or "")
    except TypeError:  # built-in
        return []
    return [path] if path.is_file() else []
