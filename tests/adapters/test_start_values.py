"""What each start promises of its values, and what it refuses."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_lab import adapters
from jaxopt_lab.adapters import _kernels
from tests.adapters import models
from tests.adapters.models import config, model

KEY = jax.random.key(0)


def test_pissa_is_the_best_approximation():
    """What stays in the base is the rest of the spectrum, for any alpha, in any axes."""
    m = model("linen")
    for alpha in (1, 16):
        base, _ = adapters.init_adapters(
            m.params, config(m, lora_alpha=alpha), init=adapters.pissa()
        )
        for kernel in base.kernels:
            rest, whole = (
                kernel.matrices(_kernels.named_leaves(p)[kernel.name])[0]
                for p in (base.params, m.params)
            )
            tail = np.linalg.svd(whole, compute_uv=False)[2:]
            np.testing.assert_allclose(np.linalg.norm(rest), np.linalg.norm(tail), 1e-5)


def test_randomized_pissa_is_as_good_as_promised():
    """With 2 r test vectors and 4 iterations the median error is 2e-4 for a slow spectrum."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(n, 24)))[0] for n in (24, 32))
    kernel = jnp.asarray(u * 0.85 ** np.arange(24) @ v.T, jnp.float32)
    lora = adapters.LoraConfig(target_modules=["w"], r=4, lora_alpha=4)
    _, exact = adapters.init_adapters({"w": kernel}, lora, init=adapters.pissa("full"))
    expected = exact["w"]["lora_a"] @ exact["w"]["lora_b"]
    errors = []
    for seed in range(9):
        _, found = adapters.init_adapters(
            {"w": kernel}, lora, jax.random.key(seed), init=adapters.pissa("randomized")
        )
        error = np.linalg.norm(found["w"]["lora_a"] @ found["w"]["lora_b"] - expected)
        errors.append(error / np.linalg.norm(expected))
    assert np.median(errors) < 1e-3


def test_bfloat16_base_loses_one_rounding():
    kernel = jax.random.normal(KEY, (12, 8)).astype(jnp.bfloat16)
    lora = adapters.LoraConfig(target_modules=["w"], r=3)
    for init in (adapters.pissa(), adapters.olora()):
        base, factors = adapters.init_adapters({"w": kernel}, lora, init=init)
        assert base.params["w"].dtype == jnp.bfloat16
        assert factors["w"]["lora_a"].dtype == jnp.float32
        a, b = (factors["w"][name] for name in ("lora_a", "lora_b"))
        whole = base.params["w"].astype(jnp.float32) + base.kernels[0].scaling * a @ b
        rest = np.abs(np.asarray(base.params["w"], np.float32))
        half_ulp = 2.0 ** (np.floor(np.log2(np.maximum(rest, 1e-30))) - 8)
        assert (np.abs(whole - kernel.astype(jnp.float32)) <= half_ulp * 1.01 + 2e-7).all()


def test_lora_ga_first_step_is_the_gradients_best_part():
    """One step of gradient descent on both factors, seen in the kernel, is parallel to the best
    part of rank 2 r, and does not depend on the loss's scale."""
    rng = np.random.default_rng(1)
    x, y = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((64, 20), (64, 24)))
    params = {"w": jnp.asarray(rng.normal(size=(20, 24)) / 5, jnp.float32)}

    def loss(params, scale):
        return scale * jnp.mean((jnp.tanh(x @ params["w"]) - y) ** 2)

    lora = adapters.LoraConfig(target_modules=["w"], r=4, lora_alpha=8, use_rslora=True)
    steps = []
    for scale in (1.0, 1000.0):
        found = adapters.estimate_gradients(loss, params, [scale], lora)
        base, factors = adapters.init_adapters(params, lora, init=adapters.lora_ga(found))

        def of_factors(factors, base=base, scale=scale):
            return loss(adapters.apply_adapters(base, factors), scale)

        assert of_factors(factors) == pytest.approx(float(loss(params, scale)), rel=2e-7 * 4)
        slope = jax.grad(of_factors)(factors)["w"]
        a, b = factors["w"]["lora_a"], factors["w"]["lora_b"]
        change = -(slope["lora_a"] @ b + a @ slope["lora_b"]) / scale
        u, s, vt = np.linalg.svd(found["w"] / scale, full_matrices=False)
        best = -(u[:, :8] * s[:8]) @ vt[:8]
        cosine = np.sum(change * best) / np.linalg.norm(change) / np.linalg.norm(best)
        assert cosine > 1 - 1e-6
        steps.append((np.asarray(a), np.asarray(change)))
    np.testing.assert_allclose(steps[0][0], steps[1][0], 0, 1e-5)
    np.testing.assert_allclose(steps[0][1], steps[1][1], 0, 1e-4 * np.abs(steps[0][1]).max())


def test_second_moments_of_stacks():
    """In a scan over layers, with experts, and over several uses of one kernel."""
    m = model("scanned")
    found = adapters.estimate_covariances(m.apply, m.params, [m.x], config(m))["layers/kernel"]
    x = np.asarray(m.x, np.float64)
    for index in range(3):
        kernel, bias = (np.asarray(m.params["layers"][n][index]) for n in ("kernel", "bias"))
        scaled = x / np.abs(x.max())
        np.testing.assert_allclose(found[index], scaled.T @ scaled, 1e-4, 1e-5)
        x = np.tanh(x @ kernel + bias)
    m = model("experts")
    found = adapters.estimate_covariances(m.apply, m.params, [m.x], config(m))["experts/kernel"]
    x = np.asarray(m.x)  # experts, batch, inputs
    scaled = x / np.abs(x.max((1, 2), keepdims=True))
    np.testing.assert_allclose(found, np.einsum("ebi,ebj->eij", scaled, scaled), 1e-5, 1e-6)

    def twice(params, x):
        return jax.lax.scan(lambda x, _: (x @ params["w"], None), x, length=2)[0]

    params, x = {"w": 2 * jnp.eye(3)}, models.draw(30, 4, 3)
    lora = adapters.LoraConfig(target_modules=["w"], r=1)
    (found,) = adapters.estimate_covariances(twice, params, [x, x], lora)["w"]
    scaled = x / np.abs(x.max())
    np.testing.assert_allclose(found, scaled.T @ scaled, 1e-5, 1e-6)  # doubling changes nothing


def test_corda_modes_share_a_kernel():
    """What one mode takes of rank r, the other leaves: together they are the kernel."""
    params = {"w": models.draw(31, 7, 5)}
    x = models.draw(32, 40, 7) * jnp.arange(1, 8)
    forward = lambda params, x: x @ params["w"]  # noqa: E731
    total = 0
    cases: Any = (("ipm", 2), ("kpm", 3))
    for method, r in cases:
        lora = adapters.LoraConfig(target_modules=["w"], r=r, lora_alpha=r)
        moments = adapters.estimate_covariances(forward, params, [x], lora)
        _, factors = adapters.init_adapters(params, lora, init=adapters.corda(moments, method))
        total += factors["w"]["lora_a"] @ factors["w"]["lora_b"]
    np.testing.assert_allclose(total, params["w"], 0, 2e-5)


def test_lora_ga_random_halves_and_clipping():
    kernel = models.draw(60, 10, 12)
    gradient = {"w": np.asarray(models.draw(61, 10, 12))}
    config = adapters.LoraConfig(target_modules=["w"], r=3, lora_alpha=3)

    def factors(**options):
        init = adapters.lora_ga(gradient, **options)
        return adapters.init_adapters({"w": kernel}, config, KEY, init=init)[1]["w"]

    u, _, vt = np.linalg.svd(gradient["w"], full_matrices=False)
    for compat in (None, "peft"):
        found = factors(direction="random", scale="unit", compat=compat)
        of_a = np.abs(u[:, :6].T @ found["lora_a"]).max(1) > 0.5
        of_b = np.abs(found["lora_b"] @ vt[:6].T).max(0) > 0.5
        assert of_a.sum() == of_b.sum() == 3
        assert (of_a == of_b).all() if compat else not (of_a & of_b).any()
    clipped, plain = (factors(stable_gamma=1e-4, norm_clip=clip) for clip in (True, False))
    largest = np.abs(kernel).max()
    assert np.abs(plain["lora_a"] @ plain["lora_b"]).max() > 2 * largest
    clipped_to = np.abs(clipped["lora_a"] @ clipped["lora_b"]).max()
    np.testing.assert_allclose(clipped_to, largest, 1e-5)


def test_gradients_in_groups_and_in_halves():
    m = model("linen")
    lora = config(m)

    def loss(p, x):
        return jnp.mean(m.apply(p, x) ** 2)

    x = models.draw(20, 4, 3, 8)
    whole = adapters.estimate_gradients(loss, m.params, [x], lora)
    halves = adapters.estimate_gradients(loss, m.params, [x[2:], x[:2]], lora, kernels_at_once=2)
    assert set(whole) == set(halves) == {k.name for k in lora.kernels(m.params)}
    for name, value in whole.items():
        assert isinstance(value, np.ndarray)
        np.testing.assert_allclose(halves[name], value, 0, 1e-6 * np.abs(value).max())


def test_gaussian_and_orthogonal():
    params = {"w": jnp.zeros((400, 300))}
    lora = adapters.LoraConfig(target_modules=["w"], r=4, init_lora_weights="gaussian")
    _, factors = adapters.init_adapters(params, lora, KEY)
    assert np.std(factors["w"]["lora_a"]) == pytest.approx(1 / 4, rel=0.1)
    assert not factors["w"]["lora_b"].any()
    lora = adapters.LoraConfig(target_modules=["w"], r=4, init_lora_weights="orthogonal")
    _, factors = adapters.init_adapters(params, lora, KEY)
    assert np.abs(factors["w"]["lora_a"] @ factors["w"]["lora_b"]).max() < 1e-6
    assert factors["w"]["lora_b"].any()
    lora = adapters.LoraConfig(target_modules=["w"], r=4)
    _, factors = adapters.init_adapters(params, lora, KEY)
    assert 0.98 / 20 < np.abs(factors["w"]["lora_a"]).max() <= 1 / 20


def test_bad_starts():
    params = {"w": jnp.ones((4, 6))}
    lora = adapters.LoraConfig(target_modules=["w"], r=2)
    good = {"w": np.ones((4, 6), np.float32)}
    for init, message in [
        (adapters.lora_ga({}), "no gradient of kernel 'w'"),
        (adapters.lora_ga({"w": np.ones((6, 4))}), r"has shape \(6, 4\), the kernel \(4, 6\)"),
        (adapters.lora_ga({"w": 0 * good["w"]}), "zero or not finite"),
        (adapters.lora_ga(good, direction="random"), "needs the key"),
        (adapters.pissa("randomized"), "needs a key"),
    ]:
        with pytest.raises(ValueError, match=message):
            adapters.init_adapters(params, lora, init=init)
    wide = adapters.LoraConfig(target_modules=["w"], r=3)
    with pytest.raises(ValueError, match=r"2 r = 6 directions .* kernel 'w'.* has 4"):
        adapters.init_adapters(params, wide, init=adapters.lora_ga(good))
    moment = {"w": np.eye(4, dtype=np.float32)}
    for init, message in [
        (adapters.corda({}), "no second moment of the inputs of kernel 'w'"),
        (adapters.corda(moment), r"has shape \(4, 4\); expected \(1, 4, 4\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            adapters.init_adapters(params, lora, init=init)
    for fun, x, message in [
        (lambda p, x: jnp.sum(p["w"]) + x, 0.0, "found no product .* kernel 'w'"),
        (lambda p, x: x @ p["w"], jnp.zeros((2, 4)), "all inputs of kernel 'w' were zero"),
    ]:
        with pytest.raises(ValueError, match=message):
            adapters.estimate_covariances(fun, params, [x], lora)
    with pytest.raises(ValueError, match="at least one batch"):
        adapters.estimate_covariances(lambda p, x: x, params, [], lora)
    wrong: Any = adapters  # what a type checker would tell
    with pytest.raises(ValueError, match="corda_method must be"):
        wrong.corda({}, "IPM")
    for make in (
        lambda: wrong.lora_ga(good, direction="AB"),
        lambda: wrong.lora_ga(good, scale="gd_scale"),
        lambda: wrong.lora_ga(good, compat="torch"),
    ):
        with pytest.raises(ValueError, match="must be"):
            make()
    with pytest.raises(ValueError, match="at least one batch"):
        adapters.estimate_gradients(lambda p, x: jnp.sum(x), params, [], lora)
    with pytest.raises(ValueError, match="method must be"):
        wrong.pissa("exact")
    miss = adapters.MissConfig(target_modules=["w"], r=3, init_weights="bat")
    with pytest.raises(ValueError, match="r=3 must divide both sides of kernel 'w'"):
        adapters.init_adapters(params, miss)
    with pytest.raises(ValueError, match="starts at zero"):
        adapters.init_adapters(
            params, adapters.MissConfig(target_modules=["w"], r=2), init=adapters.pissa()
        )
