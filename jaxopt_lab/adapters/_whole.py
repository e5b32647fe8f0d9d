"""Leaves that are trained whole beside the factors: biases, and modules that are saved as they are.

They stand in the tree of adapters at their own path, as plain arrays with their full value.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, Protocol, get_args

import jax
import jax.numpy as jnp

from jaxopt_lab import _checks, _matrices, _names, _roles
from jaxopt_lab.adapters import _kernels
from jaxopt_lab.adapters._kernels import Kernel

Bias = Literal["none", "all", "lora_only"]


class Choice(Protocol):
    """The fields of a config that say which leaves; see `LoraConfig`."""

    @property
    def bias(self) -> Bias: ...
    @property
    def modules_to_save(self) -> Sequence[str] | None: ...


def check(choice: Choice) -> None:
    """Refuses a choice that is none.

    Raises:
      ValueError: an unknown `bias`.
      TypeError: `modules_to_save` is no list of names.
    """
    _checks.check_choice(get_args(Bias), bias=choice.bias)
    entries = choice.modules_to_save
    known = entries is None or isinstance(entries, (list, tuple, set, frozenset))
    if not known or not all(isinstance(entry, str) for entry in entries or ()):
        raise TypeError(f"modules_to_save must be a list of names or None, got {entries!r}")


def leaves(params: Any, choice: Choice, kernels: Sequence[Kernel]) -> tuple[str, ...]:
    """Returns the paths of the leaves that are trained whole, in the order of the tree.

    What is not floating in a saved module (counters, keys) stays as it is.

    Raises:
      ValueError: an entry of `modules_to_save` that matches no module, or none with a floating
        leaf, with the nearest names.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    names = [_kernels.leaf_name(path) for path, _ in flat]
    floating = [
        name
        for name, (_, leaf) in zip(names, flat)
        if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
    ]
    wanted = saved(floating, choice.modules_to_save)
    if choice.bias != "none":
        vectors = {n for n, role in zip(names, _roles.roles(params)) if role.kind == "vector"}
        biases = {name for name in floating if name in vectors and is_bias(name)}
        if choice.bias == "lora_only":
            biases = {n for n in biases if any(_belongs(n, kernel.name) for kernel in kernels)}
        wanted |= biases
    return tuple(name for name in names if name in wanted)


def saved(names: Iterable[str], entries: Sequence[str] | None) -> set[str]:
    """Returns the leaves inside of modules whose dotted name is or ends with one of `entries`.

    Raises:
      ValueError: an entry that matches nothing.
    """
    names, found = list(names), set()
    for entry in entries or ():
        dotted = f".{entry.replace('/', '.')}."
        inside = {name for name in names if dotted in f".{name.replace('/', '.')}."}
        if not inside:
            modules = {
                "/".join(n.split("/")[:d]) for n in names for d in range(1, n.count("/") + 2)
            }
            raise ValueError(
                f"modules_to_save: {entry!r} matches no module with floating parameters; the "
                f"nearest are {_matrices.nearest(entry, modules)}"
            )
        found |= inside
    return found


def of(params: Any, names: Sequence[str], adapter_dtype: Any) -> dict[str, jax.Array]:
    """Returns copies of leaves, which may be donated without the base.

    Args:
      params: the parameters.
      names: paths of the leaves.
      adapter_dtype: of the copies; None for the leaves' own.
    """
    found = _kernels.named_leaves(params)
    return {n: jnp.array(found[n], adapter_dtype or found[n].dtype, copy=True) for n in names}


def is_bias(name: str) -> bool:
    """Whether a leaf that is a vector is a bias, by its path."""
    parts = _names.parts_of(name)
    own = parts[-1]
    return _names.words(own)[0] == "bias" or (own != "g" and _names.may_be_bias(parts))


def _belongs(bias: str, kernel: str) -> bool:
    """Whether a bias is that of a kernel, by their paths."""
    *above, own = bias.split("/")
    *module, leaf = kernel.split("/")
    return above == module and leaf in _names.mates(own)
