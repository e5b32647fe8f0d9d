"""Compile for chips that are not there, and read what their compilers say.

The real compilers for NVIDIA GPUs and for TPUs come with ordinary wheels and run without the chip::

    compiled = compile_for(step, params, state, grads, chip="h200", donate_argnums=(0, 1))
    memory_traffic(compiled).total_bytes      # bytes of device memory that one step moves
    compiled.memory_analysis()                # arguments, outputs, temporaries

In a test, `compile_in_child` does the same in a process of its own, so that a compiler that aborts
ends one check and not the run. On the command line: ``python -m pallas_kernels.targets --help``.
"""

from pallas_kernels.targets.chips import CHIPS, Gpu, Tpu
from pallas_kernels.targets.compile import (
    ENVIRONMENT,
    abstract_devices,
    compile_for,
    missing_compiler,
)
from pallas_kernels.targets.isolation import compile_in_child
from pallas_kernels.targets.resources import (
    KernelResources,
    compile_with_resources,
    read_resources,
)
from pallas_kernels.targets.schedule import (
    KernelSchedule,
    Region,
    compile_with_schedule,
    read_schedules,
)
from pallas_kernels.targets.traffic import Kernel, MemoryTraffic, memory_traffic

__all__ = [
    "CHIPS",
    "ENVIRONMENT",
    "Gpu",
    "Kernel",
    "KernelResources",
    "KernelSchedule",
    "MemoryTraffic",
    "Region",
    "Tpu",
    "abstract_devices",
    "compile_for",
    "compile_in_child",
    "compile_with_resources",
    "compile_with_schedule",
    "memory_traffic",
    "missing_compiler",
    "read_resources",
    "read_schedules",
]
