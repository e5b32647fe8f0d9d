"""The reference, against numpy in float64; it is what users get for higher derivatives."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from pallas_kernels.attention import reference
from tests.pallas_kernels.attention import cases

# Half precision is where rounding could hide; every feature is there in float32.
HALF = [
    cases.CASES[i].replace(dtype=dtype, name=f"{cases.CASES[i]}, {dtype}")
    for dtype in ("bfloat16", "float16")
    for i in (34,)
]


@pytest.mark.parametrize(
    "case", [*cases.some_slow(cases.CASES), *cases.BY_DISTANCE, *HALF], ids=str
)
def test_values_and_gradients(case):
    problem = cases.build(case)
    cases.check(case, cases.run(functools.partial(reference.attend, problem.settings), problem))


def test_higher_derivatives_and_forward_mode():
    case = cases.Case("small", queries=5, keys=7, heads=2, kv_heads=1, head_dim=4, right=0,
                      bias="nts", sinks=True, soft_cap=3.0)  # fmt: skip
    with jax.enable_x64(True):
        settings, operands, _ = cases.build(case)
        operands = jax.tree.map(
            lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x,
            operands,
        )

        def fn(query, key, value, bias, sinks):
            return reference.attend(
                settings,
                operands._replace(query=query, key=key, value=value, bias=bias, sinks=sinks),
            )

        primals = (operands.query, operands.key, operands.value, operands.bias, operands.sinks)
        check_grads(jax.jit(fn), primals, order=2, modes=("fwd", "rev"), rtol=1e-5)


def test_keeps_float64():
    with jax.enable_x64(True):
        query = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 1, 4)))
        assert query.dtype == jnp.float64
        settings = cases.Settings(scale=0.5)
        output, lse = reference.attend(settings, cases.Operands(query, query, query))
        assert output.dtype == lse.dtype == jnp.float64
