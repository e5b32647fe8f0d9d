"""What stands whole in peft's folders: tables, biases, saved modules, blocks of MiSS, and texts."""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxopt_lab import adapters
from tests.adapters.folders import (
    PREFIX,
    QKV,
    QKV_NAMES,
    change,
    draw,
    fields_of,
    folder,
    pair,
    same,
    tensors_of,
    there_and_back,
    trained,
)

Dims = optax.contrib.MuonDimensionNumbers


class TestEmbeddings:
    @pytest.mark.parametrize("path", ["wte/weight", "input_embedding", "token_embed/embedding"])
    def test_tables_are_known_by_what_they_are(self, tmp_path, path):
        *above, last = path.split("/")
        table = jnp.asarray(draw(1, 9, 4))
        params = {above[0]: {last: table}} if above else {last: table}
        base, lora = trained(params, adapters.LoraConfig(target_modules=[path], r=2))
        there_and_back(tmp_path, base, lora, {path: "embed"}, params)
        assert set(tensors_of(tmp_path)) == {f"{PREFIX}embed.lora_embedding_{x}" for x in "AB"}

    def test_a_square_table_takes_no_dense_factors(self, tmp_path):
        params = {"wte": {"weight": jnp.zeros((4, 4))}}
        path = folder(tmp_path, {"wte": pair(1, 4, 4)})
        with pytest.raises(ValueError, match="is a dense layer, but kernel 'wte/weight' an emb"):
            adapters.read_peft_folder(path, params, {"wte/weight": "wte"})


WHOLE = {
    "up": {"kernel": jnp.asarray(draw(1, 4, 6)), "bias": jnp.asarray(draw(2, 6))},
    "query": {"kernel": jnp.asarray(draw(3, 4, 2, 3)), "bias": jnp.asarray(draw(4, 2, 3))},
    "norm": {"scale": jnp.asarray(draw(5, 6)), "bias": jnp.asarray(draw(6, 6))},
    "head": {"kernel": jnp.asarray(draw(7, 6, 5)), "bias": jnp.asarray(draw(8, 5))},
    "table": {"embedding": jnp.asarray(draw(9, 7, 4))},
}
WHOLE_NAMES = {
    "up/kernel": "m.up",
    "query/kernel": "m.query",
    "head/kernel": "head",
    "norm/scale": "m.norm",
    "norm/bias": "m.norm",
    "table/embedding": "m.table",
}


class TestWholeLeaves:
    def test_biases(self, tmp_path):
        for bias, keys in (
            ("lora_only", {"m.up.base_layer.bias"}),
            ("all", {"m.up.base_layer.bias", "m.query.bias", "m.norm.bias", "head.bias"}),
        ):
            options: Any = {"bias": bias}
            config = adapters.LoraConfig(target_modules=["up"], r=2, **options)
            base, lora = trained(WHOLE, config)
            again, found = there_and_back(tmp_path / bias, base, lora, WHOLE_NAMES, WHOLE)
            assert again.whole == base.whole
            assert again.config.bias == fields_of(tmp_path / bias)["bias"] == bias
            keys = {f"{PREFIX}{key}" for key in keys}
            assert {k for k in tensors_of(tmp_path / bias) if "lora_" not in k} == keys
            assert jax.tree.structure(found) == jax.tree.structure(lora)

    @pytest.mark.parametrize("kind", [adapters.LoraConfig, adapters.MissConfig])
    def test_saved_modules(self, tmp_path, kind):
        config = kind(target_modules=["up"], r=2, modules_to_save=["head", "table", "query"])
        base, lora = trained(WHOLE, config)
        again, _ = there_and_back(tmp_path, base, lora, WHOLE_NAMES, WHOLE)
        assert set(again.whole) == set(base.whole)
        assert again.config.modules_to_save == ["head", "query", "table"]
        assert fields_of(tmp_path)["modules_to_save"] == ["head", "m.query", "m.table"]
        tensors = tensors_of(tmp_path)
        same(tensors[f"{PREFIX}head.weight"], lora["head"]["kernel"].T)
        same(tensors[f"{PREFIX}m.table.weight"], lora["table"]["embedding"])
        same(tensors[f"{PREFIX}m.query.weight"], lora["query"]["kernel"].reshape(4, 6).T)
        same(tensors[f"{PREFIX}m.query.bias"], lora["query"]["bias"].reshape(6))

    def test_what_is_not_trained_must_be_the_base(self, tmp_path):
        modules = {"m.up": pair(1, 4, 6), "m.norm": {"weight": np.asarray(WHOLE["norm"]["scale"])}}
        base, lora = adapters.read_peft_folder(folder(tmp_path, modules), WHOLE, WHOLE_NAMES)
        assert base.whole == ()
        assert set(lora) == {"up"}
        modules["m.norm"]["weight"] = modules["m.norm"]["weight"] + 1
        path = folder(tmp_path, modules)
        with pytest.raises(ValueError, match=r"m.norm.weight' is the base.*from 'norm/scale'"):
            adapters.read_peft_folder(path, WHOLE, WHOLE_NAMES)
        path = folder(tmp_path, modules, modules_to_save=["norm"])
        _, lora = adapters.read_peft_folder(path, WHOLE, WHOLE_NAMES)
        same(lora["norm"]["scale"], modules["m.norm"]["weight"])

    def test_a_container_that_is_saved_has_its_modules(self, tmp_path):
        modules = {
            "m.up": pair(1, 4, 6),
            "head": {"weight": draw(2, 5, 6), "bias": draw(3, 5)},
            "head.original_module": {"bias": draw(4, 5)},
            "head.modules_to_save": {"bias": draw(3, 5)},
        }
        path = folder(tmp_path, modules, modules_to_save=["head"], bias="all")
        base, lora = adapters.read_peft_folder(path, WHOLE, WHOLE_NAMES)
        same(lora["head"]["bias"], modules["head"]["bias"])
        same(adapters.apply_adapters(base, lora)["head"]["kernel"], modules["head"]["weight"].T)

    def test_a_gain_beside_its_bias_is_the_weight(self, tmp_path):
        params = {"up": WHOLE["up"], "norm": {"g": jnp.ones(6), "b": jnp.zeros(6)}}
        names = {"up/kernel": "up", "norm/g": "norm", "norm/b": "norm"}
        config = adapters.LoraConfig(target_modules=["up"], r=2, modules_to_save=["norm"])
        base, lora = trained(params, config)
        there_and_back(tmp_path, base, lora, names, params)
        same(tensors_of(tmp_path)[f"{PREFIX}norm.weight"], lora["norm"]["g"])

    def test_stacks_and_parts(self, tmp_path):
        params = {
            "layers": {
                "up": {"kernel": jnp.asarray(draw(1, 2, 4, 6)), "bias": jnp.asarray(draw(2, 2, 6))}
            },
            **QKV,
        }
        names = {"layers/up/kernel": ["up.0", "up.1"], **QKV_NAMES}
        config = adapters.LoraConfig(target_modules=["up", "q"], r=2, bias="all")
        base, lora = trained(params, config)
        there_and_back(tmp_path, base, lora, names, params)
        tensors = tensors_of(tmp_path)
        same(tensors[f"{PREFIX}up.1.base_layer.bias"], lora["layers"]["up"]["bias"][1])
        biases = np.concatenate([lora[n]["bias"] for n in "qkv"])
        same(tensors[f"{PREFIX}c_attn.base_layer.bias"], biases)

    @pytest.mark.parametrize("parameter", ["weight", "bias"])
    def test_all_parts_of_what_is_trained_whole_are_named(self, tmp_path, parameter):
        module = {parameter: draw(2, 18, 4) if parameter == "weight" else draw(2, 18)}
        options = {"modules_to_save": ["c_attn"]} if parameter == "weight" else {"bias": "all"}
        params = {"up": WHOLE["up"], **QKV}
        names = {"up/kernel": "up", **QKV_NAMES}
        path = folder(tmp_path, {"up": pair(1, 4, 6), "c_attn": module}, **options)
        _, lora = adapters.read_peft_folder(path, params, names)
        leaf = "kernel" if parameter == "weight" else "bias"
        same(lora["k"][leaf], module[parameter][6:12].T)
        del names["k/kernel"]
        values = module[parameter].size
        with pytest.raises(ValueError, match=f"has {values} values .* after {values * 2 // 3} of"):
            adapters.read_peft_folder(path, params, names)

    @pytest.mark.parametrize("untied", [True, False])
    def test_a_head_that_repeats_its_embedding(self, tmp_path, untied):
        """As `ensure_weight_tying` writes it; the tree may have a head of its own."""
        embedding = {"lora_embedding_A": draw(1, 2, 7), "lora_embedding_B": draw(2, 4, 2)}
        head = {
            "lora_A.weight": embedding["lora_embedding_B"].T,
            "lora_B.weight": embedding["lora_embedding_A"].T,
        }
        params = {"table": WHOLE["table"], "up": WHOLE["up"]}
        names = {"table/embedding": "table", "up/kernel": "up"}
        if untied:
            params["lm"] = {"kernel": WHOLE["table"]["embedding"].T}
            names["lm/kernel"] = "lm"
        tie = {"ensure_weight_tying": True}
        modules = {"table": embedding, "lm": head}
        path = folder(tmp_path / "a", modules, **tie)
        new = adapters.apply_adapters(*adapters.read_peft_folder(path, params, names))
        wanted = embedding["lora_embedding_A"].T @ embedding["lora_embedding_B"].T
        same(new["table"]["embedding"] - params["table"]["embedding"], wanted)
        if untied:
            same(new["lm"]["kernel"], new["table"]["embedding"].T)
        saved = {"weight": draw(3, 7, 4)}
        wholes = {"up": pair(1, 4, 6), "table": saved, "lm": saved}
        path = folder(tmp_path / "b", wholes, modules_to_save=["table"], **tie)
        new = adapters.apply_adapters(*adapters.read_peft_folder(path, params, names))
        same(new["table"]["embedding"], saved["weight"])
        if untied:
            same(new["lm"]["kernel"], saved["weight"].T)
            return
        own = {"lora_A.weight": head["lora_A.weight"], "lora_B.weight": draw(4, 7, 2)}
        lengths = {"lora_magnitude_vector": draw(5, 4)}, {"lora_magnitude_vector": draw(5, 7)}
        for written, options in (
            (modules, {}),  # tied only where the folder says so
            (modules | {"lm": own}, tie),  # another change
            ({"table": embedding | lengths[0], "lm": head | lengths[1]}, tie | {"use_dora": True}),
        ):
            path = folder(tmp_path / "c", written, **options)
            with pytest.raises(ValueError, match="no kernel is named after module 'lm'"):
                adapters.read_peft_folder(path, params, names)

    def test_inputs_first_are_told_by_the_shape(self, tmp_path):
        """GPT-2's layers have them so."""
        modules = {"m.up": pair(1, 4, 6), "head": {"weight": draw(2, 6, 5)}}
        path = folder(tmp_path, modules, modules_to_save=["head"])
        _, lora = adapters.read_peft_folder(path, WHOLE, WHOLE_NAMES)
        same(lora["head"]["kernel"], modules["head"]["weight"])

    def test_square_weights_must_be_known_by_what_training_left(self, tmp_path):
        kernel = draw(1, 5, 5)
        params = {"up": WHOLE["up"], "square": {"kernel": jnp.asarray(kernel)}}
        names = {"up/kernel": "m.up", "square/kernel": "square"}

        def read(weight, **fields):
            modules = {"m.up": pair(1, 4, 6), "square": {"weight": weight}}
            path = folder(tmp_path, modules, modules_to_save=["square"], **fields)
            return adapters.read_peft_folder(path, params, names)[1]["square"]["kernel"]

        moved = draw(2, 5, 5) / 10
        same(read(kernel.T + moved), kernel + moved.T)
        for weight, fields in ((kernel + moved, {}), (kernel.T + moved, {"fan_in_fan_out": True})):
            with pytest.raises(ValueError, match="is square and trained whole, and may be of a"):
                read(weight, **fields)

    def test_biases_are_trained_where_the_folder_says_so(self, tmp_path):
        modules = {"m.up": pair(1, 4, 6), "m.norm": {"bias": draw(2, 6)}}
        path = folder(tmp_path / "a", modules, bias="all")
        same(adapters.read_peft_folder(path, WHOLE, WHOLE_NAMES)[1]["norm"]["bias"], draw(2, 6))
        path = folder(tmp_path / "b", modules, bias="none")
        with pytest.raises(ValueError, match=r"m.norm.bias' is the base.*from 'norm/bias'"):
            adapters.read_peft_folder(path, WHOLE, WHOLE_NAMES)

    def test_statistics_of_a_batch_norm_have_pytorchs_names(self, tmp_path):
        leaves = {name: draw(i, 6) for i, name in enumerate(("scale", "bias", "mean", "var"))}
        params = {"up": WHOLE["up"], "norm": {k: jnp.asarray(x) for k, x in leaves.items()}}
        names = {"up/kernel": "m.up"} | {f"norm/{name}": "norm" for name in leaves}
        config = adapters.LoraConfig(target_modules=["up"], r=2, modules_to_save=["norm"])
        base, lora = trained(params, config)
        there_and_back(tmp_path, base, lora, names, params)
        for name in ("mean", "var"):
            same(tensors_of(tmp_path)[f"{PREFIX}norm.running_{name}"], lora["norm"][name])

    def test_what_cannot_be_written(self, tmp_path):
        config = adapters.LoraConfig(target_modules=["up"], r=2, modules_to_save=["norm"])
        base, lora = trained(WHOLE, config)
        names = {k: v for k, v in WHOLE_NAMES.items() if "norm" not in k}
        with pytest.raises(ValueError, match="no PyTorch module for 'norm/bias'"):
            adapters.write_peft_folder(tmp_path, base, lora, names)
        names = WHOLE_NAMES | {"norm/scale": "ead", "norm/bias": "ead"}
        with pytest.raises(ValueError, match="by the end of the name: 'ead' would be 'head' too"):
            adapters.write_peft_folder(tmp_path, base, lora, names)
        names = WHOLE_NAMES | {"norm/scale": "m.up", "norm/bias": "m.up"}
        with pytest.raises(ValueError, match=r"module 'm.up' has an adapter and is trained whole"):
            adapters.write_peft_folder(tmp_path, base, lora, names)
        config = adapters.LoraConfig(target_modules=["q"], r=2, modules_to_save=["k"])
        base, lora = trained(QKV, config)
        names = {"q/kernel": "q", "k/kernel": "c_attn[6:12]"}
        with pytest.raises(ValueError, match=r"'.*c_attn.*' is written whole, but its parts"):
            adapters.write_peft_folder(tmp_path, base, lora, names)
        assert not list(tmp_path.iterdir())


class TestMiss:
    @pytest.mark.parametrize(
        "options",
        [{}, {"init_weights": "mini", "mini_r": 3}, {"init_weights": "bat"}, {"bias": "lora_only"}],
        ids=str,
    )
    def test_there_and_back(self, tmp_path, options):
        config = adapters.MissConfig(target_modules=["up", "query"], r=2, **options)
        base, lora = trained(WHOLE, config)
        again, found = there_and_back(tmp_path, base, lora, WHOLE_NAMES, WHOLE)
        assert isinstance(again.config, adapters.MissConfig)
        jax.tree.map(np.testing.assert_array_equal, found, lora)
        assert fields_of(tmp_path)["peft_type"] == "MISS"
        assert [k.name for k in again.config.kernels(WHOLE)] == [k.name for k in base.kernels]

    def test_bad_blocks_are_refused(self, tmp_path):
        def read(tensors, **fields):
            fields = {"peft_type": "MISS", "lora_alpha": ..., "init_weights": True} | fields
            path = folder(tmp_path, {"m.up": tensors}, **fields)
            return adapters.read_peft_folder(path, WHOLE, WHOLE_NAMES)

        read({"miss_block": draw(1, 2, 6)}, init_weights=False, miss_dropout=0.5)
        for tensors, fields, message in (
            ({"miss_block": draw(1, 6, 2)}, {}, r"has shape \(6, 2\);.* needs \(2, 6\)"),
            ({"miss_block": draw(1, 2, 6)}, {"init_weights": "new"}, "init_weights='new' is unkn"),
            ({"miss_block": draw(1, 8, 6)}, {"r": 8}, "r=8 is above the inputs of kernel 'up/k"),
            ({"miss_block": draw(1, 2, 6)}, {"bias": "lora_only"}, "expected 'none', 'all' or 'Mi"),
        ):
            with pytest.raises(ValueError, match=message):
                read(tensors, **fields)

    def test_the_order_of_bats_blocks_is_pytorchs(self, tmp_path):
        """W' = W + W B + B on tiles (outputs, inputs) of r by r, as peft has it."""
        block = draw(1, 3, 2, 2)
        path = folder(
            tmp_path, {"m.up": {"miss_block": block}},
            peft_type="MISS", lora_alpha=..., init_weights="bat",
        )  # fmt: skip
        base, lora = adapters.read_peft_folder(path, WHOLE, WHOLE_NAMES)
        weight = np.asarray(WHOLE["up"]["kernel"]).T
        wanted = np.zeros((6, 4), np.float32)
        for p in range(3):
            for q in range(2):
                tile = weight[2 * p : 2 * p + 2, 2 * q : 2 * q + 2]
                wanted[2 * p : 2 * p + 2, 2 * q : 2 * q + 2] = tile @ block[p] + block[p]
        same(change(base, lora, "up", "kernel"), wanted.T)


def test_the_task_is_the_configs_unless_it_is_given(tmp_path):
    config = adapters.LoraConfig(target_modules=["up"], r=2, task_type="CAUSAL_LM")
    base, lora = trained(WHOLE, config)
    adapters.write_peft_folder(tmp_path, base, lora, WHOLE_NAMES)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    adapters.write_peft_folder(tmp_path, base, lora, WHOLE_NAMES, task_type="SEQ_CLS")
    assert fields_of(tmp_path)["task_type"] == "SEQ_CLS"


class Model(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, 4, 4, 4, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.conv = nnx.Conv(4, 4, (3,), rngs=rngs)


@pytest.mark.parametrize("container", ["module", "state"])
def test_flax_models_need_names_alone(tmp_path, container):
    model = Model(nnx.Rngs(0))
    params = model if container == "module" else nnx.state(model, nnx.Param)
    config = adapters.LoraConfig(
        target_modules=["query", "out", "conv"], r=2, bias="lora_only", modules_to_save=["norm"]
    )
    base, lora = trained(params, config)
    adapters.write_peft_folder(
        tmp_path, base, lora, lambda path: path.replace("/", ".").rpartition(".")[0]
    )
    shapes = {
        key.removeprefix(PREFIX): value.shape
        for key, value in tensors_of(tmp_path).items()
        if "lora_B" not in key
    }
    assert shapes == {
        "attention.query.lora_A.weight": (2, 4),
        "attention.query.base_layer.bias": (4,),
        "attention.out.lora_A.weight": (2, 4),
        "attention.out.base_layer.bias": (4,),
        "conv.lora_A.weight": (2, 4, 3),
        "conv.base_layer.bias": (4,),
        "norm.weight": (4,),
        "norm.bias": (4,),
    }
    again, found = adapters.read_peft_folder(
        tmp_path, params, lambda path: path.replace("/", ".").rpartition(".")[0]
    )
    assert again.whole == base.whole
    jax.tree.map(np.testing.assert_array_equal, found, lora)
