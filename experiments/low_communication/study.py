"""The training loop of replicas, and the study that runs it for every method.

A replica draws its batches from its own slice of the text, with a key that depends on the seed, the
step and the replica only: every method sees the same batches.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.harness import EVALUATIONS, UserError, training
from experiments.harness.candidates import Candidate
from experiments.harness.progress import Progress
from experiments.harness.runs import Run
from experiments.harness.store import Store, read_tree, write_tree
from experiments.harness.study import Study
from experiments.harness.training import unit_schedule
from experiments.harness.workload import Workload, parameter_count
from experiments.low_communication.methods import (
    BASELINE,
    WARM_FILE,
    Setting,
    contenders,
    sent,
    shards,
)
from jaxopt_lab import distributed
from jaxopt_lab.distributed.replicas import shared_counters


class State(NamedTuple):
    """What one step of all replicas carries to the next."""

    step: int  # steps taken
    replicas: distributed.TrainState

    @property
    def params(self) -> Any:
        return self.replicas.params


class ReplicaLoop:
    """One method's compiled training loop for all replicas, for any peak rate and seed.

    Args:
      workload: what is trained.
      make: schedule -> transformation.
      setting: the run's length and the number of replicas.
      replicas: those of devices, or simulated.
      slices: each replica's text.
    """

    def __init__(
        self,
        workload: Workload,
        make: Callable[[optax.Schedule], optax.GradientTransformation],
        setting: Setting,
        replicas: distributed.Replicas,
        slices: np.ndarray,
    ):
        self.workload, self.setting, self.replicas = workload, setting, replicas
        self.steps, self.chunk_steps = setting.steps, setting.steps // EVALUATIONS
        local = list(replicas.local)
        self._data = replicas.shard((slices[local], np.asarray(local, np.int32)))
        unit = unit_schedule(setting.steps)
        self._tx = make(unit)

        def run_chunk(state: Any, data: Any, first: Any, peak: Any, seed: Any) -> Any:
            key = jax.random.split(jax.random.key(seed))[1]
            tx = make(lambda count: peak * unit(count))

            def one_step(state: Any, step: jax.Array) -> tuple[Any, jax.Array]:
                def loss(params: optax.Params, own: Any) -> jax.Array:
                    tokens, replica = own
                    # Counted from the warm start's first: no batch of it comes again.
                    counted = setting.warm_start + step
                    of_step = jax.random.fold_in(jax.random.fold_in(key, counted), replica)
                    return workload.loss(params, workload.sample({"train": tokens}, of_step))

                state, losses = replicas.train_step(loss, tx)(state, data)
                return state, losses.mean()

            state, losses = jax.lax.scan(one_step, state, first + jnp.arange(self.chunk_steps))
            return state, losses.mean()

        state = self.start(0.0, 0)
        self.state_bytes_per_parameter = sum(
            leaf.nbytes for leaf in jax.tree.leaves(state.replicas.opt_state)
        ) / parameter_count(state.params)
        arguments = self._data, np.int32(0), np.float32(0), np.int32(0)
        compiled = jax.jit(run_chunk, donate_argnums=0).lower(state.replicas, *arguments).compile()
        self._run_chunk = compiled

    def start(self, peak: float, seed: int) -> State:
        """Equal weights and fresh optimizer states; those do not depend on the peak rate."""
        del peak
        params = self.workload.init(jax.random.split(jax.random.key(seed))[0])
        return State(0, jax.block_until_ready(self.replicas.init(self._tx, params)))

    def run_chunk(self, state: State, peak: float, seed: int) -> tuple[State, float]:
        """Trains for `chunk_steps`, consuming `state`; returns it with the mean training loss."""
        arguments = np.int32(state.step), np.float32(peak), np.int32(seed)
        after, loss = self._run_chunk(state.replicas, self._data, *arguments)
        loss = float(np.asarray(loss.addressable_data(0)))
        return State(state.step + self.chunk_steps, jax.block_until_ready(after)), loss


class Validation:
    """Validation losses of replicas, compiled once for all methods."""

    def __init__(self, workload: Workload, replicas: distributed.Replicas):
        self._data = {"validation": np.asarray(workload.data["validation"])}
        self._replicas, self._of_one = replicas, jax.jit(workload.validation_loss)
        self._of_each = replicas.map(lambda params: workload.validation_loss(params, self._data))

    def of_consensus(self, state: State) -> float:
        """The loss of the mean of all models."""
        return float(self._of_one(self._replicas.consensus(state.params), self._data))

    def of_single(self, state: State) -> float:
        """The mean over the models of their losses."""
        return float(self._replicas.consensus(self._of_each(state.params)))


class TimedLoop:
    """The loop over whole rounds, once one-bit Adam's warm-up is over."""

    def __init__(self, loop: ReplicaLoop):
        self._loop, self.chunk_steps = loop, loop.setting.timed_steps

    def run_chunk(self, state: State, peak: float, seed: int) -> tuple[State, float]:
        """Trains for `chunk_steps`, consuming `state`."""
        loss = math.nan
        for _ in range(self.chunk_steps // self._loop.chunk_steps):
            state, loss = self._loop.run_chunk(state, peak, seed)
        return state, loss

    def start(self, peak: float, seed: int) -> State:
        """A fresh state whose counters say that the warm-up is over."""
        state = self._loop.start(peak, seed).replicas
        later = np.int32(self._loop.setting.freeze_step)

        def count(flag: bool, tree: Any) -> Any:
            return jax.device_put(later, tree.sharding) if flag else tree

        opt_state = jax.tree.map(count, shared_counters(state.opt_state), state.opt_state)
        return State(int(later), state._replace(opt_state=opt_state))


def checksum(params: optax.Params) -> str:
    """Of the bits of all leaves."""
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        found.update(np.asarray(leaf).tobytes())
    return found.hexdigest()[:16]


class ReplicaStudy(Study):
    """Search and seeds of every method, on replicas.

    With a warm start all runs begin at the same weights, whatever their seed: those of one run of
    the synchronous method with seed 0 at the workload's own rate. They are kept beside the runs.

    Args:
      workload: what is trained.
      candidates: the contenders.
      store: where finished runs are kept.
      setting: the run's length, replicas and rounds.
      replicas: those of devices, or simulated.
      rates: number of learning rates tried for each, with seed 0.
      seeds: number of seeds at each one's best rate.
    """

    baseline = BASELINE

    def __init__(
        self,
        workload: Workload,
        candidates: Sequence[Candidate],
        store: Store,
        *,
        setting: Setting,
        replicas: distributed.Replicas,
        rates: int,
        seeds: int,
    ):
        super().__init__(workload, candidates, store, steps=setting.steps, rates=rates, seeds=seeds)
        self.setting, self._replicas = setting, replicas
        self._slices = shards(workload, setting.replicas)
        self._validation = Validation(workload, replicas)
        self._start: str | None = None
        self.warm_start: dict[str, Any] | None = None

    @property
    def _timed_steps(self) -> int:
        return self.setting.timed_steps

    @property
    def on_devices(self) -> bool:
        """Whether each replica has a device of its own."""
        return self._replicas.mesh is not None

    def sent(self) -> dict[str, distributed.WireBytes]:
        """What one replica sends in a step of each method."""
        return {c.name: sent(self.setting, c.make, self.workload) for c in self.candidates}

    @property
    def total_steps(self) -> int:
        """Training steps of the whole study, finished ones and the warm start included."""
        return super().total_steps + self.setting.warm_start

    def run(self, progress: Progress) -> dict[str, list[Run]]:
        """Makes the warm start and the runs that are missing; returns all runs of each method."""
        if self.setting.warm_start:
            params = self._warm_params(progress)
            self._start = checksum(params)
            self.workload = dataclasses.replace(self.workload, init=lambda key: params)
        return super().run(progress)

    def _warm_params(self, progress: Progress) -> optax.Params:
        """The weights to start from, trained unless they are kept already."""
        steps, path = self.setting.warm_start, self.store.out / WARM_FILE
        setting = self.setting._replace(steps=steps, warm_start=0)
        (method,) = contenders([BASELINE], setting, self.workload)
        peak = method.learning_rate
        made_by = {
            **self.workload.identity,
            "steps": steps,
            "replicas": setting.replicas,
            "learning_rate": peak,
            "fingerprint": method.fingerprint,
        }
        kept = read_tree(path, jax.eval_shape(self.workload.init, jax.random.key(0)))
        if kept:
            params, record = kept
            if record.get("made_by") != made_by:
                raise UserError(
                    f"--out {self.store.out}: {WARM_FILE} was made by other code or with other "
                    "settings; choose another --out, or remove its files to repeat them"
                )
            progress.skip(steps)
            progress.found_again(steps, steps, "steps of the warm start")
        else:
            progress.note("warm start: compiling")
            loop = ReplicaLoop(self.workload, method.make, setting, self._replicas, self._slices)
            state, loss = loop.start(peak, 0), math.nan
            while state.step < steps:
                state, _ = loop.run_chunk(state, peak, 0)
                loss = self._validation.of_consensus(state)
                if not math.isfinite(loss):
                    raise UserError(f"--warm-start {steps}: diverged after {state.step} steps")
                progress.advance(loop.chunk_steps, f"warm start: {loss:.3f}")
            params = self._replicas.consensus(state.params)
            record = {"made_by": made_by, "validation_loss": loss}
            if jax.process_index() == 0:
                write_tree(path, params, record)
            progress.line(f"warm start of {steps} synchronous steps: {loss:.4f}")
        self.warm_start = {
            "steps": steps, "learning_rate": peak, "validation_loss": record["validation_loss"],
        }  # fmt: skip
        return params

    def _same_code(self, candidate: Candidate, name: str) -> Run:
        run = super()._same_code(candidate, name)
        if run.get("warm_weights") != self._start:
            raise UserError(
                f"--out {self.store.out}: runs/{name}.json did not start from the weights in "
                f"{WARM_FILE}; choose another --out, or remove its files to repeat them"
            )
        return run

    def _make_loop(self, candidate: Candidate) -> ReplicaLoop:
        return ReplicaLoop(
            self.workload, candidate.make, self.setting, self._replicas, self._slices
        )

    def _timed_loop(self, candidate: Candidate, progress: Any) -> TimedLoop:
        return TimedLoop(self._loop(candidate, progress))

    def _train(
        self, loop: ReplicaLoop, rate: float, seed: int, on_chunk: Callable[[int, float], None]
    ) -> dict[str, Any]:
        """The fields of `training.train`, with the validation losses of the mean model.

        Beside them `single_loss`, at the end the mean of the models' own.
        """
        evaluate = self._validation.of_consensus
        curve, state = training.train(loop, self.steps, evaluate, rate, seed, on_chunk)
        ended = curve["status"] == "finished"
        single = self._validation.of_single(state) if ended else math.nan
        single_loss = single if math.isfinite(single) else None
        return {**curve, "single_loss": single_loss, "warm_weights": self._start}
