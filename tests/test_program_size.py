"""How many kernels a leaf adds to the compiled step of each rule and wrapper.

The time that XLA takes for many leaves is about proportional to them, as equal ones are translated
once, and the count, unlike the time, does not depend on what else the machine does.
"""

from __future__ import annotations

import functools
import re

import jax
import pytest

from experiments.bench_update import compile_times
from experiments.bench_update.methods import steps

# Beside `optax.adamw`'s 3, of half kernels and half biases. A projection is renewed in a branch of
# its own.
LIMITS = {
    "lion": 0.7,
    "adabelief": 1,
    "exadam": 1,
    "diffgrad": 1.67,
    "adamp": 2.34,
    "sgdp": 2,
    "cautious_lion": 1.67,
    "muon": 1.34,
    "frugal_adamw": 2,
    "badam": 1.42,
    "dct_adamw": 4,
    "int8_linear_adamw": 2,
    "int8_dynamic_adamw": 2,
    "bfloat16_adamw": 1.34,
    "galore_adamw": 2.5,
    "galore_adamw_gram": 2.5,
    "galore_adamw_gram_128": 1,
    "fused_int8_linear_adamw": 7,
    "fused_int8_dynamic_adamw": 7,
}

# What of a program is no kernel.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "opt-barrier"}
COMPUTATION = re.compile(r"^(?:ENTRY )?%?(\S+) \(.*?\{\n(.*?)\n\}", re.MULTILINE | re.DOTALL)
OPERATION = re.compile(r"^\s+(?:ROOT )?%?\S+ = (?:\(.*?\)|\S+) ([\w-]+)\(", re.MULTILINE)
PART = re.compile(r"(?:calls|to_apply|comparator)=%?([\w.-]+)")


def kernels(step, leaves: int) -> int:
    params = compile_times.parameters(leaves)
    init, update = step
    lowered = jax.jit(update, donate_argnums=(0, 1)).lower(
        params, jax.eval_shape(init, params), params
    )
    # What comes after the counted program, the machine's instructions, need not be good.
    compiled = lowered.compile(compiler_options={"xla_backend_optimization_level": "0"})
    text = compiled.as_text() or ""
    parts = set(PART.findall(text))
    bodies = [body for name, body in COMPUTATION.findall(text) if name not in parts]
    return sum(operation not in FREE for body in bodies for operation in OPERATION.findall(body))


def slope(name: str) -> float:
    """Kernels that eight more leaves add, for each of them."""
    step = steps(width=160)[name]
    return (kernels(step, 24) - kernels(step, 16)) / 8


@functools.cache
def of_adamw() -> float:
    return slope(compile_times.BASE)


@pytest.mark.parametrize("name", LIMITS)
def test_kernels_a_leaf(name):
    assert slope(name) <= LIMITS[name] * of_adamw()


def test_no_rule_is_left_out():
    names = {name for name in steps(width=160) if not name.startswith("products")}
    assert set(LIMITS) == {name for name in names if not name.startswith("optax")}
