"""What an optimizer costs in memory, known beforehand, and what it does while it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jaxopt_lab import _unknown
from jaxopt_lab.diagnostics.memory import (
    LeafBytes,
    StateBytes,
    TrainingMemory,
    state_bytes,
    training_memory,
)
from jaxopt_lab.diagnostics.norms import LoggedNorms, LogNormsState, log_norms, logged_norms

__all__ = [
    "LeafBytes",
    "LogNormsState",
    "LoggedNorms",
    "StateBytes",
    "TrainingMemory",
    "log_norms",
    "logged_norms",
    "state_bytes",
    "training_memory",
]


if not TYPE_CHECKING:  # a type checker would take every name for granted

    def __getattr__(name: str) -> Any:
        raise _unknown.error(__name__, __all__, name)
