"""How long a step is: learning-rate schedules, rates that adapt, and reading them."""

from typing import TYPE_CHECKING, Any

from jaxopt_lab import _unknown
from jaxopt_lab.schedules.batch_size import scale_learning_rate
from jaxopt_lab.schedules.hypergradient import HypergradientState, hypergradient
from jaxopt_lab.schedules.refined import RecordNormsState, record_norms, refined_schedule
from jaxopt_lab.schedules.rewarmed import rewarmed, rewarmed_schedule
from jaxopt_lab.schedules.tables import as_table, current_learning_rate
from jaxopt_lab.schedules.uba import uba_schedule
from jaxopt_lab.schedules.warmup_stable_decay import (
    branch_decay,
    inverse_sqrt_schedule,
    wsd_schedule,
)

__all__ = [
    "HypergradientState",
    "RecordNormsState",
    "as_table",
    "branch_decay",
    "current_learning_rate",
    "hypergradient",
    "inverse_sqrt_schedule",
    "record_norms",
    "refined_schedule",
    "rewarmed",
    "rewarmed_schedule",
    "scale_learning_rate",
    "uba_schedule",
    "wsd_schedule",
]

if not TYPE_CHECKING:  # a type checker would take every name for granted

    def __getattr__(name: str) -> Any:
        raise _unknown.error(__name__, __all__, name)
