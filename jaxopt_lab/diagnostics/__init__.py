"""What an optimizer costs in memory, known beforehand, and what it does while it runs."""

from __future__ import annotations

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
