"""The optimizers by name, each with the centre of its learning-rate grid and where it is from.

The centre is a factor on the workload's rate for `optax.adamw`, and the weight decay is divided by
that factor: at its centre every method shrinks the weights by the same fraction per step. Only
leaves with two or more axes are decayed.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
import optax

import jaxopt_lab
from experiments.parts import UserError
from experiments.parts.training import MakeOptimizer
from experiments.parts.workload import Workload

BASELINE = "adamw"
WEIGHT_DECAY = 0.1
"""Decoupled decay of the baseline, per unit of learning rate."""
GRID_SPACING = 3.0
"""Neighbouring rates of every search differ by this factor."""


Make = Callable[[optax.Schedule, float, Any], optax.GradientTransformation]


@dataclass(frozen=True)
class Known:
    """An optimizer that can be asked for by name.

    Attributes:
      make: (schedule, weight decay, decay mask) -> transformation.
      rate_factor: centre of its grid divided by that of `optax.adamw`.
      reason: where that factor comes from.
    """

    make: Make
    rate_factor: float
    reason: str


def _muon(rate: optax.Schedule, decay: float, mask: Any) -> optax.GradientTransformation:
    return jaxopt_lab.muon(rate, weight_decay=decay, mask=mask, consistent_rms=0.2)


def _sgdp(rate: optax.Schedule, decay: float, mask: Any) -> optax.GradientTransformation:
    momentum = 0.9
    return jaxopt_lab.sgdp(
        rate,
        momentum=momentum,
        nesterov=True,
        weight_decay=decay * (1 - momentum),  # it divides the decay by 1 - momentum
        mask=mask,
    )


def _diffgrad(rate: optax.Schedule, decay: float, mask: Any) -> optax.GradientTransformation:
    # `jaxopt_lab.diffgrad` adds the decay to the gradient; all others here decouple it.
    return optax.chain(
        jaxopt_lab.scale_by_diffgrad(),
        optax.add_decayed_weights(decay, mask),
        optax.scale_by_learning_rate(rate),
    )


def _alias(function: Callable[..., optax.GradientTransformation]) -> Make:
    return lambda rate, decay, mask: function(rate, weight_decay=decay, mask=mask)


KNOWN: dict[str, Known] = {
    "adamw": Known(_alias(optax.adamw), 1, "the baseline"),
    "lion": Known(
        _alias(jaxopt_lab.lion),
        1 / 3,
        "its authors: 3 to 10 times below AdamW, decay as much above",
    ),
    "adabelief": Known(_alias(jaxopt_lab.adabelief), 1, "its authors: Adam's rate"),
    "adamp": Known(_alias(jaxopt_lab.adamp), 1, "its authors: Adam's rate"),
    "muon": Known(
        _muon, 3, "Jordan's 0.02, in Moonlight's scaling: 2 to 4 times AdamW's rate at these widths"
    ),
    "sgdp": Known(_sgdp, 100, "its authors' examples: 0.1, against 0.001 for AdamP"),
    "exadam": Known(
        _alias(jaxopt_lab.exadam),
        0.2,
        "a direction up to twice Adam's, a step that grows like log t",
    ),
    "diffgrad": Known(_diffgrad, 2, "its friction is close to 1/2 where gradients are small"),
}


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


def candidate(
    name: str, known: Known, workload: Workload, *sources: Callable[..., Any] | Path
) -> Candidate:
    """The contender `name`, with its grid centred for `workload`; see `fingerprint` for sources."""

    def make(learning_rate: optax.Schedule) -> optax.GradientTransformation:
        return known.make(learning_rate, WEIGHT_DECAY / known.rate_factor, decay_mask)

    rate = float(f"{workload.learning_rate * known.rate_factor:.3g}")
    return Candidate(name, make, rate, known.reason, fingerprint(Path(__file__), *sources))


def known_candidate(name: str, workload: Workload) -> Candidate:
    """The optimizer of that name, with its grid centred for `workload`."""
    if name not in KNOWN:
        raise UserError(f"--optimizers: unknown optimizer {name!r}; known: {', '.join(KNOWN)}")
    source = optax.adamw if name == BASELINE else getattr(jaxopt_lab, name)
    return candidate(name, KNOWN[name], workload, source)


def user_candidate(spec: str, workload: Workload) -> Candidate:
    """The optimizer `module:function`, where function(learning_rate) takes an optax schedule."""
    option = f"--optimizer-from {spec}"
    module_name, colon, function_name = spec.partition(":")
    if not (module_name and colon and function_name.isidentifier()):
        raise UserError(f"{option}: expected module:function")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:  # the user's module may raise anything while it is imported
        raise UserError(f"{option}: {type(error).__name__}: {one_line(error)}") from error
    if not callable(function):
        raise UserError(f"{option}: not callable: {type(function).__name__}")
    make = cast(MakeOptimizer, function)
    checksum = fingerprint(Path(__file__), make)
    return Candidate(spec, make, workload.learning_rate, "that of AdamW", checksum)


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


def candidates(names: Sequence[str], specs: Sequence[str], workload: Workload) -> list[Candidate]:
    """The contenders in the order asked for; the baseline is added in front if it is missing."""
    names = list(dict.fromkeys(names if BASELINE in names else [BASELINE, *names]))
    found = [known_candidate(name, workload) for name in names]
    found += [user_candidate(spec, workload) for spec in dict.fromkeys(specs)]
    for candidate in found:
        check_candidate(candidate, workload)
    return found


def one_line(error: BaseException) -> str:
    """The first line of the error's message."""
    return (str(error).splitlines() or [""])[0]


def fingerprint(*sources: Callable[..., Any] | Path) -> str:
    """Checksum of code.

    Args:
      sources: a file, a folder for the Python files in it, or a function for the file that defines
        it, where there is such a file.
    """
    checksum = hashlib.sha256()
    for path in itertools.chain.from_iterable(map(_files, sources)):
        checksum.update(path.read_bytes())
    return checksum.hexdigest()[:16]


def _files(source: Callable[..., Any] | Path) -> list[Path]:
    if isinstance(source, Path):
        return sorted(source.glob("*.py")) if source.is_dir() else [source]
    try:
        path = Path(inspect.getsourcefile(inspect.unwrap(source)) or "")
    except TypeError:  # built-in
        return []
    return [path] if path.is_file() else []
