"""The kernels behind `core.attend`, as users call them, on chips that are not there."""

from __future__ import annotations

import functools

import jax
import pytest

from pallas_kernels import _compat
from pallas_kernels.attention import core, routes
from pallas_kernels.targets import compile_in_child
from tests.pallas_kernels.attention import cases
from tests.pallas_kernels.attention.absent import on
from tests.pallas_kernels.targets import needs

ROUTES = {"mosaic_gpu": "h200", "triton": "a100", "mosaic_tpu": "v5e"}
CASES = [case for case in cases.CASES if case.name in cases.QUICK | {"plain"}]


def program(route_name, case):
    """Values and gradients of a case, as `compile_in_child` expects them."""
    route = routes.load(route_name)
    settings, operands, cotangents = cases.build(case)

    def fn(operands, cotangents):
        primals = operands[:5]

        def attend(*primals):
            return core.attend(route, settings, operands._make((*primals, *operands[5:])))

        values, vjp = jax.vjp(attend, *primals)
        return values, vjp(cotangents)

    structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (operands, cotangents))
    return fn, structs, ()


@pytest.mark.parametrize(("route", "chip"), ROUTES.items())
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_call_under_jit_traces(route, chip, case):
    fn, args, _ = program(route, case.replace(dtype="bfloat16"))
    with on(chip):
        problem = cases.build(case.replace(dtype="bfloat16"))
        reason = routes.load(route).refusal(*problem[:2], _compat.device())
        assert reason is None, reason
        jax.jit(fn).trace(*args)


def several(route):
    """What has and has not a window, in one program: a compiler sees all of it in one process."""
    names = ("plain", "causal window", "everything")
    made = [program(route, c.replace(dtype="bfloat16")) for c in cases.CASES if c.name in names]

    def fn(*args):
        return [one(*own) for (one, _, _), own in zip(made, args, strict=True)]

    return fn, tuple(args for _, args, _ in made), ()


several_mosaic_gpu, several_triton, several_mosaic_tpu = (
    functools.partial(several, route) for route in ROUTES
)


@pytest.mark.slow
@pytest.mark.parametrize(("chip", "route"), [needs.on(c, r) for r, c in ROUTES.items()])
def test_a_call_under_jit_compiles(chip, route):
    assert compile_in_child(f"{__name__}:several_{route}", chip)["memory"]["output"] > 0


def moved(route_name):
    """Tangents and a Hessian-vector product: the kernel forward, the rest in plain JAX."""
    case = next(case for case in cases.CASES if case.name == "causal window")
    route = routes.load(route_name)
    settings, operands, _ = cases.build(case.replace(dtype="bfloat16"))

    def attend(*x):
        return core.attend(route, settings, operands._make((*x, *operands[3:])))

    def gradient(*x):
        return jax.grad(lambda *x: attend(*x)[0].astype("float32").sum(), (0, 1, 2))(*x)

    def fn(x, directions):
        return jax.jvp(attend, x, directions), jax.jvp(gradient, x, directions)[1]

    structs = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands[:3])
    return fn, (structs, structs), ()


moved_mosaic_gpu, moved_triton, moved_mosaic_tpu = (
    functools.partial(moved, route) for route in ROUTES
)


@pytest.mark.slow
@pytest.mark.parametrize(("chip", "route"), [needs.on(c, r) for r, c in ROUTES.items()])
def test_derivatives_beyond_the_gradient_compile(chip, route):
    assert compile_in_child(f"{__name__}:moved_{route}", chip)["memory"]["output"] > 0
