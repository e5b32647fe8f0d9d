"""Settings of the suite: eight pretend devices, and no accelerator even where there is one."""

from __future__ import annotations

import collections
import gc
import os

import jax
import pytest

from tests import compiler, selection


def pytest_configure(config: pytest.Config) -> None:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # of subprocesses
    jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
    compiler.set_flags(optimized=bool(config.getoption("optimized")))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--optimized", action="store_true", help="compile with all optimizations")
    parser.addoption(
        "--cases",
        type=selection.positive,
        metavar="N",
        help="of each test run at most N sets of parameters, evenly spread",
    )


# A compiled program takes 1.4 MB, however small, and jax keeps it: what was compiled is let go of
# before it takes half a gigabyte, and what is used again compiled again.
COMPILED_AT_MOST = 350
_compiled = 0


def _count(event: str, duration_secs: float, **_: object) -> None:
    global _compiled
    _compiled += event == "/jax/core/compile/backend_compile_duration"


jax.monitoring.register_event_duration_secs_listener(_count)


def _let_go() -> None:
    global _compiled
    _compiled = 0
    jax.clear_caches()


def pytest_collection_finish() -> None:
    _let_go()  # of what made the arrays of all files
    # Modules and tests stay: the collector need not look at them again and again.
    gc.collect()
    gc.freeze()


def pytest_runtest_teardown() -> None:
    if _compiled > COMPILED_AT_MOST:
        _let_go()


@pytest.hookimpl(trylast=True)  # after markers and names have chosen
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    most = config.getoption("cases")
    if most is None:
        return
    tests = collections.defaultdict(dict)
    for item in items:
        test, _, case = item.nodeid.partition("[")
        tests[test][case] = item
    chosen = set()
    for test, places in selection.places({k: [*v] for k, v in tests.items()}, most).items():
        cases = [*tests[test].values()]
        chosen.update(cases[i] for i in places)
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = [item for item in items if item in chosen]
