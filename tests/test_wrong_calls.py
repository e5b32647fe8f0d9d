"""Wrong calls of public functions: the message has the argument, what was found, and the remedy.

Each row is a call as somebody may well write it, and three texts that must be in the message: the
argument, the value or what it is, and what was expected or to be done. Nothing is compiled.
"""

from __future__ import annotations

import functools
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxopt_lab.testing
import pallas_kernels.targets
from jaxopt_lab import adapters

PARAMS = {"up": {"kernel": jnp.ones((4, 4))}, "down": {"kernel": jnp.ones((4, 2))}}
ADAMW = optax.adamw(1e-3)
Q, KV = jnp.ones((2, 8, 4, 16)), jnp.ones((2, 8, 2, 16))
HIDDEN, HEAD, LABELS = jnp.ones((2, 8, 4)), jnp.ones((4, 9)), jnp.zeros((2, 8), int)
BITS = jnp.ones((4, 4), int)
TOKENS, BITS = jnp.ones((8, 4)), jnp.ones((4, 4), int)
WEIGHT, DENSE = pallas_kernels.quantize_weight(jnp.ones((4, 4))), (((1,), (0,)), ((), ()))


def no_schedule(rate: float, steps: int) -> Any:
    return lambda step: rate * steps


@functools.cache
def adapted() -> tuple[Any, Any]:
    return adapters.init_adapters(
        PARAMS, adapters.LoraConfig(target_modules=["up"], r=2), jax.random.key(0)
    )


def loss(params: Any, batch: Any) -> Any:
    return jnp.sum(batch @ params["up"]["kernel"])


def initialised(tx: Any, params: Any = PARAMS) -> Any:
    return tx.init(params)


def updated(tx: Any, updates: Any, params: Any = PARAMS) -> Any:
    return jax.eval_shape(lambda: tx.update(updates, tx.init(PARAMS), params))


def attend(query: Any = Q, key: Any = KV, value: Any = KV, **options: Any) -> Any:
    return jax.eval_shape(lambda: pallas_kernels.attention(query, key, value, **options))


def entropy(hidden: Any = HIDDEN, weight: Any = HEAD, labels: Any = LABELS, **options: Any) -> Any:
    return jax.eval_shape(lambda: pallas_kernels.cross_entropy(hidden, weight, labels, **options))


def sparse(x: Any = TOKENS, **options: Any) -> Any:
    activations = options.pop("activations", jnp.ones((8, 3)))
    up, down = (options.pop("up", jnp.ones((3, 4, 2))), options.pop("down", jnp.ones((3, 2, 4))))
    return jax.eval_shape(lambda: kernels.block_ffn(x, activations, up, down, **options))


def multiplied(lhs: Any = Q[0, 0], rhs: Any = Q[0, 0].T, **options: Any) -> Any:
    dot = kernels.quantized_dot_general()
    return jax.eval_shape(lambda: dot(lhs, rhs, DENSE, **options))


def decode(cache: Any = KV, **options: Any) -> Any:
    one = jnp.ones((2, 1, 4, 16))
    return jax.eval_shape(
        lambda: pallas_kernels.decode_attention(one, cache, KV, jnp.array([3, 4]), **options)
    )


def in_axis(tx: Any) -> Any:
    return jax.eval_shape(
        jax.vmap(lambda g: tx.update(g, tx.init(g)), axis_name="r"), jnp.ones((4, 3))
    )


lab: Any = jaxopt_lab
kernels: Any = pallas_kernels
regularizers: Any = jaxopt_lab.regularizers
cost = kernels.attention_cost
config: Any = adapters.LoraConfig
miss: Any = adapters.MissConfig

CALLS: list[tuple[Any, tuple[str, str, str]]] = [
    # Numbers: text, None, containers, out of range, of the wrong kind.
    (lambda: lab.lion("1e-3"), ("learning_rate", "'1e-3' (str)", "number")),
    (lambda: lab.lion([1e-3]), ("learning_rate", "[0.001]", "number")),
    (lambda: lab.lion(True), ("learning_rate", "True", "number")),
    (lambda: lab.lion(math.inf), ("learning_rate", "inf", "finite")),
    (lambda: lab.lion(None), ("learning_rate", "None", "number")),
    (lambda: lab.lion(-1e-3), ("learning_rate", "-0.001", "non-negative")),
    (lambda: lab.lion(np.float32(math.nan)), ("learning_rate", "nan", "non-negative")),
    (lambda: lab.lion({"w": 1e-3}), ("learning_rate", "{'w': 0.001}", "number")),
    (lambda: lab.lion(jnp.ones(2)), ("learning_rate", "(2,)", "shape ()")),
    (lambda: lab.lion(1j), ("learning_rate", "1j", "number")),
    (lambda: lab.adamp(1e-3, (0.9, 0.999)), ("b1", "(0.9, 0.999)", "b1 and b2")),
    (lambda: lab.adamp(1e-3, b2=1.0), ("b2", "1.0", "[0, 1)")),
    (lambda: lab.adabelief(1e-3, eps=0), ("eps", "0", "positive")),
    (lambda: lab.adamp(1e-3, weight_decay="0.1"), ("weight_decay", "'0.1'", "number")),
    (lambda: lab.exadam(1e-3, weight_decay=-0.1), ("weight_decay", "-0.1", "non-negative")),
    (lambda: lab.lion(optax.linear_schedule), ("learning_rate", "linear_schedule", "call it")),
    (lambda: lab.muon(0.02, ns_steps=2.5), ("ns_steps", "2.5", "positive integer")),
    (lambda: lab.muon(0.02, ns_coeffs=(1.0, 2.0)), ("ns_coeffs", "(1.0, 2.0)", "three numbers")),
    (lambda: lab.muon(0.02, nesterov=0.95), ("nesterov", "0.95", "True or False")),
    (lambda: lab.sgdp(0.1, dampening=1.5), ("dampening", "1.5", "[0, 1]")),
    (lambda: lab.lion(1e-3, mu_dtype="bf16"), ("mu_dtype", "'bf16'", "'bfloat16'")),
    (lambda: lab.lion(1e-3, mu_dtype=jnp.int8), ("mu_dtype", "int8", "floating")),
    (lambda: lab.clip_coordinates(1.5), ("fraction", "1.5", "[0, 1]")),
    (lambda: lab.frugal_adamw(1e-3, density=25), ("density", "25", "[0, 1]")),
    (lambda: lab.galore_adamw(1e-3, rank=0.25), ("rank", "0.25", "positive integer")),
    (lambda: lab.badam(1e-3, seed=0.5), ("seed", "float", "integer")),
    # A number or a text in the place of a tree: AdamW's arguments in another order.
    (lambda: lab.lion(1e-3, 0.9, 0.99, 0.0, 0.01), ("mask", "0.01", "True and False")),
    (lambda: lab.adamp(1e-3, mask="no bias"), ("mask", "'no bias'", "function of the parameters")),
    (lambda: initialised(lab.lion(1e-3, mask={"up": "all", "down": "none"})),
     ("mask", "'none'", "True or False")),
    (lambda: initialised(lab.lion(1e-3, mask={"up": True})), ("mask", "down", "not covered")),
    (lambda: lab.muon(0.02, dimension_numbers=2), ("dimension_numbers", "2", "Muon")),
    (lambda: lab.frugal_adamw(1e-3, always_full=0.5), ("always_full", "0.5", "patterns")),
    (lambda: initialised(lab.frugal_adamw(1e-3, always_full="norm")),
     ("always_full", "'norm'", "matches no parameter")),
    (lambda: lab.one_bit_adam(1e-3, 10, "r", momentum_mask=0.5),
     ("momentum_mask", "0.5", "True and False")),
    # Transformations, codecs, compressors and projections that were not called or are none.
    (lambda: lab.quantize_state(optax.adamw, lab.quantization.int8()),
     ("inner", "adamw", "adamw(...)")),
    (lambda: lab.quantize_state(ADAMW, lab.quantization.int8), ("codec", "int8", "int8()")),
    (lambda: lab.quantize_state(ADAMW, "int8"), ("codec", "'int8'", "codec")),
    (lambda: lab.quantize_state(lab.quantization.int8(), ADAMW),
     ("inner", "Int8", "optax.Gradient")),
    (lambda: lab.quantization.int8(code="dynamci"), ("code", "'dynamci'", "did you mean dynamic")),
    (lambda: lab.quantization.int8(block_size=-1), ("block_size", "-1", "positive integer")),
    (lambda: lab.quantization.bfloat16(stochastic=0), ("stochastic", "0", "True or False")),
    (lambda: lab.frugal(projection=lab.subspace.svd), ("projection", "function", "svd()")),
    (lambda: lab.subspace.columns(axis="ou"), ("axis", "'ou'", "did you mean out")),
    (lambda: lab.subspace.dct(type=5), ("type", "5", "one of")),
    (lambda: lab.frugal_adamw(1e-3, on_refresh="rest"), ("on_refresh", "'rest'", "'reset'")),
    (lambda: lab.cautious(lab.scale_by_lion), ("inner", "scale_by_lion", "scale_by_lion(...)")),
    (lambda: lab.hypergradient(optax.sgd, 0.1, 0.1), ("inner", "sgd", "sgd(...)")),
    (lambda: lab.ist(None), ("inner", "None", "optax.GradientTransformation")),
    (lambda: lab.lora_plus(optax.adamw, 1e-3, ratio=0.5), ("ratio", "0.5", "at least 1")),
    # What is not there.
    (lambda: lab.adamP, ("jaxopt_lab", "'adamP'", "did you mean adamp")),
    (lambda: lab.adamw, ("jaxopt_lab", "'adamw'", "optax.adamw")),
    (lambda: lab.int8, ("jaxopt_lab", "'int8'", "jaxopt_lab.quantization.int8")),
    # Gradients and parameters.
    (lambda: updated(lab.adamp(1e-3), PARAMS, None), ("params", "update(", "adamp")),
    (lambda: updated(lab.lion(1e-3), None), ("updates", "down/kernel", "missing")),
    (lambda: updated(lab.lion(1e-3), {"up": PARAMS["up"]}), ("updates", "down/kernel", "missing")),
    (lambda: updated(lab.lion(1e-3), jax.tree.map(jnp.transpose, PARAMS)),
     ("updates", "(2, 4)", "(4, 2)")),
    (lambda: initialised(lab.lion(1e-3), {"w": jnp.ones(3, int)}),
     ("'w'", "int32", "optax.masked")),
    (lambda: initialised(lab.lion(1e-3), {"w": jnp.ones(3, complex)}),
     ("'w'", "complex64", "split_real_and_imaginary")),
    (lambda: initialised(lab.lion(1e-3), {"f": jnp.tanh}), ("'f'", "tanh", "take it out")),
    (lambda: lab.lion(1e-3).update(PARAMS, ADAMW.init(PARAMS), PARAMS),
     ("state", "ScaleByAdamState", "another transformation")),
    (lambda: lab.state_bytes(ADAMW, "params"), ("params", "'params'", "expected an array")),
    (lambda: lab.state_bytes(PARAMS, ADAMW), ("tx", "dict", "optax.GradientTransformation")),
    (lambda: lab.treatments(lab.muon, PARAMS), ("tx", "muon", "muon(...)")),
    (lambda: lab.treatments(ADAMW, PARAMS), ("tx", "does not contain", "muon")),
    (lambda: lab.training_memory(PARAMS, ADAMW, loss, 0), ("parameter", "loss", "only arrays")),
    # Adapters.
    (lambda: config(target_modules=3), ("target_modules", "3", "text or a list")),
    (lambda: config(target_modules=["up"], r=0), ("r must", "0", "positive integer")),
    (lambda: config(target_modules=["up"], r="16"), ("r must", "'16'", "positive integer")),
    (lambda: config(target_modules=["up"], lora_alpha=None), ("lora_alpha", "None", "number")),
    (lambda: config(target_modules=["up"], lora_dropout=1.0), ("lora_dropout", "1.0", "[0, 1)")),
    (lambda: config(target_modules=["up"], lora_dropout=0.1, use_dora=True),
     ("lora_dropout", "0.1", "lora_dropout=0")),
    (lambda: config(target_modules=["up"], bias="lora"), ("bias", "'lora'", "lora_only")),
    (lambda: config(target_modules=["up"], rank_pattern=16), ("rank_pattern", "16", "dict")),
    (lambda: config(target_modules=["up"], modules_to_save="head"),
     ("modules_to_save", "'head'", "list of names")),
    (lambda: config(target_modules=["up"], init_lora_weights="pisa"),
     ("init_lora_weights", "'pisa'", "nearest is 'pissa'")),
    (lambda: config(target_modules=["up"], init_lora_weights="eva"),
     ("init_lora_weights", "'eva'", "estimate_scatter")),
    (lambda: config(target_modules=["up"], init_lora_weights=["pissa"]),
     ("init_lora_weights", "['pissa']", "a name")),
    (lambda: config(target_modules=["up"], task_type="CAUSAL"),
     ("task_type", "'CAUSAL'", "CAUSAL_LM")),
    (lambda: config(target_modules=["up"], layers_to_transform="1"),
     ("layers_to_transform", "'1'", "number of a layer")),
    (lambda: config(target_modules=["up"], kernel_axes=(0, 1)),
     ("kernel_axes", "(0, 1)", "by pattern")),
    (lambda: miss(target_modules=["up"], init_weights="batt"), ("init_weights", "'batt'", "'bat'")),
    (lambda: lab.init_adapters(PARAMS, config(target_modules=["upp"]), jax.random.key(0)),
     ("target_modules", "'upp'", "nearest are up")),
    (lambda: lab.init_adapters(PARAMS, config(target_modules=["up"])),
     ("init_adapters", "LoRA", "key")),
    (lambda: lab.init_adapters(PARAMS, config), ("config", "LoraConfig", "call it first")),
    (lambda: lab.init_adapters(config(target_modules=["up"]), PARAMS),
     ("config", "dict", "LoraConfig, PerpConfig or MissConfig")),
    (lambda: lab.init_adapters({"b": jnp.ones(3)}, config(target_modules=["b"])),
     ("params", "dict", "two axes or more")),
    (lambda: lab.init_adapters(PARAMS, config(target_modules=["up"], r=2), init="pissa"),
     ("init", "'pissa'", "function")),
    (lambda: lab.apply_adapters(PARAMS, adapted()[1]), ("apply_adapters", "dict", "init_adapters")),
    (lambda: lab.apply_adapters(*adapted()[::-1]), ("apply_adapters", "dict", "init_adapters")),
    (lambda: lab.estimate_gradients(1.0, PARAMS, [Q], config(target_modules=["up"])),
     ("loss", "1.0", "function")),
    (lambda: lab.estimate_gradients(loss, PARAMS, 3, config(target_modules=["up"])),
     ("batches", "int", "[batch]")),
    (lambda: lab.lora_ga(loss), ("gradients", "loss", "estimate_gradients")),
    (lambda: lab.lora_ga({}, direction="ArB2"), ("direction", "'ArB2'", "ArB2r")),
    (lambda: lab.factored(PARAMS), ("fun", "dict", "function")),
    (lambda: lab.ties_merge(PARAMS, PARAMS), ("finetuned", "dict", "list of models")),
    (lambda: lab.ties_merge("base", [PARAMS]), ("base", "'base'", "array")),
    (lambda: lab.ties_merge(PARAMS, [PARAMS], density=20), ("density", "20", "(0, 1]")),
    (lambda: lab.task_arithmetic(PARAMS, [PARAMS], [1, 2]), ("weights", "(2,)", "(1,)")),
    (lambda: lab.join_adapters(adapted()[0], adapted()[1], [1.0]), ("adapters", "dict", "list")),
    (lambda: lab.read_peft_folder(3, PARAMS, {}), ("folder", "3", "path")),
    (lambda: lab.read_peft_folder("nowhere/at/all", PARAMS, {}), ("nowhere", "not there", "has")),
    (lambda: lab.read_peft_folder(".", PARAMS, "up"), ("names", "'up'", "by kernel")),
    (lambda: lab.read_peft_folder(".", PARAMS, {}, is_trainable=1),
     ("is_trainable", "1", "True or False")),
    (lambda: lab.write_peft_folder(".", *adapted(), {"up/kernel": "m.up"}, task_type="LM"),
     ("task_type", "'LM'", "CAUSAL_LM")),
    # Distribution.
    (lambda: lab.sync_gradients(None), ("axis_name", "None", "name of a mapped axis")),
    (lambda: lab.sync_gradients(0.5), ("axis_name", "0.5", "name of a mapped axis")),
    (lambda: lab.sync_gradients(("a", "a")), ("axis_name", "('a', 'a')", "different axes")),
    (lambda: lab.sync_gradients("r", op="avg"), ("op", "'avg'", "mean")),
    (lambda: in_axis(lab.sync_gradients("replica")), ("axis", "'replica'", "vmap with that axis")),
    (lambda: lab.diloco(ADAMW, sync_every=0, axis_name="r"), ("sync_every", "0", "positive")),
    (lambda: lab.diloco(optax.adamw, axis_name="r"), ("inner", "adamw", "adamw(...)")),
    (lambda: lab.gossip(ADAMW, axis_name="r", graph="rign"), ("graph", "'rign'", "ring")),
    (lambda: lab.error_feedback(lab.distributed.top_k, "r"), ("compressor", "top_k", "top_k(...)")),
    (lambda: lab.error_feedback(lab.distributed.top_k(0.1), "r", error_decay="1"),
     ("error_decay", "'1'", "number")),
    (lambda: lab.ef21(lab.distributed.top_k(0.1), "r", weights="equal"),
     ("weights", "'equal'", "sequence of numbers")),
    (lambda: lab.distributed.top_k("10%"), ("fraction", "'10%'", "number")),
    (lambda: lab.distributed.top_k(10), ("fraction", "10", "(0, 1]")),
    (lambda: lab.distributed.top_k(), ("fraction", "None", "count")),
    (lambda: lab.distributed.simulated_replicas("4"), ("count", "'4'", "positive integer")),
    (lambda: lab.distributed.device_replicas(devices=4), ("devices", "4", "list of jax.Device")),
    (lambda: lab.distributed.train_rounds(4, loss, ADAMW, None, 3),
     ("replicas", "int", "simulated_replicas")),
    (lambda: lab.distributed.apply_if_finite(ADAMW, "r", -1),
     ("max_consecutive_errors", "-1", "non-negative")),
    # Schedules.
    (lambda: lab.wsd_schedule(1e-3, 10, 5), ("stable_steps", "5", "both be given")),
    (lambda: lab.wsd_schedule(1e-3, 10, decay_shape="cos"), ("decay_shape", "'cos'", "cosine")),
    (lambda: lab.uba_schedule(1e-3, 1e-2, 100, 1), ("end_value", "0.01", "not exceed")),
    (lambda: lab.branch_decay(1e-3, 5, 5), ("schedule", "float", "function of the step")),
    (lambda: lab.branch_decay(no_schedule, 5, 5), ("schedule", "no_schedule", "call it first")),
    (lambda: lab.rewarmed_schedule(1e-3, 100, 10), ("phase_steps", "100", "sequence")),
    (lambda: lab.refined_schedule("norms", 100, 1e-3, "l1"), ("norms", "'norms'", "numbers")),
    (lambda: lab.record_norms("l3", 10), ("kind", "'l3'", "l1")),
    (lambda: lab.current_learning_rate(ADAMW.init(PARAMS), 1e-3),
     ("schedule", "float", "function of the step")),
    (lambda: lab.schedules.as_table(optax.constant_schedule(1.0), -1),
     ("steps", "-1", "at least 0")),
    (lambda: lab.testing.check_transform(optax.sgd, 0.1, checks=["jit"]),
     ("checks", "jit", "known")),
    # Attention.
    (lambda: attend(query="q"), ("query", "str", "array")),
    (lambda: attend(key=None), ("key", "NoneType", "array")),
    (lambda: attend(query=Q[0, 0]), ("query", "(4, 16)", "[batch, length, heads, size]")),
    (lambda: attend(key=jnp.ones((2, 8, 3, 16)), value=jnp.ones((2, 8, 3, 16))),
     ("key", "3", "multiple")),
    (lambda: attend(key=KV.astype(jnp.bfloat16)), ("key", "bfloat16", "one dtype")),
    (lambda: attend(mask=jnp.ones((8, 8))), ("mask", "float32", "mask != 0")),
    (lambda: attend(mask=jnp.ones((8, 9), bool)), ("mask", "(8, 9)", "broadcasts")),
    (lambda: attend(mask="causal"), ("mask", "str", "array")),
    (lambda: attend(bias=kernels.Alibi), ("bias", "Alibi", "made of its numbers")),
    (lambda: attend(is_causal=1), ("is_causal", "1", "True or False")),
    (lambda: kernels.attention_projected(Q, KV, KV, Q[0], axis_name="heads", chunks=2),
     ("axis", "'heads'", "inside shard_map")),
    (lambda: attend(scale=jnp.ones(2)), ("scale", "[1., 1.]", "number")),
    (lambda: attend(precision="hihg"), ("precision", "'hihg'", "'highest'")),
    (lambda: attend(return_residual="lse"), ("return_residual", "'lse'", "True or False")),
    (lambda: attend(implementation="moasic"), ("implementation", "'moasic'", "mosaic_gpu")),
    (lambda: attend(implementation=0), ("implementation", "0", "name of a route")),
    (lambda: attend(local_window_size=-1), ("local_window_size", "-1", "at least 0")),
    (lambda: attend(dropout_rate=0.1), ("dropout_rng", "0.1", "expected a key")),
    (lambda: attend(key_value_segment_ids=3), ("key_value_segment_ids", "()", "(2, 8)")),
    (lambda: decode(cache=[1, 2]), ("key_cache", "(2,)", "(B, S, K, d)")),
    (lambda: decode(sinks="none"), ("sinks", "str", "array")),
    (lambda: decode(num_splits=0), ("num_splits", "0", "positive")),
    (lambda: cost("2,8,4,16", (2, 8, 2, 16), dtype="bfloat16"),
     ("query_shape", "'2,8,4,16'", "sequence of integers")),
    (lambda: cost((2, 8, 4, 16), (2, 8, 2, 16), dtype="bf16"), ("dtype", "'bf16'", "'bfloat16'")),
    (lambda: cost((2, 8, 4, 16), (2, 8, 2, 16), dtype="float32", chip="v5"),
     ("chip", "'v5'", "v5e")),
    (lambda: entropy(hidden="h"), ("hidden", "str", "array")),
    (lambda: entropy(hidden=jnp.ones((2, 8, 4), int)), ("hidden", "int32", "floating")),
    (lambda: entropy(jnp.ones(())), ("hidden", "()", "(..., width)")),
    (lambda: entropy(weight=jnp.ones(4)), ("weight", "(4,)", "(width, vocabulary)")),
    (lambda: entropy(weight=jnp.ones((9, 4))), ("weight", "(9, 4)", "vocabulary_axis=0")),
    (lambda: entropy(vocabulary_axis=2), ("vocabulary_axis", "2", "expected 1")),
    (lambda: entropy(labels=jnp.ones((2, 8))), ("labels", "float32", "integers")),
    (lambda: entropy(labels=jnp.ones((2, 7), int)), ("labels", "(2, 7)", "(2, 8)")),
    (lambda: entropy(bias=jnp.ones(4)), ("bias", "(4,)", "(9,)")),
    (lambda: entropy(bias=jnp.ones(9, int)), ("bias", "int32", "floating")),
    (lambda: entropy(class_weights=jnp.ones(8)), ("class_weights", "(8,)", "(9,)")),
    (lambda: entropy(ignore_index=0.5), ("ignore_index", "0.5", "integer")),
    (lambda: entropy(label_smoothing=1.5), ("label_smoothing", "1.5", "from 0 to 1")),
    (lambda: entropy(z_loss=-1e-4), ("z_loss", "-0.0001", "at least 0")),
    (lambda: entropy(z_loss=jnp.ones(2)), ("z_loss", "[1., 1.]", "number")),
    (lambda: entropy(logits_soft_cap=0), ("logits_soft_cap", "0", "positive")),
    (lambda: entropy(reduction="avg"), ("reduction", "'avg'", "'mean'")),
    (lambda: entropy(return_lse=1), ("return_lse", "1", "True or False")),
    (lambda: entropy(axis_name="model"), ("axis_name", "'model'", "shard_map")),
    (lambda: entropy(axis_name="v", implementation="reference"),
     ("implementation", "'reference'", "'chunked'")),
    (lambda: entropy(implementation="xla"), ("implementation", "'xla'", "'chunked'")),
    (lambda: entropy(precision="hihg"), ("precision", "'hihg'", "'highest'")),
    (lambda: entropy(block_vocabulary=0), ("block_vocabulary", "0", "positive integer")),
    (lambda: entropy(block_tokens=8), ("block_tokens", "8", "gradient_in_forward=True")),
    (lambda: entropy(gradient_in_forward=True, reduction="none"),
     ("gradient_in_forward", "'none'", "'mean' or 'sum'")),
    (lambda: entropy(gradient_in_forward=True, return_lse=True),
     ("gradient_in_forward", "return_lse=True", "'mean' or 'sum'")),
    (lambda: kernels.explain(Q, KV, KV, chip="h20"), ("chip", "'h20'", "h200")),
    (lambda: kernels.merge_attention(Q, None, Q, None), ("lse1", "NoneType", "array")),
    (lambda: kernels.shard_sequence_order(10, 4), ("length", "10", "multiple of 8")),
    (lambda: kernels.shard_sequence_order("64", 4), ("length", "'64'", "integer")),
    (lambda: kernels.make_flax_attention_fn(mask=1), ("mask", "'mask'", "expected some of")),
    # Products.
    (lambda: kernels.gram(jnp.ones(3)), ("x", "(3,)", "(..., m, k)")),
    (lambda: kernels.gram(jnp.ones((3, 3), complex)), ("x", "complex64", "real")),
    (lambda: kernels.gram(jnp.ones((3, 3)), least_side=1), ("least_side", "1", "at least 2")),
    (lambda: lab.muon(0.02, gram="gram").init(PARAMS), ("gram", "'gram'", "function")),
    (lambda: updated(lab.muon(0.02, gram=lambda x, **options: x), PARAMS),
     ("gram", "expected shape", "dtype float32")),
    # Layers.
    (lambda: kernels.rms_norm("x"), ("x", "str", "array")),
    (lambda: kernels.rms_norm(jnp.ones(3, int)), ("x", "int32", "floating")),
    (lambda: kernels.rms_norm(jnp.float32(1)), ("x", "()", "(..., d)")),
    (lambda: kernels.rms_norm(Q, jnp.ones(4)), ("scale", "(4,)", "(16,)")),
    (lambda: kernels.rms_norm(Q, epsilon=-1e-6), ("epsilon", "-1e-06", "at least 0")),
    (lambda: kernels.rms_norm(Q, casting="lama"), ("casting", "'lama'", "'llama'")),
    (lambda: kernels.rms_norm(Q, scale_offset=None), ("scale_offset", "None", "number")),
    (lambda: kernels.layer_norm(Q, bias=jnp.ones((4, 16))), ("bias", "(4, 16)", "(16,)")),
    (lambda: kernels.add_rms_norm(Q, KV), ("residual", "(2, 8, 2, 16)", "(2, 8, 4, 16)")),
    (lambda: kernels.add_rms_norm(Q, jnp.ones(16)), ("residual", "(16,)", "(2, 8, 4, 16)")),
    (lambda: kernels.tract_conv("0.1"), ("damping", "'0.1'", "number")),
    (lambda: kernels.tract_conv(0), ("damping", "0.0", "positive")),
    (lambda: kernels.tract_dot_general(nnx.Linear), ("damping", "Linear", "number")),
    (lambda: kernels.tract_dot_general()(Q, Q, (((3,), (3,)), ((0,), (0,)))),
     ("dimension_numbers", "((0,), (0,))", "expected none")),
    (lambda: kernels.tract_conv()(Q, Q, (1, 1), "SAME", feature_group_count=2),
     ("feature_group_count", "2", "expected 1")),
    (lambda: kernels.quantized_dot_general("int2"), ("format", "'int2'", "'int8'")),
    (lambda: kernels.quantized_dot_general(jnp.int8), ("format", "int8", "'float8_e4m3fn'")),
    (lambda: kernels.quantized_dot_general("int8", "channel"),
     ("granularity", "'channel'", "'row'")),
    (lambda: kernels.quantized_dot_general("int8", 0), ("granularity", "0", "positive")),
    (lambda: kernels.quantized_dot_general("int8", 64.0), ("granularity", "64.0", "integer")),
    (lambda: kernels.quantized_dot_general(backward=True), ("backward", "True", "'both'")),
    (lambda: kernels.quantized_dot_general(residuals="int8"), ("residuals", "'int8'", "quantized")),
    (lambda: kernels.quantized_dot_general(stochastic_rounding=True),
     ("stochastic_rounding", "'none'", "'both'")),
    (lambda: kernels.quantized_dot_general(gradient_format="int8"),
     ("gradient_format", "'none'", "'both'")),
    (lambda: kernels.quantized_dot_general(backward="rhs", gradient_format="float8_e5m2"),
     ("gradient_format", "'float8_e5m2'", "both of integers")),
    (lambda: kernels.quantized_dot_general("float8_e5m2", backward="rhs", gradient_format="e5m2"),
     ("gradient_format", "'e5m2'", "'float8_e5m2'")),
    (lambda: kernels.quantized_dot_general(backward="rhs", stochastic_rounding=1),
     ("stochastic_rounding", "1", "True or False")),
    (lambda: multiplied(jnp.ones((4, 8), int)), ("lhs", "int32", "floating")),
    (lambda: multiplied(rhs="kernel"), ("rhs", "str", "array")),
    (lambda: multiplied(out_sharding=jax.sharding.PartitionSpec("x")),
     ("out_sharding", "P('x',)", "shard the operands")),
    (lambda: multiplied(key=jax.random.key(0)), ("key", "given", "stochastic_rounding=True")),
    (lambda: multiplied(jnp.ones((1, 200_000)), jnp.ones((200_000, 1))),
     ("contraction", "200000", "133144")),
    (lambda: kernels.quantize_weight(jnp.ones((4, 4), int)), ("kernel", "int32", "floating")),
    (lambda: kernels.quantize_weight(jnp.ones((4, 4)), axis=2), ("axis", "2", "(4, 4)")),
    (lambda: kernels.quantize_weight(jnp.ones(4)), ("axis", "-2", "(4,)")),
    (lambda: kernels.quantize_weight(jnp.ones((6, 4)), "int8", 4), ("granularity", "4", "6")),
    (lambda: kernels.weight_only_dot_general(jnp.ones((2, 4)), jnp.ones((4, 4)), DENSE),
     ("rhs", "Array", "quantize_weight")),
    (lambda: kernels.weight_only_dot_general(jnp.ones((2, 4), int), WEIGHT, DENSE),
     ("lhs", "int32", "floating")),
    (lambda: kernels.weight_only_dot_general(
        jnp.ones((2, 4)), WEIGHT._replace(scales=jnp.ones((3, 4))), DENSE),
     ("rhs", "(3, 4)", "block")),
    (lambda: kernels.bit_plane_matmul(Q[0, 0], BITS, lhs_bits=1, rhs_bits=1),
     ("lhs", "float32", "integers")),
    (lambda: kernels.bit_plane_matmul(BITS, BITS[:1], lhs_bits=1, rhs_bits=1),
     ("rhs", "(1, 4)", "(K, N)")),
    (lambda: kernels.bit_plane_matmul(BITS, BITS, lhs_bits=9, rhs_bits=1),
     ("lhs_bits", "9", "1 to 8")),
    (lambda: kernels.bit_plane_matmul(BITS, BITS, lhs_bits=1, rhs_bits=2.0),
     ("rhs_bits", "2.0", "integer")),
    (lambda: kernels.bit_plane_matmul(
        jnp.ones((1, 40_000), int), jnp.ones((40_000, 1), int), lhs_bits=8, rhs_bits=8),
     ("lhs", "40000", "33025")),
    (lambda: kernels.tract_dot_general(axis_name=["x"]), ("axis_name", "['x']", "static")),
    (lambda: kernels.cross_entropy(
        jnp.ones((2, 4)), jnp.ones((4, 8)), jnp.zeros(2, int), axis_name=["x"]),
     ("axis_name", "['x']", "static")),
    # Sparse layers, and what makes them so.
    (lambda: kernels.relu_rms_router(BITS), ("scores", "int32", "floating")),
    (lambda: kernels.relu_rms_router(Q[0, 0], jnp.ones(4)), ("scale", "(4,)", "(16,)")),
    (lambda: kernels.relu_rms_router(Q[0, 0], epsilon=0), ("epsilon", "0.0", "positive")),
    (lambda: sparse(x=Q), ("x", "(2, 8, 4, 16)", "(tokens, width)")),
    (lambda: sparse(up=jnp.ones((3, 5, 2))), ("up", "(3, 5, 2)", "(experts, 4, hidden)")),
    (lambda: sparse(down=jnp.ones((3, 4, 2))), ("down", "(3, 4, 2)", "(3, 2, 4)")),
    (lambda: sparse(activations=jnp.ones((8, 4))), ("activations", "(8, 4)", "(8, 3)")),
    (lambda: sparse(chunk=4), ("chunk", "capacity=None", "both")),
    (lambda: sparse(chunk=3, capacity=2), ("chunk", "3", "8 tokens")),
    (lambda: sparse(chunk=4, capacity=4), ("capacity", "4", "1 to 3")),
    (lambda: sparse(chunk=4, capacity=1.5), ("capacity", "1.5", "integer")),
    (lambda: regularizers.activation_locality_loss([[1.0]]), ("scores", "list", "array")),
    (lambda: regularizers.activation_locality_loss(BITS), ("scores", "int32", "floating")),
    (lambda: regularizers.activation_locality_loss(Q[0, 0], jnp.ones(3)),
     ("segment_ids", "(3,)", "(4,)")),
    (lambda: regularizers.activation_locality_loss(Q[0, 0], steep=0), ("steep", "0", "positive")),
    (lambda: regularizers.chunk_sparsity_loss(jnp.ones(4), 2),
     ("activations", "(4,)", "(..., tokens, experts)")),
    (lambda: regularizers.chunk_sparsity_loss(Q, 0), ("chunk", "0", "positive")),
    (lambda: regularizers.chunk_sparsity_loss(Q, 2, jnp.ones(4)), ("mask", "(4,)", "(2, 8, 4)")),
    (lambda: regularizers.chunk_sparsity_loss(Q, 2, eps=-1.0), ("eps", "-1.0", "negative")),
    (lambda: regularizers.token_sparsity(BITS), ("activations", "int32", "floating")),
    (lambda: regularizers.chunk_sparsity(Q, 1.5), ("chunk", "1.5", "integer")),
    (lambda: regularizers.adaptive_factor(0.1, 0.2, 0.0), ("before", "0.0", "positive")),
    (lambda: kernels.targets.missing_compiler(["h200"]), ("chip", "['h200']", "h200, ")),
    (lambda: kernels.targets.memory_traffic(loss), ("compiled", "loss", "compiled program")),
]  # fmt: skip


ERRORS = (TypeError, ValueError, AttributeError, FileNotFoundError, NotImplementedError)


def shown(row: int) -> str:
    """The line of the row, as the name of its case."""
    function = CALLS[row][0]
    lines = pathlib.Path(__file__).read_text().splitlines()
    return lines[function.__code__.co_firstlineno - 1].strip().removeprefix("(lambda: ")[:60]


@pytest.mark.parametrize("row", range(len(CALLS)), ids=shown)
def test_a_wrong_call_is_answered_with_argument_value_and_remedy(row):
    call, texts = CALLS[row]
    with pytest.raises(ERRORS) as caught:
        call()
    for text in texts:
        assert text in str(caught.value)
