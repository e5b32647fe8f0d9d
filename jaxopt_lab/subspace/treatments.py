"""How each parameter is treated: kept full, split, or without state; decided once, at init."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxopt_lab import _flax, _matrices, _treatments, _tree
from jaxopt_lab._treatments import treatments
from jaxopt_lab.subspace.projections import Density, Leaf, Projection

__all__ = ["Treatment", "treatments"]

Patterns = Sequence[str]
AlwaysFull = Patterns | Callable[[optax.Params], Any] | Any | None


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["selection"],
    meta_fields=["leaf", "kind", "reason", "phase"],
)
@dataclasses.dataclass(frozen=True)
class Treatment:
    """How one parameter is treated.

    Attributes:
      leaf: what is known of the parameter.
      kind: "full": all of it has state; "whole": so has all of it here, as the density keeps all;
        "split": a part of it has state; "free": none has.
      reason: why, in a few words.
      phase: which of the staggered groups a split leaf belongs to.
      selection: indices, basis or flag of a split leaf, None for the others.
    """

    leaf: Leaf
    kind: str
    reason: str
    phase: int = 0
    selection: Any = None

    @property
    def rule(self) -> str:
        """Name of the rule."""
        return "frugal"

    @property
    def name(self) -> str:
        """Path of the parameter."""
        return self.leaf.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        return self.leaf.shape

    def __str__(self) -> str:
        """One line: path, shape, treatment and reason."""
        part = f" {self.leaf.kept} of {self.leaf.size}" if self.kind == "split" else ""
        return f"{self.name or 'parameter'} {self.leaf.shape}: {self.kind}{part} ({self.reason})"


_flax.register(Treatment, ["selection"])


def treatments_of(state: Any) -> list[Treatment]:
    """Returns the treatments in a state, in the order of the parameters."""
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, Treatment))
    return [leaf for leaf in leaves if isinstance(leaf, Treatment)]


def check_updates(updates: optax.Updates, expected: Sequence[Treatment]) -> None:
    """Refuses updates whose paths or shapes are not those that were treated at init.

    Raises:
      ValueError: the message has the path of the leaf.
    """
    shapes = [jnp.shape(x) for x in jax.tree.leaves(updates)]
    # Equal shapes will do: wrappers such as flax.nnx.Optimizer come back with other paths.
    if shapes != [t.leaf.shape for t in expected]:
        like = {t.name: jax.ShapeDtypeStruct(t.leaf.shape, t.leaf.dtype) for t in expected}
        _tree.check_updates(dict(_tree.leaves_with_names(updates)), like)
        raise ValueError("updates do not match the tree given to init: another order of leaves")


def plan(
    params: optax.Params,
    projection: Projection,
    density: Density,
    always_full: AlwaysFull,
    dimension_numbers: _matrices.DimensionNumbers,
    stagger: int,
) -> list[Treatment]:
    """Returns the treatment of each leaf, without selections.

    Raises:
      ValueError: see `frugal`.
    """
    choices = _matrices.choices(dimension_numbers, params, default=_matrices.any_matrix)
    found = _planned(params, choices, projection, density, always_full, stagger)
    _treatments.report(found)
    if always_full is None:
        _treatments.tell_of_unknown("frugal", choices, "full")
    return found


def _planned(
    params: optax.Params,
    choices: Sequence[_matrices.Choice],
    projection: Projection,
    density: Density,
    always_full: AlwaysFull,
    stagger: int,
) -> list[Treatment]:
    dtypes = [jnp.result_type(x) for x in jax.tree.leaves(params)]
    leaves = [Leaf(c.name, c.shape, dtype, c.axes) for c, dtype in zip(choices, dtypes)]
    reasons = _always_full(always_full, params, choices)
    matrices = [choice.reason if choice.axes is not None else "by request" for choice in choices]
    return _sized(leaves, reasons, matrices, projection, density, stagger)


def check_plan(
    found: Sequence[Treatment],
    updates: optax.Updates,
    projection: Projection,
    density: Density,
    always_full: AlwaysFull,
    dimension_numbers: _matrices.DimensionNumbers,
    stagger: int,
) -> None:
    """Refuses the treatments of a state that this transformation's `init` would not have made.

    What is full and which axes are a matrix is asked again of the updates' tree. Where a wrapper
    (flax.nnx.Optimizer) comes back with other paths than it had at init, that much is taken from
    the state, and the rest is compared.

    Args:
      found: the treatments in the state.
      updates: the gradients, whose shapes are those of `found`.
      projection: see `frugal`, as all below.
      density: the fraction selected.
      always_full: what is never split.
      dimension_numbers: the axes of matrices.
      stagger: the number of phases.

    Raises:
      ValueError: the message has the leaf, what the state has and what was expected.
    """
    leaves, structure = jax.tree.flatten(updates)
    shapes = [jax.ShapeDtypeStruct(jnp.shape(x), t.leaf.dtype) for x, t in zip(leaves, found)]
    tree = structure.unflatten(shapes)
    if [name for name, _ in _tree.leaves_with_names(tree)] == [t.name for t in found]:
        choices = _matrices.choices(dimension_numbers, tree, default=_matrices.any_matrix)
        expected = _planned(tree, choices, projection, density, always_full, stagger)
    else:
        known = [t.leaf._replace(kept=0, size=0, part="") for t in found]
        reasons = [t.reason if t.kind == "full" else None for t in found]
        expected = _sized(known, reasons, [""] * len(found), projection, density, stagger)
    for old, new in zip(found, expected):
        if _made_with(old) != _made_with(new):
            raise ValueError(
                f"the state was made by another transformation: '{old.name}' is {_made_with(old)} "
                f"there, expected {_made_with(new)}"
            )


def _made_with(treatment: Treatment) -> str:
    """All that a state's shapes and the meaning of its arrays depend on, in words."""
    leaf = treatment.leaf
    if treatment.kind != "split":
        return treatment.kind
    axes = "" if leaf.axes is None else f", axes {leaf.axes.reduction} to {leaf.axes.output}"
    phase = f"refreshed in phase {treatment.phase}"
    return f"split, {leaf.kept} of {leaf.size} {leaf.part}{axes}, {phase}"


def _sized(
    leaves: Sequence[Leaf],
    reasons: Sequence[str | None],
    matrices: Sequence[str],
    projection: Projection,
    density: Density,
    stagger: int,
) -> list[Treatment]:
    """Returns the treatments of leaves that are full for a reason, or else to be split.

    `matrices` says in a few words what a leaf is that is split.
    """
    # What has no elements has no state either way, and no projection has to serve it.
    empty = [None if math.prod(leaf.shape) else "no elements" for leaf in leaves]
    reasons = [reason or nothing for reason, nothing in zip(reasons, empty)]
    split = [leaf for leaf, reason in zip(leaves, reasons) if reason is None]
    sizes = iter(zip(projection.sizes(split, density), projection.describe(split)))
    found: list[Treatment] = []
    for leaf, reason, matrix in zip(leaves, reasons, matrices):
        if reason is not None:
            found.append(Treatment(leaf, "full", reason))
            continue
        (kept, size), part = next(sizes)
        leaf = leaf._replace(kept=kept, size=size, part=part)
        if kept == size:
            found.append(Treatment(leaf, "whole", f"all {size} are kept"))
        elif kept == 0:
            found.append(Treatment(leaf, "free", f"none of {size} is kept"))
        else:
            found.append(Treatment(leaf, "split", matrix))
    return _with_phases(found, stagger)


def _with_phases(found: list[Treatment], stagger: int) -> list[Treatment]:
    """Spreads split leaves over the phases, the largest first, each to the one with the least."""
    load = [0] * stagger
    order = sorted(
        (index for index, t in enumerate(found) if t.kind == "split"),
        key=lambda index: -_refresh_cost(found[index].leaf),
    )
    for index in order:
        phase = load.index(min(load))
        load[phase] += _refresh_cost(found[index].leaf)
        found[index] = dataclasses.replace(found[index], phase=phase)
    return found


def _refresh_cost(leaf: Leaf) -> int:
    """Operations of a decomposition, up to a factor: entries times the shorter side."""
    return max(math.prod(leaf.shape), 1) * (min(leaf.matrix) if leaf.axes is not None else 1)


def _always_full(
    always_full: AlwaysFull, params: optax.Params, choices: Sequence[_matrices.Choice]
) -> list[str | None]:
    """Returns, for each leaf, why it is kept full, or None if it is to be split."""
    if always_full is None:
        return [_by_default(choice) for choice in choices]
    names = [choice.name for choice in choices]
    if isinstance(always_full, str):
        return _by_patterns([always_full], names)
    if isinstance(always_full, (list, tuple)) and all(isinstance(p, str) for p in always_full):
        return _by_patterns(always_full, names)
    flags = _tree.flags(always_full, params, "always_full")
    return ["by request" if flag else None for flag in flags]


def _by_default(choice: _matrices.Choice) -> str | None:
    if choice.role is None:
        return choice.reason if choice.axes is None else None
    return None if choice.role.kind == "matrix" else choice.role.reason


def _by_patterns(patterns: Patterns, names: Sequence[str]) -> list[str | None]:
    reasons: list[str | None] = [None] * len(names)
    for pattern in patterns:
        try:
            regex = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"always_full: {pattern!r} is no pattern: {error}") from None
        matched = [
            index
            for index, name in enumerate(names)
            if any(map(regex.search, _matrices.spellings(name)))
        ]
        # A tree without leaves is what optax.tree.map_params asks with.
        if names and not matched:
            raise ValueError(
                f"always_full: the pattern {pattern!r} matches no parameter (the first are "
                f"{', '.join(names[:5])}; the nearest are {_matrices.nearest(pattern, names)})"
            )
        for index in matched:
            reasons[index] = f"matches {pattern!r}"
    return reasons
