#!/usr/bin/env bash
# jax.nn.dot_product_attention with the largest 32-bit integer as its window.
#
# Guess before running: a window that is longer than any sequence is no window; configurations write
# sys.maxsize-like numbers there for layers without one.
# Seen with jax 0.10.2: 2**31 - 8 on 6 positions is no window, 2**31 - 1 gives other numbers without a
# word (off by more than 1 on unit normal inputs). It is the side that looks back: (2**31 - 1, 0), as
# causal layers have it, is wrong, (0, 2**31 - 1) is right. Clipping the window to the length of the
# keys is the way out.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp

q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 6, 2, 8))


def attend(window, **options):
    return jax.nn.dot_product_attention(q, k, v, local_window_size=window, **options)


def difference(a, b):
    return float(jnp.abs(a - b).max())


largest = 2**31 - 1
found = {
    "2**31 - 8": difference(attend(2**31 - 8), attend(None)),
    "2**31 - 1": difference(attend(largest), attend(None)),
    "(0, 2**31 - 1)": difference(attend((0, largest)), attend((0, 6))),
    "(2**31 - 1, 0)": difference(attend((largest, 0)), attend((6, 0))),
}
print(found)
assert found["2**31 - 8"] == 0.0 == found["(0, 2**31 - 1)"]
assert found["2**31 - 1"] > 1.0
assert found["(2**31 - 1, 0)"] > 1.0
PYTHON
