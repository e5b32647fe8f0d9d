#!/usr/bin/env bash
# optax.global_norm and clip_by_global_norm of 16-bit gradients.
#
# Guess before running: float16 gradients (300, 0) clipped to norm 1 are (1, 0); the norm of 6400 ones
# in 400 bfloat16 leaves is 80 to about a percent.
# Seen with optax 0.2.8 and jax 0.10.2: squares are made in the leaf's dtype and the leaves are added
# one after the other in it. In float16 the square of 300 is infinite, so is the norm, and the clipped
# gradients are all zero: from a gradient entry of 256 on a step is silently no step. In bfloat16 a sum
# of 4096 no longer takes up 16, so that the norm of the 400 leaves is 64: a fifth too small, and what
# is clipped by it comes out at 1.25 of the norm that was asked for. One leaf of 65536 ones is right,
# inside a leaf the sum is wider. Casting the gradients to float32 before the clip is the way out.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 optax==0.2.8 numpy==2.4.6
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import jax.numpy as jnp
import optax

clip = optax.clip_by_global_norm(1.0)


def clipped(gradients):
    return clip.update(gradients, clip.init(gradients))[0]


half = clipped({"w": jnp.array([300.0, 0.0], jnp.float16)})["w"]
full = clipped({"w": jnp.array([300.0, 0.0], jnp.float32)})["w"]
leaves = {f"layer{i}": jnp.ones(16, jnp.bfloat16) for i in range(400)}
norm = float(optax.global_norm(leaves))
wide = {name: leaf.astype(jnp.float32) for name, leaf in clipped(leaves).items()}
after = float(optax.global_norm(wide))
one = float(optax.global_norm({"w": jnp.ones(65536, jnp.bfloat16)}))
print("float16", half, "float32", full)
print("400 leaves", norm, "right 80; after the clip", after, "right 1; one leaf", one, "right 256")
assert half.tolist() == [0.0, 0.0]
assert full.tolist() == [1.0, 0.0]
assert clipped({"w": jnp.array([255.0, 0.0], jnp.float16)})["w"].tolist() == [1.0, 0.0]
assert clipped({"w": jnp.array([256.0, 0.0], jnp.float16)})["w"].tolist() == [0.0, 0.0]
assert norm == 64.0
assert 1.24 < after < 1.26
assert one == 256.0
PYTHON
