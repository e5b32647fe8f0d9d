"""Pre-training, the training loop of fine-tuning, and the study that runs it for every method."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.finetune.methods import (
    BASELINE,
    MEMORY_RANK,
    SMALL_RATES,
    Method,
    Trained,
    begin,
    effective,
    method_of,
    rank_stabilised,
    run_keys,
)
from experiments.harness import EVALUATIONS, UserError, training
from experiments.harness.candidates import GRID_SPACING, Candidate, baseline
from experiments.harness.progress import Progress
from experiments.harness.runs import Run
from experiments.harness.store import Store, read_tree, write_tree
from experiments.harness.study import Study
from experiments.harness.training import TrainLoop, TrainState, unit_schedule
from experiments.harness.workload import Workload, parameter_count
from experiments.workloads.language_model import SIZES, workload_of_tokens
from jaxopt_lab import adapters

_effective = jax.jit(effective)


@dataclasses.dataclass(frozen=True)
class State:
    """A run: what the loop carries, and the base, which stays."""

    loop: TrainState  # its `params` are what is trained
    base: adapters.AdapterBase | None

    @property
    def params(self) -> Any:
        return _effective(self.base, self.loop.params)


class FineTuneLoop:
    """One method's compiled training loop, for any peak rate and seed.

    Args:
      workload: the new text.
      method: what is trained.
      rank: of LoRA.
      make: schedule -> transformation.
      steps: length of a run, a multiple of `EVALUATIONS`; the schedule spans it.
      pretrained: the weights to start from.
    """

    def __init__(
        self,
        workload: Workload,
        method: Method,
        rank: int,
        make: Callable[[optax.Schedule], optax.GradientTransformation],
        steps: int,
        pretrained: Any,
    ):
        self.workload, self.steps, self.chunk_steps = workload, steps, steps // EVALUATIONS
        self._method, self._rank, self._pretrained = method, rank, pretrained
        self._begun: dict[int, Trained] = {}
        unit = unit_schedule(steps)

        def optimizer(peak: jax.Array) -> optax.GradientTransformation:
            return make(lambda count: peak * unit(count))

        def run_chunk(
            state: TrainState, base: Any, peak: jax.Array, key: jax.Array, data: Any
        ) -> tuple[TrainState, jax.Array]:
            tx = optimizer(peak)

            def one_step(state: TrainState, _: None) -> tuple[TrainState, jax.Array]:
                batch = workload.sample(data, jax.random.fold_in(key, state.step))

                def loss(trained: Any) -> jax.Array:
                    return workload.loss(effective(base, trained), batch)

                value, grads = jax.value_and_grad(loss)(state.params)
                updates, opt_state = tx.update(grads, state.opt_state, state.params)
                params = optax.apply_updates(state.params, updates)
                return TrainState(state.step + 1, params, opt_state), value

            state, losses = jax.lax.scan(one_step, state, length=self.chunk_steps)
            return state, losses.mean()

        self._init = jax.jit(lambda peak, trained: optimizer(peak).init(trained))
        state = self.start(0.0, 0)
        self.state_bytes_per_parameter = tree_bytes(state.loop.opt_state) / parameter_count(
            pretrained
        )
        arguments = state.loop, state.base, jnp.float32(0), run_keys(0)[1], workload.data
        self._run_chunk = jax.jit(run_chunk, donate_argnums=0).lower(*arguments).compile()

    def start(self, peak: float, seed: int) -> State:
        """The pre-trained weights with fresh adapters and optimizer state."""
        base, first = self._begin(seed)
        trained = jax.tree.map(jnp.copy, first)  # the loop consumes it
        state = TrainState(jnp.zeros([], jnp.int32), trained, self._init(jnp.float32(peak), first))
        return State(jax.block_until_ready(state), base)

    def run_chunk(self, state: State, peak: float, seed: int) -> tuple[State, jax.Array]:
        """Trains for `chunk_steps`, consuming `state`; returns it with the mean training loss."""
        key = run_keys(seed)[1]
        after, loss = self._run_chunk(
            state.loop, state.base, jnp.float32(peak), key, self.workload.data
        )
        return State(after, state.base), loss

    def _begin(self, seed: int) -> Trained:
        if seed not in self._begun:
            self._begun[seed] = begin(
                self._method, self._rank, self.workload, self._pretrained, seed
            )
        return self._begun[seed]


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays, or of what they would be."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def pretrain(
    workload: Workload, steps: int, path: Path, progress: Progress
) -> tuple[Any, dict[str, Any]]:
    """AdamW from scratch, kept in `path` after each twentieth of the steps, from where it goes on.

    Returns:
      The weights, and the validation losses with their steps.
    """
    adamw = baseline(workload)
    peak = adamw.learning_rate
    params = jax.eval_shape(workload.init, jax.random.key(0))
    opt_state = jax.eval_shape(
        optax.with_extra_args_support(adamw.make(lambda count: jnp.float32(peak))).init, params
    )
    step: Any = jax.ShapeDtypeStruct((), jnp.int32)
    kept = read_tree(path, TrainState(step, params, opt_state))
    state, curve = kept or (None, {"steps": [], "validation_loss": []})
    found = curve["steps"][-1] if curve["steps"] else 0
    progress.skip(found)
    progress.found_again(found, steps, "steps of pre-training")
    if not curve["steps"] or curve["steps"][-1] < steps:
        progress.note("pre-training: compiling")
        loop = TrainLoop(workload, adamw.make, steps)
        validation_loss = jax.jit(workload.validation_loss)
        state = loop.start(peak, 0) if state is None else state
        while int(state.step) < steps:
            state, _ = loop.run_chunk(state, peak, 0)
            loss = float(validation_loss(state.params, workload.data))
            if not np.isfinite(loss):
                raise UserError("pre-training diverged; choose another --pretrain-text or size")
            curve["steps"].append(int(state.step))
            curve["validation_loss"].append(loss)
            write_tree(path, state, curve)
            progress.advance(loop.chunk_steps, f"pre-training: {loss:.3f}")
        progress.line(f"pre-trained for {steps} steps: {curve['validation_loss'][-1]:.4f}")
    assert state is not None
    return jax.tree.map(jnp.asarray, state.params), {"learning_rate": peak, **curve}


class FineTuneStudy(Study):
    """Pre-training, then search and seeds of every method.

    Args:
      first: the text of the pre-training.
      workload: the new text.
      candidates: the contenders.
      store: where finished runs are kept.
      pretrain_steps: length of the pre-training.
      steps: length of every fine-tuning run.
      rank: of LoRA.
      rates: number of learning rates tried for each, with seed 0.
      seeds: number of seeds at each one's best rate.
    """

    baseline = BASELINE

    def __init__(
        self,
        first: Workload,
        workload: Workload,
        candidates: Sequence[Candidate],
        store: Store,
        *,
        pretrain_steps: int,
        steps: int,
        rank: int,
        rates: int,
        seeds: int,
    ):
        super().__init__(workload, candidates, store, steps=steps, rates=rates, seeds=seeds)
        self.first, self.pretrain_steps, self.rank = first, pretrain_steps, rank
        self.pretrained: Any = None
        self.pretraining: dict[str, Any] = {}

    @property
    def total_steps(self) -> int:
        return self.pretrain_steps + super().total_steps + len(self._small()) * self.steps

    @property
    def before(self) -> tuple[float, float]:
        """Losses of the pre-trained model on the new text and on the first."""
        new, first = (
            float(self._validation_loss(self.pretrained, workload.data))
            for workload in (self.workload, self.first)
        )
        return new, first

    def run(self, progress: Progress) -> dict[str, list[Run]]:
        """Makes the runs that are missing; returns all runs of each method, search first."""
        self.pretrained, self.pretraining = pretrain(
            self.first, self.pretrain_steps, self.store.out / "pretrained.npz", progress
        )
        return super().run(progress)

    def small_rates(self, progress: Progress) -> dict[str, list[Run]]:
        """LoRA and LoRA-GA at equal rates below those of the search, with seed 0."""
        runs: dict[str, list[Run]] = {}
        for candidate, rate in self._small():
            runs.setdefault(candidate.name, []).append(self._run(candidate, rate, 0, progress))
        return runs

    def _small(self) -> list[tuple[Candidate, float]]:
        by_name = {c.name: c for c in self.candidates}
        if "lora-ga" not in by_name:
            return []
        centre = by_name["lora-ga"].learning_rate
        rates = [float(f"{centre / GRID_SPACING**n:.3g}") for n in range(SMALL_RATES, 0, -1)]
        pairs = [(by_name[name], rate) for name in ("lora", "lora-ga") for rate in rates]
        return [(c, rate) for c, rate in pairs if rate not in c.grid(self.rates)]

    def memory(self, size: str, progress: Progress) -> dict[str, Any] | None:
        """Bytes of one step at another size, by what is trained; compiled and not run."""
        if size == "none":
            return None
        key = f"memory-{size}"
        if key not in self.store:
            progress.note(f"compiling steps of size {size}")
            vocabulary = self.workload.identity["vocabulary"]
            self.store.save(
                key, {"size": size, "rank": MEMORY_RANK} | step_memory(size, vocabulary)
            )
            progress.line(f"compiled the steps of size {size}")
        return self.store.load(key)

    def _make_loop(self, candidate: Candidate) -> FineTuneLoop:
        method = method_of(candidate.name)
        return FineTuneLoop(
            self.workload, method, self.rank, candidate.make, self.steps, self.pretrained
        )

    def _train(
        self, loop: Any, rate: float, seed: int, on_chunk: Callable[[int, float], None]
    ) -> dict[str, Any]:
        """The fields of `training.train`, and beside its losses those on the first text.

        `moved` is the distance of all weights from the pre-trained ones.
        """
        others: dict[str, list[float | None]] = {"first_loss": [], "moved": []}

        def evaluate(state: State) -> float:
            params = state.params
            found = (
                self._validation_loss(params, self.first.data),
                _distance(params, self.pretrained),
            )
            for name, value in zip(others, map(float, found)):
                others[name].append(value if np.isfinite(value) else None)
            return float(self._validation_loss(params, self.workload.data))

        curve, _ = training.train(loop, self.steps, evaluate, rate, seed, on_chunk)
        return {**curve, **others}


def step_memory(size: str, vocabulary: int) -> dict[str, Any]:
    """Bytes of a training step on this device: full tuning, LoRA, and LoRA with `factored`."""
    shape = SIZES[size]
    # The text only has to be long enough to be cut into windows.
    tokens = np.zeros(20 * (shape.context + 1), np.int32)
    workload = workload_of_tokens(size, tokens, vocabulary, "", "memory")
    config = rank_stabilised(MEMORY_RANK)
    key = jax.random.key(0)
    params = jax.eval_shape(workload.init, key)
    base, factors = jax.eval_shape(lambda p: adapters.init_adapters(p, config, key), params)
    by_product = adapters.factored(workload.loss)
    ways: dict[str, tuple[Any, Any, Callable[[Any, Any, Any], jax.Array]]] = {
        "full": (None, params, lambda base, trained, batch: workload.loss(trained, batch)),
        "lora": (base, factors, lambda base, trained, batch: workload.loss(
            adapters.apply_adapters(base, trained), batch)),
        "lora-factored": (base, factors, by_product),
    }  # fmt: skip
    batch = jax.ShapeDtypeStruct((shape.batch_size, shape.context + 1), jnp.int32)
    tx = optax.adam(1e-3)
    steps = {}
    for name, (base, trained, loss) in ways.items():

        def step(state: Any, base: Any, batch: Any, loss: Any = loss) -> Any:
            trained, opt_state = state
            grads = jax.grad(lambda trained: loss(base, trained, batch))(trained)
            updates, opt_state = tx.update(grads, opt_state)
            return optax.apply_updates(trained, updates), opt_state

        opt_state = jax.eval_shape(tx.init, trained)
        lowered = jax.jit(step, donate_argnums=0).lower((trained, opt_state), base, batch)
        found: Any = lowered.compile().memory_analysis()
        steps[name] = {
            "trained": parameter_count(trained),
            "state_bytes": tree_bytes(opt_state),
            "temporary_bytes": found.temp_size_in_bytes,
            "argument_bytes": found.argument_size_in_bytes,
        }
    return {"batch_size": shape.batch_size, "context": shape.context, "steps": steps}


@jax.jit
def _distance(params: Any, others: Any) -> jax.Array:
    return optax.tree.norm(optax.tree.sub(params, others))
