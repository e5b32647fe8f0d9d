from __future__ import annotations

import functools
import json
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention import core
from pallas_kernels.attention.mask import PARTIAL, SKIP, WHOLE, Mask, tile_kinds
from pallas_kernels.attention.mosaic_tpu import ROUTE, Blocks, Config, steps, tables
from pallas_kernels.attention.problem import Device
from pallas_kernels.targets import compile_in_child, compile_with_schedule
from tests.pallas_kernels.attention import cases
from tests.pallas_kernels.attention.cases import CASES, Case, some_slow
from tests.pallas_kernels.targets import needs

PROGRAMS = "tests.pallas_kernels.attention.mosaic_tpu_cases"
SMALL = Blocks(128, 128, 128, 128)
CONFIG = Config(SMALL, SMALL)
TPU = Device("tpu", "TPU v5 lite")


@pytest.mark.parametrize("case", some_slow(CASES))
def test_cases(case):
    cases.check_route(ROUTE, case, config=CONFIG, interpret=True)


# Two tiles a side at the least, so that skipped, whole and partial ones all occur.
TILED = (
    Case("causal, grouped", right=0, queries=256, keys=256, heads=4, kv_heads=2),
    Case("window with empty rows", queries=256, keys=128, left=40, right=30),
    Case("bias of keys", queries=256, keys=256, bias="bs", right=0, batch=2),
    Case("lengths", queries=130, keys=256, batch=2, query_lengths=(130, 0),
         key_value_lengths=(129, 60), sinks=True),
)  # fmt: skip


def run_unmapped(case, **settings):
    """Runs the route without `mapped`, which cannot carry the simulator's effects."""
    problem = cases.build(case)
    changed = problem.settings._replace(config=CONFIG, **settings)
    return cases.run(lambda operands: core.differentiable(ROUTE, changed, operands), problem)


@pytest.mark.slow
@pytest.mark.parametrize("case", TILED, ids=str)
def test_simulated_memories_have_no_race_and_nothing_uninitialised_is_read(case, capfd):
    simulator = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    got = run_unmapped(case, interpret=simulator)
    cases.check(case, got)
    assert "RACE" not in capfd.readouterr().out.upper()


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        Case("bf16", right=0, queries=256, keys=256, dtype="bfloat16"),
        Case("bf16, cap, bias", soft_cap=3.0, bias="nts", heads=2, dtype="bfloat16"),
    ],
    ids=str,
)
def test_bfloat16(case):
    cases.check_route(ROUTE, case, config=CONFIG, interpret=True)


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [False, True])
def test_pieces_and_chunks_do_not_change_the_result(ahead):
    # Four pieces a tile; a quarter of dQ resident, so that dK and dV come in four parts.
    case = Case("pieces", queries=512, keys=300, right=0, offset=20, heads=2, kv_heads=1,
                head_dim=128)  # fmt: skip
    blocks = Blocks(256, 256, 128, 128, ahead)
    config = Config(blocks, blocks._replace(q=128, resident=2 * 4 * 128 * 128))
    got = cases.run(
        lambda operands: core.differentiable(
            ROUTE, problem.settings._replace(config=config, interpret=True), operands
        ),
        problem := cases.build(case),
    )
    cases.check(case, got)


def test_bias_that_stands_for_minus_infinity():
    # Row 0 sees finfo.min everywhere, row 1 everywhere but at one key, row 2 -inf.
    problem = cases.build(Case("", queries=8, keys=8, bias="ts"))
    assert problem.operands.bias is not None
    bias = problem.operands.bias.at[..., :2, :].set(jnp.finfo(jnp.float32).min)
    bias = bias.at[..., 1, 3].set(0).at[..., 2, :].set(-jnp.inf)
    settings = problem.settings._replace(config=CONFIG, interpret=True)
    forward = cases.quick_jit(functools.partial(ROUTE.forward, settings))
    output, lse = forward(problem.operands._replace(bias=bias))
    value = problem.operands.value
    np.testing.assert_allclose(output[:, 0], value.mean(axis=1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(output[:, 1], value[:, 3], rtol=1e-5, atol=1e-6)
    assert not output[:, 2].any()
    assert (lse[..., 2] == -jnp.inf).all()


def listed(mask, batch, queries, keys):
    """Returns the steps of `steps.of_rows` with its table, decoded, for each batch and head."""
    found = []

    def table(mask):
        found.append(steps.of_rows(mask, batch, queries, keys, SMALL))
        return found[0].table

    entries = np.asarray(jax.jit(table)(mask)).reshape(-1, found[0].count)
    rows = [[steps.decode(int(entry)) for entry in row] for row in entries]
    return found[0], rows


@pytest.mark.parametrize(
    "mask",
    [
        Mask(),
        Mask(right=0),
        Mask(left=100, right=0),
        Mask(right=0, offset=-300),
        Mask(right=0, key_value_lengths=jnp.array([0, 300])),
        Mask(right=0, query_segment_ids=jnp.arange(2 * 600).reshape(2, 600) // 200,
             key_value_segment_ids=jnp.arange(2 * 700).reshape(2, 700) // 200),
        Mask(dense=jnp.arange(3 * 600 * 700).reshape(1, 3, 600, 700) // 9999 % 7 == 0),
    ],
)  # fmt: skip
def test_table_lists_each_visible_tile_once(mask):
    sizes = (2, 600, 700)
    table, rows = listed(mask, *sizes)
    kinds = np.asarray(jax.jit(lambda mask: tile_kinds(mask, *sizes, 128, 128))(mask))
    assert table.leading == kinds.shape[:2]
    for row, kind in zip(rows, kinds.reshape(-1, *kinds.shape[2:]), strict=True):
        seen = [(s.outer, s.inner) for s in row if s.kind != SKIP]
        assert seen == list(map(tuple, np.argwhere(kind)))
        assert all(kind[s.outer, s.inner] == s.kind for s in row if s.kind != SKIP)
        assert {s.kind for s in row} <= table.kinds | {SKIP}
        # Each block row starts once and ends once, an empty one too.
        for edge in ("first", "last"):
            assert [s.outer for s in row if getattr(s, edge)] == list(range(kind.shape[0]))
        spare = [s for s in row if s.kind == SKIP and not s.first]
        assert row[len(row) - len(spare) :] == spare, "left-over steps come last"


def test_static_masks_have_no_step_to_spare():
    table, _ = listed(Mask(right=0), 1, 1024, 1024)
    assert table.count == 8 * 9 // 2
    assert table.kinds == {WHOLE, PARTIAL}
    assert listed(Mask(), 1, 1024, 1024)[0].kinds == {WHOLE}
    assert listed(Mask(left=128, right=0), 1, 1024, 1024)[0].count == 8 + 7


@pytest.mark.parametrize(
    ("changes", "device", "reason"),
    [
        ({}, TPU, None),
        ({"dtype": "bfloat16"}, TPU, None),
        ({"dtype": "float16"}, TPU, "float16 is no type of a TPU"),
        ({"head_dim": 264}, TPU, "heads up to 256 wide"),
        ({"keys": 0}, TPU, "takes no empty arrays"),
        ({}, Device("cpu", "cpu"), "needs a TPU"),
    ],
)
def test_refusal(changes, device, reason):
    problem = cases.build(Case("", queries=8).replace(**changes))
    got = ROUTE.refusal(problem.settings, problem.operands, device)
    assert got is None if reason is None else reason in got


def test_table_that_does_not_fit_scalar_memory_is_refused():
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    problem = cases.build(Case("", queries=8))
    long = 2**20
    operands: Any = problem.operands._replace(
        query=shape((1, long, 2, 64)), key=shape((1, long, 2, 64)), value=shape((1, long, 2, 64))
    )
    reason = ROUTE.refusal(problem.settings, operands, TPU)
    assert reason is not None
    assert "its table of tiles has" in reason


@pytest.mark.parametrize("length", [1, 127, 128, 129, 640, 1100, 4096])
@pytest.mark.parametrize(
    "blocks",
    [Blocks(512, 512, 256, 512), Blocks(1024, 1024, 256, 1024), Blocks(1024, 512, 512, 256)],
)
def test_blocks_fit_the_length(blocks, length):
    fitted = tables.fit(blocks, length, length)
    for block, piece, most in (
        (fitted.q, fitted.q_compute, blocks.q),
        (fitted.kv, fitted.kv_compute, blocks.kv),
    ):
        assert block % piece == piece % 128 == 0
        assert block <= most
        # Each block is rounded up to whole pieces, no further.
        count = -(-length // block)
        assert count * block < length + count * piece


TPUS = ("v4", "v5e", "v5p", "v6e", "7x")


def programs(name, *chips):
    return [needs.on(chip, name) for chip in chips]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chip", "name"),
    [
        *programs("width_64", *TPUS),
        *programs("width_128", *TPUS),
        *programs("width_256", *TPUS),
        *programs("float32", "v4", "7x"),
        *programs("grouped", "v5e", "7x"),
        *programs("with_bias", "v4", "v6e"),
        *programs("with_key_bias", "v5p"),
        *programs("with_prefixes", "v5e", "v6e"),
    ],
)
def test_default_blocks_compile(chip, name):
    memory = compile_in_child(f"{PROGRAMS}:{name}", chip, timeout=1200)["memory"]
    # Inputs and results are copied once to move their heads, 64-wide ones to 128 lanes; lse and
    # delta are small. Nothing grows with T x S.
    assert memory["temp"] <= 3 * (memory["argument"] + memory["output"])


COMMITTED = json.loads(Path(__file__).with_name("mosaic_tpu_bundles.json").read_text())


# What the shipped splash attention takes for a tile of the same size, its loop and its start and
# end included: forward, and its two backward kernels together.
SPLASH = {"v5e": (6055, 8369 + 6175), "v6e": (3988, 5137 + 3941)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chip", "name"), [needs.on(*key.split()) for key in COMMITTED["programs"]]
)
def test_bundles_of_a_tile(chip, name):
    if not metadata.version("libtpu").startswith(COMMITTED["libtpu"]):
        pytest.skip(f"the committed figures are those of libtpu {COMMITTED['libtpu']}")
    got = bundles(compile_with_schedule(f"{PROGRAMS}:{name}", chip, timeout=1200))
    for kernel, regions in COMMITTED["programs"][f"{chip} {name}"].items():
        assert set(got[kernel]) == set(regions)
        for region, most in regions.items():
            assert got[kernel][region] <= most, (kernel, region, got)
    # A kernel holds one body for whole and one for partial tiles; a step runs one of them.
    forward, backward = got["attention_forward"], got["attention_backward"]
    assert forward["all"] - forward["partial"] <= 0.9 * SPLASH[chip][0]
    # On the diagonal, where all partial tiles of these programs are, 3 of 4 pieces are needed.
    assert forward["all"] - forward["whole"] - forward["partial"] / 4 <= SPLASH[chip][0]
    assert backward["all"] - backward["partial"] <= 0.8 * SPLASH[chip][1]
    assert backward["all"] - backward["whole"] <= 0.8 * SPLASH[chip][1]


def bundles(report):
    """Returns, for each kernel, all of its bundles and those of a whole and a partial tile.

    A partial tile of the forward kernel is several regions, one for each piece that may be skipped.
    """
    result = {}
    for kernel in report["schedule"]:
        if kernel["name"].startswith("attention_"):
            whole, *partial = [r["bundles"] for r in kernel["regions"] if r["used"]["MXU"] > 0]
            result[kernel["name"].split(".")[0]] = {
                "all": kernel["bundles"],
                "whole": whole,
                "partial": sum(partial),
            }
    return result
