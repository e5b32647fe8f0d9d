"""Names, patterns, trees that can be called, and what is told of leaves that nobody knows."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxopt_lab
from jaxopt_lab import _treatments, distributed, quantization, subspace
from tests.trees import models

Dims = optax.contrib.MuonDimensionNumbers


def kinds(tx: Any, params: Any) -> dict[str, str]:
    return {one.name: one.kind for one in jaxopt_lab.treatments(tx, params).parameters}


def muon_of(tree: dict[str, tuple[int, ...]]) -> dict[str, str]:
    """Muon's kinds by path, for shapes by path."""
    params: dict[str, Any] = {}
    for path, shape in tree.items():
        *parents, leaf = path.split("/")
        inside = params
        for parent in parents:
            inside = inside.setdefault(parent, {})
        inside[leaf] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return kinds(jaxopt_lab.muon(0.02), params)


@pytest.mark.parametrize(
    "path",
    [
        "wte/embedding",
        "wpe/weight",
        "embed_tokens/weight",
        "tok_embeddings",
        "embeddings",
        "pos_embedding",
        "positional_embeddings",
        "input_embedding",
        "shared/embedding",
        "encoder/posembed_input/pos_embedding",
        "decoder/relpos_bias/rel_embedding",
        "layer_0/relative_attention_bias/embedding",
        "gpt_neox/embed_in/weight",
        "embed/kernel",
        "x_embedder/proj/weight",
        "patch_embed/proj/kernel",
        "cls_token",
        "logits_dense/kernel",
        "logitdense/kernel",
        "lm_head/weight",
        "head/kernel",
        "mlp_head/kernel",
        "classifier/kernel",
        "score/weight",
        "output_projection/kernel",
        "output/w",
        "final_layer/linear/kernel",
        "output_layer/dense/kernel",
        "quantizer/codebook",
        "vocab_table",
        "embed_out/weight",
        "unembed",
        "fc/weight",
        "cls/predictions/decoder/kernel",
    ],
)
def test_ends_of_models_are_left_to_adam(path):
    shape = (
        (8, 3, 4, 4)
        if "proj/w" in path
        else (4, 4, 3, 8)
        if "patch" in path
        else (1, 1, 8)
        if path == "cls_token"
        else (50, 8)
    )
    assert muon_of({path: shape, "layer_0/up/kernel": (8, 20)})[path] == "adam"


@pytest.mark.parametrize(
    "path",
    [
        "layer_0/attention/output/dense/kernel",
        "layer_0/output/dense/kernel",
        "multi_head_attention/query/w",
        "block_0/attn/out_proj/kernel",
        "layers_0/key_embedding_proj/kernel",
        "time_embedding/linear_1/kernel",
        "embedding_hidden_mapping_in/kernel",
        "pre_logits/kernel",
        "cls/predictions/transform/dense/kernel",
        "decoder/layers_0/head_mixer/kernel",
        "mlp/out/kernel",
        "layer_0/linear/kernel",
        "blocks/0/fc/kernel",
        "fc1/kernel",
        "encoder/value_proj/kernel",
        "scale_proj/kernel",
    ],
)
def test_hidden_layers_are_not_lost_by_a_loose_word(path):
    assert muon_of({path: (8, 8), "lm_head/kernel": (8, 50)})[path] == "muon"


@pytest.mark.parametrize("leaf", ["bias", "scale", "gamma", "beta", "offset", "b", "layer_scale"])
@pytest.mark.parametrize("shape", [(3, 8), (2, 3, 8), (2, 4)])
def test_vectors_are_no_matrices_however_stacked(leaf, shape):
    tree = {f"block/dense/{leaf}": shape, "block/dense/kernel": (2, 5, 8), "block/dense/w": (8, 8)}
    assert muon_of(tree)[f"block/dense/{leaf}"] == "adam"


@pytest.mark.parametrize("gate", ["gate", "attn_gate", "gate_msa", "cross_attn_mlp_gate"])
@pytest.mark.parametrize("width", [1, 64])
def test_a_gate_of_scanned_layers_is_a_vector_of_each(gate, width):
    found = muon_of(
        {
            f"layers/{gate}": (12, width),
            "layers/mlp/gate/kernel": (12, 64, 256),
            "layers/mlp/up": (12, 64, 256),
            "layers/norm/scale": (12, 64),
        }
    )
    assert found == {
        f"layers/{gate}": "adam",
        "layers/mlp/gate/kernel": "muon",
        "layers/mlp/up": "muon",
        "layers/norm/scale": "adam",
    }


def test_a_gate_of_an_mlp_without_layers_is_a_kernel():
    found = muon_of({"block/gate": (64, 256), "block/down": (256, 64), "block/gates": (1, 64)})
    assert found == {"block/gate": "muon", "block/down": "muon", "block/gates": "adam"}


@pytest.mark.parametrize(
    ("path", "shape", "kind"),
    [
        ("blocks/0/att/time_decay", (4, 16), "adam"),
        ("blocks/0/att/time_faaaa", (4, 16), "adam"),
        ("blocks/0/att/r_k", (4, 16), "adam"),
        ("blocks/att/time_mix_k", (12, 64), "adam"),
        ("blocks/0/att/time_maa_w1", (64, 160), "muon"),
        ("blocks/0/att/time_decay_w2", (32, 64), "muon"),
        ("blocks/0/att/receptance/weight", (64, 64), "muon"),
        ("blocks/0/ffn/key/weight", (256, 64), "muon"),
        ("visual/conv1/weight", (64, 3, 16, 16), "adam"),
        ("visual/proj", (64, 32), "adam"),
        ("text_projection", (64, 32), "adam"),
        ("visual_projection/kernel", (64, 32), "adam"),
        ("visual/transformer/resblocks/0/attn/out_proj/weight", (64, 64), "muon"),
        ("text_model/encoder/layers/0/mlp/fc1/kernel", (64, 256), "muon"),
    ],
)
def test_names_of_rwkv_and_clip(path, shape, kind):
    assert muon_of({path: shape, "ln/weight": (64,)})[path] == kind


@pytest.mark.parametrize(
    "path",
    [
        *("pos_enc", "position_encoding", "cls_pos", "pe", "query_pos", "rel_pos_h"),
        *("positional_encoding/weight", "mask_tokens/weight", "iou_token/weight"),
        *("soft_prompt", "prompt", "latent", "learned_queries", "object_queries"),
        *("relative_position_bias_table", "lambdas", "block/pos_bias_u"),
    ],
)
def test_what_is_learned_without_a_layer_is_left_to_adam(path):
    assert muon_of({path: (16, 8), "block/up/kernel": (8, 20)})[path] == "adam"


@pytest.mark.parametrize(
    "path",
    [
        *("linear_pos/weight", "pos_proj/kernel", "position_wise/kernel"),
        *("positional_encoding/kernel", "pos_encoder/weight", "attn/pos_key/weight"),
        *("token_mixer/kernel", "prompt_encoder/kernel", "queries/kernel", "prompt/kernel"),
    ],
)
def test_layers_that_are_applied_to_what_is_learned_are_matrices(path):
    assert muon_of({path: (16, 8), "block/up/kernel": (8, 20)})[path] == "muon"


@pytest.mark.parametrize(
    "bias", ["in_proj_bias", "gate_up_proj_bias", "conv_bias", "dense_bias", "mlp_out_bias"]
)
def test_what_ends_in_bias_is_one_whatever_it_belongs_to(bias):
    """Also where nothing beside it says how many layers or experts there are."""
    kernel = bias.removesuffix("_bias")
    found = muon_of({f"layer/{bias}": (4, 16), f"layer/{kernel}": (8, 16)})
    assert found[f"layer/{bias}"] == "adam"


def test_a_kernel_beside_its_bias_has_the_outputs_that_the_bias_has():
    """A raw kernel, stacked or not, with its outputs at either end."""
    for shape, bias, axes in (
        ((8, 16), (16,), ((), (0,), (1,))),
        ((16, 8), (16,), ((), (1,), (0,))),
        ((3, 8, 16), (3, 16), ((0,), (1,), (2,))),
    ):
        params = {"layer": {"up_proj": jnp.ones(shape), "up_proj_bias": jnp.ones(bias)}}
        found = jaxopt_lab.treatments(jaxopt_lab.muon(0.02), params).parameters
        assert [(one.kind, one.axes) for one in found] == [("muon", axes), ("adam", None)]


@pytest.mark.parametrize(("leaf", "shape"), [("w", (4, 64)), ("weight", (64, 4))])
def test_a_convolution_with_two_axes_is_depthwise(leaf, shape):
    params = {"conv_1d": {leaf: jnp.ones(shape)}, "up": {"kernel": jnp.ones((8, 8))}}
    assert kinds(jaxopt_lab.muon(0.02), params)[f"conv_1d/{leaf}"] == "adam"
    # A channel of AdamP's is one of the convolution's, with all of its window.
    channel, window = shape.index(64), shape.index(4)
    found = jaxopt_lab.treatments(jaxopt_lab.adamp(1e-3), params).parameters[0]
    assert found.axes == ((), (window,), (channel,))
    for layer in ("pwconv1", "pointwise_conv", "graph_conv", "GCNConv_0", "conv1"):
        shape = (64, 64) if layer == "conv1" else (4, 64)
        assert muon_of({f"{layer}/kernel": shape})[f"{layer}/kernel"] == "muon"


def test_experts_with_a_gate_and_an_up_in_one_say_which_way_round_they_are():
    """The same shapes in both orders, of as many features inside as outside."""

    def outputs(both: tuple[int, ...], down: tuple[int, ...]) -> list[Any]:
        experts = {"gate_up_proj": jnp.ones(both), "down_proj": jnp.ones(down)}
        tx = jaxopt_lab.muon(0.02)
        found = jaxopt_lab.treatments(tx, {"experts": experts}).parameters
        return [one.axes.output for one in found]

    assert outputs((4, 16, 8), (4, 8, 8)) == [(1,), (1,)]
    assert outputs((4, 8, 16), (4, 8, 8)) == [(2,), (2,)]


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass
class Named:
    """A box with names of axes, registered without keys, as Haliax's arrays are."""

    array: Any

    def tree_flatten(self) -> Any:
        return (self.array,), None

    @classmethod
    def tree_unflatten(cls, aux: Any, children: Any) -> Any:
        return cls(*children)


def test_a_box_without_keys_has_the_name_of_what_is_in_it():
    shapes = {"embeddings": (50, 8), "up": (3, 20, 8), "norm": (3, 8)}
    shapes |= {"norm_f": (8,), "lm_head": (50, 8)}
    arrays = {name: {"weight": jnp.ones(shape)} for name, shape in shapes.items()}
    blocks = {name: arrays.pop(name) for name in ("up", "norm")}
    plain = {**arrays, "blocks": blocks}
    boxed = jax.tree.map(Named, plain)
    tx = jaxopt_lab.muon(0.02)
    expected = jaxopt_lab.treatments(tx, plain).parameters
    assert {one.name: one.kind for one in expected} == {
        "blocks/norm/weight": "adam",
        "blocks/up/weight": "muon",
        "embeddings/weight": "adam",
        "lm_head/weight": "adam",
        "norm_f/weight": "adam",
    }
    for one, other in zip(expected, jaxopt_lab.treatments(tx, boxed).parameters):
        assert (one.kind, one.axes) == (other.kind, other.axes)


@pytest.mark.parametrize("stack", [(), (5,), (2, 5)], ids=str)
@pytest.mark.parametrize(("kernel", "bias"), [((8, 16), (16,)), ((8, 4, 3), (4, 3))], ids=str)
def test_the_second_of_a_pair_without_names_is_a_bias(stack, kernel, bias):
    """Parameters as lists of (weights, biases), alone and as an ensemble that vmap has made."""
    shapes = {"0/0": (*stack, *kernel), "0/1": (*stack, *bias)}
    shapes |= {"1/0": (*stack, 16, 4), "1/1": (*stack, 4)}
    expected = {path: "adam" if path.endswith("/1") else "muon" for path in shapes}
    assert muon_of(shapes) == expected
    # Two matrices in a list are no such pair.
    assert muon_of({"0/0": (8, 16), "0/1": (16, 8)}) == {"0/0": "muon", "0/1": "muon"}


def test_one_long_axis_makes_no_matrix():
    shapes = {"att/time_mix_k": (1, 1, 64), "att/key/weight": (64, 64), "gate": (1, 64, 1)}
    found = muon_of(shapes)
    assert found == {"att/time_mix_k": "adam", "att/key/weight": "muon", "gate": "adam"}


def test_two_readings_of_one_shape_are_none():
    """Four layers of (4, 4), or a stack along the second axis: no rule couples the layers."""
    params = {"layers": {"ln": {"scale": jnp.ones((4, 4))}, "up": {"kernel": jnp.ones((4, 4, 4))}}}
    with pytest.warns(UserWarning, match=r"muon: 'layers/up/kernel': it is unknown which axes"):
        jaxopt_lab.muon(0.02).init(params)


def test_stacks_without_norms_are_stacks_or_unknown():
    """Layers of a scan that have no vectors are not read as heads of attention."""
    mlp = {"layers/mlp/up": (3, 8, 20), "layers/mlp/down": (3, 20, 8)}
    attention = {f"layers/attn/{name}": (3, 8, 8) for name in "qo"}
    attention |= {f"layers/attn/{name}": (3, 8, 4) for name in "kv"}
    for more, kind in ((mlp, "muon"), ({}, "adam")):
        tree = {**attention, **more, "final_norm/scale": (8,)}
        found = muon_of(tree)
        assert {found[path] for path in {**attention, **more}} == {kind}
    assert muon_of({"blocks/conv/kernel": (4, 3, 3, 8, 8), "norm/scale": (8,)}) == {
        "blocks/conv/kernel": "adam",
        "norm/scale": "adam",
    }


def test_of_an_unknown_kernel_is_told_once_with_the_remedy():
    params = {"mixer": {"kernel": jnp.ones((2, 3, 4, 5))}, "other": jnp.ones((2, 3, 4))}
    tx = jaxopt_lab.adamp(1e-3)
    with pytest.warns(UserWarning, match="mixer") as told:
        tx.init(params)
    assert len(told) == 1
    text = str(told[0].message)
    assert text.startswith("adamp: 'mixer/kernel': it is unknown which axes are inputs")
    assert "treated as 'adam'" in text
    assert "dimension_numbers={'mixer/kernel': optax.contrib.MuonDimensionNumbers(" in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tx.init(params)
        jax.jit(tx.init)(params)
        jaxopt_lab.treatments(jaxopt_lab.sgdp(1e-3), params)
        # Whoever says what the axes are, or that there are none, is told nothing.
        jaxopt_lab.muon(0.1, dimension_numbers={"mixer": Dims(2, 3)}).init(params)
        jaxopt_lab.muon(0.1, dimension_numbers={"mixer": None}).init(params)


@pytest.mark.parametrize(
    ("make", "treated"),
    [
        (lambda **given: jaxopt_lab.muon(0.1, **given), "muon"),
        (lambda **given: jaxopt_lab.adamp(0.1, **given), "adamp"),
        (lambda **given: jaxopt_lab.sgdp(0.1, **given), "sgdp"),
        (lambda **given: jaxopt_lab.frugal_adamw(0.1, 0.5, **given), "split"),
        (lambda **given: distributed.powersgd(1, "r", min_compression_rate=0, **given), "powersgd"),
    ],
)
def test_patterns_decide_for_what_they_match(make, treated):
    params = {
        "blocks": {
            "qkv": jnp.ones((3, 8, 4)),
            "up": {"kernel": jnp.ones((8, 8)), "bias": jnp.ones(8)},
        },
        "probe": {"kernel": jnp.ones((8, 8))},
    }
    numbers = {r"q.v": Dims(1, (0, 2)), "probe": None}
    found = jaxopt_lab.treatments(make(dimension_numbers=numbers), params).parameters
    named = {one.name: one for one in found}
    assert named["blocks/qkv"].kind == named["blocks/up/kernel"].kind == treated
    axes = getattr(named["blocks/qkv"], "axes", None) or named["blocks/qkv"].leaf.axes
    assert axes == ((), (1,), (0, 2))
    assert named["probe/kernel"].kind == named["blocks/up/bias"].kind != treated
    wrong = make(dimension_numbers={"qvk": None})
    message = r"the pattern 'qvk' matches none; the nearest are .*blocks/qkv"
    with pytest.raises(ValueError, match=message):
        jaxopt_lab.treatments(wrong, params)
    with pytest.raises(ValueError, match=r"'\(' is no pattern"):
        jaxopt_lab.treatments(make(dimension_numbers={"(": None}), params)


def test_a_tuple_of_numbers_is_a_tree_for_parameters_in_a_tuple():
    params = (jnp.ones((4, 8)), jnp.ones((8, 8)))
    tx = jaxopt_lab.muon(0.1, dimension_numbers=(Dims(1, 0), None))
    assert kinds(tx, params) == {"0": "muon", "1": "adam"}


def test_patterns_know_nothing_of_boxes():
    params = nnx.state(nnx.Linear(4, 6, rngs=nnx.Rngs(0)), nnx.Param)
    frugal = jaxopt_lab.frugal_adamw(1e-3, 0.5, always_full=["bias$"])
    muon = jaxopt_lab.muon(0.1, dimension_numbers={"kernel": None})
    for tree in (params, nnx.to_pure_dict(params)):
        assert list(kinds(frugal, tree).values()) == ["full", "split"]
        assert list(kinds(muon, tree).values()) == ["adam", "adam"]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["kernel", "bias"], meta_fields=[])
@dataclasses.dataclass
class Net:
    """A tree that can be called, as Equinox's modules are."""

    kernel: Any
    bias: Any

    def __call__(self, x: Any) -> Any:
        return x @ self.kernel + self.bias


def test_a_tree_that_can_be_called_is_a_tree():
    params: Any = Net(jnp.ones((4, 3)), jnp.ones(3))
    mask: Any = Net(True, False)
    numbers, never = Net(Dims((0,), 1), None), Net(None, None)
    jaxopt_lab.lion(1e-3, weight_decay=0.1, mask=mask).init(params)
    assert kinds(jaxopt_lab.muon(0.1, dimension_numbers=numbers, mask=mask), params) == {
        "kernel": "muon",
        "bias": "adam",
    }
    assert set(kinds(jaxopt_lab.adamp(0.1, dimension_numbers=never), params).values()) == {"adam"}
    tx = jaxopt_lab.frugal_adamw(0.1, 0.5, always_full=Net(True, True))
    assert set(kinds(tx, params).values()) == {"full"}


def test_a_mask_of_boxes_is_refused_with_what_to_do():
    model = nnx.Linear(4, 6, rngs=nnx.Rngs(0))
    mask = jax.tree.map(lambda x: x.ndim > 1, nnx.state(model, nnx.Param))
    tx = jaxopt_lab.lion(1e-2, weight_decay=0.1, mask=mask)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    with pytest.raises(ValueError, match=r"flax.nnx.*give a function of the parameters instead"):
        tx.init(params)


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (jax.nn.relu, r"parameter 'act' is the function relu: only arrays .*equinox.filter"),
        ("gelu", r"parameter 'act' is the text 'gelu': only arrays can be optimized"),
        (jax.random.key(0), r"parameter 'act' is a random key \(key<fry>\): only arrays"),
    ],
)
@pytest.mark.parametrize("make", [jaxopt_lab.lion, jaxopt_lab.muon, jaxopt_lab.frugal_adamw])
def test_leaves_that_are_no_numbers_are_refused_by_path(make, leaf, message):
    with pytest.raises(TypeError, match=message):
        make(1e-3).init({"w": jnp.ones((3, 3)), "act": leaf})


def test_treatments_look_into_chains_and_wrappers():
    params = models.shapes("linen_transformer_scanned")
    alone = kinds(jaxopt_lab.muon(0.1), params)
    assert jaxopt_lab.treatments is subspace.treatments
    for wrapped in (
        optax.chain(optax.clip(1.0), jaxopt_lab.muon(0.1)),
        optax.apply_if_finite(jaxopt_lab.muon(0.1), 3),
        optax.MultiSteps(jaxopt_lab.muon(0.1), 2).gradient_transformation(),
        jaxopt_lab.quantize_state(jaxopt_lab.muon(0.1), quantization.bfloat16()),
        optax.chain(distributed.sync_gradients("r"), jaxopt_lab.muon(0.1)),
    ):
        assert kinds(wrapped, params) == alone
    both = jaxopt_lab.treatments(
        optax.chain(distributed.powersgd(1, "replica"), jaxopt_lab.adamp(0.1)), params
    )
    assert {one.rule for one in both.parameters} == {"powersgd", "adamp"}
    lines = str(both).splitlines()
    assert lines[0] == "powersgd:"
    assert len(lines) == 2 + 2 * len(alone)
    with pytest.raises(ValueError, match="treats all leaves alike"):
        jaxopt_lab.treatments(optax.adamw(0.1), params)
    with pytest.raises(TypeError, match=r"tx must be an optax\.GradientTransformation"):
        jaxopt_lab.treatments(jaxopt_lab.muon, params)  # type: ignore[arg-type]


def test_nothing_is_allocated_by_treatments():
    params = {"up": jax.ShapeDtypeStruct((2**20, 2**20), jnp.float32)}
    assert kinds(jaxopt_lab.muon(0.1), params) == {"up": "muon"}


def test_a_matrix_rule_within_frugal_sees_each_part_as_a_matrix():
    """The selected rows of a stack are stacks: Muon takes each layer's by itself."""
    params = {"query": {"kernel": jnp.ones((3, 8, 8)), "bias": jnp.ones((3, 8))}}
    tx: Any = jaxopt_lab.frugal(
        jaxopt_lab.muon(1.0), optax.set_to_zero(), subspace.columns(), density=0.5
    )
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), params)
    other = jax.tree.map(lambda g: g.at[1].multiply(3).at[1].add(1.0), grads)
    step = jax.jit(lambda g: tx.update(g, tx.init(params), params)[0]["query"]["kernel"])
    one, two = step(grads), step(other)
    np.testing.assert_allclose(one[::2], two[::2], atol=1e-6)
    assert np.abs(one[1] - two[1]).max() > 1e-2


def test_two_layers_of_one_scan_do_not_meet():
    """The update of a layer, of every kind of leaf, is the same whatever another's gradient."""
    params = {
        "Dense_0": {"kernel": jnp.ones((2, 5, 32)), "bias": jnp.ones((2, 32))},
        "LayerNorm_0": {"scale": jnp.ones((2, 32)), "bias": jnp.ones((2, 32))},
        "query": {"kernel": jnp.ones((2, 32, 4, 8))},
    }
    grads = jax.tree.map(lambda x: jax.random.normal(jax.random.key(1), x.shape), params)
    other = jax.tree.map(lambda x: x.at[1].set(5 * x[1] - 1), grads)
    for tx in (jaxopt_lab.muon(1.0), jaxopt_lab.adamp(1.0, weight_decay=0.1)):
        step = jax.jit(lambda g, tx=tx: tx.update(g, tx.init(params), params)[0])
        one, two = step(grads), step(other)
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two)):
            np.testing.assert_allclose(a[0], b[0], atol=1e-5)
    found = kinds(jaxopt_lab.frugal_adamw(1e-3), params)
    assert [kind for name, kind in found.items() if "kernel" not in name] == ["full"] * 3
    assert [kind for name, kind in found.items() if "kernel" in name] == ["split"] * 2


@pytest.fixture(autouse=True)
def _nothing_was_told():
    """Warnings come once a process; each test has its own."""
    told = set(_treatments._told)
    _treatments._told.clear()
    yield
    _treatments._told.update(told)
