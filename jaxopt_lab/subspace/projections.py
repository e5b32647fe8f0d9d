"""What a projection is: the part of a list of gradients that an optimizer keeps state for.

A projection works on the list of all split leaves, so that leaves may share state. `selection`
holds one small array a leaf (indices, a basis, a flag); `compact` are the arrays that the stateful
transformation sees, which most projections make leaf by leaf.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxopt_lab import _compat, _matrices

# Of the arrays that are stacked: 16 MiB in float32.
_ENTRIES_TOGETHER = 1 << 22

Density = float | Callable[[int], int]
Choose = Callable[[str, jax.Array, jax.Array], Any]


class Leaf(NamedTuple):
    """What is known of a parameter while tracing."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    axes: _matrices.MatrixAxes | None  # None if it is no matrix
    kept: int = 0  # columns, entries, directions or blocks that are selected ...
    size: int = 0  # ... of so many; filled in from `Projection.sizes`
    part: str = ""  # what these are, in words; from `Projection.describe`

    @property
    def matrix(self) -> tuple[int, int]:
        """Number of inputs and outputs."""
        assert self.axes is not None
        return (
            math.prod(self.shape[a] for a in self.axes.reduction),
            math.prod(self.shape[a] for a in self.axes.output),
        )


class Step(NamedTuple):
    """When a selection is made."""

    count: jax.Array  # steps taken before; int32, shape ()
    period: jax.Array  # selections made before this one; int32, shape ()
    seed: int

    @property
    def key(self) -> jax.Array:
        """A random key of this step."""
        return jax.random.fold_in(jax.random.key(self.seed), self.count)


class Projection(Protocol):
    """How `frugal` finds and treats the part of the gradients that has state.

    Its methods are given `leaves`, what is known of the parameters that are split together, and
    one entry for each of them in all other lists: `selection` (indices, basis or flag), `xs`
    (arrays of the leaves' shapes), `compact` (what `project` made of such).

    Attributes:
      mirrors: whether there is one compact array a leaf.
      on_refresh: what may happen to the state when the selection changes.
    """

    mirrors: ClassVar[bool]
    on_refresh: ClassVar[tuple[str, ...]]

    def sizes(self, leaves: Sequence[Leaf], density: Density) -> list[tuple[int, int]]:
        """Returns, for each leaf, how much of how much is selected, at `density`.

        Raises:
          ValueError: the projection cannot serve a leaf; the message has its path.
        """
        ...

    def describe(self, leaves: Sequence[Leaf]) -> list[str]:
        """Returns, for each leaf, in words, what a selection of it means.

        Two projections that give the same words understand each other's selections and compact
        arrays; a state that was made with other words is refused.
        """
        ...

    def first(self, leaves: Sequence[Leaf]) -> list[jax.Array]:
        """Returns a valid selection to begin with."""
        ...

    def choose(
        self, leaves: Sequence[Leaf], old: list[jax.Array], grads: list[jax.Array], step: Step
    ) -> list[jax.Array]:
        """Returns a new selection after `old` from the gradients `grads`, at `step`."""
        ...

    def project(
        self, leaves: Sequence[Leaf], selection: list[jax.Array], xs: list[jax.Array]
    ) -> list[Any]:
        """Returns the selected part of gradients or parameters as compact arrays."""
        ...

    def without_rounding(
        self, leaves: Sequence[Leaf], xs: list[jax.Array], compact: list[Any]
    ) -> list[Any]:
        """Returns `compact` with zeros for what is only the rounding of the projection of `xs`.

        A rule that normalises would make whole steps of it.
        """
        ...

    def restore(
        self, leaves: Sequence[Leaf], selection: list[jax.Array], compact: list[Any]
    ) -> list[jax.Array]:
        """Returns arrays of the leaves' shapes with `compact` in its place and zeros elsewhere."""
        ...

    def remainder(
        self,
        leaves: Sequence[Leaf],
        selection: list[jax.Array],
        xs: list[jax.Array],
        compact: list[Any],
    ) -> list[jax.Array]:
        """Returns what `project` left out of the gradients `xs`."""
        ...

    def carry(
        self, leaf: Leaf, old: jax.Array, new: jax.Array, moment: jax.Array, squared: bool
    ) -> jax.Array:
        """Expresses a compact `moment` of `leaf` in the selection `new` instead of `old`.

        A second moment is `squared`.
        """
        ...


class LeafProjection:
    """A projection that treats each leaf by itself."""

    mirrors: ClassVar[bool] = True
    on_refresh: ClassVar[tuple[str, ...]] = ("reset", "keep", "project")

    def sizes(self, leaves: Sequence[Leaf], density: Density) -> list[tuple[int, int]]:
        """Returns, for each leaf, how much is selected of how much."""
        return [self._size(leaf, density) for leaf in leaves]

    def describe(self, leaves: Sequence[Leaf]) -> list[str]:
        """Returns, for each leaf, what a selection of it means."""
        return [self._describe(leaf) for leaf in leaves]

    def first(self, leaves: Sequence[Leaf]) -> list[jax.Array]:
        """Returns a valid selection to begin with."""
        return [self._first(leaf) for leaf in leaves]

    def choose(
        self, leaves: Sequence[Leaf], old: list[jax.Array], grads: list[jax.Array], step: Step
    ) -> list[jax.Array]:
        """Returns a new selection; leaf number i draws with the step's key folded with i."""
        keys = [jax.random.fold_in(step.key, index) for index in range(len(leaves))]
        return [
            self._choose(leaf, s, jax.lax.stop_gradient(g), step.count, key)
            for leaf, s, g, key in zip(leaves, old, grads, keys)
        ]

    def project(
        self, leaves: Sequence[Leaf], selection: list[jax.Array], xs: list[jax.Array]
    ) -> list[jax.Array]:
        """Returns the selected part of each leaf."""
        return [shared(self, "_project", leaf, s, x) for leaf, s, x in zip(leaves, selection, xs)]

    def without_rounding(
        self, leaves: Sequence[Leaf], xs: list[jax.Array], compact: list[jax.Array]
    ) -> list[jax.Array]:
        """Returns `compact`: what is taken out of a gradient is exact."""
        del leaves, xs
        return compact

    def restore(
        self, leaves: Sequence[Leaf], selection: list[jax.Array], compact: list[jax.Array]
    ) -> list[jax.Array]:
        """Returns arrays of the leaves' shapes with `compact` in its place and zeros elsewhere."""
        return [
            shared(self, "_restore", leaf, s, a) for leaf, s, a in zip(leaves, selection, compact)
        ]

    def remainder(
        self,
        leaves: Sequence[Leaf],
        selection: list[jax.Array],
        xs: list[jax.Array],
        compact: list[jax.Array],
    ) -> list[jax.Array]:
        """Returns what `project` left out."""
        return [
            shared(self, "_remainder", leaf, s, x, a)
            for leaf, s, x, a in zip(leaves, selection, xs, compact)
        ]

    def carry(
        self, leaf: Leaf, old: jax.Array, new: jax.Array, moment: jax.Array, squared: bool
    ) -> jax.Array:
        """Expresses a compact `moment` of `leaf` in the selection `new` instead of `old`.

        A second moment is `squared`.
        """
        raise NotImplementedError

    def _size(self, leaf: Leaf, density: Density) -> tuple[int, int]:
        raise NotImplementedError

    def _describe(self, leaf: Leaf) -> str:
        raise NotImplementedError

    def _first(self, leaf: Leaf) -> jax.Array:
        raise NotImplementedError

    def _choose(
        self, leaf: Leaf, old: jax.Array, grad: jax.Array, count: jax.Array, key: jax.Array
    ) -> jax.Array:
        raise NotImplementedError

    def _project(self, leaf: Leaf, selection: jax.Array, x: jax.Array) -> jax.Array:
        raise NotImplementedError

    def _restore(self, leaf: Leaf, selection: jax.Array, compact: jax.Array) -> jax.Array:
        raise NotImplementedError

    def _remainder(
        self, leaf: Leaf, selection: jax.Array, x: jax.Array, compact: jax.Array
    ) -> jax.Array:
        raise NotImplementedError


def number_kept(density: Density, size: int, rounded: Callable[[float], int]) -> int:
    """Returns how many of `size` are selected: at least one, of a density above 0.

    Rounding must not leave a small leaf without state that some was asked for.

    Raises:
      ValueError: a function as density returned something out of range.
    """
    if not callable(density):
        return max(rounded(size * density), min(size, 1) if density > 0 else 0)
    kept = density(size)
    if not isinstance(kept, int) or not 0 <= kept <= size:
        raise ValueError(f"density({size}) must be an integer in [0, {size}], got {kept!r}")
    return kept


def require_matrix(leaf: Leaf, projection: str) -> None:
    """Refuses a leaf that has no matrix axes.

    Raises:
      ValueError: the message has the leaf's path and shape.
    """
    if leaf.axes is None:
        raise ValueError(
            f"{projection} needs a matrix, but '{leaf.name}' has shape {leaf.shape}: give its "
            "axes in dimension_numbers, or keep it full (always_full)"
        )


def to_matrix(x: jax.Array, leaf: Leaf) -> jax.Array:
    """Returns `x` as (inputs, outputs), or (matrices, inputs, outputs) for a stack of them."""
    assert leaf.axes is not None
    matrices = _matrices.to_matrices(x, leaf.axes)
    return matrices if leaf.axes.batch else matrices[0]


def from_matrix(x: jax.Array, leaf: Leaf) -> jax.Array:
    """Undoes `to_matrix`."""
    assert leaf.axes is not None
    return _matrices.from_matrices(x if leaf.axes.batch else x[None], leaf.axes, leaf.shape)


def stacked(leaf: Leaf) -> tuple[int, ...]:
    """Returns (matrices,) for a leaf that is a stack of them, else ()."""
    assert leaf.axes is not None
    if not leaf.axes.batch:
        return ()
    return (math.prod(leaf.shape[a] for a in leaf.axes.batch),)


def shared(projection: Any, method: str, leaf: Leaf, *arrays: Any) -> Any:
    """Returns `projection.method(leaf, *arrays)`, traced once for leaves that differ in name."""
    if not any(isinstance(x, Tracer) for x in jax.tree.leaves(arrays)):
        return getattr(projection, method)(leaf, *arrays)
    return _function(projection, method, leaf._replace(name=""))(*arrays)


@functools.lru_cache(4096)
def _function(projection: Any, method: str, leaf: Leaf) -> Callable[..., Any]:
    return jax.jit(functools.partial(getattr(projection, method), leaf))


def together(leaves: Sequence[Leaf], xs: Sequence[jax.Array]) -> list[list[int]]:
    """Returns the indices of leaves whose matrices can be stacked, in groups.

    A decomposition of a stack is compiled once. A group is small, so that the stack, which is a
    copy, takes no memory to speak of, while large matrices stand alone.
    """
    groups: dict[Any, list[list[int]]] = {}
    for index, (leaf, x) in enumerate(zip(leaves, xs)):
        key = leaf._replace(name="", part=""), str(jax.typeof(x))
        found = groups.setdefault(key, [[]])
        if (len(found[-1]) + 1) * math.prod(leaf.shape) > _ENTRIES_TOGETHER and found[-1]:
            found.append([])
        found[-1].append(index)
    return [group for found in groups.values() for group in found]


def stack(leaf: Leaf, grads: Sequence[jax.Array]) -> jax.Array:
    """Returns the matrices of gradients like `leaf`, shape (matrices, inputs, outputs)."""
    matrices = [to_matrix(jax.lax.stop_gradient(g), leaf) for g in grads]
    return jnp.concatenate([x.reshape(-1, *x.shape[-2:]) for x in matrices])


def one_by_one(projection: Any, method: str, leaf: Leaf, *stacks: Any) -> Any:
    """Returns `projection.method(leaf, *slices)` of the slices of stacks, stacked.

    It is a loop and no vectorised program: what uses the result cannot take parts of it in.
    """
    function = functools.partial(getattr(projection, method), leaf)
    if len(jax.tree.leaves(stacks)[0]) == 1:
        found = function(*jax.tree.map(lambda x: x[0], stacks))
        return jax.tree.map(lambda x: x[None], found)
    return jax.lax.map(lambda slices: function(*slices), stacks)


def unstack(x: jax.Array, shapes: Sequence[tuple[int, ...]], count: jax.Array) -> list[jax.Array]:
    """Returns consecutive slices of `x` along its first axis, reshaped.

    They are taken at places that a compiler does not know. Where it does, XLA for CPUs makes a
    kernel of its own of every slice, and of what is fused with it, for equal kernels are compiled
    once only: a thousand leaves would take it many seconds.

    Args:
      x: shape (total, ...).
      shapes: of the slices, all of whose sizes are multiples of an entry of `x`.
      count: any number of steps, which is never negative; shape ().
    """
    entry = math.prod(x.shape[1:])
    sizes = [math.prod(shape) // entry for shape in shapes]
    starts = [jnp.int32(stop - size) for stop, size in zip(np.cumsum(sizes), sizes)]
    # A loop of one turn, which a compiler cannot know.
    turns = 1 + jnp.minimum(count, 0)
    places = [jnp.zeros((), jnp.int32)] * len(sizes)
    places = _compat.fori_loop(0, turns, lambda turn, places: starts, places)
    return [
        jax.lax.dynamic_slice_in_dim(x, place, size).reshape(shape)
        for place, size, shape in zip(places, sizes, shapes)
    ]


def checked_choice(value: Any, expected: jax.Array, leaf: Leaf) -> jax.Array:
    """Returns what a user's `choose` returned, in the dtype of a selection.

    Raises:
      ValueError: it has another shape.
    """
    value = jnp.asarray(value)
    if value.shape != expected.shape:
        raise ValueError(
            f"choose returned shape {value.shape} for '{leaf.name}', expected {expected.shape}"
        )
    return value.astype(expected.dtype)
