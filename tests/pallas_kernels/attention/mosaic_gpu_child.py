"""Runs cases of the route "mosaic_gpu" in Pallas' GPU interpreter, with race detection.

In a process of its own because an exception spoils the interpreter's state and a missing arrival
makes it wait for ever. The command line is a dtype, a fault to put in or "none", and the cases by
name; a line of JSON is printed for each: its name and what went wrong, or null.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter
from jax._src.pallas.mosaic_gpu.interpret import params as interpret_params
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention import core
from pallas_kernels.attention.mosaic_gpu import ROUTE, Blocks, Config, _common
from tests.pallas_kernels.attention import cases

# Fewer slots than tiles, so that every ring goes round.
_SMALL = Blocks(64, 64, 3)
SMALL = Config(_SMALL, _SMALL, _SMALL, _SMALL._replace(slots=4))

_more = [
    cases.Case("many tiles", queries=192, keys=192, heads=1, kv_heads=1, right=0),
    cases.Case("heads of a group", queries=70, keys=192, heads=4, kv_heads=2, right=0, offset=122),
    cases.Case("one segment a tile", keys=192, heads=1, kv_heads=1, segments="sorted"),
    cases.Case("two queries", queries=2, keys=65, heads=1, kv_heads=1),
]
CASES = {case.name: case for case in (*cases.CASES, *_more)}


def skip_full_wait() -> None:
    """A worker reads a slot without waiting until it is filled."""
    _common.Ring.wait = lambda self, n: self.slot(n)


def skip_free_wait() -> None:
    """The copier fills a slot again without waiting until it is read."""
    reserve = _common.Ring.reserve

    def without_wait(self: Any, n: Any) -> tuple[Any, Any]:
        if self.slots != _SMALL.slots:
            return reserve(self, n)
        slot = self.slot(n)
        return slot, self.full.at[slot]

    def drain(self: Any, count: Any) -> None:
        # Every phase must be waited for, or the interpreter complains of that instead.
        @pl.loop(0, count)
        def _(n: Any) -> None:
            plgpu.barrier_wait(self.free.at[self.slot(n)])

    _common.Ring.reserve, _common.Ring.drain = without_wait, drain


def attempt(case: cases.Case) -> str | None:
    """Returns what is wrong with a case."""
    problem = cases.build(case)
    config = SMALL if case.bias is None or case.head_dim < 256 else None
    params = interpret_params.InterpretGPUParams(detect_races=True)
    settings = problem.settings._replace(interpret=params, config=config)
    try:
        got = cases.run(lambda x: core.differentiable(ROUTE, settings, x), problem)
        if interpreter.get_races().races_found:
            return "race"
        cases.check(case, got)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        return f"race: {text}" if "race" in text.lower() else text
    return None


def main() -> None:
    dtype, fault, *names = sys.argv[1:]
    if fault != "none":
        globals()[fault]()
    for name in names:
        wrong = attempt(CASES[name].replace(dtype=dtype, name=name))
        print(json.dumps([name, wrong]), flush=True)
        if wrong is not None:
            break


if __name__ == "__main__":
    main()
