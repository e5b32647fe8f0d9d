"""Wrong variants of schedules, and whether their tests notice."""

from __future__ import annotations

import dataclasses

from tests import suites


@dataclasses.dataclass(frozen=True)
class Mutant(suites.Mutant):
    """One replacement in a file of `jaxopt_lab/schedules`."""

    def tests(self) -> tuple[str, ...]:
        return ("schedules",)


MUTANTS = [
    # What schedules share
    Mutant("_phases", "(0 if zero_based else 1)", "0"),
    Mutant("_phases", "jnp.where(t < warmup_steps,", "jnp.where(t <= warmup_steps,"),
    Mutant("_phases", "1 - jnp.sqrt(1 - p)", "jnp.sqrt(p)"),
    Mutant("_phases", "1 - jnp.sqrt(q)", "jnp.sqrt(1 - q)"),
    Mutant("_phases", "q = jnp.clip(q, 0, 1)", "q = jnp.maximum(q, 0)"),
    Mutant("_phases", "start ** (1 - q) * end**q", "start * jnp.exp(-q)"),
    Mutant("_phases", "high - start_high, low - start_low", "high, low - start_low"),
    # UBA
    Mutant("uba", "0.5 * jnp.asarray(phi", "jnp.asarray(phi"),
    Mutant("uba", "budget - 1) + 0.5)", "budget - 1))"),
    Mutant("uba", "jnp.clip(after, 0, budget) / budget", "jnp.maximum(after, 0) / budget"),
    Mutant("uba", "after = _phases.since(step, warmup)", "after = t"),
    # Warm-up, stable, decay
    Mutant("warmup_stable_decay", "schedule(_phases.as_count(start))", "schedule(0)"),
    Mutant("warmup_stable_decay", "after / decay, start", "(after + 1) / decay, start"),
    Mutant("warmup_stable_decay", "start = warmup + _phases", "start = _phases"),
    Mutant(
        "warmup_stable_decay",
        "scale = warmup if timescale is None",
        "scale = 10_000 if timescale is None",
    ),
    # Re-warming
    Mutant("rewarmed", "jnp.where(own < 0, rate, value)", "value"),
    Mutant("rewarmed", "_phases.since(step, begin, offset)", "_phases.since(step, offset)"),
    Mutant("rewarmed", "0.1 * peak", "0.0 * peak"),
    # Refinement
    Mutant("refined", '"l2": -2.0', '"l2": -1.0'),
    Mutant("refined", '"reflect"', '"symmetric"'),
    Mutant("refined", '(half, 0), "edge"', '(half, 0), "reflect"'),
    Mutant("refined", "[::-1] - weights", "[::-1]"),
    Mutant("refined", 'mode="drop"', 'mode="clip"'),
    Mutant("refined", "(table.size - 1) / (total - 1)", "table.size / total"),
    Mutant("refined", "jnp.square(x / unit)", "jnp.square(x) / unit**2", file="_tree"),
    # Hypergradients
    Mutant("hypergradient", "_dot(direction, state.previous", "_dot(updates, state.previous"),
    Mutant("hypergradient", "eta + kappa * _dot(", "eta - kappa * _dot("),
    Mutant("hypergradient", "base * kappa *", "kappa *"),
    Mutant("hypergradient", "jnp.where(jnp.isfinite(new), new, eta)", "new"),
    Mutant(
        "hypergradient", "HypergradientState(eta, previous,", "HypergradientState(eta, updates,"
    ),
    # Batch sizes and tables
    Mutant("batch_size", "min(old, bound)", "old"),
    Mutant("tables", 'if hasattr(node, "_fields") and getattr', "if getattr"),
    Mutant("tables", "if count.owner in _OF_SCHEDULES] or counts", "] or counts"),
]
