"""Full fine-tuning and adapters of a pre-trained language model: the methods.

Every method starts from the same weights and draws its batches with a key that depends on the seed
and the step only. The optimizer is Adam without weight decay; it has state for what is trained.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import optax

from experiments.harness import UserError
from experiments.harness.candidates import Candidate, fingerprint
from experiments.harness.workload import Workload, parameter_count
from jaxopt_lab import adapters
from jaxopt_lab.adapters import _kernels, _svd, _targets

BASELINE = "full"
MEMORY_RANK = 8
ALPHA = 16
GAMMA = 16
RATIO = 16
"""How much faster LoRA+ trains `lora_b`."""
SMALL_RATES = 3
"""LoRA and LoRA-GA are also trained at so many rates, of which LoRA-GA's centre is the next."""
ESTIMATION_BATCHES = 8
"""Batches of the new text that LoRA-GA's gradient and CorDA's moments are averaged over."""
_ESTIMATION = 2**31 - 1  # folded into a run's key, where steps are folded in otherwise

Loss = Callable[[Any, Any], jax.Array]
Start = Callable[[Loss, Any, list[Any], Any], adapters.Initializer]
Trained = tuple[adapters.AdapterBase | None, Any]


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to fine-tune.

    Attributes:
      text: what it does, for lists.
      rate: centre of its grid, divided by the size's rate for pre-training.
      config: rank of LoRA -> adapters with as many parameters; None to train all weights.
      start: (loss, weights, batches, config) -> a computed start.
      ratio: LoRA+'s, None for one rate.
      sources: the code that defines it.
    """

    text: str
    rate: float
    config: Callable[[int], adapters.AdapterConfig] | None = None
    start: Start | None = None
    ratio: float | None = None
    sources: tuple[Any, ...] = ()


def rank_stabilised(r: int) -> adapters.AdapterConfig:
    """LoRA on all kernels but the ends of the model, with s = ALPHA / sqrt(r)."""
    return adapters.LoraConfig(target_modules="all-linear", r=r, lora_alpha=ALPHA, use_rslora=True)


def _unit(r: int) -> adapters.AdapterConfig:
    return adapters.LoraConfig(target_modules="all-linear", r=r, lora_alpha=r)


def _blocks(r: int) -> adapters.AdapterConfig:
    # Of a square kernel a block of 2 r rows has as many entries as two factors of rank r.
    return adapters.MissConfig(target_modules="all-linear", r=2 * r)


def _gradient_start(gamma: float) -> Start:
    def start(loss: Loss, params: Any, batches: list[Any], config: Any) -> adapters.Initializer:
        gradients = adapters.estimate_gradients(loss, params, batches, config)
        return adapters.lora_ga(gradients, stable_gamma=gamma)

    return start


def _lora_ga(gamma: float) -> Method:
    return Method(
        f"LoRA from the gradient's singular vectors, the same s, gamma {gamma:g}",
        1 / 3 if gamma < 64 else 1,
        rank_stabilised,
        _gradient_start(gamma),
        sources=(adapters.lora_ga, adapters.estimate_gradients),
    )


def _moment_start(method: Literal["ipm", "kpm"]) -> Start:
    def start(loss: Loss, params: Any, batches: list[Any], config: Any) -> adapters.Initializer:
        return adapters.corda(adapters.estimate_covariances(loss, params, batches, config), method)

    return start


METHODS: dict[str, Method] = {
    BASELINE: Method("all weights", 1),
    "lora": Method(f"LoRA, s = {ALPHA} / sqrt(r)", 1, rank_stabilised),
    "lora-ga": _lora_ga(GAMMA),
    "lora-plus": Method(
        f"LoRA, lora_b {RATIO} times as fast", 1 / 3, rank_stabilised, ratio=RATIO,
        sources=(adapters.lora_plus,),
    ),
    "pissa": Method(
        "the kernels' leading singular triplets, s = 1", 1, _unit, lambda *_: adapters.pissa(),
        sources=(adapters.pissa,),
    ),
    "olora": Method(
        "the kernels' leading rows of a QR decomposition, s = 1", 3, _unit,
        lambda *_: adapters.olora(), sources=(adapters.olora,),
    ),
    "corda": Method(
        "the kernels' leading triplets as the new text weighs them, s = 1", 1 / 3, _unit,
        _moment_start("ipm"), sources=(adapters.corda, adapters.estimate_covariances),
    ),
    "bone": Method("shared shards (MiSS), no factors", 1, _blocks),
}  # fmt: skip


def contenders(names: Sequence[str], workload: Workload) -> list[Candidate]:
    """The methods in the order asked for; full tuning and LoRA are added in front if missing."""
    asked = list(dict.fromkeys([n for n in (BASELINE, "lora") if n not in names] + [*names]))
    return [_contender(name, method_of(name), workload) for name in asked]


def method_of(name: str) -> Method:
    """The method of that name; `lora-ga-GAMMA` is LoRA-GA at another gamma."""
    if name in METHODS:
        return METHODS[name]
    start, _, number = name.rpartition("-")
    known = f"known: {', '.join([*METHODS, 'lora-ga-GAMMA'])}"
    if start != "lora-ga":
        raise UserError(f"--methods: unknown method {name!r}; {known}")
    try:
        gamma = float(number)
    except ValueError:
        gamma = 0.0
    if not 0 < gamma < math.inf:
        raise UserError(f"--methods: {name!r}: expected a positive gamma, such as lora-ga-64")
    return _lora_ga(gamma)


def _contender(name: str, method: Method, workload: Workload) -> Candidate:
    def make(rate: optax.Schedule) -> optax.GradientTransformation:
        if method.ratio is None:
            return optax.adam(rate)
        return adapters.lora_plus(optax.adam, rate, method.ratio)

    shared = (adapters.LoraConfig, adapters.MissConfig, adapters.init_adapters)
    sources = [_kernels.insert, _svd.leading, _targets.choose, *shared, *method.sources]
    files = Path(__file__), Path(__file__).with_name("study.py")
    checksum = fingerprint(*files, *(sources if method.config else ()))
    rate = float(f"{workload.learning_rate * method.rate:.3g}")
    return Candidate(name, make, rate, "pilot runs", checksum)


def run_keys(seed: int) -> jax.Array:
    """The keys of a run: of what is drawn at the start, and of the batches."""
    return jax.random.split(jax.random.key(seed))


def begin(method: Method, rank: int, workload: Workload, params: Any, seed: int) -> Trained:
    """What is not trained, and the first value of what is.

    The batches of a computed start are drawn from the text that is trained on.
    """
    if method.config is None:
        return None, params
    config = method.config(rank)
    start_key, batch_key = run_keys(seed)
    initializer = None
    if method.start is not None:
        keys = jax.random.split(jax.random.fold_in(batch_key, _ESTIMATION), ESTIMATION_BATCHES)
        batches = [workload.sample(workload.data, key) for key in keys]
        initializer = method.start(workload.loss, params, batches, config)
    return adapters.init_adapters(params, config, start_key, init=initializer)


def effective(base: adapters.AdapterBase | None, trained: Any) -> Any:
    """The weights that the model uses."""
    return trained if base is None else adapters.apply_adapters(base, trained)


def trainable(name: str, rank: int, params: Any) -> int:
    """How many parameters a method trains."""
    config = method_of(name).config
    if config is None:
        return parameter_count(params)

    def adapters_of(params: Any) -> Any:
        # LoRA-GA takes twice as many directions, of a gradient that has the shapes of the weights.
        shapes = _kernels.named_leaves(params)
        init = adapters.lora_ga(shapes) if name.startswith("lora-ga") else None
        return adapters.init_adapters(params, config(rank), jax.random.key(0), init=init)[1]

    try:
        found = jax.eval_shape(adapters_of, params)
    except ValueError as error:
        raise UserError(f"--rank {rank}: {error}") from error
    return parameter_count(found)
