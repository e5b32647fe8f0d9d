"""`jit`, `vmap`, `checkpoint`, derivatives of derivatives, frozen arguments, accumulation."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from tests.pallas_kernels.loss import cases

HIDDEN, WEIGHT, LABELS, *_ = cases.Case(("ignored",)).arrays()
LOSS = functools.partial(pallas_kernels.cross_entropy, block_vocabulary=8)
PLANS = [{}, {"gradient_in_forward": True, "block_tokens": 4}]


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("mapped", ["hidden", "weight", "both"])
def test_vmap_is_a_call_each(mapped, plan):
    weights = np.stack([WEIGHT, WEIGHT + 1, WEIGHT * 2])
    axes = {"hidden": (0, None, 0), "weight": (None, 0, None), "both": (0, 0, 0)}[mapped]
    args = (
        HIDDEN if axes[0] == 0 else HIDDEN[0],
        weights if axes[1] == 0 else WEIGHT,
        LABELS if axes[2] == 0 else LABELS[0],
    )
    fn = jax.value_and_grad(functools.partial(LOSS, **plan), (0, 1))
    found = jax.jit(jax.vmap(fn, axes))(*args)
    jitted = jax.jit(fn)
    for i in range(3):
        each = jitted(*(x[i] if axis == 0 else x for x, axis in zip(args, axes)))
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(each)):
            np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-6)


def test_the_gradient_of_a_mapped_loss_is_summed_over_entries():
    def mapped(weight):
        return jax.vmap(lambda h, y: LOSS(h, weight, y, reduction="sum"))(HIDDEN, LABELS).sum()

    found = jax.jit(jax.grad(mapped))(WEIGHT)
    wanted = jax.jit(jax.grad(lambda w: LOSS(HIDDEN, w, LABELS, reduction="sum")))(WEIGHT)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_checkpoint_changes_nothing(plan):
    fn = functools.partial(LOSS, **plan)
    wanted = jax.jit(jax.value_and_grad(fn, (0, 1)))(HIDDEN, WEIGHT, LABELS)
    for policy in (None, jax.checkpoint_policies.save_only_these_names("cross_entropy_lse")):
        kept = jax.checkpoint(fn, policy=policy)
        found = jax.jit(jax.value_and_grad(kept, (0, 1)))(HIDDEN, WEIGHT, LABELS)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted)):
            # Another program, whose sums are rounded in another order.
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_policy_that_saves_the_lse_spares_a_forward_pass():
    policy = jax.checkpoint_policies.save_only_these_names("cross_entropy_lse")

    def loops(policy):
        kept = jax.checkpoint(functools.partial(LOSS, reduction="sum"), policy=policy)
        program = jax.jit(jax.value_and_grad(kept, (0, 1))).lower(HIDDEN, WEIGHT, LABELS)
        return str(program.compile().as_text()).count(" while(")

    assert loops(policy) == loops(jax.checkpoint_policies.nothing_saveable) - 1


def test_a_narrow_weight_is_mapped_and_differentiated_twice():
    weight = jnp.asarray(WEIGHT, jnp.bfloat16)
    weights = jnp.stack([weight, weight + 1])

    def product(weight):
        slope = jax.grad(lambda w: LOSS(HIDDEN, w, LABELS))
        return jax.jvp(slope, (weight,), (weight,))[1]

    found = jax.jit(jax.vmap(product))(weights)
    for one, of_one in zip(weights, found):
        wanted = jax.jit(product)(one.astype(jnp.float32))
        # The result is rounded once, and so is a gradient on its way.
        np.testing.assert_allclose(of_one.astype(np.float32), wanted, rtol=0.01, atol=1e-3)


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_hessian_vector_products(plan):
    direction = np.cos(np.arange(WEIGHT.size, dtype=np.float32)).reshape(WEIGHT.shape)
    loss = functools.partial(pallas_kernels.cross_entropy, logits_soft_cap=2.0, z_loss=0.1)

    def product(fn):
        slope = jax.grad(lambda w: fn(HIDDEN, w, LABELS))
        return jax.jit(lambda: jax.jvp(slope, (WEIGHT,), (direction,))[1])()

    found = product(functools.partial(loss, block_vocabulary=8, **plan))
    wanted = product(functools.partial(loss, implementation="reference"))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_forward_mode_of_the_loss_is_the_definition_s_alone(plan):
    def moved(**options):
        fn = functools.partial(pallas_kernels.cross_entropy, HIDDEN, labels=LABELS, **options)
        return jax.jit(lambda w: jax.jvp(fn, (w,), (w,))[1])(WEIGHT)

    with pytest.raises(TypeError, match=r"jvp.*custom_vjp"):
        moved(**plan)
    slope = jax.jit(jax.grad(LOSS, 1))(HIDDEN, WEIGHT, LABELS)
    wanted = np.vdot(slope, WEIGHT)
    np.testing.assert_allclose(moved(implementation="reference"), wanted, rtol=1e-5)


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_gradients_add_up_over_micro_batches(plan):
    fn = functools.partial(LOSS, reduction="sum", **plan)
    slope = jax.grad(lambda w, h, y: fn(h, w, y))

    def accumulated(weight):
        def step(total, batch):
            return total + slope(weight, *batch), None

        return jax.lax.scan(step, jnp.zeros_like(weight), (HIDDEN, LABELS))[0]

    wanted = jax.jit(slope)(WEIGHT, HIDDEN, LABELS)
    np.testing.assert_allclose(jax.jit(accumulated)(WEIGHT), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_a_factor_after_the_loss_scales_its_gradients(plan):
    fn = functools.partial(LOSS, **plan)
    slope = jax.jit(jax.grad(lambda w: 3 * fn(HIDDEN, w, LABELS)))(WEIGHT)
    wanted = 3 * jax.jit(jax.grad(fn, 1))(HIDDEN, WEIGHT, LABELS)
    np.testing.assert_allclose(slope, wanted, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_nothing_is_computed_for_a_frozen_weight(plan):
    hidden, weight = jnp.ones((64, 32)), jnp.ones((32, 4096))
    labels = jnp.zeros(64, int)
    fn = functools.partial(pallas_kernels.cross_entropy, block_vocabulary=256, **plan)
    compiled = jax.jit(jax.grad(fn)).lower(hidden, weight, labels).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < weight.nbytes


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_class_weights_are_constants(reduction):
    def loss(weights):
        return LOSS(HIDDEN, WEIGHT, LABELS, class_weights=weights, reduction=reduction).sum()

    np.testing.assert_array_equal(jax.jit(jax.grad(loss))(jnp.ones(37)), 0)


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_strict_promotion(plan):
    hidden, weight = jnp.asarray(HIDDEN, jnp.bfloat16), jnp.asarray(WEIGHT)
    fn = functools.partial(
        LOSS, bias=jnp.ones(37, jnp.float16), class_weights=jnp.ones(37, jnp.bfloat16),
        label_smoothing=0.1, z_loss=0.1, logits_soft_cap=3.0, **plan,
    )  # fmt: skip
    with jax.numpy_dtype_promotion("strict"):
        loss, gradients = jax.jit(jax.value_and_grad(fn, (0, 1)))(hidden, weight, LABELS)
    assert np.isfinite(loss)
    assert [str(x.dtype) for x in gradients] == ["bfloat16", "float32"]


def test_a_program_for_any_number_of_tokens_is_exported():
    (tokens,) = jax.export.symbolic_shape("tokens")
    structs = (
        jax.ShapeDtypeStruct((tokens, 6), jnp.float32),
        jax.ShapeDtypeStruct(WEIGHT.shape, jnp.float32),
        jax.ShapeDtypeStruct((tokens,), jnp.int32),
    )
    fn = jax.value_and_grad(LOSS, (0, 1))
    with pytest.raises(ValueError, match=r"gradient_in_forward=True.*\(tokens, 6\)"):
        jax.eval_shape(functools.partial(LOSS, gradient_in_forward=True), *structs)
    exported = jax.export.export(jax.jit(fn))(*structs)
    args = HIDDEN[0], WEIGHT, LABELS[0]
    wanted = jax.jit(fn)(*args)
    for a, b in zip(jax.tree.leaves(exported.call(*args)), jax.tree.leaves(wanted)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
