"""The parts of a tree of gradients by treatment, and one step of what is split."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxopt_lab import _compat, _tree
from jaxopt_lab.subspace.projections import Projection, Step
from jaxopt_lab.subspace.treatments import Treatment


class Parts:
    """The leaves of a tree, each with its treatment."""

    def __init__(self, structure: Any, treatments: Sequence[Treatment]):
        self.structure, self.treatments = structure, list(treatments)

    def of_kind(self, *kinds: str) -> list[int]:
        """Returns the indices of the leaves that are treated so."""
        return [index for index, t in enumerate(self.treatments) if t.kind in kinds]

    def of_phase(self, phase: int) -> list[int]:
        """Returns the indices of the split leaves that are refreshed together."""
        return [index for index in self.of_kind("split") if self.treatments[index].phase == phase]

    def tree(self, leaves: Sequence[Any] | None, members: Sequence[int]) -> Any:
        """Returns the tree with the members' leaves, `optax.MaskedNode` for all others.

        None, for parameters that were not given, stays None.
        """
        if leaves is None:
            return None
        chosen = set(members)
        return self.structure.unflatten(
            [x if index in chosen else optax.MaskedNode() for index, x in enumerate(leaves)]
        )

    def leaves(self, tree: Any, members: Sequence[int]) -> list[Any]:
        """Returns the members' leaves of such a tree."""
        flat = self.structure.flatten_up_to(tree)
        return [flat[index] for index in members]

    def widened(self, grads: Sequence[Any], params: Sequence[Any] | None) -> list[jax.Array]:
        """Returns gradients in the wider of their own dtype and that of their parameters.

        It is the dtype that updates leave with, and that `full` and `free` are given, so that
        narrow gradients of wide weights cost no digits on the way.
        """
        own = [t.leaf for t in self.treatments] if params is None else params
        return [
            jnp.asarray(g).astype(_wider(jnp.result_type(g), jnp.result_type(x)))
            for g, x in zip(grads, own)
        ]

    def select(self, members: Sequence[int], selection: Sequence[Any]) -> None:
        """Notes the selection of the members."""
        for index, value in zip(members, selection):
            self.treatments[index] = dataclasses.replace(self.treatments[index], selection=value)


class Result(NamedTuple):
    """One step of the split leaves of a phase; lists have one entry a member."""

    selection: list[Any]
    state: optax.OptState
    update: list[jax.Array]  # what `full` made of the selected part
    remainder: list[jax.Array]


class Phase:
    """The split leaves that are refreshed together."""

    def __init__(self, parts: Parts, phase: int, projection: Projection):
        self.parts, self.projection = parts, projection
        self.members = parts.of_phase(phase)
        self.infos = [parts.treatments[index].leaf for index in self.members]
        self.selection = [parts.treatments[index].selection for index in self.members]

    def lift(self, x: Any) -> jax.Array:
        """Returns a leaf in the dtype that it is computed in, gathered if parts of it are taken."""
        x = jnp.asarray(x)
        x = _compat.unshard(x) if self.projection.mirrors else x
        return x.astype(_tree.compute_dtype(x.dtype))

    def first(self) -> list[Any]:
        """Returns the selection to begin with."""
        return self.projection.first(self.infos) if self.members else []

    def compact_params(self, params: Sequence[Any], selection: list[Any]) -> Any:
        """Returns what `full` sees of the parameters."""
        own = [params[index] for index in self.members]
        if any(isinstance(x, jax.ShapeDtypeStruct) for x in own):
            return jax.eval_shape(self._compact, own, selection)
        return self._compact(own, selection)

    def _compact(self, own: list[Any], selection: list[Any]) -> Any:
        lifted = [self.lift(x) for x in own]
        return self._seen(self.project(selection, lifted), [info.dtype for info in self.infos])

    def project(self, selection: list[Any], xs: list[jax.Array]) -> list[Any]:
        """Returns the compact arrays of the members."""
        return self.projection.project(self.infos, selection, xs) if self.members else []

    def _seen(self, compact: list[Any], dtypes: Sequence[Any]) -> Any:
        """Returns the tree that `full` is given."""
        if not self.projection.mirrors and self.parts.treatments:
            return compact
        everywhere: list[Any] = [None] * len(self.parts.treatments)
        for index, a, dtype in zip(self.members, compact, dtypes):
            everywhere[index] = _narrowed(a, dtype)
        return self.parts.tree(everywhere, self.members)

    def step(
        self,
        rule: optax.GradientTransformationExtraArgs,
        grads: list[jax.Array],
        dtypes: list[Any],
        params: Sequence[Any] | None,
        state: optax.OptState,
        refresh: jax.Array | None,
        step: Step,
        on_refresh: str,
        extra_args: dict[str, Any],
    ) -> Result:
        """Renews the selection if it is time, and applies `rule` to the selected part.

        Args:
          rule: `full`.
          grads: of the members, lifted.
          dtypes: of the members' gradients.
          params: all parameters, or None.
          state: of `rule`.
          refresh: whether it is time; None for always.
          step: where we are.
          on_refresh: see `frugal`.
          extra_args: of `rule`.
        """
        if not self.members:
            return Result([], state, [], [])
        old = self.selection
        check_rule_state(state, jax.eval_shape(rule.init, self._shapes_seen()))

        def renewed() -> Any:
            new = self.projection.choose(self.infos, old, grads, step)
            return new, self._carried(state, old, new) if on_refresh == "project" else None

        def same() -> Any:
            return old, state if on_refresh == "project" else None

        new, carried = renewed() if refresh is None else _compat.cond(refresh, renewed, same)
        compact = self.projection.without_rounding(self.infos, grads, self.project(new, grads))
        seen = self._seen(compact, dtypes)
        weights = None if params is None else self.compact_params(params, new)
        if on_refresh == "project":
            state = carried
        elif on_refresh in ("reset", "reset_all"):
            state = restarted(rule.init(seen if weights is None else weights), state, refresh)
        u, state = rule.update(seen, state, weights, **extra_args)
        if self.projection.mirrors:
            u = self.parts.leaves(u, self.members)
        u = jax.tree.map(lambda x: x.astype(_tree.compute_dtype(x.dtype)), u)
        return Result(
            new,
            state,
            self.projection.restore(self.infos, new, u),
            self.projection.remainder(self.infos, new, grads, compact),
        )

    def _carried(self, state: optax.OptState, old: list[Any], new: list[Any]) -> optax.OptState:
        """Expresses every moment of the members in the new selection."""
        names = self.parts.structure.unflatten(range(len(self.parts.treatments)))
        paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(names)[0]]
        shapes = [a.shape for a in jax.eval_shape(self.project, old, self._abstract())]
        carried = set()

        def carry(path: Any, leaf: Any) -> Any:
            for place, index in enumerate(self.members):
                own = paths[index]
                is_moment = jnp.issubdtype(jnp.result_type(leaf), jnp.floating)  # and no code
                if (
                    is_moment
                    and path[len(path) - len(own) :] == own
                    and jnp.shape(leaf) == shapes[place]
                ):
                    carried.add(place)
                    squared = _tree.is_non_negative(path)
                    return self.projection.carry(
                        self.infos[place], old[place], new[place], leaf, squared
                    )
            return leaf

        state = jax.tree_util.tree_map_with_path(carry, state)
        for place, info in enumerate(self.infos):
            if place not in carried:
                raise ValueError(
                    f'on_refresh="project" needs moments, but the state of full has no array of '
                    f"shape {shapes[place]} for '{info.name}' (to encode the state, wrap frugal)"
                )
        return state

    def _shapes_seen(self) -> Any:
        """Returns the tree that `full` is given at init, without arrays."""
        compact = jax.eval_shape(self.project, self.selection, self._abstract())
        dtypes = [info.dtype for info in self.infos]
        return jax.eval_shape(lambda compact: self._seen(compact, dtypes), compact)

    def _abstract(self) -> list[jax.ShapeDtypeStruct]:
        return [jax.ShapeDtypeStruct(info.shape, info.dtype) for info in self.infos]


def _wider(one: Any, other: Any) -> Any:
    return one if one == other else _tree.compute_dtype(one, other)


def _narrowed(a: jax.Array, dtype: Any) -> jax.Array:
    if dtype == jnp.float16:
        # A sum of gradients may leave float16's narrow range.
        largest = float(jnp.finfo(dtype).max)
        a = jnp.where(jnp.isfinite(a), jnp.clip(a, -largest, largest), a)
    return a.astype(dtype)


def lower(x: jax.Array, like: jax.Array) -> jax.Array:
    """Returns `x` with the dtype of `like`, and with its sharding where that is a type."""
    return _compat.reshard_like(x.astype(like.dtype), like)


def check_selection(phase: Phase) -> None:
    """Refuses selections of other shapes than the treatments say, as files may restore them.

    Raises:
      ValueError: the message has the leaf and both shapes.
    """
    for info, given, like in zip(phase.infos, phase.selection, jax.eval_shape(phase.first)):
        shapes, expected = [[jnp.shape(x) for x in jax.tree.leaves(s)] for s in (given, like)]
        if shapes != expected:
            raise ValueError(
                f"the selection of '{info.name}' in the state has shapes {shapes}, expected "
                f"{expected}"
            )


def check_error(parts: Parts, error: Any, error_feedback: bool) -> None:
    """Refuses a state with an error that nobody asked for, or without one that was asked for.

    Raises:
      ValueError: the message says which.
    """
    members = parts.of_kind("split") if error_feedback else []
    shapes = [jnp.shape(x) for x in jax.tree.leaves(error)]
    if shapes != [parts.treatments[index].leaf.shape for index in members]:
        raise ValueError(
            f"the state was made by another transformation: its error has the shapes {shapes}, "
            f"which does not go with error_feedback={error_feedback}"
        )


def check_rule_state(state: optax.OptState, fresh: optax.OptState) -> None:
    """Refuses the state of a rule that does not have the form of `fresh`, its own from `init`.

    Containers of other kinds are none of its business: wrappers of modules exchange them. Named
    tuples tell rules apart, shapes tell sizes.

    Raises:
      TypeError: another rule's.
      ValueError: that of other shapes.
    """
    found, expected = _form(state), _form(fresh)
    rules, wanted = [[x for x in form if isinstance(x, str)] for form in (found, expected)]
    if rules != wanted:
        raise TypeError(
            f"expected a state of type {', '.join(wanted) or 'none'} of the rule inside, got "
            f"{', '.join(rules) or 'none'}: was it made by another transformation's init?"
        )
    if found != expected:
        detail = f"{len(found)} arrays, expected {len(expected)}"
        if len(found) == len(expected):
            given, wanted = next((a, b) for a, b in zip(found, expected) if a != b)
            detail = f"an array of shape {given}, expected {wanted}"
        raise ValueError(
            "the state of the rule inside was made by another transformation's init: it has "
            f"{detail}"
        )


def _form(state: Any) -> list[Any]:
    """Returns the names of the named tuples and the shapes of the arrays, in order."""

    def is_named(x: Any) -> bool:
        return hasattr(x, "_fields") and not isinstance(x, optax.MaskedNode)

    form: list[Any] = []
    for x in jax.tree.leaves(state, is_leaf=is_named):
        if is_named(x):
            form.append(type(x).__name__)
            form += [entry for field in x for entry in _form(field)]
        else:
            form.append(jnp.shape(x))
    return form


def restarted(fresh: Any, state: Any, refresh: jax.Array | None) -> Any:
    """Returns `fresh` if it is time, else `state`, whose dtypes and places stay."""

    def one(f: jax.Array, s: jax.Array) -> jax.Array:
        f = f if f.dtype == s.dtype else f.astype(s.dtype)
        # Mesh axes that are part of a type must agree.
        return f if refresh is None else jnp.where(refresh, _compat.reshard_like(f, s), s)

    return jax.tree.map(one, fresh, state)
