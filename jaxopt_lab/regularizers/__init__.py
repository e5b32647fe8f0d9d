"""What is added to a loss, so that the training ends at a network of another kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jaxopt_lab import _unknown
from jaxopt_lab.regularizers.block_ffn import (
    activation_locality_loss,
    adaptive_factor,
    chunk_sparsity,
    chunk_sparsity_loss,
    token_sparsity,
)

__all__ = [
    "activation_locality_loss",
    "adaptive_factor",
    "chunk_sparsity",
    "chunk_sparsity_loss",
    "token_sparsity",
]


if not TYPE_CHECKING:  # a type checker would take every name for granted

    def __getattr__(name: str) -> Any:
        raise _unknown.error(__name__, __all__, name)
