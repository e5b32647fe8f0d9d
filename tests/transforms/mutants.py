"""Wrong variants of every rule, and whether the parity and oracle tests catch them.

A mutant runs the float64 comparisons of this folder that use its rule.
"""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile
import types
from collections.abc import Iterator

import jax
import jax.numpy as jnp

import jaxopt_lab
from tests import mutants
from tests.transforms import cases, oracle_runs, subspace_runs, test_parity


@dataclasses.dataclass(frozen=True)
class Mutant(mutants.Mutant):
    """One replacement in the file of a rule, or in another file that the rule uses."""

    package = jaxopt_lab

    def verdict(self) -> str:
        with tempfile.TemporaryDirectory() as folder, jax.enable_x64(True):
            namespace = self.imported(pathlib.Path(folder))
            # Both comparisons are below 2e-13 for the right rules.
            try:
                caught = any(not x < 1e-10 for x in deviations(self.name, namespace))
            except (TypeError, ValueError):  # shapes that no longer fit each other
                return "refused"
            return "caught" if caught else "survives"


def deviations(rule: str, namespace: types.ModuleType) -> Iterator[float]:
    """Yields how far `rule` of the package `namespace` is from each oracle and golden case."""
    for run in (*oracle_runs.all_runs(), *subspace_runs.all_runs()):
        if run.rule == rule:
            yield oracle_runs.deviation(run, jnp.float64, namespace)
    for case in map(cases.load, cases.names()):
        if cases.rule_of(case) == rule:
            tx = cases.transformation(case, namespace)
            yield test_parity.deviation(case, tx, jnp.float64)


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
    Mutant("lion", "u + rate * theta if", "u - rate * theta if", file="_hyperparams"),
    Mutant("lion", "learning_rate, weight_decay, mask", "learning_rate, 0.0, mask"),
    Mutant("lion", 'mask, method="lion"', 'mask, method="lion", decays="gradient"'),
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
    Mutant("adabelief", "sign = -1.0 if", "sign = 1.0 if", file="_hyperparams"),
    Mutant("adabelief", "if weight_decouple else", "if not weight_decouple else"),
    Mutant("adabelief", '"weights" if fixed_decay else ', ""),
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
    Mutant("exadam", "u + rate * theta if", "u - rate * theta if", file="_hyperparams"),
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
    Mutant("diffgrad", 'decays="gradient"', 'decays="direction"'),
    # AdamP
    Mutant("adamp", "m = b1 * m + (1 - b1) * g\n", "m = b2 * m + (1 - b2) * g\n"),
    Mutant("adamp", "v = b2 * v + (1 - b2)", "v = b1 * v + (1 - b1)"),
    Mutant("adamp", "sqrt(v) / jnp.sqrt(c2) + eps", "sqrt(v) + eps"),
    Mutant("adamp", "jnp.sqrt(c2) + eps", "jnp.sqrt(c2) + eps / jnp.sqrt(c2)"),
    Mutant("adamp", "u = p / c1", "u = p"),
    Mutant("adamp", "b1 * m + (1 - b1) * g if nesterov", "b1 * m + g if nesterov"),
    Mutant("adamp", "direction, p, theta, g, m, v,", "direction, m, theta, g, m, v,"),
    Mutant("adamp", "jnp.where(radial.projects, wd_ratio, 1.0)", "1.0"),
    Mutant("adamp", "rate * rho * theta", "-rate * rho * theta"),
    Mutant("adamp", "rate * rho * theta", "rate / c1 * rho * theta"),
    Mutant("adamp", "(g * theta, g * g", "(p * theta, p * p", file="_projection"),
    Mutant("adamp", "jnp.max(cosine", "jnp.min(cosine", file="_projection"),
    Mutant("adamp", "math.sqrt(dimension)", "dimension", file="_projection"),
    Mutant("adamp", "view(sums, fan_in)", "view(sums, fan_out)", file="_projection"),
    Mutant("adamp", "fan_in * fan_out)", "fan_in)", file="_projection"),
    Mutant("adamp", "p - radial.factor * theta", "p + radial.factor * theta"),
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
    Mutant("sgdp", "jnp.where(radial.projects, wd_ratio, 1.0)", "1.0"),
    Mutant("sgdp", "rate * rho", "-rate * rho"),
    Mutant("sgdp", "d if project_momentum else b_new", "b_new"),
    Mutant("sgdp", "d if project_momentum else b_new", "d"),
    # Muon
    Mutant("muon", "b = beta * b + (1 - beta) * g", "b = beta * b + g"),
    Mutant("muon", "beta * b + (1 - beta) * g if nesterov", "g if nesterov"),
    Mutant("muon", "beta * b + (1 - beta) * g if nesterov", "b if nesterov"),
    Mutant("muon", "if nesterov else b", "if nesterov else g"),
    Mutant("muon", "max(1.0, fan_out / max(fan_in, 1)) ** 0.5", "1.0"),
    Mutant("muon", "fan_out / max(fan_in, 1)", "fan_in / max(fan_out, 1)"),
    Mutant("muon", "max(fan_in, fan_out) ** 0.5", "min(fan_in, fan_out) ** 0.5"),
    Mutant("muon", "fori_loop(0, steps", "fori_loop(1, steps", file="_newton_schulz"),
    Mutant("muon", "c * symmetric(square)", "b * symmetric(square)", file="_newton_schulz"),
    Mutant("muon", "x / (norm + eps)", "x / jnp.maximum(norm, eps)", file="_newton_schulz"),
    Mutant("muon", "x / (norm + eps)", "x / (norm**2 + eps)", file="_newton_schulz"),
    Mutant(
        "muon", "sum(jnp.square(x), (-2, -1)", "sum(jnp.square(x), (-1,)", file="_newton_schulz"
    ),
    Mutant("muon", "sqrt(v) / root + eps)", "sqrt(v) + eps)", file="_adam"),
    Mutant("muon", "* root / (_hyper", "/ root / (_hyper", file="_adam"),
    Mutant("muon", "sqrt(v) + eps), m, v", "sqrt(v) + eps * root), m, v", file="_adam"),
    Mutant("muon", "                adam_learning_rate,\n", "                learning_rate,\n"),
    Mutant("muon", "                adam_weight_decay,\n", "                weight_decay,\n"),
    Mutant("muon", "iteration(x, table[i])", "iteration(x, table[0])", file="_newton_schulz"),
    Mutant("muon", "adam_b1, adam_b2, adam_eps, adam", "adam_b2, adam_b1, adam_eps, adam"),
    Mutant(
        "muon",
        "if x.shape[1] > x.shape[2] else x for",
        "if x.shape[1] < x.shape[2] else x for",
        file="_newton_schulz",
    ),
    # FRUGAL
    Mutant("frugal_adamw", "since // update_gap + 1", "since // update_gap", file="frugal"),
    Mutant("frugal_adamw", "| (since % update_gap == 0)", "", file="frugal"),
    Mutant("frugal_adamw", "since % update_gap == 0", "since % update_gap == 1", file="frugal"),
    Mutant("frugal_adamw", "_scaled(x, free_scale)", "x", file="frugal"),
    Mutant("frugal_adamw", "(_scaled(total, projected_scale)", "(total", file="frugal"),
    Mutant("frugal_adamw", "+ rest[index] if index", "if index", file="frugal"),
    Mutant(
        "frugal_adamw", "left[index] = lower(r,", "left[index] = lower(grads[index],", file="frugal"
    ),
    Mutant("frugal_adamw", '== "reset_all"', '!= "keep"', file="frugal"),
    Mutant("frugal_adamw", 'in ("reset", "reset_all")', "in ()", file="_parts"),
    Mutant(
        "frugal_adamw",
        "jnp.where(refresh, _compat.reshard_like(f, s), s)",
        "jnp.where(refresh, s, _compat.reshard_like(f, s))",
        file="_parts",
    ),
    Mutant("frugal_adamw", "state = carried", "pass", file="_parts"),
    Mutant(
        "frugal_adamw",
        "old[place], new[place], leaf",
        "new[place], old[place], leaf",
        file="_parts",
    ),
    Mutant(
        "frugal_adamw", "squared = _tree.is_non_negative(path)", "squared = False", file="_parts"
    ),
    Mutant(
        "frugal_adamw",
        "self.projection.restore(self.infos, new, u)",
        "self.projection.restore(self.infos, old, u)",
        file="_parts",
    ),
    Mutant(
        "frugal_adamw",
        "self.projection.remainder(self.infos, new,",
        "self.projection.remainder(self.infos, old,",
        file="_parts",
    ),
    Mutant("frugal_adamw", "self.project(new, grads)", "self.project(old, grads)", file="_parts"),
    Mutant("frugal_adamw", "jnp.where(selected, 0, matrix)", "matrix", file="columns"),
    Mutant("frugal_adamw", '-2 if self.axis == "in" else -1', "-2", file="columns"),
    Mutant(
        "frugal_adamw",
        "equal = old[..., :, None] == new[..., None, :]",
        "equal = old[..., None, :] == new[..., :, None]",
        file="columns",
    ),
    Mutant(
        "frugal_adamw",
        "_moved(moment, position, position >= 0, axis)",
        "_moved(moment, position, position >= -1, axis)",
        file="columns",
    ),
    Mutant("frugal_adamw", ".at[selection].set(0, un", ".at[selection].mul(1, un", file="columns"),
    Mutant(
        "frugal_adamw",
        "number_kept(density, size, math.floor)",
        "number_kept(density, size, math.ceil)",
        file="columns",
    ),
    Mutant(
        "frugal_adamw",
        "number_kept(density, size, round)",
        "number_kept(density, size, int)",
        file="svd",
    ),
    Mutant(
        "frugal_adamw",
        "jnp.square(rotation) if squared",
        "jnp.abs(rotation) if squared",
        file="svd",
    ),
    Mutant(
        "frugal_adamw", "_product(_t(before), after)", "_product(_t(after), before)", file="svd"
    ),
    Mutant("frugal_adamw", "rest = x - self._restore", "rest = x + self._restore", file="svd"),
    Mutant(
        "frugal_adamw", "blocks = blocks[::-1]", "blocks = blocks[1:] + blocks[:1]", file="blocks"
    ),
    Mutant(
        "frugal_adamw",
        "place = step.period % len(queue)",
        "place = step.count % len(queue)",
        file="blocks",
    ),
    Mutant("frugal_adamw", "jnp.where(flag != 0, 0, x)", "x", file="blocks"),
    Mutant("frugal_adamw", "scale_by_adam(b1, b2, eps)", "scale_by_adam(b2, b1, eps)"),
    Mutant("frugal_adamw", "        free_scale=free_scale,\n", ""),
    # GaLore
    Mutant("galore_adamw", "eps_in_root=False", "eps_in_root=True"),
    Mutant("galore_adamw", "projected_scale=scale", "free_scale=scale"),
    Mutant("galore_adamw", "decay * (theta + u)", "decay * theta"),
    Mutant("galore_adamw", "(u - rate * decay", "(u + rate * decay"),
    Mutant("galore_adamw", 'on_refresh: OnRefresh = "keep"', 'on_refresh: OnRefresh = "project"'),
    Mutant("galore_adamw", "fan_in <= fan_out if", "fan_in < fan_out if", file="svd"),
    Mutant("galore_adamw", "else fan_in > fan_out", "else fan_in >= fan_out", file="svd"),
    Mutant(
        "galore_adamw", "jnp.where(largest < 0, -1, 1)", "jnp.where(largest > 0, -1, 1)", file="svd"
    ),
    Mutant("galore_adamw", "jnp.argmax(jnp.abs(basis), 0)", "jnp.argmax(basis, 0)", file="svd"),
    Mutant("galore_adamw", "vectors[:, ::-1][:, :rank]", "vectors[:, :rank]", file="svd"),
    Mutant("galore_adamw", "full = (ut.T, v)", "full = (v, ut.T)", file="svd"),
    Mutant(
        "galore_adamw",
        "(size > 0) & jnp.isfinite(size)",
        "True",
        file="svd",
    ),
    # DCT-AdamW
    Mutant("dct_adamw", "(gap - 1, 1)", "(gap, 1)"),
    Mutant("dct_adamw", '"project" if rotate else "keep"', '"keep"'),
    Mutant("dct_adamw", '"project" if rotate else "keep"', '"project"'),
    Mutant("dct_adamw", "None if error_feedback else optax.set_to_zero()", "None"),
    Mutant("dct_adamw", "** self.norm", "** 1", file="dct"),
    Mutant("dct_adamw", "** self.norm", "** 2", file="dct"),
    Mutant("dct_adamw", "if type == 3", "if type == 2", file="dct"),
    Mutant("dct_adamw", "2 * j + 1", "2 * j - 1", file="dct"),
    Mutant("dct_adamw", "jnp.asarray(np.sqrt(1 / size), dtype)", "values", file="dct"),
    Mutant("dct_adamw", "top_k(scores, leaf.kept)", "top_k(-scores, leaf.kept)", file="dct"),
    Mutant("dct_adamw", "lifted = [g + group", "lifted = [g - group", file="frugal"),
    Mutant(
        "dct_adamw",
        "kept = {index: lower(remainders[index]",
        "kept = {index: lower(2 * remainders[index]",
        file="frugal",
    ),
    # BAdam
    Mutant("badam", "optax.set_to_zero(),", "optax.scale_by_sign(),"),
    Mutant("badam", '"reset_all"', '"reset"'),
    Mutant("badam", "decayed = u + jnp", "decayed = u - jnp"),
    Mutant("badam", "jnp.where(treatment.selection != 0, decayed, u)", "decayed"),
    Mutant("badam", "jnp.where(treatment.selection != 0, decayed, u)", "u"),
    Mutant("badam", "            if not selected:\n                return (u,)\n", ""),
    Mutant("badam", "lambda size: min(size, 1)", "lambda size: min(size, 2)"),
    Mutant("badam", "_adam.scale_by_adam(b1, b2, eps)", "_adam.scale_by_adam(b1, b2, 1e-8)"),
    Mutant("badam", "blocks(order, group)", 'blocks("ascending", group)'),
    Mutant(
        "badam",
        "jnp.maximum(first_gap - phase * update_gap // stagger, 1)",
        "jnp.maximum(first_gap - 1, 1)",
        file="frugal",
    ),
]
