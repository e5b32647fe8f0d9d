"""Decoding where its arrays lie, on meshes with explicit axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.attention import mapped
from pallas_kernels.attention.integers import as_array
from pallas_kernels.attention.placement import explicit_sharding

# Letters of the axes, as `mapped` reads them; pages belong to no batch entry.
_AXES = {
    "query": "btnd",
    "key_cache": "bskd",
    "value_cache": "bske",
    "lengths": "b",
    "page_table": "bp",
    "key_scale": "bsk",
    "value_scale": "bsk",
    "sinks": "n",
    "key_value_start": "b",
    "prefix_lengths": "b",
}


def where_it_lies(
    attend: Callable[..., tuple[jax.Array, jax.Array]], given: dict[str, Any]
) -> tuple[jax.Array, jax.Array]:
    """Returns ``attend(**given)``, on explicit mesh axes computed where batch and heads are."""
    sharding = explicit_sharding(given["query"])
    if sharding is None:
        return attend(**given)
    leaves, structure = jax.tree.flatten(given.get("bias"))
    names = [name for name in given if name != "bias"]
    arrays = [as_array(given[name]) for name in names] + [jnp.asarray(x) for x in leaves]
    axes = [_axes_of(name, x.ndim, "page_table" in given) for name, x in zip(names, arrays)]
    # The parameters of a rule have the heads last.
    axes += ["r" * (jnp.ndim(x) - 1) + "n" for x in leaves]

    def fn(*parts: jax.Array) -> tuple[jax.Array, ...]:
        bias = jax.tree.unflatten(structure, parts[len(names) :])
        return attend(**dict(zip(names, parts)), bias=bias)

    # Checks the arguments in the sizes that the caller knows.
    results = jax.eval_shape(fn, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays))
    split = mapped.Split.of(sharding, arrays, axes)
    output, lse = split.run(fn, arrays, axes, ("btne", "btn"), results)
    return output, lse


def _axes_of(name: str, ndim: int, paged: bool) -> str:
    if name.endswith("_scale") and ndim == 1:
        return "k"
    axes = _AXES[name][:ndim]
    return axes.replace("bs", "gs") if paged else axes
