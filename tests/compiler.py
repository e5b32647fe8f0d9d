"""What XLA's CPU compiler is told in tests: eight pretend devices, and to be quick."""

from __future__ import annotations

import os

import jaxlib.version

# Most of a test's time is XLA's CPU compiler, which is twice as fast without the optimizations that
# take longest.
FEWER_OPTIMIZATIONS = [
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
]
if tuple(map(int, jaxlib.version.__version__.split(".")[:2])) < (0, 11):  # newer ones abort at it
    FEWER_OPTIMIZATIONS.append("--xla_cpu_use_fusion_emitters=false")


def set_flags(*, optimized: bool) -> None:
    """Adds to `XLA_FLAGS`, for a backend that has not been started yet and for subprocesses."""
    flags = ["--xla_force_host_platform_device_count=8"]
    if not optimized:
        flags += FEWER_OPTIMIZATIONS
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags])
