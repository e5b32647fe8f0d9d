"""Budgets of optimizer state by name: AdamW, its state in fewer bits, and rules that keep less.

A name is `adamw`, or for FRUGAL, GaLore and DCT-AdamW the method and its density, `frugal-0.25`:
the fraction of each hidden matrix that has moments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optax

import jaxopt_lab
from experiments.harness import UserError
from experiments.harness.candidates import (
    ADAMW,
    BASELINE,
    Candidate,
    Known,
    candidate,
    check_candidate,
    with_decay,
)
from experiments.harness.workload import Workload
from jaxopt_lab import quantization, subspace

REFRESHES = 20
"""FRUGAL, GaLore and BAdam change what has state this many times in a run."""

_LAB = Path(jaxopt_lab.__file__).parent
_SUBSPACE = (_LAB, _LAB / "subspace")

_SHORT_STEP = "without the remainder a step is shorter; 2 to 3 times Adam's rate in pilot runs"

Rule = Callable[..., optax.GradientTransformation]


@dataclass(frozen=True)
class Shape:
    """What the methods' own hyper-parameters depend on."""

    steps: int  # of a run
    width: int  # smaller side of every hidden matrix

    @property
    def update_gap(self) -> int:
        """Steps between two changes of what has state."""
        return self.steps // REFRESHES

    def rank(self, density: float) -> int:
        """Directions that have as many moments as `density` of the columns."""
        return max(1, round(density * self.width))


@dataclass(frozen=True)
class Budget:
    """A way to spend memory on optimizer state.

    Attributes:
      make: (schedule, decay, mask, shape) -> transformation; with `by_density` also the density.
      rate_factor: centre of its grid divided by that of `optax.adamw`.
      reason: where that factor comes from.
      sources: the code that defines it; a run of other code is not taken for one of this.
      by_density: whether a density follows its name.
    """

    make: Rule
    rate_factor: float
    reason: str
    sources: Sequence[Any]
    by_density: bool = False


def _whole(known: Known, source: Any) -> Budget:
    """An optimizer as it is."""

    def make(rate: optax.Schedule, decay: float, mask: Any, shape: Shape) -> Any:
        del shape
        return known.make(rate, decay, mask)

    return Budget(make, known.rate_factor, known.reason, (source,))


def _encoded(codec: quantization.Codec) -> Budget:
    def make(rate: optax.Schedule, decay: float, mask: Any, shape: Shape) -> Any:
        del shape
        return jaxopt_lab.quantize_state(optax.adamw(rate, weight_decay=decay, mask=mask), codec)

    sources = (optax.adamw, _LAB, _LAB / "quantization")
    return Budget(make, 1, "the rule is AdamW", sources)


def _frugal(rate: optax.Schedule, decay: float, mask: Any, shape: Shape, density: float) -> Any:
    return jaxopt_lab.frugal_adamw(rate, density, shape.update_gap, weight_decay=decay, mask=mask)


def _galore(rate: optax.Schedule, decay: float, mask: Any, shape: Shape, density: float) -> Any:
    # The same directions as by SVD, whose threads stall where other programs keep the cores busy.
    gram = subspace.svd(method="gram")
    return jaxopt_lab.galore_adamw(
        rate,
        shape.rank(density),
        shape.update_gap,
        weight_decay=decay,
        mask=mask,
        scale=1.0,
        projection=gram,
    )


def _dct(rate: optax.Schedule, decay: float, mask: Any, shape: Shape, density: float) -> Any:
    return jaxopt_lab.dct_adamw(rate, shape.rank(density), 1, weight_decay=decay, mask=mask)


def _badam(rate: optax.Schedule, decay: float, mask: Any, shape: Shape) -> Any:
    return jaxopt_lab.badam(rate, shape.update_gap, weight_decay=decay, mask=mask)


def _sgd(rate: optax.Schedule, decay: float, mask: Any, shape: Shape) -> Any:
    del shape
    return optax.chain(optax.add_decayed_weights(decay, mask), optax.sgd(rate))


METHODS: dict[str, Budget] = {
    BASELINE: _whole(ADAMW, optax.adamw),
    "adamw-int8": _encoded(quantization.int8()),
    "adamw-int8-linear": _encoded(quantization.int8(code="linear")),
    "adamw-bf16": _encoded(quantization.bfloat16()),
    "frugal": Budget(_frugal, 1, "its authors: Adam's rate", _SUBSPACE, True),
    "galore": Budget(_galore, 3, _SHORT_STEP, _SUBSPACE, True),
    "dct": Budget(_dct, 3, _SHORT_STEP, _SUBSPACE, True),
    "badam": Budget(_badam, 1, "its authors: Adam's rate", _SUBSPACE),
    "lion": _whole(
        Known(with_decay(jaxopt_lab.lion), 1 / 3, "its authors: 3 to 10 times below AdamW"),
        jaxopt_lab.lion,
    ),
    "sgd": Budget(_sgd, 100, "that of sgdp: 0.1 against Adam's 0.001", (optax.sgd,)),
}


def parse(name: str) -> tuple[Budget, float | None]:
    """The budget of that name and its density, None where it has none."""
    method, _, text = name.partition("-")
    budget = METHODS.get(name)
    if budget is not None and not budget.by_density:
        return budget, None
    budget = METHODS.get(method)
    if budget is None or not budget.by_density:
        raise UserError(f"--contenders: unknown contender {name!r}; known: {', '.join(names())}")
    # The rank of a decomposition is at least one; FRUGAL without a subspace is sign descent.
    open_end = method != "frugal"
    try:
        density = float(text)
        in_range = (0 < density <= 1) if open_end else (0 <= density <= 1)
    except ValueError:
        density, in_range = 0.0, False
    if not in_range:
        expected = f"a density in {'(' if open_end else '['}0, 1], such as {method}-0.25"
        raise UserError(f"--contenders: {name!r}: expected {expected}")
    return budget, density


def names() -> list[str]:
    """What can be asked for."""
    return [f"{name}-DENSITY" if b.by_density else name for name, b in METHODS.items()]


def contenders(asked: Sequence[str], workload: Workload, shape: Shape) -> list[Candidate]:
    """The contenders in the order asked for; the baseline is added in front if it is missing."""
    asked = list(dict.fromkeys(asked if BASELINE in asked else [BASELINE, *asked]))
    found = [_contender(name, *parse(name), workload, shape) for name in asked]
    for one in found:
        check_candidate(one, workload)
    return found


def _contender(
    name: str, budget: Budget, density: float | None, workload: Workload, shape: Shape
) -> Candidate:
    own = {"shape": shape} if density is None else {"shape": shape, "density": density}

    def make(rate: optax.Schedule, decay: float, mask: Any) -> optax.GradientTransformation:
        return budget.make(rate, decay, mask, **own)

    known = Known(make, budget.rate_factor, budget.reason)
    return candidate(name, known, workload, Path(__file__), *budget.sources)
