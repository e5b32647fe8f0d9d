#!/usr/bin/env bash
# safetensors.numpy.save_file of a view: a transpose, every second column.
#
# Guess before running: a view is copied, or refused as save_file of safetensors.torch refuses it.
# Seen with safetensors 0.8.0 and NumPy 2.4.6: neither. The header has the view's shape, the bytes are
# those of the array behind it in its own order: a transposed (2, 3) array comes back as (3, 2) with the
# entries in rows as they lay before, and of x[:, ::2] the first four numbers of x. No warning. Scripts
# that turn (inputs, outputs) into (outputs, inputs) with `.T` write such files. np.ascontiguousarray
# before saving is the way out.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6
"$folder/venv/bin/python" - "$folder/file.safetensors" <<'PYTHON'
import sys

import numpy as np
from safetensors.numpy import load_file, save_file

x = np.arange(6, dtype=np.float32).reshape(2, 3)
save_file({"transposed": x.T, "strided": x[:, ::2], "copied": np.ascontiguousarray(x.T)}, sys.argv[1])
found = {name: array.tolist() for name, array in load_file(sys.argv[1]).items()}
print("x.T    ", x.T.tolist(), "read", found["transposed"])
print("x[:,::2]", x[:, ::2].tolist(), "read", found["strided"])
assert found["copied"] == x.T.tolist() == [[0, 3], [1, 4], [2, 5]]
assert found["transposed"] == [[0, 1], [2, 3], [4, 5]]
assert found["strided"] == [[0, 1], [2, 3]]
PYTHON
