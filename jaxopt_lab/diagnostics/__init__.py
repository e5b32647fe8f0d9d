"""What an optimizer costs in memory, known before anything is allocated."""

from __future__ import annotations

from jaxopt_lab.diagnostics.memory import (
    LeafBytes,
    StateBytes,
    TrainingMemory,
    state_bytes,
    training_memory,
)

__all__ = ["LeafBytes", "StateBytes", "TrainingMemory", "state_bytes", "training_memory"]
