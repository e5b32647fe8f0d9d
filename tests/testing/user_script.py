"""A user's script: every public function once, with right arguments, as a type checker sees it."""

from __future__ import annotations

import contextlib
import pathlib
import tempfile
from typing import Any, assert_type

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxopt_lab
import pallas_kernels
from jaxopt_lab import testing

Params = dict[str, dict[str, jax.Array]]


def weights() -> Params:
    kernel = jnp.sin(jnp.arange(48.0)).reshape(8, 6)
    return {"dense": {"kernel": kernel, "bias": jnp.zeros(6)}}


def loss(params: Params, x: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(x @ params["dense"]["kernel"] + params["dense"]["bias"]))


def step(tx: optax.GradientTransformation, params: Params) -> optax.Params:
    gradient = jax.tree.map(jnp.ones_like, params)
    updates, _ = tx.update(gradient, tx.init(params), params)
    return optax.apply_updates(params, updates)


def optimizers() -> list[optax.GradientTransformation]:
    schedule = optax.cosine_decay_schedule(1e-3, 100)
    mask = {"dense": {"kernel": True, "bias": False}}
    subspace = jaxopt_lab.subspace
    return [
        jaxopt_lab.adabelief(schedule, b1=0.9, weight_decay=0.1, mask=mask, rectify=True),
        jaxopt_lab.adamp(1e-3, delta=0.1, mu_dtype=jnp.bfloat16),
        jaxopt_lab.badam(1e-3, 10, order="random", group=None, always_full=["bias$"]),
        jaxopt_lab.dct_adamw(1e-3, rank=2, error_feedback=True),
        jaxopt_lab.diffgrad(jnp.float32(1e-3)),
        jaxopt_lab.exadam(schedule, dynamic_step_size=False),
        jaxopt_lab.frugal_adamw(1e-3, 0.5, on_refresh="project", projection=subspace.svd()),
        jaxopt_lab.galore_adamw(1e-3, rank=2, on_refresh="keep"),
        jaxopt_lab.lion(1e-4, mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params)),
        jaxopt_lab.muon(
            0.02, dimension_numbers=jaxopt_lab.muon_dimension_numbers, ns_coeffs=(3.4, -4.7, 2.0)
        ),
        jaxopt_lab.sgdp(0.1, momentum=0.9, nesterov=True),
        jaxopt_lab.frugal(optax.adam(1e-3), optax.sgd(1e-3), subspace.columns(), 0.5),
        optax.chain(jaxopt_lab.clip_coordinates(0.1), optax.adam(1e-3)),
        optax.chain(jaxopt_lab.scale_by_adabelief(), optax.scale_by_learning_rate(1e-3)),
        optax.chain(jaxopt_lab.scale_by_adamp(weight_decay=0.1), optax.scale(-1e-3)),
        optax.chain(jaxopt_lab.scale_by_diffgrad(), optax.scale(-1e-3)),
        optax.chain(jaxopt_lab.scale_by_exadam(), optax.scale(-1e-3)),
        optax.chain(jaxopt_lab.scale_by_lion(), optax.scale(-1e-3)),
        optax.chain(jaxopt_lab.scale_by_sgdp(momentum=0.9), optax.scale(-1e-3)),
        optax.masked(optax.chain(jaxopt_lab.scale_by_muon(), optax.scale(-1e-3)), mask),
        optax.chain(jaxopt_lab.cautious(jaxopt_lab.scale_by_lion()), optax.scale(-1e-3)),
        jaxopt_lab.hypergradient(optax.scale_by_adam(), 1e-3, 1e-4, rule="additive"),
        optax.chain(jaxopt_lab.record_norms("l1", length=4), optax.sgd(1e-3)),
        jaxopt_lab.log_norms(optax.sgd(1e-3), 1e-3),
    ]


def compact_state(params: Params, key: jax.Array) -> None:
    tx = jaxopt_lab.quantize_state(
        optax.adamw(1e-3), jaxopt_lab.quantization.int8(4, code="dynamic"), min_size=16
    )
    sharded = jaxopt_lab.init_sharded(tx, params)
    placed = jax.device_put(params, jax.devices()[0])
    assert jax.tree.leaves(jaxopt_lab.state_shardings(tx, placed)) or sharded
    assert_type(jaxopt_lab.state_bytes(tx, params).total, int)
    logged = jaxopt_lab.log_norms(tx, optax.constant_schedule(1e-3)).init(params)
    assert_type(jaxopt_lab.logged_norms(logged).update_norm, jax.Array)
    assert str(jaxopt_lab.treatments(jaxopt_lab.muon(0.02), params))
    memory = jaxopt_lab.training_memory(loss, tx, params, jnp.ones((4, 8)), donate=False)
    assert_type(memory.peak, int)
    updates = jax.tree.map(jnp.ones_like, params)
    jaxopt_lab.apply_updates_stochastic(params, updates, key)
    compensation = jaxopt_lab.init_compensation(params)
    params, compensation = jaxopt_lab.apply_updates_compensated(params, updates, compensation)


def schedules() -> None:
    endless = jaxopt_lab.wsd_schedule(1e-3, 10, decay_shape="linear", warmup_shape="linear")
    tx = jaxopt_lab.lion(endless)
    rate = jaxopt_lab.current_learning_rate(tx.init(weights()), endless)
    assert_type(rate, jax.Array)
    made: list[optax.Schedule] = [
        jaxopt_lab.branch_decay(endless, start_step=20, decay_steps=5, decay_shape="sqrt"),
        jaxopt_lab.inverse_sqrt_schedule(1e-3, warmup_steps=10),
        jaxopt_lab.refined_schedule(np.ones(20), total_steps=5, peak_value=1.0, kind="l2"),
        jaxopt_lab.rewarmed_schedule((1e-3, 5e-4), (100, 100), warmup_steps=10),
        jaxopt_lab.uba_schedule(1e-3, 1e-4, total_steps=10, phi=2.0, angle="continuous"),
    ]
    for schedule in made:
        assert jnp.shape(schedule(3)) == ()
    jaxopt_lab.scale_learning_rate(0.1, 256, 1024, "sqrt", saturation=512)


def adapters(params: Params, key: jax.Array) -> None:
    config = jaxopt_lab.LoraConfig(target_modules=["dense"], r=2, lora_alpha=4)
    batches = [jnp.ones((4, 8))]
    gradients = jaxopt_lab.estimate_gradients(loss, params, batches, config)

    def model(params: Params, x: jax.Array) -> jax.Array:
        return x @ params["dense"]["kernel"] + params["dense"]["bias"]

    moments = jaxopt_lab.estimate_covariances(model, params, [jnp.eye(8)], config)
    inits = [
        jaxopt_lab.lora_ga(gradients, direction="ArB2r", scale="stable"),
        jaxopt_lab.corda(moments, corda_method="ipm"),
        jaxopt_lab.olora(),
        jaxopt_lab.pissa("auto", power_iterations=2),
    ]
    for init in inits:
        jaxopt_lab.init_adapters(params, config, key, init=init)
    jaxopt_lab.init_adapters(params, jaxopt_lab.MissConfig(target_modules="dense", r=2))
    base, lora = jaxopt_lab.init_adapters(params, config, key)
    full: Params = jaxopt_lab.apply_adapters(base, lora)
    merged = jaxopt_lab.merge_adapters(base, lora)
    jaxopt_lab.unmerge_adapters(merged, lora)
    jaxopt_lab.factored(model)(base, lora, batches[0], key=key)
    scatter = jaxopt_lab.estimate_scatter(model, params, [jnp.eye(8)], config)
    shared, start = jaxopt_lab.eva(scatter, config, rho=2.0)
    jaxopt_lab.init_adapters(params, shared, init=start)
    jaxopt_lab.join_adapters(base, [lora, lora], [0.5, 0.5], "svd", svd_rank=2)
    tx = jaxopt_lab.lora_plus(optax.adamw, 1e-3, ratio=16)
    tx.update(jax.tree.map(jnp.ones_like, lora), tx.init(lora), lora)
    optax.partition(
        {"train": optax.adam(1e-3), "freeze": optax.set_to_zero()}, jaxopt_lab.perp_labels
    )
    jaxopt_lab.ist(optax.adam(1e-3), trained=0.5)
    names = {"dense/kernel": "model.dense"}
    with tempfile.TemporaryDirectory() as folder:
        written = jaxopt_lab.write_peft_folder(pathlib.Path(folder), base, lora, names)
        jaxopt_lab.read_peft_folder(written, params, names, adapter_name="default")
        with contextlib.suppress(FileNotFoundError):
            jaxopt_lab.read_mlx_folder(f"{folder}/none", params, names)
        with contextlib.suppress(FileNotFoundError):
            jaxopt_lab.read_kohya_file(pathlib.Path(folder) / "none" / "x", params, names)
    jaxopt_lab.task_arithmetic(params, [full], [0.5])
    jaxopt_lab.ties_merge(params, [full], density=0.5, elect="mass")
    jaxopt_lab.breadcrumbs_merge(params, [full], keep=0.5, remove=0.1, scope="row")


def exchanges() -> list[optax.GradientTransformation]:
    distributed = jaxopt_lab.distributed
    codec = distributed.top_k(count=1)
    return [
        jaxopt_lab.diloco(optax.adamw(1e-3), optax.sgd(0.7), 4, axis_name="r"),
        jaxopt_lab.noloco(optax.adamw(1e-3), sync_every=4, axis_name="r"),
        jaxopt_lab.co2(optax.adamw(1e-3), sync_every=4, axis_name="r"),
        jaxopt_lab.gossip(optax.sgd(1e-3), axis_name="r", graph="ring"),
        jaxopt_lab.local_updates(
            optax.sgd(1e-3), distributed.gossip_exchange(axis_name="r"), sync_every=2
        ),
        jaxopt_lab.one_bit_adam(1e-3, 4, "r"),
        optax.chain(jaxopt_lab.scale_by_one_bit_adam(4, "r"), optax.scale(-1e-3)),
        optax.chain(jaxopt_lab.compressed_mean(codec, "r"), optax.sgd(1e-3)),
        optax.chain(jaxopt_lab.error_feedback(codec, "r"), optax.sgd(1e-3)),
        optax.chain(jaxopt_lab.ef21(codec, "r", init="zero"), optax.sgd(1e-3)),
        optax.chain(jaxopt_lab.econtrol(codec, "r"), optax.sgd(1e-3)),
        optax.chain(jaxopt_lab.powersgd(2, "r"), optax.sgd(1e-3)),
        optax.chain(jaxopt_lab.sync_gradients("r", op="mean"), optax.sgd(1e-3)),
    ]


def wires() -> None:
    hierarchy = jaxopt_lab.hierarchical_mean(jaxopt_lab.sync_gradients("host"), "device")
    both = jax.vmap(
        jax.vmap(lambda g: hierarchy.update(g, hierarchy.init(g))[0], axis_name="device"),
        axis_name="host",
    )
    both(jnp.ones((2, 2, 3)))
    x = jax.ShapeDtypeStruct((1000,), jnp.float32)
    jaxopt_lab.wire_bytes(lambda x: jax.lax.pmean(x, "r"), x, axis_sizes={"r": 8}).by_kind()


def attention(x: jax.Array, either: bool) -> None:
    assert_type(pallas_kernels.attention(x, x, x, is_causal=True), jax.Array)
    output, residual = pallas_kernels.attention(x, x, x, return_residual=True)
    assert_type(residual, jax.Array)
    assert output.shape == x.shape
    found = pallas_kernels.attention(
        x, x, x, return_residual=either, implementation=("chunked", "reference")
    )
    assert_type(found, jax.Array | tuple[jax.Array, jax.Array])
    pallas_kernels.attention(x, x, x, implementation="reference")


def contract() -> None:
    report = testing.check_transform(optax.sgd, 0.1, checks=["none_leaf"], level="must")
    assert_type(report.ok, bool)


def main() -> None:
    params, key = weights(), jax.random.key(0)
    for tx in optimizers():
        step(tx, params)
    replicas: Any = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), params)
    for tx in exchanges():
        jax.vmap(lambda params: step(tx, params), axis_name="r")(replicas)  # noqa: B023
    compact_state(params, key)
    schedules()
    adapters(params, key)
    wires()
    attention(jnp.ones((1, 8, 2, 4)), either=False)
    contract()


if __name__ == "__main__":
    main()
