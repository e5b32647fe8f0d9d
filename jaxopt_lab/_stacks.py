"""Which axes of a parameter count the layers of a stack, from what its neighbours say.

Biases and norm scales have one axis; whatever they have more, the layers of a scan, the members of
an ensemble or experts, their whole subtree has too, at the same place: leading, or second as
MaxText scans. The nearest subtree that has any of them decides.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from jaxopt_lab import _names
from jaxopt_lab._layouts import Axes, Layouts, Shape, without
from jaxopt_lab._names import Parts


class _Evidence(NamedTuple):
    """What a vector says of its surroundings: how many axes it has that count layers."""

    index: int
    stacked: int
    scope: Parts | None  # it speaks for these experts only


class Stacks(Layouts):
    """Adds to the layouts which leaves are stacks, and along which axes."""

    def __init__(self, parts: Sequence[Parts], shapes: Sequence[Shape]):
        super().__init__(parts, shapes)
        self._scopes: dict[tuple[Parts, Parts | None], list[tuple[int, Shape]]] = {}
        self.evidence = self._by_prefix(self._evidence())
        self.of_kernels = self._by_prefix(self._evidence_of_kernels())

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
        found: dict[bool, list[Axes]] = {True: [], False: []}
        for count in range(len(bias)):
            # PyTorch's order of axes does not tell one place from the other; vmap's is leading.
            for start in (0, 1) if count and not self.is_transposed(i) else (0,):
                axes = tuple(range(start, start + count))
                rest, outputs = without(kernel, axes), without(bias, axes)
                # Equinox's biases of convolutions are (outputs, 1, 1).
                ones = len(outputs) > 1 and set(outputs) == {1}
                same = all(kernel[a : a + 1] == bias[a : a + 1] for a in axes)
                if same and not ones and (fits := self.output_axes(i, rest, outputs)):
                    by_name = self.is_transposed(i) == (fits == (0,))
                    found[by_name].append(axes)
        # Outputs at the other end than the name says count where nothing else fits.
        return found[True] or found[False]

    def _stack_by_neighbours(self, i: int) -> Axes | None:
        shape, module = self.shapes[i], self.module(i)
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
            # What one other module is a stack of may be its own affair.
            told_by = {self.parts[e.index][: depth + 1] for e in visible}
            elsewhere = len(told_by) == 1 and self.parts[i][: depth + 1] not in told_by
            # A raw kernel of that name has the layers and two axes more.
            if _names.is_gate(self.parts[i]):
                return fits[0]
            if flat or elsewhere:
                return self._choice(i, fits[0])
            return self._if_possible(i, fits[0])
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

    def _by_prefix(self, evidence: Iterable[_Evidence]) -> dict[Parts, list[_Evidence]]:
        found: dict[Parts, list[_Evidence]] = collections.defaultdict(list)
        for one in evidence:
            for depth in range(len(self.parts[one.index])):
                found[self.parts[one.index][:depth]].append(one)
        return found

    def _visible(self, prefix: Parts, parts: Parts) -> list[_Evidence]:
        """Returns what vectors below `prefix` say, or where there are none, what kernels say."""
        found = [
            e
            for e in self.evidence.get(prefix, ())
            if e.scope is None or parts[: len(e.scope)] == e.scope
        ]
        return found or self.of_kernels.get(prefix, [])

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
            shape = self.shapes[i]
            rank = len(shape)
            # A column is no stack of numbers, and mixtures have axes of their own.
            if not self.vectors[i] or not rank or (rank > 1 and max(shape[1:]) == 1):
                continue
            if _names.is_mixture(parts, self.children[parts[:-1]]) and rank > 1:
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
        """Layers that are dense ones by their names, with one axis of inputs and one of outputs."""
        for i, parts in enumerate(self.parts):
            plain = _names.is_mlp(parts) and not self.vectors[i] and _names.expert(parts) is None
            if plain and len(self.shapes[i]) in (2, 3) and not self.is_thin(i):
                yield _Evidence(i, len(self.shapes[i]) - 2, None)
