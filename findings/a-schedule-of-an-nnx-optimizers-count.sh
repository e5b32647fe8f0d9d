#!/usr/bin/env bash
# Asking a schedule for the rate at the count that flax.nnx.Optimizer keeps.
#
# Guess before running: the count in `optimizer.opt_state` is an array; every optax schedule takes it.
# Seen with flax 0.12.8, optax 0.2.8, jax 0.10.2: the count is an nnx variable, on which arithmetic
# works and "less than a number" does not. Constant, linear, cosine and piecewise schedules answer;
# whatever is joined of several, warm-up and cosine decay among them, raises a TypeError. With
# `flax.nnx.pure` or `jax.numpy.asarray(count[...])` all answer.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q --disable-pip-version-check \
    jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 optax==0.2.8 flax==0.12.8
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import jax.numpy as jnp
import optax
from flax import nnx

schedules = {
    "constant": optax.constant_schedule(0.1),
    "linear": optax.linear_schedule(1.0, 0.0, 10),
    "cosine": optax.cosine_decay_schedule(1.0, 50),
    "piecewise": optax.piecewise_constant_schedule(1.0, {5: 0.1}),
    "warm-up and cosine": optax.warmup_cosine_decay_schedule(0.0, 1.0, 10, 50),
    "joined constants": optax.join_schedules([optax.constant_schedule(r) for r in (1.0, 0.1)], [5]),
}
refused = set()
for name, schedule in schedules.items():
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(schedule), wrt=nnx.Param)
    count = optimizer.opt_state[1].count
    if name == "constant":
        continue  # optax keeps no count for it to be asked with
    try:
        print(f"{name}: {schedule(count)}")
    except TypeError as error:
        print(f"{name}: {type(count).__name__}: {error}")
        refused.add(name)
    schedule(jnp.asarray(count[...]))
assert refused == {"warm-up and cosine", "joined constants"}, refused
PYTHON
