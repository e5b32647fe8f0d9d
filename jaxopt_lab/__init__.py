"""Optimizers from the papers as optax transformations, checked against their authors' code."""

from jaxopt_lab.transforms.adabelief import ScaleByAdaBeliefState, adabelief, scale_by_adabelief
from jaxopt_lab.transforms.adamp import ScaleByAdampState, adamp, scale_by_adamp
from jaxopt_lab.transforms.clip_coordinates import clip_coordinates
from jaxopt_lab.transforms.diffgrad import ScaleByDiffgradState, diffgrad, scale_by_diffgrad
from jaxopt_lab.transforms.exadam import ScaleByExadamState, exadam, scale_by_exadam
from jaxopt_lab.transforms.lion import ScaleByLionState, lion, scale_by_lion
from jaxopt_lab.transforms.muon import (
    MuonAdamState,
    ScaleByMuonState,
    muon,
    muon_dimension_numbers,
    scale_by_muon,
)
from jaxopt_lab.transforms.sgdp import ScaleBySgdpState, scale_by_sgdp, sgdp

__version__ = "0.1.0"

__all__ = [
    "MuonAdamState",
    "ScaleByAdaBeliefState",
    "ScaleByAdampState",
    "ScaleByDiffgradState",
    "ScaleByExadamState",
    "ScaleByLionState",
    "ScaleByMuonState",
    "ScaleBySgdpState",
    "adabelief",
    "adamp",
    "clip_coordinates",
    "diffgrad",
    "exadam",
    "lion",
    "muon",
    "muon_dimension_numbers",
    "scale_by_adabelief",
    "scale_by_adamp",
    "scale_by_diffgrad",
    "scale_by_exadam",
    "scale_by_lion",
    "scale_by_muon",
    "scale_by_sgdp",
    "sgdp",
]
