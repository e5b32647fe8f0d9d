#!/usr/bin/env bash
# What a CPU sends when arrays in bfloat16 are exchanged between its devices (or hosts).
#
# Guess before running: an all-reduce may be widened to add in float32; what is only moved, by
# all_gather or ppermute, is two bytes an entry.
# Seen with jax 0.10.2: the compiled program gathers, permutes and reduces float32, twice the bytes.
# float16 and int8 stay as they are. Bytes counted from shapes and dtypes in the source are half of what
# crosses the link; sent as uint16 (a bit cast) the same array costs two bytes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
XLA_FLAGS=--xla_force_host_platform_device_count=4 JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import re

import jax
import jax.numpy as jnp
from jax import lax

mesh = jax.make_mesh((4,), ("d",), (jax.sharding.AxisType.Auto,))
ring = [(i, (i + 1) % 4) for i in range(4)]
moves = {
    "all-gather": (lambda x: lax.all_gather(x, "d"), jax.P("d")),
    "collective-permute": (lambda x: lax.ppermute(x, "d", ring), jax.P("d")),
    "all-reduce": (lambda x: lax.psum(x, "d"), jax.P()),
}
for operation, (move, out) in moves.items():
    for dtype, expected in ((jnp.bfloat16, "f32"), (jnp.float16, "f16"), (jnp.int8, "s8")):
        mapped = jax.shard_map(move, mesh=mesh, in_specs=jax.P("d"), out_specs=out)
        program = jax.jit(mapped).lower(jax.ShapeDtypeStruct((64, 128), dtype)).compile().as_text()
        (found,) = set(re.findall(rf"= (\w+)\[[\d,]*\]\S* {operation}\(", program))
        print(f"{operation} of {dtype.__name__}: {found}")
        assert found == expected


def as_bits(x):
    return lax.bitcast_convert_type(
        lax.ppermute(lax.bitcast_convert_type(x, jnp.uint16), "d", ring), jnp.bfloat16
    )


mapped = jax.shard_map(as_bits, mesh=mesh, in_specs=jax.P("d"), out_specs=jax.P("d"))
program = jax.jit(mapped).lower(jax.ShapeDtypeStruct((64, 128), jnp.bfloat16)).compile().as_text()
assert set(re.findall(r"= (\w+)\[[\d,]*\]\S* collective-permute\(", program)) == {"u16"}
print("as bits: u16")
PYTHON
