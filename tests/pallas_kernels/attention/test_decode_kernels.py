"""The decode kernels, interpreted, and compiled for chips that are not there."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels._compat import Device
from pallas_kernels.attention import decode, decode_tpu, decode_triton
from pallas_kernels.attention.decode import _choose
from pallas_kernels.attention.decode_problem import Operands, Settings, canonical
from pallas_kernels.targets import compile_in_child
from tests.pallas_kernels.attention import decode_cases
from tests.pallas_kernels.attention.decode_cases import CASES, Case, check
from tests.pallas_kernels.targets import needs

PROGRAMS = "tests.pallas_kernels.attention.decode_cases"


def tpu_case(case: Case) -> Case:
    """Returns a case like `case` that the TPU kernel takes: whole lanes, whole tiles of rows."""
    widths = {"head_dim": 128, "value_dim": 128}
    if case.cache_dtype is None:
        return case.replace(**widths)
    rows = 128 // case.kv_heads
    return case.replace(**widths, capacity=128, page_size=case.page_size and rows)


# Everything that a kernel does, in few programs: an interpreted one takes seconds.
INTERPRETED = [
    case
    for case in CASES
    if case.name
    in (
        "four tokens, some before the start",
        "a length of zero",
        "three heads for one",
        "window",
        "soft cap",
        "sinks",
        "pages, tokens, groups",
        "pages before the window",
        "bfloat16",
        "int8",
        "int8 pages",
        "float8_e4m3fn",
        "everything",
        "left padding, window, pages",
        "prefix, window, padding",
        "the whole cache",
        "a window to both sides",
        "one scale for a tensor",
        "one scale for a head",
    )
]


@pytest.fixture
def small_blocks(monkeypatch):
    """Makes the kernels take 16 keys at a time, or one page."""
    decode._compiled.clear_cache()
    monkeypatch.setattr(decode_triton, "_config", lambda _: decode_triton.Config(128, 1, 4, 2))
    monkeypatch.setattr(decode_tpu, "_config", lambda _: decode_tpu.Config(128))
    yield
    decode._compiled.clear_cache()


@pytest.mark.parametrize(
    "case", [*INTERPRETED, next(x for x in CASES if x.name == "wide values")], ids=str
)
def test_triton(case, small_blocks):
    splits = 1 + len(case.name) % 2 * 2  # half of the cases each
    check(case, implementation="triton", num_splits=splits, interpret=True)


@pytest.mark.slow
def test_triton_in_one_block():
    check(CASES[-1], implementation="triton", interpret=True)


SIMULATED = (
    "a length of zero", "pages before the window", "int8 pages", "everything",
    "prefix, window, padding", "one scale for a head",
)  # fmt: skip


@pytest.mark.parametrize(
    "case",
    [pytest.param(x, marks=() if x.name in SIMULATED else pytest.mark.slow) for x in INTERPRETED],
    ids=str,
)
def test_tpu(case, small_blocks):
    splits = 1 + len(case.name) % 2 * 2  # half of the cases each
    check(tpu_case(case), implementation="mosaic_tpu", num_splits=splits, interpret=True)


@pytest.mark.slow
def test_tpu_without_races(monkeypatch):
    # Six blocks of two pages.
    monkeypatch.setattr(decode_tpu, "_config", lambda _: decode_tpu.Config(32))
    interpret = pltpu.InterpretParams(detect_races=True, out_of_bounds_reads="raise")
    case = Case("", page_size=8, lengths=(2, 90), heads=2, head_dim=128)
    check(case, implementation="mosaic_tpu", interpret=interpret)
    assert interpret_pallas_call.races is not None
    assert not interpret_pallas_call.races.races_found


@pytest.mark.slow
def test_tpu_blocks_of_several_pages(monkeypatch):
    monkeypatch.setattr(decode_tpu, "_config", lambda _: decode_tpu.Config(64))
    case = Case("", page_size=8, window=20, tokens=2, head_dim=128)
    check(case, implementation="mosaic_tpu", interpret=True)


def test_tpu_cuts_a_contiguous_cache_into_pages():
    assert decode_tpu._page_size(_operands((2, 1000, 8, 128))[1]) == 250
    assert decode_tpu._page_size(_operands((2, 8192, 8, 128))[1]) == 256
    assert decode_tpu._page_size(_operands((2, 1001, 8, 128))[1]) == 143
    assert decode_tpu._page_size(_operands((2, 1001, 1, 128), heads=2)[1]) is None


def _operands(
    cache: tuple[int, ...], heads: int = 8, dtype: object = jnp.float32, **options: object
) -> tuple[Settings, Operands]:
    """Returns what implementations get, all shapes and no data."""

    def make(query: jax.Array, key: jax.Array, lengths: jax.Array) -> Operands:
        nothing: Any = dict.fromkeys(
            ("page_table", "key_scale", "value_scale", "scale", "local_window_size",
             "logits_soft_cap", "num_splits")
        )  # fmt: skip
        made.append(
            canonical(query, key, key, lengths, **nothing, interpret=options.get("interpret"))
        )
        return made[0][1]

    made: list[tuple[Settings, Operands]] = []
    query = jax.ShapeDtypeStruct((cache[0], 1, heads, cache[3]), dtype)
    lengths = jax.ShapeDtypeStruct((cache[0],), jnp.int32)
    operands = jax.eval_shape(make, query, jax.ShapeDtypeStruct(cache, dtype), lengths)
    return made[0][0], operands


GPU = Device("gpu", "NVIDIA H200", (9, 0))
TPU = Device("tpu", "TPU v6 lite")


@pytest.mark.parametrize(
    ("place", "cache", "dtype", "name"),
    [
        (GPU, (2, 64, 2, 80), jnp.float32, "triton"),
        (GPU, (2, 64, 2, 1024), jnp.float32, "chunked"),
        (GPU._replace(compute_capability=(7, 5)), (2, 64, 2, 80), jnp.float32, "chunked"),
        (TPU, (2, 64, 2, 128), jnp.float32, "mosaic_tpu"),
        (TPU, (2, 64, 2, 80), jnp.float32, "chunked"),
        (TPU, (2, 64, 2, 128), jnp.float16, "chunked"),
        (Device("cpu", "cpu"), (2, 64, 2, 128), jnp.float32, "chunked"),
    ],
)
def test_choice_by_device(place, cache, dtype, name, monkeypatch):
    monkeypatch.setattr(decode, "device", lambda: place)
    assert _choose(None, *_operands(cache, dtype=dtype)) == name


@pytest.mark.parametrize(
    ("refusal", "place", "cache", "options", "reason"),
    [
        (decode_triton, GPU, (1, 64, 1, 64), {"heads": 129}, "T * N / K is 129; expected at most"),
        (decode_triton, GPU, (1, 2**23, 1, 257), {"dtype": jnp.bfloat16}, None),
        (
            decode_triton,
            Device("gpu", "V100", (7, 0)),
            (1, 64, 1, 64),
            {},
            "capability 8.0, and V1",
        ),
        (decode_triton, GPU, (1, 64, 1, 64), {"interpret": 3}, "interpret=3; expected a bool"),
        (decode_tpu, TPU, (1, 64, 1, 64), {}, "d=64; expected a multiple of 128"),
        (decode_tpu, TPU, (1, 63, 1, 128), {}, "S=63 with K=1; expected pages whose page_size * K"),
        (decode_tpu, GPU, (1, 64, 1, 128), {}, "it needs a TPU, and this is 'gpu'"),
        (decode_tpu, TPU, (1, 64, 1, 128), {"dtype": jnp.float16}, "float16 is no type of a TPU"),
        (decode_tpu, TPU, (1, 2048, 1, 128), {"heads": 4096}, "expected smaller pages or fewer"),
    ],
)
def test_refusals(refusal, place, cache, options, reason):
    said = refusal.refusal(*_operands(cache, **options), place)
    assert said is None if reason is None else re.search(re.escape(reason), said)


def test_float8_e4m3fn_is_refused_before_ada():
    settings, operands = _operands((1, 64, 1, 64))
    key = jax.ShapeDtypeStruct(operands.key.shape, jnp.float8_e4m3fn)
    a100 = Device("gpu", "NVIDIA A100", (8, 0))
    said = decode_triton.refusal(settings, operands._replace(key=key), a100)
    assert said == "float8_e4m3fn needs compute capability 8.9, and NVIDIA A100 has less"
    assert decode_triton.refusal(settings, operands._replace(key=key), GPU) is None


def test_large_int8_caches_are_refused_where_offsets_overflow():
    settings, operands = _operands((1, 2**24 + 1, 1, 128))
    for dtype, fits in ((jnp.int8, False), (jnp.float32, True)):
        key = jax.ShapeDtypeStruct(operands.key.shape, dtype)
        said = decode_triton.refusal(settings, operands._replace(key=key, value=key), GPU)
        assert (said is None) == fits


@pytest.mark.parametrize(
    ("batch", "kv_heads", "capacity", "splits"),
    [(8, 8, 8192, 4), (1, 1, 8192, 64), (1, 8, 1024, 8), (64, 8, 8192, 1), (1, 1, 100, 1)],
)
def test_default_number_of_splits(batch, kv_heads, capacity, splits):
    _, operands = _operands((batch, capacity, kv_heads, 128))
    assert decode_triton.default_splits(operands, cores=132, block=64) == splits


PROGRAMS_BY_CHIP = {
    "a100": ("contiguous", "odd", "e5m2", "float32"),
    "h200": ("int8", "pages", "float8", "wide", "padded"),
    "v5e": ("contiguous", "e5m2", "wide"),
    "v6e": ("pages", "float32", "int8", "float8", "padded"),
}


def compiles_and_copies_no_cache(chip: str, program: str) -> None:
    program = ("tpu_" if chip.startswith("v") else "triton_") + program
    report = compile_in_child(f"{PROGRAMS}:{program}", chip)
    _, (arrays,), _ = getattr(decode_cases, program)()
    cache = 2 * arrays["key_cache"].size * arrays["key_cache"].dtype.itemsize
    # The kernel's operands and results are the traffic: the cache once, and little beside it. On a
    # TPU the scales are brought into another layout.
    assert report["traffic"]["total_bytes"] < 1.1 * cache
    assert report["memory"]["temp"] < cache / 50
    assert any(kernel["opcode"] == "custom-call" for kernel in report["traffic"]["kernels"])


@pytest.mark.parametrize(
    ("chip", "program"), [needs.on(chip, names[0]) for chip, names in PROGRAMS_BY_CHIP.items()]
)
def test_compiles_and_copies_no_cache(chip, program):
    compiles_and_copies_no_cache(chip, program)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chip", "program"),
    [needs.on(chip, name) for chip, names in PROGRAMS_BY_CHIP.items() for name in names[1:]],
)
def test_all_features_compile(chip, program):
    compiles_and_copies_no_cache(chip, program)
