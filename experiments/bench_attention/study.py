"""Compiles and times the passes of every contender on a shape."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.bench_attention import methods, pytorch
from experiments.bench_attention.methods import Shape
from experiments.harness import timing

PASSES = ("forward", "gradient", "jvp")


def passes(fn: Any) -> dict[str, Callable[..., Any]]:
    """The programs that are timed; the output's cotangent is given, so nothing is constant."""

    def gradient(q: Any, k: Any, v: Any, cotangent: Any, *tangents: Any) -> Any:
        del tangents
        output, vjp = jax.vjp(fn, q, k, v)
        return output, vjp(cotangent)

    def jvp(q: Any, k: Any, v: Any, cotangent: Any, *tangents: Any) -> Any:
        del cotangent
        return jax.jvp(fn, (q, k, v), tangents)

    return {"forward": lambda q, k, v, *others: fn(q, k, v), "gradient": gradient, "jvp": jvp}


def draw(shape: Shape) -> tuple[jax.Array, ...]:
    """Query, key and value, the output's cotangent, and tangents of query, key and value."""
    structs = shape.structs()
    drawn = (*structs, structs[0], *structs)
    keys = jax.random.split(jax.random.key(0), len(drawn))
    return tuple(jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, drawn))


def compile_one(program: Any, arrays: tuple[jax.Array, ...]) -> Any:
    """Returns the compiled program, run once, or the error that came instead."""
    try:
        compiled = jax.jit(program).lower(*arrays).compile()
        jax.block_until_ready(compiled(*arrays))
    except Exception as error:
        # A contender that a shape breaks is a result, not the end of the benchmark.
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return compiled


def compile_all(fns: dict[str, Any], arrays: tuple[jax.Array, ...]) -> dict[str, dict[str, Any]]:
    """Returns for each contender its compiled passes, or the errors."""
    return {
        name: {which: compile_one(program, arrays) for which, program in passes(fn).items()}
        for name, fn in fns.items()
    }


def measure(shape: Shape, rounds: int) -> dict[str, Any]:
    """Times all contenders of a shape, one execution of each a round."""
    found = methods.contenders(shape)
    refused = {name: reason for name, reason in found.items() if isinstance(reason, str)}
    arrays = draw(shape)
    programs = compile_all({k: v for k, v in found.items() if k not in refused}, arrays)
    reason = pytorch.refusal(shape, jax.default_backend())
    if reason is None:
        programs["torch"] = pytorch.programs(shape, arrays)
    else:
        refused["torch"] = reason
    exact = methods.exact(shape, *arrays[:3])
    results: dict[str, Any] = {}
    for name, compiled in programs.items():
        results[name] = {"errors": {k: v for k, v in compiled.items() if isinstance(v, str)}}
        if not isinstance(compiled["forward"], str):
            output = jnp.asarray(compiled["forward"](*arrays), jnp.float32)
            error = jnp.linalg.norm(output - exact) / jnp.linalg.norm(exact)
            results[name]["error"] = float(error)
        for which, program in compiled.items():
            if not isinstance(program, str):
                size = temporary_bytes(program)
                results[name][which] = {"seconds": [], "temporary_bytes": size}
    for _ in range(rounds):
        for name, compiled in programs.items():
            for which in PASSES:
                if which in results[name]:
                    program = functools.partial(compiled[which], *arrays)
                    results[name][which]["seconds"].append(timing.seconds_of(program))
    return {"shape": str(shape), "refused": refused, "results": results}


def temporary_bytes(program: Any) -> int | None:
    """Returns the temporary memory of a program that XLA compiled; of another it is not known."""
    memory = program.memory_analysis() if isinstance(program, jax.stages.Compiled) else None
    return None if memory is None else memory.temp_size_in_bytes
