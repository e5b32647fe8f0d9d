"""What is trained: a pure loss with its data on the device, independent of any optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import optax


@dataclass(frozen=True)
class Workload:
    """A training problem as pure functions of parameters and device-resident data.

    Attributes:
      name: short name, for headings and for the folder of the results.
      loss_unit: what one unit of the loss means, for axis labels.
      identity: everything that decides what is trained (sizes, data checksum), for JSON. Results of
        two workloads may be compared only if their identities are equal.
      learning_rate: a good peak rate for `optax.adamw`, centre of its search grid.
      steps: default number of steps of one run.
      data: pytree of arrays that `sample` and `validation_loss` read.
      init: key -> parameters; jitted.
      sample: (data, key) -> one training batch; traced inside the training loop.
      loss: (parameters, batch) -> scalar mean loss.
      validation_loss: (parameters, data) -> scalar mean loss over fixed held-out examples.
    """

    name: str
    loss_unit: str
    identity: Mapping[str, Any]
    learning_rate: float
    steps: int
    data: Any
    init: Callable[[jax.Array], optax.Params]
    sample: Callable[[Any, jax.Array], Any]
    loss: Callable[[optax.Params, Any], jax.Array]
    validation_loss: Callable[[optax.Params, Any], jax.Array]


def parameter_count(params: optax.Params) -> int:
    """Number of array elements in `params` (arrays or shape structs)."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
