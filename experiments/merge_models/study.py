"""Models fine-tuned from one on different texts, merged, and evaluated on all of them.

Each merging rule has one scale. It is chosen on every second held-out window, by the mean loss over
the texts that were fine-tuned on; what is reported is the loss on the other windows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.finetune.calls import calls
from experiments.finetune.methods import contenders, method_of
from experiments.finetune.study import FineTuneLoop, pretrain
from experiments.harness import UserError
from experiments.harness.progress import Progress
from experiments.harness.store import Store, read_tree, write_tree
from experiments.harness.workload import Workload
from experiments.merge_models.methods import BEFORE, MERGES, SCALES, TOGETHER
from jaxopt_lab import adapters

Losses = dict[str, float]


def together(workloads: Mapping[str, Workload], like: Workload) -> Workload:
    """One workload whose batches are windows of all texts, as many of each on average."""
    texts = [np.asarray(workload.data["train"]) for workload in workloads.values()]
    longest = max(map(len, texts))
    # A text that is shorter is repeated, so that all have the same weight.
    train = np.concatenate([np.resize(text, longest) for text in texts])
    windows = np.concatenate([np.asarray(w.data["validation"]) for w in workloads.values()])
    data = {"train": jnp.asarray(train), "validation": jnp.asarray(windows)}
    fields = {name: getattr(like, name) for name in like.__dataclass_fields__}
    return Workload(**{**fields, "data": data})


class MergeStudy:
    """Pre-training, fine-tuning on each text and on all, and merging.

    Args:
      first: the text of the pre-training.
      tasks: the texts of the fine-tuning, by name.
      store: where finished results are kept.
      method: of fine-tuning, a name of `finetune.methods.METHODS`.
      rank: of LoRA, for the methods that are adapters.
      pretrain_steps: length of the pre-training.
      steps: of fine-tuning, on each text.
      seeds: how often the fine-tuning is repeated.
    """

    def __init__(
        self,
        first: Workload,
        tasks: Mapping[str, Workload],
        store: Store,
        *,
        method: str,
        rank: int,
        pretrain_steps: int,
        steps: int,
        seeds: int,
    ):
        self.first, self.tasks, self.store = first, dict(tasks), store
        self.method, self.rank, self.seeds = method_of(method), rank, seeds
        self.pretrain_steps, self.steps = pretrain_steps, steps
        (self._candidate,) = (c for c in contenders([method], first) if c.name == method)
        self.rate = self._candidate.grid(3)[0]
        self._loss = jax.jit(first.validation_loss)
        self._loops: dict[str, FineTuneLoop] = {}

    @property
    def total_steps(self) -> int:
        """Training steps of the whole study, finished ones included."""
        return self.pretrain_steps + self.seeds * 2 * len(self.tasks) * self.steps

    def announcement(self) -> str:
        """What is going to be trained, in a line."""
        return (
            f"{self.first.name}: {self.first.identity['parameters']:,} parameters, {self.steps} "
            f"steps on each of {', '.join(self.tasks)} and on all together, {self.seeds} seeds, "
            f"after {self.pretrain_steps} steps of pre-training"
        )

    def call(self) -> str:
        """How a model is trained on a text, in full."""
        return calls([self._candidate], self.rank)[self._candidate.name]

    def run(self, progress: Progress) -> list[dict[str, Any]]:
        """Returns for each seed the losses of all models, and those of each scale."""
        path = self.store.out / "pretrained.npz"
        base, _ = pretrain(self.first, self.pretrain_steps, path, progress)
        kept = [seed for seed in range(self.seeds) if _name(seed) in self.store]
        progress.found_again(len(kept), self.seeds, "seeds, with their merged models")
        return [self._of_seed(base, seed, progress) for seed in range(self.seeds)]

    def _of_seed(self, base: Any, seed: int, progress: Progress) -> dict[str, Any]:
        name = _name(seed)
        if name in self.store:
            progress.skip(2 * len(self.tasks) * self.steps)
            return self.store.load(name)
        tuned = {
            task: self._tuned(task, workload, self.steps, base, seed, progress)
            for task, workload in self.tasks.items()
        }
        everything = together(self.tasks, self.first)
        steps = len(self.tasks) * self.steps
        all_at_once = self._tuned(TOGETHER, everything, steps, base, seed, progress)
        progress.note(f"seed {seed}: merging")
        models = list(tuned.values())
        average = adapters.task_arithmetic(base, models, [1 / len(models)] * len(models))
        found = {BEFORE: base, **tuned, TOGETHER: all_at_once, "average": average}
        losses = {model: self._losses(params, 1) for model, params in found.items()}
        by_scale: dict[str, list[float | None]] = {}
        chosen: dict[str, float] = {}
        for rule, (merge, _) in MERGES.items():
            merged = [merge(base, models, scale) for scale in SCALES]
            choosing = [self.mean(self._losses(params, 0)) for params in merged]
            best = int(np.argmin([mean if math.isfinite(mean) else math.inf for mean in choosing]))
            reported = [self._losses(params, 1) for params in merged]
            chosen[rule], losses[rule] = SCALES[best], reported[best]
            by_scale[rule] = [_finite(self.mean(of_scale)) for of_scale in reported]
        result = {
            "seed": seed,
            "losses": losses,
            "scales": list(SCALES),
            "chosen": chosen,
            "mean_by_scale": by_scale,
        }
        mean = self.mean(losses["average"])
        progress.line(f"seed {seed}: merged; the average has a mean loss of {mean:.4f}")
        return self.store.save(name, result)

    def mean(self, losses: Losses) -> float:
        """The mean loss over the texts that were fine-tuned on."""
        return float(np.mean([losses[task] for task in self.tasks]))

    def _losses(self, params: Any, part: int) -> Losses:
        """Losses on every second held-out window of each text, the first one's as `BEFORE`."""
        workloads = {**self.tasks, BEFORE: self.first}
        return {
            name: float(self._loss(params, {"validation": workload.data["validation"][part::2]}))
            for name, workload in workloads.items()
        }

    def _tuned(
        self, task: str, workload: Workload, steps: int, base: Any, seed: int, progress: Progress
    ) -> Any:
        """The weights that the model uses after fine-tuning on one text."""
        path = self.store.out / "runs" / f"{task.replace(' ', '-')}-seed{seed}.npz"
        kept = read_tree(path, base)
        if kept is not None:
            progress.skip(steps)
            return kept[0]
        if task not in self._loops:
            progress.note(f"{task}: compiling")
            self._loops[task] = FineTuneLoop(
                workload, self.method, self.rank, self._candidate.make, steps, base
            )
        loop = self._loops[task]
        state, loss = loop.start(self.rate, seed), math.nan
        for _ in range(steps // loop.chunk_steps):
            state, chunk_loss = loop.run_chunk(state, self.rate, seed)
            loss = float(chunk_loss)
            progress.advance(loop.chunk_steps, f"{task}, seed {seed}: {loss:.3f}")
        if not math.isfinite(loss):
            raise UserError(f"fine-tuning on {task} diverged; choose another --method or size")
        params = state.params
        write_tree(path, params, {"task": task, "seed": seed, "train_loss": loss})
        progress.line(f"{task}, seed {seed}: training loss {loss:.4f}")
        return params


def _name(seed: int) -> str:
    return f"merged-seed{seed}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
