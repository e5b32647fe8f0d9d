#!/usr/bin/env bash
# Restoring with orbax into a tree of `jax.ShapeDtypeStruct` whose dtype is not the stored one.
#
# Guess before running: another dtype is refused, as another shape is.
# Seen with orbax-checkpoint 0.12.8 and jax 0.10.2: another shape is refused by name, and another dtype is
# cast without a word, float32 to bfloat16 and even to int32, where 0.75 becomes 0. A moment that was kept in
# float32 comes back rounded if the optimizer is now made with another `mu_dtype`, and the run goes on.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q --disable-pip-version-check \
    jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 orbax-checkpoint==0.12.8
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - "$folder/saved" 2>/dev/null <<'PYTHON'
import sys

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(sys.argv[1], {"w": jnp.array([0.75, 1.75, 257.5])})
    checkpointer.wait_until_finished()

    def restored(shape, dtype):
        return checkpointer.restore(sys.argv[1], {"w": jax.ShapeDtypeStruct(shape, dtype)})["w"]

    for dtype in (jnp.float32, jnp.bfloat16, jnp.int32):
        print(jnp.dtype(dtype), restored((3,), dtype).tolist())
    assert restored((3,), jnp.bfloat16).tolist() == [0.75, 1.75, 258.0]
    assert restored((3,), jnp.int32).tolist() == [0, 1, 257]
    try:
        restored((4,), jnp.float32)
    except ValueError as error:
        print("another shape:", str(error).split(".")[0])
    else:
        raise SystemExit("another shape was restored")
PYTHON
