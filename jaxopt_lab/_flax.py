"""Nodes of states that `flax.serialization` can carry, without a dependence on flax.

Flax's registry of what goes into bytes is not `jax.tree_util`'s. A node is entered there when it is
registered here, or, where flax is imported later, at the end of that import.
"""

from __future__ import annotations

import dataclasses
import importlib.abc
import sys
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

_MODULE = "flax.serialization"
_MADE_WITH = "made_with"


class _Node(NamedTuple):
    cls: type
    fields: Sequence[str]
    made_with: Callable[[Any], str] | None


_waiting: list[_Node] = []


def register(
    cls: type, fields: Sequence[str], made_with: Callable[[Any], str] | None = None
) -> None:
    """Lets `flax.serialization` save and restore instances of a frozen dataclass.

    What is not in `fields` is not saved: as for the structure of any state, it comes from the
    target that the bytes are restored into, which `init` makes.

    Args:
      cls: a dataclass, usually one that `jax.tree_util` knows.
      fields: names of those fields that have arrays below them.
      made_with: says in one line what else an instance is made of. A checksum of it goes into the
        bytes, and bytes are refused that were made with something else.
    """
    node = _Node(cls, tuple(fields), made_with)
    flax = sys.modules.get(_MODULE)
    if flax is not None:
        _enter(flax, node)
        return
    if not _waiting:
        sys.meta_path.insert(0, _Finder())
    _waiting.append(node)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the module as the other finders do, and enters what waits when it has been executed."""

    is_asking = False

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != _MODULE or self.is_asking:  # one of the others may ask all, too
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        self.is_asking = True
        try:
            specs = (finder.find_spec(fullname, path, target) for finder in others)
            spec = next((spec for spec in specs if spec is not None), None)
        finally:
            self.is_asking = False
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            for node in _waiting:
                _enter(module, node)
            _waiting.clear()

        spec.loader.exec_module = exec_module
        return spec


def _enter(flax: Any, node: _Node) -> None:
    def to_dict(value: Any) -> dict[str, Any]:
        found = {name: flax.to_state_dict(getattr(value, name)) for name in node.fields}
        return found | _checksum(node, value)

    def from_dict(target: Any, state: dict[str, Any]) -> Any:
        expected = {*node.fields, *_checksum(node, target)}
        if not isinstance(state, dict) or set(state) != expected:
            found = sorted(state) if isinstance(state, dict) else type(state).__name__
            raise ValueError(
                f"{node.cls.__name__} at '{flax.current_path()}' needs the entries "
                f"{sorted(expected)}, got {found}: was it saved by another transformation?"
            )
        for name, number in _checksum(node, target).items():
            if int(state[name]) != int(number):
                assert node.made_with is not None
                raise ValueError(
                    f"{node.cls.__name__} at '{flax.current_path()}': what was saved was made with "
                    f"other settings than the target, which has {node.made_with(target)}"
                )
        found = {
            name: flax.from_state_dict(getattr(target, name), state[name], name=name)
            for name in node.fields
        }
        return dataclasses.replace(target, **found) if found else target

    flax.register_serialization_state(node.cls, to_dict, from_dict, override=True)


def _checksum(node: _Node, value: Any) -> dict[str, np.ndarray]:
    if node.made_with is None:
        return {}
    return {_MADE_WITH: np.asarray(zlib.crc32(node.made_with(value).encode()), np.uint32)}


def is_box(node: Any) -> bool:
    """Whether a node is one of the boxes that Flax puts around single arrays.

    Linen keeps the names of an array's axes there (`nn.Partitioned`), nnx what an array is for
    (`nnx.Variable`).
    """
    kind = type(node)
    linen = hasattr(kind, "unbox") and hasattr(kind, "replace_boxed")
    if not (linen or hasattr(kind, "get_metadata")):
        return False
    return len(jax.tree.leaves(node)) == 1


def unboxed(tree: Any) -> Any:
    """Returns the tree with each box's array in its place."""

    def bare(node: Any) -> Any:
        return jax.tree.leaves(node)[0] if is_box(node) else node

    return jax.tree.map(bare, tree, is_leaf=is_box)
