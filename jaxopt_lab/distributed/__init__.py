"""Training over slow links: how replicas agree on a gradient or on their weights."""

from typing import TYPE_CHECKING, Any

from jaxopt_lab import _unknown
from jaxopt_lab.distributed._axes import vary
from jaxopt_lab.distributed.apply_if_finite import ApplyIfFiniteState, apply_if_finite
from jaxopt_lab.distributed.co2 import Co2State, co2, co2_exchange, gap_aware
from jaxopt_lab.distributed.compressed_mean import (
    CompressedMeanState,
    ErrorFeedbackState,
    compressed_mean,
    error_feedback,
)
from jaxopt_lab.distributed.compressors import Compressor, identity, random_k, top_k
from jaxopt_lab.distributed.diloco import DilocoState, diloco, diloco_exchange
from jaxopt_lab.distributed.econtrol import EControlState, econtrol
from jaxopt_lab.distributed.ef21 import EF21State, ef21
from jaxopt_lab.distributed.gossip import GossipState, gossip, gossip_average, gossip_exchange
from jaxopt_lab.distributed.hierarchy import HierarchicalMeanState, hierarchical_mean
from jaxopt_lab.distributed.local_updates import Exchange, LocalUpdatesState, local_updates
from jaxopt_lab.distributed.noloco import (
    NolocoState,
    largest_stable_gamma,
    noloco,
    noloco_exchange,
)
from jaxopt_lab.distributed.one_bit_adam import (
    ScaleByOneBitAdamState,
    one_bit_adam,
    scale_by_one_bit_adam,
)
from jaxopt_lab.distributed.powersgd import PowerSGDState, powersgd
from jaxopt_lab.distributed.quantizers import sign, stochastic_int4, stochastic_int8
from jaxopt_lab.distributed.replicas import (
    MutableTrainState,
    Replicas,
    TrainState,
    device_replicas,
    simulated_replicas,
)
from jaxopt_lab.distributed.sync import sync_gradients
from jaxopt_lab.distributed.train_rounds import TrainRounds, train_rounds
from jaxopt_lab.distributed.wire import Collective, WireBytes, compiled_collectives, wire_bytes

__all__ = [
    "ApplyIfFiniteState",
    "Co2State",
    "Collective",
    "CompressedMeanState",
    "Compressor",
    "DilocoState",
    "EControlState",
    "EF21State",
    "ErrorFeedbackState",
    "Exchange",
    "GossipState",
    "HierarchicalMeanState",
    "LocalUpdatesState",
    "MutableTrainState",
    "NolocoState",
    "PowerSGDState",
    "Replicas",
    "ScaleByOneBitAdamState",
    "TrainRounds",
    "TrainState",
    "WireBytes",
    "apply_if_finite",
    "co2",
    "co2_exchange",
    "compiled_collectives",
    "compressed_mean",
    "device_replicas",
    "diloco",
    "diloco_exchange",
    "econtrol",
    "ef21",
    "error_feedback",
    "gap_aware",
    "gossip",
    "gossip_average",
    "gossip_exchange",
    "hierarchical_mean",
    "identity",
    "largest_stable_gamma",
    "local_updates",
    "noloco",
    "noloco_exchange",
    "one_bit_adam",
    "powersgd",
    "random_k",
    "scale_by_one_bit_adam",
    "sign",
    "simulated_replicas",
    "stochastic_int4",
    "stochastic_int8",
    "sync_gradients",
    "top_k",
    "train_rounds",
    "vary",
    "wire_bytes",
]

if not TYPE_CHECKING:  # a type checker would take every name for granted

    def __getattr__(name: str) -> Any:
        raise _unknown.error(__name__, __all__, name)
