"""Wrong variants of what is no optimizer, schedules and merging, and whether their tests notice.

`python -m tests.suite_mutants [file ...]` copies the package and the tests, replaces one place in
the copy at a time and runs the tests of that folder there until one fails. It prints a line a
mutant and exits with 1 if one survives.
"""

from __future__ import annotations

import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from tests.mutants import PACKAGE, Mutant, mutated_source

ROOT = PACKAGE.parent
SUITES = {"schedules": "tests/schedules", "adapters": "tests/adapters/test_merging.py"}
NEEDED = ("pyproject.toml", "tests/__init__.py", "tests/conftest.py", "tests/golden/adapters")

MUTANTS = [
    # What schedules share
    Mutant("_phases", "(0 if zero_based else 1)", "0"),
    Mutant("_phases", "jnp.where(t < warmup_steps,", "jnp.where(t <= warmup_steps,"),
    Mutant("_phases", "1 - jnp.sqrt(1 - p)", "jnp.sqrt(p)"),
    Mutant("_phases", "1 - jnp.sqrt(q)", "jnp.sqrt(1 - q)"),
    Mutant("_phases", "q = jnp.clip(q, 0, 1)", "q = jnp.maximum(q, 0)"),
    Mutant("_phases", "start ** (1 - q) * end**q", "start * jnp.exp(-q)"),
    Mutant("_phases", "(t - jnp.asarray(start, t.dtype))", "(t - start * 1.0)"),
    # UBA
    Mutant("uba", "0.5 * jnp.asarray(phi", "jnp.asarray(phi"),
    Mutant("uba", "budget - 1) + 0.5)", "budget - 1))"),
    Mutant("uba", "jnp.clip(after, 0, budget) / budget", "jnp.maximum(after, 0) / budget"),
    Mutant("uba", "after = t - warmup_steps", "after = t"),
    # Warm-up, stable, decay
    Mutant("warmup_stable_decay", "schedule(start_step)", "schedule(0)"),
    Mutant("warmup_stable_decay", "after / decay_steps", "(after + 1) / decay_steps"),
    Mutant("warmup_stable_decay", "(warmup_steps + stable_steps)", "stable_steps"),
    Mutant("warmup_stable_decay", "warmup_steps if timescale is None else timescale", "10_000"),
    # Re-warming
    Mutant("rewarmed", "jnp.where(own < 0, rate, value)", "value"),
    Mutant("rewarmed", "int(start_step) + n", "n"),
    Mutant("rewarmed", "0.1 * peak", "0.0 * peak"),
    # Refinement
    Mutant("refined", '"l2": -2.0', '"l2": -1.0'),
    Mutant("refined", '"reflect"', '"symmetric"'),
    Mutant("refined", '(half, 0), "edge"', '(half, 0), "reflect"'),
    Mutant("refined", "[::-1] - weights", "[::-1]"),
    Mutant("refined", 'mode="drop"', 'mode="clip"'),
    Mutant("refined", "(table.size - 1) / (total_steps - 1)", "table.size / total_steps"),
    Mutant("refined", "jnp.square(x / unit)", "jnp.square(x) / unit**2"),
    # Hypergradients
    Mutant("hypergradient", "_dot(direction, state.previous", "_dot(updates, state.previous"),
    Mutant("hypergradient", "eta + kappa * _dot(", "eta - kappa * _dot("),
    Mutant("hypergradient", "base * kappa *", "kappa *"),
    Mutant("hypergradient", "jnp.where(jnp.isfinite(new), new, eta)", "new"),
    Mutant(
        "hypergradient", "HypergradientState(eta, previous,", "HypergradientState(eta, updates,"
    ),
    # Batch sizes and tables
    Mutant("batch_size", "min(batch_size, bound)", "batch_size"),
    Mutant("tables", "if owner[0] is not None", ""),
    Mutant("tables", "if owner[0] in _OF_SCHEDULES] or counts", "] or counts"),
    # Merging
    Mutant("_task_vectors", "patterns, count - 1)", "patterns, count)"),
    Mutant("_task_vectors", "(place <= room)", "(place < room)"),
    Mutant("_task_vectors", "seen += jnp.sum(tied, dtype=jnp.uint32)", "pass"),
    Mutant("_task_vectors", "leaf.astype(update.dtype) +", ""),
    Mutant("_task_vectors", "return jnp.asarray(finetuned).astype(dtype) -", "return -"),
    Mutant("ties", '+ (keep == "authors")', ""),
    Mutant("ties", 'if elect == "mass"', 'if elect != "mass"'),
    Mutant("ties", 'if zero_sign == "majority":', "if False:"),
    Mutant("ties", "jnp.where(agrees, values, 0)", "values"),
    Mutant("ties", "jnp.sum(agrees, axis=0), 1)", "len(agrees), 1)"),
    Mutant("ties", "values = trimmed if weights is None", "values = trimmed if True"),
    Mutant("ties", 'if scope == "global":', "if True:"),
    Mutant("breadcrumbs", "top + kept if remove_first", "kept if remove_first"),
    Mutant("breadcrumbs", "outer & ~inner", "outer"),
    Mutant("breadcrumbs", '== "embedding" else 2', '== "embedding" else 1'),
    Mutant("breadcrumbs", "jnp.moveaxis(found, -1, along)", "found"),
]


def verdict(mutant: Mutant) -> str:
    """Returns "caught" if a test of the mutant's folder fails, else "survives".

    Raises:
      RuntimeError: the tests could not be run; the message has their output.
    """
    path, source = mutated_source(mutant)
    suite = SUITES[path.parent.name]
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder)
        for name in (*NEEDED, PACKAGE.name, suite):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, copy / name)
            else:
                shutil.copy(ROOT / name, copy / name)
        (copy / path.relative_to(ROOT)).write_text(source)
        run = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", suite]
        run += ["--ignore", "tests/schedules/test_suite_mutants.py"]  # fails with every change
        result = subprocess.run(run, cwd=copy, capture_output=True, text=True, check=False)
    if result.returncode > 1:
        raise RuntimeError(f"{mutant}: {result.stdout}{result.stderr}")
    return "caught" if result.returncode else "survives"


def main(files: Sequence[str]) -> int:
    chosen = [m for m in MUTANTS if not files or m.rule in files]
    for same in {mutated_source(m)[0].parent: m.rule for m in chosen}.values():
        if verdict(Mutant(same, "import", "import")) == "caught":
            print(f"the tests of {same} fail without any change")
            return 2
    survivors = 0
    for mutant in chosen:
        found = verdict(mutant)
        survivors += found == "survives"
        print(f"{found:8}  {mutant}", flush=True)
    print(f"{len(chosen)} mutants, {survivors} survive")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
