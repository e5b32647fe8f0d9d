"""JAX's transformations on one device: jit, vmap, scan, cond, and what they may compile."""

from __future__ import annotations

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxopt_lab.testing._registry import check
from jaxopt_lab.testing._subject import Subject, training_step
from jaxopt_lab.testing._values import (
    expect,
    expect_close,
    expect_equal,
    expect_same_types,
    kernel_and_bias,
    normal_like,
)

_REPLICAS = 4


@check("transformations")
def jit_equals_eager(subject: Subject) -> None:
    """Compiled and eager steps agree."""
    params = kernel_and_bias()
    gradients = [normal_like(params, seed) for seed in (10, 20, 30)]
    compiled = subject.run(params, *gradients)
    eager = subject.run(params, *gradients, jit=False)
    expect_close(compiled.params, eager.params, "params")


def _donated(subject: Subject, init: Any) -> None:
    params = kernel_and_bias()
    gradients = [normal_like(params, seed) for seed in (10, 20, 30)]
    expected = subject.run(params, *gradients).params
    step = jax.jit(training_step(subject.transform), donate_argnums=(0, 1))
    weights = jax.tree.map(jnp.copy, params)
    state = init(weights)
    for gradient in gradients:
        weights, state, _ = step(weights, state, gradient)
    expect_close(weights, expected, "params")


@check("transformations")
def donation_after_eager_init(subject: Subject) -> None:
    """Weights and state can be donated after an eager init: no buffer is held twice."""
    _donated(subject, subject.transform.init)


@check("transformations")
def donation_after_jitted_init(subject: Subject) -> None:
    """Weights and state can be donated after a jitted init."""
    _donated(subject, jax.jit(subject.transform.init))


@check("transformations")
def vmap(subject: Subject) -> None:
    """Four replicas under `vmap` equal four runs in a loop."""
    replicas = [kernel_and_bias(seed=2 * index) for index in range(_REPLICAS)]
    gradients = [normal_like(params, 100 + 2 * index) for index, params in enumerate(replicas)]
    pairs = zip(replicas, gradients, strict=True)
    expected = [subject.run(params, gradient, gradient).params for params, gradient in pairs]

    params, gradient, loop = (_stack(trees) for trees in (replicas, gradients, expected))
    state = jax.vmap(subject.transform.init)(params)
    step = jax.jit(jax.vmap(training_step(subject.transform)))
    for _ in range(2):
        params, state, _ = step(params, state, gradient)
    expect_close(params, loop, "params")


def _stack(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@check("transformations")
def scan_carry(subject: Subject) -> None:
    """Weights and state are the carry of a `scan`, which equals the loop."""
    step = training_step(subject.transform)
    params = kernel_and_bias()
    gradients = [normal_like(params, seed) for seed in (10, 20, 30)]

    def body(carry: Any, gradient: Any) -> tuple[Any, None]:
        weights, state = carry
        return step(weights, state, gradient)[:2], None

    carry = params, subject.transform.init(params)
    (weights, _), _ = jax.lax.scan(body, carry, _stack(gradients))
    expect_close(weights, subject.run(params, *gradients).params, "params")
    half = kernel_and_bias("bfloat16")
    carry = half, subject.transform.init(half)
    halves = _stack([normal_like(half)])
    found, _ = jax.eval_shape(functools.partial(jax.lax.scan, body), carry, halves)
    expect_same_types(found, carry, "bfloat16 carry")


@check("transformations")
def cond_branches(subject: Subject) -> None:
    """An update in one branch of `cond` and none in the other: types and weak types stay."""
    params = kernel_and_bias()
    state, gradient = subject.transform.init(params), normal_like(params)
    update = functools.partial(subject.transform.update, gradient)
    _, after = jax.eval_shape(update, state, params)
    expect_same_types(after, state, "state", weak_type=True)

    @jax.jit
    def step(take: jax.Array, state: Any) -> Any:
        return jax.lax.cond(take, lambda old: update(old, params)[1], lambda old: old, state)

    expect_equal(step(jnp.asarray(False), state), state, "state of the branch without update")
    step(jnp.asarray(True), state)


def _at_another_step(state: Any) -> Any:
    """The state with its integer scalars, which count steps, set to 1000."""

    def move(leaf: Any) -> Any:
        integer = jnp.issubdtype(jnp.result_type(leaf), jnp.integer) and np.shape(leaf) == ()
        return jnp.full_like(leaf, 1000) if integer else leaf

    return jax.tree.map(move, state)


def _compiles_once(transform: Any, params: Any) -> None:
    traces = []
    step = training_step(transform)

    @jax.jit
    def counted(params: Any, state: Any, gradient: Any) -> Any:
        traces.append(None)
        return step(params, state, gradient)

    state = transform.init(params)
    for seed in (10, 20, 30):
        params, state, _ = counted(params, state, normal_like(params, seed))
        expect(len(traces) == 1, f"traced {len(traces)} times in the first steps")
    counted(params, _at_another_step(state), normal_like(params))
    expect(len(traces) == 1, "traced again for another value of the step counter")
    programs = cast(Any, counted)._cache_size()
    expect(programs == 1, f"{programs} compiled programs from one trace (devices of the state?)")


@check("transformations")
def compiles_once(subject: Subject) -> None:
    """One compilation after an eager init, whatever the step counter says."""
    _compiles_once(subject.transform, kernel_and_bias())


@check("transformations")
def compiles_once_with_schedule(subject: Subject) -> None:
    """One compilation in a chain with a schedule, whatever its value."""
    schedule = optax.scale_by_schedule(optax.linear_schedule(1.0, 0.0, 2000))
    _compiles_once(optax.chain(subject.transform, schedule), kernel_and_bias())


@check("transformations")
def lowering_deterministic(subject: Subject) -> None:
    """Two traces lower to the same text, so that a compilation cache hits."""
    params = kernel_and_bias()
    state = subject.transform.init(params)
    # A new function each time: jit would remember the trace of the first.
    texts = [
        jax.jit(training_step(subject.transform)).lower(params, state, params).as_text()
        for _ in range(2)
    ]
    expect(texts[0] == texts[1], "the second trace lowers to another program")


@check("transformations", level="library", traced=False)
def init_on_shape_structs(subject: Subject) -> None:
    """`init` on `jax.ShapeDtypeStruct`s gives the types of the real init."""
    _abstract_init(subject, subject.transform.init)


@check("transformations", traced=False)
def init_under_eval_shape(subject: Subject) -> None:
    """`jax.eval_shape(init, ...)` gives the types of the real init."""
    _abstract_init(subject, functools.partial(jax.eval_shape, subject.transform.init))


def _abstract_init(subject: Subject, init: Any) -> None:
    params = {**kernel_and_bias(), "half": normal_like(jnp.ones((3,)), dtype="bfloat16")}
    structs = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    expect_same_types(init(structs), subject.transform.init(params), "state")
