"""What the instruction schedule of a program for a TPU says, kernel by kernel.

A TensorCore issues one bundle of instructions a cycle, in order. The number of bundles that the
compiler schedules is therefore the time of a kernel without its waits for memory, and the slots of
a unit that are taken, over all that there are, bound the share of its peak. The compiler writes
both to a folder that is named before it starts, so the program is compiled in a child process.
"""

from __future__ import annotations

import itertools
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pallas_kernels.targets.chips import Tpu, find_chip
from pallas_kernels.targets.isolation import compile_in_child

UNITS = ("MXU", "XLU", "VALU", "VPOP", "EUP", "VLOAD", "VSTORE", "SALU")
"""Matrix, cross-lane and vector units, results of the latter two, transcendentals, vector loads and
stores, scalar unit."""

_REPORT = "-final_hlo-static-per-bundle-utilization.txt"
_PROGRAM = "-final_bundles.txt"
_NUMBERED = re.compile(r"\d+-(?P<name>.+)-\d+")
_BUNDLE = re.compile(r"\s*(?:0x)?(?P<address>[0-9a-f]+)\s+(?P<target>LH|LB|LE|PB|PF|CT)?\s*:")


class Region(NamedTuple):
    """Bundles that always run one after the other: no branch leads in or out between them.

    Attributes:
      start: address of the first bundle.
      bundles: instruction bundles.
      used: slots by unit.
    """

    start: int
    bundles: int
    used: dict[str, int]


class KernelSchedule(NamedTuple):
    """The schedule of one kernel. A loop body counts once.

    Attributes:
      name: name of the kernel.
      bundles: instruction bundles.
      used: slots by unit.
      capacity: slots of one bundle by unit.
      spills: vector registers stored because there are too few.
      fills: vector registers loaded again.
      regions: the parts without a branch, in the order of their addresses.
    """

    name: str
    bundles: int
    used: dict[str, int]
    capacity: dict[str, int]
    spills: int
    fills: int
    regions: tuple[Region, ...]

    def share(self, unit: str) -> float:
        """Returns the slots used over the capacity of `unit`, between 0 and 1."""
        return self.used[unit] / max(1, self.bundles * self.capacity[unit])


def compile_with_schedule(
    function: str,
    chip: str,
    *,
    topology: str | None = None,
    trip_counts: Mapping[str, int] | None = None,
    timeout: float = 600,
) -> dict[str, Any]:
    """Compiles a case for a TPU and reports, with everything else, the schedules of its kernels.

    Args:
      function: ``"package.module:function"``, as for `compile_in_child`.
      chip: The name of a TPU in `CHIPS`.
      topology: The size of the machine, such as ``"1x1x8"`` (GPUs: hosts, devices of each) or
        ``"v5e:16x16"`` (a slice of TPUs); by default one device or one host.
      trip_counts: How often each loop runs whose trip count depends on data, by the name of the
        ``while`` instruction.
      timeout: Seconds until the child is ended.

    Returns:
      The report of `compile_in_child`, with one more entry: ``"schedule"``, a list of the fields of
      `KernelSchedule`, one for each kernel of the optimised program, the longest first.

    Raises:
      ValueError: `chip` is no TPU, or as `compile_in_child`.
      RuntimeError: As `compile_in_child`.
      TimeoutError: The child did not end in time.

    Example:
      >>> report = compile_with_schedule("my_project.cases:step", "v5e")  # doctest: +SKIP
      >>> [(k["name"], k["bundles"], k["spills"]) for k in report["schedule"]]  # doctest: +SKIP
      [('attention_forward.1', 5144, 2116), ('copy.3', 152, 0)]
    """
    if not isinstance(find_chip(chip), Tpu):
        raise ValueError(f"chip={chip!r} has no schedule of bundles; expected a TPU")
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        report = compile_in_child(
            function,
            chip,
            topology=topology,
            trip_counts=trip_counts,
            timeout=timeout,
            environment={"LIBTPU_INIT_ARGS": f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}"},
        )
        schedules = read_schedules(folder)
    plain = [s._asdict() | {"regions": [r._asdict() for r in s.regions]} for s in schedules]
    return report | {"schedule": plain}


def read_schedules(folder: str | Path) -> tuple[KernelSchedule, ...]:
    """Returns the schedules that a compiler wrote into `folder`, the longest first.

    Args:
      folder: Where the compiler was told to write its reports.

    Raises:
      ValueError: A report is not in the form that this function knows.
    """
    folder = Path(folder)
    # The program around the kernels has no name of its own, or one in angle brackets.
    reports = (p for p in folder.glob(f"*{_REPORT}") if not re.match(r"\d+-(TLP-|<)", p.name))
    schedules = [_read(path) for path in reports]
    return tuple(sorted(schedules, key=lambda kernel: -kernel.bundles))


def _read(report: Path) -> KernelSchedule:
    units, capacity, rows = _slots(report)
    match = _NUMBERED.fullmatch(report.name.removesuffix(_REPORT))
    if match is None:
        raise ValueError(f"{report.name} does not name its kernel")

    def used(rows: Sequence[Sequence[int]]) -> dict[str, int]:
        sums = [sum(column) for column in zip(*rows)] or [0] * len(units)
        return {unit: sums[units.index(unit)] for unit in UNITS}

    cuts = sorted({0, len(rows), *(cut for cut in _cuts(report) if 0 < cut < len(rows))})
    total = [sum(column) for column in zip(*rows)]
    return KernelSchedule(
        name=match["name"],
        bundles=len(rows),
        used=used(rows),
        capacity={unit: capacity[units.index(unit)] for unit in UNITS},
        spills=total[units.index("VSTORE:SPILL")],
        fills=total[units.index("VLOAD:FILL")],
        regions=tuple(
            Region(start, stop - start, used(rows[start:stop]))
            for start, stop in itertools.pairwise(cuts)
        ),
    )


def _slots(report: Path) -> tuple[list[str], list[int], list[list[int]]]:
    """Returns the units, the slots of each, and the slots that each bundle takes."""
    lines = [line for line in report.read_text().splitlines() if line.strip()]
    headings = [i for i, line in enumerate(lines) if line.startswith("== UTILIZATION")]
    if len(headings) != 1 or headings[0] < 2:
        raise ValueError(f"{report.name} has no table of utilization")
    i = headings[0]
    units = [unit.strip() for unit in lines[i - 2].split(",")]
    numbers = [[int(x) for x in line.split()] for line in (lines[i - 1], *lines[i + 1 :])]
    if any(len(row) != len(units) for row in numbers) or not {*UNITS} <= {*units}:
        raise ValueError(f"{report.name} has other columns than expected: {lines[i - 2]}")
    return units, numbers[0], numbers[1:]


def _cuts(report: Path) -> Iterator[int]:
    """Yields the addresses at which a branch arrives, and those after a branch."""
    stem = _NUMBERED.fullmatch(report.name.removesuffix(_REPORT))
    assert stem is not None
    prefix = report.name[: stem.end("name")]
    programs = [
        path
        for path in report.parent.glob(f"*{_PROGRAM}")
        if re.fullmatch(re.escape(prefix) + r"-\d+", path.name.removesuffix(_PROGRAM))
    ]
    for program in programs:
        for line in program.read_text().splitlines():
            if bundle := _BUNDLE.match(line):
                address = int(bundle["address"], 16)
                if bundle["target"]:
                    yield address
                if " = sbr." in line:
                    yield address + 1
