"""EVA: the directions in which inputs vary most, and ranks where they explain most."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_lab import adapters
from tests.adapters import golden, models


def data():
    with np.load(golden.FOLDER / "eva.npz") as arrays:
        return dict(arrays)


def forward(params, x):
    hidden = jnp.tanh(x @ params["l1"]["kernel"] + params["l1"]["bias"])
    return hidden @ params["l2"]["kernel"] + params["l2"]["bias"]


def parameters(found, dtype):
    return {
        layer: {
            "kernel": jnp.asarray(found[f"param_{layer}.weight"].T, dtype),
            "bias": jnp.asarray(found[f"param_{layer}.bias"], dtype),
        }
        for layer in ("l1", "l2")
    }


def test_components_are_those_of_a_centred_pca_and_of_peft():
    found = data()
    with jax.enable_x64(True):
        params = parameters(found, np.float64)
        config = adapters.LoraConfig(
            target_modules=["l1", "l2"], r=int(found["r"]), lora_alpha=float(found["alpha"])
        )
        batches = [jnp.asarray(found[f"x{i}"], np.float64) for i in range(4)]
        scatter = adapters.estimate_scatter(forward, params, batches, config)
        config, init = adapters.eva(scatter, config, rho=float(found["rho"]))
        base, lora = adapters.init_adapters(params, config, init=init)
        for one, other in zip(*map(jax.tree.leaves, (base.params, params))):
            np.testing.assert_array_equal(one, other)
        assert not base.gave_up
        kernels = {kernel.name.split("/")[0]: kernel for kernel in base.kernels}
        for layer in ("l1", "l2"):
            assert kernels[layer].r == found[f"rank_{layer}"]
            assert kernels[layer].scaling == pytest.approx(found[f"scaling_{layer}"])
            rows = np.asarray(lora[layer]["kernel"]["lora_a"]).T
            largest = np.take_along_axis(rows, np.abs(rows).argmax(1)[:, None], 1)
            assert (largest > 0).all()  # the same signs whatever the decomposition gives
            exact = found[f"pca64_V_{layer}"]
            # The inputs of l2 in the file are float32.
            np.testing.assert_allclose(np.abs(rows @ exact.T), np.eye(3), 0, 1e-6)
            values = np.linalg.eigvalsh(scatter[f"{layer}/kernel"][0])[::-1]
            np.testing.assert_allclose(np.sqrt(values), found[f"pca64_S_{layer}"], 1e-5)
            # Theirs is incremental and randomized: cosines of 0.996 and more.
            theirs = found[f"A_{layer}"].astype(np.float64)
            assert np.linalg.svd(rows @ theirs.T, compute_uv=False).min() > 0.996
            assert not lora[layer]["kernel"]["lora_b"].any()
        whitened = adapters.eva(scatter, config, whiten=True, rho=1.0)[1]
        _, white = adapters.init_adapters(params, config, init=whitened)
        plain, thinner = (x["l1"]["kernel"]["lora_a"] for x in (lora, white))
        np.testing.assert_allclose(thinner * np.sqrt(found["pca64_S_l1"][:3]), plain, 1e-4, 1e-7)


def test_batches_masks_and_means_change_nothing():
    """The sums about a mean do not depend on how rows come, nor on how large the mean is."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(24, 5)) + 1000.0
    params = {"w": jnp.ones((5, 4))}
    config = adapters.LoraConfig(target_modules=["w"], r=1)
    expected = (rows - rows.mean(0)).T @ (rows - rows.mean(0))

    def model(params, batch):
        return batch["x"] @ params["w"]

    x = jnp.asarray(rows, jnp.float32).reshape(4, 6, 5)
    whole = [{"x": x}]
    parts = [{"x": x[:1]}, {"x": x[1:]}]
    padded = [{"x": jnp.concatenate([x, jnp.full((4, 2, 5), jnp.nan)], 1)}]

    def mask(batch):
        return ~jnp.isnan(batch["x"][..., 0])

    for batches, given in ((whole, None), (parts, None), (padded, mask)):
        found = adapters.estimate_scatter(model, params, batches, config, mask=given)["w"]
        # float32 rows of about 1000 are known to 6e-5, and so are 24 products of them.
        np.testing.assert_allclose(found[0], expected, 0, 24 * 4 * 6e-5)
    with pytest.raises(ValueError, match=r"the mask has shape \(6,\); the inputs of kernel 'w'"):
        adapters.estimate_scatter(model, params, whole, config, mask=lambda b: jnp.ones(6))


def layered(params, x):
    """A stack, each of whose layers is used at each of three steps."""

    def layer(x, kernel):
        def step(x, _):
            return jnp.tanh(x @ kernel), x

        return jax.lax.scan(step, x, length=3)

    return jax.lax.scan(layer, x, params["layers"])


def test_layers_of_a_stack_are_kept_apart_where_each_is_used_again_and_again():
    params = {"layers": models.draw(1, 2, 4, 4)}
    x = models.draw(2, 5, 4)
    config = adapters.LoraConfig(
        target_modules=["layers"], r=1, kernel_axes={"layers": models.STACKED}
    )
    _, inputs = layered(params, x)
    scatter = adapters.estimate_scatter(layered, params, [x], config)["layers"]
    moments = adapters.estimate_covariances(layered, params, [x], config)["layers"]
    for one, moment, rows in zip(scatter, moments, np.asarray(inputs, np.float64)):
        flat = rows.reshape(-1, 4)
        expected = (flat - flat.mean(0)).T @ (flat - flat.mean(0))
        np.testing.assert_allclose(one, expected, 0, 1e-5 * np.abs(expected).max())
        scaled = [step / np.abs(step.max()) for step in rows]
        expected = sum(step.T @ step for step in scaled) / 3
        np.testing.assert_allclose(moment, expected, 0, 1e-5 * np.abs(expected).max())


def test_ranks_go_where_directions_explain_most():
    def spread(*variances):
        return np.diag(np.asarray(variances))[None]

    scatter = {
        "a/kernel": spread(97.0, 1.0, 1.0, 1.0),
        "b/kernel": spread(40.0, 30.0, 20.0, 10.0),
        "c/kernel": spread(25.0, 25.0, 25.0, 25.0),
    }
    params = {n: {"kernel": models.draw(i, 4, 6)} for i, n in enumerate("abc")}
    config = adapters.LoraConfig(
        target_modules=["a", "b", "c"], r=2, lora_alpha=4, alpha_pattern={"b": 6}
    )
    new, init = adapters.eva(scatter, config)
    ranks = {kernel.name[0]: kernel.r for kernel in new.kernels(params)}
    # 0.97; 0.4, 0.3; then four of 0.25, of which three are left.
    assert ranks == {"a": 1, "b": 2, "c": 3}
    scalings = {kernel.name[0]: kernel.scaling for kernel in new.kernels(params)}
    assert scalings == pytest.approx({"a": 2, "b": 3, "c": 2})
    kept, _ = adapters.eva(scatter, config, adjust_scaling_factors=False)
    scalings = {kernel.name[0]: kernel.scaling for kernel in kept.kernels(params)}
    assert scalings == pytest.approx({"a": 4, "b": 3, "c": 4 / 3})
    base, lora = adapters.init_adapters(params, new, init=init)
    for leaf, other in zip(*map(jax.tree.leaves, (adapters.apply_adapters(base, lora), params))):
        np.testing.assert_array_equal(leaf, other)
    np.testing.assert_array_equal(np.abs(lora["b"]["kernel"]["lora_a"]), np.eye(4)[:, :2])
    same, _ = adapters.eva(scatter, config, rho=1)
    assert [kernel.r for kernel in same.kernels(params)] == [2, 2, 2]
    # A kernel that explains little of its own has no adapter.
    one = adapters.LoraConfig(target_modules=["a", "b", "c"], r=1)
    new, init = adapters.eva(scatter, one, rho=3)
    assert {k.name[0]: k.r for k in new.kernels(params)} == {"a": 1, "b": 2}
    # A stack has one rank, which costs all of its matrices.
    stack = {
        "a/kernel": np.tile(spread(97.0, 1.0, 1.0, 1.0), (3, 1, 1)),
        "b/kernel": scatter["b/kernel"],
    }
    params = {"a": {"kernel": models.draw(9, 3, 4, 6)}, "b": {"kernel": models.draw(8, 4, 6)}}
    axes = {"a": models.STACKED}
    config = adapters.LoraConfig(target_modules=["a", "b"], r=2, kernel_axes=axes)
    new, init = adapters.eva(stack, config)
    assert {k.name[0]: k.r for k in new.kernels(params)} == {"a": 1, "b": 4}
    _, lora = adapters.init_adapters(params, new, init=init)
    assert lora["a"]["kernel"]["lora_a"].shape == (3, 4, 1)


def test_more_directions_than_outputs_are_allowed():
    params = {"a": {"kernel": models.draw(1, 6, 2)}, "b": {"kernel": models.draw(2, 4, 6)}}
    config = adapters.LoraConfig(target_modules=["a", "b"], r=2)
    scatter = {"a/kernel": np.eye(6)[None], "b/kernel": np.diag([100.0, 1, 1, 1])[None]}
    config, init = adapters.eva(scatter, config)
    _, lora = adapters.init_adapters(params, config, init=init)
    assert lora["a"]["kernel"]["lora_a"].shape == (6, 3)


def test_bad_input_is_named():
    params = {"w": jnp.ones((4, 6))}
    config = adapters.LoraConfig(target_modules=["w"], r=2)
    scatter = {"w": np.eye(4)[None]}
    for arguments, message in [
        (({"w": np.eye(4)}, config), r"scatter of 'w' has shape \(4, 4\); expected \(matrices"),
        (({"w": np.zeros((1, 4, 4))}, config), "inputs of kernel 'w' do not vary"),
        (({"w": np.full((1, 4, 4), np.nan)}, config), "do not vary, or are not finite"),
    ]:
        with pytest.raises(ValueError, match=message):
            adapters.eva(*arguments)
    with pytest.raises(ValueError, match=r"rho must be at least 1, got 0.5"):
        adapters.eva(scatter, config, rho=0.5)
    with pytest.raises(TypeError, match="config must be a LoraConfig, got MissConfig"):
        adapters.eva(scatter, adapters.MissConfig(target_modules=["w"]))  # type: ignore[arg-type]
    for wrong, found in (({}, "nothing"), (None, "NoneType")):
        with pytest.raises(TypeError, match=f"scatter must be a dict .*, got {found}"):
            adapters.eva(wrong, config)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="whiten must be True or False"):
        adapters.eva(scatter, config, whiten="x")  # type: ignore[arg-type]
    new, init = adapters.eva(scatter, config)
    other = adapters.LoraConfig(target_modules=["w"], r=1)
    with pytest.raises(ValueError, match=r"kernel 'w' has r=1, and the directions are for r=2"):
        adapters.init_adapters(params, other, init=init)
    with pytest.raises(ValueError, match=r"shape \(1, 4, 4\); expected \(1, 5, 5\)"):
        adapters.init_adapters({"w": jnp.ones((5, 6))}, new, init=init)
    for fun, batches, message in [
        (lambda p, x: jnp.sin(p["w"]), [0.0], "found no product .* kernel 'w'"),
        (lambda p, x: x @ p["w"], [], "at least one batch"),
    ]:
        with pytest.raises(ValueError, match=message):
            adapters.estimate_scatter(fun, params, batches, config)
