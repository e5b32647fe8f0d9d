"""Derivatives of attention of any order, forward and reverse, each in memory linear in the length.

Let F map the operands x to output and lse. Two families of functions, both linear in everything but
x, are closed under what JAX does to them:

    D(x; t_1, ..., t_k)      the k-th derivative of F along t_1, ..., t_k
    G(x; t_1, ..., t_k, c)   the gradient of  c . F  in x, differentiated along t_1, ..., t_k

* Where x moves along t, D and G get t as one direction more.
* The transpose of D in one of its t is G without it; that of G in c is D with one t more; and that
  of G in one of its t is G again, since derivatives are symmetric in their directions.

So one JAX primitive, whose parameter says which of these functions it is, serves `jax.jvp`,
`jax.linearize`, `jax.grad` and all their compositions. G without a direction is the backward pass
of the route itself; D with one is the tangent pass of `Route.plain`; the others are forward-mode
derivatives of the two in plain JAX, where loops keep nothing of their steps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

from pallas_kernels.attention import heads
from pallas_kernels.attention.chunks import ChunkedConfig
from pallas_kernels.attention.placement import placed_like
from pallas_kernels.attention.problem import AXES, Operands, Route, Settings, names_of
from pallas_kernels.attention.tangent import PLAIN

MOVABLE = ("query", "key", "value", "bias", "sinks", "diagonals")

Named = Mapping[str, jax.Array]


class Results(NamedTuple):
    """What attention returns, or how it moves."""

    output: jax.Array
    lse: jax.Array


RESULTS = Results._fields


class Level(NamedTuple):
    """One `vmap` around a function of the families. All but x is mapped, over the first axis."""

    size: int
    axis_name: Any  # where the route communicates over the mapped axis, or None
    spmd_axis_name: Any
    mapped: tuple[bool, ...]  # for each array of x, output and lse


class Form(NamedTuple):
    """A function of the families. Its arguments are x, output, lse, the directions, and c."""

    route: Route
    settings: Settings
    structure: Any  # of the operands
    directions: tuple[tuple[str, ...], ...]  # which operands each moves
    cotangent: tuple[str, ...] | None  # of `RESULTS`; None for D
    wanted: tuple[str, ...]  # which gradients G returns; of D, `RESULTS`
    levels: tuple[Level, ...] = ()  # from the inside

    @property
    def known(self) -> int:
        """The number of arrays of x, output and lse."""
        return self.structure.num_leaves + len(RESULTS)

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """The names of the linear arguments."""
        return self.directions + (() if self.cotangent is None else (self.cotangent,))

    def split(self, arguments: Sequence[Any]) -> tuple[list[Any], list[list[Any]]]:
        """Returns the arrays of x, output and lse, and those of each group."""
        known, rest = list(arguments[: self.known]), iter(arguments[self.known :])
        return known, [[next(rest) for _ in names] for names in self.groups]


def finite(lse: jax.Array) -> jax.Array:
    """Returns an lse that may be kept between passes: none is -inf.

    The search for infinities (`jax.debug_infs`) takes that of a row without keys for a mistake.
    """
    return jnp.maximum(lse, jnp.finfo(lse.dtype).min)


def with_empty(lse: jax.Array) -> jax.Array:
    """Undoes `finite`."""
    return jnp.where(lse == jnp.finfo(lse.dtype).min, -jnp.inf, lse)


def push(
    route: Route,
    settings: Settings,
    operands: Operands,
    output: jax.Array,
    lse: jax.Array,
    moved: Named,
) -> list[jax.Array]:
    """Returns how output and lse move where operands do: D along one direction."""
    leaves, structure = jax.tree.flatten(operands)
    form = Form(route, settings, structure, (tuple(moved),), None, RESULTS)
    return _bind(form, [*leaves, output, lse], [list(moved.values())])


def _bind(form: Form, known: Sequence[Any], groups: Sequence[Sequence[Any]]) -> list[Any]:
    arguments = (*known, *(x for group in groups for x in group))
    if form.settings.is_ordered and form.directions == ():
        return list(_evaluate(form, *arguments))  # its effects have an order, which no jaxpr keeps
    # Traced here and not when it is lowered, in the mesh and the axes of its place.
    traced = jax.make_jaxpr(functools.partial(_evaluated, form))(*arguments)
    return form_p.bind(*arguments, form=form, traced=traced)


def _evaluate(form: Form, *arguments: jax.Array) -> tuple[jax.Array, ...]:
    fn = functools.partial(_evaluate_one, form._replace(levels=()))
    linear = sum(map(len, form.groups))
    for level in form.levels:
        axes = [0 if mapped else None for mapped in level.mapped] + [0] * linear
        fn = jax.vmap(
            fn,
            axes,
            axis_name=level.axis_name,
            axis_size=level.size,
            spmd_axis_name=level.spmd_axis_name,
        )
    return fn(*arguments)


_evaluated = jax.jit(_evaluate, static_argnums=0)  # layers of the same sizes are traced once


def _evaluate_one(form: Form, *arguments: jax.Array) -> tuple[jax.Array, ...]:
    known, groups = form.split(arguments)
    operands = jax.tree.unflatten(form.structure, known[: -len(RESULTS)])
    results = Results(known[-2], with_empty(known[-1]))
    route, settings = _plain(form.route, form.settings)
    directions = [dict(zip(names, x)) for names, x in zip(form.directions, groups)]

    if form.cotangent is None:
        first, *directions = directions

        def fn(operands: Operands) -> tuple[jax.Array, ...]:
            moving = _known(route, settings, operands, results)
            return _tangent(route, settings, operands, moving, first)

    else:
        cotangents = dict(zip(form.cotangent, groups[-1]))
        if not directions:
            route, settings = form.route, form.settings

        def fn(operands: Operands) -> tuple[jax.Array, ...]:
            moving = _known(route, settings, operands, results)
            found = _gradients(route, settings, operands, moving, cotangents, form.wanted)
            return tuple(found[name] for name in form.wanted)

    for direction in directions:
        fn = functools.partial(_along, fn, direction)
    return fn(operands)


def _along(fn: Callable[[Operands], Any], direction: Named, operands: Operands) -> Any:
    """Returns the derivative of `fn` along `direction`."""

    def of(moved: dict[str, jax.Array]) -> Any:
        return fn(operands._replace(**moved))

    here = {name: getattr(operands, name) for name in direction}
    return jax.jvp(of, (here,), (dict(direction),))[1]


def _plain(route: Route, settings: Settings) -> tuple[Route, Settings]:
    config = settings.config if isinstance(settings.config, ChunkedConfig) else None
    settings = settings._replace(config=config, interpret=False)
    if route.plain is not None:
        return route.plain, settings
    return (PLAIN if route.tangent is None else route), settings


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _known(route: Route, settings: Settings, operands: Operands, results: Results) -> Results:
    """Returns `results` as functions of the operands, of which they were computed before."""
    del route, settings, operands
    return results


@functools.partial(_known.defjvp, symbolic_zeros=True)
def _known_jvp(route: Route, settings: Settings, primals: Any, tangents: Any) -> Any:
    operands, results = primals
    results = _known(route, settings, operands, results)
    return results, _tangent(route, settings, operands, results, moves(tangents[0]))


def moves(tangents: Operands) -> dict[str, jax.Array]:
    """Returns the tangents that are there, of those that a rule with symbolic zeros is given."""
    named = {name: getattr(tangents, name) for name in MOVABLE}
    return {k: v for k, v in named.items() if not (v is None or isinstance(v, SymbolicZero))}


def _tangent(
    route: Route, settings: Settings, operands: Operands, results: Results, moved: Named
) -> Results:
    assert route.tangent is not None
    output, lse = results
    others = {k: v for k, v in moved.items() if k != "sinks"}
    weighted, mass = route.tangent(settings, operands._replace(sinks=None), lse, others)
    if "sinks" in moved:
        assert operands.sinks is not None
        mass += _share_of_sinks(operands.sinks, lse) * moved["sinks"][None, :, None]
    by_mass = jnp.einsum("btne,bnt->btne", output.astype(weighted.dtype), mass)
    return Results((weighted - by_mass).astype(output.dtype), mass)


def _gradients(
    route: Route,
    settings: Settings,
    operands: Operands,
    results: Results,
    cotangents: Named,
    wanted: Sequence[str],
) -> dict[str, jax.Array]:
    output, lse = results
    delta = jnp.zeros(lse.shape, lse.dtype)
    d_output, d_lse = cotangents.get("output"), cotangents.get("lse")
    if d_output is None:
        d_output = jnp.zeros(output.shape, output.dtype)
    else:
        delta += jnp.einsum("btne,btne->bnt", d_output.astype(lse.dtype), output.astype(lse.dtype))
    if d_lse is not None:
        delta -= jnp.where(lse == -jnp.inf, 0, d_lse)
    bias = "bias" in wanted or "diagonals" in wanted
    gradients = route.backward(settings, operands, lse, d_output, delta, bias)
    found: dict[str, Any] = gradients._asdict()
    if operands.sinks is not None and "sinks" in wanted:
        # A sink is a key with value 0, so its dp is 0.
        share = _share_of_sinks(operands.sinks, lse)
        sinks = -jnp.sum(share * delta, axis=(0, 2)).astype(operands.sinks.dtype)
        found["sinks"] = placed_like(sinks, operands.sinks)
    return found


def _share_of_sinks(sinks: jax.Array, lse: jax.Array) -> jax.Array:
    """Returns the probability (B, N, T) of each row's sink."""
    return jnp.exp(sinks[None, :, None] - jnp.where(lse == -jnp.inf, 0, lse))


form_p = Primitive("attention_derivative")
form_p.multiple_results = True


def _impl(*arguments: Any, form: Form, traced: Any) -> list[Any]:
    del form
    return jaxpr_as_fun(traced)(*arguments)


def _jvp(primals: Any, tangents: Any, *, form: Form, traced: Any) -> tuple[Any, Any]:
    known, groups = form.split(primals)
    d_known, d_groups = form.split(tangents)
    summands = []
    for index, (names, found) in enumerate(zip(form.groups, d_groups)):
        changed = {k: v for k, v in zip(names, found) if type(v) is not ad.Zero}
        if changed:
            kept = _with_group(form, index, tuple(changed))
            others = [*groups[:index], list(changed.values()), *groups[index + 1 :]]
            summands.append(_bind(kept, known, others))
    # Output and lse are functions of x, of which the form knows: their own tangents say no more.
    d_operands = jax.tree.unflatten(form.structure, d_known[: -len(RESULTS)])
    mapped = [level.mapped for level in form.levels]
    moved = {}
    for name, *flags in zip(MOVABLE, *(_by_name(form, m) for m in mapped)):
        x = getattr(d_operands, name)
        if x is not None and type(x) is not ad.Zero:
            moved[name] = _fully_mapped(form, x, flags)
    if moved:
        longer = form._replace(directions=(*form.directions, tuple(moved)))
        at = len(form.directions)
        others = [*groups[:at], list(moved.values()), *groups[at:]]
        summands.append(_bind(longer, known, others))
    out = form_p.bind(*primals, form=form, traced=traced)
    if not summands:
        return out, [ad.Zero(jax.typeof(x).to_tangent_aval()) for x in out]
    return out, [functools.reduce(ad.add_jaxvals, parts) for parts in zip(*summands)]


def _with_group(form: Form, index: int, names: tuple[str, ...]) -> Form:
    if index == len(form.directions):
        return form._replace(cotangent=names)
    directions = [*form.directions]
    directions[index] = names
    return form._replace(directions=tuple(directions))


def _by_name(form: Form, mapped: tuple[bool, ...]) -> list[bool | None]:
    flags = jax.tree.unflatten(form.structure, mapped[: -len(RESULTS)])
    return [getattr(flags, name) for name in MOVABLE]


def _fully_mapped(form: Form, x: jax.Array, flags: Sequence[bool | None]) -> jax.Array:
    """Gives `x` every axis that a `vmap` maps, as linear arguments have."""
    levels = list(zip(form.levels, flags))[::-1]  # the outermost has the first axis
    for axis, (level, mapped) in enumerate(levels):
        if not mapped:
            shape = (*x.shape[:axis], level.size, *x.shape[axis:])
            x = jnp.broadcast_to(jnp.expand_dims(x, axis), shape)
    return x


def _transpose(cotangents: Any, *arguments: Any, form: Form, traced: Any) -> list[Any]:
    del traced
    known, groups = form.split(arguments)
    index = next(i for i, group in enumerate(groups) if any(map(ad.is_undefined_primal, group)))
    given = {k: x for k, x in zip(form.wanted, cotangents) if type(x) is not ad.Zero}
    names, group = form.groups[index], groups[index]
    others = [*groups[:index], *groups[index + 1 :]]
    if not given:
        found = [ad.Zero(x.aval) for x in group]
    elif form.cotangent is None:
        left = form.directions[:index] + form.directions[index + 1 :]
        gradient = form._replace(directions=left, cotangent=tuple(given), wanted=names)
        found = _bind(gradient, known, [*others, list(given.values())])
    elif index == len(form.directions):
        directions = (*form.directions, tuple(given))
        forward = form._replace(directions=directions, cotangent=None, wanted=RESULTS)
        moved = Results(*_bind(forward, known, [*others, list(given.values())]))
        found = [getattr(moved, name) for name in names]
    else:
        directions = (*form.directions[:index], *form.directions[index + 1 :], tuple(given))
        swapped = form._replace(directions=directions, wanted=names)
        found = _bind(swapped, known, [*others[:-1], list(given.values()), others[-1]])
    parts: list[list[Any]] = [[None] * len(g) for g in groups]
    parts[index] = found
    return [None] * len(known) + [x for part in parts for x in part]


def _batch(axis: Any, arguments: Any, dims: Any, *, form: Form, traced: Any) -> Any:
    communicates = form.route.axis_name is not None and form.route.axis_name == axis.name
    if all(d is None for d in dims) and not communicates:
        out = form_p.bind(*arguments, form=form, traced=traced)
        return out, [None] * len(out)
    arguments = [x if d is None else jnp.moveaxis(x, d, 0) for x, d in zip(arguments, dims)]
    mapped = [d is not None for d in dims]
    if not communicates and axis.spmd_name is None:
        found = _as_heads(form, axis.size, arguments, mapped)
        if found is not None:
            return found, [0] * len(found)
    known, groups = form.split(arguments)
    _, group_dims = form.split(dims)
    groups = [
        [jnp.broadcast_to(x, (axis.size, *x.shape)) if d is None else x for x, d in zip(xs, ds)]
        for xs, ds in zip(groups, group_dims)
    ]
    level = Level(
        axis.size,
        axis.name if communicates else None,
        axis.spmd_name,
        tuple(mapped[: form.known]),
    )
    out = _bind(form._replace(levels=(*form.levels, level)), known, groups)
    return out, [0] * len(out)


def _as_heads(
    form: Form, size: int, arguments: Sequence[jax.Array], mapped: Sequence[bool]
) -> list[jax.Array] | None:
    """Maps by more query heads, so that the gradient of what entries share is one sum over all.

    Returns None where entries do not share the keys, or each has a gradient of them of its own.
    """
    operands = jax.tree.unflatten(form.structure, range(form.structure.num_leaves))
    names = [*names_of(operands), *RESULTS, *(name for group in form.groups for name in group)]
    levels = [level.mapped for level in form.levels]
    outer = [sum(own) for own in zip(*levels)] if levels else [0] * form.known
    outer += [len(levels)] * (len(names) - form.known)
    axes = ["v" * number + AXES[name] for number, name in zip(outer, names)]
    if not heads.share_keys(axes, mapped, arguments):
        return None
    count = arguments[0].shape[axes[0].index("n") + mapped[0]]
    for name in () if form.cotangent is None else form.wanted:
        i = names.index(name)
        if "n" not in axes[i] or arguments[i].shape[axes[i].index("n") + mapped[i]] != count:
            return None
    fold = heads.Fold(size, count, arguments[1].shape[axes[1].index("k")])
    own = {name for name, is_mapped in zip(names, mapped) if is_mapped} | {*form.wanted}
    folded = [
        fold.fold(letters, x, is_mapped, shared=name not in own)
        for name, letters, x, is_mapped in zip(names, axes, arguments, mapped)
    ]
    found = _bind(form, *form.split(folded))
    return [fold.unfold("v" * len(levels) + AXES[k], x) for k, x in zip(form.wanted, found)]


form_p.def_impl(_impl)
form_p.to_lojax = _impl  # where a kernel's program has types that newer versions take apart first
form_p.def_abstract_eval(lambda *_, form, traced: traced.out_avals)
ad.primitive_jvps[form_p] = _jvp
ad.primitive_transposes[form_p] = _transpose
batching.fancy_primitive_batchers[form_p] = _batch
mlir.register_lowering(form_p, mlir.lower_fun(_impl, multiple_results=True))
