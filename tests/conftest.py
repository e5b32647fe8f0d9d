"""Settings of the suite: eight pretend devices, and no accelerator even where there is one."""

from __future__ import annotations

import collections
import os

import jaxlib
import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Most of a test's time is XLA's CPU compiler, which is twice as fast without the optimizations that
# take longest; `--optimized` compiles as users do.
FEWER_OPTIMIZATIONS = [
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
]
if tuple(map(int, jaxlib.__version__.split(".")[:2])) < (0, 11):  # newer ones abort at it
    FEWER_OPTIMIZATIONS.append("--xla_cpu_use_fusion_emitters=false")


def pytest_configure(config: pytest.Config) -> None:
    flags = ["--xla_force_host_platform_device_count=8"]
    if not config.getoption("optimized"):
        flags += FEWER_OPTIMIZATIONS
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags])


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--optimized", action="store_true", help="compile with all optimizations")
    parser.addoption(
        "--cases",
        type=int,
        metavar="N",
        help="of each test run at most N sets of parameters, evenly spread",
    )


@pytest.hookimpl(trylast=True)  # after markers and names have chosen
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    most = config.getoption("cases")
    if most is None:
        return
    tests = collections.defaultdict(list)
    for item in items:
        tests[item.nodeid.partition("[")[0]].append(item)
    chosen = set()
    for cases in tests.values():
        count = min(most, len(cases))
        chosen.update(cases[(2 * i + 1) * len(cases) // (2 * count)] for i in range(count))
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = [item for item in items if item in chosen]
