"""Every kind of tree and every shape of leaf."""

from __future__ import annotations

import collections
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_lab.testing._causes import cause_of
from jaxopt_lab.testing._registry import BreachError, check
from jaxopt_lab.testing._subject import Subject
from jaxopt_lab.testing._values import (
    expect,
    expect_close,
    expect_finite,
    expect_same_types,
    kernel_and_bias,
    normal,
    normal_like,
)


class _Pair(NamedTuple):
    kernel: Any
    bias: Any


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["kernel", "bias"], meta_fields=["label"]
)
@dataclasses.dataclass
class _Layer:
    kernel: Any
    bias: Any
    label: str = "layer"


def _steps_on(subject: Subject, params: Any) -> None:
    run = subject.run_with_stable_types(params)
    expect_finite(run.updates, "updates")


_TREES = {
    "dict_tree": "A dict of weights",
    "list_tree": "A list of weights",
    "tuple_tree": "A tuple of weights",
    "namedtuple_tree": "A NamedTuple of weights",
    "dataclass_tree": "A registered dataclass of weights",
    "ordered_dict_tree": "An OrderedDict of weights",
    "nested_tree": "A nested tree of several kinds, with an empty node",
    "bare_array": "One array as the whole tree",
    "empty_tree": "A tree without leaves",
    "none_leaf": "None in place of a leaf, kept",
}

_LEAVES = {
    "scalar_leaf": (),
    "length_one_leaf": (1,),
    "empty_leaf": (0,),
    "empty_matrix_leaf": (3, 0),
    "three_axes_leaf": (2, 3, 4),
    "four_axes_leaf": (2, 1, 3, 4),
}

# One axis after the other, and all, of a vector, a matrix, a stack and a convolution.
_SIZES = ((3,), (3, 4), (2, 3, 4), (3, 3, 4, 5))
_WITHOUT_ELEMENTS = tuple(
    tuple(0 if index == empty or empty == len(sizes) else size for index, size in enumerate(sizes))
    for sizes in _SIZES
    for empty in range(len(sizes) + 1)
)


def _tree(name: str) -> Any:
    kernel, bias = kernel_and_bias().values()
    return {
        "dict_tree": {"kernel": kernel, "bias": bias},
        "list_tree": [kernel, bias],
        "tuple_tree": (kernel, bias),
        "namedtuple_tree": _Pair(kernel, bias),
        "dataclass_tree": _Layer(kernel, bias),
        "ordered_dict_tree": collections.OrderedDict(kernel=kernel, bias=bias),
        "nested_tree": {"layers": [_Pair(kernel, bias), (_Layer(kernel, {"x": bias}), [])]},
        "bare_array": kernel,
        "empty_tree": {},
        "none_leaf": {"kernel": kernel, "absent": None},
    }[name]


# The arrays are made when a check runs: importing this module must not start a backend.
def _add_tree(name: str, promise: str) -> None:
    @check("trees", name=name, promise=promise)
    def _(subject: Subject) -> None:
        _steps_on(subject, _tree(name))


def _add_leaf(name: str, shape: tuple[int, ...]) -> None:
    @check("trees", name=name, promise=f"A leaf of shape {shape}")
    def _(subject: Subject) -> None:
        _steps_on(subject, {"kernel": normal((4, 3)), "leaf": normal(shape)})


for _name, _promise in _TREES.items():
    _add_tree(_name, _promise)
for _name, _shape in _LEAVES.items():
    _add_leaf(_name, _shape)


@check("trees")
def empty_leaves(subject: Subject) -> None:
    """Leaves without elements, whichever of their axes is empty, alone and beside others."""
    kernel = normal((4, 3))
    tree = {}
    for shape in _WITHOUT_ELEMENTS:
        params = {"layer": {"kernel": jnp.zeros(shape)}}
        state = jax.eval_shape(subject.transform.init, params)
        try:
            updates, _ = jax.eval_shape(subject.transform.update, params, state, params)
        except Exception as error:
            raise BreachError(f"a leaf of shape {shape}: {cause_of(error).text}") from error
        expect_same_types(updates, params, f"updates of a leaf of shape {shape}: ")
        tree["x".join(map(str, shape))] = params["layer"]
    _steps_on(subject, {"layers": tree, "other": kernel})


@check("trees")
def nesting_invariance(subject: Subject) -> None:
    """The same leaves in another nesting and order get the same updates."""
    flat = kernel_and_bias()
    gradient = normal_like(flat)

    def nest(tree: dict[str, jax.Array]) -> Any:
        return {"z": {"b": tree["bias"]}, "a": [tree["kernel"]]}

    found = subject.run(nest(flat), nest(gradient), nest(gradient))
    expected = subject.run(flat, gradient, gradient)
    expect_close(found.updates, nest(expected.updates), "updates")


@check("trees", traced=False)
def numpy_leaves(subject: Subject) -> None:
    """NumPy weights and gradients are accepted and become arrays."""
    params = jax.tree.map(np.asarray, kernel_and_bias())
    gradient = jax.tree.map(np.asarray, normal_like(params))
    _accepts_host_values(subject, params, gradient)


@check("trees", level="library", traced=False)
def python_float_leaves(subject: Subject) -> None:
    """Python floats as weights and gradients are accepted and become arrays."""
    _accepts_host_values(subject, {"kernel": 1.5, "bias": -0.5}, {"kernel": 0.3, "bias": 0.1})


def _accepts_host_values(subject: Subject, params: Any, gradient: Any) -> None:
    state = subject.transform.init(params)
    updates, next_state = subject.transform.update(gradient, state, params)
    for leaf in jax.tree.leaves(updates):
        expect(isinstance(leaf, jax.Array), f"an update is {type(leaf).__name__}, not an array")
    expect_same_types(updates, jax.tree.map(jnp.asarray, params), "updates")
    expect_same_types(next_state, state, "state")
    expect_finite(updates, "updates")


_FOREST = 24
_SHAPES = ((), (1,), (0,), (3,), (4, 3), (1, 5), (2, 3, 2))
_DTYPES = ("float32", "bfloat16", "float16")


def _random_tree(rng: np.random.Generator, depth: int = 0) -> Any:
    kind = rng.integers(0, 7 if depth < 3 else 4)
    if kind == 0:
        return None
    if kind <= 3:
        shape, dtype = _SHAPES[rng.integers(len(_SHAPES))], _DTYPES[rng.integers(len(_DTYPES))]
        return normal(shape, dtype, int(rng.integers(1 << 30)))
    children = [_random_tree(rng, depth + 1) for _ in range(rng.integers(0, 4))]
    if kind == 4:
        return children
    if kind == 5:
        return tuple(children)
    return {f"child_{index}": child for index, child in enumerate(children)}


@check("trees")
def random_trees(subject: Subject) -> None:
    """24 random trees of mixed shapes, dtypes, nesting and None: types, then values in one tree."""
    rng = np.random.default_rng(0)
    # In a dict: a tree that is itself None cannot be told from "no params".
    forest = [{"tree": _random_tree(rng), "leaf": normal((3,))} for _ in range(_FOREST)]
    for params in forest:
        state = jax.eval_shape(subject.transform.init, params)
        updates, next_state = jax.eval_shape(subject.transform.update, params, state, params)
        expect_same_types(updates, params, "updates")
        expect_same_types(next_state, state, "state")
    _steps_on(subject, forest)
