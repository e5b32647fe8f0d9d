"""Replicas that pull towards different points, for the local-update methods and their programs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tests.distributed import modes

SHAPE = (2, 3)


@functools.cache
def problem(replicas: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns start, curvatures and minima of f_i(x) = h_i (x - c_i)^2 / 2, stacked."""
    generator = np.random.default_rng(replicas)
    start = np.stack([generator.normal(size=SHAPE)] * replicas)
    curvatures = generator.uniform(0.5, 2.0, (replicas, *SHAPE))
    return start, curvatures, generator.normal(size=(replicas, *SHAPE))


def gradients(replicas: int) -> list[Callable[[np.ndarray], np.ndarray]]:
    """Returns the gradient of each f_i for a numpy program."""
    _, curvatures, minima = problem(replicas)
    return [lambda x, h=h, c=c: h * (x - c) for h, c in zip(curvatures, minima)]


def trajectory(tx: optax.GradientTransformation, steps: int) -> Callable[..., Any]:
    """Returns one replica's program: the parameters after each step, and the last state."""

    def run(start: jax.Array, curvature: jax.Array, minimum: jax.Array) -> Any:
        def step(carry: Any, _: None) -> Any:
            params, state = carry
            updates, state = tx.update(curvature * (params - minimum), state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), params

        carry = (start, tx.init(start))
        (_, state), params = jax.lax.scan(step, carry, None, length=steps)
        return params, state

    return run


def run(
    tx: optax.GradientTransformation,
    replicas: int,
    steps: int,
    mode: str = "vmap",
    start: Any = None,
    dtype: Any = jnp.float32,
) -> Any:
    """Returns what `trajectory` does, with a leading axis for the replicas."""
    given, curvatures, minima = problem(replicas)
    given = given if start is None else start
    arguments = (jnp.asarray(x, dtype) for x in (given, curvatures, minima))
    return modes.mapped(mode, trajectory(tx, steps), replicas)(*arguments)


def after_rounds(params: Any, steps: int) -> np.ndarray:
    """Returns the parameters after each round of so many steps, rounds first."""
    return np.swapaxes(np.asarray(params)[:, steps - 1 :: steps], 0, 1)


def primitives(jaxpr: Any) -> set[str]:
    """Returns the names of all primitives in a program, those of inner programs among them."""
    found = set()
    for equation in jaxpr.eqns:
        found.add(equation.primitive.name)
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found |= primitives(inner)
    return found
