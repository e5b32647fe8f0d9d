"""The optimizers by name, each with the centre of its learning-rate grid and where it is from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import optax

import jaxopt_lab
from experiments.harness import UserError
from experiments.harness.candidates import (
    ADAMW,
    BASELINE,
    Candidate,
    Known,
    MakeOptimizer,
    baseline,
    candidate,
    check_candidate,
    fingerprint,
    with_decay,
)
from experiments.harness.own import function_of
from experiments.harness.workload import Workload


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


METHODS: dict[str, Known] = {
    BASELINE: ADAMW,
    "lion": Known(
        with_decay(jaxopt_lab.lion),
        1 / 3,
        "its authors: 3 to 10 times below AdamW, decay as much above",
    ),
    "adabelief": Known(with_decay(jaxopt_lab.adabelief), 1, "its authors: Adam's rate"),
    "adamp": Known(with_decay(jaxopt_lab.adamp), 1, "its authors: Adam's rate"),
    "muon": Known(
        _muon, 3, "Jordan's 0.02, in Moonlight's scaling: 2 to 4 times AdamW's rate at these widths"
    ),
    "sgdp": Known(_sgdp, 100, "its authors' examples: 0.1, against 0.001 for AdamP"),
    "exadam": Known(
        with_decay(jaxopt_lab.exadam),
        0.2,
        "a direction up to twice Adam's, a step that grows like log t",
    ),
    "diffgrad": Known(_diffgrad, 2, "its friction is close to 1/2 where gradients are small"),
}


def contenders(names: Sequence[str], specs: Sequence[str], workload: Workload) -> list[Candidate]:
    """The contenders in the order asked for; the baseline is added in front if it is missing.

    Args:
      names: of `METHODS`.
      specs: the user's own, module:function.
      workload: what they train.
    """
    names = list(dict.fromkeys(names if BASELINE in names else [BASELINE, *names]))
    found = [_known(name, workload) for name in names]
    found += [_own(spec, workload) for spec in dict.fromkeys(specs)]
    for one in found:
        check_candidate(one, workload)
    return found


def _known(name: str, workload: Workload) -> Candidate:
    if name == BASELINE:
        return baseline(workload)
    if name not in METHODS:
        raise UserError(f"--optimizers: unknown optimizer {name!r}; known: {', '.join(METHODS)}")
    source = getattr(jaxopt_lab, name)
    return candidate(name, METHODS[name], workload, Path(__file__), source)


def _own(spec: str, workload: Workload) -> Candidate:
    """The optimizer `module:function`, where function(learning_rate) takes an optax schedule."""
    make = cast(MakeOptimizer, function_of(spec, "--optimizer-from"))
    checksum = fingerprint(Path(__file__), make)
    return Candidate(spec, make, workload.learning_rate, "that of AdamW", checksum)
