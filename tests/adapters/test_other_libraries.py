"""Adapters of mlx-lm and kohya's scripts, and of llama.cpp, which are recognised."""

from __future__ import annotations

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxopt_lab import adapters
from tests.adapters.folders import change, draw, folder, pair, same

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "adapters" / "mlx_lm"


def mlx(path, tensors, **fields):
    plain = {"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 3.0}}
    path.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(tensors, path / "adapters.safetensors")
    found = {k: v for k, v in (plain | fields).items() if v is not ...}
    (path / "adapter_config.json").write_text(json.dumps(found))
    return path


W = {"w": {"kernel": jnp.asarray(draw(1, 4, 6))}}
NAMES = {"w/kernel": "layers.0.w"}
FACTORS = {"layers.0.w.lora_a": draw(2, 4, 2), "layers.0.w.lora_b": draw(3, 2, 6)}


class TestMlx:
    def test_outputs_are_those_of_mlx_lms_own_layers(self):
        golden = np.load(GOLDEN / "lora" / "golden.npz")
        params = {
            "q": {"kernel": jnp.asarray(golden["base_q"].T)},
            "embed": {"embedding": jnp.asarray(golden["base_e"])},
            "experts": {"up": jnp.asarray(golden["base_s"].swapaxes(1, 2))},
        }
        names = {
            "q/kernel": "layers.0.q",
            "embed/embedding": "embed",
            "experts/up": "mlp.switch:weight",
        }
        base, lora = adapters.read_mlx_folder(GOLDEN / "lora", params, names)
        new = adapters.apply_adapters(base, lora)
        x, table = golden["x"], np.asarray(new["embed"]["embedding"])
        chosen = np.asarray(new["experts"]["up"])[golden["idx"][:, 0]]
        # The scale of 20 makes outputs of some hundreds, in float32.
        for found, name in (
            (x @ new["q"]["kernel"] + golden["base_bias"], "q"),
            (table[golden["tokens"]], "e"),
            (x @ table.T, "tied"),
            (np.einsum("bi,bio->bo", x, chosen), "s"),
        ):
            wanted = golden[f"out_{name}"]
            np.testing.assert_allclose(found, wanted, 0, 1e-6 * np.abs(wanted).max())

    def test_dora_too(self):
        golden = np.load(GOLDEN / "dora" / "golden.npz")
        params = {"q": {"kernel": jnp.asarray(golden["base_q"].T)}}
        base, lora = adapters.read_mlx_folder(GOLDEN / "dora", params, {"q/kernel": "layers.0.q"})
        kernel = adapters.apply_adapters(base, lora)["q"]["kernel"]
        same(golden["x"] @ kernel + golden["base_bias"], golden["out_q"])

    def test_stacks_and_parts(self, tmp_path):
        params = {"layers": {n: jnp.zeros((2, 4, 3)) for n in ("gate", "up")}}
        names = {
            f"layers/{n}": [f"layers.{i}.w[{start}:{start + 3}]" for i in range(2)]
            for n, start in (("gate", 0), ("up", 3))
        }
        path = mlx(tmp_path, FACTORS)
        base, lora = adapters.read_mlx_folder(path, params, names)
        found = change(base, lora, "layers", "up")
        a, b = FACTORS.values()
        same(found[0], 3 * a @ b[:, 3:])
        same(change(base, lora, "layers", "gate")[0], 3 * a @ b[:, :3])
        np.testing.assert_array_equal(found[1], 0)
        del names["layers/gate"]
        with pytest.raises(
            ValueError, match=r"'layers.0.w' changes its outputs 0 to 2, of which 3"
        ):
            adapters.read_mlx_folder(path, params, names)

    @pytest.mark.parametrize(
        ("tensors", "fields", "message"),
        [
            ({}, {"fine_tune_type": "full"}, "fine_tune_type is 'full'; only 'lora' and 'dora'"),
            ({}, {"lora_parameters": None}, "lora_parameters is None; expected a positive 'scale'"),
            ({}, {"lora_parameters": {"alpha": 2}}, "expected a positive 'scale' in it"),
            ({}, {"fine_tune_type": "dora"}, "'m' is missing; found lora_a, lora_b"),
            ({}, {"peft_type": "LORA"}, "is of peft, not of mlx-lm; use read_peft_folder"),
            ({"layers.0.w.lora_a": draw(1, 2, 4)}, {}, r"'lora_a' has shape \(2, 4\).*4 inputs"),
            ({"layers.0.w.m": draw(1, 6)}, {}, "'m' is no part of such an adapter"),
            ({"layers.0.w.weight": draw(1, 6)}, {}, "is no tensor of a LoRA adapter of mlx-lm"),
            ({"layers.0.v.lora_a": draw(1, 6)}, {}, "module 'layers.0.v'; the nearest names are"),
        ],
    )
    def test_what_is_wrong_is_said(self, tmp_path, tensors, fields, message):
        path = mlx(tmp_path, FACTORS | tensors, **fields)
        with pytest.raises(ValueError, match=message):
            adapters.read_mlx_folder(path, W, NAMES)

    def test_lengths_of_rows_are_refused(self, tmp_path):
        params = {"embed": {"embedding": jnp.zeros((6, 6))}}
        tensors = {"e.lora_a": draw(2, 6, 2), "e.lora_b": draw(3, 2, 6), "e.m": draw(4, 6)}
        path = mlx(tmp_path, tensors, fine_tune_type="dora")
        with pytest.raises(ValueError, match="DoRA of an embedding, with a length for each row"):
            adapters.read_mlx_folder(path, params, {"embed/embedding": "e"})

    def test_each_reader_names_the_other(self, tmp_path):
        with pytest.raises(ValueError, match="is of mlx-lm, not of peft; use read_mlx_folder"):
            adapters.read_peft_folder(mlx(tmp_path / "a", FACTORS), W, NAMES)
        path = folder(tmp_path / "b", {"layers.0.w": pair(1, 4, 6)})
        with pytest.raises(ValueError, match="a folder of peft; use read_peft_folder"):
            adapters.read_mlx_folder(path, W, NAMES)
        with pytest.raises(FileNotFoundError, match=r"adapter_config.json is missing.*has a/, b/"):
            adapters.read_mlx_folder(tmp_path, W, NAMES)


def kohya(path, modules):
    tensors = {
        f"{module}.{name}": np.ascontiguousarray(value)
        for module, own in modules.items()
        for name, value in own.items()
    }
    safetensors.numpy.save_file(tensors, path)
    return path


def down_up(seed, fan_in, fan_out, r=2, window=()):
    ones = (1,) * len(window)
    return {
        "lora_down.weight": draw(seed, r, fan_in, *window),
        "lora_up.weight": draw(seed + 1, fan_out, r, *ones),
    }


TO_Q = {"w/kernel": "lora_unet.mid_block.attentions.0.to_q"}


class TestKohya:
    @pytest.mark.parametrize("alpha", [None, np.float32(1), np.array([4.0]), np.int64(4)])
    def test_alpha_is_divided_by_the_rank_and_one_to_one_where_it_is_missing(self, tmp_path, alpha):
        module = down_up(1, 4, 6) | ({} if alpha is None else {"alpha": alpha})
        path = kohya(tmp_path / "x.safetensors", {"lora_unet_mid_block_attentions_0_to_q": module})
        base, lora = adapters.read_kohya_file(path, W, TO_Q)
        scaling = 1 if alpha is None else float(np.squeeze(alpha)) / 2
        wanted = scaling * (module["lora_up.weight"] @ module["lora_down.weight"]).T
        same(change(base, lora, "w", "kernel"), wanted)

    def test_convolutions_and_dense_layers_that_are_stored_as_such(self, tmp_path):
        params = {
            "Conv_0": {"kernel": jnp.zeros((3, 2, 4, 6))},
            "proj": {"kernel": jnp.zeros((4, 6))},
        }
        modules = {
            "lora_unet_conv": down_up(1, 4, 6, window=(3, 2)),
            "lora_unet_proj_in": down_up(3, 4, 6, window=(1, 1)),
        }
        path = kohya(tmp_path / "x.safetensors", modules)
        names = {"Conv_0/kernel": "lora_unet_conv", "proj/kernel": "lora_unet.proj_in"}
        base, lora = adapters.read_kohya_file(path, params, names)
        (a, b), (c, d) = (own.values() for own in modules.values())
        wanted = np.einsum("or,rihw->hwio", b[..., 0, 0], a)
        same(change(base, lora, "Conv_0", "kernel"), wanted)
        same(change(base, lora, "proj", "kernel"), (d[..., 0, 0] @ c[..., 0, 0]).T)

    def test_parts_of_a_module_are_all_named(self, tmp_path):
        params = {n: jnp.zeros((4, 6)) for n in ("q", "k")}
        module = down_up(1, 4, 12, window=(1, 1))
        path = kohya(tmp_path / "x.safetensors", {"lora_unet_qk": module})
        names = {"q": "lora_unet.qk[0:6]", "k": "lora_unet.qk[6:12]"}
        base, lora = adapters.read_kohya_file(path, params, names)
        down, up = (x.reshape(x.shape[:2]) for x in module.values())
        same(change(base, lora, "k"), (up @ down).T[:, 6:])
        with pytest.raises(
            ValueError, match="'lora_unet_qk' changes its outputs 6 to 11, of which 6"
        ):
            adapters.read_kohya_file(path, params, {"q": names["q"]})

    def test_text_encoder_and_image_model_in_one_tree(self, tmp_path):
        params = {"te": W["w"], "unet": W["w"]}
        modules = {"lora_te_q_proj": down_up(1, 4, 6), "lora_unet_to_q": down_up(3, 4, 6, r=3)}
        path = kohya(tmp_path / "x.safetensors", modules)
        names = {"te/kernel": "lora_te.q_proj", "unet/kernel": "lora_unet.to_q"}
        base, lora = adapters.read_kohya_file(path, params, names)
        assert {k.name: (k.r, k.scaling) for k in base.kernels} == {
            "te/kernel": (2, 1.0),
            "unet/kernel": (3, 1.0),
        }
        for top, own in zip(("te", "unet"), modules.values()):
            down, up = own.values()
            same(change(base, lora, top, "kernel"), (up @ down).T)

    @pytest.mark.parametrize(
        ("key", "message"),
        [
            ("m.hada_w1_a", "is LyCORIS"),
            ("m.lokr_w1", "is LyCORIS"),
            ("m.dora_scale", "'m.dora_scale' is of DoRA, .*which is not read here"),
            ("m.lora_mid.weight", "a convolution in three factors"),
            ("m.diff", "whole differences"),
            ("m.else.weight", "is no tensor of a LoRA adapter of kohya's"),
            ("base_model.model.q.lora_A.weight", "an adapter of peft; read_peft_folder takes its"),
            ("layers.0.q.lora_a", "mlx-lm; use read_mlx_folder"),
        ],
    )
    def test_other_files_are_refused_as_what_they_are(self, tmp_path, key, message):
        path = kohya(tmp_path / "x.safetensors", {})
        safetensors.numpy.save_file({key: draw(1, 2, 2)}, path)
        with pytest.raises(ValueError, match=message):
            adapters.read_kohya_file(path, W, TO_Q)

    def test_modules_without_a_kernel_and_halves_are_refused(self, tmp_path):
        path = kohya(tmp_path / "x.safetensors", {"lora_unet_to_q": down_up(1, 4, 6)})
        with pytest.raises(ValueError, match=r"module 'lora_unet_to_q'; the nearest.*to_v"):
            adapters.read_kohya_file(path, W, {"w/kernel": "lora_unet.to_v"})
        half = {"lora_unet_to_q": {"lora_up.weight": draw(1, 6, 2)}}
        with pytest.raises(ValueError, match="'lora_down' is missing; found lora_up"):
            adapters.read_kohya_file(kohya(path, half), W, {"w/kernel": "lora_unet.to_q"})
        kohya(path, {"lora_unet_to_q": down_up(1, 4, 6)})
        with pytest.raises(ValueError, match="is a parameter, and these files have modules alone"):
            adapters.read_kohya_file(path, W, {"w/kernel": "lora_unet.to_q:weight"})
        with pytest.raises(FileNotFoundError, match=r"none.safetensors is missing.*x.safetensors"):
            adapters.read_kohya_file(tmp_path / "none.safetensors", W, TO_Q)
        path.write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}")
        with pytest.raises(ValueError, match="is damaged or cut short"):
            adapters.read_kohya_file(path, W, TO_Q)


class TestKinds:
    @pytest.mark.parametrize(
        ("key", "found"),
        [
            ("q.hada_w1_a", r"LyCORIS \(LoHa\)"),
            ("q.hada_t2", r"LyCORIS \(LoHa\)"),
            ("q.lokr_w1", r"LyCORIS \(LoKr\)"),
            ("q.lokr_w2_b", r"LyCORIS \(LoKr\)"),
            ("q.lokr_t2", r"LyCORIS \(LoKr\)"),
            ("q.a1.weight", r"LyCORIS \(GLoRA\)"),
            ("q.b2.weight", r"LyCORIS \(GLoRA\)"),
            ("q.oft_blocks", r"LyCORIS \(OFT or BOFT\)"),
            ("q.oft_diag", r"LyCORIS \(OFT or BOFT\)"),
            ("q.on_input", r"LyCORIS \(IA3\)"),
            ("q.lora.up.weight", "an early release of diffusers"),
            ("q.lora.down.weight", "an early release of diffusers"),
            ("to_q_lora.down.weight", "an early release of diffusers"),
            ("q.lora_a", "mlx-lm; use read_mlx_folder"),
            ("base_model.model.q.lora_A.weight", "an adapter of peft"),
        ],
    )
    def test_files_are_refused_as_what_their_keys_say(self, tmp_path, key, found):
        safetensors.numpy.save_file({key: draw(1, 2, 2)}, tmp_path / "x.safetensors")
        with pytest.raises(ValueError, match=f"x.safetensors is {found}.*; expected a file of"):
            adapters.read_kohya_file(tmp_path / "x.safetensors", W, TO_Q)

    @pytest.mark.parametrize("name", ["up", "down"])
    def test_either_factor_is_of_kohya(self, tmp_path, name):
        path = folder(tmp_path, {"m.w": pair(1, 6, 9)})
        key = f"lora_unet_q.lora_{name}.weight"
        safetensors.numpy.save_file({key: draw(1, 2, 2)}, path / "adapter_model.safetensors")
        with pytest.raises(ValueError, match="kohya's scripts; use read_kohya_file"):
            adapters.read_peft_folder(path, W, {"w/kernel": "m.w"})

    def test_a_mark_within_a_name_is_none(self, tmp_path):
        path = tmp_path / "x.safetensors"
        safetensors.numpy.save_file({"q.on_input_norm.w": draw(1, 2, 2)}, path)
        with pytest.raises(ValueError, match=r"^(?!.*LyCORIS)"):
            adapters.read_kohya_file(path, W, TO_Q)

    @pytest.mark.parametrize(
        ("name", "start"), [("x.safetensors", b"PK\x03\x04"), ("x.pt", b"\x80\x02}q")]
    )
    def test_files_of_pytorch_are_known_by_bytes_or_name(self, tmp_path, name, start):
        (tmp_path / name).write_bytes(start + b"\0" * 16)
        with pytest.raises(ValueError, match=f"{name} is a file of PyTorch"):
            adapters.read_kohya_file(tmp_path / name, W, TO_Q)

    def test_of_two_files_of_weights_that_of_safetensors_is_read(self, tmp_path):
        path = folder(tmp_path, {"m.w": pair(1, 4, 6)})
        (path / "adapter_model.bin").write_bytes(b"PK nothing")
        adapters.read_peft_folder(path, W, {"w/kernel": "m.w"})

    @pytest.mark.parametrize("field", ["lora_parameters", "fine_tune_type"])
    def test_either_field_is_of_mlx(self, tmp_path, field):
        path = folder(tmp_path, {"m.w": pair(1, 4, 6)})
        (path / "adapter_config.json").write_text(json.dumps({field: {}}))
        with pytest.raises(ValueError, match="is of mlx-lm, not of peft"):
            adapters.read_peft_folder(path, W, {"w/kernel": "m.w"})


class TestGguf:
    def test_adapters_of_llama_cpp_are_recognised_wherever_they_are_given(self, tmp_path):
        path = tmp_path / "adapter.gguf"
        gguf(path)
        message = r"an adapter in llama.cpp's format GGUF, which is not read here; take the folder"
        for read, where in (
            (adapters.read_peft_folder, tmp_path),
            (adapters.read_peft_folder, path),
            (adapters.read_mlx_folder, tmp_path),
            (adapters.read_kohya_file, path),
            (adapters.read_kohya_file, tmp_path / "other.safetensors"),
        ):
            with pytest.raises(ValueError, match=message):
                read(where, W, NAMES)


def gguf(path):
    """A GGUF file of version 3 that says it is a LoRA adapter."""

    def text(value):
        return len(value).to_bytes(8, "little") + value.encode()

    fields = {"general.type": "adapter", "adapter.type": "lora"}
    kind = (8).to_bytes(4, "little")  # text
    entries = b"".join(text(key) + kind + text(value) for key, value in fields.items())
    version, count = (3).to_bytes(4, "little"), len(fields).to_bytes(8, "little")
    path.write_bytes(b"GGUF" + version + (0).to_bytes(8, "little") + count + entries)
