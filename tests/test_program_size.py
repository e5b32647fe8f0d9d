"""How many instructions a leaf adds to the compiled step of each rule and wrapper.

The time that XLA takes for many leaves is about proportional to them, and the count, unlike the
time, does not depend on what else the machine does.
"""

from __future__ import annotations

import functools
import re

import jax
import pytest

from experiments.bench_update import compile_times
from experiments.bench_update.methods import steps

# Beside `optax.adamw`'s, of half kernels and half biases: a tenth above what they are.
LIMITS = {
    "lion": 0.75,
    "adabelief": 1.1,
    "exadam": 1.5,
    "diffgrad": 1.3,
    "adamp": 2.2,
    "sgdp": 1.5,
    "cautious_lion": 1.7,
    "muon": 1.0,
    "frugal_adamw": 1.9,
    "badam": 0.6,
    "dct_adamw": 4.1,
    "int8_linear_adamw": 3.8,
    "int8_dynamic_adamw": 3.1,
    "bfloat16_adamw": 2.9,
    "galore_adamw": 2.1,
    "galore_adamw_gram": 2.1,
    "galore_adamw_gram_128": 1.0,
    "fused_int8_linear_adamw": 4.9,
    "fused_int8_dynamic_adamw": 5.0,
}


def instructions(step, leaves: int) -> int:
    params = compile_times.parameters(leaves)
    init, update = step
    lowered = jax.jit(update, donate_argnums=(0, 1)).lower(
        params, jax.eval_shape(init, params), params
    )
    # What comes after the counted program, the machine's instructions, need not be good.
    compiled = lowered.compile(compiler_options={"xla_backend_optimization_level": "0"})
    text = compiled.as_text() or ""
    return len(re.findall(r"^\s+(?:ROOT )?%?\S+ = ", text, re.MULTILINE))


def slope(name: str) -> float:
    """Instructions that eight more leaves add, for each of them."""
    step = steps(width=160)[name]
    return (instructions(step, 24) - instructions(step, 16)) / 8


@functools.cache
def of_adamw() -> float:
    return slope(compile_times.BASE)


@pytest.mark.parametrize("name", LIMITS)
def test_instructions_a_leaf(name):
    assert slope(name) <= LIMITS[name] * of_adamw()


def test_no_rule_is_left_out():
    names = {name for name in steps(width=160) if not name.startswith("products")}
    assert set(LIMITS) == {name for name in names if not name.startswith("optax")}
