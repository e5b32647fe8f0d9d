"""Projections that select what a reference run selected.

The references are in PyTorch's layout (out, in), so that their columns are our inputs. `subspace`
is the module of that name, of this package or of a copy of it.
"""

from __future__ import annotations

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
        return subspace.blocks(hyperparams["block_order"])  # deterministic, or nothing selected
    if kind.startswith("svd"):
        return singular("std", stored, subspace)
    choice = hyperparams["coord_choice"]
    if choice == "randk":
        flat = {
            name: {
                step: column * init[name].shape[1] + row for step, (row, column) in found.items()
            }
            for name, found in stored.items()
        }
        return subspace.entries(choose=lookup(flat))
    return subspace.columns("in" if choice == "columns" else "out", choose=lookup(stored))


def singular(kind: str, stored: Stored, subspace: Any) -> Any:
    transposed = {
        name: {step: basis if name.endswith("left") else basis.T for step, basis in found.items()}
        for name, found in stored.items()
    }
    if kind == "std":
        return subspace.svd("smaller", choose=lookup(transposed))
    assert kind == "full"
    return subspace.svd("both", choose=pairs(transposed))


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
