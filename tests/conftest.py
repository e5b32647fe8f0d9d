"""Settings of the suite: eight pretend devices, and no accelerator even where there is one."""

from __future__ import annotations

import collections
import os

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)


def pytest_addoption(parser: pytest.Parser) -> None:
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
