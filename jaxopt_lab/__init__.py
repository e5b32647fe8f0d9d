"""Optimizers from the papers as optax transformations, checked against their authors' code."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from jaxopt_lab._adam import AdamState
from jaxopt_lab.transforms.adabelief import ScaleByAdaBeliefState, adabelief, scale_by_adabelief
from jaxopt_lab.transforms.adamp import ScaleByAdampState, adamp, scale_by_adamp
from jaxopt_lab.transforms.clip_coordinates import clip_coordinates
from jaxopt_lab.transforms.diffgrad import ScaleByDiffgradState, diffgrad, scale_by_diffgrad
from jaxopt_lab.transforms.exadam import ScaleByExadamState, exadam, scale_by_exadam
from jaxopt_lab.transforms.lion import ScaleByLionState, lion, scale_by_lion
from jaxopt_lab.transforms.muon import (
    ScaleByMuonState,
    muon,
    muon_dimension_numbers,
    scale_by_muon,
)
from jaxopt_lab.transforms.sgdp import ScaleBySgdpState, scale_by_sgdp, sgdp

if TYPE_CHECKING:
    from jaxopt_lab import diagnostics, distributed, quantization, subspace
    from jaxopt_lab.diagnostics import state_bytes, training_memory
    from jaxopt_lab.distributed import (
        co2,
        compressed_mean,
        diloco,
        econtrol,
        ef21,
        error_feedback,
        gossip,
        hierarchical_mean,
        local_updates,
        noloco,
        one_bit_adam,
        powersgd,
        scale_by_one_bit_adam,
        sync_gradients,
        wire_bytes,
    )
    from jaxopt_lab.quantization import (
        apply_updates_compensated,
        apply_updates_stochastic,
        init_compensation,
        init_sharded,
        quantize_state,
        state_shardings,
    )
    from jaxopt_lab.subspace import (
        FrugalState,
        badam,
        dct_adamw,
        frugal,
        frugal_adamw,
        galore_adamw,
    )

__version__ = "0.1.0"

__all__ = [
    "AdamState",
    "FrugalState",
    "ScaleByAdaBeliefState",
    "ScaleByAdampState",
    "ScaleByDiffgradState",
    "ScaleByExadamState",
    "ScaleByLionState",
    "ScaleByMuonState",
    "ScaleBySgdpState",
    "adabelief",
    "adamp",
    "apply_updates_compensated",
    "apply_updates_stochastic",
    "badam",
    "clip_coordinates",
    "co2",
    "compressed_mean",
    "dct_adamw",
    "diagnostics",
    "diffgrad",
    "diloco",
    "distributed",
    "econtrol",
    "ef21",
    "error_feedback",
    "exadam",
    "frugal",
    "frugal_adamw",
    "galore_adamw",
    "gossip",
    "hierarchical_mean",
    "init_compensation",
    "init_sharded",
    "lion",
    "local_updates",
    "muon",
    "muon_dimension_numbers",
    "noloco",
    "one_bit_adam",
    "powersgd",
    "quantization",
    "quantize_state",
    "scale_by_adabelief",
    "scale_by_adamp",
    "scale_by_diffgrad",
    "scale_by_exadam",
    "scale_by_lion",
    "scale_by_muon",
    "scale_by_one_bit_adam",
    "scale_by_sgdp",
    "sgdp",
    "state_bytes",
    "state_shardings",
    "subspace",
    "sync_gradients",
    "training_memory",
    "wire_bytes",
]

# Folders that are imported when one of their names is first asked for.
_LATER = ("diagnostics", "distributed", "quantization", "subspace")

if not TYPE_CHECKING:  # a type checker would take every name for granted

    def __getattr__(name: str) -> Any:
        if name in _LATER:
            return importlib.import_module(f"{__name__}.{name}")
        if name in __all__:
            for folder in map(__getattr__, _LATER):
                if name in folder.__all__:
                    globals()[name] = getattr(folder, name)
                    return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
