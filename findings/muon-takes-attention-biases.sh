#!/usr/bin/env bash
# optax.contrib.muon on Flax's attention layer, with its default choice of matrices.
#
# Guess before running: the kernels of query, key, value and out are orthogonalised, biases are Adam's.
# Seen with optax 0.2.8, flax 0.12.8, jax 0.10.2: the other way round. A kernel has three axes (embed,
# heads, head size), and only what has two is taken; the biases of query, key and value have two (heads,
# head size) and are orthogonalised. Both go on without a message. Axes by hand are the remedy
# (`muon_weight_dimension_numbers`).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q --disable-pip-version-check \
    jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 optax==0.2.8 flax==0.12.8
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import jax
import optax
from flax import nnx

layer = nnx.MultiHeadAttention(4, 32, decode=False, rngs=nnx.Rngs(0))
params = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
state = optax.contrib.muon(1e-2).init(params)
momentum = state.inner_states["muon"].inner_state[0].mu
taken = {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
    for path, leaf in jax.tree_util.tree_leaves_with_path(momentum)
}
print("orthogonalised:", taken)
assert taken == {f"{name}/bias": (4, 8) for name in ("key", "query", "value")}
PYTHON
