"""Finds what a function computes entry by entry, in its jaxpr, so that it can be done in blocks.

Arrays that elementwise operations connect form a group, and a group can be evaluated on any part of
its arrays. What else goes into it, scalars and results of other operations, is computed before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jaxopt_lab import _compat

_CALLS = {"jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call"}
# Those that optimizers are made of. One that is missing costs a pass over memory, nothing else.
_ELEMENTWISE = {
    "abs", "add", "add_any", "and", "bitcast_convert_type", "cbrt", "ceil", "clamp",
    "convert_element_type", "copy", "cos", "div", "eq", "erf", "exp", "exp2", "expm1", "floor",
    "ge", "gt", "integer_pow", "is_finite", "le", "log", "log1p", "logistic", "lt", "max", "min",
    "mul", "ne", "neg", "nextafter", "not", "or", "pow", "reduce_precision", "rem", "round",
    "rsqrt", "select_n", "sign", "sin", "sqrt", "square", "sub", "tanh", "xor",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Equation:
    """One operation; operands and results are numbers of values."""

    eqn: Any
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    shape: tuple[int, ...] | None  # of the result of an elementwise operation, else None


@dataclasses.dataclass(frozen=True)
class Program:
    """A function as a list of operations with all its calls taken apart, and every value in it.

    Attributes:
      equations: the operations in order.
      values: all values, by number.
      inputs: the numbers of the arguments' leaves.
      outputs: the numbers of the results' leaves.
      literals: the numbers of constants of shape ().
    """

    equations: list[Equation]
    values: list[Any]
    inputs: list[int]
    outputs: list[int]
    literals: set[int]

    def groups(self) -> list[Group]:
        """Returns the groups of arrays that elementwise operations connect."""
        parent = list(range(len(self.values)))

        def root(i: int) -> int:
            while parent[i] != i:
                parent[i] = parent[parent[i]]
                i = parent[i]
            return i

        elementwise = [equation for equation in self.equations if equation.shape is not None]
        for equation in elementwise:
            (result,) = equation.outputs
            for i in equation.inputs:
                if jnp.ndim(self.values[i]):
                    parent[root(i)] = root(result)
        equations: dict[int, list[Equation]] = {}
        for equation in elementwise:
            equations.setdefault(root(equation.outputs[0]), []).append(equation)
        members: dict[int, set[int]] = {key: set() for key in equations}
        for i in range(len(self.values)):
            if root(i) in members:
                members[root(i)].add(i)
        return [Group(self, equations[key], members[key]) for key in equations]


@dataclasses.dataclass(frozen=True)
class Group:
    """Arrays of one shape and the operations between them.

    Attributes:
      program: of which it is a part.
      equations: its operations in order.
      members: numbers of its arrays.
    """

    program: Program
    equations: list[Equation]
    members: set[int]

    def needed(self, outputs: Sequence[int]) -> tuple[list[Equation], list[int], list[int]]:
        """Returns what `outputs` are computed by, and the arrays and scalars they are made of.

        Literals are not among them.
        """
        made = {equation.outputs[0] for equation in self.equations}
        wanted, equations = set(outputs), []
        for equation in reversed(self.equations):
            if equation.outputs[0] in wanted:
                equations.append(equation)
                wanted.update(equation.inputs)
        sources = sorted(wanted - made)
        sources = [i for i in sources if i not in self.program.literals]
        scalars = [i for i in sources if jnp.ndim(self.program.values[i]) == 0]
        return equations[::-1], [i for i in sources if i not in scalars], scalars


def trace(fun: Callable[..., Any], *args: Any) -> tuple[Program, Any]:
    """Evaluates `fun(*args)` operation by operation.

    Returns:
      The program with all its values, and what `fun` returned.
    """
    closed, out = jax.make_jaxpr(fun, return_shape=True)(*args)
    program = Program([], [], [], [], set())

    def number(value: Any) -> int:
        program.values.append(value)
        return len(program.values) - 1

    program.inputs.extend(number(x) for x in jax.tree.leaves(args))
    consts = [number(x) for x in closed.consts]
    program.outputs.extend(_run(program, number, closed.jaxpr, consts, program.inputs))
    results = [program.values[i] for i in program.outputs]
    return program, jax.tree.unflatten(jax.tree.structure(out), results)


def evaluate(
    program: Program, equations: Sequence[Equation], known: dict[int, Any], shape: Any
) -> dict[int, Any]:
    """Evaluates elementwise operations on arrays of another shape than they were traced with.

    Args:
      program: of which they are a part.
      equations: as `Group.needed` returns them.
      known: by number, the arrays of shape `shape` and the scalars.
      shape: of the result of each operation.

    Returns:
      All values by number.
    """
    values = {i: program.values[i] for i in program.literals} | known
    for equation in equations:
        operands = _compat.vary_alike([values[i] for i in equation.inputs])
        if equation.eqn.primitive.name == "broadcast_in_dim":
            found = jnp.broadcast_to(operands[0], shape)
        else:
            (found,) = _compat.bind(equation.eqn, operands)
        values[equation.outputs[0]] = found
    return values


def _run(
    program: Program,
    number: Callable[[Any], int],
    jaxpr: Any,
    consts: Sequence[int],
    args: Sequence[int],
) -> list[int]:
    environment: dict[Any, int] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args]))

    def read(var: Any) -> int:
        if not isinstance(var, core.Literal):
            return environment[var]
        aval: Any = var.aval
        literal = number(np.asarray(var.val, aval.dtype))
        program.literals.add(literal)
        return literal

    for eqn in jaxpr.eqns:
        inputs = [read(var) for var in eqn.invars]
        closed = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
        if eqn.primitive.name in _CALLS and hasattr(closed, "consts"):
            inner = [number(x) for x in closed.consts]
            outputs = _run(program, number, closed.jaxpr, inner, inputs)
        else:
            found = _compat.bind(eqn, [program.values[i] for i in inputs])
            outputs = [number(x) for x in found]
            shape = _elementwise_shape(eqn)
            program.equations.append(Equation(eqn, tuple(inputs), tuple(outputs), shape))
        environment.update(zip(eqn.outvars, outputs))
    return [read(var) for var in jaxpr.outvars]


def _elementwise_shape(eqn: Any) -> tuple[int, ...] | None:
    if len(eqn.outvars) != 1:
        return None
    shape = eqn.outvars[0].aval.shape
    shapes = {var.aval.shape for var in eqn.invars} - {()}
    name = eqn.primitive.name
    if name == "broadcast_in_dim":
        return shape if shape and not shapes else None
    return shape if shape and name in _ELEMENTWISE and shapes == {shape} else None
