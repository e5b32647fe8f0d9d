"""Whole leaves or layers in turn.

    P(g) = the leaves of the active blocks,    P^-1(a) = those leaves, and zeros for all others

Luo et al., "BAdam", NeurIPS 2024, arXiv:2404.02827, algorithm 1; with several leaves active at once
Zmushko et al., "FRUGAL", ICML 2025, arXiv:2411.07837.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from jaxopt_lab import _checks, _compat
from jaxopt_lab.subspace import _arguments, projections
from jaxopt_lab.subspace._layers import Group, layers_of
from jaxopt_lab.subspace.projections import Density, Leaf, Step

Order = Literal["descending", "ascending", "random"]


@dataclasses.dataclass(frozen=True)
class Blocks:
    """See `blocks`."""

    order: Order
    group: Group
    choose_active: Callable[[jax.Array], Any] | None

    mirrors: ClassVar[bool] = False
    on_refresh: ClassVar[tuple[str, ...]] = ("reset",)

    def sizes(self, leaves: Sequence[Leaf], density: Density) -> list[tuple[int, int]]:
        """Returns how many blocks are active of how many, the same for each leaf."""
        size = len(_members(leaves, self.group))
        return [(projections.number_kept(density, size, round), size)] * len(leaves)

    def describe(self, leaves: Sequence[Leaf]) -> list[str]:
        """Returns, for each leaf, the number of its block; the order says which shares a slot."""
        words = [""] * len(leaves)
        for number, block in enumerate(_members(leaves, self.group)):
            for index in block:
                words[index] = f"blocks in {self.order} order, being in block {number}"
        return words

    def first(self, leaves: Sequence[Leaf]) -> list[jax.Array]:
        """Returns a flag a leaf, 1 for those of the first block of every queue.

        Numbers and not booleans: what blends states by arithmetic (optax.contrib.sam) keeps them.
        """
        chosen = {leaf for queue in self._plan(leaves).queues for leaf in queue[0]}
        return [jnp.asarray(index in chosen, jnp.int32) for index in range(len(leaves))]

    def choose(
        self, leaves: Sequence[Leaf], old: list[jax.Array], grads: list[jax.Array], step: Step
    ) -> list[jax.Array]:
        """Advances every slot to the next block of its queue."""
        del old, grads
        plan = self._plan(leaves)
        flags: list[Any] = [None] * len(leaves)
        for number, queue in enumerate(plan.queues):
            if self.choose_active is not None:
                place = jnp.asarray(self.choose_active(step.count))[number]
            else:
                place = step.period % len(queue)
            if self.order == "random" and self.choose_active is None:
                # One key a pass, so that each pass visits every block once.
                key = jax.random.fold_in(jax.random.key(step.seed), step.period // len(queue))
                key = jax.random.fold_in(key, number)
                place = jax.random.permutation(key, len(queue))[place]
            active = (jnp.arange(len(queue)) == place).astype(jnp.int32)
            each = projections.unstack(active, [()] * len(queue), step.count)
            for flag, block in zip(each, queue):
                for leaf in block:
                    flags[leaf] = flag
        return flags

    def project(
        self, leaves: Sequence[Leaf], selection: list[jax.Array], xs: list[jax.Array]
    ) -> list[list[jax.Array]]:
        """Returns, for each slot, the arrays of its block, zeros where that has none."""
        plan = self._plan(leaves)
        slots = []
        for queue, examples in zip(plan.queues, plan.examples):

            def arrays_of(block: list[int], examples: list[int] = examples) -> list[jax.Array]:
                inside = {plan.places[leaf]: leaf for leaf in block}
                arrays = []
                for place, example in enumerate(examples):
                    like = xs[example].astype(leaves[example].dtype)
                    held = xs[inside[place]].astype(like.dtype) if place in inside else None
                    held = jnp.zeros_like(like) if held is None else held
                    arrays.append(_compat.reshard_like(held, like))
                return arrays

            active = jnp.argmax(jnp.stack([selection[block[0]] for block in queue]))
            branches = [functools.partial(arrays_of, block) for block in queue]
            slots.append(_compat.switch(active, branches))
        return slots

    def without_rounding(
        self, leaves: Sequence[Leaf], xs: list[jax.Array], compact: list[list[jax.Array]]
    ) -> list[list[jax.Array]]:
        """Returns `compact`: whole leaves are exact."""
        del leaves, xs
        return compact

    def restore(
        self, leaves: Sequence[Leaf], selection: list[jax.Array], compact: list[list[jax.Array]]
    ) -> list[jax.Array]:
        """Returns the slots' arrays for the active leaves, zeros for the others."""
        plan = self._plan(leaves)
        return [
            jnp.where(flag != 0, compact[slot][place], 0)
            for flag, slot, place in zip(selection, plan.slots, plan.places)
        ]

    def remainder(
        self,
        leaves: Sequence[Leaf],
        selection: list[jax.Array],
        xs: list[jax.Array],
        compact: list[Any],
    ) -> list[jax.Array]:
        """Returns the leaves that are not active, zeros for the others."""
        del leaves, compact
        return [jnp.where(flag != 0, 0, x) for flag, x in zip(selection, xs)]

    def carry(
        self, leaf: Leaf, old: jax.Array, new: jax.Array, moment: jax.Array, squared: bool
    ) -> jax.Array:
        """Is never called: `on_refresh` has no "project"."""
        raise NotImplementedError

    def _plan(self, leaves: Sequence[Leaf]) -> _Plan:
        blocks = _members(leaves, self.group)
        if self.order == "descending":
            blocks = blocks[::-1]
        kept = leaves[0].kept
        queues = [blocks[number::kept] for number in range(kept)]
        slots, places = [0] * len(leaves), [0] * len(leaves)
        examples: list[list[int]] = []
        for number, queue in enumerate(queues):
            held: list[int] = []
            for block in queue:
                taken: set[int] = set()
                for index in block:
                    kind = _kind(leaves[index])
                    free = [
                        place
                        for place, example in enumerate(held)
                        if place not in taken and _kind(leaves[example]) == kind
                    ]
                    place = free[0] if free else len(held)
                    if not free:
                        held.append(index)
                    slots[index], places[index] = number, place
                    taken.add(place)
            examples.append(held)
        return _Plan(queues, examples, slots, places)


class _Plan(NamedTuple):
    """Which leaves take turns in which place; leaves are named by their index."""

    queues: list[list[list[int]]]  # for each slot its blocks in order, each a list of leaves
    examples: list[list[int]]  # for each slot and array of it, the first leaf that uses it
    slots: list[int]  # for each leaf its slot ...
    places: list[int]  # ... and the array of the slot


def blocks(
    order: Order = "descending",
    group: Group = None,
    choose: Callable[[jax.Array], Any] | None = None,
) -> Blocks:
    """Selects whole leaves, or groups of leaves, in turn.

    Blocks are sorted by name, numbers in names by value. With k active blocks, block i belongs to
    queue i modulo k, and every queue advances by one block at each refresh; where k divides the
    number of blocks this is a window of k blocks that moves by k. The state has one slot a queue,
    with room for each of its blocks, in which blocks share arrays of equal shape: for layers of
    equal structure exactly one layer's moments.
    The number of active blocks is rounded to nearest, half to even, but at least one.

    Args:
      order: "descending" (from the last block on), "ascending" or "random": each queue in a new
        order at every pass, so that each block is visited once a pass.
      group: function of a leaf's path that returns the name of its block, such as `by_layer`; or
        "layer", which looks at all paths and shapes: leaves are cut into layers where names repeat
        with different numbers, whatever they are nested in, and what is in no layer forms a block
        for each module; by default each leaf is a block. A stack of scanned layers
        is one leaf, of which nothing smaller can be active.
      choose: function `(count) -> positions` of the number of steps taken that replaces the order:
        for each queue, the position of its active block, an integer array of shape (k,).

    Returns:
      A projection for `frugal`. Its state always begins anew when the block changes.

    Raises:
      ValueError: `order` is unknown.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxopt_lab import subspace
      >>> params = {f"layer{i}": jnp.zeros((4, 4)) for i in range(8)}
      >>> tx = subspace.frugal(density=0.25, projection=subspace.blocks())
      >>> [[x.shape for x in slot] for slot in tx.init(params).selected[0].mu]
      [[(4, 4)], [(4, 4)]]

    References:
      Luo et al., `BAdam <https://arxiv.org/abs/2404.02827>`_, NeurIPS 2024, algorithm 1.
    """
    _checks.check_choice(get_args(Order), order=order)
    if group != "layer" and group is not None and not callable(group):
        raise TypeError(f'group must be a function, "layer" or None, got {group!r}')
    _arguments.check_function(choose=choose)
    return Blocks(order, group, choose)


def _members(leaves: Sequence[Leaf], group: Group) -> list[list[int]]:
    """Returns the leaves of each block, in the order of the blocks' names."""
    names = [leaf.name for leaf in leaves]
    if group == "layer":
        names = layers_of(names, [leaf.shape for leaf in leaves])
    elif group is not None:
        given, names = names, [group(name) for name in names]
        for name, block in zip(given, names):
            if not isinstance(block, str):
                raise TypeError(
                    f"group must return the name of a block, a text, got {block!r} for '{name}'"
                )
    found: dict[str, list[int]] = {}
    for index, _ in enumerate(leaves):
        found.setdefault(names[index], []).append(index)
    return [found[name] for name in sorted(found, key=_natural)]


def _kind(leaf: Leaf) -> tuple[Any, ...]:
    return leaf.shape, leaf.dtype


def _natural(name: str) -> list[tuple[int, int, str]]:
    parts = re.split(r"(\d+)", name)
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts]
