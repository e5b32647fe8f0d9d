"""Derivatives beyond the gradient: what is right, by float64 autodiff of the plain formula."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import reference
from tests.pallas_kernels.attention import cases
from tests.pallas_kernels.attention.cases import Case, Problem

Named = dict[str, jax.Array]
MOVABLE = ("query", "key", "value", "bias", "sinks")


def primals(problem: Problem) -> Named:
    """Returns what can be moved, by name."""
    found = {name: getattr(problem.operands, name) for name in MOVABLE}
    return {name: x for name, x in found.items() if x is not None}


def directions(problem: Problem, seed: int = 7) -> Named:
    """Returns a unit normal tangent for each of `primals`."""
    rng = np.random.default_rng(seed)

    def draw(x: jax.Array) -> jax.Array:
        return jnp.asarray(rng.normal(size=x.shape).astype(np.float32)).astype(x.dtype)

    return {name: draw(x) for name, x in primals(problem).items()}


def function(attend: Any, problem: Problem) -> Callable[[Named], tuple[jax.Array, jax.Array]]:
    """Returns output and lse as a function of `primals`; the lse of empty rows is 0."""

    def fn(moved: Named) -> tuple[jax.Array, jax.Array]:
        output, lse = attend(problem.operands._replace(**moved))
        return output, jnp.where(lse == -jnp.inf, 0, lse)

    return fn


def tangents(fn: Any, x: Named, direction: Named) -> Any:
    """How output and lse move."""
    return jax.jvp(fn, (x,), (direction,))[1]


def loss_of(fn: Any, problem: Problem) -> Callable[[Named], jax.Array]:
    """A loss that is not linear in output and lse."""

    def loss(x: Named) -> jax.Array:
        output, lse = fn(x)
        d_output, d_lse = problem.cotangents
        return (jnp.sin(output) * d_output).sum() + (jnp.sin(lse) * d_lse).sum()

    return loss


def forward_over_reverse(loss: Any, x: Named, direction: Named) -> Named:
    """The Hessian times `direction`, as the derivative of the gradient."""
    return jax.jvp(jax.grad(loss), (x,), (direction,))[1]


def reverse_over_forward(loss: Any, x: Named, direction: Named) -> Named:
    """The same, as the gradient of the derivative."""
    return jax.grad(lambda x: jax.jvp(loss, (x,), (direction,))[1])(x)


def reverse_over_reverse(loss: Any, x: Named, direction: Named) -> Named:
    """The same, as the gradient of the gradient's product with `direction`."""

    def slope(x: Named) -> jax.Array:
        products = jax.tree.map(jnp.vdot, jax.grad(loss)(x), direction)
        return jax.tree.reduce(jnp.add, products)

    return jax.grad(slope)(x)


def _wide(tree: Any) -> Any:
    def widen(x: jax.Array) -> jax.Array:
        floating = jnp.issubdtype(x.dtype, jnp.floating)
        return jnp.asarray(np.asarray(x.astype(jnp.float32) if floating else x), _dtype(x.dtype))

    return jax.tree.map(widen, tree)


def _dtype(dtype: Any) -> Any:
    return jnp.float64 if jnp.issubdtype(dtype, jnp.floating) else dtype


@functools.cache
def expected(case: Case, second: bool = False) -> Any:
    """Returns `tangents`, or the Hessian times `directions`, in float64."""
    narrow = cases.build(case)
    direction = directions(narrow)
    with jax.enable_x64(True):
        problem = Problem(narrow.settings, _wide(narrow.operands), _wide(narrow.cotangents))
        fn = function(functools.partial(reference.attend, narrow.settings), problem)
        x, direction = primals(problem), _wide(direction)
        if second:
            loss = loss_of(fn, problem)
            found = cases.quick_jit(functools.partial(forward_over_reverse, loss))(x, direction)
        else:
            found = cases.quick_jit(functools.partial(tangents, fn))(x, direction)
        return jax.tree.map(np.asarray, found)


def check(case: Case, got: Any, want: Any, tolerance: float = 1e-5) -> None:
    """Asserts that `got` is `want` but for `tolerance`, relative to entries above one."""
    for (path, g), w in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        g = np.asarray(g, np.float64)
        assert g.shape == w.shape
        size = max(1.0, float(np.max(np.abs(w), initial=0.0)))
        error = float(np.max(np.abs(g - w), initial=0.0))
        name = jax.tree_util.keystr(path)
        assert error <= tolerance * size, f"{case}: {name} off by {error:.2e} of {size:.2e}"
