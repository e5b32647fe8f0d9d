"""Compiles and times the passes of every contender on a shape."""

from __future__ import annotations

import functools
from typing import Any

import jax

from experiments.bench_cross_entropy import methods
from experiments.bench_cross_entropy.methods import Shape
from experiments.harness import timing


def measure(shape: Shape, rounds: int) -> dict[str, Any]:
    """Times all contenders of a shape, one execution of each a round."""
    arrays = shape.draw()
    programs: dict[tuple[str, str], Any] = {}
    results: dict[str, Any] = {}
    for name, loss in methods.contenders().items():
        for which, program in methods.passes(loss).items():
            compiled = jax.jit(program).lower(*arrays).compile()
            memory = compiled.memory_analysis()
            assert memory is not None
            programs[name, which] = compiled
            results.setdefault(name, {})[which] = {
                "seconds": [],
                "temporary_bytes": memory.temp_size_in_bytes,
            }
        results[name]["loss"] = float(programs[name, "forward"](*arrays))
    for _ in range(rounds):
        for (name, which), compiled in programs.items():
            program = functools.partial(compiled, *arrays)
            results[name][which]["seconds"].append(timing.seconds_of(program))
    return {"shape": str(shape), "results": results}
