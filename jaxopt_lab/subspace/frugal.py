r"""FRUGAL: a part of each gradient goes through a rule with state, the rest through one without.

    a = P(g),   u = full(a),   r = g - P^-1(a)
    update = projected_scale (P^-1(u) + free_scale free(r))

Zmushko et al., "FRUGAL: Memory-Efficient Optimization by Reducing State Overhead for Scalable
Training", ICML 2025, arXiv:2411.07837, algorithm 1.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxopt_lab import _adam, _checks, _hyperparams, _matrices, _roles, _tree
from jaxopt_lab.subspace import _arguments
from jaxopt_lab.subspace._parts import (
    Parts,
    Phase,
    check_error,
    check_rule_state,
    check_selection,
    lower,
    restarted,
)
from jaxopt_lab.subspace.columns import columns
from jaxopt_lab.subspace.projections import Density, Projection, Step
from jaxopt_lab.subspace.treatments import (
    AlwaysFull,
    check_plan,
    check_updates,
    plan,
    treatments_of,
)

OnRefresh = Literal["reset", "keep", "project", "reset_all"]


class FrugalState(NamedTuple):
    """State of `frugal`.

    Trees for a part of the parameters have an `optax.MaskedNode` in place of the others.

    Attributes:
      count: steps taken; int32, shape ().
      treatments: a tuple with a `Treatment` for each parameter, with the selection of a split one.
      full: state of `full` on what is kept full.
      selected: state of `full` on the compact arrays, one for each phase.
      free: state of `free`; no arrays.
      error: what error feedback adds to the next gradient: shapes of the split parameters.
    """

    count: jax.Array
    treatments: Any
    full: optax.OptState
    selected: tuple[optax.OptState, ...]
    free: optax.OptState
    error: Any


def frugal(
    full: optax.GradientTransformation | None = None,
    free: optax.GradientTransformation | None = None,
    projection: Projection | None = None,
    density: Density = 0.25,
    update_gap: int = 200,
    *,
    projected_scale: _hyperparams.Scalar = 1.0,
    free_scale: _hyperparams.Scalar = 1.0,
    on_refresh: OnRefresh = "reset",
    error_feedback: bool = False,
    always_full: AlwaysFull = None,
    dimension_numbers: _matrices.DimensionNumbers = None,
    first_gap: int | None = None,
    stagger: int = 1,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Splits each gradient into a part with optimizer state and a part without.

    .. math::
      a_t &= P_t(g_t), \quad u_t = \text{full}(a_t), \quad r_t = g_t - P_t^{-1}(a_t) \\
      \text{update} &= s_p (P_t^{-1}(u_t) + s_f \, \text{free}(r_t))

    `full` sees compact arrays only, so its state shrinks with `density`. The selection is renewed
    every `update_gap` steps, within a `jax.lax.cond`. Where the density keeps all of a leaf,
    `full` sees the leaf itself, nothing is ever reset, and `free` has no part; where it keeps
    none, the whole gradient goes to `free`; a density above 0 keeps something of every leaf. With
    "reset" a refresh puts the state and the counters of the selected part back to those of
    `full.init`. `treatments(tx, params)` says how each parameter is treated. Updates have the wider
    of the gradient's dtype and the parameter's, in which `full` and `free` work. A state that was
    made with other arguments, as far as its shapes or the meaning of its arrays depend on them, is
    refused.

    Inside a `shard_map` over an axis that splits a weight the rule sees the shard and takes it for
    the whole leaf: call it outside, under `jit` with sharded arrays, where all is right, or gather
    the gradient first.

    Args:
      full: transformation of the selected part, and of what is always kept full; by default Adam
        with decay rates 0.9 and 0.999. It is given the gradients and parameters of the selected
        part, one instance for all leaves of a phase.
      free: transformation without state of the remainder: by default `optax.scale_by_sign()`;
        `optax.identity()` for gradient descent, `optax.set_to_zero()` to drop it.
      projection: what is selected: `columns()` (the default), `entries()`, `blocks()`, `svd()` or
        `dct()`.
      density: the fraction selected, in [0, 1], or a function that returns the number selected of
        a given number (of columns, entries, directions or blocks).
      update_gap: number of steps between refreshes; the first is at the first step.
      projected_scale: :math:`s_p`, of all leaves that are not always full.
      free_scale: :math:`s_f`, the learning rate of the remainder relative to the selected part's.
      on_refresh: what happens to the state at a refresh: "reset" (the paper's), "keep", or
        "project": first moments are expressed in the new selection by R = P_new P_old^T, second
        moments (fields called `nu`, `nu_max`, `sum_of_squares`) by the squares of R. "reset_all"
        also resets what is always full.
      error_feedback: adds the remainder to the next gradient instead of giving it to `free`; 4 more
        bytes a parameter in float32.
      always_full: what is never split: regular expressions, each of which must be found in the path
        of at least one parameter, or a tree of booleans, or a function of the parameters that
        returns one. A pattern need not know of the `value` at the end of a path in `flax.nnx`. By
        default everything but hidden matrices: biases, scales, norms, tables of embeddings, input
        and output layers, depthwise convolutions, and kernels whose axes nothing tells, of which a
        warning tells once.
      dimension_numbers: which axes are inputs and outputs of a kernel: a tree of
        `optax.contrib.MuonDimensionNumbers` with None for what is no matrix, or a function of the
        parameters that returns one, or a mapping of patterns to them, each a regular expression for
        a path, or the path of a layer, from its beginning or from a "/" to its end, with all other
        leaves by default. All other axes count matrices, each of which has its own selection. By
        default names, shapes and neighbours decide: see `jaxopt_lab.muon_dimension_numbers`, whose
        matrices are the hidden ones.
      first_gap: steps from the first refresh to the second; by default `update_gap`.
      stagger: number of groups that are refreshed at different steps, so that no step pays for all
        (but the first). Leaves are spread so that the decompositions cost about the same.
      seed: of random selections. The key of a refresh is made of the seed and the number of steps
        taken; the leaves draw apart from one another, by their position among the split ones.

    Returns:
      A `GradientTransformationExtraArgs`; its update needs `params` if that of `full` or `free`
      does. Under `optax.inject_hyperparams` list what shapes and Python numbers depend on
      in `static_args`: `density`, `stagger` and `error_feedback`, or `rank`.

    Raises:
      ValueError: an argument out of range; at init, a projection that cannot serve a leaf, a
        pattern that matches nothing, or a `free` with state; gradients that do not match.
      TypeError: parameters or gradients that are not real floating point.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from jaxopt_lab import frugal, state_bytes
      >>> params = {"kernel": jnp.zeros((512, 512))}
      >>> tx = optax.chain(frugal(density=0.25), optax.scale_by_learning_rate(1e-3))
      >>> state_bytes(tx, params).bytes_per_parameter < 2.01  # Adam: 8
      True

    References:
      Zmushko et al., `FRUGAL <https://arxiv.org/abs/2411.07837>`_, ICML 2025, algorithm 1.
    """
    selector: Projection = columns() if projection is None else projection
    first_gap = update_gap if first_gap is None else first_gap
    _check(selector, density, update_gap, first_gap, stagger, seed, on_refresh)
    _matrices.check(dimension_numbers)
    if not isinstance(always_full, str):
        of = "True and False, one or more patterns of paths"
        _checks.check_per_leaf(of, always_full=always_full)
    _checks.check_non_negative(projected_scale=projected_scale, free_scale=free_scale)
    _arguments.check_static(stagger=stagger, error_feedback=error_feedback)
    _checks.check_flag(error_feedback=error_feedback)
    if error_feedback and free is not None:
        raise ValueError("with error_feedback the remainder is kept: free must be None")
    full = _adam.scale_by_adam(0.9, 0.999, 1e-8) if full is None else full
    free = optax.scale_by_sign() if free is None else free
    _checks.check_transformation(full=full, free=free)
    rule, stateless = map(optax.with_extra_args_support, (full, free))
    # What `full` sees of a split leaf has the leaf's path, but is a part of its matrix.
    part_rule = _roles.on_compact(rule) if selector.mirrors else rule
    phases = range(stagger if selector.mirrors else 1)

    def init_fn(params: optax.Params) -> FrugalState:
        _tree.check_params(params)
        leaves, structure = jax.tree.flatten(params)
        treatments = plan(params, selector, density, always_full, dimension_numbers, len(phases))
        parts = Parts(structure, treatments)
        unused = [parts.treatments[index].name for index in parts.of_kind("free")]
        if error_feedback and unused:
            raise ValueError(
                f"with error_feedback a part of each leaf must be selected, but of '{unused[0]}' "
                "the density keeps none"
            )
        selected = []
        for phase in phases:
            group = Phase(parts, phase, selector)
            selection = group.first()
            parts.select(group.members, selection)
            selected.append(part_rule.init(group.compact_params(leaves, selection)))
        free_state = stateless.init(parts.tree(leaves, parts.of_kind("split", "free")))
        if jax.tree.leaves(free_state):
            raise ValueError("free must have no state; what needs state belongs in full")
        error = optax.MaskedNode()
        if error_feedback:
            error = _tree.zeros_like(parts.tree(leaves, parts.of_kind("split")))
        return FrugalState(
            count=jnp.zeros((), jnp.int32),
            # Without leaves, the tree itself: optax.tree.map_params asks with a placeholder for it.
            treatments=tuple(parts.treatments) or structure.unflatten([]),
            full=rule.init(parts.tree(leaves, parts.of_kind("full", "whole"))),
            selected=tuple(selected),
            free=free_state,
            error=error,
        )

    def check_made_here(parts: Parts, state: FrugalState, updates: optax.Updates) -> None:
        """Refuses the state of a `frugal` with other arguments."""
        if len(state.selected) != len(phases):
            raise ValueError(
                f"the state was made by another transformation: it has {len(state.selected)} "
                f"phases (stagger), expected {len(phases)}"
            )
        check_plan(
            parts.treatments,
            updates,
            selector,
            density,
            always_full,
            dimension_numbers,
            len(phases),
        )
        for phase in phases:
            check_selection(Phase(parts, phase, selector))
        check_error(parts, state.error, error_feedback)

    def refresh(count: jax.Array, phase: int) -> tuple[jax.Array | None, jax.Array]:
        """Whether it is time, None for always, and how many selections there have been."""
        since = count - jnp.maximum(first_gap - phase * update_gap // stagger, 1)
        period = jnp.where(count == 0, 0, since // update_gap + 1)
        if _checks.is_number(update_gap) and update_gap == 1:
            return None, period
        return (count == 0) | (since % update_gap == 0), period

    def update_whole(
        parts: Parts, state: FrugalState, grads: list[jax.Array], params: Any, extra_args: Any
    ) -> tuple[dict[int, jax.Array], optax.OptState]:
        """Returns the updates and the state of what has state as a whole."""
        members = parts.of_kind("full", "whole")
        seen, own = parts.tree(grads, members), parts.tree(params, members)
        rule_state, like = state.full, seen if own is None else own
        check_rule_state(rule_state, jax.eval_shape(rule.init, like))
        if on_refresh == "reset_all":
            rule_state = restarted(rule.init(like), rule_state, refresh(state.count, 0)[0])
        u, rule_state = rule.update(seen, rule_state, own, **extra_args)
        results = dict(zip(members, parts.leaves(u, members)))
        for index in parts.of_kind("whole"):
            results[index] = _scaled(results[index], projected_scale)
        return results, rule_state

    def update_split(
        parts: Parts, state: FrugalState, grads: list[jax.Array], params: Any, extra_args: Any
    ) -> tuple[dict[int, jax.Array], dict[int, jax.Array], tuple[optax.OptState, ...]]:
        """Returns the updates by the selected parts, the remainders, and the states."""
        selected, remainders, states = {}, {}, []
        for phase, old in zip(phases, state.selected):
            group = Phase(parts, phase, selector)
            lifted = [group.lift(grads[index]) for index in group.members]
            if error_feedback:
                errors = parts.leaves(state.error, group.members)
                lifted = [g + group.lift(e).astype(g.dtype) for g, e in zip(lifted, errors)]
            due, period = refresh(state.count, phase)
            step = Step(state.count, period, seed)
            dtypes = [grads[index].dtype for index in group.members]
            found = group.step(
                part_rule, lifted, dtypes, params, old, due, step, on_refresh, extra_args
            )
            parts.select(group.members, found.selection)
            selected |= zip(group.members, found.update)
            remainders |= zip(group.members, found.remainder)
            states.append(found.state)
        return selected, remainders, tuple(states)

    def update_rest(
        parts: Parts, state: FrugalState, grads: list[jax.Array], params: Any, extra_args: Any
    ) -> dict[int, jax.Array]:
        """Returns what `free` makes of the remainders, which stand in for their gradients."""
        members = parts.of_kind("split", "free")
        seen, own = parts.tree(grads, members), parts.tree(params, members)
        u, _ = stateless.update(seen, state.free, own, **extra_args)
        lifted = [x.astype(_tree.compute_dtype(x.dtype)) for x in parts.leaves(u, members)]
        return {index: _scaled(x, free_scale) for index, x in zip(members, lifted)}

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, FrugalState]:
        state = _tree.check_state(state, FrugalState)
        check_updates(updates, treatments_of(state.treatments))
        parts = Parts(jax.tree.structure(updates), treatments_of(state.treatments))
        check_made_here(parts, state, updates)
        for name, gradient in _tree.leaves_with_names(updates):
            _tree.check_gradient(name, gradient)
        weights = None if params is None else jax.tree.leaves(params)
        grads = parts.widened(jax.tree.leaves(updates), weights)

        results, full_state = update_whole(parts, state, grads, weights, extra_args)
        selected, remainders, states = update_split(parts, state, grads, weights, extra_args)
        error = state.error
        if error_feedback:
            members = parts.of_kind("split")
            old = dict(zip(members, parts.leaves(error, members)))
            kept = {index: lower(remainders[index], like=old[index]) for index in members}
            error = parts.tree([kept.get(index) for index in range(len(grads))], members)
            rest = {}
        else:
            left = list(grads)
            for index, r in remainders.items():
                left[index] = lower(r, like=grads[index])
            rest = update_rest(parts, state, left, weights, extra_args)
        for index, u in selected.items():
            rest[index] = lower(u, like=rest[index]) + rest[index] if index in rest else u
        for index, total in rest.items():
            results[index] = lower(_scaled(total, projected_scale), like=grads[index])
        new_state = FrugalState(
            count=_hyperparams.increment(state.count),
            treatments=tuple(parts.treatments) or state.treatments,
            full=full_state,
            selected=states,
            free=state.free,
            error=error,
        )
        return parts.structure.unflatten([results[index] for index in range(len(grads))]), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check(
    projection: Any,
    density: Density,
    update_gap: Any,
    first_gap: Any,
    stagger: Any,
    seed: Any,
    on_refresh: str,
) -> None:
    if not hasattr(projection, "project") or isinstance(projection, type):
        raise TypeError(
            f"projection must be one, such as columns() or svd(); got {type(projection).__name__}"
        )
    _arguments.check_density(density)
    _checks.check_positive_integer(update_gap=update_gap, first_gap=first_gap, stagger=stagger)
    if _checks.is_number(update_gap) and stagger > update_gap:
        raise ValueError(f"stagger must be at most update_gap ({update_gap}), got {stagger}")
    _arguments.check_seed(seed)
    allowed = (*projection.on_refresh, "reset_all")
    if on_refresh not in allowed:
        raise ValueError(
            f"on_refresh must be one of {allowed} with this projection, got {on_refresh!r}"
        )


def _scaled(x: jax.Array, scale: _hyperparams.Scalar) -> jax.Array:
    if _checks.is_number(scale) and scale == 1:
        return x
    return x * jnp.asarray(scale, x.dtype)
