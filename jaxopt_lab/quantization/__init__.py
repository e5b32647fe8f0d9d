"""Compact optimizer state, and bfloat16 parameters that do not lose small updates."""

from typing import TYPE_CHECKING, Any

from jaxopt_lab import _unknown
from jaxopt_lab.quantization._dynamic import dynamic_code
from jaxopt_lab.quantization._leaves import QuantizedState
from jaxopt_lab.quantization.codecs import Codec, bfloat16, int8
from jaxopt_lab.quantization.conversion import decode_state, encode_state
from jaxopt_lab.quantization.fused_step import fused_step
from jaxopt_lab.quantization.quantize_state import quantize_state
from jaxopt_lab.quantization.rounding import (
    apply_updates_compensated,
    apply_updates_stochastic,
    init_compensation,
    stochastic_round,
)
from jaxopt_lab.quantization.sharding import init_sharded, state_shardings

__all__ = [
    "Codec",
    "QuantizedState",
    "apply_updates_compensated",
    "apply_updates_stochastic",
    "bfloat16",
    "decode_state",
    "dynamic_code",
    "encode_state",
    "fused_step",
    "init_compensation",
    "init_sharded",
    "int8",
    "quantize_state",
    "state_shardings",
    "stochastic_round",
]

if not TYPE_CHECKING:  # a type checker would take every name for granted

    def __getattr__(name: str) -> Any:
        raise _unknown.error(__name__, __all__, name)
