"""How many kernels and instructions a leaf adds to the compiled step of each rule and wrapper.

The time that XLA takes for many leaves grows with both, and the counts, unlike the time, do not
depend on what else the machine does.
"""

from __future__ import annotations

import functools
import re

import jax
import numpy as np
import pytest

from experiments.bench_update import compile_times
from experiments.bench_update.methods import steps

# Kernels and instructions beside `optax.adamw`'s, of half kernels and half biases, and a tenth more
# of the latter. A projection is renewed in a branch of its own.
LIMITS = {
    "lion": (0.7, 0.75),
    "adabelief": (1, 1.1),
    "exadam": (1, 1.5),
    "diffgrad": (1.67, 1.3),
    "adamp": (2.34, 2.2),
    "sgdp": (2, 1.5),
    "cautious_lion": (1.67, 1.7),
    "muon": (1.34, 1.0),
    "frugal_adamw": (2, 1.9),
    "badam": (1.42, 0.6),
    "dct_adamw": (4.34, 4.1),
    "int8_linear_adamw": (2.5, 3.8),
    "int8_dynamic_adamw": (2.34, 3.1),
    "bfloat16_adamw": (1.34, 2.9),
    "galore_adamw": (2.84, 2.1),
    "galore_adamw_gram": (2.84, 2.1),
    "galore_adamw_gram_128": (1, 1.0),
    "fused_int8_linear_adamw": (7, 4.9),
    "fused_int8_dynamic_adamw": (7, 5.0),
}

# What of a program is no kernel.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "opt-barrier"}
COMPUTATION = re.compile(r"^(?:ENTRY )?%?(\S+) \(.*?\{\n(.*?)\n\}", re.MULTILINE | re.DOTALL)
OPERATION = re.compile(r"^\s+(?:ROOT )?%?\S+ = (?:\(.*?\)|\S+) ([\w-]+)\(", re.MULTILINE)
PART = re.compile(r"(?:calls|to_apply|comparator)=%?([\w.-]+)")


def counts(step, leaves: int) -> np.ndarray:
    """Kernels and instructions of a step."""
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
    operations = [found for body in bodies for found in OPERATION.findall(body)]
    instructions = re.findall(r"^\s+(?:ROOT )?%?\S+ = ", text, re.MULTILINE)
    return np.array([sum(found not in FREE for found in operations), len(instructions)])


def slopes(name: str) -> np.ndarray:
    """Kernels and instructions that eight more leaves add, for each of them."""
    step = steps(width=160)[name]
    return (counts(step, 24) - counts(step, 16)) / 8


@functools.cache
def of_adamw() -> np.ndarray:
    return slopes(compile_times.BASE)


@pytest.mark.parametrize("name", LIMITS)
def test_kernels_and_instructions_a_leaf(name):
    assert (slopes(name) <= LIMITS[name] * of_adamw()).all()


def test_no_rule_is_left_out():
    names = {name for name in steps(width=160) if not name.startswith("products")}
    assert set(LIMITS) == {name for name in names if not name.startswith("optax")}
