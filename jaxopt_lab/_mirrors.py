"""Which leaf of an optimizer's state belongs to which parameter.

A *mirror* is a subtree of the state with exactly the keys of the parameters, such as Adam's `mu`. A
node without leaves (`optax.MaskedNode`, None) may stand for any part of it, and a subtree for one
leaf, such as int8 codes with their scales. Names alone would not do: `inject_hyperparams` keeps a
`b1`, which may be the name of a bias too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

PyTree = Any
Path = tuple[Any, ...]
Skeleton = dict[Any, Any] | None  # the children by key, None for a leaf


class Owned(NamedTuple):
    """A leaf of the state and whose it is."""

    path: Path
    leaf: Any
    owner: Path | None  # the parameter's path; None if it belongs to no parameter
    mirror: Path  # the path of the mirror, () if there is no owner


def owned_leaves(state: PyTree, params: PyTree) -> list[Owned]:
    """Returns every leaf of `state` with its parameter, in the order of `jax.tree.leaves`.

    `params` must not be a bare leaf: every tree would mirror it.
    """
    found, _ = _walk(state, _skeleton(params), ())
    return found


def _walk(node: PyTree, params: Skeleton, path: Path) -> tuple[list[Owned], bool]:
    """Returns the leaves below `node`, and whether there is a mirror among its subtrees."""
    if jax.tree_util.all_leaves([node]):
        return [Owned(path, node, None, ())], False
    if hasattr(node, "belongs_beside"):
        return _with_beside(node, params, path)
    below = [_walk(child, params, (*path, key)) for key, child in _children(node).items()]
    # A tuple of two transformations has the keys of a tuple of two parameters: inner mirrors win.
    if not any(is_mirror for _, is_mirror in below):
        slots = _slots(node, params, ())
        if slots:
            return [
                Owned((*path, *slot, *rest), leaf, slot, path)
                for slot, subtree in slots
                for rest, leaf in jax.tree_util.tree_flatten_with_path(subtree)[0]
            ], True
    return [leaf for leaves, _ in below for leaf in leaves], any(mirror for _, mirror in below)


def _with_beside(node: Any, params: Skeleton, path: Path) -> tuple[list[Owned], bool]:
    """Returns the leaves of a node that has, for each leaf of one child, more in another one.

    Names continue those of the leaf: the scales of `mu` are found below it.
    """
    main, beside = node.belongs_beside()
    found: list[Owned] = []
    whose: list[Owned] = []
    is_mirror = False
    for key, child in _children(node).items():
        if child is beside:
            for owned, more in zip(whose, beside):
                flat, _ = jax.tree_util.tree_flatten_with_path(more)
                found += [owned._replace(path=(*owned.path, *rest), leaf=x) for rest, x in flat]
            continue
        leaves, mirrored = _walk(child, params, (*path, key))
        whose = leaves if child is main else whose
        found += leaves
        is_mirror = is_mirror or mirrored
    return found, is_mirror


def _slots(node: PyTree, like: Skeleton, path: Path) -> list[tuple[Path, PyTree]] | None:
    """Returns what `node` has in the place of the leaves of `like`; None if it is no mirror."""
    if like is None:
        return [(path, node)]
    if not jax.tree.leaves(node):
        return []
    if jax.tree_util.all_leaves([node]):
        return None
    children = _children(node)
    if children.keys() != like.keys():
        return None
    found: list[tuple[Path, PyTree]] = []
    for key, child in children.items():
        slots = _slots(child, like[key], (*path, key))
        if slots is None:
            return None
        found += slots
    return found


def _skeleton(tree: PyTree) -> Skeleton:
    if jax.tree_util.all_leaves([tree]):
        return None
    return {key: _skeleton(child) for key, child in _children(tree).items()}


def _children(node: PyTree) -> dict[Any, PyTree]:
    flat, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
    return {path[0]: child for path, child in flat}
