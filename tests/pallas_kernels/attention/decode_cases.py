"""Problems of `decode_attention`, what is right in float64, and programs for absent chips."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from pallas_kernels import decode_attention
from pallas_kernels.attention.position_bias import RULES, Alibi, RelativePositionBias
from tests.pallas_kernels.attention.cases import quick_jit


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem. Arrays are drawn from its seed; whatever is not data is NaN, or page -1."""

    name: str
    lengths: tuple[int, ...] = (37, 96, 1)
    tokens: int | None = None  # T, None for a query (B, N, d)
    capacity: int = 96
    page_size: int | None = None
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    value_dim: int | None = None
    dtype: str = "float32"
    cache_dtype: str | None = None  # None: as dtype
    window: Any = None
    soft_cap: float | None = None
    sinks: bool = False
    scale: float | None = None
    causal: bool = True
    starts: Any = None  # a number or one for each sequence
    prefixes: Any = None
    scales: str | None = None  # "tensor" or "heads" in place of tokens and heads
    rule: str | None = None  # "alibi" or "buckets"
    seed: int = 0

    def __str__(self) -> str:
        return self.name

    def replace(self, **changes: Any) -> Case:
        words = [f"{k}={v}" for k, v in changes.items() if k != "name"]
        return dataclasses.replace(self, **({"name": " ".join([self.name, *words])} | changes))


CASES = (
    Case("one token"),
    Case("two tokens", tokens=2),
    Case("four tokens, some before the start", tokens=4, lengths=(3, 96, 50)),
    Case("nothing", lengths=(0, 0, 0)),
    Case("a length of zero", tokens=2, lengths=(0, 7, 0)),
    Case("one head each", heads=2),
    Case("three heads for one", heads=3, kv_heads=1, tokens=3),
    Case("window", window=20, tokens=2),
    Case("window of one", window=(0, 5), lengths=(33, 96, 17)),
    Case("no window to the left", window=(None, 0)),
    Case("soft cap", soft_cap=1.5, tokens=2),
    Case("sinks", sinks=True, tokens=2, lengths=(0, 96, 1)),
    Case("scale", scale=-0.7),
    Case("wide values", head_dim=24, value_dim=40),
    Case("pages", page_size=8),
    Case("pages, tokens, groups", page_size=8, tokens=3, heads=6, lengths=(2, 90, 64)),
    Case("large pages", page_size=32),
    Case("pages before the window", page_size=8, window=9, tokens=2),
    Case("bfloat16", dtype="bfloat16", tokens=2),
    Case("float16", dtype="float16", page_size=16),
    Case("int8", cache_dtype="int8", tokens=2),
    Case("int8 pages", cache_dtype="int8", page_size=8, dtype="bfloat16"),
    Case("float8_e4m3fn", cache_dtype="float8_e4m3fn", dtype="bfloat16"),
    Case("float8_e5m2 pages", cache_dtype="float8_e5m2", page_size=16, dtype="float16"),
    Case("left padding", starts=(30, 0, 1), tokens=2),
    Case("left padding, window, pages", starts=(30, 80, 0), window=9, page_size=8, tokens=3),
    Case("padding longer than a sequence", starts=50),
    Case("prefix", prefixes=(36, 95, 0), tokens=4),
    Case("prefix, window, padding", prefixes=60, starts=(3, 50, 0), window=30, tokens=3,
         lengths=(40, 96, 60), page_size=8),
    Case("the whole cache", causal=False, tokens=3, page_size=8),
    Case("the whole cache of fewer keys than tokens", causal=False, tokens=3, lengths=(1, 0, 2)),
    Case("a window to both sides", causal=False, window=(5, 1), tokens=4),
    Case("one scale for a tensor", scales="tensor", cache_dtype="int8", tokens=2),
    Case("one scale for a head", scales="heads", cache_dtype="float8_e4m3fn", dtype="bfloat16",
         page_size=8, starts=2),
    Case("alibi", rule="alibi", tokens=3, heads=6, page_size=8, starts=(2, 30, 0), soft_cap=3.0),
    Case("buckets", rule="buckets", tokens=2, causal=False, cache_dtype="int8"),
    Case("alibi, the whole cache of no whole blocks", rule="alibi", causal=False, tokens=2,
         capacity=90, lengths=(37, 90, 1)),
    Case("everything", lengths=(2, 90, 64), tokens=3, page_size=8, heads=6, window=(30, 0),
         soft_cap=2.0, sinks=True, cache_dtype="int8", value_dim=24, scale=0.4),
)  # fmt: skip


@functools.cache
def build(case: Case) -> tuple[dict[str, Any], tuple[np.ndarray, np.ndarray]]:
    """Returns the arguments of `decode_attention`, and output and lse in float64."""
    rng = np.random.default_rng(case.seed)
    b, t = len(case.lengths), case.tokens or 1
    n, k, d = case.heads, case.kv_heads, case.head_dim
    dv = d if case.value_dim is None else case.value_dim
    query = jnp.asarray(rng.normal(size=(b, t, n, d)), case.dtype)
    dtype = jnp.dtype(case.cache_dtype or case.dtype)
    quantized = case.cache_dtype is not None

    def draw(width: int) -> tuple[jax.Array, np.ndarray, np.ndarray]:
        """Returns a contiguous cache, its scales, and its values."""
        shape = (b, case.capacity, k, width)
        drawn = rng.integers(-127, 128, size=shape) if dtype == jnp.int8 else rng.normal(size=shape)
        cache = jnp.asarray(drawn.astype(np.float32)).astype(dtype)
        size = 1 / 64 if dtype == jnp.int8 else 1
        kept = {"tensor": (), "heads": shape[2:3], None: shape[:3]}[case.scales]
        scale = (rng.uniform(0.5, 1.5, size=kept) * size).astype(np.float32)
        wide = np.asarray(cache.astype(jnp.float32), np.float64)
        return cache, scale, wide * scale[..., None] if quantized else wide

    (key, key_scale, keys), (value, value_scale, values) = draw(d), draw(dv)
    sinks = rng.normal(size=n).astype(np.float32) if case.sinks else None
    left = case.window if case.window is None or isinstance(case.window, int) else case.window[0]
    rule = _rule(case, rng)
    want = _attend(case, np.asarray(query.astype(jnp.float32), np.float64), keys, values, left,
                   sinks, rule)  # fmt: skip

    first = np.zeros(b, int) if left is None else np.asarray(case.lengths) - t - left
    first = np.maximum(first, 0 if case.starts is None else case.starts)
    positions = np.arange(case.capacity)
    used = (positions < np.asarray(case.lengths)[:, None]) & (positions >= first[:, None])
    arrays = {"key_cache": key, "value_cache": value}
    if quantized:
        arrays |= {"key_scale": jnp.asarray(key_scale), "value_scale": jnp.asarray(value_scale)}
    arrays = {name: _spoil(x, used) if x.ndim > 2 else x for name, x in arrays.items()}
    if case.page_size is not None:
        small = {name: x for name, x in arrays.items() if x.ndim < 3}
        large = {name: x for name, x in arrays.items() if x.ndim > 2}
        arrays = _pages(large, used, case.page_size, rng) | small
    arguments = arrays | {
        "query": query if case.tokens else query[:, 0],
        "lengths": jnp.asarray(case.lengths, jnp.int32),
        "sinks": None if sinks is None else jnp.asarray(sinks),
        "local_window_size": case.window,
        "logits_soft_cap": case.soft_cap,
        "scale": case.scale,
        "is_causal": case.causal,
        "key_value_start": case.starts,
        "prefix_lengths": case.prefixes,
        "bias": rule,
    }
    return arguments, want if case.tokens else (want[0][:, 0], want[1][:, 0])


def _spoil(x: jax.Array, used: np.ndarray) -> jax.Array:
    """Puts NaN, or the largest int8, where `used` (B, S) is False."""
    bad = 127 if x.dtype == jnp.int8 else jnp.nan
    return jnp.where(used.reshape(used.shape + (1,) * (x.ndim - 2)), x, jnp.asarray(bad, x.dtype))


def _pages(arrays: dict[str, Any], used: np.ndarray, size: int, rng: Any) -> dict[str, Any]:
    """Scatters contiguous caches over shuffled pages, among pages of NaN."""
    b, capacity = used.shape
    count = b * capacity // size
    places = rng.permutation(count + 3)[:count]
    table = np.where(used.reshape(b, -1, size).any(2), places.reshape(b, -1), -1)

    def scatter(x: jax.Array) -> jax.Array:
        pages = x.reshape(count, size, *x.shape[2:])
        bad = jnp.asarray(127 if x.dtype == jnp.int8 else jnp.nan, x.dtype)
        return jnp.full((count + 3, *pages.shape[1:]), bad).at[places].set(pages)

    paged = {name: scatter(x) for name, x in arrays.items()}
    return paged | {"page_table": jnp.asarray(table, jnp.int32)}


def _rule(case: Case, rng: Any) -> Any:
    if case.rule == "alibi":
        return Alibi(jnp.asarray(rng.uniform(0.05, 0.5, case.heads), jnp.float32))
    if case.rule == "buckets":
        table = jnp.asarray(rng.normal(size=(8, case.heads)), jnp.float32)
        return RelativePositionBias(table, bidirectional=True, max_distance=20)
    return None


def _attend(
    case: Case, query: Any, keys: Any, values: Any, left: int | None, sinks: Any, rule: Any
) -> tuple[np.ndarray, np.ndarray]:
    (b, t, n, d), group = query.shape, case.heads // case.kv_heads
    output = np.zeros((b, t, n, values.shape[3]))
    lse = np.full((b, t, n), -np.inf)
    scale = d**-0.5 if case.scale is None else case.scale
    for i, j, h in np.ndindex(b, t, n):
        position = case.lengths[i] - t + j
        s = np.arange(keys.shape[1])
        right = 0 if case.causal else None if case.window is None else case.window[1]
        seen = (s < case.lengths[i]) & (s >= np.broadcast_to(case.starts or 0, b)[i])
        if left is not None:
            seen &= s >= position - left
        if right is not None:
            seen &= (s <= position + right) | (s < np.broadcast_to(case.prefixes or 0, b)[i])
        z = scale * keys[i, seen, h // group] @ query[i, j, h]
        if rule is not None:
            z = z + np.asarray(rule.at(jnp.asarray(s[seen] - position)), np.float64)[h]
        if case.soft_cap is not None:
            z = case.soft_cap * np.tanh(z / case.soft_cap)
        terms = z if sinks is None else np.append(z, sinks[h])
        if terms.size:
            lse[i, j, h] = np.logaddexp.reduce(terms)
            output[i, j, h] = np.exp(z - lse[i, j, h]) @ values[i, seen, h // group]
    return output, lse


# Of outputs of order one: rounding of float32 sums; of the output and, in the kernels, of the
# probabilities to 16 bits.
TOLERANCES = {"float32": 5e-6, "float16": 3e-3, "bfloat16": 2e-2}


def check(case: Case, package: Any = pallas_kernels, **options: Any) -> None:
    """Asserts that `decode_attention` with `options` is the float64 result within rounding."""
    arguments, want = build(case)
    arrays = {k: v for k, v in arguments.items() if isinstance(v, (jax.Array, *RULES))}
    static = {k: v for k, v in arguments.items() if k not in arrays} | options
    rule = arguments["bias"]
    if rule is not None:  # of the package's own type
        arrays["bias"] = getattr(package, type(rule).__name__)(**vars(rule))
    attend = functools.partial(package.decode_attention, **static, return_residual=True)
    got = quick_jit(lambda arrays: attend(**arrays))(arrays)
    assert got[0].dtype == jnp.dtype(case.dtype)
    assert got[1].dtype == jnp.float32
    size = max(1.0, float(np.abs(want[0]).max(initial=0)))
    np.testing.assert_allclose(
        np.asarray(got[0].astype(jnp.float32)), want[0], rtol=0, atol=TOLERANCES[case.dtype] * size
    )
    np.testing.assert_allclose(got[1], want[1], rtol=1e-5, atol=1e-5)


def _program(
    implementation: str, *, page_size: int | None = None, cache: Any = None, d: int = 128,
    dtype: Any = jnp.bfloat16, tokens: int = 1, batch: int = 8, capacity: int = 8192,
    padded: bool = False, **options: Any
) -> tuple[Any, tuple[Any, ...], tuple[()]]:  # fmt: skip
    """Returns a program for `compile_in_child`: 32 query heads and 8 key/value heads."""
    cache_dtype = jnp.dtype(dtype if cache is None else cache)
    shape = (batch, capacity) if page_size is None else (batch * capacity // page_size, page_size)
    struct = jax.ShapeDtypeStruct
    arrays = {
        "query": struct((batch, tokens, 32, d), dtype),
        "key_cache": struct((*shape, 8, d), cache_dtype),
        "value_cache": struct((*shape, 8, d), cache_dtype),
        "lengths": struct((batch,), jnp.int32),
    }
    if page_size is not None:
        arrays["page_table"] = struct((batch, capacity // page_size), jnp.int32)
    if cache is not None:
        scales = (8,) if padded else (*shape, 8)
        arrays |= {name: struct(scales, jnp.float32) for name in ("key_scale", "value_scale")}
    if padded:
        names = ("key_value_start", "prefix_lengths")
        arrays |= {name: struct((batch,), jnp.int32) for name in names}

    def fn(arrays: dict[str, Any]) -> Any:
        return decode_attention(
            **arrays, **options, implementation=implementation, return_residual=True
        )

    return fn, (arrays,), ()


CACHE_BYTES = 2 * 8 * 8192 * 8 * 128 * 2  # of the keys and values of a bfloat16 program

triton_contiguous = functools.partial(_program, "triton")
triton_pages = functools.partial(_program, "triton", page_size=16, tokens=4)
triton_float32 = functools.partial(_program, "triton", dtype=jnp.float32, logits_soft_cap=30.0)
triton_int8 = functools.partial(_program, "triton", page_size=64, cache=jnp.int8)
triton_float8 = functools.partial(_program, "triton", cache=jnp.float8_e4m3fn)
triton_e5m2 = functools.partial(_program, "triton", cache=jnp.float8_e5m2, dtype=jnp.float16)
triton_wide = functools.partial(_program, "triton", d=256, local_window_size=1024)
triton_padded = functools.partial(_program, "triton", cache=jnp.int8, padded=True, tokens=4)
triton_odd = functools.partial(_program, "triton", d=80)
tpu_contiguous = functools.partial(_program, "mosaic_tpu")
tpu_pages = functools.partial(_program, "mosaic_tpu", page_size=16, tokens=4)
tpu_float32 = functools.partial(_program, "mosaic_tpu", dtype=jnp.float32, logits_soft_cap=30.0)
tpu_int8 = functools.partial(_program, "mosaic_tpu", page_size=64, cache=jnp.int8)
tpu_float8 = functools.partial(_program, "mosaic_tpu", cache=jnp.float8_e4m3fn)
tpu_e5m2 = functools.partial(_program, "mosaic_tpu", cache=jnp.float8_e5m2)
tpu_wide = functools.partial(_program, "mosaic_tpu", d=256, local_window_size=1024)
tpu_padded = functools.partial(_program, "mosaic_tpu", cache=jnp.int8, padded=True, tokens=4)
chunked = functools.partial(_program, "chunked")
chunked_pages = functools.partial(_program, "chunked", page_size=16, cache=jnp.int8)
