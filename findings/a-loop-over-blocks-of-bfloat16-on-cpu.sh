#!/usr/bin/env bash
# A loop that reads a narrow weight block by block and widens each block, compiled for a CPU.
#
# Guess before running: the temporary memory is that of one block in float32 and its product, whatever
# the weight's dtype; to widen block by block is how one keeps a weight narrow.
# Seen with jax 0.10.2, for a weight (512, 32768) in 32 blocks: float32, float16 and int8 take what one
# block takes, up to 2.1 MB. bfloat16 takes 69 MB, a float32 copy of the whole weight made before the
# loop, and float8_e4m3fn takes 36 MB, a copy of the whole in two bytes. The narrow weight is there as
# well, so that it takes three times the memory of bfloat16, and more than float32 would. (jax 0.12 keeps
# one block of bfloat16, and still copies float8.)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp
from jax import lax

ROWS, WIDTH, COLUMNS, BLOCK = 64, 512, 32768, 1024


def total(x, weight):
    def step(i, found):
        block = lax.dynamic_slice(weight, (0, i * BLOCK), (WIDTH, BLOCK))
        return found + jnp.exp(x @ block.astype(jnp.float32)).sum()

    return lax.fori_loop(0, COLUMNS // BLOCK, step, jnp.float32(0))


def temporary(dtype):
    x = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)
    weight = jax.ShapeDtypeStruct((WIDTH, COLUMNS), dtype)
    compiled = jax.jit(total).lower(x, weight).compile()
    return compiled.memory_analysis().temp_size_in_bytes


one_block, whole = 4 * WIDTH * BLOCK, WIDTH * COLUMNS
for dtype in (jnp.float32, jnp.float16, jnp.int8, jnp.bfloat16, jnp.float8_e4m3fn):
    found = temporary(dtype)
    print(f"{jnp.dtype(dtype).name}: {found / 1e6:.1f} MB")
    if dtype == jnp.bfloat16:
        assert 4 * whole < found < 4.2 * whole
    elif dtype == jnp.float8_e4m3fn:
        assert 2 * whole < found < 2.2 * whole
    else:
        assert found < 1.1 * one_block
PYTHON
