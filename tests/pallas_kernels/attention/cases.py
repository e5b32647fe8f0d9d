"""Attention problems that all routes are tested on, and what is right."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import core, dropout
from pallas_kernels.attention.mask import Mask
from pallas_kernels.attention.problem import Operands, Route, Settings
from tests.pallas_kernels.attention import oracle
from tests.pallas_kernels.attention.oracle import Result


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem. Arrays are drawn from its seed; sizes as in `Operands`."""

    name: str
    batch: int = 1
    queries: int = 128
    keys: int = 128
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 64
    value_dim: int | None = None  # None: as head_dim
    dtype: str = "float32"
    scale: float | None = None  # None: head_dim ** -0.5
    soft_cap: float | None = None
    left: int | None = None
    right: int | None = None  # 0 is causal
    offset: int = 0
    offsets: tuple[int, ...] | None = None
    query_lengths: tuple[int, ...] | None = None
    key_value_lengths: tuple[int, ...] | None = None
    start: int = 0
    starts: tuple[int, ...] | None = None
    prefix: int = 0
    prefix_lengths: tuple[int, ...] | None = None
    segments: str | None = None  # "sorted", "shuffled" or "disjoint"
    dense: str | None = None  # which of b, n, t, s are full, such as "bts"; the others are 1
    bias: str | None = None  # as `dense`
    bias_hides: bool = False  # whether a third of it is -inf, and row 3 whole
    sinks: bool | str = False  # "some": that of head 0 is -inf
    diagonals: str | None = None  # "n" or "bn": what each distance adds
    dropout_rate: float = 0.0
    seed: int = 0

    def __str__(self) -> str:
        return self.name

    def replace(self, **changes: Any) -> Case:
        """Returns a case with other fields, named after them."""
        words = [f"{k}={v}" for k, v in changes.items() if k != "name"]
        return dataclasses.replace(self, **({"name": " ".join([self.name, *words])} | changes))


class Problem(NamedTuple):
    settings: Settings
    operands: Operands
    cotangents: tuple[jax.Array, jax.Array]  # of output (B, T, N, dv) and of lse (B, N, T)


_seeds = jax.jit(dropout.seeds, static_argnums=(1, 2))


def build(case: Case) -> Problem:
    """Draws the arrays of `case`: unit normal, segment ids in a few runs, masks half True.

    NumPy does all of it: XLA would compile each operation for each shape, `jnp.asarray` included.
    """
    rng = np.random.default_rng(case.seed)
    b, t, s, n, k, d = (
        case.batch, case.queries, case.keys, case.heads, case.kv_heads, case.head_dim
    )  # fmt: skip
    dv = d if case.value_dim is None else case.value_dim
    dtype = jnp.dtype(case.dtype)

    def normal(*shape: int, dtype: Any = dtype) -> jax.Array:
        return jax.device_put(rng.normal(size=shape).astype(np.float32).astype(dtype))

    def full(letters: str) -> tuple[int, ...]:
        return tuple(size if axis in letters else 1 for axis, size in zip("bnts", (b, n, t, s)))

    def ints(values: Any) -> jax.Array | None:
        return None if values is None else jax.device_put(np.asarray(values, np.int32))

    mask = Mask(
        left=case.left,
        right=case.right,
        offset=case.offset,
        offsets=ints(case.offsets),
        query_lengths=ints(case.query_lengths),
        key_value_lengths=ints(case.key_value_lengths),
        start=case.start,
        starts=ints(case.starts),
        prefix=case.prefix,
        prefix_lengths=ints(case.prefix_lengths),
        query_segment_ids=_segments(case.segments, rng, b, t, 0),
        key_value_segment_ids=_segments(case.segments, rng, b, s, 1),
        dense=None if case.dense is None else jax.device_put(rng.random(full(case.dense)) < 0.5),
    )
    seeds = _seeds(jax.random.key(case.seed), b, n) if case.dropout_rate else None
    bias = None if case.bias is None else normal(*full(case.bias))
    if bias is not None and case.bias_hides:
        hidden = np.random.default_rng(case.seed + 1).random(bias.shape) < 1 / 3
        hidden[:, :, 3:4] = True
        bias = jax.device_put(np.where(hidden, np.asarray(-np.inf, dtype), bias))
    sinks = normal(n, dtype=jnp.float32) if case.sinks else None
    if sinks is not None and case.sinks == "some":
        sinks = jax.device_put(np.r_[np.float32(-np.inf), np.asarray(sinks)[1:]])
    operands = Operands(
        query=normal(b, t, n, d),
        key=normal(b, s, k, d),
        value=normal(b, s, k, dv),
        bias=bias,
        sinks=sinks,
        mask=mask,
        seeds=seeds,
        diagonals=None
        if case.diagonals is None
        else normal(b if "b" in case.diagonals else 1, n, t + s - 1, dtype=jnp.float32),
    )
    settings = Settings(
        scale=d**-0.5 if case.scale is None else case.scale,
        soft_cap=case.soft_cap,
        dropout_rate=case.dropout_rate,
        precision="highest" if dtype == jnp.float32 else None,
    )
    return Problem(settings, operands, (normal(b, t, n, dv), normal(b, n, t, dtype=jnp.float32)))


def _segments(kind: str | None, rng: Any, batch: int, length: int, side: int) -> jax.Array | None:
    if kind is None:
        return None
    if kind == "disjoint":  # half of the queries' ids occur among the keys
        ids = np.arange(length) * 4 // max(length, 1) + 2 * side
        return jax.device_put(np.broadcast_to(ids, (batch, length)).astype(np.int32))
    ids = rng.integers(-1, 3, size=(batch, length))
    return jax.device_put((np.sort(ids) if kind == "sorted" else ids).astype(np.int32))


def quick_jit(fn: Any) -> Any:
    """As `jax.jit`. Most of a test's time is LLVM's optimiser, which changes no result here."""
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.jit(fn, compiler_options=options if jax.default_backend() == "cpu" else None)


def at_once(fn: Any, *args: Any, **options: Any) -> Any:
    """Returns ``fn(*args, **options)`` from one program, which takes the arrays in them.

    Called as it is, XLA would compile each of its operations.
    """
    leaves, structure = jax.tree.flatten((args, options))
    traced = [isinstance(x, (jax.Array, np.ndarray)) for x in leaves]

    def call(arrays: list[Any]) -> Any:
        left = iter(arrays)
        args, options = structure.unflatten(
            [next(left) if of_array else x for x, of_array in zip(leaves, traced)]
        )
        return fn(*args, **options)

    return quick_jit(call)([x for x, of_array in zip(leaves, traced) if of_array])


def run(attend: Any, problem: Problem) -> Result:
    """Returns the values and gradients of ``attend(operands) -> (output, lse)``."""
    operands, cotangents = problem.operands, problem.cotangents

    def fn(*primals: Any) -> Any:
        names = ("query", "key", "value", "bias", "sinks", "diagonals")
        return attend(operands._replace(**dict(zip(names, primals))))

    def all_of_it(primals: Any, cotangents: Any) -> Any:
        (output, lse), vjp = jax.vjp(fn, *primals)
        d_output, d_lse = cotangents
        # The lse of an empty row is -inf, whatever the inputs: it has no gradient.
        d_lse = jnp.where(lse == -jnp.inf, 0, d_lse).astype(lse.dtype)
        return output, lse, *vjp((d_output.astype(output.dtype), d_lse))

    primals = (
        operands.query, operands.key, operands.value, operands.bias, operands.sinks,
        operands.diagonals,
    )  # fmt: skip
    results = quick_jit(all_of_it)(primals, cotangents)
    return Result(*jax.tree.map(lambda x: np.asarray(x, np.float64), results))


@functools.cache
def expected(case: Case) -> Result:
    """What `case` gives in float64."""
    return oracle.attention(build(case))


@functools.cache
def plain_errors(case: Case) -> Result:
    """The largest errors of textbook code in the dtype of `case`, which tolerances start from.

    Its scores and sums are float32; probabilities, and the gradients of scores, are rounded to the
    input dtype before they enter a product, as every fused implementation does.
    """
    rounding = None if case.dtype == "float32" else jnp.dtype(case.dtype)
    got = oracle.attention(build(case), np.float32, rounding)
    return Result(*(None if w is None else _error(g, w) for g, w in zip(got, expected(case))))


def _error(got: Any, want: Any) -> float:
    assert got.shape == want.shape, (got.shape, want.shape)
    assert not np.isnan(got).any(), "NaN"
    same = got == want  # -inf in both
    return float(np.max(np.abs(np.where(same, 0, got - np.where(same, 0, want))), initial=0.0))


# Rounding of float32 sums over a few hundred terms of order one; the coarser types get theirs from
# `plain_errors`. The caps keep a bad plain code from excusing a bad kernel.
FLOOR = 2e-6
CAPS = {"float32": (1e-5, 1e-4), "float16": (5e-3, 5e-2), "bfloat16": (2e-2, 1e-1)}


def check(case: Case, got: Result, *, gradients: bool = True) -> None:
    """Asserts that `got` is the float64 result within rounding.

    Forward: twice the error of `plain_errors`; gradients: three times; in both cases plus `FLOOR`
    and at most `CAPS`, all relative to the largest entry where that is above one. lse: 1e-5.
    """
    want, plain = expected(case), plain_errors(case)
    caps = CAPS[case.dtype]
    for name, g, w, e in zip(Result._fields, got, want, plain):
        if w is None or (not gradients and name not in ("output", "lse")):
            continue
        size = max(1.0, float(np.max(np.abs(w[np.isfinite(w)]), initial=0.0)))
        if name == "lse":
            tolerance = 1e-5 * size
        elif name == "output":
            tolerance = min(2 * e + FLOOR * size, caps[0] * size)
        else:
            tolerance = min(3 * e + 5 * FLOOR * size, caps[1] * size)
        error = _error(g, w)
        assert error <= tolerance, f"{case}: {name} is off by {error:.2e}, allowed {tolerance:.2e}"


def check_route(route: Route, case: Case, **settings: Any) -> None:
    """Runs `route` forward and backward on `case` and checks everything."""
    problem = build(case)
    changed = problem.settings._replace(**settings)
    check(case, run(lambda operands: core.attend(route, changed, operands), problem))


_base = Case("plain")
CASES: tuple[Case, ...] = (
    _base,
    Case("causal", right=0),
    Case("window", left=20, right=7),
    Case("causal window", left=33, right=0, queries=192, keys=192),
    Case("window of one", left=0, right=0),
    Case("grouped heads", heads=6, kv_heads=2, right=0),
    Case("one key/value head", heads=4, kv_heads=1),
    Case("more queries, causal", queries=192, keys=100, right=0),
    Case("more keys, causal", queries=70, keys=192, right=0),
    Case("causal at the end", queries=70, keys=192, right=0, offset=122),
    Case("offsets", batch=2, queries=64, keys=160, right=0, offsets=(3, 90)),
    Case("negative offset leaves empty rows", right=0, offset=-40),
    Case("ragged", queries=117, keys=131),
    Case("lengths", batch=3, query_lengths=(128, 60, 1), key_value_lengths=(7, 128, 65)),
    Case("a length of zero", batch=2, query_lengths=(128, 0), key_value_lengths=(0, 128)),
    Case("causal lengths", batch=2, right=0, query_lengths=(128, 77), key_value_lengths=(50, 128)),
    Case("sorted segments", batch=2, segments="sorted"),
    Case("shuffled segments", batch=2, segments="shuffled", right=0),
    Case("disjoint segments", segments="disjoint"),
    Case("dense mask", batch=2, dense="bnts"),
    Case("dense mask, one for all", batch=2, dense="ts", right=0),
    Case("dense mask of keys", batch=2, dense="bs"),
    Case("dense mask of queries", batch=2, dense="bt"),
    Case("bias", batch=2, bias="bnts"),
    Case("bias, one for all", batch=2, bias="ts"),
    Case("bias of heads", batch=2, bias="n", right=0),
    Case("bias of keys", batch=2, bias="bs", queries=117, keys=131),
    Case("bias of queries", bias="nt", heads=4, kv_heads=2),
    Case("soft cap", soft_cap=2.0),
    Case("soft cap and bias", soft_cap=2.0, bias="nts", right=0),
    Case("soft cap and a bias that hides", soft_cap=2.0, bias="nts", bias_hides=True),
    Case("sinks", sinks=True, right=0),
    Case("sinks and empty rows", sinks=True, right=0, offset=-40),
    Case("a sink of -inf and empty rows", sinks="some", right=0, offset=-40),
    Case("dropout", dropout_rate=0.2),
    Case("dropout, causal, grouped", dropout_rate=0.5, right=0, heads=4, kv_heads=2, batch=2),
    Case("everything", batch=2, queries=117, keys=131, heads=4, kv_heads=2, left=50, right=0,
         offset=9, query_lengths=(100, 117), key_value_lengths=(131, 90), segments="sorted",
         dense="nts", bias="bnts", soft_cap=5.0, sinks=True, dropout_rate=0.1),
    Case("negative scale", scale=-0.3, right=0),
    Case("scale of zero", scale=0.0, right=0),
    Case("head dim 8", head_dim=8, right=0),
    Case("head dim 80", head_dim=80, right=0),
    Case("head dim 256", head_dim=256, heads=1, kv_heads=1, right=0),
    Case("wide keys", head_dim=96, value_dim=64),
    Case("wide values", head_dim=64, value_dim=112, right=0),
    Case("first key", start=50, queries=70, keys=131),
    Case("first keys, causal window", batch=3, starts=(0, 47, 128), left=60, right=0),
    Case("prefix", prefix=60, right=0, queries=117, keys=131),
    Case("prefixes", batch=3, prefix_lengths=(0, 45, 128), right=3, heads=4),
    Case("prefix, window, first keys, lengths", batch=2, prefix_lengths=(90, 40), starts=(20, 44),
         key_value_lengths=(80, 131), left=70, right=0, offsets=(5, -30), segments="sorted",
         queries=117, keys=131),
)  # fmt: skip
# Not every route has a bias by rule.
BY_DISTANCE = (
    Case("distances", diagonals="n", queries=117, keys=131, heads=4, kv_heads=2),
    Case("distances, entries, cap", batch=2, diagonals="bn", right=0, soft_cap=3.0,
         dropout_rate=0.2, queries=131, keys=90, sinks=True),
    Case("distances, window, segments", batch=2, diagonals="n", left=50, right=9,
         segments="sorted"),
)  # fmt: skip


# Together they have every feature; a kernel's interpreter takes seconds for each.
QUICK = {
    "causal window", "grouped heads", "more queries, causal", "causal at the end",
    "negative offset leaves empty rows", "a length of zero", "shuffled segments",
    "dense mask of keys", "bias of queries",
    "soft cap and a bias that hides", "a sink of -inf and empty rows", "everything", "wide values",
    "first key", "prefix, window, first keys, lengths",
}  # fmt: skip


def some_slow(of: Iterable[Case], quick: set[str] = QUICK) -> list[Any]:
    """Marks the cases that are not in `quick` as slow."""
    return [
        pytest.param(case, marks=() if case.name in quick else pytest.mark.slow, id=case.name)
        for case in of
    ]
