"""Wrong variants of every rule, and whether the parity and oracle tests catch them.

`python -m tests.mutants [rule ...]` replaces one line of a rule's source at a time and runs the
float64 comparisons of `tests/transforms` on the result. It prints a line a mutant and exits with 1
if one survives that is not marked as the same function.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import importlib
import multiprocessing
import os
import pathlib
import sys
import types
from collections.abc import Sequence

import jax
import jax.numpy as jnp

import jaxopt_lab
from tests.transforms import cases, oracle_runs, test_parity

PACKAGE = pathlib.Path(jaxopt_lab.__file__).parent


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One replacement in the file of a rule, or in a private module that the rule imports."""

    rule: str
    old: str
    new: str
    file: str = ""
    same_function: str = ""  # why no test can tell it from the right rule

    def __str__(self) -> str:
        return f"{self.rule}: {self.old.strip()}  ->  {self.new.strip()}"


MUTANTS = [
    # Lion
    Mutant("lion", "scale_by_lion(b1, b2, mu", "scale_by_lion(b2, b1, mu"),
    Mutant("lion", "m_new = b2 * m + (1 - b2) * g", "m_new = b1 * m + (1 - b1) * g"),
    Mutant("lion", "m_new = b2 * m + (1 - b2) * g", "m_new = b2 * m + g"),
    Mutant("lion", "(b1 / b2) * m_new + (1 - b1 / b2) * g", "m_new"),
    Mutant("lion", "(b1 / b2) * m_new + (1 - b1 / b2) * g", "b1 * m_new + (1 - b1) * g"),
    Mutant("lion", "(b1 / b2) * m_new + (1 - b1 / b2) * g", "m"),
    Mutant("lion", "direction = b1 * m + (1 - b1) * g", "direction = b1 * m_new + (1 - b1) * g"),
    Mutant("lion", "jnp.sign(direction)", "jnp.tanh(10 * direction)"),
    Mutant("lion", "jnp.sign(direction)", "jnp.where(direction >= 0, 1.0, -1.0)"),
    Mutant("lion", "jnp.sign(direction), m_new", "jnp.sign(direction), direction"),
    Mutant("lion", "u + jnp.asarray(sign", "u - jnp.asarray(sign", file="_hyperparams"),
    Mutant("lion", "learning_rate, weight_decay, mask", "learning_rate, 0.0, mask"),
    Mutant("lion", 'mask, method="lion"', 'mask, method="lion", coupled=True'),
    Mutant(
        "lion",
        "b2 > 0",
        "b2 > 1",
        same_function="the direct form of the direction is the same number",
    ),
    # AdaBelief
    Mutant(
        "adabelief", "jnp.square(g - m) + eps)", "jnp.square(g - (m - (1 - b1) * g) / b1) + eps)"
    ),
    Mutant("adabelief", "jnp.square(g - m) + eps)", "jnp.square(g) + eps)"),
    Mutant("adabelief", "jnp.square(g - m) + eps)", "jnp.square(g - m))"),
    Mutant("adabelief", "jnp.square(g - m) + eps)", "jnp.abs(g - m) + eps)"),
    Mutant("adabelief", "m = b1 * m + (1 - b1) * g", "m = b2 * m + (1 - b2) * g"),
    Mutant("adabelief", "m = b1 * m + (1 - b1) * g", "m = b1 * m + g"),
    Mutant("adabelief", "((m / c1) / (_hyper", "(m / (_hyper"),
    Mutant("adabelief", "sqrt(s_hat / c2) + eps)", "sqrt(s_hat) + eps)"),
    Mutant("adabelief", "sqrt(s_hat / c2) + eps)", "sqrt(s_hat / c2 + eps))"),
    Mutant("adabelief", "sqrt(s_hat / c2) + eps)", "sqrt(s_hat / c2))"),
    Mutant("adabelief", "jnp.maximum(old, s)", "jnp.maximum(old, s / c2)"),
    Mutant("adabelief", "s_hat = s_max[0] if s_max else s", "s_hat = s"),
    Mutant("adabelief", "(factor * jnp.sqrt(c2))", "factor"),
    Mutant("adabelief", "_hyperparams.sqrt(s) + eps)", "_hyperparams.sqrt(s / c2) + eps)"),
    Mutant("adabelief", "return rho >= 5,", "return rho >= 4,"),
    Mutant("adabelief", "return rho >= 5,", "return rho >= 6,"),
    Mutant("adabelief", "fallback = m / c1 if", "fallback = m if"),
    Mutant("adabelief", "(safe - 4) * (safe - 2)", "(safe - 4) * (safe - 4)"),
    Mutant("adabelief", "sign=-1.0", "sign=1.0"),
    Mutant("adabelief", "coupled=not weight_decouple", "coupled=weight_decouple"),
    Mutant("adabelief", "jnp.where(z < 0.25, 1 - series", "jnp.where(z < 0.25, 1 - z / 3"),
    Mutant(
        "adabelief",
        "b2 * s + ((1 - b2) * jnp.square(g - m) + eps)",
        "b2 * s + (1 - b2) * jnp.square(g - m) + eps",
        same_function="the order of a sum",
    ),
    # EXAdam
    Mutant("exadam", "m = b1 * m + (1 - b1) * g", "m = b2 * m + (1 - b2) * g"),
    Mutant("exadam", "v = b2 * v + (1 - b2)", "v = b1 * v + (1 - b1)"),
    Mutant("exadam", "d1 = 1 + (1 - c2)", "d1 = 1 + c2"),
    Mutant("exadam", "d2 = 1 + (1 - c1)", "d2 = 1 + (1 - c2)"),
    Mutant("exadam", "(v / (v + eps))", "(v / c2 / (v / c2 + eps))"),
    Mutant("exadam", "jnp.square(m) + eps))", "jnp.square(m) + 1e-12))"),
    Mutant("exadam", "(m + g) / c1", "(m / c1 + g)"),
    Mutant("exadam", "(m + g) / c1", "m / c1"),
    Mutant("exadam", "v / c2 * d2) + eps)", "v / c2) + eps)"),
    Mutant("exadam", "v / c2 * d2) + eps)", "v * d2) + eps)"),
    Mutant("exadam", "v / c2 * d2) + eps)", "v / c2 * d2 + eps))"),
    Mutant("exadam", "+ 1)) * u", "+ 0)) * u"),
    Mutant("exadam", "0.5 * jnp.log(2 *", "0.5 * jnp.log("),
    Mutant("exadam", "u + jnp.asarray(sign", "u - jnp.asarray(sign", file="_hyperparams"),
    # diffGrad
    Mutant("diffgrad", "m = b1 * m + (1 - b1) * g", "m = b2 * m + (1 - b2) * g"),
    Mutant("diffgrad", "v = b2 * v + (1 - b2)", "v = b1 * v + (1 - b1)"),
    Mutant("diffgrad", "jnp.exp(-jnp.abs(previous - g))", "jnp.exp(-(previous - g))"),
    Mutant("diffgrad", "jnp.exp(-jnp.abs(previous - g))", "jnp.exp(jnp.abs(previous - g))"),
    Mutant("diffgrad", "jnp.exp(-jnp.abs(previous - g))", "jnp.exp(-jnp.abs(g))"),
    Mutant("diffgrad", "return u, m, v, kept", "return u, m, v, previous"),
    Mutant("diffgrad", "return u, m, v, kept", "return u, xi * m, v, kept"),
    Mutant("diffgrad", "return u, m, v, kept", "return u, m, v, m"),
    Mutant("diffgrad", "(jnp.sqrt(c2) / c1)", "(1 / c1)"),
    Mutant("diffgrad", "(jnp.sqrt(c2) / c1)", "jnp.sqrt(c2)"),
    Mutant("diffgrad", "sqrt(v) + eps)", "sqrt(v) + eps * jnp.sqrt(c2))"),
    Mutant("diffgrad", "sqrt(v) + eps)", "sqrt(v + eps))"),
    Mutant("diffgrad", 'method="diffgrad", coupled=True', 'method="diffgrad", coupled=False'),
    # AdamP
    Mutant("adamp", "m = b1 * m + (1 - b1) * g\n", "m = b2 * m + (1 - b2) * g\n"),
    Mutant("adamp", "v = b2 * v + (1 - b2)", "v = b1 * v + (1 - b1)"),
    Mutant("adamp", "sqrt(v) / jnp.sqrt(c2) + eps", "sqrt(v) + eps"),
    Mutant("adamp", "jnp.sqrt(c2) + eps", "jnp.sqrt(c2) + eps / jnp.sqrt(c2)"),
    Mutant("adamp", "u = p / c1", "u = p"),
    Mutant("adamp", "b1 * m + (1 - b1) * g if nesterov", "b1 * m + g if nesterov"),
    Mutant("adamp", "direction, p, theta, g, m, v)", "direction, m, theta, g, m, v)"),
    Mutant("adamp", "jnp.where(projects, wd_ratio, 1.0)", "1.0"),
    Mutant("adamp", "weight_decay * rho * theta", "-weight_decay * rho * theta"),
    Mutant("adamp", "weight_decay * rho * theta", "weight_decay / c1 * rho * theta"),
    Mutant("adamp", "(g * theta, g * g", "(p * theta, p * p", file="_projection"),
    Mutant("adamp", "jnp.max(cosine", "jnp.min(cosine", file="_projection"),
    Mutant("adamp", "math.sqrt(dimension)", "dimension", file="_projection"),
    Mutant("adamp", "view(per_channel, fan_in)", "view(per_channel, fan_out)", file="_projection"),
    Mutant("adamp", "fan_in * fan_out)", "fan_in)", file="_projection"),
    Mutant("adamp", "p - radial * theta", "p + radial * theta"),
    Mutant("adamp", "jnp.square(length + eps)", "(length + eps)", file="_projection"),
    Mutant("adamp", "jnp.where(layer_fires, layer_radial, 0)", "0.0", file="_projection"),
    Mutant("adamp", "channel_fires | layer_fires", "channel_fires", file="_projection"),
    # SGDP
    Mutant("sgdp", "(1 - dampening) * g", "g"),
    Mutant("sgdp", "b = momentum * b + (1 - d", "b = b + (1 - d"),
    Mutant("sgdp", "(g + momentum * b if nesterov", "(g + b if nesterov"),
    Mutant("sgdp", "(g + momentum * b if nesterov else b)", "b"),
    Mutant("sgdp", "direction, d, theta, g, b)", "direction, b, theta, g, b)"),
    Mutant("sgdp", "rho / (1 - momentum) * theta", "rho * theta"),
    Mutant("sgdp", "jnp.where(projects, wd_ratio, 1.0)", "1.0"),
    Mutant("sgdp", "weight_decay * rho", "-weight_decay * rho"),
    Mutant("sgdp", "d if project_momentum else b_new", "b_new"),
    Mutant("sgdp", "d if project_momentum else b_new", "d"),
    # Muon
    Mutant("muon", "b = beta * b + (1 - beta) * g", "b = beta * b + g"),
    Mutant("muon", "beta * b + (1 - beta) * g if nesterov", "g if nesterov"),
    Mutant("muon", "beta * b + (1 - beta) * g if nesterov", "b if nesterov"),
    Mutant("muon", "else b)", "else g)"),
    Mutant("muon", "max(1.0, fan_out / fan_in) ** 0.5", "1.0"),
    Mutant("muon", "max(1.0, fan_out / fan_in) ** 0.5", "max(1.0, fan_in / fan_out) ** 0.5"),
    Mutant("muon", "max(fan_in, fan_out) ** 0.5", "min(fan_in, fan_out) ** 0.5"),
    Mutant("muon", "fori_loop(0, ns_steps", "fori_loop(1, ns_steps"),
    Mutant("muon", "c * product(gram, gram)", "b * product(gram, gram)"),
    Mutant("muon", "x / (norm + eps)", "x / jnp.maximum(norm, eps)"),
    Mutant("muon", "x / (norm + eps)", "x / (norm**2 + eps)"),
    Mutant("muon", "sum(jnp.square(x), (-2, -1)", "sum(jnp.square(x), (-1,)"),
    Mutant("muon", "sqrt(v) / root + eps)", "sqrt(v) + eps)"),
    Mutant("muon", "* root / (_hyper", "/ root / (_hyper"),
    Mutant("muon", "sqrt(v) + eps), m, v", "sqrt(v) + eps * root), m, v"),
    Mutant("muon", "adam_rule, adam_learning_rate", "adam_rule, learning_rate"),
    Mutant("muon", "adam_learning_rate, adam_weight_decay", "adam_learning_rate, weight_decay"),
    Mutant("muon", "_scale_by_adam(adam_b1, adam_b2", "_scale_by_adam(adam_b2, adam_b1"),
    Mutant(
        "muon",
        "if x.shape[1] > x.shape[2] else x for",
        "if x.shape[1] < x.shape[2] else x for",
        same_function="the iteration commutes with transposition",
    ),
]


def survives(mutant: Mutant) -> bool:
    """Whether every float64 comparison of the rule accepts the mutant."""
    namespace = mutated(mutant)
    with jax.enable_x64(True):
        for run in oracle_runs.all_runs():
            if run.rule != mutant.rule:
                continue
            if oracle_runs.deviation(run, jnp.float64, namespace) > 1e-10:
                return False
        for name in cases.names():
            case = cases.load(name)
            if cases.rule_of(case) == mutant.rule:
                tx = cases.transformation(case, namespace)
                if test_parity.deviation(case, tx, jnp.float64) > 1e-9:
                    return False
    return True


def mutated(mutant: Mutant) -> types.ModuleType:
    rule = _execute(mutant.rule, mutant if not mutant.file else None)
    if mutant.file:
        setattr(rule, mutant.file, _execute(mutant.file, mutant))
    return rule


def _execute(name: str, mutant: Mutant | None) -> types.ModuleType:
    folder = "transforms." if (PACKAGE / "transforms" / f"{name}.py").exists() else ""
    original = importlib.import_module(f"jaxopt_lab.{folder}{name}")
    source = pathlib.Path(str(original.__file__)).read_text()
    if mutant is not None:
        if mutant.old not in source:
            raise LookupError(f"{name}.py does not contain {mutant.old!r}")
        source = source.replace(mutant.old, mutant.new)
    module = types.ModuleType(original.__name__)
    module.__file__ = original.__file__
    exec(compile(source, str(original.__file__), "exec"), module.__dict__)
    return module


def main(rules: Sequence[str]) -> int:
    chosen = [m for m in MUTANTS if not rules or m.rule in rules]
    wrong = 0
    # Compiling keeps one core busy; a process each keeps them all.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        for mutant, alive in zip(chosen, pool.map(survives, chosen)):
            right = alive == bool(mutant.same_function)
            wrong += not right
            verdict = "survives" if alive else "caught"
            print(f"{'' if right else 'WRONG':5} {verdict:8}  {mutant}", flush=True)
    print(f"{len(chosen)} mutants, {wrong} with the wrong verdict")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
