"""Projections that select what a reference run selected.

The references are in PyTorch's layout (out, in), so that their columns are our inputs. `subspace`
is the module of that name, of this package or of a copy of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Stored = Mapping[str, Mapping[int, np.ndarray]]


def frugal(
    kind: str,
    hyperparams: Mapping[str, Any],
    init: Mapping[str, np.ndarray],
    stored: Stored,
    subspace: Any,
) -> Any:
    if kind == "blocks":
        return blocks(hyperparams, stored, subspace)
    if kind != "coordinates":
        found = re.fullmatch(r"(?:svd|random|randperm) \(side (\w+)\)", kind)
        assert found, f"unknown projection {kind!r}"
        return singular(found[1], stored, init, subspace)
    choice = hyperparams["coord_choice"]
    if choice == "randk":
        flat = {
            name: {
                step: column * init[name].shape[1] + row for step, (row, column) in found.items()
            }
            for name, found in stored.items()
        }
        return subspace.entries(choose=lookup(flat))
    return subspace.columns({"columns": "in", "rows": "out"}[choice], choose=lookup(stored))


# The sides of the references (out, in): their right is the inputs.
_SIDES = {"std": "smaller", "reverse_std": "larger", "right": "in", "left": "out", "full": "both"}


def on_the_right(side: str, shape: tuple[int, int]) -> bool:
    """Whether the references project the inputs of a matrix (in, out), with a basis (r, in)."""
    fan_in, fan_out = shape
    return {
        "std": fan_out >= fan_in,
        "reverse_std": fan_out < fan_in,
        "right": True,
        "left": False,
    }[side]


def singular(side: str, stored: Stored, init: Mapping[str, np.ndarray], subspace: Any) -> Any:
    """A basis on the right is stored as rows, (r, in), one on the left as columns, (out, r)."""

    def is_right(path: str) -> bool:
        name, *end = path.split("/")
        if end:
            return end[0] == "right"
        fan_in, fan_out = init[name].shape
        return on_the_right(side, (fan_in, fan_out))

    columns = {
        path: {step: basis.T if is_right(path) else basis for step, basis in found.items()}
        for path, found in stored.items()
    }
    choose = pairs(columns) if side == "full" else lookup(columns)
    return subspace.svd(_SIDES[side], choose=choose)


def blocks(hyperparams: Mapping[str, Any], stored: Stored, subspace: Any) -> Any:
    """The orders without chance that are ours too; for others, what the reference has activated."""
    names, order = list(hyperparams["projected_parameters"]), hyperparams["block_order"]
    active = round(len(names) * hyperparams["density"])
    if active == 0:
        return subspace.blocks()
    # Where all have state, ours never begins anew.
    if order in ("ascending", "descending") and active < len(names) and len(names) % active == 0:
        return subspace.blocks(order)
    return _recorded_blocks(stored, subspace)


def _recorded_blocks(stored: Stored, subspace: Any) -> Any:
    """Leaves that have state as a whole or not at all, as recorded."""
    flag = lookup(stored)

    class Recorded(subspace.projections.LeafProjection):
        def _size(self, leaf: Any, density: Any) -> tuple[int, int]:
            return 1, 2

        def _describe(self, leaf: Any) -> str:
            return "all or nothing, as recorded"

        def _first(self, leaf: Any) -> jax.Array:
            return jnp.zeros((), bool)

        def _choose(self, leaf: Any, old: Any, grad: Any, count: Any, key: Any) -> jax.Array:
            return flag(leaf.name, count, grad) != 0

        def _project(self, leaf: Any, selection: jax.Array, x: jax.Array) -> jax.Array:
            return jnp.where(selection, x, 0)

        def _restore(self, leaf: Any, selection: jax.Array, compact: jax.Array) -> jax.Array:
            return jnp.where(selection, compact, 0)

        def _remainder(self, leaf: Any, selection: Any, x: jax.Array, compact: Any) -> jax.Array:
            return jnp.where(selection, 0, x)

    return Recorded()


def dct(hyperparams: Mapping[str, Any], stored: Stored, subspace: Any) -> Any:
    kind = {"matmul": 3, "makhoul": 2}[hyperparams["sim_type"]]
    # Without rotation moments stay in their slots, whose order is the reference's own.
    choose = None if hyperparams["rotate_subspace"] else lookup(stored)
    return subspace.dct(kind, hyperparams["ell_norm"], choose)


def pairs(stored: Stored) -> Callable[[str, jax.Array, jax.Array], Any]:
    """The bases of the inputs and of the outputs, stored as "name/right" and "name/left"."""
    one = lookup(stored)
    return lambda *args: (one(f"{args[0]}/right", *args[1:]), one(f"{args[0]}/left", *args[1:]))


def lookup(stored: Stored) -> Callable[[str, jax.Array, jax.Array], jax.Array]:
    """What is stored under a leaf's name for the latest step that has come."""

    def choose(name: str, count: jax.Array, grad: jax.Array) -> jax.Array:
        del grad
        steps = sorted(stored[name])
        values = jnp.stack([jnp.asarray(stored[name][step]) for step in steps])
        return values[jnp.searchsorted(jnp.array(steps), count + 1, side="right") - 1]

    return choose
