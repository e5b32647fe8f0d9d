"""How replicas of the language model agree: the methods, their text, and what they send."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import jaxopt_lab
from experiments.harness import EVALUATIONS, UserError
from experiments.harness.candidates import Candidate, Known, candidate
from experiments.harness.workload import Workload
from jaxopt_lab import distributed

AXIS = "replica"
BASELINE = "sync"
FREEZE_SHARE = 0.2
"""The share of the steps after which one-bit Adam freezes its second moment."""
DILOCO_MOMENTUM = 0.5
"""Of DiLoCo's outer step. With its default of 0.9 runs of 10 and of 30 rounds end higher."""
WARM_RATE_FACTOR = 1 / 3
"""The centre of every grid after a warm start, divided by that of training from scratch."""
WARM_FILE = "warm_start.npz"

Make = Callable[["Setting", dict[str, Any]], optax.GradientTransformation]


class Setting(NamedTuple):
    """What the methods are made for."""

    steps: int
    replicas: int
    sync_every: int  # local steps in a round
    warm_start: int = 0  # synchronous steps before the first

    @property
    def freeze_step(self) -> int:
        """The steps of one-bit Adam's warm-up."""
        return max(1, round(FREEZE_SHARE * self.steps))

    @property
    def timed_steps(self) -> int:
        """Whole chunks of steps that are whole rounds, or a run if that is less."""
        chunk = self.steps // EVALUATIONS
        return min(math.lcm(chunk, self.sync_every), self.steps)


@dataclasses.dataclass(frozen=True)
class Method:
    """A way for replicas to agree.

    Attributes:
      make: (setting, AdamW's arguments) -> transformation.
      text: what it does, for lists.
      peaks: (setting, step) -> how many of the first steps send as much as any step does.
      overlaps: whether a round's exchange may run beside the next round's steps.
    """

    make: Make
    text: str
    peaks: Callable[[Setting, Any], Any] = lambda setting, step: step
    overlaps: bool = False


def _after(agree: Callable[[], optax.GradientTransformation]) -> Make:
    return lambda setting, given: optax.chain(agree(), optax.adamw(**given))


def _local(method: Callable[..., optax.GradientTransformation]) -> Make:
    return lambda setting, given: method(
        optax.adamw(**given), sync_every=setting.sync_every, axis_name=AXIS
    )


def _rounds(setting: Setting, step: Any) -> Any:
    return step // setting.sync_every


def _one_bit_adam(setting: Setting, given: dict[str, Any]) -> optax.GradientTransformation:
    # With bias correction its warm-up is AdamW.
    return distributed.one_bit_adam(
        freeze_step=setting.freeze_step, axis_name=AXIS, bias_correction=True, **given
    )


def _diloco(inner: optax.GradientTransformation, **given: Any) -> optax.GradientTransformation:
    outer = optax.sgd(0.7, momentum=DILOCO_MOMENTUM, nesterov=True)
    return distributed.diloco(inner, outer, **given)


METHODS: dict[str, Method] = {
    BASELINE: Method(
        _after(lambda: distributed.sync_gradients(AXIS)),
        "AdamW on the mean of all gradients, each step",
    ),
    "one-bit-adam": Method(
        _one_bit_adam,
        "signs of the momentum each step, after a warm-up as AdamW",
        lambda setting, step: np.minimum(step, setting.freeze_step),
    ),
    "ef21-top1": Method(
        _after(lambda: distributed.ef21(distributed.top_k(0.01), AXIS)),
        "EF21: the largest 1% of each gradient's change, then AdamW",
    ),
    "ef-int8": Method(
        _after(
            lambda: distributed.error_feedback(distributed.stochastic_int8(), AXIS, two_phase=True)
        ),
        "error feedback: gradients in int8, both ways, then AdamW",
    ),
    "diloco": Method(
        _local(_diloco),
        "AdamW on its own, an outer step on the mean each round",
        _rounds,
    ),
    "noloco": Method(
        _local(distributed.noloco), "AdamW on its own, an outer step with a partner", _rounds
    ),
    "co2": Method(
        _local(distributed.co2), "AdamW on its own, an outer step one round late", _rounds, True
    ),
    "gossip": Method(
        _local(distributed.gossip), "AdamW on its own, an average with a partner", _rounds
    ),
}


def sent_after(name: str, setting: Setting, wire: distributed.WireBytes, step: Any) -> Any:
    """Bytes that one replica has sent after so many steps."""
    return step * wire.least + METHODS[name].peaks(setting, step) * (wire.peak - wire.least)


def contenders(names: Sequence[str], setting: Setting, workload: Workload) -> list[Candidate]:
    """The methods in the order asked for; the synchronous one is added in front if missing."""
    names = list(dict.fromkeys(names if BASELINE in names else [BASELINE, *names]))
    for name in names:
        if name not in METHODS:
            raise UserError(f"--methods: unknown method {name!r}; known: {', '.join(METHODS)}")
    if setting.warm_start:
        rate = workload.learning_rate * WARM_RATE_FACTOR
        workload = dataclasses.replace(workload, learning_rate=rate)
    lab = Path(jaxopt_lab.__file__).parent
    files = Path(__file__), Path(__file__).with_name("study.py")
    sources = (*files, lab / "distributed", *sorted(lab.glob("_*.py")))

    def known(name: str) -> Known:
        def make(rate: optax.Schedule, decay: float, mask: Any) -> optax.GradientTransformation:
            given = {"learning_rate": rate, "weight_decay": decay, "mask": mask}
            return METHODS[name].make(setting, given)

        return Known(make, 1, "that of AdamW")

    return [candidate(name, known(name), workload, *sources) for name in names]


def shards(workload: Workload, replicas: int) -> np.ndarray:
    """The training text in contiguous slices of equal length, one a replica."""
    tokens, context = np.asarray(workload.data["train"]), workload.identity["context"]
    length = len(tokens) // replicas
    if length <= context + 1:
        raise UserError(
            f"--replicas {replicas}: a replica's slice of the text has {length} characters; "
            f"expected more than the context of {context}"
        )
    return tokens[: replicas * length].reshape(replicas, length)


def sent(
    setting: Setting,
    make: Callable[[optax.Schedule], optax.GradientTransformation],
    workload: Workload,
) -> distributed.WireBytes:
    """What one replica sends in one step, counted in the traced step."""
    tx = optax.with_extra_args_support(make(optax.constant_schedule(1e-3)))

    def step(params: optax.Params, data: Any, key: jax.Array) -> Any:
        grads = jax.grad(workload.loss)(params, workload.sample(data, key))
        return tx.update(grads, tx.init(params), params)

    key = jax.random.key(0)
    params = jax.eval_shape(workload.init, key)
    sizes = {AXIS: setting.replicas}
    return distributed.wire_bytes(step, params, workload.data, key, axis_sizes=sizes)
