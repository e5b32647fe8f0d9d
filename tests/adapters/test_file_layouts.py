"""How kernels of every kind stand in peft's folders: stacks, parts, experts, windows."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxopt_lab import adapters
from tests.adapters.folders import (
    PREFIX,
    QKV,
    QKV_NAMES,
    change,
    draw,
    expected,
    fields_of,
    folder,
    pair,
    same,
    tensors_of,
    there_and_back,
    trained,
)

Dims = optax.contrib.MuonDimensionNumbers


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

    @pytest.mark.parametrize("missing", "qkv")
    @pytest.mark.parametrize("kind", ["lora", "dora", "miss", "embedding"])
    def test_a_part_that_is_changed_has_a_kernel(self, tmp_path, kind, missing):
        """What no kernel is named after would be lost without a word."""
        own, options = pair(1, 4, 18), {}
        if kind == "miss":
            own, options = {"miss_block": draw(1, 2, 18)}, {"peft_type": "MISS", "lora_alpha": ...}
        elif kind == "dora":
            own["lora_magnitude_vector"], options = 1 + np.abs(draw(3, 18)), {"use_dora": True}
        elif kind == "embedding":
            own = {"lora_embedding_A": draw(1, 2, 4), "lora_embedding_B": draw(2, 18, 2)}
        first = 6 * "qkv".index(missing)
        names = {k: x for k, x in QKV_NAMES.items() if k[0] != missing}
        path = folder(tmp_path / "a", {"c_attn": own}, **options)
        adapters.read_peft_folder(path, QKV, QKV_NAMES)
        with pytest.raises(
            ValueError, match=f"'c_attn' changes its outputs {first} to {first + 5}"
        ):
            adapters.read_peft_folder(path, QKV, names)
        for name in ("lora_B.weight", "lora_embedding_B", "miss_block"):
            if name in own:
                (own[name].T if kind == "miss" else own[name])[first : first + 6] = 0
        path = folder(tmp_path / "b", {"c_attn": own}, **options)
        if kind == "dora":  # its lengths may change them all the same
            with pytest.raises(ValueError, match="of which 6 are named after no kernel"):
                adapters.read_peft_folder(path, QKV, names)
            return
        base, _ = adapters.read_peft_folder(path, QKV, names)
        assert [k.name[0] for k in base.kernels] == [n for n in "kqv" if n != missing]

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
