"""What would run where, told without the chip."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels.attention import routes
from pallas_kernels.targets.chips import CHIPS

X = jax.ShapeDtypeStruct((2, 256, 4, 64), jnp.bfloat16)


def test_numbers_may_be_arrays():
    x = jnp.ones((1, 4, 2, 8))
    for options in (
        {"scale": jnp.float32(0.3)},
        {"logits_soft_cap": np.float32(3.0)},
        {"dropout_rate": jnp.float32(0.1), "dropout_rng": jax.random.key(0)},
        {"key_value_seq_lengths": [3], "query_offset": jnp.int32(2), "is_causal": True},
    ):
        pallas_kernels.attention(x, x, x, **options)
        assert pallas_kernels.explain(x, x, x, **options).chosen == "chunked"


@pytest.mark.parametrize("chip", CHIPS)
def test_every_chip_has_an_answer(chip):
    expected = {"a100": "triton", "l4": "triton", "b200": "triton", "h100": "mosaic_gpu"}
    expected |= {"h200": "mosaic_gpu"}
    found = pallas_kernels.explain(X, X, X, is_causal=True, chip=chip)
    assert found.chosen == expected.get(chip, "mosaic_tpu")
    assert pallas_kernels.explain(X, X, X).chosen == "chunked", "and this machine is itself again"


@pytest.mark.parametrize(
    ("chip", "masked", "ruled"),
    [
        ("v5e", "mosaic_tpu", "chunked"),
        ("h200", "mosaic_gpu", "triton"),
        ("l4", "triton", "triton"),
    ],
)
def test_masks_and_rules_of_linear_memory_have_an_answer(chip, masked, ruled):
    numbers = jax.ShapeDtypeStruct((2,), jnp.int32)
    masks = {"is_causal": True, "prefix_lengths": numbers, "key_value_start": numbers}
    rule = pallas_kernels.Alibi(jax.ShapeDtypeStruct((4,), jnp.float32))
    assert pallas_kernels.explain(X, X, X, chip=chip, **masks).chosen == masked
    found = pallas_kernels.explain(X, X, X, rule, chip=chip, **masks)
    assert found.chosen == ruled
    assert masked == ruled or "bias by rule" in found.refusals[masked]


def test_unknown_chips_are_refused():
    with pytest.raises(ValueError, match="chip='v9' is not known; expected one of a100"):
        pallas_kernels.explain(X, X, X, chip="v9")


def test_command_line(capsys):
    module = importlib.import_module("pallas_kernels.explain")
    asked = "--chip h200 --shape 2,2048,8,64 --dtype bfloat16 --causal"
    assert module.main(asked.split()) == 0
    assert "-> mosaic_gpu serves" in capsys.readouterr().out
    assert module.main(["--shape", "2,9,8,64", "--key-shape", "2,8,3,64"]) == 2
    assert "error: query has 8 heads, key and value have 3" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        module.main(["--shape", "2,a"])
    assert "'2,a' was given; expected B,T,N,D" in capsys.readouterr().err
    assert pallas_kernels.explain(X, X, X).chosen == "chunked", "the function keeps its name"


@pytest.mark.slow
def test_routes_are_recorded_as_they_are_taken():
    x = jnp.ones((1, 4, 2, 8))
    with routes.recorded() as taken:
        pallas_kernels.attention(x, x, x)
        pallas_kernels.attention(x, x, x, implementation="xla")
        pallas_kernels.attention(x, x, x, implementation="reference")
        pallas_kernels.decode_attention(x[:, 0], x, x, [3], implementation="xla")
    assert taken == ["chunked", "reference", "decode, chunked"]
