"""Where a method says that it rounds, it does, on every compiler."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxopt_lab import _compat, distributed
from jaxopt_lab.distributed import _rounds
from pallas_kernels.targets import compile_for
from tests.distributed import modes
from tests.distributed.modes import AXIS
from tests.pallas_kernels.targets import needs

HALVES = [jnp.bfloat16, jnp.float16]
EXCHANGES = {
    "diloco": distributed.diloco_exchange(axis_name=AXIS),
    "noloco": distributed.noloco_exchange(axis_name=AXIS),
    "co2": distributed.co2_exchange(axis_name=AXIS),
}


@pytest.mark.parametrize("dtype", HALVES)
def test_rounding_is_conversion(dtype):
    """Also to subnormal numbers, which `jax.lax.reduce_precision` flushes to zero."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=4096).astype(np.float32) * 10.0 ** rng.integers(-9, 6, 4096)
    x = np.concatenate([x, [0.0, -0.0, np.inf, -np.inf, np.nan, 65504.0, 65520.0, 2.0**-24]])
    x = x.astype(np.float32)
    found = np.asarray(jax.jit(_compat.rounded, static_argnums=1)(x, dtype))
    with np.errstate(over="ignore"):
        # NumPy's conversions: XLA is free to leave out a pair of its own.
        expected = x.astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == np.float32
    wide = jnp.asarray(x)
    assert _compat.rounded(wide, jnp.float32) is wide


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", EXCHANGES)
def test_rounds_without_steps_change_nothing(name, dtype):
    exchange = EXCHANGES[name]
    values = np.linspace(-1.0, 1.0, 7) * np.array([1, 1e-6, 1, 3e-5, 1, 1e-7, 1])
    params = jnp.asarray(values, dtype)

    def three_rounds(theta):
        state = exchange.init(theta)
        # Slow weights that the parameters cannot hold.
        state = state._replace(slow=state.slow * (1 + 2.0**-13))
        theta = begun = _rounds.start(state.slow, theta)
        for _ in range(3):
            theta, state = exchange.finish(theta, state, exchange.begin(state))
        return theta, begun, state.slow

    ended, begun, slow = modes.mapped("vmap", three_rounds, 2)(jnp.stack([params] * 2))
    np.testing.assert_array_equal(ended, begun)
    np.testing.assert_array_equal(slow, [params.astype(jnp.float32) * (1 + 2.0**-13)] * 2)


def test_small_steps_of_one_replica_add_up_in_the_slow_weights():
    """Each round one of four moves by one spacing of bfloat16: 16 rounds are four spacings."""
    exchange = distributed.diloco_exchange(optax.sgd(1.0), axis_name=AXIS)
    spacing = 2.0**-7

    def run(theta, index):
        state = exchange.init(theta)
        for turn in range(16):
            step = jnp.where(index == turn % 4, spacing, 0).astype(theta.dtype)
            theta, state = exchange.finish(theta + step, state, exchange.begin(state))
        return state.slow

    slow = modes.mapped("vmap", run, 4)(jnp.ones(4, jnp.bfloat16), jnp.arange(4))
    np.testing.assert_allclose(slow, 1 + 4 * spacing, rtol=1e-6)


@pytest.mark.parametrize("chip", [needs.on("h200"), needs.on("v5e")])
@pytest.mark.parametrize("name", ["descent", "start", *EXCHANGES])
def test_the_compiler_keeps_the_rounding(name, chip):
    slow = jax.ShapeDtypeStruct((4096,), jnp.float32)
    params = jax.ShapeDtypeStruct((4096,), jnp.bfloat16)
    if name in EXCHANGES:
        # One replica on one device: what is counted is no collective.
        exchange = EXCHANGES[name]

        def program(slow, params):
            def finish(slow, params):
                state = exchange.init(params)._replace(slow=slow)
                return exchange.finish(params, state, exchange.begin(state))

            one = jax.vmap(finish, axis_name=AXIS)(slow[None], params[None])
            return jax.tree.map(lambda x: x[0], one)
    else:
        program = getattr(_rounds, name)
    text = compile_for(program, slow, params, chip=chip).as_text()
    assert "reduce-precision(" in str(text)
