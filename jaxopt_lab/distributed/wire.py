"""Bytes on the wire, counted from the program: nothing that a formula forgot is missing.

A replica that holds B bytes before a collective over k replicas sends, on a ring,

    all-reduce 2 (k-1)/k B       reduce-scatter, all-to-all (k-1)/k B
    all-gather (k-1) B           permute B
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_lab.distributed import _axes

KINDS: tuple[str, ...] = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "permute")
_PRIMITIVES = {
    "psum": "all-reduce",
    "psum_invariant": "all-reduce",
    "pmax": "all-reduce",
    "pmin": "all-reduce",
    "all_gather": "all-gather",
    "all_gather_invariant": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "all_to_all": "all-to-all",
    "ppermute": "permute",
}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a program.

    Attributes:
      kind: "all-reduce", "all-gather", "reduce-scatter", "all-to-all" or "permute".
      axes: the mapped axes; empty if read from a compiled program.
      replicas: how many take part.
      payload_bytes: what one replica holds before the call.
      executions: how often it runs.
    """

    kind: str
    axes: tuple[Any, ...]
    replicas: int
    payload_bytes: int
    executions: int = 1

    @property
    def sent_bytes(self) -> float:
        """Bytes that one replica sends in all executions."""
        k = self.replicas
        factor = {
            "all-reduce": 2 * (k - 1) / k,
            "all-gather": k - 1,
            "reduce-scatter": (k - 1) / k,
            "all-to-all": (k - 1) / k,
            "permute": 1.0 if k > 1 else 0.0,
        }[self.kind]
        return factor * self.payload_bytes * self.executions


@dataclasses.dataclass(frozen=True)
class WireBytes:
    """What one replica sends in one run of a program.

    Attributes:
      always: the collectives of every run.
      branches: for each `jax.lax.cond` or `switch` with collectives, what each of its branches
        sends; of the branches, one runs.
    """

    always: tuple[Collective, ...]
    branches: tuple[tuple[WireBytes, ...], ...] = ()

    @property
    def peak(self) -> float:
        """Bytes sent if every branch is the one that sends most."""
        return self._sent(max)

    @property
    def least(self) -> float:
        """Bytes sent if every branch is the one that sends least."""
        return self._sent(min)

    def average(self, every: float) -> float:
        """Bytes sent a run if the branches that send most run once in `every` runs."""
        return self.least + (self.peak - self.least) / every

    def by_kind(self, choose: Callable[..., Any] = max) -> dict[str, float]:
        """Bytes sent by kind of collective: `choose` is `max` for the peak, `min` for the least."""
        total = dict.fromkeys(KINDS, 0.0)
        for collective in self.collectives(choose):
            total[collective.kind] += collective.sent_bytes
        return {kind: sent for kind, sent in total.items() if sent}

    def collectives(self, choose: Callable[..., Any] = max) -> Iterator[Collective]:
        """The collectives of one run, where `choose` picks a branch by the bytes it sends."""
        yield from self.always
        for options in self.branches:
            yield from choose(options, key=lambda one: one._sent(choose)).collectives(choose)

    def all_collectives(self) -> Iterator[Collective]:
        """Every collective in the program, those of all branches among them."""
        yield from self.always
        for options in self.branches:
            for one in options:
                yield from one.all_collectives()

    def _sent(self, choose: Callable[..., Any]) -> float:
        sent = sum(collective.sent_bytes for collective in self.always)
        return sent + sum(choose(one._sent(choose) for one in options) for options in self.branches)


def wire_bytes(
    fn: Callable[..., Any], *args: Any, axis_sizes: Mapping[Any, int] | None = None, **kwargs: Any
) -> WireBytes:
    """Counts what one replica sends in one run of `fn`, from the program that jax traces.

    Loops with a known number of turns count each turn. Types are the logical ones. A
    compiler for CPUs widens bfloat16 to float32, and so sends twice as much: in all-reduces, and in
    permutes, gathers and all-to-alls, which only move it (`gossip` and `noloco` of bfloat16 weights
    among them); float16 and integers it moves as they are, and that of an accelerator moves all of
    them so. Bytes are those
    of ring algorithms, as in the module's docstring. What the partitioner inserts for arrays that
    are sharded outside of `shard_map` is no part of the traced program; `compiled_collectives`
    sees it.

    Args:
      fn: the function, with its `shard_map` or `pmap` inside. Under `vmap` nothing is sent, and
        nothing is counted.
      *args: its arguments; structs (`jax.ShapeDtypeStruct`) will do.
      axis_sizes: to count for one replica's function without a mesh of so many devices: the mapped
        axes that it is written for, and how many replicas each has.
      **kwargs: its keyword arguments.

    Returns:
      A `WireBytes`.

    Raises:
      ValueError: a collective in a loop whose number of turns is not known.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jaxopt_lab import distributed
      >>> def mean(x):
      ...     return jax.lax.pmean(x, "replica")
      >>> x = jax.ShapeDtypeStruct((1000,), jnp.float32)
      >>> distributed.wire_bytes(mean, x, axis_sizes={"replica": 8}).by_kind()
      {'all-reduce': 7000.0}
    """
    environment = list((axis_sizes or {}).items())
    with _axes.counted(dict(environment)):
        traced = jax.make_jaxpr(fn, axis_env=environment)(*args, **kwargs)
    return _walk(traced.jaxpr, dict(environment), executions=1)


def compiled_collectives(program: Any) -> list[Collective]:
    """Reads the collectives of a compiled program, as a check on `wire_bytes`.

    What stands in a loop or a branch is listed once. The payload is that of the compiled types.

    Args:
      program: what `jax.jit(...).lower(...).compile()` returns, or its text.

    Returns:
      A list of `Collective` without names of axes.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jaxopt_lab import distributed
      >>> compiled = jax.jit(lambda x: x + 1).lower(jnp.ones(3)).compile()
      >>> distributed.compiled_collectives(compiled)
      []
    """
    text = program if isinstance(program, str) else program.as_text()
    devices = re.search(r"(?:num_partitions|replica_count)=(\d+)", text)
    everyone = int(devices.group(1)) if devices else 1
    return [_parsed(match, line, everyone) for line in text.splitlines()
            if (match := _LINE.search(line))]  # fmt: skip


def _walk(jaxpr: Any, sizes: dict[Any, int], executions: int) -> WireBytes:
    always: list[Collective] = []
    branches: list[tuple[WireBytes, ...]] = []
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name in _PRIMITIVES:
            always.append(_collective(equation, sizes, executions))
            continue
        if name == "cond":
            options = tuple(_walk(b.jaxpr, sizes, executions) for b in params["branches"])
            if any(option.always or option.branches for option in options):
                branches.append(options)
            continue
        inner_sizes = sizes | _mapped_sizes(name, params)
        for inner in _inner_jaxprs(params):
            turns = params["length"] if name == "scan" else 1
            found = _walk(inner, inner_sizes, executions * turns)
            if name == "while" and (found.always or found.branches):
                raise ValueError(
                    "a collective stands in a while loop, whose number of turns is not known while "
                    "tracing; use jax.lax.scan, or count the loop's body alone"
                )
            always.extend(found.always)
            branches.extend(found.branches)
    return WireBytes(tuple(always), tuple(branches))


def _collective(equation: Any, sizes: dict[Any, int], executions: int) -> Collective:
    params = equation.params
    axes = params["axes"] if "axes" in params else params["axis_name"]
    axes = axes if isinstance(axes, tuple) else (axes,)
    axes = tuple(axis for axis in axes if axis in sizes)
    groups = params.get("axis_index_groups")
    replicas = len(groups[0]) if groups else math.prod(sizes[axis] for axis in axes)
    payload = sum(_bits(v.aval.dtype) * math.prod(v.aval.shape) for v in equation.invars)
    kind = _PRIMITIVES[equation.primitive.name]
    if kind == "permute" and all(source == target for source, target in params["perm"]):
        replicas = 1
    return Collective(kind, axes, replicas, -(-payload // 8), executions)


def _mapped_sizes(name: str, params: Any) -> dict[Any, int]:
    if name == "shard_map":
        return dict(params["mesh"].shape)
    if name == "xla_pmap":
        return {params["axis_name"]: params["global_axis_size"]}
    return {}


def _inner_jaxprs(params: Any) -> Iterator[Any]:
    for value in params.values():
        for one in value if isinstance(value, (tuple, list)) else (value,):
            one = getattr(one, "jaxpr", one)
            if hasattr(one, "eqns"):
                yield one


def _bits(dtype: Any) -> int:
    if jnp.issubdtype(dtype, jax.dtypes.extended):
        return 8 * dtype.itemsize
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.iinfo(dtype).bits  # int4 has an itemsize of a byte
    return 8 * jnp.dtype(dtype).itemsize


_OPERATIONS = {
    "all-reduce": "all-reduce",
    "all-gather": "all-gather",
    "reduce-scatter": "reduce-scatter",
    "all-to-all": "all-to-all",
    "collective-permute": "permute",
}
_LINE = re.compile(rf"=\s*(\(.*?\)|\S+)\s+({'|'.join(_OPERATIONS)})(-start)?\(")
_ARRAY = re.compile(r"([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_WIDTHS = {"pred": 8, "s4": 4, "u4": 4, "s2": 2, "u2": 2}


def _parsed(match: re.Match[str], line: str, everyone: int) -> Collective:
    shapes, operation, start = match.groups()
    sizes = [_array_bits(*array) for array in _ARRAY.findall(shapes)]
    if start and operation == "collective-permute":  # operand, result, two semaphores
        sizes = sizes[:1]
    elif start and operation != "all-reduce":  # operands, results
        sizes = sizes[len(sizes) // 2 :]
    replicas = _group_size(line) or everyone
    held = sum(sizes)
    if operation == "all-gather":
        held //= replicas
    elif operation == "reduce-scatter":
        held *= replicas
    return Collective(_OPERATIONS[operation], (), replicas, held // 8)


def _array_bits(kind: str, dimensions: str) -> int:
    width = re.search(r"\d+", kind)
    bits = _WIDTHS.get(kind) or (int(width.group()) if width else 8)
    return bits * math.prod(int(n) for n in dimensions.split(",") if n)


def _group_size(line: str) -> int | None:
    if "source_target_pairs" in line:
        return None
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    if listed:
        return len(listed.group(1).split(","))
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", line)
    return int(iota.group(2)) if iota else None
