"""Arguments of the constructor: numbers that are zero, and trees that can be called."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxopt_lab.testing._causes import cause_of
from jaxopt_lab.testing._registry import BreachError, NotApplicableError, check
from jaxopt_lab.testing._subject import Subject, training_step
from jaxopt_lab.testing._values import expect, expect_equal, kernel_and_bias, normal_like

# For an argument that is 0 as given: of the size that decays, rates and momenta have.
_NONZERO = 0.1


def _state_types(constructor: Any, arguments: dict[str, Any]) -> Any:
    return jax.eval_shape(lambda: constructor(**arguments).init(kernel_and_bias()))


def _traced_state_types(constructor: Any, arguments: dict[str, Any], name: str) -> Any:
    def init(value: Any) -> Any:
        return constructor(**{**arguments, name: value}).init(kernel_and_bias())

    return jax.eval_shape(init, jnp.float32(_NONZERO))


@check("composition", level="library", traced=False)
def state_tree_at_zero(subject: Subject) -> None:
    """The state's tree is the same whether a hyper-parameter is 0, another number, or traced.

    Numbers that the constructor does not take traced, such as a share of the weights, are sizes and
    no hyper-parameters.
    """
    constructor, arguments = subject.constructor_and_arguments()
    tried, differing = [], []
    for name, value in arguments.items():
        if not isinstance(value, float):
            continue
        try:
            traced = _traced_state_types(constructor, arguments, name)
            zero = _state_types(constructor, {**arguments, name: 0.0})
        except Exception:
            continue
        tried.append(name)
        other = _state_types(constructor, {**arguments, name: value or _NONZERO})
        trees = [jax.tree.structure(state) for state in (zero, other, traced)]
        if trees[0] != trees[1]:
            differing.append(f"{name}=0.0 and {name}={value or _NONZERO}")
        elif trees[1] != trees[2]:
            differing.append(f"{name} as a number and as an array")
    if not tried:
        raise NotApplicableError("has no number that may be 0 and traced")
    expect(not differing, f"the trees of the state differ between {'; '.join(differing)}")


@functools.partial(jax.tree_util.register_dataclass, data_fields=["kernel", "bias"], meta_fields=[])
@dataclasses.dataclass
class _Module:
    """A tree that can be called, as the modules of Equinox are."""

    kernel: Any
    bias: Any

    def __call__(self, x: Any) -> Any:
        return x @ self.kernel + self.bias


def _tree_valued(name: str) -> _Module | None:
    """A tree for an argument that takes one, or a function that makes one."""
    if name.endswith("dimension_numbers"):
        return _Module(optax.contrib.MuonDimensionNumbers(0, 1), None)
    if "mask" in name:
        return _Module(True, False)
    if name == "always_full":
        return _Module(False, True)  # some projections can split nothing but a matrix
    return None


@check("trees", traced=False)
def callable_trees(subject: Subject) -> None:
    """A callable module as a mask, or as another tree argument, is a tree and no function."""
    constructor, arguments = subject.constructor_and_arguments()
    names = [name for name in arguments if _tree_valued(name) is not None]
    if not names:
        raise NotApplicableError("has no argument that is a tree of the weights, such as mask")
    if "weight_decay" in arguments:
        arguments["weight_decay"] = 0.1
    params = _Module(**kernel_and_bias())
    gradient = normal_like(params)
    for name in names:
        tree = _tree_valued(name)
        # A function that returns the tree cannot be mistaken for anything else.
        expected = constructor(**{**arguments, name: lambda params: tree})  # noqa: B023
        expected, _, _ = training_step(expected)(params, expected.init(params), gradient)
        try:
            found = constructor(**{**arguments, name: tree})
            found, _, _ = training_step(found)(params, found.init(params), gradient)
        except Exception as error:
            text = f"a callable module as {name} is refused: {cause_of(error).text}"
            raise BreachError(text) from error
        expect_equal(found, expected, f"params with a module as {name}: ")
