"""How each method is made, in full."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.finetune.methods import method_of
from experiments.harness.calls import call_text
from experiments.harness.candidates import Candidate


def calls(candidates: Sequence[Candidate], rank: int) -> dict[str, str]:
    """What each method trains, its adapters with every default, and its optimizer."""
    return {candidate.name: _call(candidate, rank) for candidate in candidates}


def _call(candidate: Candidate, rank: int) -> str:
    method = method_of(candidate.name)
    adapter = [] if method.config is None else [repr(method.config(rank))]
    return "; ".join([method.text, *adapter, call_text(candidate.make)])
