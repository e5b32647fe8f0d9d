r"""Columns of a fixed cosine basis, those that align best with the gradient.

    C[i, j] = sqrt(2/n) cos(pi i (2j + 1) / (2n)), row 0 divided by sqrt(2);  Q = C or C^T
    score_j = |(A Q)_j|,   I = the r largest,   P(g) = g Q_I,   P^-1(a) = a Q_I^T

Modoranu et al., "SVD-Free Low-Rank Adaptive Gradient Optimization for Large Language Models",
2025, arXiv:2505.17967.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_lab import _compat
from jaxopt_lab.subspace import _arguments, projections
from jaxopt_lab.subspace.columns import carry_by_index
from jaxopt_lab.subspace.projections import Choose, Density, Leaf, Step
from jaxopt_lab.subspace.svd import without_noise, without_rounding

_TYPES = (2, 3)
_NORMS = (1, 2)


@dataclasses.dataclass(frozen=True)
class DCT(projections.LeafProjection):
    """See `dct`."""

    type: int
    norm: int
    choose_indices: Choose | None

    def _size(self, leaf: Leaf, density: Density) -> tuple[int, int]:
        projections.require_matrix(leaf, "dct")
        size = min(leaf.matrix)
        return projections.number_kept(density, size, round), size

    def _describe(self, leaf: Leaf) -> str:
        return f"cosines of type {self.type}"

    def _first(self, leaf: Leaf) -> jax.Array:
        shape = (*projections.stacked(leaf), leaf.kept)
        return jnp.broadcast_to(jnp.arange(leaf.kept, dtype=jnp.int32), shape)

    def choose(
        self, leaves: Sequence[Leaf], old: list[jax.Array], grads: list[jax.Array], step: Step
    ) -> list[jax.Array]:
        """Returns the columns with the largest scores; equal matrices are one program's."""
        if self.choose_indices is not None:
            return super().choose(leaves, old, grads, step)
        found: list[Any] = list(old)
        for members in projections.together(leaves, grads):
            leaf = leaves[members[0]]
            matrices = projections.stack(leaf, [grads[i] for i in members])
            kept = jnp.concatenate([old[i].reshape(-1, leaf.kept) for i in members])
            scores = projections.one_by_one(
                self, "_scores", leaf, matrices, jnp.broadcast_to(step.count, matrices.shape[:1])
            )
            _, best = jax.lax.top_k(scores, leaf.kept)
            # The scores of a gradient without information are NaN.
            new = jnp.where(jnp.isfinite(scores[:, :1]), best.astype(kept.dtype), kept)
            shapes = [old[i].shape for i in members]
            for i, own in zip(members, projections.unstack(new, shapes, step.count)):
                found[i] = own
        return found

    def _choose(
        self, leaf: Leaf, old: jax.Array, grad: jax.Array, count: jax.Array, key: jax.Array
    ) -> jax.Array:
        assert self.choose_indices is not None
        found = self.choose_indices(leaf.name, count, grad)
        return projections.checked_choice(found, old, leaf)

    def _scores(self, leaf: Leaf, matrix: jax.Array, count: jax.Array) -> jax.Array:
        """Returns the score of each column, NaN for a gradient that is zero or not finite."""
        # A count is never negative. A basis of constants a compiler would work out by itself, for
        # minutes, and keep in the program.
        everything = jnp.arange(leaf.size, dtype=jnp.int32) + jnp.minimum(count, 0)
        basis = cosine_basis(everything, leaf.size, self.type, matrix.dtype)
        size = _compat.max_magnitude(matrix)
        usable = (size > 0) & jnp.isfinite(size)
        products = _product(basis.T, matrix) if _inputs(leaf) else _product(matrix, basis)
        # A power of a large or tiny gradient must not leave the range of the dtype.
        powers = jnp.abs(products / jnp.where(usable, size, 1)) ** self.norm
        scores = jnp.sum(powers, -1 if _inputs(leaf) else -2)
        return jnp.where(usable, scores, jnp.nan)

    def _project(self, leaf: Leaf, selection: jax.Array, x: jax.Array) -> jax.Array:
        matrix = projections.to_matrix(x, leaf)
        basis = cosine_basis(selection, leaf.size, self.type, x.dtype)
        return _product(_t(basis), matrix) if _inputs(leaf) else _product(matrix, basis)

    def without_rounding(
        self, leaves: Sequence[Leaf], xs: list[jax.Array], compact: list[jax.Array]
    ) -> list[jax.Array]:
        """Zeroes columns of which a gradient has nothing, and entries of a product's rounding."""
        return [
            projections.shared(self, "_without_rounding", leaf, x, a)
            for leaf, x, a in zip(leaves, xs, compact)
        ]

    def _without_rounding(self, leaf: Leaf, x: jax.Array, compact: jax.Array) -> jax.Array:
        matrix = projections.to_matrix(x, leaf)
        return without_noise(compact, matrix, (0,) if _inputs(leaf) else (1,))

    def _restore(self, leaf: Leaf, selection: jax.Array, compact: jax.Array) -> jax.Array:
        basis = cosine_basis(selection, leaf.size, self.type, compact.dtype)
        x = _product(basis, compact) if _inputs(leaf) else _product(compact, _t(basis))
        return projections.from_matrix(x, leaf)

    def _remainder(
        self, leaf: Leaf, selection: jax.Array, x: jax.Array, compact: jax.Array
    ) -> jax.Array:
        rest = x - self._restore(leaf, selection, compact)
        return without_rounding(rest, x, leaf, [-2 if _inputs(leaf) else -1])

    def carry(
        self, leaf: Leaf, old: jax.Array, new: jax.Array, moment: jax.Array, squared: bool
    ) -> jax.Array:
        """Moves what stays selected to its new place; what is new becomes zero."""
        del squared  # the rotation is a partial permutation, equal to its squares
        return carry_by_index(old, new, moment, -2 if _inputs(leaf) else -1)


def dct(type: Literal[2, 3] = 3, norm: Literal[1, 2] = 1, choose: Choose | None = None) -> DCT:
    r"""Selects the columns of a cosine basis on which the gradient is largest.

    .. math::
      C_{ij} = \sqrt{2/n} \cos \frac{\pi i (2j + 1)}{2n}, \quad C_{0j} = \sqrt{1/n}, \qquad
      \text{score}_j = \|(A Q)_{:j}\|

    Projected is the smaller axis of a kernel (in, out), the inputs if they are equal. The number of
    columns is rounded to nearest, half to even, but at least one; they stand in the order of their
    scores. No basis is stored: entries of C are looked up in a table of 4n cosines. A gradient that
    is zero or not finite keeps the old columns; columns of which it has only rounding get no step.
    State beside the moments: one int32 a column.

    Args:
      type: 3 for Q = C, so that A Q is the DCT-III of the rows of A (the authors' "matmul"); 2 for
        its transpose and the DCT-II (the authors' "makhoul"). The two are different bases.
      norm: 1 or 2, the norm that scores a column. 2 minimises the remainder.
      choose: function `(name, count, gradient) -> indices` that replaces the scores: of the leaf's
        path, the number of steps taken (int32 array) and the gradient, to an integer array of
        shape (kept,), or (matrices, kept) for a stack. It runs traced, inside a `jax.lax.cond`.

    Returns:
      A projection for `frugal`.

    Raises:
      ValueError: `type` or `norm` is unknown.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxopt_lab import subspace
      >>> tx = subspace.frugal(density=0.5, projection=subspace.dct())
      >>> tx.init({"kernel": jnp.zeros((4, 6))}).selected[0].mu["kernel"].shape
      (2, 6)

    References:
      Modoranu et al., `SVD-Free Low-Rank Adaptive Gradient Optimization for Large Language Models
      <https://arxiv.org/abs/2505.17967>`_, 2025.
    """
    for name, value, options in (("type", type, _TYPES), ("norm", norm, _NORMS)):
        if isinstance(value, (bool, np.ndarray, jax.Array)) or value not in options:
            raise ValueError(f"{name} must be one of {options}, got {value!r}")
    _arguments.check_function(choose=choose)
    return DCT(type, norm, choose)


def cosine_basis(columns: jax.Array, size: int, type: int, dtype: jnp.dtype) -> jax.Array:
    """Returns the columns of Q with the given indices, shape (..., size, number of columns)."""
    # cos(pi m / 2n) has period 4n in m: a table keeps the argument exact in any dtype.
    table = np.cos(np.pi * np.arange(4 * size) / (2 * size)) * np.sqrt(2 / size)
    rows = jnp.arange(size, dtype=jnp.uint32)[:, None]
    columns = columns.astype(jnp.uint32)[..., None, :]
    i, j = (rows, columns) if type == 3 else (columns, rows)
    values = jnp.asarray(table, dtype)[i * (2 * j + 1) % (4 * size)]
    return jnp.where(i == 0, jnp.asarray(np.sqrt(1 / size), dtype), values)


def _inputs(leaf: Leaf) -> bool:
    fan_in, fan_out = leaf.matrix
    return fan_in <= fan_out


def _product(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.matmul(left, right, precision="highest")


def _t(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, -2, -1)
