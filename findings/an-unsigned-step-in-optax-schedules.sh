#!/usr/bin/env bash
# The step counter of flax.nnx.Optimizer given to an optax schedule that begins later.
#
# Guess before running: linear_schedule(1, 0, 100, transition_begin=1000) is 1 at step 0.
# Seen with optax 0.2.8, flax 0.12.8 and jax 0.10.2: nnx.Optimizer counts in uint32; the schedule subtracts
# its beginning from the step, 0 - 1000 wraps to 4294966296, and the clip to the range of the decay
# makes that its end: the rate is 0 for all steps before the beginning, and right from there on. With
# an int32 step it is 1. polynomial_schedule and exponential_decay with transition_begin do the same.
# Inside the optimizer the schedule sees optax's own int32 count and is right, so that only what a
# training loop logs, or takes for its own rate, is wrong.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 optax==0.2.8 flax==0.12.8 numpy==2.4.6
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import jax.numpy as jnp
import optax
from flax import nnx

model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
schedule = optax.linear_schedule(1.0, 0.0, 100, transition_begin=1000)
optimizer = nnx.Optimizer(model, optax.sgd(schedule), wrt=nnx.Param)
step = optimizer.step[...]
print(step.dtype, float(schedule(step)), "int32", float(schedule(jnp.int32(0))))
assert step.dtype == jnp.uint32
assert float(schedule(step)) == 0.0
assert float(schedule(jnp.int32(0))) == 1.0
assert [float(schedule(jnp.uint32(t))) for t in (999, 1000, 1050)] == [0.0, 1.0, 0.5]
decay = optax.exponential_decay(1.0, 100, 0.5, transition_begin=1000)
print("exponential_decay", float(decay(jnp.uint32(5))), "int32", float(decay(jnp.int32(5))))
assert (float(decay(jnp.uint32(5))), float(decay(jnp.int32(5)))) == (0.0, 1.0)
polynomial = optax.polynomial_schedule(1.0, 0.0, 2, 100, transition_begin=1000)
assert (float(polynomial(step)), float(polynomial(jnp.int32(0)))) == (0.0, 1.0)
before = model.bias[...]
optimizer.update(model, nnx.grad(lambda model: model(jnp.ones((1, 2))).sum())(model))
assert (before - model.bias[...]).tolist() == [1.0, 1.0]  # the optimizer's own rate is 1
PYTHON
