from __future__ import annotations

import functools
import re
import shutil
import subprocess
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import _compat
from pallas_kernels.attention import triton
from pallas_kernels.attention.mask import PARTIAL, SKIP, WHOLE
from pallas_kernels.attention.problem import Device
from pallas_kernels.attention.triton import ROUTE, Blocks, Config
from pallas_kernels.targets import compile_in_child
from tests.pallas_kernels.attention import cases
from tests.pallas_kernels.attention import triton_cases as programs
from tests.pallas_kernels.attention.cases import CASES, Case, some_slow
from tests.pallas_kernels.targets import needs

# So small that windows and causal masks have tiles to skip, whole ones and partial ones, and no two
# kernels alike.
SMALL = Config(
    Blocks(32, 64, 4, 2), Blocks(64, 32, 4, 2), Blocks(32, 32, 4, 2), Blocks(16, 64, 4, 1)
)

CAUSAL = Case("causal", right=0)
BY_NAME = {case.name: case for case in CASES}


def check(case: Case, config: Config | None = SMALL) -> None:
    cases.check_route(ROUTE, case, config=config, interpret=True)


@pytest.mark.parametrize("case", some_slow(CASES))
def test_values_and_gradients(case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", cases.BY_DISTANCE[:2], ids=str)
def test_biases_by_rule(case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("grouped heads", "bfloat16"),
        ("soft cap and bias", "float16"),
        ("dropout", "bfloat16"),
        ("dropout", "float16"),
    ],
)
def test_coarse_types(name, dtype):
    check(BY_NAME[name].replace(dtype=dtype))


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [111, 128, 192])
def test_head_dims(head_dim):
    check(CAUSAL.replace(head_dim=head_dim, queries=70, keys=64, heads=1, kv_heads=1))


@pytest.mark.slow
@pytest.mark.parametrize(("queries", "keys"), [(1, 65), (33, 1), (3, 7)])
def test_short_lengths(queries, keys):
    check(Case("short", queries=queries, keys=keys, bias="nts", sinks=True))


@pytest.mark.slow
@pytest.mark.parametrize("bias", ["ts", "bts", "s", "bnt", "b"])
def test_gradient_of_a_broadcast_bias(bias):
    check(Case("bias", batch=2, queries=64, keys=70, heads=4, kv_heads=2, head_dim=16, bias=bias,
               right=3))  # fmt: skip


@pytest.mark.slow
def test_default_blocks_are_right():
    check(CAUSAL.replace(head_dim=16, queries=300, keys=300, heads=1, kv_heads=1), config=None)


@pytest.mark.slow
def test_blocks_change_nothing_but_rounding():
    case = BY_NAME["dropout, causal, grouped"]
    problem = cases.build(case)
    results = []
    for blocks in (Blocks(16, 16, 4, 1), Blocks(64, 128, 4, 1)):
        settings = problem.settings._replace(config=Config(*[blocks] * 4), interpret=True)
        results.append(forward(settings, problem.operands))
    for one, other in zip(*results):
        np.testing.assert_allclose(one, other, atol=5e-6)


def forward(settings: Any, operands: Any) -> Any:
    return cases.quick_jit(functools.partial(ROUTE.forward, settings))(operands)


def backward(settings: Any, *arrays: Any, bias_gradient: bool) -> Any:
    run: Any = ROUTE.backward
    return cases.quick_jit(lambda *arrays: run(settings, *arrays, bias_gradient))(*arrays)


def with_bias(problem: cases.Problem, change: Any) -> cases.Problem:
    bias = problem.operands.bias
    assert bias is not None
    return problem._replace(operands=problem.operands._replace(bias=change(bias)))


def run(problem: cases.Problem, config: Config = SMALL) -> cases.Result:
    settings = problem.settings._replace(config=config, interpret=True)
    return cases.run(lambda operands: cases.core.attend(ROUTE, settings, operands), problem)


@pytest.mark.slow
def test_bias_behind_the_mask_may_be_nan():
    problem = cases.build(
        Case("bias", bias="nts", right=0, soft_cap=3.0, head_dim=16, queries=64, keys=64)
    )
    hidden = jnp.arange(64)[None, :] > jnp.arange(64)[:, None]
    behind = with_bias(problem, lambda bias: jnp.where(hidden[None, None], jnp.nan, bias))
    for got, want in zip(run(behind), run(problem)):
        np.testing.assert_array_equal(got, want)


def test_bias_of_minus_infinity_hides_whole_rows():
    problem = cases.build(Case("bias", bias="nts", head_dim=16, queries=64, keys=64))
    result = run(with_bias(problem, lambda bias: bias.at[:, :, 20:40].set(-jnp.inf)))
    assert (result.output[:, 20:40] == 0).all()
    assert (result.lse[:, :, 20:40] == -np.inf).all()
    assert (result.query[:, 20:40] == 0).all()
    for gradient in (result.query, result.key, result.value, result.bias):
        assert np.isfinite(gradient).all()


def test_lowest_finite_bias_is_not_minus_infinity():
    problem = cases.build(Case("bias", bias="bts", head_dim=16, queries=32, keys=32))
    lowest = with_bias(problem, lambda bias: jnp.full_like(bias, jnp.finfo(bias.dtype).min))
    settings = problem.settings._replace(config=SMALL, interpret=True)
    output, lse = forward(settings, lowest.operands)
    mean = jnp.broadcast_to(problem.operands.value.mean(axis=1, keepdims=True), output.shape)
    np.testing.assert_allclose(output, mean, atol=1e-6)
    assert np.isfinite(lse).all()


@pytest.mark.slow
def test_tiles_that_nobody_sees_are_not_read():
    """Products with NaN keys show, also behind a mask, so these are never formed."""
    problem = cases.build(Case("window", left=31, right=0, head_dim=16, queries=128, keys=128))
    x = problem.operands
    # Blocks of keys 32 to 63; rows 32 to 95 see some of them.
    key = x.key.at[:, 32:64].set(jnp.nan)
    blocks = Config(*[Blocks(32, 32, 4, 1)] * 4)
    settings = problem.settings._replace(config=blocks, interpret=True)
    output, lse = forward(settings, x._replace(key=key))
    seen = np.r_[32:95]
    assert np.isnan(np.asarray(output)[:, seen]).all()
    assert np.isfinite(np.delete(np.asarray(output), np.r_[32:96], axis=1)).all()
    d_output, delta = problem.cotangents
    finite = jnp.nan_to_num(lse)
    arrays = x._replace(key=key), finite, d_output, delta
    gradients = backward(settings, *arrays, bias_gradient=False)
    assert np.isfinite(np.delete(np.asarray(gradients.query), np.r_[32:96], axis=1)).all()
    assert np.isfinite(np.delete(np.asarray(gradients.key), np.r_[32:64], axis=1)).all()
    assert gradients.bias is None


def test_segments_visit_from_the_first_to_the_last_tile_that_they_need():
    kinds = {
        (SKIP, PARTIAL, WHOLE, WHOLE, PARTIAL): (1, 5, 2, 4),
        (PARTIAL, WHOLE, SKIP, WHOLE, SKIP): (0, 4, 0, 0),  # what is between is masked
        (SKIP, SKIP, PARTIAL, PARTIAL, SKIP): (2, 4, 2, 2),
        (WHOLE, WHOLE, WHOLE, WHOLE, WHOLE): (0, 5, 0, 5),
        (SKIP, SKIP, SKIP, SKIP, SKIP): (0, 0, 0, 0),
    }
    got = triton._spans(jnp.array([list(kinds)], jnp.int32))
    np.testing.assert_array_equal(got[0], list(kinds.values()))


@pytest.mark.slow
def test_repeats_are_bit_equal():
    problem = cases.build(BY_NAME["bias, one for all"].replace(head_dim=16))
    for one, other in zip(run(problem), run(problem)):
        if one is not None:
            np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_64_bit_types_and_strict_promotion_change_nothing():
    problem = cases.build(BY_NAME["everything"].replace(head_dim=16, queries=50, keys=40, batch=2,
                          query_lengths=(40, 50), key_value_lengths=(40, 30)))  # fmt: skip
    settings = problem.settings._replace(config=SMALL, interpret=True)
    x, (d_output, d_lse) = problem.operands, problem.cotangents
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        output, lse = forward(settings, x)
        finite = jnp.where(jnp.isfinite(lse), lse, 0)
        gradients = backward(settings, x, finite, d_output, d_lse, bias_gradient=True)
    for got in (output, lse, *gradients[:4]):
        assert got is not None
        assert got.dtype == jnp.float32


def test_precision_reaches_the_products():
    problem = cases.build(Case("plain", head_dim=16, queries=16, keys=16))
    for precision, expected in ((None, set()), ("highest", {"HIGHEST"}), ("high", {"HIGH"})):
        settings = problem.settings._replace(precision=precision, config=SMALL, interpret=True)
        jaxpr = str(jax.make_jaxpr(lambda x, s=settings: ROUTE.forward(s, x))(problem.operands))
        assert jaxpr.count("dot_general") >= 2
        found = re.findall(r"precision=\(?(?:Precision\.)?(\w+)", jaxpr)
        assert set(found) - {"None", "DEFAULT"} == expected


A100 = Device("gpu", "NVIDIA A100-SXM4-80GB", (8, 0))


@pytest.mark.parametrize(
    ("case", "settings", "device", "reason"),
    [
        (CAUSAL, {}, A100, None),
        (CAUSAL, {"interpret": True}, Device("cpu", "cpu"), None),
        (CAUSAL, {}, Device("cpu", "cpu"), "needs an NVIDIA GPU, not cpu"),
        (CAUSAL, {}, Device("gpu", "Tesla T4", (7, 5)), "needs compute capability 8.0"),
        (CAUSAL, {"interpret": object()}, A100, "plain interpreter only"),
        (CAUSAL.replace(head_dim=257), {}, A100, "at most 256"),
        (CAUSAL.replace(keys=0), {}, A100, "length zero"),
    ],
)
def test_refusals(case, settings, device, reason):
    problem = cases.build(case)
    answer = ROUTE.refusal(problem.settings._replace(**settings), problem.operands, device)
    assert (answer is None) == (reason is None)
    assert reason is None or reason in str(answer)


def test_other_types_are_refused():
    operands = cases.build(CAUSAL).operands
    operands = operands._replace(query=operands.query.astype(jnp.float8_e4m3fn))
    settings = cases.build(CAUSAL).settings
    assert "not float8_e4m3fn" in str(ROUTE.refusal(settings, operands, A100))


@pytest.mark.parametrize("blocks", [Blocks(48, 64, 4, 2), Blocks(64, 8, 4, 2)])
def test_blocks_that_cannot_be_are_named(blocks):
    problem = cases.build(CAUSAL)
    settings = problem.settings._replace(config=Config(dq=blocks), interpret=True)
    reason = ROUTE.refusal(settings, problem.operands, A100)
    assert reason == f"takes blocks that are powers of two, at least 16, not {blocks}"


def test_only_the_deprecation_of_the_lowering_is_silenced():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _compat.silence_triton()
        warnings.warn("The Pallas Triton backend is deprecated and", DeprecationWarning, 2)
        with pytest.raises(DeprecationWarning, match="another"):
            warnings.warn("another", DeprecationWarning, 2)


def spills(folder: Path, arch: str) -> dict[str, list[int]]:
    """Returns bytes of spill stores and loads of each kernel, from its PTX and ptxas."""
    found = {}
    for path in folder.glob("*.ptx"):
        names = re.findall(r"\.entry (attention\w+)\(", path.read_text())
        if names:
            command = ["ptxas", f"-arch={arch}", "-v", str(path), "-o", "/dev/null"]
            report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
            found[names[0]] = [int(x) for x in re.findall(r"(\d+) bytes spill", report)]
    return found


ARCHITECTURES = {"a100": "sm_80", "l4": "sm_89", "h200": "sm_90a", "b200": "sm_100a"}
EVERY = ("causal_64", "causal_128", "causal_256", "bias_64", "segments_64", "float32_64")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chip", "program"),
    [needs.on(chip, program) for chip in ARCHITECTURES for program in EVERY]
    + [needs.on("l4", program) for program in ("full_bias_64", "everything_64", "ragged_80")]
    + [needs.on(chip, x) for chip in ("a100", "h200") for x in ("by_rule_64", "prefixes_64")]
    + [needs.on("h200", "by_rule_128"), needs.on("a100", "by_rule_256")],
)
def test_compiles(chip, program, tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", f"--xla_dump_to={tmp_path}")
    report = compile_in_child(f"{programs.__name__}:{program}", chip)
    # delta, and the ranges of segment ids: no term grows with T S.
    rows = programs.BATCH * programs.HEADS * programs.LENGTH
    if program != "everything_64":
        diagonals = 2 * 4 * rows if program.startswith("by_rule") else 0
        assert report["memory"]["temp"] <= 2 * 4 * rows + diagonals
    if shutil.which("ptxas") is None:
        pytest.skip("compiled; no ptxas for the report of spills")
    reports = spills(tmp_path, ARCHITECTURES[chip])
    if not reports and jax.__version_info__ >= (0, 11):
        pytest.skip("compiled; this XLA dumps no PTX of Triton kernels")
    assert {"attention_forward", "attention_dkv", "attention_dq"} <= set(reports)
    if program != "everything_64":
        assert {name: sum(x) for name, x in reports.items()} == dict.fromkeys(reports, 0)
