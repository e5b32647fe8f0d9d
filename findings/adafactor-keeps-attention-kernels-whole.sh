#!/usr/bin/env bash
# What optax.adafactor keeps for the kernels of attention as Flax shapes them.
#
# Guess before running: a row and a column of second moments for each kernel, for (1024, 16 heads, 64) as
# for a Dense kernel (1024, 1024) of as many entries.
# Seen with optax 0.2.8 and jax 0.10.2: the kernel with three axes keeps one second moment for each of its
# entries, 512 times as many as the Dense kernel. The second largest axis decides alone, and head sizes
# are below its threshold of 128 (`min_dim_size_to_factor`). With a head size of 128 it is factored, for
# each head by itself. Nothing is said, and who counts on sublinear memory pays for query, key, value and
# out in full.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q --disable-pip-version-check \
    jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 optax==0.2.8
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp
import optax


def second_moments(shape):
    state = optax.adafactor(1e-3).init({"kernel": jnp.zeros(shape)})[0]
    kept = [x["kernel"] for x in (state.v_row, state.v_col, state.v)]
    return sum(x.size for x in kept if x.size > 1), [x.shape for x in kept if x.size > 1]


found = {shape: second_moments(shape) for shape in ((1024, 1024), (1024, 16, 64), (1024, 8, 128))}
for shape, (count, kept) in found.items():
    print(f"{shape}: {count:,} second moments in {kept}")
assert found[1024, 1024] == (2048, [(1024,), (1024,)])
assert found[1024, 16, 64] == (1024 * 1024, [(1024, 16, 64)])
assert found[1024, 8, 128][0] == 8 * (1024 + 128)
PYTHON
