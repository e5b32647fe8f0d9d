"""Which axes of a kernel are inputs and which outputs, from its name and the bias beside it."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import NamedTuple

from jaxopt_lab import _names
from jaxopt_lab._names import Parts

Shape = tuple[int, ...]
Axes = tuple[int, ...]


class MatrixAxes(NamedTuple):
    """The axes of one parameter, each non-negative, in the order of the parameter."""

    batch: Axes
    reduction: Axes
    output: Axes


class Layouts:
    """Paths and shapes of all leaves of a tree, in its order."""

    def __init__(self, parts: Sequence[Parts], shapes: Sequence[Shape]):
        self.parts, self.shapes = parts, shapes
        self.index = {p: i for i, p in enumerate(parts)}
        self.under: dict[Parts, list[int]] = collections.defaultdict(list)
        self.children: dict[Parts, set[str]] = collections.defaultdict(set)
        for i, p in enumerate(parts):
            for depth in range(len(p)):
                self.under[p[:depth]].append(i)
                self.children[p[:depth]].add(p[depth])
        self.vectors = [
            _names.is_vector(p)
            or _names.is_mixture(p, self.children[p[:-1]])
            or (_names.may_be_bias(p) and (len(s) < 2 or self._has_mate(p)))
            or self._ends_a_pair(p)
            for p, s in zip(parts, shapes)
        ]
        self.biases = self._biases()
        self.transposed = self._transposed()

    def axes(self, i: int, stack: Axes | None) -> tuple[MatrixAxes | None, str]:
        """Returns the axes of a leaf with the given stack, or None and why not."""
        shape = self.shapes[i]
        rest = [a for a in range(len(shape)) if a not in (stack or ())]
        sizes = tuple(shape[a] for a in rest)
        if len(rest) < 2:
            return None, "vector, one for each layer of a stack"
        found = None
        if stack is not None or len(rest) == 2:
            found = self._by_bias(i, sizes, stack or ()) or self._by_name(i, stack or ())
        elif self._says_enough(i, sizes):
            found = self._by_name(i, ())
        if found is None:
            return None, f"{len(shape)} axes whose roles are unknown"
        back = MatrixAxes(*(tuple(rest[a] for a in group) for group in found))
        batch = tuple(sorted((*(stack or ()), *back.batch)))
        return back._replace(batch=batch), "stack of matrices" if batch else "matrix"

    def _says_enough(self, i: int, sizes: Shape) -> bool:
        """Whether names and shape tell a leaf from a stack of others, without neighbours."""
        parts = self.parts[i]
        if _names.is_einsum(parts):
            return True
        if _names.is_convolution(parts) and len(sizes) == 3:
            return True
        if is_window(sizes, parts):
            window = sizes[2:] if self.is_transposed(i) else sizes[:-2]
            return len(window) == 2 and window[0] == window[1] and window[0] in (1, 3, 5, 7)
        if len(sizes) != 3:
            return False
        if _names.expert(parts) is not None or _names.are_factors(parts):
            return True
        if _names.is_query(parts) or _names.is_out(parts):
            # (layers, width, width) or (width, heads, head size), which is hardly square.
            return (sizes[1] != sizes[2] and sizes[0] != sizes[1]) or self._is_flax_attention(i)
        return False

    def _is_flax_attention(self, i: int) -> bool:
        """Whether a kernel is one of the four of Flax's attention, and no stack by their shapes.

        (width, heads, head size) and (heads, head size, width) end and begin alike; stacks would
        have the same first axis.
        """
        place = self.module(i)[:-1]
        kernels = [self.index.get((*place, n, "kernel")) for n in ("query", "key", "value", "out")]
        if i not in kernels or None in kernels:
            return False
        query, *_, out = (self.shapes[j] for j in kernels if j is not None)
        return len(query) == len(out) == 3 and query[1:] == out[:2] and query[0] != out[0]

    def _are_heads(self, i: int, stack: Axes) -> bool:
        """Whether kernels of attention with three axes have heads, and not layers, in one of them.

        (width, heads, head size) and (heads, head size, width) agree in the width and the head
        size; stacks of (layers, width, width) do not.
        """
        queries, keys, outs = [], [], []
        place = self.module(i)[:-1]
        for j in self.under[place]:
            sizes, parts = without(self.shapes[j], stack), self.parts[j]
            if self.vectors[j] or len(sizes) != 3 or self.module(j)[:-1] != place:
                continue
            if _names.is_second_factor(parts):  # whose width is that of a latent
                continue
            if _names.is_out(parts):
                outs.append(sizes)
            elif "q" in _names.words(_names.own(parts))[0]:
                queries.append(sizes)
            elif not {"v", "value", "wv"} & set(_names.words(_names.own(parts))):
                keys.append(sizes)
        widths = {q[0] for q in queries} | {out[2] for out in outs}
        head_sizes = {q[2] for q in queries} | {key[2] for key in keys if queries}
        square = all(q[1] == q[2] for q in queries + keys) and not outs
        return len(head_sizes) < 2 and (len(widths) < 2 or not queries) and not square

    def _by_bias(self, i: int, sizes: Shape, stack: Axes) -> MatrixAxes | None:
        if i not in self.biases:
            return None
        bias = self.shapes[self.biases[i]]
        if len(bias) <= len(stack):
            return None
        outputs = without(bias, stack)
        if len(sizes) > 2 and _names.expert(self.parts[i]) and not stack and len(outputs) > 1:
            return None
        found = self.output_axes(i, sizes, outputs)
        return matrix(found, len(sizes)) if found else None

    def output_axes(self, i: int, sizes: Shape, outputs: Shape) -> Axes | None:
        """Returns the axes of `sizes` that a bias of shape `outputs` belongs to."""
        if not 0 < len(outputs) < len(sizes):
            return None
        last = tuple(range(len(sizes) - len(outputs), len(sizes)))
        fits_last = sizes[last[0] :] == outputs
        channels = outputs[:1] + (1,) * (len(outputs) - 1)
        fits_first = outputs == channels and outputs[0] == sizes[0]
        fits_first &= len(outputs) in (1, len(sizes) - 1)
        if self.is_transposed(i):
            return (0,) if fits_first else last if fits_last else None
        return last if fits_last else (0,) if fits_first and len(outputs) == 1 else None

    def _by_name(self, i: int, stack: Axes) -> MatrixAxes | None:
        """Returns the axes of what is left of a kernel without those of its stack."""
        parts, sizes = self.parts[i], without(self.shapes[i], stack)
        rank = len(sizes)
        if rank == 2:
            return matrix((0,) if self.is_transposed(i) else (1,), 2)
        if _names.is_convolution(parts):
            window = sizes[2:] if self.is_transposed(i) else sizes[:-2]
            if rank > 4 and len({size for size in window if size > 1}) > 1:
                return None  # of (4, 3, 3) the 4 may count layers
            return matrix((0,) if self.is_transposed(i) else (rank - 1,), rank)
        own = _names.own(parts)
        if own == "gating_einsum" and rank == 3:
            down = self.index.get((*self.module(i)[:-1], "linear"))
            down = self.index.get((*self.module(i)[:-1], "linear", "w")) if down is None else down
            inputs = 2 if down is not None and sizes[1] == self.shapes[down][-2] else 1
            inputs = 1 if sizes[1] == sizes[2] else inputs
            return MatrixAxes((0,), (inputs,), (3 - inputs,))
        if _names.is_einsum(parts) and rank == 4 and sizes[0] in (2, 3):
            return MatrixAxes((0,), (2,), (1, 3))
        if rank == 3 and _names.is_out(parts) and not _names.expert(parts):
            agree = _names.is_einsum(parts) or self._are_heads(i, stack)
            heads = not _names.is_mlp(parts) and agree
            return MatrixAxes((), (0, 1), (2,)) if heads else None
        if rank == 3 and _names.is_einsum(parts):
            return MatrixAxes((), (1,), (0, 2))
        if rank == 3 and _names.expert(parts):
            first = self.is_transposed(i) or self._are_experts_transposed(i, stack)
            return MatrixAxes((0,), *((2,), (1,)) if first else ((1,), (2,)))
        if rank == 3 and _names.are_factors(parts):
            return MatrixAxes((0,), (1,), (2,))
        if rank == 3 and _names.is_query(parts) and _names.words(own)[0] != "qkv":
            return MatrixAxes((), (0,), (1, 2)) if self._are_heads(i, stack) else None
        if rank == 4 and _names.words(own)[0] in ("qkv", "kv"):
            if sizes[1] in (2, 3):
                return MatrixAxes((1,), (0,), (2, 3))
            return MatrixAxes((0,), (1,), (2, 3)) if sizes[0] in (2, 3) else None
        if is_window(sizes, parts):
            return matrix((0,) if self.is_transposed(i) else (rank - 1,), rank)
        return None

    def is_transposed(self, i: int) -> bool:
        """Whether a kernel has its outputs first, as those of PyTorch and Equinox."""
        parts = self.parts[i]
        return bool(parts) and _names.has_outputs_first(parts) != (i in self.transposed)

    def _are_experts_transposed(self, i: int, stack: Axes) -> bool:
        """Whether experts have their outputs first: a gate and an up in one show it by their size.

        The down beside them has half as many inputs as they have outputs.
        """
        place = self.module(i)[:-1]
        both = [self.index.get((*place, name)) for name in ("gate_up_proj", "down_proj")]
        if i not in both or None in both:
            return False
        (*_, outs, _), (*_, down) = (without(self.shapes[j], stack) for j in both if j is not None)
        return outs == 2 * down

    def is_thin(self, i: int, stack: Axes = ()) -> bool:
        """Whether a leaf that is not called a kernel has one axis, but for those of length 1."""
        sizes = without(self.shapes[i], stack)
        long = sum(size != 1 for size in sizes)
        parts = self.parts[i]
        few = len(sizes) < 3 and not _names.is_gate(parts)
        return long < 2 and not few and not _names.is_plain(parts)

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
            by_name = shape[0] if self.is_transposed(i) else shape[1]
            other = shape[1] if self.is_transposed(i) else shape[0]
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

    def module(self, i: int) -> Parts:
        """Returns the path of the layer that a leaf belongs to."""
        parts = self.parts[i]
        return parts[:-1] if _names.is_plain(parts) or self.vectors[i] else parts

    def _has_mate(self, parts: Parts) -> bool:
        return any(self._is_leaf(parts, mate) for mate in _names.mates(parts[-1]))

    def _ends_a_pair(self, parts: Parts) -> bool:
        """Whether a leaf is the bias of a pair (kernel, bias) without names, stacked or not."""
        if parts[-1:] != ("1",) or self.children[parts[:-1]] != {"0", "1"}:
            return False
        kernel = self.shapes[self.index[*parts[:-1], "0"]] if self._is_leaf(parts, "0") else ()
        bias = self.shapes[self.index[parts]]
        return any(without(kernel, (axis,)) == bias for axis in range(len(kernel) - 1))

    def _is_leaf(self, parts: Parts, mate: str) -> bool:
        return (*parts[:-1], mate) in self.index

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


def without(shape: Shape, axes: Axes) -> Shape:
    """Returns a shape without some axes."""
    return tuple(size for axis, size in enumerate(shape) if axis not in axes)


def matrix(output: Axes, rank: int) -> MatrixAxes:
    """Returns one matrix with these outputs; all other axes are inputs."""
    return MatrixAxes((), tuple(a for a in range(rank) if a not in output), output)


def is_window(sizes: Shape, parts: Parts) -> bool:
    """Whether a kernel looks like that of a convolution over images or volumes."""
    if len(sizes) not in (4, 5) or not _names.is_plain(parts) or _names.expert(parts):
        return False
    first = _names.has_outputs_first(parts)
    window, rest = (sizes[2:], sizes[:2]) if first else (sizes[:-2], sizes[-2:])
    if max(window) == 1:
        return True
    if _names.is_query(parts) or _names.is_out(parts) or _names.is_dense(parts):
        return False
    square = len({size for size in window if size > 1}) < 2
    return square and max(window) <= min(16, max(rest))
