"""Search of the learning rate under an equal budget, then more seeds at the best rate.

Every run is kept in the store as soon as it is finished, and a run that the store has is not
repeated. The run of the search at the best rate has the length and the seed (0) of a final run, so
it counts as one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

from experiments.parts import UserError
from experiments.parts.optimizers import Candidate
from experiments.parts.progress import Progress
from experiments.parts.store import Store
from experiments.parts.training import (
    EVALUATIONS,
    TrainLoop,
    interleaved_seconds_per_step,
    train,
)
from experiments.parts.workload import Workload

TIMING_ROUNDS = 7

Run = dict[str, Any]


def final_loss(run: Run) -> float:
    """Validation loss at the end of the run; infinite if it diverged."""
    return run["validation_loss"][-1] if run["status"] == "finished" else math.inf


class Study:
    """All runs that an experiment needs of a list of candidates.

    Args:
      workload: what is trained.
      candidates: the contenders.
      store: where finished runs are kept.
      steps: length of every run.
      rates: number of learning rates tried for each candidate, with seed 0.
      seeds: number of seeds at each candidate's best rate.
    """

    def __init__(
        self,
        workload: Workload,
        candidates: Sequence[Candidate],
        store: Store,
        *,
        steps: int,
        rates: int,
        seeds: int,
    ):
        self.workload, self.candidates, self.store = workload, candidates, store
        self.steps, self.rates, self.seeds = steps, rates, seeds
        self._validation_loss = jax.jit(workload.validation_loss)
        self._loops: dict[str, Any] = {}
        self._timing_steps = len(candidates) * (TIMING_ROUNDS + 1) * (steps // EVALUATIONS)

    @property
    def total_steps(self) -> int:
        """Training steps of the whole study, finished ones included."""
        runs = len(self.candidates) * (self.rates + self.seeds - 1)
        return runs * self.steps + self._timing_steps

    def run(self, progress: Progress) -> dict[str, list[Run]]:
        """Makes the runs that are missing; returns all runs of each candidate, search first."""
        return {c.name: self._search_then_seeds(c, progress) for c in self.candidates}

    def time(self, progress: Progress) -> dict[str, list[float]]:
        """Seconds per step of every candidate, measured in turns, one figure per round."""
        timed = " ".join(f"{c.name} {c.fingerprint}" for c in self.candidates)
        key = "timing-" + hashlib.sha256(timed.encode()).hexdigest()[:8]
        if key in self.store:
            progress.skip(self._timing_steps)
        else:
            seconds = interleaved_seconds_per_step(
                {c.name: self._timed_loop(c, progress) for c in self.candidates},
                {c.name: c.learning_rate for c in self.candidates},
                TIMING_ROUNDS,
                lambda steps, name: progress.advance(steps, f"timing {name}"),
            )
            self.store.save(key, {"seconds_per_step": seconds})
            progress.line("measured the seconds per step, taking turns")
        return self.store.load(key)["seconds_per_step"]

    def _search_then_seeds(self, candidate: Candidate, progress: Progress) -> list[Run]:
        runs = [self._run(candidate, r, 0, progress) for r in candidate.grid(self.rates)]
        best = min(runs, key=final_loss)
        if math.isinf(final_loss(best)):
            progress.skip((self.seeds - 1) * self.steps)
            return runs
        rate = best["learning_rate"]
        return runs + [self._run(candidate, rate, s, progress) for s in range(1, self.seeds)]

    def _run(self, candidate: Candidate, rate: float, seed: int, progress: Progress) -> Run:
        name = f"{candidate.name.replace(':', '--')}-rate{rate:g}-seed{seed}"
        if name in self.store:
            progress.skip(self.steps)
            return self._same_code(candidate, name)
        label = f"{candidate.name}, learning rate {rate:g}, seed {seed}"
        loop = self._loop(candidate, progress)

        def on_chunk(steps: int, loss: float) -> None:
            progress.advance(steps, f"{label}: {loss:.3f}")

        curve = self._train(loop, rate, seed, on_chunk)
        progress.skip(self.steps - curve["steps"][-1])
        run = {
            "optimizer": candidate.name,
            "learning_rate": rate,
            "seed": seed,
            "fingerprint": candidate.fingerprint,
            "state_bytes_per_parameter": loop.state_bytes_per_parameter,
            **curve,
        }
        outcome = f"{final_loss(run):.4f}" if run["status"] == "finished" else "diverged"
        progress.line(f"{label}: {outcome}, {curve['train_seconds'][-1]:.1f} s")
        return self.store.save(name, run)

    def _same_code(self, candidate: Candidate, name: str) -> Run:
        run = self.store.load(name)
        if run.get("fingerprint") != candidate.fingerprint:
            raise UserError(
                f"--out {self.store.out}: runs/{name}.json was made by other code of "
                f"{candidate.name}; choose another --out, or remove its files to repeat them"
            )
        return run

    def _loop(self, candidate: Candidate, progress: Progress) -> Any:
        if candidate.name not in self._loops:
            progress.note(f"{candidate.name}: compiling")
            self._loops[candidate.name] = self._make_loop(candidate)
        return self._loops[candidate.name]

    def _make_loop(self, candidate: Candidate) -> Any:
        return TrainLoop(self.workload, candidate.make, self.steps)

    def _timed_loop(self, candidate: Candidate, progress: Progress) -> Any:
        return self._loop(candidate, progress)

    def _train(
        self, loop: Any, rate: float, seed: int, on_chunk: Callable[[int, float], None]
    ) -> dict[str, Any]:
        return train(loop, self._validation_loss, rate, seed, on_chunk)
