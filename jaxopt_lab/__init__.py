"""Optimizers from the papers as optax transformations, checked against their authors' code."""

from jaxopt_lab import diagnostics, quantization, subspace
from jaxopt_lab._adam import AdamState
from jaxopt_lab.diagnostics.memory import state_bytes, training_memory
from jaxopt_lab.quantization.quantize_state import quantize_state
from jaxopt_lab.quantization.rounding import (
    apply_updates_compensated,
    apply_updates_stochastic,
    init_compensation,
)
from jaxopt_lab.quantization.sharding import init_sharded, state_shardings
from jaxopt_lab.subspace.badam import badam
from jaxopt_lab.subspace.dct_adamw import dct_adamw
from jaxopt_lab.subspace.frugal import FrugalState, frugal
from jaxopt_lab.subspace.frugal_adamw import frugal_adamw
from jaxopt_lab.subspace.galore_adamw import galore_adamw
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
    "dct_adamw",
    "diagnostics",
    "diffgrad",
    "exadam",
    "frugal",
    "frugal_adamw",
    "galore_adamw",
    "init_compensation",
    "init_sharded",
    "lion",
    "muon",
    "muon_dimension_numbers",
    "quantization",
    "quantize_state",
    "scale_by_adabelief",
    "scale_by_adamp",
    "scale_by_diffgrad",
    "scale_by_exadam",
    "scale_by_lion",
    "scale_by_muon",
    "scale_by_sgdp",
    "sgdp",
    "state_bytes",
    "state_shardings",
    "subspace",
    "training_memory",
]
