"""The rules and their settings that the table-driven tests run over; one line adds a rule."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping
from typing import Any

import optax

import jaxopt_lab


@dataclasses.dataclass(frozen=True)
class Rule:
    """A ready-made transformation with arguments that exercise it."""

    make: Callable[..., optax.GradientTransformation]
    arguments: Mapping[str, Any]
    note: str = ""
    not_promised: Mapping[str, str] = dataclasses.field(default_factory=dict)  # by this setting

    def __str__(self) -> str:
        return self.make.__name__ + (f"-{self.note}" if self.note else "")

    def __call__(self, **changes: Any) -> optax.GradientTransformation:
        return self.make(**{**self.arguments, **changes})

    @property
    def exceptions(self) -> Mapping[str, str]:
        """What the rule declares, beside itself, not to promise, and what this setting does not."""
        declared = getattr(sys.modules[self.make.__module__], "CONTRACT_EXCEPTIONS", {})
        return {**declared, **self.not_promised}


_DECAY = {"learning_rate": 0.01, "weight_decay": 0.1}

RULES = [
    Rule(jaxopt_lab.adabelief, _DECAY),
    Rule(jaxopt_lab.adabelief, {**_DECAY, "amsgrad": True, "rectify": True}, "rectified"),
    Rule(jaxopt_lab.adamp, _DECAY),
    Rule(jaxopt_lab.badam, {**_DECAY, "update_gap": 2}),
    Rule(jaxopt_lab.dct_adamw, {**_DECAY, "rank": 2, "update_gap": 2}),
    Rule(jaxopt_lab.diffgrad, _DECAY),
    Rule(jaxopt_lab.exadam, _DECAY),
    Rule(
        jaxopt_lab.frugal_adamw,
        {**_DECAY, "density": 0.25, "update_gap": 2},
        # Two rows of eight are kept, which Flax would split over four devices.
        not_promised={"linen_partitioned_sharded": "should evenly divide the shape"},
    ),
    Rule(
        jaxopt_lab.frugal_adamw,
        {
            **_DECAY,
            "density": 0.25,
            "update_gap": 4,
            "projection": jaxopt_lab.subspace.svd("both", "randomized"),
            "on_refresh": "project",
            "stagger": 2,
        },
        "randomized",
        {
            "float32_gradient_1e+19": "a projection sums over a side before it squares",
            "linen_partitioned_sharded": "should evenly divide the shape",
        },
    ),
    Rule(jaxopt_lab.galore_adamw, {**_DECAY, "rank": 2, "update_gap": 2}),
    Rule(jaxopt_lab.lion, _DECAY),
    Rule(jaxopt_lab.muon, _DECAY),
    Rule(jaxopt_lab.sgdp, {**_DECAY, "momentum": 0.9}),
    Rule(jaxopt_lab.clip_coordinates, {"fraction": 0.25}),
    Rule(jaxopt_lab.cautious, {"inner": jaxopt_lab.scale_by_lion()}),
]

# Without the variants and without what is no optimizer by itself.
OPTIMIZERS = [r for r in RULES if not r.note and "learning_rate" in r.arguments]
