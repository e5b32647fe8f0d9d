"""Finds the products of a function with given kernels, in its jaxpr.

The function is traced once and evaluated again, operation by operation. A kernel travels as a
`Tracked` value through what only moves it (casts, transposes, calls, rematerialisation, scans over
stacked layers) until it meets a product, which a handler may replace; any other operation is given
the kernel itself. So what cannot be followed is right, and costs what it costs without the handler.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.extend import core

from jaxopt_lab import _compat
from jaxopt_lab._compat import bind
from jaxopt_lab.adapters import _kernels
from jaxopt_lab.adapters._kernels import Kernel


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tracked:
    """A kernel on its way to a product.

    Attributes:
      value: the array as it is now.
      factors: arrays that go with it, batch axes first, in the order of `batch`.
      kernel: which kernel it is.
      dims: for each axis of `value`, the kernel's axis that it was.
      batch: the kernel's batch axes that no scan has taken away.
    """

    value: jax.Array
    factors: dict[str, jax.Array]
    kernel: Kernel = dataclasses.field(metadata={"static": True})
    dims: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    batch: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    def positions(self, axes: Sequence[int]) -> tuple[int, ...]:
        """Returns where axes of the kernel are in `value`."""
        return tuple(self.dims.index(axis) for axis in axes)


@dataclasses.dataclass(frozen=True)
class Dot:
    """A `dot_general` that sums over all of a kernel's inputs, and has all its batch axes in step.

    `x_inputs` and `x_batch` are the axes of `x` in the order of the kernel's axes.
    """

    x: jax.Array
    kernel: Tracked
    x_inputs: tuple[int, ...]
    x_batch: tuple[int, ...]
    kernel_is_left: bool
    eqn: Any

    def whole(self) -> jax.Array:
        """Returns the product with the kernel as it is."""
        operands = (
            (self.kernel.value, self.x) if self.kernel_is_left else (self.x, self.kernel.value)
        )
        return bind(self.eqn, operands)[0]


@dataclasses.dataclass(frozen=True)
class Convolution:
    """A convolution over all inputs of a kernel, without groups."""

    x: jax.Array
    kernel: Tracked
    eqn: Any

    def whole(self) -> jax.Array:
        """Returns the convolution with the kernel as it is."""
        return bind(self.eqn, (self.x, self.kernel.value))[0]


class Handler(Protocol):
    """What to do with a kernel."""

    def materialise(self, kernel: Tracked) -> jax.Array:
        """Returns the array that any other operation is given."""
        ...

    def repeated(self, kernel: Tracked, step: jax.Array) -> Tracked:
        """Returns a kernel that a scan does not walk over, as one step of the scan has it."""
        ...

    def product(self, product: Dot | Convolution) -> tuple[jax.Array, Mapping[str, Any]] | None:
        """Returns the result and what is to be recorded by name, or None for the usual product."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Record:
    """What was recorded of a product, (repeats..., stack..., as the handler gave it).

    Attributes:
      value: a tree of arrays.
      repeats: number of scans around the product that do not walk over the kernel's layers.
    """

    value: Any
    repeats: int = dataclasses.field(default=0, metadata={"static": True})

    def out_of_scan(self, *, walked: bool) -> Record:
        """Returns the record with the axis that a scan has put in front where it belongs."""
        if not walked:
            return Record(self.value, self.repeats + 1)
        moved = jax.tree.map(lambda x: jnp.moveaxis(x, 0, self.repeats), self.value)
        return Record(moved, self.repeats)


Records = dict[str, list[Record]]


def evaluate(
    fun: Callable[..., Any],
    params: Any,
    kernels: Sequence[Kernel],
    factors: Mapping[str, dict[str, jax.Array]],
    handler: Handler,
    *args: Any,
) -> tuple[Any, Records]:
    """Evaluates `fun(params, *args)` with products replaced by `handler`.

    Args:
      fun: any function that jax can trace.
      params: its first argument, a tree of arrays in which the kernels are leaves.
      kernels: which leaves are followed.
      factors: by name, what goes with a kernel.
      handler: see `Handler`.
      *args: further arguments.

    Returns:
      What `fun` returns, and for each name all that was recorded.
    """
    jaxpr, out = jax.make_jaxpr(fun, return_shape=True)(params, *args)
    leaves = _kernels.named_leaves(params)
    by_name = {kernel.name: kernel for kernel in kernels}
    flat: list[Any] = []
    for name, leaf in leaves.items():
        kernel = by_name.get(name)
        if kernel is None:
            flat.append(leaf)
        else:
            dims = tuple(range(len(kernel.shape)))
            flat.append(
                Tracked(jnp.asarray(leaf), factors.get(name, {}), kernel, dims, kernel.axes.batch)
            )
    records: Records = {}
    found = _evaluate(jaxpr.jaxpr, jaxpr.consts, [*flat, *jax.tree.leaves(args)], handler, records)
    found = [_plain(x, handler) for x in found]
    return jax.tree.unflatten(jax.tree.structure(out), found), records


def _evaluate(
    jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], handler: Handler, records: Records
) -> list[Any]:
    environment: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args]))

    def read(var: Any) -> Any:
        return var.val if isinstance(var, core.Literal) else environment[var]

    for eqn in jaxpr.eqns:
        operands = [read(var) for var in eqn.invars]
        found = None
        if any(isinstance(x, Tracked) for x in operands):
            rule = _RULES.get(eqn.primitive.name)
            found = None if rule is None else rule(eqn, operands, handler, records)
        if found is None:
            found = bind(eqn, [_plain(x, handler) for x in operands])
        environment.update(zip(eqn.outvars, found))
    return [read(var) for var in jaxpr.outvars]


def _plain(x: Any, handler: Handler) -> Any:
    return handler.materialise(x) if isinstance(x, Tracked) else x


def _record(records: Records, new: Mapping[str, list[Record]]) -> None:
    for name, values in new.items():
        records.setdefault(name, []).extend(values)


def _moved(eqn: Any, operands: Sequence[Any], handler: Handler, records: Records) -> Any:
    """Transposes and casts."""
    del handler, records
    (kernel,) = operands
    (value,) = bind(eqn, [kernel.value])
    permutation = eqn.params.get("permutation", range(value.ndim))
    return [
        dataclasses.replace(kernel, value=value, dims=tuple(kernel.dims[i] for i in permutation))
    ]


def _called(eqn: Any, operands: Sequence[Any], handler: Handler, records: Records) -> Any:
    closed = eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"]
    jaxpr, consts = (closed.jaxpr, closed.consts) if hasattr(closed, "consts") else (closed, ())
    return _evaluate(jaxpr, consts, operands, handler, records)


def _rematerialised(eqn: Any, operands: Sequence[Any], handler: Handler, records: Records) -> Any:
    def body(*operands: Any) -> tuple[list[Any], Records]:
        inner: Records = {}
        found = _called(eqn, operands, handler, inner)
        return [_plain(x, handler) for x in found], inner

    # The handler decides what is computed here, and therefore also what is kept.
    wrapped = jax.checkpoint(
        body, policy=eqn.params["policy"], prevent_cse=eqn.params["prevent_cse"]
    )
    found, inner = wrapped(*operands)
    _record(records, inner)
    return found


def _scanned(eqn: Any, operands: Sequence[Any], handler: Handler, records: Records) -> Any:
    closed = eqn.params["jaxpr"]
    num_consts, num_carry = _compat.scan_sizes(eqn.params)
    consts = operands[:num_consts]
    carry = [_plain(x, handler) for x in operands[num_consts : num_consts + num_carry]]
    stacked = [
        x if not isinstance(x, Tracked) or x.dims[:1] == x.batch[:1] else _plain(x, handler)
        for x in operands[num_consts + num_carry :]
    ]

    steps = jnp.arange(eqn.params["length"])

    def body(carry: list[Any], of_step: tuple[jax.Array, list[Any]]) -> tuple[list[Any], Any]:
        step, xs = of_step
        own = [handler.repeated(x, step) if isinstance(x, Tracked) else x for x in consts]
        # The scan has taken the first axis of everything, and with it the first batch axis.
        xs = [
            dataclasses.replace(x, dims=x.dims[1:], batch=x.batch[1:])
            if isinstance(x, Tracked)
            else x
            for x in xs
        ]
        inner: Records = {}
        found = _evaluate(closed.jaxpr, closed.consts, [*own, *carry, *xs], handler, inner)
        found = [_plain(x, handler) for x in found]
        return found[:num_carry], (found[num_carry:], inner)

    carry, (outputs, inner) = jax.lax.scan(
        body,
        carry,
        (steps, stacked),
        length=eqn.params["length"],
        reverse=eqn.params["reverse"],
        unroll=eqn.params["unroll"],
    )
    walked = {x.kernel.name for x in stacked if isinstance(x, Tracked)}
    for name, values in inner.items():
        _record(records, {name: [one.out_of_scan(walked=name in walked) for one in values]})
    return [*carry, *outputs]


def _dot(eqn: Any, operands: Sequence[Any], handler: Handler, records: Records) -> Any:
    left, right = operands
    if isinstance(left, Tracked) and isinstance(right, Tracked):
        return None
    on_left = isinstance(left, Tracked)
    kernel, x = (left, right) if on_left else (right, left)
    (left_sum, right_sum), (left_batch, right_batch) = eqn.params["dimension_numbers"]
    of_kernel, of_x = (left_sum, right_sum) if on_left else (right_sum, left_sum)
    batch_kernel, batch_x = (left_batch, right_batch) if on_left else (right_batch, left_batch)
    summed = {kernel.dims[k]: i for k, i in zip(of_kernel, of_x)}
    in_step = {kernel.dims[k]: i for k, i in zip(batch_kernel, batch_x)}
    axes = kernel.kernel.axes
    if set(summed) != set(axes.reduction) or set(in_step) != set(kernel.batch):
        return None
    dot = Dot(
        x,
        kernel,
        tuple(summed[axis] for axis in axes.reduction),
        tuple(in_step[axis] for axis in kernel.batch),
        on_left,
        eqn,
    )
    return _handled(dot, handler, records)


def _convolution(eqn: Any, operands: Sequence[Any], handler: Handler, records: Records) -> Any:
    x, kernel = operands
    if isinstance(x, Tracked) or not isinstance(kernel, Tracked) or kernel.batch:
        return None
    groups = eqn.params["feature_group_count"], eqn.params["batch_group_count"]
    output = kernel.dims[eqn.params["dimension_numbers"].rhs_spec[0]]
    if groups != (1, 1) or (output,) != kernel.kernel.axes.output:
        return None
    return _handled(Convolution(x, kernel, eqn), handler, records)


def _handled(product: Dot | Convolution, handler: Handler, records: Records) -> Any:
    found = handler.product(product)
    if found is None:
        return None
    result, new = found
    _record(records, {name: [Record(value)] for name, value in new.items()})
    return [result]


_RULES: dict[str, Callable[..., Any]] = {
    "transpose": _moved,
    "convert_element_type": _moved,
    "copy": _moved,
    "jit": _called,
    "closed_call": _called,
    "core_call": _called,
    "remat2": _rematerialised,
    "checkpoint": _rematerialised,
    "scan": _scanned,
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
}


def rows(x: jax.Array, batch: Sequence[int], last: Sequence[int]) -> jax.Array:
    """Returns `x` as (batch product, everything else, product of the axes `last`)."""
    middle = [axis for axis in range(x.ndim) if axis not in (*batch, *last)]
    moved = jnp.transpose(x, (*batch, *middle, *last))
    width = math.prod(x.shape[axis] for axis in last)
    return moved.reshape(math.prod(x.shape[axis] for axis in batch), -1, width)
