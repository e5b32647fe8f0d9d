"""The Hopper kernels: in the GPU interpreter, as their compiler sees them, and on a device.

On a machine with an H100 or H200 and jax for CUDA::

    PALLAS_KERNELS_ON_DEVICE=1 JAX_PLATFORMS=cuda,cpu \
        pytest tests/pallas_kernels/attention/test_mosaic_gpu.py
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention import core, tuning
from pallas_kernels.attention.mask import Mask
from pallas_kernels.attention.mosaic_gpu import ROUTE, _common, _tiles
from pallas_kernels.attention.mosaic_gpu.config import SHARED_MEMORY, Blocks, Config, shared_memory
from pallas_kernels.attention.problem import Device, Operands, Settings, Sizes
from pallas_kernels.targets.resources import compile_with_resources
from tests.pallas_kernels.attention import cases, mosaic_gpu_cases
from tests.pallas_kernels.targets import needs

H100 = Device("gpu", "NVIDIA H100 80GB HBM3", (9, 0))
ON_DEVICE = os.environ.get("PALLAS_KERNELS_ON_DEVICE") == "1"
on_device = pytest.mark.skipif(
    not ON_DEVICE, reason="needs a Hopper GPU: PALLAS_KERNELS_ON_DEVICE=1"
)
interpreted = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"),
    reason="the GPU interpreter of jax 0.10 lacks too much",
)


# ------------------------------------------------------------------ in the interpreter


def run_child(*arguments: str, timeout: float = 900) -> dict[str, str | None]:
    # A kernel's warpgroups block threads of XLA's pool, which by default has one for each core.
    child = subprocess.run(
        [sys.executable, "-m", "tests.pallas_kernels.attention.mosaic_gpu_child", *arguments],
        env=os.environ | {"NPROC": "16", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    lines = [line for line in child.stdout.splitlines() if line.startswith('["')]
    assert lines, child.stdout[-2000:] + child.stderr[-2000:]
    return dict(json.loads(line) for line in lines)


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "names"),
    [
        ("bfloat16", ("many tiles", "window", "ragged")),
        ("bfloat16", ("heads of a group", "two queries", "a length of zero")),
        ("bfloat16", ("one segment a tile", "shuffled segments", "sinks and empty rows")),
        ("float16", ("bias of keys", "bias of queries", "soft cap and bias")),
        ("float16", ("bias of heads", "bias, one for all")),
        ("bfloat16", ("dropout", "dense mask, one for all", "negative scale")),
        ("float16", ("head dim 256", "wide values")),
        ("bfloat16", ("everything",)),
        ("bfloat16", ("first key", "prefixes", "prefix, window, first keys, lengths")),
    ],
    ids=lambda x: x if isinstance(x, str) else x[0],
)
def test_interpreted_without_races(dtype, names):
    assert run_child(dtype, "none", *names) == dict.fromkeys(names)


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("fault", ["skip_full_wait", "skip_free_wait"])
def test_race_detection_finds_a_missing_wait(fault):
    wrong = run_child("bfloat16", fault, "many tiles")["many tiles"]
    assert wrong is not None
    assert "race" in wrong


# ------------------------------------------------------------------ the parts around the kernels


def _of(dtype=jnp.bfloat16, d=64, bias=None, **mask):
    like = [jax.device_put(np.zeros((1, 128, n, d), dtype)) for n in (4, 2, 2)]
    return Operands(*like, bias=bias, mask=Mask(**mask))


_ids = jax.device_put(np.zeros((1, 128), np.int32))


@pytest.mark.parametrize(
    ("operands", "device", "reason"),
    [
        (_of(), H100, None),
        (_of(jnp.float16, 256, right=0, left=3), H100, None),
        (_of(), Device("gpu", "NVIDIA B200", (10, 0)), "needs a Hopper GPU.*NVIDIA B200"),
        (_of(), Device("cpu", "cpu"), "needs a Hopper GPU.*this is cpu"),
        (_of(jnp.float32), H100, "takes bfloat16 and float16, query is float32"),
        (_of(d=264), H100, "takes heads up to 256 wide, these are 264 and 264"),
        (_of(d=0), H100, "takes no empty arrays"),
        (_of(bias=jnp.zeros((1, 1, 1, 1), jnp.int8)), H100, "takes a bias of .*, this is int8"),
        (
            _of(
                d=256,
                bias=jnp.zeros((1, 1, 128, 128)),
                query_segment_ids=_ids,
                key_value_segment_ids=_ids,
            ),
            H100,
            "no shared memory for segment ids beside a float32 bias",
        ),
    ],
)
def test_refusal(operands, device, reason):
    got = ROUTE.refusal(Settings(scale=1.0), operands, device)
    assert got is None if reason is None else got is not None and re.search(reason, got), got


def _masks():
    """Cases whose masks differ; what else a case has does not matter here."""
    other = ("name", "heads", "kv_heads", "head_dim", "value_dim", "scale", "soft_cap", "bias",
             "sinks", "dropout_rate")  # fmt: skip
    found = {}
    for case in cases.CASES:
        parts = dataclasses.asdict(case)
        found.setdefault(str({k: v for k, v in parts.items() if k not in other}), case)
    return found.values()


@pytest.mark.parametrize("case", _masks(), ids=str)
def test_ranges_hold_every_visible_entry(case):
    problem = cases.build(case)
    mask, size = problem.operands.mask, problem.operands.sizes
    rows, keys, workers = 32, 48, 2
    listed = cases.quick_jit(lambda mask: _tiles.row_ranges(mask, size, rows, keys, workers))
    ranges = np.asarray(listed(mask))
    seen = np.asarray(cases.oracle.visible(mask, size.batch, size.queries, size.keys))
    seen = np.broadcast_to(seen, (size.batch, size.heads, size.queries, size.keys))
    for b in range(size.batch):
        for i, (start, stop, *of_workers) in enumerate(ranges[b % len(ranges)]):
            block = seen[b, :, i * workers * rows : (i + 1) * workers * rows]
            assert not block[..., : start * keys].any()
            assert not block[..., stop * keys :].any()
            if start < stop and not mask.has_segments:  # no tile at either end is for nothing
                assert block[..., start * keys : (start + 1) * keys].any()
                assert block[..., (stop - 1) * keys : stop * keys].any()
            for w in range(workers):
                whole_start, whole_stop = of_workers[2 * w : 2 * w + 2]
                whole = block[:, w * rows : (w + 1) * rows, whole_start * keys : whole_stop * keys]
                assert whole.all()
                assert whole_stop * keys <= size.keys


def test_ranges_of_a_causal_mask_are_exact():
    size = Sizes(1, 256, 256, 1, 1, 1, 64, 64)
    ranges = _tiles.row_ranges(Mask(right=0), size, 64, 64, 2)
    assert np.asarray(ranges)[0].tolist() == [[0, 2, 0, 0, 0, 1], [0, 4, 0, 2, 0, 3]]
    ranges = _tiles.key_ranges(Mask(right=0), size, 64, 64)
    assert np.asarray(ranges)[0].tolist() == [
        [0, 4, 1, 4],
        [1, 4, 2, 4],
        [2, 4, 3, 4],
        [3, 4, 0, 0],
    ]


@pytest.mark.parametrize("blocks", [Blocks(32, 64, 4), Blocks(64, 320, 4), Blocks(64, 64, 1)])
def test_blocks_that_no_kernel_has_are_refused(blocks):
    settings = Settings(scale=1.0, config=Config(backward_dq=blocks))
    reason = ROUTE.refusal(settings, _of(), H100)
    assert reason is not None
    assert reason.startswith("takes blocks that are multiples of 64 up to 256")


@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("bias", [None, jnp.bfloat16, jnp.float32])
def test_blocks_of_the_file_fit_with_segments(d, bias):
    bias = None if bias is None else jnp.zeros((1, 1, 128, 128), bias)
    operands = _of(d=d, bias=bias, query_segment_ids=_ids, key_value_segment_ids=_ids)
    if ROUTE.refusal(Settings(scale=1.0), operands, H100) is not None:
        assert (d, bias is not None and bias.dtype) == (256, jnp.float32)
        return
    call, _ = _common.prepare(Settings(scale=1.0), operands)
    for kernel in Config._fields:
        blocks = call.blocks(kernel)
        needed = shared_memory(kernel, blocks, d, call.lookup.bias)
        assert needed <= SHARED_MEMORY
        listed = tuning.find("mosaic_gpu", Config, kernel, call.lookup)
        # Only where it must be, a slot is given up.
        assert blocks.slots == listed.slots - ((kernel, d, bias) == ("backward_dq", 256, None))


def test_blocks_that_need_too_much_shared_memory_are_refused():
    settings = Settings(scale=1.0, config=Config(forward=Blocks(64, 256, 6)))
    assert ROUTE.refusal(settings, _of(), H100) is None
    reason = ROUTE.refusal(settings, _of(d=256), H100)
    assert reason is not None
    assert re.search(r"forward with Blocks.* needs \d+ bytes of shared memory of 232448", reason)


# ------------------------------------------------------------------ as the compiler sees them

_COMPILED = [
    ("h200", "causal_64"),
    ("h200", "bias_segments_64"),
    ("h200", "plain_128"),
    ("h200", "causal_window_cap_128"),
    ("h200", "bias_segments_128"),
    ("h200", "float32_bias_128"),
    ("h200", "ragged_dropout_128"),
    ("h200", "prefixes_128"),
    ("h200", "plain_256"),
    ("h200", "bias_segments_256"),
    ("h100", "causal_256"),
    ("h200", "float32_bias_256"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("chip", "case"), [needs.on(*pair) for pair in _COMPILED])
def test_compiles_without_spills(chip, case):
    report = compile_with_resources(f"{mosaic_gpu_cases.__name__}:{case}", chip)
    names = sorted(kernel["name"] for kernel in report["resources"])
    expected = ["attention_backward_dkv", "attention_backward_dq", "attention_forward"]
    assert names == ["attention_backward_bias"] * ("bias" in case) + expected
    for kernel in report["resources"]:
        assert kernel["spill_stores"] == kernel["spill_loads"] == kernel["stack"] == 0, kernel
        assert kernel["registers"] == 168  # 65536 / 384 threads; later 240 for those that compute
        assert kernel["warnings"] == []
        assert kernel["shared_memory"] <= 232_448
    memory = report["memory"]
    bound = 2**20  # lse and delta, the lists of tiles
    if "bias" in case:
        bound += memory["argument"]  # the transposed bias
    elif "ragged" in case:
        bound += 3 * memory["argument"]  # operands and results padded to a multiple of 8
    assert memory["temp"] <= bound


# ------------------------------------------------------------------ on a device


@on_device
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_on_device(case, dtype):
    cases.check_route(ROUTE, case.replace(dtype=dtype))


@on_device
@pytest.mark.parametrize("case", [c for c in cases.CASES if c.name in ("causal", "everything")])
def test_on_device_repeats_bit_for_bit(case):
    problem = cases.build(case.replace(dtype="bfloat16"))

    def gradients(operands: Operands) -> Any:
        def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            inputs = operands._replace(query=query, key=key, value=value)
            return cast(Any, core.differentiable(ROUTE, problem.settings, inputs))[0]

        primals = (operands.query, operands.key, operands.value)
        _, vjp = cast(Any, jax.vjp(attend, *primals))
        return vjp(problem.cotangents[0])

    run = jax.jit(gradients)
    first = jax.tree.map(np.asarray, run(problem.operands))
    for _ in range(250):
        for a, b in zip(first, jax.tree.map(np.asarray, run(problem.operands))):
            np.testing.assert_array_equal(a.view(np.uint16), b.view(np.uint16))
