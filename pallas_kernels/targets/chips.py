"""The chips that can be compiled for, as data.

The figures of a GPU are those by which XLA:GPU chooses fusions, tiles and block sizes: what the
CUDA driver reports for the chip named in `description`. A TPU's figures are inside `libtpu`; its
compiler needs only the name of a slice of a pod.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import NamedTuple


class Gpu(NamedTuple):
    """An NVIDIA GPU.

    Attributes:
      description: the name that the driver reports.
      compute_capability: major and minor number.
      core_count: streaming multiprocessors.
      fpus_per_core: float32 units of a multiprocessor.
      threads_per_core: threads that a multiprocessor keeps at once.
      shared_memory_per_block: bytes that a block may opt in to.
      l2_cache_size: bytes.
      memory_bandwidth: bytes per second.
      device_memory_size: bytes.
      clock_rate_ghz: highest clock of the multiprocessors.
      topology: partitions x hosts x devices of a host.
      platform: jax's name of the platform.
    """

    description: str
    compute_capability: tuple[int, int]
    core_count: int
    fpus_per_core: int
    threads_per_core: int
    shared_memory_per_block: int
    l2_cache_size: int
    memory_bandwidth: int
    device_memory_size: int
    clock_rate_ghz: float
    topology: str = "1x1x1"
    platform: str = "cuda"


class Tpu(NamedTuple):
    """A TPU generation.

    Attributes:
      topology: the smallest slice that libtpu describes with a whole host.
      platform: jax's name of the platform.
    """

    topology: str
    platform: str = "tpu"


CHIPS: MappingProxyType[str, Gpu | Tpu] = MappingProxyType(
    {
        "a100": Gpu(
            description="NVIDIA A100-SXM4-80GB",
            compute_capability=(8, 0),
            core_count=108,
            fpus_per_core=64,
            threads_per_core=2048,
            shared_memory_per_block=166_912,
            l2_cache_size=41_943_040,
            memory_bandwidth=2_039_040_000_000,
            device_memory_size=85_100_068_864,
            clock_rate_ghz=1.41,
        ),
        "l4": Gpu(
            description="NVIDIA L4",
            compute_capability=(8, 9),
            core_count=58,
            fpus_per_core=128,
            threads_per_core=1536,
            shared_memory_per_block=101_376,
            l2_cache_size=50_331_648,
            memory_bandwidth=300_096_000_000,
            device_memory_size=23_600_000_000,
            clock_rate_ghz=2.04,
        ),
        "h100": Gpu(
            description="NVIDIA H100 80GB HBM3",
            compute_capability=(9, 0),
            core_count=132,
            fpus_per_core=128,
            threads_per_core=2048,
            shared_memory_per_block=232_448,
            l2_cache_size=52_428_800,
            memory_bandwidth=3_352_320_000_000,
            device_memory_size=84_942_979_072,
            clock_rate_ghz=1.98,
        ),
        "h200": Gpu(
            description="NVIDIA H200",
            compute_capability=(9, 0),
            core_count=132,
            fpus_per_core=128,
            threads_per_core=2048,
            shared_memory_per_block=232_448,
            l2_cache_size=52_428_800,
            memory_bandwidth=4_800_000_000_000,
            device_memory_size=151_397_597_184,
            clock_rate_ghz=1.98,
        ),
        "b200": Gpu(
            description="NVIDIA B200",
            compute_capability=(10, 0),
            core_count=148,
            fpus_per_core=128,
            threads_per_core=2048,
            shared_memory_per_block=232_448,
            l2_cache_size=132_644_864,
            memory_bandwidth=7_672_320_000_000,
            device_memory_size=191_514_411_008,
            clock_rate_ghz=1.965,
        ),
        "v4": Tpu("v4:2x2x1"),
        "v5e": Tpu("v5e:2x2"),
        "v5p": Tpu("v5p:2x2x1"),
        "v6e": Tpu("v6e:2x2"),
        "7x": Tpu("tpu7x:2x2x1"),
    }
)


def find_chip(chip: str) -> Gpu | Tpu:
    """Returns the entry of `CHIPS`, or raises a `ValueError` that lists the known names."""
    if not isinstance(chip, str) or chip not in CHIPS:
        raise ValueError(f"chip={chip!r} is not known; expected one of {', '.join(CHIPS)}")
    return CHIPS[chip]


def target_config(gpu: Gpu) -> str:
    """Returns the text form of XLA's ``GpuTargetConfigProto`` for `gpu`.

    Limits that all supported GPUs share are written here and not in the table: a block has at most
    1024 threads and 48 KiB of static shared memory, a core 64 Ki registers and 1 KiB more of shared
    memory than a block may take. From capability 9.0 on, the architecture-specific instructions
    (wgmma, tcgen05) exist on every chip listed, so the feature set is the accelerated one.
    """
    major, minor = gpu.compute_capability
    features = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {gpu.shared_memory_per_block}
  shared_memory_per_core: {gpu.shared_memory_per_block + 1024}
  threads_per_core_limit: {gpu.threads_per_core}
  core_count: {gpu.core_count}
  fpus_per_core: {gpu.fpus_per_core}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {gpu.memory_bandwidth}
  l2_cache_size: {gpu.l2_cache_size}
  clock_rate_ghz: {gpu.clock_rate_ghz}
  device_memory_size: {gpu.device_memory_size}
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {features} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{gpu.description}"
"""
