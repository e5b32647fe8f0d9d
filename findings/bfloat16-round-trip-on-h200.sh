#!/usr/bin/env bash
# Rounding a float32 array to bfloat16 and back, compiled for an NVIDIA H200, without the chip.
#
# Guess before running: x.astype(bfloat16).astype(float32) rounds, as it does eagerly and on a CPU.
# Seen with jax 0.10.2 and its CUDA 13 compiler: the pair of conversions is deleted, also where the
# rounded value is subtracted from the original, so that a computed rounding error is exactly 0. The
# same holds for float16. The CPU's program keeps the pair. jax.lax.reduce_precision is kept by both.
# Compensated sums, error feedback, "what the weights will really be" and exact splits of a matrix into
# high and low halves must not rely on conversions.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 \
    numpy==2.4.6 absl-py==2.3.1 jax-cuda13-plugin==0.10.2 jax-cuda13-pjrt==0.10.2
JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding

CONFIG = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 151000000000 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 patch: 0 }
device_description_str: "NVIDIA H200"
"""


def by_conversion(dtype):
    return lambda x: x - x.astype(dtype).astype(jnp.float32)


def by_reduce_precision(exponent, mantissa):
    return lambda x: x - jax.lax.reduce_precision(x, exponent, mantissa)


absent = topologies.get_topology_desc(
    topology_name="h200", platform="cuda", topology="1x1x1", target_config=CONFIG
)
gpu = NamedSharding(Mesh(np.array(absent.devices), ("d",), axis_types=(AxisType.Auto,)), jax.P())
cpu = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])


def roundings(function, sharding):
    x = jax.ShapeDtypeStruct((4096,), jnp.float32, sharding=sharding)
    program = jax.jit(function).lower(x).compile().as_text()
    return len(re.findall(r"= (?:bf16|f16)\S* convert\(|reduce-precision\(", program))


found = {
    "bfloat16": [roundings(by_conversion(jnp.bfloat16), place) for place in (gpu, cpu)],
    "float16": [roundings(by_conversion(jnp.float16), place) for place in (gpu, cpu)],
    "reduce_precision(8, 7)": [roundings(by_reduce_precision(8, 7), place) for place in (gpu, cpu)],
}
for name, (on_gpu, on_cpu) in found.items():
    print(f"{name}: roundings in the program for an H200: {on_gpu}, for a CPU: {on_cpu}")
assert found["bfloat16"][0] == 0 and found["float16"][0] == 0
assert all(on_cpu > 0 for _, on_cpu in found.values()) and found["reduce_precision(8, 7)"][0] > 0
eager = by_conversion(jnp.bfloat16)(jnp.float32(1.001))
print("eager rounding error of 1.001:", eager)
assert eager != 0
PYTHON
