"""Adapter files of other libraries: layers, layouts and refusals, on files that are made here."""

from __future__ import annotations

import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxopt_lab import adapters
from jaxopt_lab.adapters.files import _foreign, _peft_config
from tests.adapters.folders import (
    PREFIX,
    change,
    draw,
    expected,
    fields_of,
    folder,
    pair,
    same,
)

TWO_HEADS = {
    "head": {"kernel": jnp.zeros((4, 4))},
    "model": {"head": {"kernel": jnp.zeros((4, 4))}},
    "x": {"kernel": jnp.zeros((4, 4))},
}
TWO_NAMES = {"head/kernel": "head", "model/head/kernel": "model.head", "x/kernel": "x"}


class TestNames:
    def test_layers_whose_names_end_alike_keep_their_own_rank_and_alpha(self, tmp_path):
        modules = {"head": pair(1, 4, 4), "model.head": pair(3, 4, 4, r=3)}
        path = folder(
            tmp_path, modules, alpha_pattern={r"model\.head": 30}, rank_pattern={r"model\.head": 3}
        )
        base, lora = adapters.read_peft_folder(path, TWO_HEADS, TWO_NAMES)
        scalings = {k.name: (k.r, k.scaling) for k in base.kernels}
        assert scalings == {"head/kernel": (2, 1.0), "model/head/kernel": (3, 10.0)}
        same(change(base, lora, "head", "kernel"), expected(modules["head"]))
        same(change(base, lora, "model", "head", "kernel"), expected(modules["model.head"], 10))
        # Who makes adapters anew by the config that was read has the same.
        again = base.config.kernels(TWO_HEADS)
        assert {k.name: (k.r, k.scaling) for k in again} == scalings

    @pytest.mark.parametrize(
        ("patterns", "wanted"),
        [
            ({"head": 6}, (3, 3)),
            ({"ead": 20, "head": 6}, (3, 3)),  # not from within a word on
            ({"^head": 6}, (3, 1)),
            ({"model.head": 6, "head": 8}, (4, 3)),  # the first that matches counts
            ({r".*\.head": 6}, (1, 3)),
        ],
    )
    def test_patterns_are_matched_as_peft_matches_them(self, tmp_path, patterns, wanted):
        modules = {"head": pair(1, 4, 4), "model.head": pair(3, 4, 4)}
        path = folder(tmp_path, modules, alpha_pattern=patterns)
        base, _ = adapters.read_peft_folder(path, TWO_HEADS, TWO_NAMES)
        assert tuple(k.scaling for k in base.kernels) == wanted

    @pytest.mark.parametrize("only", ["head", "model.head"])
    def test_an_adapter_of_one_of_them_alone_is_read(self, tmp_path, only):
        modules = {only: pair(1, 4, 4)}
        base, lora = adapters.read_peft_folder(folder(tmp_path, modules), TWO_HEADS, TWO_NAMES)
        assert [k.name for k in base.kernels] == [f"{only.replace('.', '/')}/kernel"]
        assert [k.name for k in base.config.kernels(TWO_HEADS)] == [base.kernels[0].name]
        same(change(base, lora, *only.split("."), "kernel"), expected(modules[only]))

    def test_patterns_are_written_for_one_layer_alone(self, tmp_path):
        config = adapters.LoraConfig(
            target_modules=["head", "x"], r=2, lora_alpha=2, alpha_pattern={"^head": 20}
        )
        base, lora = adapters.init_adapters(TWO_HEADS, config, jax.random.key(0))
        fields = fields_of(adapters.write_peft_folder(tmp_path, base, lora, TWO_NAMES))
        assert fields["alpha_pattern"] == {"^head": 20}
        assert fields["target_modules"] == ["head", "model.head", "x"]

    def test_a_list_of_modules_that_would_take_more_is_written_as_a_pattern(self, tmp_path):
        config = adapters.LoraConfig(target_modules="head|x", r=2)
        base, lora = adapters.init_adapters(TWO_HEADS, config, jax.random.key(0))
        fields = fields_of(adapters.write_peft_folder(tmp_path, base, lora, TWO_NAMES))
        assert fields["target_modules"] == "head|x"

    @pytest.mark.parametrize(
        "names",
        [
            {"head/kernel": "one", "x/kernel": "one"},
            {"head/kernel": "one[0:4]", "x/kernel": "one[2:6]"},
            {"head/kernel": "one", "x/kernel": "one[4:8]"},
        ],
    )
    def test_two_kernels_of_one_name_are_refused(self, tmp_path, names):
        config = adapters.LoraConfig(target_modules="head|x", r=2)
        base, lora = adapters.init_adapters(TWO_HEADS, config, jax.random.key(0))
        message = "'one' is named twice, by kernel 'head/kernel'.*kernel 'x/kernel'"
        with pytest.raises(ValueError, match=message):
            adapters.write_peft_folder(tmp_path, base, lora, names)
        assert not list(tmp_path.iterdir())
        path = folder(tmp_path, {"one": pair(1, 4, 8)})
        with pytest.raises(ValueError, match=message):
            adapters.read_peft_folder(path, TWO_HEADS, names)

    def test_a_name_that_a_stack_has_twice_is_refused(self, tmp_path):
        params = {"layers": {"up": {"kernel": jnp.zeros((2, 4, 4))}}}
        config = adapters.LoraConfig(target_modules=["up"], r=2)
        base, lora = adapters.init_adapters(params, config, jax.random.key(0))
        with pytest.raises(ValueError, match="'one' is named twice"):
            adapters.write_peft_folder(tmp_path, base, lora, {"layers/up/kernel": ["one", "one"]})

    @pytest.mark.parametrize("name", ["a[1]", "a[0:2]x", "", "a:b:c", "a[0:4:0]"])
    def test_text_that_is_no_name_is_refused(self, tmp_path, name):
        path = folder(tmp_path, {"x": pair(1, 4, 4)})
        with pytest.raises(ValueError, match=r"names\['x/kernel'\] is .*expected 'module'"):
            adapters.read_peft_folder(path, TWO_HEADS, {"x/kernel": name})
        wrong: Any = [3]
        with pytest.raises(TypeError, match="must be text or a list of texts, got 3"):
            adapters.read_peft_folder(path, TWO_HEADS, {"x/kernel": wrong})


PARAMS = {
    "embed": {"embedding": jnp.asarray(draw(1, 9, 4))},
    "lm_head": {"kernel": jnp.asarray(draw(2, 4, 9)), "bias": jnp.asarray(draw(3, 9))},
}
NAMES = {"embed/embedding": "model.embed_tokens", "lm_head/kernel": "lm_head"}


HEAD = {
    **pair(1, 4, 9),
    "base_layer.weight": np.asarray(PARAMS["lm_head"]["kernel"]).T,
    "base_layer.bias": np.asarray(PARAMS["lm_head"]["bias"]),
}
TABLE = np.asarray(PARAMS["embed"]["embedding"])


class TestBaseBesideTheAdapter:
    def read(self, path, tensors):
        return adapters.read_peft_folder(folder(path, tensors), PARAMS, NAMES)

    def test_the_users_own_is_read(self, tmp_path):
        embed = {
            "lora_embedding_A": draw(5, 2, 9),
            "lora_embedding_B": draw(6, 4, 2),
            "base_layer.weight": TABLE,
        }
        base, lora = self.read(tmp_path, {"lm_head": HEAD, "model.embed_tokens": embed})
        same(change(base, lora, "lm_head", "kernel"), expected(HEAD))
        a, b = embed["lora_embedding_A"], embed["lora_embedding_B"]
        same(change(base, lora, "embed", "embedding"), a.T @ b.T)
        assert base.whole == ()

    def test_fewer_bits_of_the_same_are_the_same(self, tmp_path):
        weight = HEAD["base_layer.weight"].astype(np.float16)
        self.read(tmp_path, {"lm_head": HEAD | {"base_layer.weight": weight}})

    def test_another_size_is_refused(self, tmp_path):
        resized = {"base_layer.weight": draw(7, 11, 4)}
        with pytest.raises(
            ValueError, match=r"lm_head.base_layer.weight' has shape \(11, 4\).*voc"
        ):
            self.read(tmp_path, {"lm_head": HEAD | resized})

    @pytest.mark.parametrize("name", ["weight", "bias"])
    def test_other_values_are_refused(self, tmp_path, name):
        other = {f"base_layer.{name}": HEAD[f"base_layer.{name}"] * np.float32(1.01)}
        message = f"lm_head.base_layer.{name}' is the base.*differs from 'lm_head/"
        with pytest.raises(ValueError, match=message):
            self.read(tmp_path, {"lm_head": HEAD | other})

    def test_a_table_without_an_adapter_is_compared_too(self, tmp_path):
        whole = {"lm_head": pair(1, 4, 9), "model.embed_tokens": {"weight": TABLE}}
        self.read(tmp_path, whole)
        changed = whole | {"model.embed_tokens": {"weight": TABLE + 1}}
        with pytest.raises(ValueError, match=r"differs from 'embed/embedding'"):
            self.read(tmp_path, changed)
        with pytest.raises(ValueError, match=r"'weight' of module 'model.norm'; the nearest"):
            self.read(tmp_path, whole | {"model.norm": {"weight": draw(1, 4)}})


W = {"w": {"kernel": jnp.asarray(draw(1, 6, 9)), "bias": jnp.asarray(draw(2, 9))}}
W_NAMES = {"w/kernel": "m.w"}


def read_w(path, tensors=None, **fields):
    tensors = pair(1, 6, 9) if tensors is None else tensors
    return adapters.read_peft_folder(folder(path, {"m.w": tensors}, **fields), W, W_NAMES)


class TestFields:
    def test_a_rank_above_the_smaller_side_is_read(self, tmp_path):
        tensors = pair(1, 6, 9, r=16)
        base, lora = read_w(tmp_path, tensors, r=16)
        same(change(base, lora, "w", "kernel"), expected(tensors, 1 / 8))

    def test_what_was_converted_from_pissa_is_read_at_twice_the_rank(self, tmp_path):
        config = adapters.LoraConfig(target_modules=["w"], r=4)
        base, start = adapters.init_adapters(W, config, init=adapters.pissa())
        plain, lora = adapters.to_plain_lora(base, start, start)
        path = adapters.write_peft_folder(tmp_path, plain, lora, W_NAMES)
        again, found = adapters.read_peft_folder(path, W, W_NAMES)
        assert again.kernels[0].r == 8
        same(change(again, found, "w", "kernel"), np.zeros((6, 9)))

    @pytest.mark.parametrize("value", [None, False, [], {}])
    def test_unknown_fields_that_ask_for_nothing_are_read(self, tmp_path, value):
        read_w(tmp_path, a_flag_of_the_next_release=value, enable_lora=value)

    @pytest.mark.parametrize("value", [0, 0.0, True, "", "x", [1], {"a": None}])
    def test_unknown_fields_with_a_value_are_refused(self, tmp_path, value):
        with pytest.raises(ValueError, match="field 'new' is unknown, with value"):
            read_w(tmp_path, new=value)

    @pytest.mark.parametrize("name", sorted(_peft_config.REFUSED["LORA"]))
    def test_fields_that_change_the_function_are_refused_with_the_remedy(self, tmp_path, name):
        read_w(tmp_path, **{name: None})
        with pytest.raises(ValueError, match=rf"{name}=\[1\] is not supported: .{{20,}}"):
            read_w(tmp_path, **{name: [1]})

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"lora_alpha": None}, "lora_alpha is None; expected a positive number"),
            ({"lora_alpha": True}, "lora_alpha is True; expected"),
            ({"r": "2"}, "r is '2'; expected a positive whole number"),
            ({"r": 2.0}, "r is 2.0; expected"),
            ({"rank_pattern": {"w": None}}, r"rank_pattern\['w'\] is None; expected"),
            ({"alpha_pattern": {"w": 0}}, r"alpha_pattern\['w'\] is 0; expected"),
            ({"bias": "some"}, "bias='some' is unknown; expected 'none', 'all' or 'lora_only'"),
            ({"init_lora_weights": "new"}, "init_lora_weights='new' is unknown"),
            (
                {"init_lora_weights": "loftq"},
                "'loftq' has changed the base; there is no conversion",
            ),
            ({"init_lora_weights": "PiSSA"}, "has changed the base; save the adapter with peft's"),
            ({"init_lora_weights": "lora_ga"}, "has changed the base"),
            ({"peft_type": ...}, "the field 'peft_type' is missing"),
            ({"peft_type": "NEW"}, "peft_type 'NEW' is unknown; expected LORA or MISS"),
        ],
    )
    def test_values_that_cannot_be(self, tmp_path, fields, message):
        with pytest.raises(ValueError, match=message):
            read_w(tmp_path, **fields)

    @pytest.mark.parametrize("start", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
    def test_starts_that_leave_the_base_are_read(self, tmp_path, start):
        read_w(tmp_path, init_lora_weights=start)

    @pytest.mark.parametrize("kind", sorted(_foreign.KINDS))
    def test_every_other_kind_of_adapter_is_refused_as_what_it_is(self, tmp_path, kind):
        folder(tmp_path, {"m.w": {"something": draw(1, 2)}}, peft_type=kind, r=..., lora_alpha=...)
        with pytest.raises(ValueError, match=f"peft_type is '{kind}', which trains .{{10,}}"):
            adapters.read_peft_folder(tmp_path, W, W_NAMES)

    def test_training_leaves_no_trace(self, tmp_path):
        base, lora = read_w(tmp_path, lora_dropout=0.1, task_type="CAUSAL_LM", revision="x")
        assert (base.config.lora_dropout, base.config.task_type) == (0.0, "CAUSAL_LM")
        adapters.apply_adapters(base, lora)
        base, _ = read_w(tmp_path, task_type="ELSE")
        assert base.config.task_type is None

    def test_dropout_is_taken_for_training_that_goes_on(self, tmp_path):
        path = folder(tmp_path / "a", {"m.w": pair(1, 6, 9)}, lora_dropout=0.1)
        base, lora = adapters.read_peft_folder(path, W, W_NAMES, is_trainable=True)
        assert base.config.lora_dropout == 0.1
        with pytest.raises(ValueError, match="apply_adapters has no dropout"):
            adapters.apply_adapters(base, lora)
        adapters.write_peft_folder(tmp_path / "b", base, lora, W_NAMES)
        assert fields_of(tmp_path / "b")["lora_dropout"] == 0.1
        for rate in (0, None, ...):
            path = folder(tmp_path / "a", {"m.w": pair(1, 6, 9)}, lora_dropout=rate)
            base, _ = adapters.read_peft_folder(path, W, W_NAMES, is_trainable=True)
            assert base.config.lora_dropout == 0.0

    @pytest.mark.parametrize(
        ("own", "fields", "message"),
        [
            ({}, {"lora_dropout": 1.5}, "lora_dropout is 1.5; expected a number from 0 up to 1"),
            ({}, {"lora_dropout": "x"}, "lora_dropout is 'x'; expected"),
            (
                {"lora_magnitude_vector": draw(1, 9)},
                {"lora_dropout": 0.1, "use_dora": True},
                "lora_dropout=0.1 is not supported for DoRA; is_trainable=False reads",
            ),
            (
                {"miss_block": draw(1, 2, 9)},
                {"miss_dropout": 0.1, "peft_type": "MISS"},
                "miss_dropout=0.1 is not supported for MiSS; is_trainable=False reads",
            ),
        ],
    )
    def test_dropout_that_cannot_go_on(self, tmp_path, own, fields, message):
        own = own if "miss_block" in own else pair(1, 6, 9) | own
        fields = fields | ({"lora_alpha": ...} if "miss_block" in own else {})
        path = folder(tmp_path, {"m.w": own}, **fields)
        adapters.read_peft_folder(path, W, W_NAMES)
        with pytest.raises(ValueError, match=message):
            adapters.read_peft_folder(path, W, W_NAMES, is_trainable=True)


class TestKeys:
    @pytest.mark.parametrize(
        ("key", "message"),
        [
            ("transformer.q.lora_A.weight", f"has no prefix '{PREFIX}'"),
            (f"{PREFIX}q.lora_A.default.weight", "has an adapter's name in it, 'default'"),
            (f"{PREFIX}q.lora_embedding_A.french", "has an adapter's name in it, 'french'"),
            ("lora_unet_q.lora_down.weight", "kohya's scripts; use read_kohya_file"),
            ("layers.0.q.lora_a", "mlx-lm; use read_mlx_folder"),
            ("unet.q.lora.down.weight", "early release of diffusers"),
            ("lora_unet_q.hada_w1_a", "LyCORIS"),
            ("something.else", "is no tensor of an adapter of peft"),
            (f"{PREFIX}q.lora_C.weight", "has no tensors of a LORA adapter"),
        ],
    )
    def test_other_keys_are_named_as_what_they_are(self, tmp_path, key, message):
        path = folder(tmp_path, {"m.w": pair(1, 6, 9)})
        safetensors.numpy.save_file({key: draw(1, 2, 2)}, path / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=message):
            adapters.read_peft_folder(path, W, W_NAMES)

    @pytest.mark.parametrize("name", ["lora_magnitude_vector", "lora_B.bias", "miss_block"])
    def test_tensors_that_the_fields_do_not_ask_for_are_refused(self, tmp_path, name):
        with pytest.raises(ValueError, match=f"{name}' is no"):
            read_w(tmp_path, pair(1, 6, 9) | {name: draw(1, 9)})

    def test_magnitudes_of_an_unsaved_state_are_read(self, tmp_path):
        tensors = pair(1, 6, 9)
        one, two = (
            read_w(tmp_path, tensors | {name: draw(4, 9)}, use_dora=True)[1]
            for name in ("lora_magnitude_vector", "lora_magnitude_vector.weight")
        )
        jax.tree.map(np.testing.assert_array_equal, one, two)


def float8(tensors):
    """A safetensors file with numbers in eight bits."""
    kinds = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
    header, data = {}, b""
    for name, x in tensors.items():
        own = x.tobytes()
        ends = [len(data), len(data) + len(own)]
        header[name] = {"dtype": kinds[x.dtype.name], "shape": x.shape, "data_offsets": ends}
        data += own
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


class TestPlaces:
    @pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
    def test_eight_bits_are_read_as_float32(self, tmp_path, dtype):
        tensors = {k: v.astype(dtype) for k, v in pair(1, 6, 9).items()}
        path = folder(tmp_path, {"m.w": pair(1, 6, 9)})
        raw = float8({f"{PREFIX}m.w.{k}": v for k, v in tensors.items()})
        (path / "adapter_model.safetensors").write_bytes(raw)
        base, lora = adapters.read_peft_folder(path, W, W_NAMES)
        assert lora["w"]["kernel"]["lora_a"].dtype == jnp.float32
        wanted = expected({k: v.astype(np.float32) for k, v in tensors.items()})
        same(change(base, lora, "w", "kernel"), wanted)

    def test_numbers_that_are_no_weights_are_refused(self, tmp_path):
        with pytest.raises(ValueError, match=r"'.*lora_A.weight' has dtype int8; expected"):
            read_w(tmp_path, pair(1, 6, 9) | {"lora_A.weight": np.ones((2, 6), np.int8)})

    def test_a_file_of_pytorch_without_pytorch_names_the_remedy(self, tmp_path, monkeypatch):
        path = folder(tmp_path, {"m.w": pair(1, 6, 9)})
        (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")
        monkeypatch.setitem(sys.modules, "torch", None)
        with pytest.raises(ImportError, match=r"adapter_model.bin is a file of PyTorch.*save_file"):
            adapters.read_peft_folder(path, W, W_NAMES)

    def test_adapters_in_folders_of_their_names(self, tmp_path):
        tensors = {"m.w": pair(1, 6, 9)}
        folder(tmp_path / "french", tensors)
        with pytest.raises(
            FileNotFoundError, match="adapters french: choose one with adapter_name="
        ):
            adapters.read_peft_folder(tmp_path, W, W_NAMES)
        base, lora = adapters.read_peft_folder(tmp_path, W, W_NAMES, adapter_name="french")
        same(change(base, lora, "w", "kernel"), expected(tensors["m.w"]))
        folder(tmp_path, tensors, lora_alpha=4)
        for name in (None, "default"):
            base, _ = adapters.read_peft_folder(tmp_path, W, W_NAMES, adapter_name=name)
            assert base.kernels[0].scaling == 2
        with pytest.raises(FileNotFoundError, match=r"named 'german'; .*adapters default, french"):
            adapters.read_peft_folder(tmp_path, W, W_NAMES, adapter_name="german")

    def test_what_is_there_is_said_where_a_file_is_missing(self, tmp_path):
        (tmp_path / "notes.txt").write_text("")
        with pytest.raises(FileNotFoundError, match=r"config.json is missing.*has notes.txt"):
            adapters.read_peft_folder(tmp_path, W, W_NAMES)
        with pytest.raises(FileNotFoundError, match=r"gone is not there.*notes"):
            adapters.read_peft_folder(tmp_path / "gone", W, W_NAMES)
        path = folder(tmp_path / "f", {"m.w": pair(1, 6, 9)})
        with pytest.raises(
            ValueError, match="is a file, an adapter of peft; read_peft_folder takes"
        ):
            adapters.read_peft_folder(path / "adapter_model.safetensors", W, W_NAMES)
        (path / "adapter_model.safetensors").write_bytes(b"version https://git-lfs.github.com/")
        with pytest.raises(ValueError, match="is a Git LFS pointer, not the file"):
            adapters.read_peft_folder(path, W, W_NAMES)
        (path / "adapter_config.json").write_text("[]")
        with pytest.raises(ValueError, match="is no JSON object"):
            adapters.read_peft_folder(path, W, W_NAMES)
        safetensors.numpy.save_file({}, path / "adapter_model.safetensors")
        folder(path, {})
        with pytest.raises(ValueError, match="has no tensors of a LORA adapter"):
            adapters.read_peft_folder(path, W, W_NAMES)
