"""What each leaf of the parameters is: a matrix and along which axes, a vector, an embedding ...

The one place where this is decided, from the names on a leaf's path (`_names`), its shape, and
what its neighbours say. Biases and norm scales have one axis; whatever they have more, the layers
of a scan, the members of an ensemble or experts, their whole subtree has too, at the same place:
leading, or second as MaxText scans. A bias has the outputs of the kernel beside it. Where names,
neighbours and shape leave it open the answer is "unknown", which every rule leaves to its plain
form: two layers taken for one matrix would be a mistake that nobody sees.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxopt_lab import _names
from jaxopt_lab._names import Parts

Kind = Literal["matrix", "vector", "depthwise", "embedding", "input", "head", "unknown"]
Shape = tuple[int, ...]
Axes = tuple[int, ...]


class MatrixAxes(NamedTuple):
    """The axes of one parameter, each non-negative, in the order of the parameter."""

    batch: Axes
    reduction: Axes
    output: Axes


class Role(NamedTuple):
    """What a leaf is."""

    kind: Kind
    axes: MatrixAxes | None  # None for vectors and what is unknown
    reason: str
    has_kernel_name: bool = False


def roles(params: Any) -> tuple[Role, ...]:
    """Returns the role of each leaf, in the order of the leaves; only paths and shapes matter."""
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    names = names_without_boxes([path for path, _ in flat])
    return _decide(names, tuple(jnp.shape(leaf) for _, leaf in flat))


def names_without_boxes(paths: Sequence[Any]) -> tuple[str, ...]:
    """Returns paths as names; the `value` of a box such as `nnx.Variable` is not part of them."""
    box = jax.tree_util.GetAttrKey("value")
    inside = collections.Counter(path[:-1] for path in paths)
    return tuple(
        jax.tree_util.keystr(
            path[:-1] if len(path) > 1 and path[-1] == box and inside[path[:-1]] == 1 else path,
            simple=True,
            separator="/",
        )
        for path in paths
    )


@functools.lru_cache(64)
def _decide(names: tuple[str, ...], shapes: tuple[Shape, ...]) -> tuple[Role, ...]:
    tree = _Tree([_names.parts_of(name) for name in names], shapes)
    return tree.with_last_layer([tree.role(index) for index in range(len(names))])


class _Evidence(NamedTuple):
    """What a vector says of its surroundings: how many axes it has that count layers."""

    index: int
    stacked: int
    scope: Parts | None  # it speaks for these experts only


class _Tree:
    """Paths and shapes of all leaves, and what vectors say about the axes of their neighbours."""

    def __init__(self, parts: Sequence[Parts], shapes: Sequence[Shape]):
        self.parts, self.shapes = parts, shapes
        self.index = {p: i for i, p in enumerate(parts)}
        self.vectors = [_names.is_vector(p) for p in parts]
        self.under: dict[Parts, list[int]] = collections.defaultdict(list)
        self.children: dict[Parts, set[str]] = collections.defaultdict(set)
        for i, p in enumerate(parts):
            for depth in range(len(p)):
                self.under[p[:depth]].append(i)
                self.children[p[:depth]].add(p[depth])
        self.biases = self._biases()
        self.transposed = self._transposed()
        self._scopes: dict[tuple[Parts, Parts | None], list[tuple[int, Shape]]] = {}
        self.evidence: dict[Parts, list[_Evidence]] = collections.defaultdict(list)
        for found in self._evidence() or self._evidence_of_kernels():
            for depth in range(len(parts[found.index])):
                self.evidence[parts[found.index][:depth]].append(found)

    def role(self, i: int) -> Role:
        """Returns what one leaf is."""
        parts, shape = self.parts[i], self.shapes[i]
        if self.vectors[i]:
            return Role("vector", None, "vector by its name" if len(shape) > 1 else _axes(shape))
        if len(shape) < 2:
            return Role("vector", None, _axes(shape))
        stack = self.stack(i)
        if _names.is_table(parts) or _names.is_input(parts):
            return self._end_of_a_model(i, stack)
        axes, reason = self.axes(i, stack)
        named = _names.is_kernel(parts)
        if axes is None:
            kind: Kind = "vector" if reason.startswith("vector") else "unknown"
            return Role(kind, None, reason, named)
        siblings = self.children[self._module(i)[:-1]] if self._module(i) else ()
        if _names.is_head(parts, siblings, bool(stack)):
            return Role("head", axes, "embedding or output layer by its path", named)
        if self._is_depthwise(i, axes):
            return Role("depthwise", axes, "one input a group", named)
        return Role("matrix", axes, reason, named)

    def with_last_layer(self, found: list[Role]) -> tuple[Role, ...]:
        """Finds an output layer that has no name: outside all others, to the size of a table."""
        tables = [self.shapes[i] for i, role in enumerate(found) if role.kind == "embedding"]
        matrices = [i for i, role in enumerate(found) if role.kind == "matrix"]
        count = collections.Counter(self.shapes[i] for i in matrices)
        depth = min((len(self.parts[i]) for i in matrices), default=0)
        for i in matrices:
            axes, shape = found[i].axes, self.shapes[i]
            if axes is None or len(shape) != 2 or len(self.parts[i]) > depth or count[shape] > 1:
                continue
            fan_in, fan_out = shape[axes.reduction[0]], shape[axes.output[0]]
            generic = set(_names.words(_names.own(self.parts[i]))) & {"linear", "dense"}
            if generic and fan_in < fan_out and (fan_out, fan_in) in tables:
                reason = "embedding or output layer by its size, that of a table"
                found[i] = found[i]._replace(kind="head", reason=reason)
        return tuple(found)

    # Which axes count layers.

    def stack(self, i: int) -> Axes | None:
        """Returns the axes that count the layers of a stack, None if nothing says so."""
        own = self._stacks_by_bias(i)
        if len(own) == 1:
            return own[0]
        found = self._stack_by_neighbours(i)
        return found if not own or found in own else None

    def _stacks_by_bias(self, i: int) -> list[Axes]:
        """Returns the axes that a kernel's own bias allows."""
        if i not in self.biases:
            return []
        kernel, bias = self.shapes[i], self.shapes[self.biases[i]]
        if len(bias) == 1:
            return [()]
        found = []
        for count in range(len(bias)):
            for start in (0, 1) if count else (0,):
                axes = tuple(range(start, start + count))
                rest, outputs = _without(kernel, axes), _without(bias, axes)
                # Equinox's biases of convolutions are (outputs, 1, 1).
                ones = len(outputs) > 1 and set(outputs) == {1}
                same = all(kernel[a : a + 1] == bias[a : a + 1] for a in axes)
                if same and not ones and self._output_axes(i, rest, outputs):
                    found.append(axes)
        return found

    def _stack_by_neighbours(self, i: int) -> Axes | None:
        shape, module = self.shapes[i], self._module(i)
        only_others = False
        for depth in range(len(module), -1, -1):
            prefix = module[:depth]
            visible = self._visible(prefix, self.parts[i])
            if not visible:
                continue
            fits = [
                tuple(range(start, start + len(sizes)))
                for start, sizes in self._scope(prefix, self.parts[i])
                if shape[start : start + len(sizes)] == sizes
            ]
            flat = any(e.stacked == 0 for e in visible)
            if not fits and not flat:
                only_others = True
                continue
            if not fits:
                return ()
            if len(fits) > 1:
                return None
            return self._choice(i, fits[0]) if flat else self._if_possible(i, fits[0])
        return () if only_others else None

    def _if_possible(self, i: int, axes: Axes) -> Axes:
        """Returns the axes of a stack, unless a kernel would have one axis without them."""
        few = len(self.shapes[i]) - len(axes) < 2
        named = _names.is_kernel(self.parts[i]) and _names.words(self.parts[i][-1])[0] != "weight"
        return () if few and named else axes

    def _choice(self, i: int, axes: Axes) -> Axes | None:
        """Decides between a stack and none where some neighbours are stacked and others not."""
        found = {(): self.axes(i, ()), axes: self.axes(i, axes)}
        usable = [stack for stack, (result, _) in found.items() if result is not None]
        if len(usable) == 1:
            return usable[0]
        return () if found[()] == found[axes] or len(self.shapes[i]) == 2 else None

    def _visible(self, prefix: Parts, parts: Parts) -> list[_Evidence]:
        return [
            e
            for e in self.evidence.get(prefix, ())
            if e.scope is None or parts[: len(e.scope)] == e.scope
        ]

    def _scope(self, prefix: Parts, parts: Parts) -> list[tuple[int, Shape]]:
        """Returns where the layers are counted, with the sizes, in the subtree around `prefix`."""
        key = prefix, _names.expert(parts)
        if key not in self._scopes:
            self._scopes[key] = self._find_scope(prefix, parts)
        return self._scopes[key]

    def _find_scope(self, prefix: Parts, parts: Parts) -> list[tuple[int, Shape]]:
        stacked = [e for e in self._visible(prefix, parts) if e.stacked]
        if not stacked:
            return []
        places = self._places(stacked)
        for depth in range(len(prefix) - 1, -1, -1):
            wider = self._visible(prefix[:depth], parts)
            if any(not e.stacked for e in wider) or not (found := self._places(wider)):
                break
            prefix, places = prefix[:depth], found
        if len(places) < 2:
            return places
        members = [self.shapes[i] for i in self.under[prefix] if len(self.shapes[i]) > 1]
        count = [sum(s[at : at + len(z)] == z for s in members) for at, z in places]
        if count[0] != count[1]:
            return [places[count[1] > count[0]]]
        # Both are common to all: a width comes again among the other axes, the layers do not.
        inside = set(self.under[prefix])
        others = {size for s in members for size in s[len(places[0][1]) + 1 :]}
        others |= {n for i, s in enumerate(self.shapes) if i not in inside for n in s}
        again = [others.issuperset(sizes) for _, sizes in places]
        if again == [True, True]:
            return places if places[0][1] != places[1][1] else [*places, *places]
        return [places[again[0]]]

    def _places(self, evidence: Sequence[_Evidence]) -> list[tuple[int, Shape]]:
        count = max(e.stacked for e in evidence)
        if any(e.stacked != count for e in evidence):
            count = min(e.stacked for e in evidence)
        found = []
        for start in (0, 1):
            sizes = {self.shapes[e.index][start : start + count] for e in evidence}
            if len(sizes) == 1 and len(next(iter(sizes))) == count:
                found.append((start, sizes.pop()))
        return found

    def _evidence(self) -> list[_Evidence]:
        found = []
        kernels = {bias: kernel for kernel, bias in self.biases.items()}
        for i, parts in enumerate(self.parts):
            rank = len(self.shapes[i])
            if not self.vectors[i] or not rank:
                continue
            scope = _names.expert(parts)
            if i in kernels:
                stacks = self._stacks_by_bias(kernels[i])
                if len(stacks) == 1:
                    found.append(_Evidence(i, len(stacks[0]), scope))
            elif rank == 1 or not (_names.is_query(parts) or _names.is_out(parts)):
                found.append(_Evidence(i, rank - 1, scope))
        return found

    def _evidence_of_kernels(self) -> Iterator[_Evidence]:
        """Where there is no vector: layers that are dense ones by their names."""
        for i, parts in enumerate(self.parts):
            plain = _names.is_mlp(parts) and not self.vectors[i] and _names.expert(parts) is None
            if plain and len(self.shapes[i]) in (2, 3):
                yield _Evidence(i, len(self.shapes[i]) - 2, None)

    # Which of the other axes are inputs and outputs.

    def axes(self, i: int, stack: Axes | None) -> tuple[MatrixAxes | None, str]:
        """Returns the axes of a leaf with the given stack, or None and why not."""
        shape = self.shapes[i]
        rest = [a for a in range(len(shape)) if a not in (stack or ())]
        sizes = tuple(shape[a] for a in rest)
        if len(rest) < 2:
            return None, "vector, one for each layer of a stack"
        found = None
        if stack is not None or len(rest) == 2:
            found = self._by_bias(i, sizes, stack or ()) or self._by_name(i, sizes)
        elif self._says_enough(i, sizes):
            found = self._by_name(i, sizes)
        if found is None:
            return None, f"{len(shape)} axes whose roles are unknown"
        back = MatrixAxes(*(tuple(rest[a] for a in group) for group in found))
        batch = tuple(sorted((*(stack or ()), *back.batch)))
        return back._replace(batch=batch), "stack of matrices" if batch else "matrix"

    def _says_enough(self, i: int, sizes: Shape) -> bool:
        """Whether names and shape tell a leaf from a stack of others, without neighbours."""
        parts = self.parts[i]
        if _names.is_einsum(parts) or _names.is_convolution(parts):
            return True
        if _is_window(sizes, parts):
            window = sizes[2:] if self._is_transposed(i) else sizes[:-2]
            return len(set(window)) == 1 and window[0] in (3, 5, 7)
        if len(sizes) != 3:
            return False
        if _names.expert(parts) is not None:
            return True
        if _names.is_query(parts) or _names.is_out(parts):
            # (layers, width, width) or (width, heads, head size), which is hardly square.
            return sizes[1] != sizes[2] and sizes[0] != sizes[1]
        return False

    def _by_bias(self, i: int, sizes: Shape, stack: Axes) -> MatrixAxes | None:
        if i not in self.biases:
            return None
        bias = self.shapes[self.biases[i]]
        if len(bias) <= len(stack):
            return None
        outputs = _without(bias, stack)
        if len(sizes) > 2 and _names.expert(self.parts[i]) and not stack and len(outputs) > 1:
            return None
        found = self._output_axes(i, sizes, outputs)
        return _matrix(found, len(sizes)) if found else None

    def _output_axes(self, i: int, sizes: Shape, outputs: Shape) -> Axes | None:
        """Returns the axes of `sizes` that a bias of shape `outputs` belongs to."""
        if not 0 < len(outputs) < len(sizes):
            return None
        last = tuple(range(len(sizes) - len(outputs), len(sizes)))
        fits_last = sizes[last[0] :] == outputs
        channels = outputs[:1] + (1,) * (len(outputs) - 1)
        fits_first = outputs == channels and outputs[0] == sizes[0]
        fits_first &= len(outputs) in (1, len(sizes) - 1)
        if self._is_transposed(i):
            return (0,) if fits_first else last if fits_last else None
        return last if fits_last else (0,) if fits_first and len(outputs) == 1 else None

    def _by_name(self, i: int, sizes: Shape) -> MatrixAxes | None:
        """Returns the axes of what is no stack, or whose layers are counted elsewhere."""
        parts, rank = self.parts[i], len(sizes)
        if rank == 2:
            return _matrix((0,) if self._is_transposed(i) else (1,), 2)
        if _names.is_convolution(parts):
            return _matrix((0,) if self._is_transposed(i) else (rank - 1,), rank)
        own = _names.own(parts)
        if own == "gating_einsum" and rank == 3:
            down = self.index.get((*self._module(i)[:-1], "linear"))
            down = self.index.get((*self._module(i)[:-1], "linear", "w")) if down is None else down
            inputs = 2 if down is not None and sizes[1] == self.shapes[down][-2] else 1
            inputs = 1 if sizes[1] == sizes[2] else inputs
            return MatrixAxes((0,), (inputs,), (3 - inputs,))
        if _names.is_einsum(parts) and rank == 4 and sizes[0] in (2, 3):
            return MatrixAxes((0,), (2,), (1, 3))
        if rank == 3 and _names.is_out(parts) and not _names.expert(parts):
            return None if _names.is_mlp(parts) else MatrixAxes((), (0, 1), (2,))
        if rank == 3 and _names.is_einsum(parts):
            return MatrixAxes((), (1,), (0, 2))
        if rank == 3 and _names.expert(parts):
            return MatrixAxes((0,), *((2,), (1,)) if self._is_transposed(i) else ((1,), (2,)))
        if rank == 3 and _names.is_query(parts) and not _names.words(own)[0] == "qkv":
            return MatrixAxes((), (0,), (1, 2))
        if rank == 4 and _names.words(own)[0] in ("qkv", "kv"):
            if sizes[1] in (2, 3):
                return MatrixAxes((1,), (0,), (2, 3))
            return MatrixAxes((0,), (1,), (2, 3)) if sizes[0] in (2, 3) else None
        if _is_window(sizes, parts):
            return _matrix((0,) if self._is_transposed(i) else (rank - 1,), rank)
        return None

    def _end_of_a_model(self, i: int, stack: Axes | None) -> Role:
        shape, parts, stack = self.shapes[i], self.parts[i], stack or ()
        dense = bool(parts) and _names.words(parts[-1])[0] in ("kernel", "w")
        window = _names.is_plain(parts) and len(shape) - len(stack) != 2
        if _names.is_input(parts) or dense or window:
            axes, _ = self.axes(i, stack)
            rank = len(shape)
            if axes is None and rank > 3:
                last = (0,) if self._is_transposed(i) else (rank - 1,)
                axes = _matrix(last, rank)
            return Role("input", axes, "embedding or output layer by its path")
        inputs = tuple(a for a in range(len(shape) - 1) if a not in stack)
        if not inputs:
            return Role("vector", None, "vector, one for each layer of a stack")
        axes = MatrixAxes(tuple(a for a in stack if a < len(shape) - 1), inputs, (len(shape) - 1,))
        return Role("embedding", axes, "embedding or output layer by its path")

    def _is_depthwise(self, i: int, axes: MatrixAxes) -> bool:
        parts, shape = self.parts[i], self.shapes[i]
        if len(axes.reduction) < 2 or len(axes.output) != 1 or _names.is_out(parts):
            return False
        inputs = axes.reduction[0] if self._is_transposed(i) else axes.reduction[-1]
        return shape[inputs] == 1 or _names.is_depthwise(parts)

    def _is_transposed(self, i: int) -> bool:
        """Whether a kernel has its outputs first, as those of PyTorch and Equinox."""
        parts = self.parts[i]
        return bool(parts) and (_names.words(parts[-1])[0] == "weight") != (i in self.transposed)

    def _transposed(self) -> frozenset[int]:
        """Returns the kernels whose order is the other one than their name says.

        Biases show it of those that are not square; the square ones are as all others are.
        """
        self.transposed: frozenset[int] = frozenset()
        found = collections.defaultdict(list)
        for i, bias in self.biases.items():
            shape, outputs = self.shapes[i], self.shapes[bias]
            if len(outputs) != 1 or len(shape) != 2:
                continue
            by_name = shape[0] if self._is_transposed(i) else shape[1]
            other = shape[1] if self._is_transposed(i) else shape[0]
            if shape[0] != shape[1] and outputs[0] in shape:
                found[self.parts[i][-1], outputs[0] == other != by_name].append(i)
        names = {name for name, other in found if other and (name, False) not in found}
        square = [
            i
            for i, parts in enumerate(self.parts)
            if parts and parts[-1] in names and len(self.shapes[i]) == 2
        ]
        clear = [i for (_, other), members in found.items() if other for i in members]
        return frozenset([*square, *clear])

    def _module(self, i: int) -> Parts:
        parts = self.parts[i]
        return parts[:-1] if _names.is_plain(parts) or self.vectors[i] else parts

    def _biases(self) -> dict[int, int]:
        """Returns the bias of each kernel that has one; a "kernel" of its shape is a scale."""
        found = {}
        for i in [i for i, vector in enumerate(self.vectors) if vector]:
            *module, leaf = self.parts[i]
            beside = [self.index.get((*module, mate)) for mate in _names.mates(leaf)]
            kernel = next((k for k in beside if k is not None and not self.vectors[k]), None)
            if kernel is not None and self.shapes[kernel] == self.shapes[i]:
                self.vectors[kernel] = True
            elif kernel is not None:
                found[kernel] = i
        return found


def _axes(shape: Shape) -> str:
    return "1 axis" if shape else "scalar"


def _without(shape: Shape, axes: Axes) -> Shape:
    return tuple(size for axis, size in enumerate(shape) if axis not in axes)


def _matrix(output: Axes, rank: int) -> MatrixAxes:
    return MatrixAxes((), tuple(a for a in range(rank) if a not in output), output)


def _is_window(sizes: Shape, parts: Parts) -> bool:
    """Whether a kernel looks like that of a convolution over images or volumes."""
    if len(sizes) not in (4, 5) or not _names.is_plain(parts) or _names.expert(parts):
        return False
    if _names.is_query(parts) or _names.is_out(parts) or _names.is_dense(parts):
        return False
    first = bool(parts) and _names.words(parts[-1])[0] == "weight"
    window, rest = (sizes[2:], sizes[:2]) if first else (sizes[:-2], sizes[-2:])
    return max(window) <= max(rest) and max(window) <= 16
