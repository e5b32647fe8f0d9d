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
SUITES = {"schedules": "tests/schedules", "adapters": "tests/adapters/test_adapt.py"}
# Files whose tests are elsewhere; of a file the name, else that of its folder counts.
_MERGING = "tests/adapters/test_merging.py"
_TRAINING = "tests/adapters/test_training.py"
_PARITY = "tests/adapters/test_parity.py"
SUITES |= dict.fromkeys(("_task_vectors", "task_arithmetic", "ties", "breadcrumbs"), _MERGING)
SUITES |= dict.fromkeys(("ist", "perp", "lora_plus"), _TRAINING)
SUITES |= dict.fromkeys(("pissa", "olora", "lora_ga", "corda", "miss", "dora", "lora"), _PARITY)
SUITES |= dict.fromkeys(("peft", "plain"), "tests/adapters/test_peft_folder.py")
SUITES |= {"files": "tests/adapters/test_file_layouts.py"}
SUITES |= dict.fromkeys(("_foreign", "_peft_config", "_places"), "tests/adapters/test_files.py")
SUITES |= dict.fromkeys(("mlx", "kohya"), "tests/adapters/test_other_libraries.py")
NEEDED = (
    "pyproject.toml",
    "tests/__init__.py",
    "tests/conftest.py",
    "tests/golden/adapters",
    "tests/adapters/__init__.py",
    "tests/adapters/golden.py",
    "tests/adapters/models.py",
    "tests/adapters/test_files.py",
)

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
    Mutant("batch_size", "min(old, bound)", "old"),
    Mutant("tables", 'if hasattr(node, "_fields") and getattr', "if getattr"),
    Mutant("tables", "if count.owner in _OF_SCHEDULES] or counts", "] or counts"),
    # Merging
    Mutant("_task_vectors", "patterns, count - 1)", "patterns, count)"),
    Mutant("_task_vectors", "(place <= room)", "(place < room)"),
    Mutant("_task_vectors", "seen += jnp.sum(tied, dtype=jnp.uint32)", "pass"),
    Mutant("_task_vectors", "leaf.astype(update.dtype) +", ""),
    Mutant("_task_vectors", "[jnp.asarray(x).astype(dtype) - ", "[-"),
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
    # Starts
    Mutant("pissa", "root = jnp.sqrt(s / kernel.scaling)", "root = jnp.sqrt(s)"),
    Mutant("olora", "jnp.linalg.qr(jnp.swapaxes(matrices, -1, -2))", "jnp.linalg.qr(matrices)"),
    Mutant("lora_ga", '"ArB2r": (every[:r], every[r:])', '"ArB2r": (every[r:], every[:r])'),
    Mutant("lora_ga", "(every[1::2], every[0::2])", "(every[0::2], every[1::2])"),
    Mutant("lora_ga", "kernel.matrix[1] ** 0.25", "kernel.matrix[0] ** 0.25"),
    Mutant("lora_ga", "c = jnp.mean(jnp.sqrt(first / s)", "c = jnp.mean(jnp.sqrt(first)"),
    Mutant("lora_ga", "b = sigma * b", "b = b"),
    Mutant("corda", "damping * mean * identity", "damping * identity"),
    Mutant("corda", "slice(-kernel.r, None)", "slice(None, kernel.r)"),
    Mutant("miss", "_kernels.product(block, tiles) + block", "_kernels.product(block, tiles)"),
    Mutant(
        "miss",
        "jnp.tile(block, (1, -(-fan_in // kernel.r), 1))",
        "jnp.repeat(block, -(-fan_in // kernel.r), 1)",
    ),
    Mutant("dora", "jax.lax.stop_gradient(lengths(kernel, whole))", "lengths(kernel, whole)"),
    Mutant("lora", "alpha / math.sqrt(r) if self.use_rslora", "alpha / r if self.use_rslora"),
    # Trees of adapters
    Mutant("adapt", "leaf.astype(dtype) - kernel.scaling * change", "leaf.astype(dtype) - change"),
    Mutant("adapt", "    if base.merged:\n        raise", "    if False:\n        raise"),
    Mutant("_svd", "q = jnp.linalg.qr(_kernels.product(transposed, q))[0]", "q = q"),
    Mutant("_targets", 'k.endswith(f".{dotted}")', "k.endswith(dotted)"),
    Mutant("_targets", 'rf"(.*\\.)?({pattern})"', 'rf".*({pattern})"'),
    Mutant("gradients", "sums[kernel.name] / count", "sums[kernel.name]"),
    Mutant(
        "factored",
        "[*of_outputs, *of_x] if dot.kernel_is_left",
        "[*of_x, *of_outputs] if dot.kernel_is_left",
    ),
    Mutant("factored", "(kernel.kernel.scaling * change)", "change"),
    Mutant("_trace", "dims=x.dims[1:], batch=x.batch[1:]", "dims=x.dims[1:], batch=x.batch"),
    Mutant("_trace", "if groups != (1, 1)", "if groups == (0, 0)"),
    Mutant(
        "covariances",
        "signed > 1e-6 * largest, signed, largest",
        "signed > largest, signed, largest",
    ),
    # Training, and folders
    Mutant("ist", "jax.nn.log_sigmoid(-scores), count", "jax.nn.log_sigmoid(scores), count"),
    Mutant("ist", "rewards - jnp.mean(rewards)", "rewards"),
    Mutant(
        "ist",
        "return jax.tree.map(jnp.zeros_like, part), old",
        "return jax.tree.map(jnp.zeros_like, part), train()[1]",
    ),
    Mutant("perp", "jnp.where(whole != 0, change, 0)", "change"),
    Mutant("lora_plus", "jnp.ndim(leaf) == 1", "False"),
    Mutant("plain", "jnp.concatenate([b, -b_0], -2)", "jnp.concatenate([b, b_0], -2)"),
    Mutant("plain", "math.sqrt(times) if config.use_rslora", "times if config.use_rslora"),
    # Files of other libraries
    Mutant("_pairs", "scaling * (math.sqrt(r) if use_rslora else r)", "scaling * r"),
    Mutant("_torch_layers", "*window, channels), -1, 1)", "*window, channels), -1, -1)"),
    Mutant("_torch_layers", "a = np.moveaxis(a, 1, -1)", "pass"),
    Mutant(
        "_torch_layers",
        "np.moveaxis(b.reshape(b.shape[0], -1, count), 2, 0)",
        "np.moveaxis(b.reshape(b.shape[0], count, -1), 1, 0)",
    ),
    Mutant("_torch_layers", "if legacy and fan_in == fan_out:", "if False:"),
    Mutant(
        "_torch_layers",
        "np.stack([b.T for _, b in pairs], axis=-1)",
        "np.stack([b.T for _, b in pairs], axis=1)",
    ),
    Mutant("_pairs", "* (pair.scaling / scaling)", "* 1"),
    Mutant("_pairs", "*changed[:1]", "*changed[:0]"),
    Mutant("_targets", '"^" + re.escape(', "re.escape("),
    Mutant("_pairs", "rows[index] = pair.magnitude", "pass"),
    Mutant("_places", "whole = not (place.is_part and its_place.is_part)", "whole = False"),
    Mutant("_places", "set(rows) & set(its_rows)", "rows == its_rows"),
    Mutant("_peft_config", 'rf"(.*\\.)?({pattern})$"', 'rf"({pattern})$"'),
    Mutant("_peft_config", "type(value) is type(x)", "True"),
    Mutant("_peft_tensors", "starts = [0 if shared else", "starts = [0 if True else"),
    Mutant("_peft_tensors", "np.array_equal(mine.a, first.a)", "True"),
    Mutant(
        "_peft_miss", 'block.swapaxes(-1, -2) if config.init_weights == "bat" else block)', "block)"
    ),
    Mutant("_peft_whole", "saved = not suffix and", "saved = suffix and"),
    Mutant("_peft_whole", "[np.argsort(rows)]", ""),
    Mutant("_peft_whole", "elif not _same(own[piece.index], value):", "elif False:"),
    Mutant("_foreign", 'adapter_name == "default" and', "False and"),
    Mutant("mlx", "a, b = a.swapaxes(1, 2), b.swapaxes(1, 2)", "pass"),
    Mutant("kohya", "Pair(a, b, alpha / r)", "Pair(a, b, alpha)"),
    Mutant("kohya", "else float(r)", "else 1.0"),
]


def verdict(mutant: Mutant) -> str:
    """Returns "caught" if a test of the mutant's folder fails, else "survives".

    Raises:
      RuntimeError: the tests could not be run; the message has their output.
    """
    path, source = mutated_source(mutant)
    suite = SUITES.get(path.stem) or SUITES[path.parent.name]
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
        result = subprocess.run(run, cwd=copy, capture_output=True, text=True, check=False)
    if result.returncode > 1:
        raise RuntimeError(f"{mutant}: {result.stdout}{result.stderr}")
    return "caught" if result.returncode else "survives"


def main(files: Sequence[str]) -> int:
    chosen = [m for m in MUTANTS if not files or m.rule in files]
    by_suite = {SUITES.get(m.rule) or mutated_source(m)[0].parent: m.rule for m in chosen}
    for same in by_suite.values():
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
