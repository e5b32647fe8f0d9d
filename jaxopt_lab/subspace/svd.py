r"""The leading singular directions of the gradient.

    G = U S V^T,    P(g) = U_r^T g  or  g V_r  or  U_r^T g V_r,    P^-1(a) = U_r a  or  a V_r^T ...

Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", ICML 2024,
arXiv:2403.03507, section 4; randomised: Halko, Martinsson and Tropp, SIAM Review 53, 2011.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from jaxopt_lab import _checks, _compat, _hyperparams, _tree
from jaxopt_lab.subspace import _arguments, projections
from jaxopt_lab.subspace.projections import Choose, Density, Leaf, Step

Side = Literal["smaller", "larger", "in", "out", "both"]
Method = Literal["full", "gram", "randomized"]
_SIDES, _METHODS = get_args(Side), get_args(Method)
# Units of rounding in a product, relative to the norms of its factors: 8 times what is usual.
_OF_A_PRODUCT = 32


@dataclasses.dataclass(frozen=True)
class SVD(projections.LeafProjection):
    """See `svd`."""

    side: Side
    method: Method
    oversampling: int
    power_iterations: int
    choose_basis: Choose | None

    def _size(self, leaf: Leaf, density: Density) -> tuple[int, int]:
        projections.require_matrix(leaf, "svd")
        size = min(leaf.matrix) if self.side == "both" else leaf.matrix[self._projected(leaf)[0]]
        return projections.number_kept(density, size, round), size

    def _projected(self, leaf: Leaf) -> tuple[int, ...]:
        """Which of the two axes (inputs, outputs) are projected."""
        if self.side == "both":
            return (0, 1)
        if self.side in ("in", "out"):
            return (0,) if self.side == "in" else (1,)
        fan_in, fan_out = leaf.matrix
        inputs = fan_in <= fan_out if self.side == "smaller" else fan_in > fan_out
        return (0,) if inputs else (1,)

    def _describe(self, leaf: Leaf) -> str:
        ends = " and ".join(("inputs", "outputs")[axis] for axis in self._projected(leaf))
        return f"directions of the {ends}"

    def _first(self, leaf: Leaf) -> Any:
        bases = tuple(
            jnp.broadcast_to(
                jnp.eye(leaf.matrix[axis], leaf.kept, dtype=_tree.compute_dtype(leaf.dtype)),
                (*projections.stacked(leaf), leaf.matrix[axis], leaf.kept),
            )
            for axis in self._projected(leaf)
        )
        return bases if self.side == "both" else bases[0]

    def choose(
        self, leaves: Sequence[Leaf], old: list[Any], grads: list[jax.Array], step: Step
    ) -> list[Any]:
        """Returns new bases; equal matrices, of whatever leaves, are one program's."""
        if self.choose_basis is not None:
            return super().choose(leaves, old, grads, step)
        found: list[Any] = [None] * len(leaves)
        for members in projections.together(leaves, grads):
            leaf = leaves[members[0]]
            matrices = projections.stack(leaf, [grads[i] for i in members])
            bases = jax.tree.map(
                lambda *xs: jnp.concatenate([x.reshape(-1, *x.shape[-2:]) for x in xs]),
                *(old[i] for i in members),
            )
            keys = self._keys(leaf, members, step)
            new = projections.one_by_one(self, "_renewed", leaf, matrices, bases, keys)
            shapes = [[x.shape for x in self._bases(old[i])] for i in members]
            ends = [
                projections.unstack(x, of, step.count)
                for x, of in zip(self._bases(new), zip(*shapes))
            ]
            for i, own in zip(members, zip(*ends)):
                found[i] = own if self.side == "both" else own[0]
        return found

    def _keys(self, leaf: Leaf, members: list[int], step: Step) -> jax.Array | None:
        """Returns one key a matrix; it does not depend on what a matrix is stacked with."""
        if self.method != "randomized":
            return None
        numbers = jnp.asarray(members, jnp.uint32)
        keys = jax.vmap(functools.partial(jax.random.fold_in, step.key))(numbers)
        if not projections.stacked(leaf):
            return keys
        (count,) = projections.stacked(leaf)
        return jax.vmap(lambda key: jax.random.split(key, count))(keys).reshape(-1)

    def _choose(
        self, leaf: Leaf, old: Any, grad: jax.Array, count: jax.Array, key: jax.Array
    ) -> Any:
        assert self.choose_basis is not None
        found = self.choose_basis(leaf.name, count, grad)
        return jax.tree.map(lambda o, f: projections.checked_choice(f, o, leaf), old, found)

    def _renewed(self, leaf: Leaf, matrix: jax.Array, old: Any, key: jax.Array | None) -> Any:
        """Returns the basis or bases of one matrix."""
        found = self._directions(matrix, self._projected(leaf), leaf.kept, key)
        # Nothing can be learned from a gradient that is zero or not finite.
        size = _compat.max_magnitude(matrix)
        usable = (size > 0) & jnp.isfinite(size)
        new = found if self.side == "both" else found[0]
        return jax.tree.map(
            lambda o, n: jnp.where(usable, _fix_signs(n).astype(o.dtype), o), old, new
        )

    def _directions(
        self, matrix: jax.Array, axes: tuple[int, ...], rank: int, key: jax.Array | None
    ) -> tuple[jax.Array, ...]:
        """Returns orthonormal columns for each of `axes`."""
        # Squares of large or tiny gradients must not leave the range of the dtype.
        largest = _compat.max_magnitude(matrix)
        matrix = matrix / jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
        if self.method == "full":
            # LAPACK reads by columns; given the transpose it needs no copy of every gradient, which
            # XLA would make outside of the `cond`.
            v, _, ut = jnp.linalg.svd(matrix.T, full_matrices=False)
            full = (ut.T, v)
            return tuple(_complete(full[axis], rank)[:, :rank] for axis in axes)
        sides = (matrix, matrix.T)
        if self.method == "gram":
            return tuple(_leading_of_gram(sides[axis], rank) for axis in axes)
        assert key is not None
        return tuple(
            _randomized(sides[axis], rank, self.oversampling, self.power_iterations, key)
            for axis in axes
        )

    def _project(self, leaf: Leaf, selection: Any, x: jax.Array) -> jax.Array:
        a = projections.to_matrix(x, leaf)
        for axis, basis in zip(self._projected(leaf), self._bases(selection)):
            basis = basis.astype(x.dtype)
            a = _product(_t(basis), a) if axis == 0 else _product(a, basis)
        return a

    def without_rounding(
        self, leaves: Sequence[Leaf], xs: list[jax.Array], compact: list[jax.Array]
    ) -> list[jax.Array]:
        """Zeroes directions of which a gradient has nothing, and what is a product's rounding."""
        return [
            projections.shared(self, "_without_rounding", leaf, x, a)
            for leaf, x, a in zip(leaves, xs, compact)
        ]

    def _without_rounding(self, leaf: Leaf, x: jax.Array, compact: jax.Array) -> jax.Array:
        return without_noise(compact, projections.to_matrix(x, leaf), self._projected(leaf))

    def _restore(self, leaf: Leaf, selection: Any, compact: jax.Array) -> jax.Array:
        x = compact
        for axis, basis in zip(self._projected(leaf), self._bases(selection)):
            basis = basis.astype(compact.dtype)
            x = _product(basis, x) if axis == 0 else _product(x, _t(basis))
        return projections.from_matrix(x, leaf)

    def _remainder(self, leaf: Leaf, selection: Any, x: jax.Array, compact: jax.Array) -> jax.Array:
        rest = x - self._restore(leaf, selection, compact)
        along = [-2 if axis == 0 else -1 for axis in self._projected(leaf)]
        return without_rounding(rest, x, leaf, along)

    def carry(self, leaf: Leaf, old: Any, new: Any, moment: jax.Array, squared: bool) -> jax.Array:
        """Rotates a first moment by R = old^T new, a second one by the squares of R."""
        for axis, before, after in zip(self._projected(leaf), self._bases(old), self._bases(new)):
            rotation = _product(_t(before), after).astype(moment.dtype)
            rotation = jnp.square(rotation) if squared else rotation
            moment = _product(_t(rotation), moment) if axis == 0 else _product(moment, rotation)
        return moment

    def _bases(self, selection: Any) -> tuple[jax.Array, ...]:
        return selection if self.side == "both" else (selection,)


def svd(
    side: Side = "smaller",
    method: Method = "full",
    *,
    oversampling: int = 8,
    power_iterations: int = 1,
    choose: Choose | None = None,
) -> SVD:
    r"""Selects the leading singular directions of the current gradient.

    The number of directions is rounded to nearest, half to even, but at least one. Of each
    direction the entry of largest magnitude is made positive, since signs are arbitrary and moments
    may outlive a change of basis. A gradient that is zero or not finite keeps the old basis. State
    beside the moments: the basis, (size of the side, kept), at least float32.

    Beyond the rank of a gradient (a small batch) singular directions are arbitrary. They stay in
    the basis, as in GaLore, since a later gradient may have something of them; but as long as what
    it has is rounding, they get no step. The bound is 8 sqrt(larger side) units of rounding
    relative to the Frobenius norm; what is small but not rounding is left to the rule.

    Args:
      side: which axis of a kernel (in, out) is projected: "smaller" (GaLore; "in" if they are
        equal), "larger" (`optax.contrib.galore` on matrices that are not square), "in", "out" or
        "both". With "both" the compact gradient is diagonal at a refresh up to rounding, which a
        small `eps` of Adam turns into steps.
      method: "full" for a singular value decomposition; "gram" for the eigenvectors of
        :math:`G G^\top` or :math:`G^\top G`, several times faster, but directions whose singular
        value is below :math:`3 \cdot 10^{-4}` (float32) of the largest are not resolved;
        "randomized" for a range finder with Gaussian test vectors.
      oversampling: additional test vectors of "randomized".
      power_iterations: products with :math:`G G^\top` of "randomized"; each makes the small
        singular values count less.
      choose: function `(name, count, gradient) -> basis` that replaces the decomposition; it
        returns float arrays (size, kept) with orthonormal columns, a pair for "both".

    Returns:
      A projection for `frugal`.

    Raises:
      ValueError: `side` or `method` is unknown, or a number is negative.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxopt_lab import subspace
      >>> tx = subspace.frugal(density=0.5, projection=subspace.svd())
      >>> tx.init({"kernel": jnp.zeros((4, 6))}).selected[0].mu["kernel"].shape
      (2, 6)

    References:
      Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, ICML 2024, section 4; Halko,
      Martinsson and Tropp, `Finding structure with randomness
      <https://arxiv.org/abs/0909.4061>`_, 2011, algorithms 4.3 and 4.4.
    """
    _checks.check_choice(_SIDES, side=side)
    _checks.check_choice(_METHODS, method=method)
    _arguments.check_whole_number(oversampling=oversampling, power_iterations=power_iterations)
    _arguments.check_function(choose=choose)
    return SVD(side, method, oversampling, power_iterations, choose)


def without_noise(compact: jax.Array, matrix: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Zeroes what of a projection is rounding: its size says nothing, its sign is chance.

    Beyond the rank of a matrix singular directions are arbitrary, and its coordinates there are
    about 1e-7 of it, which Adam would turn into whole steps. A direction has coordinates of its own
    if their norm is above the rounding of a decomposition; a single coordinate, if it is above that
    of the product with a column. Of a projection of both sides only the first can be said.

    Args:
      compact: the coordinates, shape (..., inputs or kept, outputs or kept).
      matrix: what they are of, shape (..., inputs, outputs).
      axes: which of inputs (0) and outputs (1) are projected.
    """
    eps = float(jnp.finfo(matrix.dtype).eps)
    along, across = (-2, -1) if axes[0] == 0 else (-1, -2)
    columns = _square_sum(matrix, along)
    whole = jnp.sum(columns, across, keepdims=True)
    # Backward errors of decompositions grow with the root of the size, in practice.
    of_a_direction = (8 * eps) ** 2 * max(matrix.shape[-2:]) * whole
    if len(axes) == 2:
        noise = jnp.square(compact) < of_a_direction
    else:
        noise = (_square_sum(compact, across) < of_a_direction) | (
            jnp.square(compact) < (_OF_A_PRODUCT * eps) ** 2 * columns
        )
    # Of what is not finite nothing is known.
    return jnp.where(noise & jnp.isfinite(whole), 0, compact)


def without_rounding(rest: jax.Array, x: jax.Array, leaf: Leaf, along: list[int]) -> jax.Array:
    """Zeroes what of a remainder is the rounding of the two products that made it.

    The remainder of a gradient inside the subspace is 1e-7 of the gradient, and its sign would
    become a full step. It grows with the norm over the axes `along` and, as the basis is rounded
    too, with the condition of the selected part.
    """
    norm = _hyperparams.sqrt(_square_sum(projections.to_matrix(x, leaf), along))
    threshold = _OF_A_PRODUCT * float(jnp.finfo(x.dtype).eps) * norm
    rest = projections.to_matrix(rest, leaf)
    noise = (jnp.abs(rest) < threshold) & jnp.isfinite(norm)
    return projections.from_matrix(jnp.where(noise, 0, rest), leaf)


def _square_sum(x: jax.Array, axis: int | Sequence[int]) -> jax.Array:
    return jnp.sum(jnp.square(x), axis, keepdims=True)


_product = functools.partial(jnp.matmul, precision="highest")


def _t(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, -2, -1)


def _complete(basis: jax.Array, rank: int) -> jax.Array:
    """Adds orthonormal columns where the other side of the matrix is shorter than `rank`."""
    if basis.shape[1] >= rank:
        return basis
    q, r = jnp.linalg.qr(basis, mode="complete")
    known = basis.shape[1]
    return jnp.concatenate([q[:, :known] * jnp.sign(jnp.diagonal(r)), q[:, known:]], 1)


def _leading_of_gram(matrix: jax.Array, rank: int) -> jax.Array:
    gram = _product(matrix, matrix.T)
    _, vectors = jnp.linalg.eigh(gram)
    basis = vectors[:, ::-1][:, :rank]
    # The square of the matrix mixes what is beyond its rank with the small singular directions;
    # what the matrix itself has of each direction tells them apart.
    return _product(basis, _complete(jnp.linalg.svd(_product(basis.T, matrix), False)[0], rank))


def _randomized(
    matrix: jax.Array, rank: int, oversampling: int, power_iterations: int, key: jax.Array
) -> jax.Array:
    rows, cols = matrix.shape
    width = min(rank + oversampling, rows)
    sample = _product(matrix, jax.random.normal(key, (cols, width), matrix.dtype))
    q = jnp.linalg.qr(sample)[0]
    for _ in range(power_iterations):
        q = jnp.linalg.qr(_product(matrix, jnp.linalg.qr(_product(matrix.T, q))[0]))[0]
    # The leading directions within the range that was found.
    found = jnp.linalg.svd(_product(q.T, matrix), full_matrices=False)[0]
    return _product(q, _complete(found, rank)[:, :rank])


def _fix_signs(basis: jax.Array) -> jax.Array:
    largest = jnp.take_along_axis(basis, jnp.argmax(jnp.abs(basis), 0)[None], 0)
    return basis * jnp.where(largest < 0, -1, 1).astype(basis.dtype)
