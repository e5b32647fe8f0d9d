"""What an NVIDIA GPU's assembler says of the Mosaic GPU kernels of a program.

Registers that do not fit are kept in local memory (spilled), which a fast kernel cannot afford, and
shared memory bounds how many blocks run on a core at a time. The compiler reports both to a folder
that is named before it starts, so the program is compiled in a child process.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pallas_kernels.targets.chips import Gpu, find_chip
from pallas_kernels.targets.isolation import compile_in_child

_REPORT = ".ptxas"
_PASSES = ".mlir-passes.log"
_NUMBERED = re.compile(r"(?P<name>.+)_(?P<number>\d+)")
_CONSTANT = re.compile(r"(%\w+) = arith\.constant (\d+) : i32")
_DYNAMIC_SHARED_MEMORY = re.compile(r"dynamic_shared_memory_size (%\w+)")


class KernelResources(NamedTuple):
    """What one kernel needs of a GPU.

    Attributes:
      name: name of the kernel.
      registers: of a thread when the kernel starts.
      spill_stores: bytes that a thread writes to local memory for want of registers.
      spill_loads: bytes that it reads back.
      stack: bytes of local memory of a thread.
      shared_memory: bytes of a block.
      barriers: named barriers of a block.
      warnings: such as matrix products that wait for each other.
    """

    name: str
    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    shared_memory: int
    barriers: int
    warnings: tuple[str, ...]


def compile_with_resources(
    function: str,
    chip: str,
    *,
    topology: str | None = None,
    trip_counts: Mapping[str, int] | None = None,
    timeout: float = 600,
) -> dict[str, Any]:
    """Compiles a case for a GPU and reports, with everything else, what its kernels need.

    Kernels written for Mosaic GPU (`jax.experimental.pallas.mosaic_gpu`) are reported, those that
    XLA or Triton generate are not.

    Args:
      function: ``"package.module:function"``, as for `compile_in_child`.
      chip: The name of a GPU in `CHIPS`.
      topology: The size of the machine, such as ``"1x1x8"`` (GPUs: hosts, devices of each) or
        ``"v5e:16x16"`` (a slice of TPUs); by default one device or one host.
      trip_counts: How often each loop runs whose trip count depends on data, by the name of the
        ``while`` instruction.
      timeout: Seconds until the child is ended.

    Returns:
      The report of `compile_in_child`, with one more entry: ``"resources"``, a list of the fields
      of `KernelResources`, one for each kernel in the order of compilation.

    Raises:
      ValueError: `chip` is no GPU, or as `compile_in_child`.
      RuntimeError: As `compile_in_child`.
      TimeoutError: The child did not end in time.

    Example:
      >>> report = compile_with_resources("my_project.cases:step", "h200")  # doctest: +SKIP
      >>> [(k["name"], k["registers"], k["spill_stores"]) for k in report["resources"]]
      ... # doctest: +SKIP
      [('attention_forward', 168, 0)]
    """
    if not isinstance(find_chip(chip), Gpu):
        raise ValueError(f"chip={chip!r} has no registers to report; expected a GPU")
    with tempfile.TemporaryDirectory() as folder:
        report = compile_in_child(
            function,
            chip,
            topology=topology,
            trip_counts=trip_counts,
            timeout=timeout,
            environment={"MOSAIC_GPU_DUMP_PTXAS": "1", "MOSAIC_GPU_DUMP_TO": folder},
        )
        kernels = read_resources(folder)
    return report | {"resources": [k._asdict() | {"warnings": list(k.warnings)} for k in kernels]}


def read_resources(folder: str | Path) -> tuple[KernelResources, ...]:
    """Returns the resources that a compiler reported into `folder`, in the order of compilation.

    Args:
      folder: Where the compiler was told to write its reports.

    Raises:
      ValueError: A report is not in the form that this function knows.
    """
    reports = []
    for path in Path(folder).glob(f"*{_REPORT}"):
        match = _NUMBERED.fullmatch(path.name.removesuffix(_REPORT))
        if match is None:
            raise ValueError(f"{path.name} does not name its kernel")
        reports.append((int(match["number"]), match["name"], path))
    return tuple(_read(name, path) for _, name, path in sorted(reports))


def _read(name: str, report: Path) -> KernelResources:
    text = report.read_text()

    def number(pattern: str, default: str | None = None) -> int:
        match = re.search(pattern, text)
        if match is None and default is None:
            raise ValueError(f"{report.name} does not say {pattern!r}")
        return int(match[1] if match else default or 0)

    passes = report.with_name(report.name.removesuffix(_REPORT) + _PASSES)
    dynamic = _dynamic_shared_memory(passes) if passes.exists() else 0
    spilled = "Registers are spilled"
    warnings = re.findall(r"ptxas (?:warning|info) *: (\(C\d+\).*|.*warning.*)", text, re.I)
    return KernelResources(
        name=name,
        registers=number(r"Used (\d+) registers"),
        spill_stores=number(r"(\d+) bytes spill stores"),
        spill_loads=number(r"(\d+) bytes spill loads"),
        stack=number(r"(\d+) bytes stack frame"),
        shared_memory=number(r"(\d+) bytes smem", "0") + dynamic,
        barriers=number(r"used (\d+) barriers", "0"),
        warnings=tuple(w for w in warnings if spilled not in w),
    )


def _dynamic_shared_memory(passes: Path) -> int:
    """Returns the bytes that a kernel is launched with, 0 if there are none."""
    constants = {}
    with passes.open(errors="replace") as lines:  # tens of megabytes; the first pass says it
        for line in lines:
            if match := _CONSTANT.search(line):
                constants[match[1]] = int(match[2])
            elif match := _DYNAMIC_SHARED_MEMORY.search(line):
                if match[1] not in constants:
                    raise ValueError(f"{passes.name} does not say what {match[1]} is")
                return constants[match[1]]
    return 0
