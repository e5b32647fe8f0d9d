"""Which parameters there are to train: adapters and how they start, and merging models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jaxopt_lab import _unknown
from jaxopt_lab.adapters._targets import FLAX_KERNELS
from jaxopt_lab.adapters.adapt import (
    AdapterBase,
    AdapterConfig,
    Initializer,
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
from jaxopt_lab.adapters.ist import IstState, ist
from jaxopt_lab.adapters.join import join_adapters
from jaxopt_lab.adapters.lora import LoraConfig
from jaxopt_lab.adapters.lora_ga import lora_ga
from jaxopt_lab.adapters.lora_plus import lora_plus, lora_plus_labels
from jaxopt_lab.adapters.miss import MissConfig
from jaxopt_lab.adapters.olora import olora
from jaxopt_lab.adapters.perp import PerpConfig, perp_labels
from jaxopt_lab.adapters.pissa import pissa
from jaxopt_lab.adapters.plain import to_plain_lora
from jaxopt_lab.adapters.task_arithmetic import task_arithmetic, task_vector
from jaxopt_lab.adapters.ties import ties_merge
from jaxopt_lab.adapters.trainable import TrainableParameters, trainable_parameters

__all__ = [
    "FLAX_KERNELS",
    "AdapterBase",
    "AdapterConfig",
    "Initializer",
    "IstState",
    "LoraConfig",
    "MissConfig",
    "PerpConfig",
    "TrainableParameters",
    "apply_adapters",
    "breadcrumbs_merge",
    "corda",
    "estimate_covariances",
    "estimate_gradients",
    "estimate_scatter",
    "eva",
    "factored",
    "init_adapters",
    "ist",
    "join_adapters",
    "lora_ga",
    "lora_plus",
    "lora_plus_labels",
    "merge_adapters",
    "olora",
    "perp_labels",
    "pissa",
    "read_kohya_file",
    "read_mlx_folder",
    "read_peft_folder",
    "task_arithmetic",
    "task_vector",
    "ties_merge",
    "to_plain_lora",
    "trainable_parameters",
    "unmerge_adapters",
    "write_peft_folder",
]

if not TYPE_CHECKING:  # a type checker would take every name for granted

    def __getattr__(name: str) -> Any:
        raise _unknown.error(__name__, __all__, name)
