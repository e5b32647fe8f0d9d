"""Leaves that are trained whole beside the factors: which, how, and what else acts on them."""

from __future__ import annotations

import functools
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxopt_lab
from jaxopt_lab import adapters
from tests.adapters import models

KEY = jax.random.key(0)


def tree() -> dict[str, Any]:
    layer = {
        "dense": {"kernel": models.draw(1, 4, 4), "bias": models.draw(2, 4)},
        "free": {"kernel": models.draw(3, 4, 4), "bias": models.draw(4, 4)},
        "norm": {"scale": models.draw(5, 4), "bias": models.draw(6, 4)},
    }
    return {
        "layers": {"0": layer},
        "head": {"kernel": models.draw(7, 4, 3), "bias": models.draw(8, 3)},
        "lm_head": {"kernel": models.draw(9, 4, 3)},
        "raw": {
            **{name: models.draw(10, 4, 4) for name in ("w1", "w2")},
            **{name: models.draw(11, 4) for name in ("b1", "b2")},
            "g": jnp.ones(4),
        },
        "steps": {"count": jnp.int32(3)},
    }


def apply(params, x):
    for layer in params["layers"].values():
        x = x @ layer["dense"]["kernel"] + layer["dense"]["bias"]
        x = x * layer["norm"]["scale"] + layer["norm"]["bias"]
        x = jnp.tanh(x @ layer["free"]["kernel"] + layer["free"]["bias"])
    return x @ params["head"]["kernel"] + params["head"]["bias"]


X = models.draw(12, 5, 4)


def config(**changes) -> adapters.LoraConfig:
    return adapters.LoraConfig(**{"target_modules": ["dense"], "r": 2} | changes)


@functools.cache
def start(**changes):
    changes = {k: list(v) if isinstance(v, tuple) else v for k, v in changes.items()}
    return adapters.init_adapters(tree(), config(**changes), KEY)


def trained(factors):
    """Other values, as after training."""
    return jax.tree.map(lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), factors)


LAYER = "layers/0/"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"bias": "all"}, ["head/bias", "dense", "free", "norm", "raw/b1", "raw/b2"]),
        ({"bias": "lora_only"}, ["dense"]),
        ({"bias": "lora_only", "target_modules": ["raw.w1", "lm_head"]}, ["raw/b1"]),
        # From a dot on: `lm_head` is another module.
        ({"modules_to_save": ["head"]}, ["head/bias", "head/kernel"]),
        ({"modules_to_save": ["layers/0/norm"]}, ["norm", "layers/0/norm/scale"]),
        ({"modules_to_save": ("norm", "head"), "bias": "lora_only"},
         ["head/bias", "head/kernel", "dense", "norm", "layers/0/norm/scale"]),
    ],
)  # fmt: skip
def test_biases_and_saved_modules_are_chosen_as_in_peft(changes, expected):
    base, factors = adapters.init_adapters(tree(), config(**changes), KEY)
    short = {"dense", "free", "norm"}
    full = [f"{LAYER}{name}/bias" if name in short else name for name in expected]
    assert list(base.whole) == full
    for name in full:
        value = factors
        for part in name.split("/"):
            value = value[part]
        original = tree()
        for part in name.split("/"):
            original = original[part]
        np.testing.assert_array_equal(value, original)


def test_a_saved_module_has_no_factors():
    base, factors = adapters.init_adapters(
        tree(), config(target_modules="all-linear", modules_to_save=["free", "raw"]), KEY
    )
    assert [kernel.name for kernel in base.kernels] == [f"{LAYER}dense/kernel"]
    assert set(factors["raw"]) == {"w1", "w2", "b1", "b2", "g"}
    with pytest.raises(ValueError, match=r"no kernel is left: .*modules_to_save take away all"):
        adapters.init_adapters(tree(), config(modules_to_save=["dense"]), KEY)
    with pytest.raises(ValueError, match=r"modules_to_save: 'haed' matches no module.*head"):
        adapters.init_adapters(tree(), config(modules_to_save=["haed"]), KEY)
    with pytest.raises(ValueError, match="modules_to_save: 'steps' matches no module with float"):
        adapters.init_adapters(tree(), config(modules_to_save=["steps"]), KEY)
    with pytest.raises(TypeError, match="modules_to_save must be a list of names or None"):
        config(modules_to_save="head")
    with pytest.raises(ValueError, match="bias must be one of none, all, lora_only, got 'lora'"):
        config(bias="lora")
    with pytest.raises(ValueError, match="task_type must be one of SEQ_CLS"):
        config(task_type="causal")


WHOLE = {"bias": "lora_only", "modules_to_save": ("head", "norm")}


def test_the_function_starts_unchanged_and_whole_leaves_are_replaced():
    base, factors = start(**WHOLE)
    for use in (adapters.apply_adapters, lambda b, f: adapters.merge_adapters(b, f).params):
        for one, other in zip(*map(jax.tree.leaves, (use(base, factors), tree()))):
            np.testing.assert_array_equal(one, other)
    new = trained(factors)
    params = jax.jit(adapters.apply_adapters)(base, new)
    np.testing.assert_array_equal(params["head"]["kernel"], new["head"]["kernel"])
    np.testing.assert_array_equal(
        params["layers"]["0"]["dense"]["bias"], new["layers"]["0"]["dense"]["bias"]
    )
    expected = apply(params, X)
    found = adapters.factored(apply)(base, new, X)
    np.testing.assert_allclose(found, expected, 1e-5, 1e-6)
    # Gradients: both ways, and for a whole leaf that of the leaf itself.
    direct = jax.grad(lambda p: jnp.sum(apply(p, X) ** 2), allow_int=True)(params)
    for way in (
        lambda f: apply(adapters.apply_adapters(base, f), X),
        lambda f: adapters.factored(apply)(base, f, X),
    ):
        slope = jax.grad(lambda f, way=way: jnp.sum(way(f) ** 2))(new)
        np.testing.assert_allclose(
            slope["head"]["kernel"], direct["head"]["kernel"], 0, 1e-4 * np.abs(expected).max()
        )


def test_merging_restores_the_leaves_of_the_base_exactly():
    base, factors = start(**WHOLE)
    merged = adapters.merge_adapters(base, trained(factors))
    back = adapters.unmerge_adapters(merged, trained(factors))
    assert back.whole == base.whole
    assert back.undo == {}
    np.testing.assert_array_equal(back.params["head"]["kernel"], tree()["head"]["kernel"])
    again: Any = flax.serialization.from_bytes(merged, flax.serialization.to_bytes(merged))
    back = adapters.unmerge_adapters(again, trained(factors))
    np.testing.assert_array_equal(back.params["head"]["bias"], tree()["head"]["bias"])


def test_donated_adapters_leave_base_and_merged_parameters_alone():
    base, factors = adapters.init_adapters(tree(), config(modules_to_save=["head"]), KEY)
    merged = adapters.merge_adapters(base, factors)
    step = jax.jit(lambda f: jax.tree.map(lambda x: x + 1, f), donate_argnums=0)
    step(factors)
    assert factors["head"]["kernel"].is_deleted()
    np.testing.assert_array_equal(base.params["head"]["kernel"], tree()["head"]["kernel"])
    np.testing.assert_array_equal(merged.params["head"]["kernel"], tree()["head"]["kernel"])


def test_dtypes_and_shardings_are_the_leaves_own():
    params = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree()
    )
    mesh = jax.make_mesh((2,), ("m",), devices=jax.devices()[:2])
    sharding = NamedSharding(mesh, P("m"))
    params["head"]["kernel"] = jax.device_put(params["head"]["kernel"], sharding)
    base, factors = adapters.init_adapters(params, config(modules_to_save=["head"]), KEY)
    assert factors["head"]["kernel"].dtype == jnp.bfloat16
    assert factors["layers"]["0"]["dense"]["kernel"]["lora_a"].dtype == jnp.float32
    assert factors["head"]["kernel"].sharding.is_equivalent_to(sharding, 2)
    wide = config(modules_to_save=["head"], adapter_dtype="float32")
    base, factors = adapters.init_adapters(params, wide, KEY)
    assert factors["head"]["kernel"].dtype == jnp.float32
    assert adapters.apply_adapters(base, factors)["head"]["kernel"].dtype == jnp.bfloat16
    for name in ("bf16", "int32", 5):
        with pytest.raises(ValueError, match="adapter_dtype must be"):
            config(adapter_dtype=name)
        with pytest.raises(ValueError, match="adapter_dtype must be"):
            adapters.MissConfig(target_modules=["w"], adapter_dtype=name)


def test_in_nnx_states_and_modules():
    m = models.nnx_state()
    lora = adapters.LoraConfig(target_modules=["query"], r=2, bias="all", modules_to_save=["dense"])
    for params in (m.params, models.nnx_module().params):
        base, factors = adapters.init_adapters(params, lora, KEY)
        assert "dense/kernel" in base.whole
        assert "attention/query/bias" in base.whole
        assert not any(name.endswith("value") for name in base.whole)
        new = trained(factors)
        applied = adapters.apply_adapters(base, new)
        found = applied["dense"]["kernel"] if params is m.params else applied.dense.kernel
        np.testing.assert_array_equal(found[...], new["dense"]["kernel"])


def test_optimizers_labels_and_counts():
    base, factors = start(**WHOLE)
    labels = adapters.lora_plus_labels(factors)
    assert labels["head"] == {"kernel": "a", "bias": "b"}
    assert labels["layers"]["0"]["dense"] == {"kernel": {"lora_a": "a", "lora_b": "b"}, "bias": "b"}
    heads = {"query": {"bias": jnp.zeros((2, 3))}, "norm": {"scale": jnp.zeros((3, 4))}}
    assert adapters.lora_plus_labels(heads) == {"query": {"bias": "b"}, "norm": {"scale": "b"}}
    counts = adapters.trainable_parameters(base, factors)
    assert counts.trained == 2 * (4 + 4) + 4 + 15 + 8
    assert ("head/kernel", "-", "whole", "-", "-", "12") in counts.kernels
    mask = jax.tree_util.tree_map_with_path(lambda path, _: path[0].key == "head", factors)
    tx = optax.chain(
        jaxopt_lab.muon(0.02, adam_learning_rate=1e-3), optax.masked(optax.sgd(1.0), mask)
    )
    updates, _ = tx.update(factors, tx.init(factors), factors)
    assert jax.tree.structure(updates) == jax.tree.structure(factors)
    treated = str(jaxopt_lab.treatments(jaxopt_lab.muon(0.02, adam_learning_rate=1e-3), factors))
    assert "head/kernel" in treated


def test_importance_sampling_takes_whole_leaves_with_their_layer():
    params = {
        "layers": {
            str(i): {"d": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}} for i in range(4)
        }
    }
    base, factors = adapters.init_adapters(
        params, adapters.LoraConfig(target_modules=["d"], r=2, bias="all"), KEY
    )
    tx = adapters.ist(optax.sgd(1.0), probes=1)
    update: Any = tx.update(
        jax.tree.map(jnp.ones_like, factors), tx.init(factors), factors,
        value_fn=lambda f: jnp.sum(adapters.apply_adapters(base, f)["layers"]["0"]["d"]["bias"]),
    )[0]  # fmt: skip
    changed = [{bool(x.any()) for x in jax.tree.leaves(own)} for own in update["layers"].values()]
    assert sorted(changed, key=str) == [{False}, {False}, {False}, {True}]  # a fourth of four


@pytest.mark.parametrize("kind", [adapters.MissConfig, adapters.PerpConfig])
def test_other_adapters_train_leaves_whole_too(kind):
    other = kind(target_modules=["dense"], r=2, bias="lora_only", modules_to_save=["head"])
    base, factors = adapters.init_adapters(tree(), other, KEY)
    assert base.whole == ("head/bias", "head/kernel", f"{LAYER}dense/bias")
    new = trained(factors)
    merged = adapters.merge_adapters(base, new)
    np.testing.assert_array_equal(merged.params["head"]["kernel"], new["head"]["kernel"])
    back = adapters.unmerge_adapters(merged, new)
    np.testing.assert_array_equal(back.params["head"]["kernel"], tree()["head"]["kernel"])


def test_plain_lora_keeps_whole_leaves():
    base, first = adapters.init_adapters(
        tree(), config(bias="lora_only", modules_to_save=["head"]), init=adapters.pissa()
    )
    new = trained(first)
    plain, factors = adapters.to_plain_lora(base, new, first)
    assert plain.whole == base.whole
    np.testing.assert_array_equal(factors["head"]["kernel"], new["head"]["kernel"])
    found, expected = (adapters.apply_adapters(*pair) for pair in ((plain, factors), (base, new)))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        np.testing.assert_allclose(one, other, 0, 2e-6)


def test_adapters_of_another_config_are_refused():
    params = tree()
    base, factors = start()
    place = f"kernel '{LAYER}dense/kernel'"
    whole, _ = start(**WHOLE)
    dora, magnitudes = start(use_dora=True)
    wide, wide_factors = start(r=4)
    one_row = jax.tree.map(lambda x: x, factors)
    one_row["layers"]["0"]["dense"]["kernel"]["lora_a"] = jnp.ones((1, 2))
    extra = factors | {"head": {"bias": jnp.zeros(3)}}
    bad_whole = trained(start(**WHOLE)[1]) | {
        "head": {"kernel": jnp.ones((1, 3)), "bias": jnp.ones(3)}
    }
    not_split = {"layers": {"0": {"dense": {"kernel": jnp.ones((4, 4))}}}}
    cases = [
        (base, wide_factors, rf"lora_a of shape \(4, 4\).* for {place}.*lora_a of shape \(4, 2\)"),
        (wide, factors, rf"for {place}, which needs lora_a of shape \(4, 4\)"),
        (base, one_row, rf"lora_a of shape \(1, 2\).*{place}"),
        (dora, factors, rf"{place}.*lora_magnitude of shape \(4,\)"),
        (base, magnitudes, "lora_magnitude of shape"),
        (base, not_split, rf"the adapters have shape \(4, 4\) for {place}"),
        (whole, factors, "nothing at 'head/bias'"),
        (base, extra, "the adapters have 'head/bias', for which the base has no place"),
        (whole, bad_whole, r"shape \(1, 3\) at 'head/kernel', which is trained whole"),
    ]
    for own, given, message in cases:
        merged = adapters.merge_adapters(own, adapters.init_adapters(params, own.config, KEY)[1])
        uses = [
            (adapters.apply_adapters, own),
            (adapters.merge_adapters, own),
            (adapters.unmerge_adapters, merged),
            (lambda base, given: adapters.factored(apply)(base, given, X), own),
            (adapters.trainable_parameters, own),
        ]
        # DoRA has no plain form.
        uses += [] if own is dora else [(lambda b, g: adapters.to_plain_lora(b, g, factors), own)]
        for use, of in uses:
            with pytest.raises(ValueError, match=message):
                use(of, given)
    with pytest.raises(ValueError, match=rf"lora_a of shape \(4, 4\).*for {place}"):
        adapters.to_plain_lora(base, factors, wide_factors)

    def wrong(kernel, matrices, key):
        return matrices[:, :, :3], matrices[:, :3]

    with pytest.raises(ValueError, match=rf"the start gives lora_a of shape \(4, 3\).*{place}"):
        adapters.init_adapters(params, config(), init=wrong)
