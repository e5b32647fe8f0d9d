"""The training loop: one jitted `lax.scan` over a chunk of steps, with donated state.

Batches are drawn inside the loop from the device-resident data, with a key that depends on the
seed and the step only: every optimizer sees the same batches. The peak learning rate is an
argument of the compiled chunk, so a search over rates compiles once per optimizer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.harness import EVALUATIONS
from experiments.harness.workload import Workload, parameter_count


class TrainState(NamedTuple):
    """What one step carries to the next."""

    step: jax.Array  # int32, steps taken
    params: optax.Params
    opt_state: optax.OptState


class Loop(Protocol):
    """A compiled training loop of one contender, for any peak rate and seed."""

    chunk_steps: int

    def start(self, peak: float, seed: int) -> Any:
        """The state before the first step."""
        ...

    def run_chunk(self, state: Any, peak: float, seed: int) -> tuple[Any, Any]:
        """Trains for `chunk_steps`, consuming `state`; returns it with the mean training loss."""
        ...


def unit_schedule(steps: int) -> optax.Schedule:
    """Linear warm-up over the first tenth of `steps` to 1, then a cosine to a tenth."""
    warmup = max(1, steps // 10)
    return optax.schedules.warmup_cosine_decay_schedule(1 / warmup, 1.0, warmup, steps, 0.1)


class TrainLoop:
    """One optimizer's compiled training loop on one workload, for any peak rate and seed.

    Args:
      workload: what is trained.
      make_optimizer: schedule -> optax transformation. It is called while the loop is traced, with
        a schedule that depends on the traced peak rate.
      steps: length of a run, a multiple of `EVALUATIONS`; the schedule spans it.
    """

    def __init__(
        self,
        workload: Workload,
        make_optimizer: Callable[[optax.Schedule], optax.GradientTransformation],
        steps: int,
    ):
        if steps < EVALUATIONS or steps % EVALUATIONS:
            raise ValueError(f"steps must be a positive multiple of {EVALUATIONS}, got {steps}")
        self.workload, self.steps, self.chunk_steps = workload, steps, steps // EVALUATIONS
        unit = unit_schedule(steps)

        def optimizer(peak: jax.Array) -> optax.GradientTransformationExtraArgs:
            schedule = lambda count: peak * unit(count)  # noqa: E731
            return optax.with_extra_args_support(make_optimizer(schedule))

        def run_chunk(state: TrainState, peak: jax.Array, key: jax.Array, data: Any):
            tx = optimizer(peak)

            def one_step(state: TrainState, _: None) -> tuple[TrainState, jax.Array]:
                batch = workload.sample(data, jax.random.fold_in(key, state.step))
                loss, grads = jax.value_and_grad(workload.loss)(state.params, batch)
                updates, opt_state = tx.update(grads, state.opt_state, state.params)
                params = optax.apply_updates(state.params, updates)
                return TrainState(state.step + 1, params, opt_state), loss

            state, losses = jax.lax.scan(one_step, state, length=self.chunk_steps)
            return state, losses.mean()

        self._init = jax.jit(lambda peak, params: optimizer(peak).init(params))
        peak, key = jnp.float32(0), jax.random.key(0)
        params = jax.eval_shape(workload.init, key)
        opt_state = jax.eval_shape(self._init, peak, params)
        step = jax.eval_shape(lambda: jnp.zeros([], jnp.int32))
        self.abstract_state = TrainState(step, params, opt_state)
        self._run_chunk = (
            jax.jit(run_chunk, donate_argnums=0)
            .lower(self.abstract_state, peak, key, workload.data)
            .compile()
        )

    def start(self, peak: float, seed: int) -> TrainState:
        """Freshly initialised weights and optimizer state on the device."""
        params = self.workload.init(_keys(seed)[0])
        opt_state = self._init(jnp.float32(peak), params)
        return jax.block_until_ready(TrainState(jnp.zeros([], jnp.int32), params, opt_state))

    def run_chunk(self, state: TrainState, peak: float, seed: int) -> tuple[TrainState, jax.Array]:
        """Trains for `chunk_steps`, consuming `state`; returns it with the mean training loss."""
        return self._run_chunk(state, jnp.float32(peak), _keys(seed)[1], self.workload.data)

    @property
    def state_bytes_per_parameter(self) -> float:
        """Bytes of all arrays of the optimizer's state, divided by the number of parameters."""
        leaves = jax.tree.leaves(self.abstract_state.opt_state)
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
        return size / parameter_count(self.abstract_state.params)


def _keys(seed: int) -> jax.Array:
    return jax.random.split(jax.random.key(seed))


def train(
    loop: Loop,
    steps: int,
    evaluate: Callable[[Any], float],
    peak: float,
    seed: int,
    on_chunk: Callable[[int, float], None] = lambda steps, loss: None,
) -> tuple[dict[str, Any], Any]:
    """One run from the loop's start; it ends early when a loss is not finite.

    Args:
      loop: the compiled loop.
      steps: length of the run.
      evaluate: state -> validation loss.
      peak: peak learning rate.
      seed: decides the initial weights and the batches.
      on_chunk: called after each chunk with the steps just taken and the validation loss.

    Returns:
      The curve and the last state. The curve has `status` ("finished" or "diverged"), `steps` at
      which `validation_loss` was measured (0 included), `train_loss` (mean of the chunk before),
      cumulated `train_seconds` without compilation and evaluation. A loss that is not finite is
      None, for JSON.
    """
    state = loop.start(peak, seed)
    curve: dict[str, Any] = {
        "status": "finished",
        "steps": [0],
        "validation_loss": [evaluate(state)],
        "train_loss": [None],
        "train_seconds": [0.0],
    }
    while curve["steps"][-1] < steps:
        began = time.perf_counter()
        state, chunk_loss = jax.block_until_ready(loop.run_chunk(state, peak, seed))
        seconds = time.perf_counter() - began
        losses = evaluate(state), float(chunk_loss)
        on_chunk(loop.chunk_steps, losses[0])
        curve["steps"].append(curve["steps"][-1] + loop.chunk_steps)
        curve["train_seconds"].append(curve["train_seconds"][-1] + seconds)
        for name, loss in zip(("validation_loss", "train_loss"), losses, strict=True):
            curve[name].append(loss if np.isfinite(loss) else None)
        if not np.isfinite(losses).all():
            curve["status"] = "diverged"
            break
    return curve, state
