"""Command line: what the compiler of an absent chip says about a function."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from pallas_kernels.targets.chips import CHIPS, Gpu, Tpu
from pallas_kernels.targets.isolation import compile_in_child
from pallas_kernels.targets.resources import KernelResources, compile_with_resources
from pallas_kernels.targets.schedule import UNITS, KernelSchedule, compile_with_schedule

_DESCRIPTION = """\
Compile a JAX function for a chip that this machine does not have, and print the memory it needs,
the device memory that each of its kernels moves and, for a TPU, the schedule of its instructions.

FUNCTION is module:function. It takes no arguments and returns what to compile:

    def case():
        x = jax.ShapeDtypeStruct((1024, 4096), jnp.float32)
        return lambda x: x * 2, (x,), ()      # the function, its arguments, donate_argnums
"""


def format_report(report: dict[str, Any]) -> str:
    """Returns the result of `compile_in_child` as text, the largest kernels first."""
    taken = report.get("routes")
    lines = [f"route: {'; '.join(taken)}"] if taken else []
    lines += [f"{report['function']} on {report['chip']}, jax {report['jax_version']}", ""]
    lines.append(f"{'memory':<44}{'bytes':>18}")
    lines += [f"  {name:<42}{size:>18,}" for name, size in report["memory"].items()]
    lines += ["", f"{'kernel':<44}{'reads':>18}{'writes':>18}{'times':>8}"]
    kernels = report["traffic"]["kernels"]
    for k in sorted(kernels, key=_total, reverse=True):
        lines.append(
            f"  {k['name']:<42}{k['operand_bytes']:>18,}{k['result_bytes']:>18,}{k['times']:>8,}"
        )
    lines.append(f"{'device memory moved by one run':<44}{report['traffic']['total_bytes']:>18,}")
    if "schedule" in report:
        lines += ["", f"{'kernel, slots of its units in %':<36}{'bundles':>8}{'spills':>8}"]
        lines[-1] += "".join(f"{unit:>8}" for unit in UNITS)
        lines += [_schedule_line(KernelSchedule(**k)) for k in report["schedule"]]
    if report.get("resources"):
        lines += ["", f"{'kernel':<44}{'registers':>12}{'bytes spilled':>14}{'shared memory':>14}"]
        lines += [_resources_line(KernelResources(**k)) for k in report["resources"]]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code: 2 for bad input, 1 for a failed compile."""
    parser = _Parser(
        prog="python -m pallas_kernels.targets",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("function", metavar="FUNCTION")
    parser.add_argument("--chip", required=True, help=", ".join(CHIPS))
    parser.add_argument("--topology", help="size of the machine, such as 1x1x8 or v5e:4x4")
    parser.add_argument(
        "--trip-count",
        action="append",
        default=[],
        type=_trip_count,
        metavar="LOOP=N",
        help="runs of a loop whose trip count depends on data; repeatable",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    options = parser.parse_args(argv)
    try:
        by_kind = {Gpu: compile_with_resources, Tpu: compile_with_schedule}
        compile_ = by_kind.get(type(CHIPS.get(options.chip)), compile_in_child)
        report = compile_(
            options.function,
            options.chip,
            topology=options.topology,
            trip_counts=dict(options.trip_count),
        )
    except (ValueError, RuntimeError, TimeoutError) as error:
        said = re.sub(r"trip_counts=\{'([^']*)': n\}", r"--trip-count \1=N", str(error))
        print(f"error: {said}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    print(json.dumps(report, indent=2) if options.json else format_report(report))
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def _total(kernel: dict[str, Any]) -> int:
    return kernel["times"] * (kernel["operand_bytes"] + kernel["result_bytes"])


def _schedule_line(kernel: KernelSchedule) -> str:
    shares = "".join(f"{100 * kernel.share(unit):>8.0f}" for unit in UNITS)
    return f"  {kernel.name:<34}{kernel.bundles:>8,}{kernel.spills:>8,}{shares}"


def _resources_line(kernel: KernelResources) -> str:
    spilled = kernel.spill_stores + kernel.spill_loads
    return f"  {kernel.name:<42}{kernel.registers:>12,}{spilled:>14,}{kernel.shared_memory:>14,}"


def _trip_count(text: str) -> tuple[str, int]:
    name, _, count = text.partition("=")
    if not name or not count.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} was given; expected LOOP=N")
    return name, int(count)


if __name__ == "__main__":
    sys.exit(main())
