#!/usr/bin/env bash
# Parameters and optimizer state donated to a jitted step, the usual way to train in place.
#
# Guess before running: works for every optimizer of optax, as for optax.adamw.
# Seen with optax 0.2.8 and jax 0.10.2: `optax.contrib.prodigy` and `optax.contrib.dog` keep the first
# parameters, and `init` hands out the same buffers again rather than copies. The very first donated step
# then ends with "Attempt to donate the same buffer twice", an error of the runtime which names neither
# the optimizer nor the leaf. `init` under `jax.jit` gives buffers of their own, and the same step runs.
# `optax.contrib.schedule_free_adamw`, which keeps parameters as well, runs either way.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q --disable-pip-version-check \
    jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 optax==0.2.8
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON' 2>/dev/null
import jax
import jax.numpy as jnp
import optax

RULES = {
    "adamw": optax.adamw(1e-2),
    "schedule_free_adamw": optax.contrib.schedule_free_adamw(1e-2),
    "prodigy": optax.contrib.prodigy(1.0),
    "dog": optax.contrib.dog(1e-2),
}


def outcome(tx, init):
    params = {"w": jnp.ones((64, 64))}
    state = init(params)

    def step(params, state):
        updates, state = tx.update(jax.tree.map(lambda x: 0.1 * x, params), state, params)
        return optax.apply_updates(params, updates), state

    try:
        jax.jit(step, donate_argnums=(0, 1))(params, state)
    except jax.errors.JaxRuntimeError as error:
        assert "donate the same buffer twice" in str(error)
        return "refused"
    return "runs"


found = {name: (outcome(tx, tx.init), outcome(tx, jax.jit(tx.init))) for name, tx in RULES.items()}
for name, (plain, jitted) in found.items():
    print(f"{name:20} after init: {plain:8} after a jitted init: {jitted}")
runs, refused = ("runs", "runs"), ("refused", "runs")
assert list(found.values()) == [runs, runs, refused, refused], found
PYTHON
