"""Optimizers from the papers as optax transformations, checked against their authors' code."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from jaxopt_lab import _unknown
from jaxopt_lab._adam import AdamState
from jaxopt_lab._treatments import LeafTreatment, Treatments, treatments
from jaxopt_lab.transforms.adabelief import ScaleByAdaBeliefState, adabelief, scale_by_adabelief
from jaxopt_lab.transforms.adamp import ScaleByAdampState, adamp, scale_by_adamp
from jaxopt_lab.transforms.cautious import cautious
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
    # From the file, not the folder: where both have one name, mypy takes the file for the function.
    from jaxopt_lab import (
        adapters,
        diagnostics,
        distributed,
        quantization,
        regularizers,
        schedules,
        subspace,
    )
    from jaxopt_lab.adapters.adapt import (
        apply_adapters,
        init_adapters,
        merge_adapters,
        unmerge_adapters,
    )
    from jaxopt_lab.adapters.breadcrumbs import breadcrumbs_merge
    from jaxopt_lab.adapters.corda import corda
    from jaxopt_lab.adapters.covariances import estimate_covariances
    from jaxopt_lab.adapters.eva import estimate_scatter, eva
    from jaxopt_lab.adapters.factored import factored
    from jaxopt_lab.adapters.files.kohya import read_kohya_file
    from jaxopt_lab.adapters.files.mlx import read_mlx_folder
    from jaxopt_lab.adapters.files.peft import read_peft_folder, write_peft_folder
    from jaxopt_lab.adapters.gradients import estimate_gradients
    from jaxopt_lab.adapters.ist import ist
    from jaxopt_lab.adapters.join import join_adapters
    from jaxopt_lab.adapters.lora import LoraConfig
    from jaxopt_lab.adapters.lora_ga import lora_ga
    from jaxopt_lab.adapters.lora_plus import lora_plus
    from jaxopt_lab.adapters.miss import MissConfig
    from jaxopt_lab.adapters.olora import olora
    from jaxopt_lab.adapters.perp import perp_labels
    from jaxopt_lab.adapters.pissa import pissa
    from jaxopt_lab.adapters.task_arithmetic import task_arithmetic
    from jaxopt_lab.adapters.ties import ties_merge
    from jaxopt_lab.diagnostics.memory import state_bytes, training_memory
    from jaxopt_lab.diagnostics.norms import log_norms, logged_norms
    from jaxopt_lab.distributed.co2 import co2
    from jaxopt_lab.distributed.compressed_mean import compressed_mean, error_feedback
    from jaxopt_lab.distributed.diloco import diloco
    from jaxopt_lab.distributed.econtrol import econtrol
    from jaxopt_lab.distributed.ef21 import ef21
    from jaxopt_lab.distributed.gossip import gossip
    from jaxopt_lab.distributed.hierarchy import hierarchical_mean
    from jaxopt_lab.distributed.local_updates import local_updates
    from jaxopt_lab.distributed.noloco import noloco
    from jaxopt_lab.distributed.one_bit_adam import one_bit_adam, scale_by_one_bit_adam
    from jaxopt_lab.distributed.powersgd import powersgd
    from jaxopt_lab.distributed.sync import sync_gradients
    from jaxopt_lab.distributed.wire import wire_bytes
    from jaxopt_lab.quantization.quantize_state import quantize_state
    from jaxopt_lab.quantization.rounding import (
        apply_updates_compensated,
        apply_updates_stochastic,
        init_compensation,
    )
    from jaxopt_lab.quantization.sharding import init_sharded, state_shardings
    from jaxopt_lab.schedules.batch_size import scale_learning_rate
    from jaxopt_lab.schedules.hypergradient import hypergradient
    from jaxopt_lab.schedules.refined import record_norms, refined_schedule
    from jaxopt_lab.schedules.rewarmed import rewarmed_schedule
    from jaxopt_lab.schedules.tables import current_learning_rate
    from jaxopt_lab.schedules.uba import uba_schedule
    from jaxopt_lab.schedules.warmup_stable_decay import (
        branch_decay,
        inverse_sqrt_schedule,
        wsd_schedule,
    )
    from jaxopt_lab.subspace.badam import badam
    from jaxopt_lab.subspace.dct_adamw import dct_adamw
    from jaxopt_lab.subspace.frugal import FrugalState, frugal
    from jaxopt_lab.subspace.frugal_adamw import frugal_adamw
    from jaxopt_lab.subspace.galore_adamw import galore_adamw

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
    "cautious",
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
    "estimate_scatter",
    "eva",
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
    "join_adapters",
    "lion",
    "local_updates",
    "log_norms",
    "logged_norms",
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
    "read_kohya_file",
    "read_mlx_folder",
    "read_peft_folder",
    "record_norms",
    "refined_schedule",
    "regularizers",
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
_LATER = _unknown.FOLDERS

if not TYPE_CHECKING:  # a type checker would take every name for granted

    def __getattr__(name: str) -> Any:
        if name in _LATER:
            return importlib.import_module(f"{__name__}.{name}")
        if name in __all__:
            for folder in map(__getattr__, _LATER):
                if name in folder.__all__:
                    globals()[name] = getattr(folder, name)
                    return globals()[name]
        raise _unknown.error(__name__, __all__, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
