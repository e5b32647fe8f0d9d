"""Leaf-by-leaf arithmetic shared by every transformation.

A rule is written for one leaf. `map_leaves` refuses what does not fit, lifts the leaf to the dtype
that the rule computes in (at least float32), and rounds each result once: the state to the dtype
that it has, the update to the wider of the gradient's and the parameter's.

Leaves of one signature are traced once: under `jit` a rule is a function that the program calls for
each of them, so that a tree of a thousand leaves costs little more to trace than its few kinds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeGuard, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

PyTree = Any
StateT = TypeVar("StateT")
# Fields of optax's and this library's states that hold moments. Paths run through the state before
# they run through the parameters, so that the first of these names is the state's.
_NON_NEGATIVE = frozenset({"nu", "nu_max", "sum_of_squares"})
MOMENTS = _NON_NEGATIVE | {"mu", "previous", "trace"}

Mask = PyTree | Callable[[PyTree], PyTree] | None


def leaves_with_names(tree: PyTree) -> list[tuple[str, Any]]:
    """Returns `(name, leaf)` for each leaf; a name is a path such as `layers/0/kernel`."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in flat]


def named(kind: str, name: str) -> str:
    """Returns how a message calls a leaf; a bare array has no path."""
    return f"{kind} '{name}'" if name else f"the {kind}"


def check_params(params: PyTree) -> None:
    """Refuses parameters that are not real floating point.

    Raises:
      TypeError: a leaf is a function, text or a random key, an integer, a boolean or complex; the
        message has its path.
    """
    for name, leaf in leaves_with_names(params):
        _check_array(name, leaf)
        found = _dtype(leaf)
        if jnp.issubdtype(found, jnp.complexfloating):
            raise TypeError(
                f"{named('parameter', name)} is complex ({found}); wrap the transformation in "
                "optax.contrib.split_real_and_imaginary"
            )
        if not jnp.issubdtype(found, jnp.floating):
            raise TypeError(
                f"{named('parameter', name)} has dtype {found}: integer parameters cannot be "
                "optimized; mask them (optax.masked, optax.partition)"
            )


def check_arrays(what: str, tree: PyTree) -> None:
    """Refuses a tree with leaves that are no arrays, keys or numbers.

    Raises:
      TypeError: the message begins with `what` and has the path.
    """
    for name, leaf in leaves_with_names(tree):
        found = _no_array(leaf)
        if found:
            where = f"{what} leaf '{name}'" if name else what
            raise TypeError(f"{where} is {found}; expected an array")


def is_function(value: Any) -> TypeGuard[Callable[[PyTree], PyTree]]:
    """Whether `value` is a function of the parameters rather than a tree that can be called.

    As in optax: a tree of modules is one if not all of its leaves are functions.
    """
    leaves = jax.tree.leaves(value)
    return callable(value) and bool(leaves) and all(map(callable, leaves))


def compute_dtype(*dtypes: Any) -> np.dtype:
    """Returns the dtype that rules compute in: the widest of float32 and the leaf's own."""
    # Not jnp.promote_types, which strict dtype promotion forbids for bfloat16 and float32.
    return jnp.dtype(jnp.float64 if jnp.float64 in dtypes else jnp.float32)


def zeros_like(params: PyTree, dtype: Any = None, *, at_least_float32: bool = False) -> PyTree:
    """Returns zeros shaped, sharded and, unless `dtype` says otherwise, typed like `params`.

    Raises:
      TypeError: see `check_params`.
    """
    check_params(params)

    def zeros(leaf: Any) -> jax.Array:
        target = dtype or _dtype(leaf)
        if at_least_float32:
            target = compute_dtype(target)
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jnp.zeros(leaf.shape, target)
        empty = jnp.zeros_like(leaf, target)
        # Zeros alone depend on no input, and the partitioner replicates what depends on nothing.
        # The select ties them to the parameter's sharding and is folded away after placement.
        return jnp.where(jnp.zeros((), bool), jnp.asarray(leaf).astype(target), empty)

    return jax.tree.map(zeros, params)


def l2_norm(tree: PyTree, dtype: Any) -> jax.Array:
    """The Euclidean norm of all leaves together, computed in `dtype`.

    Relative to the largest magnitude, so that squares neither overflow nor vanish.
    """
    magnitudes = [jnp.abs(leaf).astype(dtype) for leaf in jax.tree.leaves(tree)]
    largest = jnp.zeros((), dtype)
    for x in magnitudes:
        largest = jnp.maximum(largest, jnp.max(x, initial=0))
    unit = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    squares = (jnp.sum(jnp.square(x / unit)) for x in magnitudes)
    return unit * jnp.sqrt(sum(squares, start=jnp.zeros((), dtype)))


def check_state(state: Any, expected: type[StateT]) -> StateT:
    """Returns `state`, which must have been made by the right transformation.

    Raises:
      TypeError: `state` is no instance of `expected`.
    """
    if not isinstance(state, expected):
        wanted, found = expected.__name__, type(state).__name__
        if wanted == found:  # optax has states of the same name
            wanted, found = (f"{x.__module__}.{x.__name__}" for x in (expected, type(state)))
        raise TypeError(
            f"expected a state of type {wanted}, got {found}: was it made by another "
            "transformation's init?"
        )
    return state


def require_params(params: PyTree | None, method: str) -> PyTree:
    """Returns `params`, which an update cannot do without.

    Raises:
      ValueError: `params` is None.
    """
    if params is None:
        raise ValueError(f"{method} needs params; call update(updates, state, params)")
    return params


def check_updates(updates: PyTree, tree: PyTree, whose: str = "the tree given to init") -> None:
    """Refuses updates whose paths or shapes are not those of `tree`.

    Raises:
      ValueError: the message has the first differing path, or both shapes.
    """
    gradients, leaves = jax.tree.leaves(updates), jax.tree.leaves(tree)
    # Paths are spelled out for the message only: they cost more than all else here.
    if jax.tree.structure(updates) != jax.tree.structure(tree):
        names, wanted = [[name for name, _ in leaves_with_names(x)] for x in (updates, tree)]
        if names != wanted:
            missing = [f"'{name}' is missing" for name in wanted if name not in names]
            extra = [f"'{name}' is not expected" for name in names if name not in wanted]
            detail = [*missing, *extra, "the leaves come in another order"][0]
            raise ValueError(f"updates do not match {whose}: {detail}")
    for index, (gradient, leaf) in enumerate(zip(gradients, leaves)):
        if jnp.shape(gradient) != jnp.shape(leaf):
            raise ValueError(
                f"{named('updates leaf', leaves_with_names(updates)[index][0])} has shape "
                f"{jnp.shape(gradient)}, but in {whose} it has shape {jnp.shape(leaf)}"
            )


def check_gradient(name: str, gradient: Any) -> None:
    """Refuses a gradient that is not real floating point.

    Raises:
      TypeError: the message has the leaf's path.
    """
    if not _is_real(gradient):
        dtype = getattr(gradient, "dtype", None)
        dtype = _dtype(gradient) if dtype is None else dtype
        raise TypeError(
            f"{named('updates leaf', name)} has dtype {dtype}; expected real floating point"
        )


def update_dtypes(updates: PyTree, like: PyTree | None) -> list[np.dtype]:
    """Returns the dtype of each leaf's update: the wider of the gradient's and that of `like`.

    Args:
      updates: the gradients.
      like: the parameters, or what else knows their dtypes; None leaves the gradients'.

    Raises:
      ValueError: `like` does not match the gradients.
    """
    gradients = [_dtype(g) for g in jax.tree.leaves(updates)]
    if like is None:
        return gradients
    check_updates(updates, like, "params")
    known = [_dtype(leaf) for leaf in jax.tree.leaves(like)]
    # A parameter that is no real floating point is refused elsewhere, by name.
    return [
        compute_dtype(g, d) if g != d and jnp.issubdtype(d, jnp.floating) else g
        for g, d in zip(gradients, known)
    ]


def map_leaves(
    rule: Callable[..., tuple[jax.Array, ...]],
    updates: PyTree,
    *states: PyTree,
    params: PyTree | None = None,
    static: Sequence[Any] | None = None,
    extra: Sequence[PyTree] | None = None,
    shared: Callable[[np.dtype], Any] | None = None,
    like: PyTree | None = None,
) -> tuple[PyTree, ...]:
    """Maps `rule` over the leaves and returns the new updates followed by the new states.

    Args:
      rule: `rule(gradient, *state_leaves, [parameter], [static], [extra], [shared])`, which
        returns `(update, *new_state_leaves)` and may return more, which is not rounded; the array
        arguments all have one dtype, the widest of the leaf's own and float32. Under `jit` it is
        traced once for all leaves with equal shapes, dtypes and static value: it must be a function
        of its arguments and of what does not change from leaf to leaf, and hand out nothing but
        results.
      updates: the gradients.
      *states: trees with the parameters' structure and shapes, such as moments.
      params: the parameters, if the rule needs them.
      static: one value a leaf, in the order of `jax.tree.leaves`, if the rule needs any. Values
        that can be hashed and are equal mean the same rule.
      extra: one tree of arrays a leaf, of any shapes, handed to the rule as it is.
      shared: what all leaves share, such as bias corrections, as a function of the dtype that is
        computed in: called once a dtype and not once a leaf.
      like: the parameters, if they are at hand and the rule does not need them.

    Returns:
      The updates, each with the wider of its gradient's dtype and its parameter's (as `params` or
      `like` have it, else the first of `states`), then the states, each with its own dtype, then,
      if there are leaves, trees of what else the rule returns.

    Raises:
      ValueError: a tree or a leaf does not match; the message has the path and both shapes.
      TypeError: a gradient is not real floating point.
    """
    others = [*states] if params is None else [*states, params]
    for tree in others:
        check_updates(updates, tree, "params" if tree is params else "the tree given to init")
    gradients = jax.tree.leaves(updates)
    if any(not _is_real(g) for g in gradients):
        for name, gradient in leaves_with_names(updates):
            check_gradient(name, gradient)
    known = [tree for tree in (params, like, *states[:1]) if tree is not None]
    wanted = update_dtypes(updates, known[0] if known else None)
    columns = [jax.tree.leaves(tree) for tree in others]
    # Called by the program only while one is traced: outside, each call would compile one.
    traces = any(_is_traced(x) for column in [gradients, *columns] for x in column)
    functions: dict[Any, Callable[..., tuple[jax.Array, ...]]] = {}
    common: dict[np.dtype, Any] = {}
    results = []
    for index, gradient in enumerate(gradients):
        arrays = [jnp.asarray(gradient)] + [jnp.asarray(column[index]) for column in columns]
        compute = compute_dtype(*(array.dtype for array in arrays))
        if shared is not None and compute not in common:
            common[compute] = shared(compute)
        constants = () if static is None else (static[index],)
        key = (wanted[index], *constants)
        call = functools.partial(_leaf, rule, compute, wanted[index], len(states), constants)
        if traces and _can_be_hashed(key):
            call = functions.setdefault(key, jax.jit(call))
        more = () if extra is None else (extra[index],)
        results.append(call(arrays, more + (() if shared is None else (common[compute],))))
    outputs = list(zip(*results)) or [()] * (1 + len(states))
    trees = [updates, *states, *[updates] * (len(outputs) - 1 - len(states))]
    return tuple(
        jax.tree.unflatten(jax.tree.structure(tree), leaves) for tree, leaves in zip(trees, outputs)
    )


def _leaf(
    rule: Callable[..., tuple[jax.Array, ...]],
    compute: np.dtype,
    wanted: np.dtype,
    states: int,
    static: tuple[Any, ...],
    arrays: list[jax.Array],
    more: tuple[Any, ...],
) -> tuple[jax.Array, ...]:
    """One leaf: lifts its arrays, applies the rule and rounds what comes out."""
    new = rule(*(array.astype(compute) for array in arrays), *static, *more)
    dtypes = [wanted, *(array.dtype for array in arrays[1 : 1 + states])]
    return (*(x.astype(dtype) for x, dtype in zip(new, dtypes)), *new[len(dtypes) :])


def _can_be_hashed(key: Any) -> bool:
    try:
        hash(key)
    except TypeError:
        return False
    return True


def is_non_negative(path: Any) -> bool:
    """Whether a leaf of a state is a second moment, by the field that its path runs through."""
    fields = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)]
    return next((name for name in fields if name in MOMENTS), None) in _NON_NEGATIVE


def broadcast_prefix(prefix: PyTree, tree: PyTree, what: str, is_leaf: Any = None) -> list[Any]:
    """Returns, for each leaf of `tree`, the leaf of `prefix` that stands above it.

    Raises:
      ValueError: `prefix` is no prefix of `tree`; the message has the first differing path.
    """
    found: list[Any] = []
    try:
        jax.tree.map(
            lambda value, subtree: found.extend([value] * len(jax.tree.leaves(subtree))),
            prefix,
            tree,
            is_leaf=is_leaf,
        )
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{what} does not match the parameters: {_first_difference(prefix, tree, is_leaf)}"
        ) from error
    return found


def mask_leaves(mask: Mask, params: PyTree) -> list[bool]:
    """Returns one boolean a leaf of `params`; no mask means every leaf.

    Raises:
      ValueError: the mask's tree does not match; the message has the first differing path.
      TypeError: a leaf of the mask is not a boolean.
    """
    if mask is None:
        return [True] * len(jax.tree.leaves(params))
    return flags(mask, params, "mask")


def flags(tree: Mask, params: PyTree, what: str) -> list[bool]:
    """Returns for each leaf of `params` the boolean that stands above it in `tree`.

    Raises:
      ValueError: see `broadcast_prefix`.
      TypeError: no boolean, for every text is true, `"no decay"` too.
    """
    found = broadcast_prefix(tree(params) if is_function(tree) else tree, params, what)
    for value in found:
        is_array = isinstance(value, (np.ndarray, jax.Array)) and not _is_traced(value)
        if not isinstance(value, (bool, np.bool_)) and not (
            is_array and value.dtype == np.bool_ and value.shape == ()
        ):
            raise TypeError(
                f"{what} must have leaves that are True or False, got {value!r} "
                f"({type(value).__name__})"
            )
    return [bool(value) for value in found]


def _check_array(name: str, leaf: Any) -> None:
    dtype = getattr(leaf, "dtype", None)
    is_key = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    what = f"a random key ({dtype})" if is_key else _no_array(leaf)
    if what:
        raise TypeError(
            f"{named('parameter', name)} is {what}: only arrays can be optimized: take it out "
            "(equinox.filter, flax.nnx.state) or mask it (optax.masked, optax.partition)"
        )


def _no_array(leaf: Any) -> str:
    """Returns what a leaf is that is no array, "" for one that is."""
    dtype = getattr(leaf, "dtype", None)
    if dtype is None and callable(leaf):
        return f"the function {getattr(leaf, '__name__', type(leaf).__name__)}"
    if isinstance(leaf, (str, bytes)):
        return f"the text {leaf!r}"
    if dtype is None and not isinstance(leaf, (bool, int, float, complex)):
        return f"of type {type(leaf).__name__}"
    return ""


def _dtype(leaf: Any) -> np.dtype:
    return jnp.result_type(leaf)


def _is_traced(x: Any) -> bool:
    return isinstance(x, Tracer)


def _is_real(gradient: Any) -> bool:
    dtype = getattr(gradient, "dtype", None)
    return jnp.issubdtype(_dtype(gradient) if dtype is None else dtype, jnp.floating)


def _first_difference(prefix: PyTree, tree: PyTree, is_leaf: Any) -> str:
    def paths(of: PyTree, stop: Any) -> list[tuple[Any, ...]]:
        flat, _ = jax.tree_util.tree_flatten_with_path(of, is_leaf=stop)
        return [path for path, _ in flat]

    def show(path: tuple[Any, ...]) -> str:
        return jax.tree_util.keystr(path, simple=True, separator="/")

    # What a wrapper such as optax.partition has masked out is there for whoever wrote the prefix.
    given, wanted = paths(prefix, is_leaf), paths(tree, lambda x: isinstance(x, optax.MaskedNode))
    for path in given:
        if not any(other[: len(path)] == path for other in wanted):
            return f"'{show(path)}' is no parameter{_box_hint(show(path), map(show, wanted))}"
    for path in wanted:
        if not any(path[: len(other)] == other for other in given):
            return f"parameter '{show(path)}' is not covered"
    return f"found {jax.tree.structure(prefix)}, expected {jax.tree.structure(tree)}"


def _box_hint(given: str, wanted: Iterable[str]) -> str:
    """Returns what to do about a tree of boxes, where the parameters come without them."""
    if given.removesuffix("/value") == given or given.removesuffix("/value") not in wanted:
        return ""
    return (
        f", but '{given.removesuffix('/value')}' is: flax.nnx.Optimizer hands other trees to the "
        "update than a module's state; give a function of the parameters instead of a tree"
    )
