#!/usr/bin/env bash
# optax.inject_hyperparams around optax.adam, for parameters in bfloat16.
#
# Guess before running: hyper-parameters are float32 numbers in the state; training goes on.
# Seen with optax 0.2.8 and jax 0.10.2: they take the parameters' dtype. In bfloat16 b2 = 0.999 is 1,
# so that the bias correction divides by zero, and every update is NaN from the first step on.
# With hyperparam_dtype=jax.numpy.float32 the same line trains.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q --disable-pip-version-check \
    jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 optax==0.2.8
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import functools

import jax.numpy as jnp
import optax

params = {"w": jnp.ones(4, jnp.bfloat16)}
for dtype in (None, jnp.float32):
    make = functools.partial(optax.inject_hyperparams, hyperparam_dtype=dtype)
    tx = make(optax.adam)(learning_rate=1e-2)
    state = tx.init(params)
    updates, _ = tx.update(params, state, params)
    print(dtype, "b2 =", state.hyperparams["b2"], state.hyperparams["b2"].dtype, updates["w"])
    is_nan = bool(jnp.isnan(updates["w"]).all())
    assert is_nan == (dtype is None)
    assert (float(state.hyperparams["b2"]) == 1.0) == (dtype is None)
PYTHON
