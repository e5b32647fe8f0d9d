#!/usr/bin/env bash
# The maximum of an array that holds a NaN, on a CPU.
#
# Guess before running: NaN, as numpy, the documentation of jax.numpy.max and GPUs' eager code have it,
# whatever the length.
# Seen with jax 0.10.2 (Python 3.11 and up), eager and jitted alike: NaN up to some thousand entries.
# In an array of 4,096 zeros with one NaN the maximum is 0, and with the NaN in the last place it is
# minus infinity, a number that is nowhere in the array; the minimum is plus infinity. The infinity
# norm of that array is 0. Sums, argmax, top_k and the element-wise maximum see the NaN.
# Who scales by the largest magnitude (8-bit state, loss scaling, clipping) or watches for NaN with a
# maximum misses it in large arrays, while tests on small ones pass.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp
import numpy as np


def zeros_with_nan(length, place):
    return jnp.zeros(length).at[place].set(jnp.nan)


assert jax.__version__ == "0.10.2"
for place in (0, 511, 1023):
    assert np.isnan(jnp.max(zeros_with_nan(1024, place)))
for name, maximum in {"eager": jnp.max, "jitted": jax.jit(jnp.max)}.items():
    first, middle, last = (float(maximum(zeros_with_nan(4096, i))) for i in (0, 2048, 4095))
    print(f"{name}: maximum of 4096 zeros with NaN first, in the middle, last: {first} {middle} {last}")
    assert (first, middle, last) == (0.0, 0.0, -np.inf)
x = zeros_with_nan(4096, 4095)
print("minimum", jnp.min(x), " infinity norm", jnp.linalg.norm(x, jnp.inf), " sum", jnp.sum(x),
      " argmax", jnp.argmax(x), " top_k", jax.lax.top_k(x, 1)[0], " numpy", np.max(np.asarray(x)))
assert float(jnp.min(x)) == np.inf and float(jnp.linalg.norm(x, jnp.inf)) == 0.0
assert np.isnan(jnp.sum(x)) and int(jnp.argmax(x)) == 4095
assert np.isnan(jax.lax.top_k(x, 1)[0]).all() and np.isnan(np.max(np.asarray(x)))
PYTHON
