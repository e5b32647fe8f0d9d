"""Search of the learning rate under an equal budget, then more seeds at the best rate.

Every run is kept in the store as soon as it is finished, and a run that the store has is not
repeated. The run of the search at the best rate has the length and the seed (0) of a final run, so
it counts as one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from experiments.harness import EVALUATIONS, UserError, timing, training
from experiments.harness.calls import call_text
from experiments.harness.candidates import BASELINE, Candidate
from experiments.harness.progress import Progress
from experiments.harness.runs import Row, Run, Timing, final_loss
from experiments.harness.store import Store
from experiments.harness.workload import Workload


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

    baseline = BASELINE  # whose time the others' is compared with

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

    @property
    def total_steps(self) -> int:
        """Training steps of the whole study, finished ones included."""
        return self._run_count * self.steps + self._timing_steps

    @property
    def _run_count(self) -> int:
        return len(self.candidates) * (self.rates + self.seeds - 1)

    @property
    def _timing_steps(self) -> int:
        """Steps of the timing at most."""
        return len(self.candidates) * (timing.ROUNDS[1] + 1) * self._timed_steps

    @property
    def _timed_steps(self) -> int:
        """Steps of one contender in one round of the timing."""
        return self.steps // EVALUATIONS

    def announcement(self, what: str, more: str = "") -> str:
        """What is going to be trained, in a line."""
        return (
            f"{self.workload.name}: {self.workload.identity['parameters']:,} parameters, "
            f"{len(self.candidates)} {what} x ({self.rates} learning rates + {self.seeds - 1} more "
            f"seeds) x {self.steps} steps{more}"
        )

    def caption(self, what: str) -> str:
        """What the table of so many `what` holds, with budget and seeds."""
        more = f", the best one with seeds 0 to {self.seeds - 1}" if self.seeds > 1 else ""
        return (
            f"{len(self.candidates)} {what} on {self.workload.name}, {self.steps} steps a run: "
            f"{self.rates} learning rates with seed 0{more}"
        )

    def calls(self) -> dict[str, str]:
        """How each contender is made, in full."""
        return {c.name: call_text(c.make) for c in self.candidates}

    def record(self) -> dict[str, Any]:
        """The search, for the report."""
        grids = {
            c.name: {"learning_rates": c.grid(self.rates), "centre": c.reason}
            for c in self.candidates
        }
        return {"rates": self.rates, "seeds": self.seeds, "grids": grids}

    def results(
        self, rows: Sequence[Row], runs: Mapping[str, Sequence[Run]], measured: Timing
    ) -> dict[str, Any]:
        """What every study keeps: the table and what it was made from."""
        return {
            "table": list(rows),
            "seconds_per_step": measured.wall,
            "cpu_seconds_per_step": measured.cpu,
            "runs": [run for found in runs.values() for run in found],
        }

    def run(self, progress: Progress) -> dict[str, list[Run]]:
        """Makes the runs that are missing; returns all runs of each candidate, search first."""
        progress.found_again(sum(map(self._kept, self.candidates)), self._run_count, "runs")
        return {c.name: self._search_then_seeds(c, progress) for c in self.candidates}

    def time(self, progress: Progress) -> Timing:
        """Seconds per step of every candidate, measured in turns, one figure per round."""
        timed = " ".join(f"{c.name} {c.fingerprint}" for c in self.candidates)
        key = "timing-" + hashlib.sha256(timed.encode()).hexdigest()[:8]
        if key in self.store:
            progress.skip(self._timing_steps)
        else:
            measured = timing.measure(
                {c.name: self._timed_loop(c, progress) for c in self.candidates},
                {c.name: c.learning_rate for c in self.candidates},
                self.baseline,
                lambda steps, name: progress.advance(steps, f"timing {name}"),
            )
            rounds = len(measured.wall[self.baseline])
            taken = len(self.candidates) * (rounds + 1) * self._timed_steps
            progress.skip(self._timing_steps - taken)
            self.store.save(key, measured._asdict())
            progress.line(f"measured the seconds per step, taking turns for {rounds} rounds")
        kept = self.store.load(key)
        return Timing(kept["wall"], kept["cpu"])

    def _search_then_seeds(self, candidate: Candidate, progress: Progress) -> list[Run]:
        runs = [self._run(candidate, r, 0, progress) for r in candidate.grid(self.rates)]
        best = min(runs, key=final_loss)
        if math.isinf(final_loss(best)):
            progress.skip((self.seeds - 1) * self.steps)
            return runs
        rate = best["learning_rate"]
        return runs + [self._run(candidate, rate, s, progress) for s in range(1, self.seeds)]

    def _kept(self, candidate: Candidate) -> int:
        """How many of the candidate's runs the store has."""
        found = [self.store.load(name) for rate in candidate.grid(self.rates)
                 if (name := _name(candidate, rate, 0)) in self.store]  # fmt: skip
        if len(found) < self.rates or math.isinf(final_loss(best := min(found, key=final_loss))):
            return len(found)
        names = [_name(candidate, best["learning_rate"], s) for s in range(1, self.seeds)]
        return len(found) + sum(name in self.store for name in names)

    def _run(self, candidate: Candidate, rate: float, seed: int, progress: Progress) -> Run:
        name = _name(candidate, rate, seed)
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
        return training.TrainLoop(self.workload, candidate.make, self.steps)

    def _timed_loop(self, candidate: Candidate, progress: Progress) -> Any:
        return self._loop(candidate, progress)

    def _train(
        self, loop: Any, rate: float, seed: int, on_chunk: Callable[[int, float], None]
    ) -> dict[str, Any]:
        return training.train(loop, self.steps, self._evaluate, rate, seed, on_chunk)[0]

    def _evaluate(self, state: Any) -> float:
        return float(self._validation_loss(state.params, self.workload.data))


def _name(candidate: Candidate, rate: float, seed: int) -> str:
    return f"{candidate.name.replace(':', '--')}-rate{rate:g}-seed{seed}"
