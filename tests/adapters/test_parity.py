"""Every initialisation reproduces the numbers of the code that defines it.

The tolerances are those that come with the numbers: singular vectors have free signs, so that
products and projectors are compared.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_lab import adapters
from tests.adapters import golden

# Files of methods that this project does not have.
ELSEWHERE = {"algoperf_scoring", "analysis_misc", "merging", "schedules"}
HERE = {"corda", "eva", "lora_dora", "lora_ga", "miss", "olora", "pissa"}


def cases(file):
    return pytest.mark.parametrize("case", golden.cases(file), ids=str)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def config(case: golden.Case, **changes) -> adapters.LoraConfig:
    arguments = {
        "target_modules": ["dense"],
        "r": case["r"],
        "lora_alpha": case["alpha"],
        "use_rslora": bool(case["use_rslora"]),
    }
    return adapters.LoraConfig(**arguments | changes)


def start(case: golden.Case, dtype: type = np.float64, init=None, **changes):
    """Returns (in, r), (r, out), the base's kernel and the whole function's."""
    params = {"dense": {"kernel": jnp.asarray(case["W"].T, dtype)}}
    base, lora = adapters.init_adapters(
        params, config(case, **changes), jax.random.key(0), init=init
    )
    factors = lora["dense"]["kernel"]
    whole = adapters.apply_adapters(base, lora)["dense"]["kernel"]
    rest = base.params["dense"]["kernel"]
    assert rest.dtype == factors["lora_a"].dtype == dtype
    return tuple(np.asarray(x) for x in (factors["lora_a"], factors["lora_b"], rest, whole))


def test_every_file_is_tested():
    files = {path.stem for path in golden.FOLDER.glob("*.npz")}
    assert files
    assert files <= HERE | ELSEWHERE


def check_product(case, init, prefix="", tolerance=(5e-15, 1e-6)):
    exact, single = tolerance
    # The published bounds are absolute, for kernels with entries of about one.
    exact *= max(1.0, float(np.abs(case["W"]).max()))
    a, b, rest, whole = start(case, init=init)
    np.testing.assert_allclose(case["scaling"] * (a @ b).T, case[f"{prefix}ref64_sBA"], 0, exact)
    np.testing.assert_allclose(rest.T, case[f"{prefix}ref64_W_res"], 0, exact)
    np.testing.assert_allclose(whole.T, case["W"], 0, exact)
    a, b, rest, whole = start(case, np.float32, init=init)
    scale = np.abs(case["W"]).max()
    np.testing.assert_allclose((a @ b).T, case[f"{prefix}BA"], 0, single * np.abs(a @ b).max() * 4)
    np.testing.assert_allclose(rest.T, case[f"{prefix}W_res"], 0, single * scale * 4)
    np.testing.assert_allclose(whole.T, case["W"], 0, 1e-6 * scale)
    return a, b


@cases("pissa")
def test_pissa(case):
    a, b = check_product(case, adapters.pissa("full"))
    np.testing.assert_allclose(np.linalg.norm(a, axis=0), np.linalg.norm(b, axis=1), 1e-5)
    lengths = np.sqrt(case["ref64_S"][: case["r"]] / case["scaling"])
    np.testing.assert_allclose(np.linalg.norm(a, axis=0), lengths, 1e-5)
    np.testing.assert_allclose(np.linalg.norm(case["A"], axis=1), lengths, 1e-5)


@cases("olora")
def test_olora(case):
    _, b = check_product(case, adapters.olora())
    np.testing.assert_allclose(b @ b.T, np.eye(case["r"]), 0, 1e-6)


def gradient(case):
    """The mean gradient, from the batches, by the library."""
    params = {"dense": {"kernel": jnp.asarray(case["W"].T, np.float64)}}

    def loss(params, batch):
        x, target = batch
        return jnp.mean(0.5 * jnp.sum((x @ params["dense"]["kernel"] - target) ** 2, -1))

    batches = list(zip(case["xs"].astype(np.float64), case["targets"].astype(np.float64)))
    return adapters.estimate_gradients(loss, params, batches, config(case))


@cases("lora_ga")
def test_mean_gradient(case):
    found = gradient(case)["dense/kernel"].T
    np.testing.assert_allclose(found, case["mean_grad64"], 0, 1e-12 * np.abs(found).max())


AUTHORS: dict[str, Any] = {"stable": "stable", "gd": "gd", "unit": "unit", "weightS": "weight_svd"}
PEFT: dict[str, Any] = {
    "stable": "stable",
    "gd_scale": "gd",
    "unit": "unit",
    "weight_svd": "weight_svd",
}


@cases("lora_ga")
def test_lora_ga_is_the_authors(case):
    gradients = {"dense/kernel": case["mean_grad64"].T}
    u, _, vt = np.linalg.svd(case["mean_grad64"], full_matrices=False)
    rank = case["r"]
    names = case.names(r"auth_.*_factor64")
    assert names
    for name in names:
        _, direction, scale, _ = name.split("_")
        init = adapters.lora_ga(
            gradients,
            direction=direction,
            scale=AUTHORS[scale],
            stable_gamma=case["gamma"],
        )
        a, b, _, whole = start(case, init=init)
        square = case[name] ** 2
        np.testing.assert_allclose(a @ a.T / square, case["ref64_projA_" + direction], 0, 1e-9)
        np.testing.assert_allclose(b.T @ b / square, case["ref64_projB_" + direction], 0, 1e-9)
        pairing = np.abs(u[:, : 2 * rank].T @ (a @ b).T @ vt[: 2 * rank].T) / square
        expected = np.zeros((2 * rank, 2 * rank))
        expected[case["idxB_" + direction], case["idxA_" + direction]] = 1
        np.testing.assert_allclose(pairing, expected, 0, 1e-9)
        np.testing.assert_allclose(whole.T, case["W"], 0, 1e-13)
        # The authors' own arrays are float32 from a randomised decomposition: 7e-6 of c^2.
        stem = name.removesuffix("factor64")
        np.testing.assert_allclose(a @ a.T, case[stem + "A"].T @ case[stem + "A"], 0, 2e-5 * square)
        np.testing.assert_allclose(b.T @ b, case[stem + "B"] @ case[stem + "B"].T, 0, 2e-5 * square)


@cases("lora_ga")
def test_lora_ga_of_peft(case):
    gradients = {"dense/kernel": case["mean_grad64"].T}
    names = case.names(r"peft_.*_W_res")
    assert names
    for name in names:
        stem = name.removesuffix("W_res")
        _, direction, scale = stem.strip("_").split("_", 2)
        init = adapters.lora_ga(
            gradients,
            direction=direction,
            scale=PEFT[scale],
            stable_gamma=case["gamma"],
            compat="peft",
        )
        a, b, _, whole = start(case, init=init)
        # Signs are free; float32 and a randomised decomposition.
        theirs = case[stem + "A"].astype(np.float64), case[stem + "B"].astype(np.float64)
        ours_b, theirs_b = b.T @ b, theirs[1] @ theirs[1].T
        factor = 1.0
        if scale == "weight_svd":
            # peft draws r test vectors for the largest singular value of the kernel, without any
            # more: one draw, never above the value and seldom below 0.87 of it.
            factor = float(np.sum(ours_b * theirs_b) / np.sum(theirs_b**2))
            assert 1 - 2e-5 <= factor <= 1.35
        u, _, vt = np.linalg.svd(case["mean_grad64"], full_matrices=False)
        pairing, paired = (np.abs(u.T @ ba @ vt.T) for ba in ((a @ b).T, theirs[1] @ theirs[0]))
        for found, expected in (
            (a @ a.T, theirs[0].T @ theirs[0]),
            (ours_b, factor * theirs_b),
            (pairing, factor**0.5 * paired),
        ):
            np.testing.assert_allclose(found, expected, 0, 2e-5 * np.abs(expected).max())
        np.testing.assert_allclose(whole.T, case["W"], 0, 1e-13)


def covariances(case):
    params = {"dense": {"kernel": jnp.asarray(case["W"].T, np.float64)}}

    def forward(params, x):
        return x @ params["dense"]["kernel"]

    batches = case["xs"].astype(np.float64)
    return adapters.estimate_covariances(forward, params, batches, config(case))


@cases("corda")
def test_second_moments(case):
    (found,) = covariances(case)["dense/kernel"]
    expected = case["ref64_cov"]
    np.testing.assert_allclose(found, expected, 0, 1e-13 * np.abs(expected).max())


@cases("corda")
def test_corda(case):
    moments = covariances(case)
    for method in ("ipm", "kpm"):
        # The reference inverts in float32: 7e-5.
        init = adapters.corda(moments, method)
        check_product(case, init, f"{method}_", tolerance=(1e-13, 7e-5))


@cases("miss")
def test_miss(case):
    init = True if case["init"] == "True" else case["init"]
    params = {"dense": {"kernel": jnp.asarray(case["W"].T)}}
    miss = adapters.MissConfig(
        target_modules=["dense"], r=case["r"], mini_r=case["mini_r"], init_weights=init
    )
    base, first = adapters.init_adapters(params, miss)

    def ours(block):  # the tiles of "bat" are transposed with their kernels
        block = np.swapaxes(block, -1, -2) if init == "bat" else block
        return {"dense": {"kernel": {"miss_block": jnp.asarray(block)}}}

    def outputs(blocks):
        kernel = adapters.apply_adapters(base, blocks)["dense"]["kernel"]
        return case["x"] @ kernel + case["bias"]

    assert first["dense"]["kernel"]["miss_block"].shape == case["block_init"].shape
    trained = ours(case["block"])
    np.testing.assert_allclose(outputs(first), case["y_init"], 0, 1e-13)
    np.testing.assert_allclose(outputs(trained), case["y"], 0, 1e-13 * np.abs(case["y"]).max())
    slope = jax.grad(lambda blocks: jnp.sum(outputs(blocks) ** 2))(trained)
    expected = ours(case["grad_block_sumsq"])["dense"]["kernel"]["miss_block"]
    # The reference's "bat" goes through float32 on its way back: 2e-7 of the largest entry.
    tolerance = 1e-6 if init == "bat" else 1e-12
    np.testing.assert_allclose(
        slope["dense"]["kernel"]["miss_block"], expected, 0, tolerance * np.abs(expected).max()
    )
    merged = adapters.merge_adapters(base, trained)
    np.testing.assert_allclose(merged.params["dense"]["kernel"].T, case["W_merged"], 0, 1e-14)
    unmerged = adapters.unmerge_adapters(merged, trained).params["dense"]["kernel"]
    np.testing.assert_allclose(unmerged.T, case["W"], 0, 1e-13)  # theirs: 4e-7 for "bat"


@cases("lora_dora")
def test_lora_and_dora(case):
    dora = bool(case["use_dora"])
    params = {"dense": {"kernel": jnp.asarray(case["W"].T)}}
    base, first = adapters.init_adapters(params, config(case, use_dora=dora), jax.random.key(0))
    factors = {"lora_a": jnp.asarray(case["A"].T), "lora_b": jnp.asarray(case["B"].T)}
    if dora:
        magnitude = first["dense"]["kernel"]["lora_magnitude"]
        np.testing.assert_allclose(magnitude, case["magnitude_init"], 0, 1e-14)
        factors["lora_magnitude"] = jnp.asarray(case["magnitude"])
    trained = {"dense": {"kernel": factors}}

    def outputs(lora):
        return case["x"] @ adapters.apply_adapters(base, lora)["dense"]["kernel"] + case["bias"]

    assert base.kernels[0].scaling == pytest.approx(case["scaling"], rel=1e-15)
    np.testing.assert_allclose(outputs(first), case["y_init"], 0, 1e-13)
    np.testing.assert_allclose(outputs(trained), case["y"], 0, 1e-13 * np.abs(case["y"]).max())
    slope = jax.grad(lambda lora: jnp.sum(outputs(lora) ** 2))(trained)["dense"]["kernel"]
    pairs = [("lora_a", case["gA"].T), ("lora_b", case["gB"].T)]
    pairs += [("lora_magnitude", case["gmag"])] if dora else []
    for name, expected in pairs:
        np.testing.assert_allclose(slope[name], expected, 0, 1e-12 * np.abs(expected).max())
    merged = adapters.merge_adapters(base, trained)
    np.testing.assert_allclose(merged.params["dense"]["kernel"].T, case["W_merged"], 0, 1e-13)
    unmerged = adapters.unmerge_adapters(merged, trained).params["dense"]["kernel"]
    np.testing.assert_allclose(unmerged.T, case["W"], 0, 1e-13)
