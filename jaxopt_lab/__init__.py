"""Optimizers from the papers as optax transformations, checked against their authors' code."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from jaxopt_lab._adam import AdamState
from jaxopt_lab._treatments import LeafTreatment, Treatments, treatments
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
    from jaxopt_lab import adapters, diagnostics, distributed, quantization, schedules, subspace
    from jaxopt_lab.adapters import (
        LoraConfig,
        MissConfig,
        apply_adapters,
        breadcrumbs_merge,
        corda,
        estimate_covariances,
        estimate_gradients,
        factored,
        init_adapters,
        ist,
        lora_ga,
        lora_plus,
        merge_adapters,
        olora,
        perp_labels,
        pissa,
        read_peft_folder,
        task_arithmetic,
        ties_merge,
        unmerge_adapters,
        write_peft_folder,
    )
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
    from jaxopt_lab.schedules import (
        branch_decay,
        current_learning_rate,
        hypergradient,
        inverse_sqrt_schedule,
        record_norms,
        refined_schedule,
        rewarmed_schedule,
        scale_learning_rate,
        uba_schedule,
        wsd_schedule,
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
    "LeafTreatment",
    "LoraConfig",
    "MissConfig",
    "ScaleByAdaBeliefState",
    "ScaleByAdampState",
    "ScaleByDiffgradState",
    "ScaleByExadamState",
    "ScaleByLionState",
    "ScaleByMuonState",
    "ScaleBySgdpState",
    "Treatments",
    "adabelief",
    "adamp",
    "adapters",
    "apply_adapters",
    "apply_updates_compensated",
    "apply_updates_stochastic",
    "badam",
    "branch_decay",
    "breadcrumbs_merge",
    "clip_coordinates",
    "co2",
    "compressed_mean",
    "corda",
    "current_learning_rate",
    "dct_adamw",
    "diagnostics",
    "diffgrad",
    "diloco",
    "distributed",
    "econtrol",
    "ef21",
    "error_feedback",
    "estimate_covariances",
    "estimate_gradients",
    "exadam",
    "factored",
    "frugal",
    "frugal_adamw",
    "galore_adamw",
    "gossip",
    "hierarchical_mean",
    "hypergradient",
    "init_adapters",
    "init_compensation",
    "init_sharded",
    "inverse_sqrt_schedule",
    "ist",
    "lion",
    "local_updates",
    "lora_ga",
    "lora_plus",
    "merge_adapters",
    "muon",
    "muon_dimension_numbers",
    "noloco",
    "olora",
    "one_bit_adam",
    "perp_labels",
    "pissa",
    "powersgd",
    "quantization",
    "quantize_state",
    "read_peft_folder",
    "record_norms",
    "refined_schedule",
    "rewarmed_schedule",
    "scale_by_adabelief",
    "scale_by_adamp",
    "scale_by_diffgrad",
    "scale_by_exadam",
    "scale_by_lion",
    "scale_by_muon",
    "scale_by_one_bit_adam",
    "scale_by_sgdp",
    "scale_learning_rate",
    "schedules",
    "sgdp",
    "state_bytes",
    "state_shardings",
    "subspace",
    "sync_gradients",
    "task_arithmetic",
    "ties_merge",
    "training_memory",
    "treatments",
    "uba_schedule",
    "unmerge_adapters",
    "wire_bytes",
    "write_peft_folder",
    "wsd_schedule",
]

# Folders that are imported when one of their names is first asked for.
_LATER = ("adapters", "diagnostics", "distributed", "quantization", "schedules", "subspace")

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
