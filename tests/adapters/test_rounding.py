"""A kernel gives up what its first factors add as they are stored, in every compiler's program."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_lab import _compat, adapters
from pallas_kernels.targets import ENVIRONMENT
from tests.pallas_kernels.targets import needs

PARAMS = {"w": jax.random.normal(jax.random.key(0), (24, 16))}
NARROW = pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])


def leading(kernel, matrices, key):
    """A start whose factors 16 bits do not hold, without a decomposition."""
    del key
    return matrices[:, :, : kernel.r] / 3, matrices[:, : kernel.r, :] / 7


def start(params, dtype, init=leading):
    config = adapters.LoraConfig(target_modules=["w"], r=4, adapter_dtype=dtype)
    base, lora = adapters.init_adapters(params, config, init=init)
    return base.params["w"], lora["w"], adapters.apply_adapters(base, lora)["w"]


@NARROW
@pytest.mark.parametrize("init", [leading, adapters.pissa("full"), adapters.olora()])
def test_the_function_stays_the_same_inside_of_jit(dtype, init):
    rest, factors, whole = jax.jit(lambda params: start(params, dtype, init))(PARAMS)
    assert {x.dtype for x in factors.values()} == {jnp.dtype(dtype)}
    a, b = (np.asarray(factors[name], np.float64) for name in ("lora_a", "lora_b"))
    # Roundings of float32; those of the factors would be 1e-3 to 1e-2.
    np.testing.assert_allclose(rest + 2.0 * a @ b, PARAMS["w"], rtol=0, atol=5e-6)
    np.testing.assert_allclose(whole, PARAMS["w"], rtol=0, atol=5e-6)


@pytest.mark.parametrize(
    ("dtype", "expected"), [(jnp.bfloat16, 2), (jnp.float16, 2), (jnp.float32, 0), (None, 0)]
)
def test_both_factors_are_rounded_by_what_no_compiler_drops(dtype, expected):
    traced = jax.make_jaxpr(lambda params: start(params, dtype)[:2])(PARAMS)
    assert str(traced).count("reduce_precision[") == expected


@NARROW
def test_rounding_is_that_of_a_conversion(dtype):
    rng = np.random.default_rng(0)
    sizes = np.concatenate([rng.integers(-30, 17, 500), rng.integers(-120, 120, 500)])
    ends = [0, -0.0, np.inf, np.nan, 65504, 65519, 65520, 3e38, 2.0**-14, 2.0**-25, 3 * 2.0**-25]
    values = np.concatenate([rng.normal(size=1000) * 2.0**sizes, ends, -np.array(ends)])
    x = jnp.asarray(values, jnp.float32)
    found = jax.jit(_compat.rounded, static_argnums=1)(x, dtype)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, x.astype(dtype).astype(jnp.float32))
    narrow = x.astype(dtype)
    assert _compat.rounded(narrow, jnp.float32) is narrow


PROGRAM = """\
import re
import jax, jax.numpy as jnp
from pallas_kernels.targets import compile_for
from tests.adapters.test_rounding import start

params = {{"w": jax.ShapeDtypeStruct((1024, 512), jnp.float32)}}
program = compile_for(lambda p: start(p, jnp.{dtype})[:2], params, chip={chip!r}).as_text()
print(len(re.findall(r"= f32\\S* reduce-precision\\(", program)))
"""


@pytest.mark.parametrize(
    ("chip", "dtype"),
    [
        needs.on("h200", "bfloat16"),
        needs.on("h200", "float16"),
        needs.on("v5e", "bfloat16"),
    ],
)
def test_the_compiled_program_rounds_both_factors(chip, dtype):
    path = os.pathsep.join(p or os.getcwd() for p in sys.path)
    child = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(chip=chip, dtype=dtype)],
        env={**os.environ, "PYTHONPATH": path, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    assert int(child.stdout.split()[-1]) >= 2, child.stdout
