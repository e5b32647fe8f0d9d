"""Which part of a gradient gets optimizer state: projections, and FRUGAL's splitting."""

from typing import TYPE_CHECKING, Any

from jaxopt_lab import _unknown
from jaxopt_lab.subspace._layers import by_layer
from jaxopt_lab.subspace.badam import badam
from jaxopt_lab.subspace.blocks import blocks
from jaxopt_lab.subspace.columns import columns, entries
from jaxopt_lab.subspace.dct import dct
from jaxopt_lab.subspace.dct_adamw import dct_adamw
from jaxopt_lab.subspace.frugal import FrugalState, frugal
from jaxopt_lab.subspace.frugal_adamw import frugal_adamw
from jaxopt_lab.subspace.galore_adamw import galore_adamw
from jaxopt_lab.subspace.projections import Projection
from jaxopt_lab.subspace.svd import svd
from jaxopt_lab.subspace.treatments import Treatment, treatments

__all__ = [
    "FrugalState",
    "Projection",
    "Treatment",
    "badam",
    "blocks",
    "by_layer",
    "columns",
    "dct",
    "dct_adamw",
    "entries",
    "frugal",
    "frugal_adamw",
    "galore_adamw",
    "svd",
    "treatments",
]

if not TYPE_CHECKING:  # a type checker would take every name for granted

    def __getattr__(name: str) -> Any:
        raise _unknown.error(__name__, __all__, name)
