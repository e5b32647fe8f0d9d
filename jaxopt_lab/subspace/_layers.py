"""Which leaves of a model are a layer, by their paths and shapes."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Literal

Group = Callable[[str], str] | Literal["layer"] | None

_Parts = tuple[str, ...]
_Shape = tuple[int, ...]


def by_layer(name: str) -> str:
    """The layer that a leaf belongs to: its path up to the first part that has a number.

    Leaves outside numbered layers form one block for each first part of their paths. A function of
    one path cannot know which number counts layers: `group="layer"` looks at all of them.

    Args:
      name: path of a leaf, such as `blocks/3/up/kernel`.

    Returns:
      The name of the block.

    Raises:
      TypeError: no text.

    Examples:
      >>> from jaxopt_lab.subspace import by_layer
      >>> by_layer("blocks/3/up/kernel"), by_layer("layer12/bias"), by_layer("norm/scale")
      ('blocks/3', 'layer12', 'norm')
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be the path of a leaf, such as 'blocks/3/up', got {name!r}")
    parts = name.split("/")
    numbered = [index for index, part in enumerate(parts) if re.search(r"\d", part)]
    return "/".join(parts[: numbered[0] + 1]) if numbered else parts[0]


def layers_of(names: Sequence[str], shapes: Sequence[_Shape]) -> list[str]:
    """Returns for each leaf the name of its layer.

    A *family* are siblings whose names differ in their last number only, such as `layers_0` to
    `layers_5`. Layers are the members of a family: of the outermost one with two members of equal
    structure and shapes (stages of a convolutional network are not alike, their blocks are), or
    where such a member is nothing but such a family again, of that; without any, of the innermost
    that contains modules, and else of the outermost. What is in no family belongs to the module
    that it is in, with three axes (a stack of layers) to none but itself.

    Args:
      names: paths, whose parts are separated by `/` or `.`.
      shapes: of the leaves.
    """
    return list(_layers_of(tuple(names), tuple(shapes)))


@functools.lru_cache(16)
def _layers_of(names: tuple[str, ...], shapes: tuple[_Shape, ...]) -> tuple[str, ...]:
    model = _Model([_split(name) for name in names], shapes)
    depths = [model.depth(path, shape) for path, shape in zip(model.paths, shapes)]
    return tuple("/".join(path[:depth]) for path, depth in zip(model.paths, depths))


class _Model:
    """The leaves below each node of a tree, and the families among its nodes."""

    def __init__(self, paths: Sequence[_Parts], shapes: Sequence[_Shape]):
        self.paths = list(paths)
        self.below: dict[_Parts, list[tuple[_Parts, _Shape]]] = {}
        for path, shape in zip(paths, shapes):
            for depth in range(len(path) + 1):
                self.below.setdefault(path[:depth], []).append((path[depth:], shape))
        self.families: dict[tuple[_Parts, str], list[_Parts]] = {}
        for node in self.below:
            if node and (stem := _stem(node[-1])) is not None:
                self.families.setdefault((node[:-1], stem), []).append(node)
        self.twins: dict[tuple[_Parts, str | None], bool] = {}

    def depth(self, path: _Parts, shape: _Shape) -> int:
        """Returns how many parts of a leaf's path name its layer."""
        numbered = [d for d in range(1, len(path) + 1) if len(self._family(path[:d])) > 1]
        if not numbered:
            return len(path) if len(shape) > 2 else max(len(path) - 1, 1)
        nested = [d for d in numbered if self._has_modules(path[:d])]
        candidates = nested or numbered
        alike = [d for d in candidates if self._has_twins(path[:d])]
        if not alike:
            return nested[-1] if nested else numbered[0]
        chosen = alike[0]
        for inner in numbered:
            whole = len(self.below[path[:chosen]])
            covered = sum(len(self.below[node]) for node in self._family(path[:inner]))
            if inner > chosen and covered == whole and self._has_twins(path[:inner]):
                chosen = inner
        return chosen

    def _family(self, node: _Parts) -> list[_Parts]:
        stem = _stem(node[-1])
        return [] if stem is None else self.families[node[:-1], stem]

    def _has_modules(self, node: _Parts) -> bool:
        return any(len(rest) > 1 for rest, _ in self.below[node])

    def _has_twins(self, node: _Parts) -> bool:
        key = (node[:-1], _stem(node[-1]))
        if key not in self.twins:
            structures = [tuple(sorted(self.below[member])) for member in self._family(node)]
            self.twins[key] = len(set(structures)) < len(structures)
        return self.twins[key]


def _split(name: str) -> _Parts:
    parts = re.split(r"[/.]", name)
    # The array of a box that a module's library puts around a parameter.
    return tuple(parts[:-1] if len(parts) > 1 and parts[-1] == "value" else parts)


def _stem(part: str) -> str | None:
    """Returns a name without its last number, or None if it has none."""
    numbers = list(re.finditer(r"\d+", part))
    if not numbers:
        return None
    return part[: numbers[-1].start()] + "#" + part[numbers[-1].end() :]
