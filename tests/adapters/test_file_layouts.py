"""How kernels of every kind stand in peft's folders: stacks, parts, experts, windows, wholes."""

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
from tests.adapters.test_files import (
    PREFIX,
    change,
    draw,
    expected,
    fields_of,
    folder,
    pair,
    same,
    tensors_of,
)

Dims = optax.contrib.MuonDimensionNumbers


def trained(params, config, seed=0):
    """Adapters with random values."""
    base, start = adapters.init_adapters(params, config, jax.random.key(0))
    leaves, structure = jax.tree.flatten(start)
    drawn = [jnp.asarray(draw(seed + i, *x.shape), x.dtype) for i, x in enumerate(leaves)]
    return base, jax.tree.unflatten(structure, drawn)


def there_and_back(path, base, lora, names, params, **options):
    """Writes, reads, and compares the parameters that both give."""
    adapters.write_peft_folder(path, base, lora, names)
    again, found = adapters.read_peft_folder(path, params, names, **options)
    jax.tree.map(same, adapters.apply_adapters(again, found), adapters.apply_adapters(base, lora))
    return again, found


STACK = {"layers": {"up": {"kernel": jnp.asarray(draw(1, 3, 4, 6))}}}
STACK_NAMES = {"layers/up/kernel": [f"layers.{i}.up" for i in range(3)]}


class TestStacks:
    def test_the_config_that_is_read_has_rank_and_alpha_of_each_kernel_alone(self, tmp_path):
        params = {
            "up": {"kernel": jnp.zeros((4, 6))},
            "deep": {"up": {"kernel": jnp.zeros((4, 6))}, "other": {"kernel": jnp.zeros((4, 6))}},
        }
        names = {"up/kernel": "up", "deep/up/kernel": "deep.up", "deep/other/kernel": "other"}
        modules = {"up": pair(1, 4, 6, r=3), "deep.up": pair(3, 4, 6), "other": pair(5, 4, 6)}
        path = folder(
            tmp_path, modules, rank_pattern={"^up": 3}, alpha_pattern={"^up": 9}, use_rslora=True
        )
        base, _ = adapters.read_peft_folder(path, params, names)
        again = {k.name: (k.r, pytest.approx(k.scaling)) for k in base.config.kernels(params)}
        assert {k.name: (k.r, k.scaling) for k in base.kernels} == again
        assert again["deep/up/kernel"][0] == 2

    def test_layers_without_an_adapter_stay_as_they_are(self, tmp_path):
        modules = {"layers.0.up": pair(1, 4, 6), "layers.2.up": pair(3, 4, 6)}
        base, lora = adapters.read_peft_folder(folder(tmp_path, modules), STACK, STACK_NAMES)
        found = change(base, lora, "layers", "up", "kernel")
        same(found[0], expected(modules["layers.0.up"]))
        np.testing.assert_array_equal(found[1], 0)
        same(found[2], expected(modules["layers.2.up"]))

    def test_ranks_and_alphas_of_layers_may_differ(self, tmp_path):
        modules = {f"layers.{i}.up": pair(i, 4, 6, r=i + 1) for i in range(3)}
        patterns = {
            "rank_pattern": {f"layers.{i}.up": i + 1 for i in range(3)},
            "alpha_pattern": {"2.up": 7},
        }
        path = folder(tmp_path / "a", modules, **patterns)
        base, lora = adapters.read_peft_folder(path, STACK, STACK_NAMES)
        assert base.kernels[0].r == 3
        found = change(base, lora, "layers", "up", "kernel")
        for i, scaling in enumerate((2 / 1, 2 / 2, 7 / 3)):
            same(found[i], expected(modules[f"layers.{i}.up"], scaling))
        there_and_back(tmp_path / "b", base, lora, STACK_NAMES, STACK)

    def test_scalings_that_differ_cost_no_bits(self, tmp_path):
        # In eight bits of a mantissa a third would be off by a thousandth.
        modules = {
            f"layers.{i}.up": {k: v.astype(jnp.bfloat16) for k, v in pair(i, 4, 6).items()}
            for i in range(3)
        }
        path = folder(tmp_path, modules, alpha_pattern={"2.up": 2 / 3})
        base, lora = adapters.read_peft_folder(path, STACK, STACK_NAMES)
        wanted = {k: v.astype(np.float32) for k, v in modules["layers.2.up"].items()}
        same(change(base, lora, "layers", "up", "kernel")[2], expected(wanted, 1 / 3))
        assert lora["layers"]["up"]["kernel"]["lora_a"].dtype == jnp.bfloat16

    def test_layers_without_magnitudes_keep_their_lengths(self, tmp_path):
        module = pair(1, 4, 6) | {"lora_magnitude_vector": draw(5, 6)}
        path = folder(tmp_path, {"layers.1.up": module}, use_dora=True)
        base, lora = adapters.read_peft_folder(path, STACK, STACK_NAMES)
        found = change(base, lora, "layers", "up", "kernel")
        same(found[[0, 2]], np.zeros((2, 4, 6)))
        whole = STACK["layers"]["up"]["kernel"][1] + expected(module)
        wanted = whole * module["lora_magnitude_vector"] / np.linalg.norm(whole, axis=0)
        same(found[1], wanted - STACK["layers"]["up"]["kernel"][1])

    def test_blocks_of_miss_are_filled_likewise(self, tmp_path):
        block = draw(1, 2, 6).astype(jnp.bfloat16)
        path = folder(
            tmp_path, {"layers.1.up": {"miss_block": block}}, peft_type="MISS", lora_alpha=...
        )
        base, lora = adapters.read_peft_folder(path, STACK, STACK_NAMES)
        found = change(base, lora, "layers", "up", "kernel")
        np.testing.assert_array_equal(found[[0, 2]], 0)
        same(found[1], np.tile(block.astype(np.float32), (2, 1)))
        assert lora["layers"]["up"]["kernel"]["miss_block"].dtype == jnp.bfloat16


QKV = {n: {"kernel": jnp.asarray(draw(i, 4, 6)), "bias": jnp.zeros(6)} for i, n in enumerate("qkv")}
QKV_NAMES = {f"{n}/kernel": f"c_attn[{6 * i}:{6 * i + 6}]" for i, n in enumerate("qkv")}


class TestParts:
    def test_one_adapter_of_a_fused_module_is_that_of_each_of_its_kernels(self, tmp_path):
        module = pair(1, 4, 18)
        path = folder(tmp_path / "a", {"c_attn": module})
        base, lora = adapters.read_peft_folder(path, QKV, QKV_NAMES)
        for i, n in enumerate("qkv"):
            same(change(base, lora, n, "kernel"), expected(module)[:, 6 * i : 6 * i + 6])
        # Written again it is the same folder: what is shared is shared.
        adapters.write_peft_folder(tmp_path / "b", base, lora, QKV_NAMES)
        one, two = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b")
        assert one.keys() == two.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], two[key])

    def test_what_is_shared_may_have_scalings_of_its_own(self, tmp_path):
        config = adapters.LoraConfig(
            target_modules=["q", "k"], r=2, lora_alpha=3, alpha_pattern={"q": 5}
        )
        base, lora = trained(QKV, config)
        lora["k"]["kernel"]["lora_a"] = lora["q"]["kernel"]["lora_a"]
        there_and_back(tmp_path, base, lora, QKV_NAMES, QKV)
        assert tensors_of(tmp_path)[f"{PREFIX}c_attn.lora_A.weight"].shape == (2, 4)

    @pytest.mark.parametrize("targets", [["q", "k", "v"], ["q", "v"], ["k"]])
    def test_adapters_of_their_own_stand_side_by_side(self, tmp_path, targets):
        config = adapters.LoraConfig(
            target_modules=targets, r=2, lora_alpha=3, alpha_pattern={targets[0]: 5}
        )
        base, lora = trained(QKV, config)
        there_and_back(tmp_path, base, lora, QKV_NAMES, QKV)
        tensors = tensors_of(tmp_path)
        assert tensors[f"{PREFIX}c_attn.lora_A.weight"].shape == (2 * len(targets), 4)
        assert tensors[f"{PREFIX}c_attn.lora_B.weight"].shape == (18, 2 * len(targets))

    def test_experts_share_for_all_or_for_none(self, tmp_path):
        params = {n: {"kernel": jnp.zeros((3, 4, 6))} for n in ("gate", "up")}
        names = {"gate/kernel": "experts:gate_up[:6]", "up/kernel": "experts:gate_up[6:12]"}
        config = adapters.LoraConfig(target_modules=["gate", "up"], r=2)
        base, lora = trained(params, config)
        first = lora["gate"]["kernel"]["lora_a"][0]
        lora["up"]["kernel"]["lora_a"] = lora["up"]["kernel"]["lora_a"].at[0].set(first)
        there_and_back(tmp_path, base, lora, names, params)

    def test_kernels_that_are_not_adapted_may_have_axes_that_nothing_tells(self, tmp_path):
        params = {**QKV, "odd": {"thing": jnp.zeros((2, 3, 4, 5, 6))}}
        config = adapters.LoraConfig(
            target_modules=["q"], r=2, modules_to_save=["v"], bias="lora_only"
        )
        base, lora = trained(params, config)
        names = {"q/kernel": "q", "v/kernel": "v", "odd/thing": "odd"}
        there_and_back(tmp_path, base, lora, names, params)

    def test_every_other_output(self, tmp_path):
        params = {n: {"kernel": jnp.zeros((4, 6))} for n in ("gate", "up")}
        names = {"gate/kernel": "gate_up[0::2]", "up/kernel": "gate_up[1:12:2]"}
        module = pair(1, 4, 12)
        base, lora = adapters.read_peft_folder(folder(tmp_path, {"gate_up": module}), params, names)
        same(change(base, lora, "gate", "kernel"), expected(module)[:, ::2])
        same(change(base, lora, "up", "kernel"), expected(module)[:, 1::2])

    def test_magnitudes_are_parted_too(self, tmp_path):
        config = adapters.LoraConfig(target_modules=["q", "k", "v"], r=2, use_dora=True)
        base, lora = trained(QKV, config)
        there_and_back(tmp_path / "a", base, lora, QKV_NAMES, QKV)
        config = adapters.LoraConfig(target_modules=["q", "k"], r=2, use_dora=True)
        base, lora = trained(QKV, config)
        with pytest.raises(ValueError, match=r"all outputs of module 'c_attn'.*from 12 on"):
            adapters.write_peft_folder(tmp_path / "b", base, lora, QKV_NAMES)

    def test_miss_is_parted_by_columns(self, tmp_path):
        base, lora = trained(QKV, adapters.MissConfig(target_modules=["q", "v"], r=2))
        there_and_back(tmp_path / "a", base, lora, QKV_NAMES, QKV)
        assert tensors_of(tmp_path / "a")[f"{PREFIX}c_attn.miss_block"].shape == (2, 18)
        config = adapters.MissConfig(target_modules=["q"], r=2, mini_r=3, init_weights="mini")
        base, lora = trained(QKV, config)
        with pytest.raises(ValueError, match=r"'c_attn\[0:6\]' is a part.*'mini' are not parted"):
            adapters.write_peft_folder(tmp_path / "b", base, lora, QKV_NAMES)

    def test_a_part_of_another_size_is_refused(self, tmp_path):
        path = folder(tmp_path, {"c_attn": pair(1, 4, 18)})
        with pytest.raises(ValueError, match=r"'c_attn\[0:5\]' are 5 outputs.*the kernel has 6"):
            adapters.read_peft_folder(path, QKV, {"q/kernel": "c_attn[0:5]"})
        with pytest.raises(ValueError, match=r"has shape \(18, 2\); kernel 'q/kernel'.*20 or more"):
            adapters.read_peft_folder(path, QKV, {"q/kernel": "c_attn[14:]"})


def expert_tensors(seed, count, fan_in, fan_out, r=2):
    """A, B, and the change (experts, inputs, outputs) as peft 0.19 and later compute it."""
    a, b = draw(seed, count * r, fan_in), draw(seed + 1, fan_out, r * count)
    whole = np.einsum("ore,eri->eio", b.reshape(fan_out, r, count), a.reshape(count, r, fan_in))
    return {"lora_A.weight": a, "lora_B.weight": b}, whole


MOE = {
    "experts": {
        "gate": {"kernel": jnp.zeros((3, 4, 6))},
        "down": {"kernel": jnp.zeros((3, 6, 4))},
    }
}
MOE_NAMES = {
    "experts/gate/kernel": "mlp.experts.base_layer:gate",
    "experts/down/kernel": "mlp.experts:down",
}


FIELDS = {"target_parameters": ["experts.gate", "experts.down"], "peft_version": "0.21.2"}


class TestExperts:
    def test_parameters_with_a_matrix_an_expert_are_stacks(self, tmp_path):
        down, whole_down = expert_tensors(1, 3, 6, 4)
        gate, whole_gate = expert_tensors(3, 3, 4, 6, r=1)
        modules = {"mlp.experts": down, "mlp.experts.base_layer": gate}
        patterns = {"rank_pattern": {"experts.gate": 1}, "alpha_pattern": {"gate": 5}}
        path = folder(tmp_path / "a", modules, **FIELDS, **patterns)
        base, lora = adapters.read_peft_folder(path, MOE, MOE_NAMES)
        same(change(base, lora, "experts", "down", "kernel"), whole_down)
        same(change(base, lora, "experts", "gate", "kernel"), 5 * whole_gate)
        there_and_back(tmp_path / "b", base, lora, MOE_NAMES, MOE)
        fields = fields_of(tmp_path / "b")
        assert fields["target_parameters"] == ["mlp.experts.down", "mlp.experts.gate"]
        assert fields["target_modules"] == []
        assert tensors_of(tmp_path / "b").keys() == tensors_of(tmp_path / "a").keys()

    def test_scanned_layers_of_experts(self, tmp_path):
        params = {"layers": {"experts": {"kernel": jnp.zeros((2, 3, 4, 6))}}}
        names = {"layers/experts/kernel": [f"layers.{i}.experts:up" for i in range(2)]}
        axes = {"experts": Dims((-2,), (-1,))}
        config = adapters.LoraConfig(target_modules=["experts"], r=2, kernel_axes=axes)
        base, lora = trained(params, config)
        there_and_back(tmp_path, base, lora, names, params, kernel_axes=axes)

    def test_a_part_of_the_outputs_of_each_expert(self, tmp_path):
        params = {n: {"kernel": jnp.zeros((3, 4, 6))} for n in ("gate", "up")}
        names = {"gate/kernel": "experts:gate_up[:6]", "up/kernel": "experts:gate_up[6:12]"}
        both, whole = expert_tensors(1, 3, 4, 12)
        path = folder(tmp_path / "a", {"experts": both}, **FIELDS)
        base, lora = adapters.read_peft_folder(path, params, names)
        same(change(base, lora, "gate", "kernel"), whole[..., :6])
        same(change(base, lora, "up", "kernel"), whole[..., 6:])
        there_and_back(tmp_path / "b", base, lora, names, params)

    @pytest.mark.parametrize("version", [{"peft_version": "0.18.1"}, {"peft_version": ...}])
    def test_folders_from_before_019_have_the_sides_the_other_way_round(self, tmp_path, version):
        # Of a parameter (experts, outputs, inputs) that release has A on the outputs.
        tensors, whole = expert_tensors(1, 3, 4, 6)
        path = folder(tmp_path / "a", {"mlp.experts": tensors}, **FIELDS | version)
        base, lora = adapters.read_peft_folder(path, MOE, MOE_NAMES)
        same(change(base, lora, "experts", "down", "kernel"), whole.swapaxes(1, 2))
        square = {"experts": {"kernel": jnp.zeros((3, 4, 4))}}
        tensors, whole = expert_tensors(1, 3, 4, 4)
        names = {"experts/kernel": "mlp.experts:up"}
        path = folder(tmp_path / "b", {"mlp.experts": tensors}, **FIELDS | version)
        with pytest.raises(ValueError, match=r"peft before 0.19 .*nothing tells which"):
            adapters.read_peft_folder(path, square, names)
        path = folder(tmp_path / "c", {"mlp.experts": tensors}, **FIELDS)
        same(change(*adapters.read_peft_folder(path, square, names), "experts", "kernel"), whole)

    def test_two_parameters_of_one_module_need_their_order(self, tmp_path):
        tensors, _ = expert_tensors(1, 3, 4, 6)
        path = folder(tmp_path, {"mlp.experts": tensors}, **FIELDS)
        names = {k: v.replace(".base_layer", "") for k, v in MOE_NAMES.items()}
        with pytest.raises(ValueError, match=r"which peft nests: name the one.*base_layer:..."):
            adapters.read_peft_folder(path, MOE, names)

    def test_shapes_that_do_not_fit_are_refused(self, tmp_path):
        tensors, _ = expert_tensors(1, 3, 5, 6)
        path = folder(tmp_path, {"mlp.experts": tensors}, **FIELDS)
        with pytest.raises(ValueError, match="has 3 experts with 6 inputs and 4 outputs"):
            adapters.read_peft_folder(path, MOE, MOE_NAMES)
        folder(tmp_path, {"mlp.experts": tensors}, **FIELDS, r=3)
        with pytest.raises(ValueError, match=r"3 experts of rank 3 need \(9, inputs\)"):
            adapters.read_peft_folder(path, MOE, MOE_NAMES)

    def test_a_name_that_would_match_others_is_refused(self, tmp_path):
        params = {"a": {"kernel": jnp.zeros((3, 4, 6))}, "b": {"kernel": jnp.zeros((3, 4, 6))}}
        axes = {".*": Dims((1,), (2,))}
        base, lora = trained(
            params, adapters.LoraConfig(target_modules=["a"], r=2, kernel_axes=axes)
        )
        names = {"a/kernel": "experts:up", "b/kernel": "deep.experts:up"}
        with pytest.raises(
            ValueError, match=r"target_parameters by the end.*'experts.up' would be"
        ):
            adapters.write_peft_folder(tmp_path, base, lora, names)


WINDOWS = {1: (3,), 2: (3, 2), 3: (3, 2, 2)}


class TestConvolutions:
    @pytest.mark.parametrize("dimensions", WINDOWS)
    @pytest.mark.parametrize("dora", [False, True])
    def test_windows_stand_behind_the_inputs(self, tmp_path, dimensions, dora):
        window = WINDOWS[dimensions]
        axes = {"Conv_0": Dims(tuple(range(-len(window) - 2, -1)), (-1,))}
        params = {"Conv_0": {"kernel": jnp.asarray(draw(1, *window, 4, 6))}}
        config = adapters.LoraConfig(
            target_modules=["Conv_0"], r=2, kernel_axes=axes, use_dora=dora
        )
        base, lora = trained(params, config)
        names = {"Conv_0/kernel": "conv"}
        there_and_back(tmp_path, base, lora, names, params, kernel_axes=axes)
        tensors = tensors_of(tmp_path)
        a = tensors[f"{PREFIX}conv.lora_A.weight"]
        assert a.shape == (2, 4, *window)
        same(np.moveaxis(a, (0, 1), (-1, -2)), lora["Conv_0"]["kernel"]["lora_a"])
        ones = (1,) * dimensions
        assert tensors[f"{PREFIX}conv.lora_B.weight"].shape == (6, 2, *ones)
        if dora:
            assert tensors[f"{PREFIX}conv.lora_magnitude_vector"].shape == (1, 6, *ones)

    def test_kernels_as_in_pytorch_and_equinox(self, tmp_path):
        params = {"conv": {"weight": jnp.asarray(draw(1, 6, 4, 3, 2))}}
        axes = {"conv": Dims((1, 2, 3), (0,))}
        config = adapters.LoraConfig(target_modules=["conv"], r=2, kernel_axes=axes)
        base, lora = trained(params, config)
        there_and_back(tmp_path, base, lora, {"conv/weight": "conv"}, params, kernel_axes=axes)
        a = tensors_of(tmp_path)[f"{PREFIX}conv.lora_A.weight"]
        same(np.moveaxis(a, 0, -1), lora["conv"]["weight"]["lora_a"])

    def test_scanned_convolutions(self, tmp_path):
        params = {"layers": {"conv": {"kernel": jnp.asarray(draw(1, 2, 3, 4, 6))}}}
        axes = {"conv": Dims((-3, -2), (-1,))}
        config = adapters.LoraConfig(target_modules=["conv"], r=2, kernel_axes=axes)
        base, lora = trained(params, config)
        names = {"layers/conv/kernel": ["conv.0", "conv.1"]}
        there_and_back(tmp_path, base, lora, names, params, kernel_axes=axes)
        assert tensors_of(tmp_path)[f"{PREFIX}conv.1.lora_A.weight"].shape == (2, 4, 3)

    def test_a_window_of_one_is_a_dense_layer(self, tmp_path):
        module = pair(1, 4, 6)
        for path, a, shape in (("a", (2, 4, 1, 1), (4, 6)), ("b", (2, 4), (1, 1, 4, 6))):
            own = module | {"lora_A.weight": module["lora_A.weight"].reshape(a)}
            params = {"Conv_0": {"kernel": jnp.zeros(shape)}}
            where = folder(tmp_path / path, {"conv": own})
            base, lora = adapters.read_peft_folder(where, params, {"Conv_0/kernel": "conv"})
            found = change(base, lora, "Conv_0", "kernel")
            same(found.reshape(4, 6), expected(module))

    def test_grouped_ones_are_refused(self, tmp_path):
        params = {"Conv_0": {"kernel": jnp.zeros((3, 3, 4, 6))}}
        names = {"Conv_0/kernel": "conv"}
        module = {"lora_A.weight": draw(1, 2, 8, 3, 3), "lora_B.weight": draw(2, 6, 1, 1, 1)}
        with pytest.raises(ValueError, match="that of a grouped convolution"):
            adapters.read_peft_folder(folder(tmp_path / "a", {"conv": module}), params, names)
        module["lora_A.weight"] = draw(1, 2, 4, 3, 3)
        with pytest.raises(ValueError, match=r"'lora_B.weight' has shape .* of a grouped convol"):
            adapters.read_peft_folder(folder(tmp_path / "b", {"conv": module}), params, names)
        params = {"depthwise": {"kernel": jnp.zeros((3, 3, 1, 6))}}
        module = {"lora_A.weight": draw(1, 2, 6, 3, 3), "lora_B.weight": draw(2, 6, 2, 1, 1)}
        with pytest.raises(ValueError, match="that of a grouped convolution"):
            adapters.read_peft_folder(
                folder(tmp_path / "d", {"conv": module}), params, {"depthwise/kernel": "conv"}
            )
        config = adapters.LoraConfig(target_modules=["depthwise"], r=1)
        base, lora = trained(params, config)
        with pytest.raises(ValueError, match="'depthwise/kernel' is that of a grouped convolution"):
            adapters.write_peft_folder(tmp_path / "c", base, lora, {"depthwise/kernel": "conv"})

    def test_dense_factors_of_a_window_are_refused(self, tmp_path):
        params = {"Conv_0": {"kernel": jnp.zeros((3, 3, 4, 6))}}
        path = folder(tmp_path, {"conv": pair(1, 36, 6)})
        with pytest.raises(ValueError, match=r"shape \(2, 36\);.* needs \(2, 4, 3, 3\)"):
            adapters.read_peft_folder(path, params, {"Conv_0/kernel": "conv"})


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
