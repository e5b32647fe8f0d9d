"""Bytes of an optimizer's state and of a training step, known before anything is allocated."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxopt_lab import _checks, _mirrors, _tree

PyTree = Any
_MIB = 2**20
_BARE = "parameter"


@dataclasses.dataclass(frozen=True)
class LeafBytes:
    """State of one parameter, or one leaf of the state that belongs to no parameter.

    Attributes:
      name: path such as `layers/0/kernel`; empty for a bare array.
      shape: shape of the parameter, or of the leaf of the state.
      dtype: its dtype.
      fields: bytes by field of the state, such as `{"mu": 64, "nu": 64}`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Any
    fields: Mapping[str, int]

    @property
    def bytes(self) -> int:
        """The sum over all fields."""
        return sum(self.fields.values())


@dataclasses.dataclass(frozen=True)
class StateBytes:
    """What `state_bytes` found; `str(result)` is a table, the largest leaf first.

    Attributes:
      parameters: one entry for each leaf of the parameters, in their order.
      others: what belongs to no parameter: counters, keys, shared tables.
    """

    parameters: tuple[LeafBytes, ...]
    others: tuple[LeafBytes, ...]

    @property
    def total(self) -> int:
        """Bytes of the whole state."""
        return sum(leaf.bytes for leaf in (*self.parameters, *self.others))

    @property
    def num_parameters(self) -> int:
        """Number of scalar parameters."""
        return sum(math.prod(leaf.shape) for leaf in self.parameters)

    @property
    def bytes_per_parameter(self) -> float:
        """`total / num_parameters`; NaN if there are no parameters."""
        return self.total / self.num_parameters if self.num_parameters else math.nan

    def __str__(self) -> str:
        rows = [("parameter", "shape", "dtype", "bytes", "of which")]
        rows += _rows(self.parameters)
        if self.others:
            rows += [("no parameter's", "", "", "", ""), *_rows(self.others)]
        per_parameter = f"{self.bytes_per_parameter:.4g} for each of {self.num_parameters:,}"
        return _table([*rows, ("total", "", "", f"{self.total:,}", per_parameter)], right=3)


def state_bytes(tx: optax.GradientTransformation, params: PyTree) -> StateBytes:
    r"""Counts the bytes of `tx.init(params)` without allocating anything.

    .. math::
      \mathrm{total} = \sum_{s \in \mathrm{state}} \mathrm{size}(s) \cdot \mathrm{itemsize}(s)

    A leaf of the state is its parameter's if it stands in the parameter's place in a subtree with
    the keys of `params`, whatever its own shape: `optax.chain`, `optax.masked`, `optax.partition`,
    `optax.MultiSteps`, low-rank moments and codes with their scales are all seen through.

    Args:
      tx: any optax transformation, ready-made or not; only its `init` is used, and only abstractly.
      params: the parameters, a tree of arrays or `jax.ShapeDtypeStruct` of any shapes and dtypes
        that `tx.init` takes; a bare array is given to it as the only leaf of a dictionary. Trees of
        Flax (`nnx.State`, Linen's boxes) are trees like any other.

    Returns:
      A `StateBytes`: `total`, `bytes_per_parameter`, and a `LeafBytes` for each parameter and each
      leaf of the state that is no parameter's. Fields are named by the end of their path in the
      state; two of one name, such as the moments of two Adams in a chain, are added. A typed random
      key counts its key data. The bytes are those of the whole state, over all devices.

    Raises:
      TypeError: `tx` is no gradient transformation, such as a constructor that was not called; or
        whatever `tx.init` refuses.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> params = {
      ...     "w": jax.ShapeDtypeStruct((1000, 1000), jnp.float32),
      ...     "b": jax.ShapeDtypeStruct((1000,), jnp.float32),
      ... }
      >>> found = state_bytes(optax.adam(1e-3, mu_dtype=jnp.bfloat16), params)
      >>> found.total
      6006004
      >>> print(found)
      parameter       shape         dtype        bytes  of which
      w               (1000, 1000)  float32  6,000,000  mu 2,000,000, nu 4,000,000
      b               (1000,)       float32      6,000  mu 2,000, nu 4,000
      no parameter's
      0/count         ()            int32            4
      total                                  6,006,004  6 for each of 1,001,000
    """
    _checks.check_transformation(tx=tx)
    _tree.check_arrays("params", params)
    bare = jax.tree_util.all_leaves([params])
    tree = {_BARE: params} if bare else params
    tree, state = jax.eval_shape(lambda p: (p, tx.init(p)), tree)
    fields = collections.defaultdict(collections.Counter)
    others = []
    for path, leaf, owner, mirror in _mirrors.owned_leaves(state, tree):
        if owner is None:
            name = _name(path)
            others.append(LeafBytes(name, leaf.shape, leaf.dtype, {name: _leaf_bytes(leaf)}))
        else:
            rest = path[len(mirror) + len(owner) :]
            field = _name((*(mirror[-1:]), *rest)) or "state"
            fields[owner][field] += _leaf_bytes(leaf)
    parameters = [
        LeafBytes("" if bare else _name(path), leaf.shape, leaf.dtype, dict(fields[path]))
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    ]
    return StateBytes(tuple(parameters), tuple(others))


@dataclasses.dataclass(frozen=True)
class TrainingMemory:
    """Bytes on each device of one compiled training step; `str(result)` is a table in MiB.

    Attributes:
      parameters: the parameters.
      state: the state of the optimizer.
      batch: the batch.
      arguments: all three, as the compiler lays them out.
      outputs: new parameters, new state and loss.
      aliased: the part of the outputs that overwrites donated arguments.
      temporaries: activations, gradients and whatever else lives only inside the step.
      generated_code: the program itself, where the backend counts it.
    """

    parameters: int
    state: int
    batch: int
    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    generated_code: int

    @property
    def peak(self) -> int:
        """`arguments + outputs - aliased + temporaries`."""
        return self.arguments + self.outputs - self.aliased + self.temporaries

    def __str__(self) -> str:
        lines = [("", "MiB")]
        for name in ("arguments", "parameters", "state", "batch"):
            indent = "" if name == "arguments" else "  "
            lines.append((indent + name, f"{getattr(self, name) / _MIB:,.2f}"))
        for name in ("outputs", "aliased", "temporaries", "peak", "generated_code"):
            lines.append((name.replace("_", " "), f"{getattr(self, name) / _MIB:,.2f}"))
        return _table(lines, right=1)


def training_memory(
    loss: Callable[[Any, Any], jax.Array],
    tx: optax.GradientTransformation,
    params: PyTree,
    batch: PyTree,
    *,
    donate: bool = True,
) -> TrainingMemory:
    r"""Compiles one training step and returns the memory that it needs, without running it.

    .. math::
      \mathrm{peak} = \mathrm{arguments} + \mathrm{outputs} - \mathrm{aliased}
        + \mathrm{temporaries}

    The step is `jax.value_and_grad(loss)`, `tx.update` and `optax.apply_updates`, compiled for the
    default backend; its figures come from `compiled.memory_analysis()`.

    Args:
      loss: a function of arrays: `loss(params, batch)` returns a real floating scalar.
      tx: any optax transformation; `value`, `grad` and `value_fn` of the loss are at hand for those
        that ask for them.
      params: the parameters, a tree of real floating arrays or `jax.ShapeDtypeStruct`, of any
        shapes, with shardings where they have any.
      batch: the data of one step, a tree of arrays or `jax.ShapeDtypeStruct` of any shapes and
        dtypes, with shardings where they have any.
      donate: whether the step may overwrite parameters and state, as `donate_argnums` of `jax.jit`.

    Returns:
      A `TrainingMemory`, all of it in bytes on one device: `parameters`, `state` and `batch`, and
      what the compiler says of `arguments`, `outputs`, `aliased`, `temporaries` and `peak`.

    Raises:
      TypeError: `tx` is no gradient transformation, a parameter is not real floating point, or
        `loss` returns anything but a real floating scalar.
      RuntimeError: the backend reports no memory analysis.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> params = {"w": jax.ShapeDtypeStruct((512, 512), jnp.float32)}
      >>> batch = jax.ShapeDtypeStruct((32, 512), jnp.float32)
      >>> loss = lambda params, x: jnp.mean(jnp.square(x @ params["w"] - x))
      >>> found = training_memory(loss, optax.adam(1e-3), params, batch)
      >>> found.parameters, found.state, found.batch
      (1048576, 2097156, 65536)
      >>> found.aliased >= found.parameters + found.state
      True
    """
    _checks.check_transformation(tx=tx)
    _tree.check_params(params)
    _checks.check_function(loss=loss)
    _tree.check_arrays("batch", batch)
    _checks.check_flag(donate=donate)
    _check_loss(loss, params, batch)
    update = optax.with_extra_args_support(tx).update

    def step(params: PyTree, state: PyTree, batch: PyTree) -> tuple[PyTree, PyTree, jax.Array]:
        value, grads = jax.value_and_grad(loss)(params, batch)
        extra = {"value": value, "grad": grads, "value_fn": lambda p: loss(p, batch)}
        updates, state = update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state, value

    arguments = (params, jax.eval_shape(tx.init, params), batch)
    # An argument that the step ignores is in memory all the same.
    jitted = jax.jit(step, donate_argnums=(0, 1) if donate else (), keep_unused=True)
    compiled = jitted.lower(*arguments).compile()
    found = compiled.memory_analysis()
    if found is None:
        raise RuntimeError(f"backend {jax.default_backend()} reports no memory analysis")
    split = [
        sum(jax.tree.leaves(jax.tree.map(_shard_bytes, jax.eval_shape(lambda x: x, tree), shards)))
        for tree, shards in zip(arguments, compiled.input_shardings[0])
    ]
    return TrainingMemory(
        *split,
        arguments=found.argument_size_in_bytes,
        outputs=found.output_size_in_bytes,
        aliased=found.alias_size_in_bytes,
        temporaries=found.temp_size_in_bytes,
        generated_code=found.generated_code_size_in_bytes,
    )


def _check_loss(loss: Callable[[Any, Any], Any], params: PyTree, batch: PyTree) -> None:
    found = jax.eval_shape(loss, params, batch)
    is_array = isinstance(found, jax.ShapeDtypeStruct)
    if not (is_array and found.shape == () and jnp.issubdtype(found.dtype, jnp.floating)):
        what = f"{found.dtype}{list(found.shape)}" if is_array else type(found).__name__
        raise TypeError(f"loss(params, batch) must return a real floating scalar, got {what}")


def _leaf_bytes(leaf: Any) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize


def _shard_bytes(leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> int:
    return _leaf_bytes(jax.ShapeDtypeStruct(sharding.shard_shape(leaf.shape), leaf.dtype))


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _rows(leaves: tuple[LeafBytes, ...]) -> list[tuple[str, ...]]:
    rows = []
    for leaf in sorted(leaves, key=lambda leaf: -leaf.bytes):
        fields = ", ".join(f"{k} {v:,}" for k, v in leaf.fields.items() if k != leaf.name)
        name = leaf.name or "(the array)"
        rows.append((name, str(leaf.shape), str(leaf.dtype), f"{leaf.bytes:,}", fields))
    return rows


def _table(rows: list[tuple[str, ...]], right: int) -> str:
    """Returns the rows with aligned columns, the one of index `right` to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if index == right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    )
