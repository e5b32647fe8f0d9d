#!/usr/bin/env bash
# float8 arrays through safetensors.flax, there and back.
#
# Guess before running: what save_file writes load_file reads; bfloat16, which NumPy does not have
# either, goes both ways.
# Seen with safetensors 0.8.0, jax 0.10.2 and NumPy 2.4.6: float8_e4m3fn is saved without a word, and load_file
# of that file raises AttributeError: NumPy has no attribute of the dtype's name. The file is whole: its
# header says F8_E4M3, and its bytes seen as ml_dtypes.float8_e4m3fn are the numbers. A training run that
# saves so finds out when it resumes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 \
    safetensors==0.8.0 flax==0.12.8
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - "$folder/file.safetensors" <<'PYTHON'
import json
import sys

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors.flax import load_file, save_file

path = sys.argv[1]
values = [1.0, -2.0, 0.5]
save_file({"x": jnp.array(values, jnp.bfloat16)}, path)
assert load_file(path)["x"].tolist() == values
save_file({"x": jnp.array(values, jnp.float8_e4m3fn)}, path)
try:
    load_file(path)
except AttributeError as error:
    print("load_file:", error)
else:
    raise AssertionError("load_file reads it now")
raw = open(path, "rb").read()
length = int.from_bytes(raw[:8], "little")
header = json.loads(raw[8 : 8 + length])
start, end = header["x"]["data_offsets"]
found = np.frombuffer(raw[8 + length + start : 8 + length + end], ml_dtypes.float8_e4m3fn)
print(header["x"]["dtype"], found)
assert header["x"]["dtype"] == "F8_E4M3"
assert found.astype(np.float32).tolist() == values
PYTHON
