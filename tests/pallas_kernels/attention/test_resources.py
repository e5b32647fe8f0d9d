"""The committed table of what compilers say of the kernels, and whether it still holds."""

from __future__ import annotations

import json
import shutil
from importlib import metadata

import pytest

from tests.pallas_kernels.attention import resource_table
from tests.pallas_kernels.attention.resource_table import ARCHITECTURES, CHIPS
from tests.pallas_kernels.targets import needs

COMMITTED = json.loads(resource_table.FILE.read_text())
ROWS = {resource_table._key(row): row for row in COMMITTED["rows"]}

# What another version of a compiler, or a small change, may add before the table is written anew.
REGISTERS, SHARED_MEMORY, TEMPORARIES, SCOPED_MEMORY, BUNDLES = 8, 1024, 1.05, 1.05, 1.02

# One or two of each route and chip, together with all head sizes and features.
COMPARED = [
    ("mosaic_gpu", "h200", "bias", 256),
    ("mosaic_gpu", "h200", "window_cap", 128),
    ("triton", "a100", "causal", 128),
    ("triton", "l4", "segments", 64),
    ("triton", "h200", "full", 256),
    ("triton", "b200", "bias", 64),
    ("mosaic_tpu", "v4", "segments", 64),
    ("mosaic_tpu", "v5e", "full", 128),
    ("mosaic_tpu", "v6e", "full", 256),
    ("mosaic_tpu", "7x", "full", 64),
]


def test_the_table_is_complete_and_the_file_as_text():
    assert list(ROWS) == resource_table.combinations()
    assert resource_table.TABLE.read_text() == resource_table.markdown(COMMITTED)
    kernels = {
        "triton": {"forward", "dkv", "dq"},
        "mosaic_tpu": {"forward", "backward"},
        "mosaic_gpu": {"forward", "backward_dkv", "backward_dq"},
    }
    of_bias = {"triton": "dbias", "mosaic_tpu": "bias_gradient", "mosaic_gpu": "backward_bias"}
    for (route, _, features, _), row in ROWS.items():
        names = kernels[route] | ({of_bias[route]} if features == "bias" else set())
        assert set(row["kernels"]) == {f"attention_{name}" for name in names}


def test_kernels_of_gpus_spill_nothing_and_fit():
    limits = {"a100": 166_912, "l4": 101_376, "h200": 232_448, "b200": 232_448}
    for (_, chip, *_), row in ROWS.items():
        for name, kernel in row["kernels"].items() if chip in limits else ():
            assert kernel["spills"] == 0, (row, name)
            assert 0 < kernel["shared_memory"] <= limits[chip]
            assert 0 < kernel["registers"] <= 255


def test_temporaries_are_a_small_multiple_of_the_inputs():
    for (route, _, features, _), row in ROWS.items():
        # Heads are moved once on TPUs, and padded to 128; on Hopper dK wants a bias transposed.
        bound = {"mosaic_tpu": 3, "mosaic_gpu": 1 if features == "bias" else 0.1, "triton": 0.1}
        assert row["temporaries"] <= bound[route] * row["inputs_and_outputs"], row


def test_everything_is_among_what_is_compared():
    assert {(route, chip) for route, chip, *_ in COMPARED} >= {
        (route, chip) for route, chips in CHIPS.items() for chip in chips if chip != "v5p"
    }
    assert {key[2] for key in COMPARED} == set(resource_table.FEATURES)
    assert {key[3] for key in COMPARED} == set(resource_table.HEAD_DIMS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chip", "route", "features", "head_dim"),
    [needs.on(chip, route, *rest) for route, chip, *rest in COMPARED],
)
def test_nothing_needs_more_than_was_committed(chip, route, features, head_dim):
    if route == "triton" and shutil.which("ptxas") is None:
        pytest.skip("no ptxas for the registers of Triton's kernels")
    got = resource_table.measure(route, chip, features, head_dim)
    if route == "triton" and not got["kernels"]:
        pytest.skip("this XLA dumps no PTX of Triton kernels")
    want = ROWS[route, chip, features, head_dim]
    assert got["inputs_and_outputs"] == want["inputs_and_outputs"]
    assert got["temporaries"] <= TEMPORARIES * want["temporaries"] + 2**16
    assert got["kernels"].keys() == want["kernels"].keys()
    for name, kernel in got["kernels"].items():
        before = want["kernels"][name]
        if chip in ARCHITECTURES:
            assert kernel["spills"] == before["spills"], name
            assert kernel["registers"] <= before["registers"] + REGISTERS, name
            assert kernel["shared_memory"] <= before["shared_memory"] + SHARED_MEMORY, name
            continue
        assert kernel["scoped_memory"] <= SCOPED_MEMORY * before["scoped_memory"], name
        if metadata.version("libtpu") == COMMITTED["versions"]["libtpu"]:
            assert kernel["bundles"] <= BUNDLES * before["bundles"], name
