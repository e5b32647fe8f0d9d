#!/usr/bin/env bash
# A Python integer beside a narrow integer array in jax.numpy: comparing and clipping.
#
# Guess before running: NumPy 2's behaviour, 30000 < 40000 is True for int16 too, and where the result
# would have to hold 40000 an OverflowError.
# Seen with jax 0.10.2 and NumPy 2.4.6: jax first turns the number into the array's dtype, where it
# wraps without a word. int16: 30000 < 40000 is False (40000 has become -25536), 5 == 65541 is True,
# clip(30000, 0, 40000) is -25536. uint8: 200 < 300 is False (44). NumPy answers True, False and 30000,
# and raises from minimum(30000, 40000). So a bound that is larger than its array's dtype (a cache's
# length beside int16 lengths, a vocabulary of 65541 beside uint16 tokens) inverts a check instead of
# passing it; widening the array first is the way out.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import jax.numpy as jnp
import numpy as np


def answers(xp):
    x = xp.asarray([30000], xp.int16)
    small = xp.asarray([200], xp.uint8)
    five = xp.asarray([5], xp.int16)
    return [bool((x < 40000)[0]), bool((five == 65541)[0]), int(xp.clip(x, 0, 40000)[0]), bool((small < 300)[0])]


print("jax  ", answers(jnp))
print("NumPy", answers(np))
assert answers(jnp) == [False, True, -25536, False]
assert answers(np) == [True, False, 30000, True]
assert int(jnp.minimum(jnp.asarray([30000], jnp.int16), 40000)[0]) == -25536
try:
    np.minimum(np.asarray([30000], np.int16), 40000)
except OverflowError as error:
    print("NumPy's minimum:", error)
else:
    raise AssertionError("NumPy no longer refuses")
PYTHON
