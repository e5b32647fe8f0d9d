r"""Random coordinates: whole inputs or outputs of a matrix, or single entries.

    P(g) = g[I],    P^-1(a) = zeros with a at I,    g - P^-1(P(g)) = g with zeros at I

Zmushko et al., "FRUGAL", ICML 2025, arXiv:2411.07837, section 4.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxopt_lab import _checks
from jaxopt_lab.subspace import _arguments, projections
from jaxopt_lab.subspace.projections import Choose, Density, Leaf, Step


@dataclasses.dataclass(frozen=True)
class Columns(projections.LeafProjection):
    """See `columns`."""

    axis: Literal["in", "out"]
    choose_indices: Choose | None

    def _size(self, leaf: Leaf, density: Density) -> tuple[int, int]:
        projections.require_matrix(leaf, "columns")
        size = leaf.matrix[0 if self.axis == "in" else 1]
        return projections.number_kept(density, size, math.floor), size

    def _describe(self, leaf: Leaf) -> str:
        return "inputs" if self.axis == "in" else "outputs"

    def _first(self, leaf: Leaf) -> jax.Array:
        shape = (*projections.stacked(leaf), leaf.kept)
        return jnp.broadcast_to(jnp.arange(leaf.kept, dtype=jnp.int32), shape)

    def choose(
        self, leaves: Sequence[Leaf], old: list[jax.Array], grads: list[jax.Array], step: Step
    ) -> list[jax.Array]:
        """Draws new indices; equal sizes, from whatever leaves, in one sort."""
        if self.choose_indices is not None:
            return super().choose(leaves, old, grads, step)
        found: list[Any] = [None] * len(leaves)
        for number, ((size, kept), members) in enumerate(_by_size(leaves).items()):
            counts = [math.prod(projections.stacked(leaves[index])) for index in members]
            keys = jax.random.split(jax.random.fold_in(step.key, number), sum(counts))
            draws = jax.vmap(lambda key, size=size, kept=kept: _draw(key, size, kept))(keys)
            shapes = [old[index].shape for index in members]
            for index, draw in zip(members, projections.unstack(draws, shapes, step.count)):
                found[index] = draw
        return found

    def _choose(
        self, leaf: Leaf, old: jax.Array, grad: jax.Array, count: jax.Array, key: jax.Array
    ) -> jax.Array:
        assert self.choose_indices is not None
        return projections.checked_choice(self.choose_indices(leaf.name, count, grad), old, leaf)

    def _project(self, leaf: Leaf, selection: jax.Array, x: jax.Array) -> jax.Array:
        matrix = projections.to_matrix(x, leaf)
        return _take(matrix, selection, self._axis)

    def restore(
        self, leaves: Sequence[Leaf], selection: list[jax.Array], compact: list[jax.Array]
    ) -> list[jax.Array]:
        """Returns arrays of the leaves' shapes with `compact` in its place and zeros elsewhere."""
        return [
            projections.shared(self, "_put_back", leaf, slots, a)
            for leaf, slots, a in zip(leaves, self._slots(leaves, selection), compact)
        ]

    def _put_back(self, leaf: Leaf, slots: jax.Array, compact: jax.Array) -> jax.Array:
        # Reading the compact array through the inverse of the selection fuses with what follows;
        # a scatter would write zeros first.
        values = _take(compact, jnp.maximum(slots, 0), self._axis)
        selected = self._along_axis(slots >= 0, values)
        return projections.from_matrix(jnp.where(selected, values, 0), leaf)

    def remainder(
        self,
        leaves: Sequence[Leaf],
        selection: list[jax.Array],
        xs: list[jax.Array],
        compact: list[jax.Array],
    ) -> list[jax.Array]:
        """Returns what `project` left out."""
        del compact
        return [
            projections.shared(self, "_without", leaf, slots, x)
            for leaf, slots, x in zip(leaves, self._slots(leaves, selection), xs)
        ]

    def _without(self, leaf: Leaf, slots: jax.Array, x: jax.Array) -> jax.Array:
        matrix = projections.to_matrix(x, leaf)
        selected = self._along_axis(slots >= 0, matrix)
        return projections.from_matrix(jnp.where(selected, 0, matrix), leaf)

    def _slots(self, leaves: Sequence[Leaf], selection: list[jax.Array]) -> list[jax.Array]:
        """Returns, for each leaf and each of its coordinates, the place in the selection, or -1."""
        found: list[Any] = [None] * len(leaves)
        for (size, kept), members in _by_size(leaves).items():
            rows = jnp.concatenate([selection[index].reshape(-1, kept) for index in members])
            slots = projections.one_by_one(self, "_inverse", leaves[members[0]], rows)
            shapes = [(*projections.stacked(leaves[index]), size) for index in members]
            # An index is never negative, as a count.
            own = projections.unstack(slots, shapes, jnp.maximum(rows[0, 0], 0))
            for index, x in zip(members, own):
                found[index] = x
        return found

    def _inverse(self, leaf: Leaf, indices: jax.Array) -> jax.Array:
        # A scatter would be a loop over what is selected, on a CPU.
        equal = indices[:, None] == jnp.arange(leaf.size, dtype=jnp.int32)[None]
        return jnp.max(jnp.where(equal, jnp.arange(leaf.kept, dtype=jnp.int32)[:, None], -1), 0)

    def carry(
        self, leaf: Leaf, old: jax.Array, new: jax.Array, moment: jax.Array, squared: bool
    ) -> jax.Array:
        """Moves what stays selected to its new place; what is new becomes zero."""
        del leaf, squared
        return carry_by_index(old, new, moment, self._axis)

    @property
    def _axis(self) -> int:
        return -2 if self.axis == "in" else -1

    def _along_axis(self, x: jax.Array, like: jax.Array) -> jax.Array:
        return jnp.broadcast_to(x[..., None] if self.axis == "in" else x[..., None, :], like.shape)


def columns(axis: Literal["in", "out"] = "in", choose: Choose | None = None) -> Columns:
    """Selects random inputs of a matrix, or random outputs.

    A draw without replacement, sorted, independent for each leaf and each matrix of a stack; the
    number selected is rounded down, but at least one. State beside the moments: one int32 an index.

    Args:
      axis: "in" for inputs (rows of a kernel (in, out); the columns of a weight matrix as written
        in papers), "out" for outputs.
      choose: function `(name, count, gradient) -> indices` that replaces the draw: of the leaf's
        path, the number of steps taken (int32 array) and the gradient, to an integer array of
        shape (kept,), or (matrices, kept) for a stack. It runs traced, inside a `jax.lax.cond`.

    Returns:
      A projection for `frugal`.

    Raises:
      ValueError: `axis` is unknown.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from jaxopt_lab import subspace
      >>> tx = subspace.frugal(density=0.5, projection=subspace.columns("out"))
      >>> state = tx.init({"kernel": jnp.zeros((6, 4))})
      >>> state.selected[0].mu["kernel"].shape
      (6, 2)
    """
    _checks.check_choice(("in", "out"), axis=axis)
    _arguments.check_function(choose=choose)
    return Columns(axis, choose)


@dataclasses.dataclass(frozen=True)
class Entries(projections.LeafProjection):
    """See `entries`."""

    choose_indices: Choose | None

    def _size(self, leaf: Leaf, density: Density) -> tuple[int, int]:
        size = math.prod(leaf.shape)
        return projections.number_kept(density, size, math.floor), size

    def _describe(self, leaf: Leaf) -> str:
        return "entries"

    def _first(self, leaf: Leaf) -> jax.Array:
        return jnp.arange(leaf.kept, dtype=jnp.int32)

    def choose(
        self, leaves: Sequence[Leaf], old: list[jax.Array], grads: list[jax.Array], step: Step
    ) -> list[jax.Array]:
        """Draws new indices; leaf number i with the step's key folded with i."""
        if self.choose_indices is not None:
            return super().choose(leaves, old, grads, step)
        found: list[Any] = [None] * len(leaves)
        for members in _by_size(leaves).values():
            numbers = jnp.asarray(members, jnp.uint32)
            keys = jax.vmap(functools.partial(jax.random.fold_in, step.key))(numbers)
            draws = projections.one_by_one(self, "_drawn", leaves[members[0]], keys)
            shapes = [old[index].shape for index in members]
            for index, draw in zip(members, projections.unstack(draws, shapes, step.count)):
                found[index] = draw
        return found

    def _drawn(self, leaf: Leaf, key: jax.Array) -> jax.Array:
        return _draw(key, leaf.size, leaf.kept)

    def _choose(
        self, leaf: Leaf, old: jax.Array, grad: jax.Array, count: jax.Array, key: jax.Array
    ) -> jax.Array:
        assert self.choose_indices is not None
        return projections.checked_choice(self.choose_indices(leaf.name, count, grad), old, leaf)

    def _project(self, leaf: Leaf, selection: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.take(x.reshape(-1), selection, unique_indices=True, mode="clip")

    def _restore(self, leaf: Leaf, selection: jax.Array, compact: jax.Array) -> jax.Array:
        zeros = jnp.zeros(math.prod(leaf.shape), compact.dtype)
        return zeros.at[selection].set(compact, unique_indices=True).reshape(leaf.shape)

    def _remainder(
        self, leaf: Leaf, selection: jax.Array, x: jax.Array, compact: jax.Array
    ) -> jax.Array:
        del compact
        return x.reshape(-1).at[selection].set(0, unique_indices=True).reshape(leaf.shape)

    def carry(
        self, leaf: Leaf, old: jax.Array, new: jax.Array, moment: jax.Array, squared: bool
    ) -> jax.Array:
        """Moves what stays selected to its new place; what is new becomes zero."""
        del leaf, squared
        # Entries are many: their indices are searched for.
        order = jnp.argsort(old)
        ascending = old[order]
        place = jnp.minimum(jnp.searchsorted(ascending, new), old.shape[0] - 1)
        return _moved(moment, order[place], ascending[place] == new, -1)


def entries(choose: Choose | None = None) -> Entries:
    """Selects random entries of a leaf of any shape.

    A draw without replacement, sorted; the number selected is rounded down, but at least one. State
    beside the moments: one int32 a selected entry, half as much as Adam's moments.

    Args:
      choose: function `(name, count, gradient) -> indices` that replaces the draw: of the leaf's
        path, the number of steps taken (int32 array) and the gradient, to an integer array of
        shape (kept,) into the flattened leaf. It runs traced, inside a `jax.lax.cond`.

    Returns:
      A projection for `frugal`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxopt_lab import subspace
      >>> tx = subspace.frugal(density=0.25, projection=subspace.entries())
      >>> tx.init({"kernel": jnp.zeros((6, 4))}).selected[0].mu["kernel"].shape
      (6,)
    """
    _arguments.check_function(choose=choose)
    return Entries(choose)


def carry_by_index(old: jax.Array, new: jax.Array, moment: jax.Array, axis: int) -> jax.Array:
    """Moves slices of `moment` from their place in `old` to that in `new`; new ones are zero.

    Every old index is compared with every new one, which for thousands is less than to sort them.

    Args:
      old: indices, shape (..., kept).
      new: indices, shape (..., kept).
      moment: has `kept` on `axis`, counted from the end.
      axis: -1 or -2.
    """
    equal = old[..., :, None] == new[..., None, :]
    position = jnp.max(
        jnp.where(equal, jnp.arange(old.shape[-1], dtype=jnp.int32)[:, None], -1), -2
    )
    return _moved(moment, position, position >= 0, axis)


def _moved(moment: jax.Array, position: jax.Array, found: jax.Array, axis: int) -> jax.Array:
    values = _take(moment, jnp.maximum(position, 0), axis)
    return jnp.where(found[..., None] if axis == -2 else _before_last(found, moment), values, 0)


def _before_last(x: jax.Array, like: jax.Array) -> jax.Array:
    return x if x.ndim == like.ndim else x[..., None, :]


def _by_size(leaves: Sequence[Leaf]) -> dict[tuple[int, int], list[int]]:
    found: dict[tuple[int, int], list[int]] = {}
    for index, leaf in enumerate(leaves):
        found.setdefault((leaf.size, leaf.kept), []).append(index)
    return found


def _draw(key: jax.Array, size: int, kept: int) -> jax.Array:
    return jnp.sort(jax.random.permutation(key, size)[:kept]).astype(jnp.int32)


def _take(x: jax.Array, indices: jax.Array, axis: int) -> jax.Array:
    """Takes slices of (..., rows, cols) along `axis` with one index array a matrix."""
    take = lambda x, i: jnp.take(x, i, axis, mode="clip")  # noqa: E731
    return jax.vmap(take)(x, indices) if indices.ndim == 2 else take(x, indices)
