"""Wrong variants of attention, and whether the cases of `cases.CASES` catch them.

`python -m tests.pallas_kernels.attention.mutants [file ...]` replaces one piece of text in a copy
of the package at a time and runs some cases on a route of the result. It prints a line a mutant and
exits with 1 if one survives.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import importlib
import multiprocessing
import os
import pathlib
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import pallas_kernels
from tests.pallas_kernels.attention import cases

PACKAGE = pathlib.Path(pallas_kernels.__file__).parent
CONFIGS = {"chunked": {"block_q": 48, "block_kv": 40, "tile": 1}}


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One replacement in a file of `pallas_kernels/attention`, and a case that must notice."""

    file: str
    old: str
    new: str
    case: str
    route: str = "chunked"

    def __str__(self) -> str:
        return f"{self.file}: {self.old.strip()}  ->  {self.new.strip()}"


MUTANTS = [
    # The running maximum and sum.
    Mutant("chunked", "total = a * total + p.sum", "total = total + p.sum", "plain"),
    Mutant("chunked", "o = a[..., None] * o + precise", "o = o + precise", "plain"),
    Mutant("chunked", "shift = jnp.where(m_new == -jnp.inf, 0, m_new)", "shift = m_new", "negative offset leaves empty rows"),
    Mutant("chunked", "m + jnp.log(total)", "m / 0.6931471805599453 + jnp.log2(total)", "plain"),
    Mutant("chunked", "lse = jnp.where(empty, -jnp.inf, ", "lse = jnp.where(empty, 0.0, ", "negative offset leaves empty rows"),
    Mutant("chunked", "total = jnp.where(empty, 1, total)", "total = total + 0", "negative offset leaves empty rows"),
    # Scores.
    Mutant("chunked", "settings.scale * rows if exact", "settings.scale**2 * rows if exact", "plain"),
    Mutant("chunked", "z += part(x.bias, start, size).astype(z.dtype)", "z += settings.scale * part(x.bias, start, size).astype(z.dtype)", "bias"),
    Mutant("chunked", "tanh = jnp.tanh(z / settings.soft_cap)", "tanh = jnp.tanh(z)", "soft cap"),
    Mutant("chunked", "settings.soft_cap * tanh, 1 - tanh * tanh", "settings.soft_cap * tanh, 1.0", "soft cap"),
    Mutant("chunked", "z = jnp.where(seen, z, -jnp.inf)", "z = jnp.where(seen, z, -1e4)", "negative offset leaves empty rows"),
    Mutant("chunked", "z = jnp.where(seen, z, -jnp.inf)", "z = z", "causal"),
    # Sinks and dropout.
    Mutant("chunked", "jnp.broadcast_to(sink, shape), jnp.ones(shape, dtype)", "jnp.zeros(shape, dtype), jnp.broadcast_to(sink, shape)", "sinks"),
    Mutant("chunked", "jnp.broadcast_to(sink, shape), jnp.ones(shape, dtype)", "jnp.broadcast_to(sink, shape), jnp.zeros(shape, dtype)", "sinks"),
    Mutant("chunked", "            total = a * total + p.sum(axis=-1)\n            if kept is not None:\n                p = jnp.where(kept, p, 0)\n", "            if kept is not None:\n                p = jnp.where(kept, p, 0)\n            total = a * total + p.sum(axis=-1)\n", "dropout"),
    Mutant("chunked", "o / (total * (1 - settings.dropout_rate))", "o / (total)", "dropout"),
    Mutant("chunked", "dp = jnp.where(kept, dp * keep_scale, 0)", "dp = jnp.where(kept, dp, 0)", "dropout"),
    Mutant("chunked", "dropped = jnp.where(kept, p * keep_scale, 0)", "dropped = p * keep_scale", "dropout"),
    Mutant("dropout", "(keys * _int32(0x85EBCA77)) ^ row_key", "keys ^ row_key", "dropout"),
    Mutant("dropout", "math.ceil(rate * 2**24)", "math.ceil((1 - rate) * 2**24)", "dropout"),
    # What hides by its value, and sinks that are none.
    Mutant("chunked", "z = capped if x.bias is None else jnp.where(z == -jnp.inf, -jnp.inf, capped)", "z = capped", "soft cap and a bias that hides"),
    Mutant("core", "jnp.where(lse == -jnp.inf, 0, lse))\n        sinks", "lse)\n        sinks", "a sink of -inf and empty rows"),
    # Gradients.
    Mutant("chunked", "d_scores = p * (dp - take(delta)[..., None]) * slope", "d_scores = p * (dp - take(delta)[..., None])", "soft cap"),
    Mutant("chunked", "d_scores = p * (dp - take(delta)[..., None]) * slope", "d_scores = p * dp * slope", "plain"),
    Mutant("chunked", "d_key = (settings.scale * d_key)", "d_key = (d_key)", "plain"),
    Mutant("chunked", "(settings.scale * d_query)", "(d_query)", "plain"),
    Mutant("chunked", 'precise("bkgtd,bkgts->bkds", rows.astype(compute), ds)', 'precise("bkgtd,bkgts->bkds", rows[:, :, :1].astype(compute), ds[:, :, :1])', "grouped heads"),
    Mutant("chunked", "jnp.where(lse == -jnp.inf, 0, lse)", "lse", "negative offset leaves empty rows"),
    Mutant("chunked", "(b, q0, k * size.group)", "(b, q0, k)", "grouped heads"),
    Mutant("chunked", "(b, k, 0, q0, k0))", "(b, k, 0, q0, 0))", "bias of keys"),
    Mutant("chunks", "tile = tile.sum(axis=axes, keepdims=True)", "tile = tile.mean(axis=axes, keepdims=True)", "bias of heads"),
    Mutant("core", "delta -= jnp.where(lse == -jnp.inf, 0, d_lse)", "delta += jnp.where(lse == -jnp.inf, 0, d_lse)", "plain"),
    Mutant("core", "share = jnp.exp(operands.sinks[None, :, None] - jnp.where(lse == -jnp.inf, 0, lse))", "share = operands.sinks[None, :, None] - lse", "sinks"),
    Mutant("core", "sinks = -jnp.sum(share * delta", "sinks = jnp.sum(share * delta", "sinks"),
    # The mask.
    Mutant("mask", "seen &= distance <= mask.right", "seen &= distance < mask.right", "causal"),
    Mutant("mask", "seen &= distance >= -mask.left", "seen &= distance > -mask.left", "window"),
    Mutant("mask", "seen = (rows < query_length) & (keys < key_value_length)", "seen = (rows < query_length) & (keys >= 0)", "ragged"),
    Mutant("mask", "seen = (rows < query_length) & (keys < key_value_length)", "seen = (rows >= 0) & (keys < key_value_length)", "lengths"),
    Mutant("mask", "distance = keys - rows - offset", "distance = keys - rows + offset", "causal at the end"),
    Mutant("mask", "stop = _minimum(stop, last_valid_row + offset + mask.right + 1)", "stop = _minimum(stop, last_valid_row + offset + mask.right - 40)", "causal"),
    Mutant("mask", "whole_stop = _minimum(whole_stop, first_row + offset + mask.right + 1)", "whole_stop = _minimum(whole_stop, last_row + offset + mask.right + 1)", "causal"),
    Mutant("mask", "start = _maximum(0, first_row + offset - mask.left)", "start = _maximum(0, last_row + offset - mask.left)", "causal window"),
    Mutant("mask", "whole_start = _maximum(0, last_key - mask.right - offset)", "whole_start = _maximum(0, first_key - mask.right - offset)", "causal"),
    Mutant("mask", "stop = _minimum(stop, last_valid_key + mask.left - offset + 1)", "stop = _minimum(stop, first_key + mask.left - offset + 1)", "causal window"),
    Mutant("mask", "needed &= (q_low <= k_high) & (k_low <= q_high)", "needed &= (q_low <= k_low) & (k_high <= q_high)", "sorted segments"),
    Mutant("mask", "whole &= (q_low == q_high) & (k_low == k_high) & (q_low == k_low)", "whole &= (q_low == k_low)", "sorted segments"),
    Mutant("mask", "tiles(False).any(axis=(3, 5)), tiles(True).all", "tiles(False).any(axis=(3, 5)), tiles(True).any", "dense mask"),
    Mutant("mask", "_where(last_row < query_length, _maximum(whole_start", "_where(True, _maximum(whole_start", "lengths"),
]  # fmt: skip


def verdict(mutant: Mutant) -> str:
    """Returns "survives" if the case accepts the mutant, else "caught"."""
    case = next(case for case in cases.CASES if case.name == mutant.case)
    with tempfile.TemporaryDirectory() as folder:
        name = copy_of_the_package(mutant, pathlib.Path(folder))
        try:
            check(name, mutant.route, case)
        except (AssertionError, ValueError, TypeError):
            return "caught"
        return "survives"


def check(package: str, route: str, case: cases.Case) -> None:
    """Checks `case` on a route of the package called `package`."""
    core, mask, problem, module = (
        importlib.import_module(f"{package}.attention.{name}")
        for name in ("core", "mask", "problem", route)
    )
    settings, operands, cotangents = cases.build(case)
    own_mask = mask.Mask(**{
        field.name: getattr(operands.mask, field.name)
        for field in dataclasses.fields(operands.mask)
    })  # fmt: skip
    operands = problem.Operands(**(operands._asdict() | {"mask": own_mask}))
    config: Any = module.ROUTE.config_type(**CONFIGS[route])
    settings = problem.Settings(**(settings._asdict() | {"config": config}))
    built = cases.Problem(settings, operands, cotangents)
    cases.check(case, cases.run(lambda x: core.attend(module.ROUTE, settings, x), built))


def mutated_source(mutant: Mutant) -> tuple[pathlib.Path, str]:
    """Returns the file that the mutant changes, in this package, and its changed text.

    Raises:
      LookupError: the file does not contain what is to be replaced.
    """
    path = PACKAGE / "attention" / f"{mutant.file}.py"
    source = path.read_text()
    if mutant.old not in source:
        raise LookupError(f"{path.name} does not contain {mutant.old!r}")
    return path, source.replace(mutant.old, mutant.new)


def copy_of_the_package(mutant: Mutant | None, folder: pathlib.Path) -> str:
    """Puts a copy with the mutant's file changed on the path and returns its name."""
    changed, source = (None, "") if mutant is None else mutated_source(mutant)
    name = f"mutant_{folder.name}"
    for path in (*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.json")):
        target = folder / name / path.relative_to(PACKAGE)
        target.parent.mkdir(parents=True, exist_ok=True)
        text = source if path == changed else path.read_text()
        target.write_text(text.replace(PACKAGE.name, name))
    sys.path.insert(0, str(folder))
    try:
        importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))
    return name


def main(files: Sequence[str]) -> int:
    chosen = [m for m in MUTANTS if not files or m.file in files]
    survivors = 0
    # Compiling keeps one core busy; a process each keeps them all.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        for mutant, found in zip(chosen, pool.map(verdict, chosen)):
            survivors += found == "survives"
            print(f"{found:8}  {mutant}", flush=True)
    print(f"{len(chosen)} mutants, {survivors} survive")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
