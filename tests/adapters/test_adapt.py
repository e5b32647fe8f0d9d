"""Adapters on every kind of layer and container: products, merging, and bad input."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend import core
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxopt_lab import adapters
from tests.adapters import compiled, models
from tests.adapters.models import config, model

KEY = jax.random.key(0)


def noise(tree):
    """The tree with other values: trained factors."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    drawn = [0.3 * jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves)]
    return jax.tree.unflatten(structure, drawn)


def gradients(m: models.Model, lora: adapters.LoraConfig):
    return adapters.estimate_gradients(
        lambda p, x: jnp.sum(m.apply(p, x) ** 2), m.params, [m.x], lora
    )


every_model = pytest.mark.parametrize("name", models.MODELS)


@every_model
def test_every_start_leaves_the_function_unchanged(name):
    m = model(name)
    lora = config(m)
    expected = m.apply(m.params, m.x)
    inits = {
        "plain": None,
        "pissa": adapters.pissa(),
        "olora": adapters.olora(),
        "lora_ga": adapters.lora_ga(gradients(m, lora)),
    }
    moments = {}
    if name not in ("convolution", "used_otherwise"):  # no product to collect inputs of
        moments = adapters.estimate_covariances(m.apply, m.params, [m.x], lora)
        inits["corda"] = adapters.corda(moments)
    if name == "raw":  # the same code, another choice
        inits["randomized"] = adapters.pissa("randomized")
        inits["kpm"] = adapters.corda(moments, "kpm")
    for start, init in inits.items():
        base, factors = compiled.init_adapters(m.params, lora, KEY, init=init)
        assert jax.tree.structure(base.params) == jax.tree.structure(m.params)
        found = m.apply(compiled.apply_adapters(base, factors), m.x)
        np.testing.assert_allclose(found, expected, 0, 4e-6 * np.abs(expected).max(), err_msg=start)
        for leaf in jax.tree.leaves(factors):
            assert leaf.dtype == jnp.float32


@every_model
def test_factored_products_equal_the_adapted_kernel(name):
    m = model(name)
    base, factors = adapters.init_adapters(m.params, config(m), KEY)
    factors = noise(factors)

    @jax.jit
    def whole(factors, x):
        return m.apply(adapters.apply_adapters(base, factors), x)

    @jax.jit
    def apart(factors, x):
        return adapters.factored(m.apply)(base, factors, x)

    expected = whole(factors, m.x)
    assert np.abs(expected - m.apply(m.params, m.x)).max() > 0.01
    np.testing.assert_allclose(apart(factors, m.x), expected, 0, 1e-5 * np.abs(expected).max())
    slopes = [jax.grad(lambda f, g=g: jnp.sum(g(f, m.x) ** 2))(factors) for g in (whole, apart)]
    for one, other in zip(*map(jax.tree.leaves, slopes)):
        np.testing.assert_allclose(one, other, 0, 2e-5 * np.abs(one).max())


@pytest.mark.parametrize("name", ["raw", "linen", "convolution", "scanned", "experts"])
def test_no_adapted_kernel_is_made(name):
    """The jaxpr of the factored function has no sum with the shape of a kernel."""
    m = model(name)
    base, factors = adapters.init_adapters(m.params, config(m), KEY)
    # A scan over layers sees one kernel of a stack; adapting works on stacks of matrices.
    shapes = set()
    for k in base.kernels:
        shapes |= {k.shape, k.shape[len(k.axes.batch) :], k.matrix, (1, *k.matrix), (3, *k.matrix)}

    def sums(jaxpr):
        found = set()
        for eqn in jaxpr.eqns:
            if eqn.primitive.name in ("add", "add_any"):
                found |= {var.aval.shape for var in eqn.outvars}
            for inner in core.jaxprs_in_params(eqn.params):
                found |= sums(inner)
        return found

    def loss(of):
        return lambda f: jnp.sum(of(f) ** 2)

    apart = loss(lambda f: adapters.factored(m.apply)(base, f, m.x))
    whole = loss(lambda f: m.apply(adapters.apply_adapters(base, f), m.x))
    assert not sums(jax.make_jaxpr(jax.grad(apart))(factors).jaxpr) & shapes
    assert sums(jax.make_jaxpr(jax.grad(whole))(factors).jaxpr) & shapes


@every_model
def test_merging_and_back(name):
    m = model(name)
    for lora in (config(m), config(m, use_dora=True)):
        base, factors = compiled.init_adapters(m.params, lora, KEY)
        factors = noise(factors)
        merged = compiled.merge_adapters(base, factors)
        expected = m.apply(compiled.apply_adapters(base, factors), m.x)
        np.testing.assert_array_equal(m.apply(merged.params, m.x), expected)
        back = compiled.unmerge_adapters(merged, factors)
        for one, other in zip(jax.tree.leaves(back.params), jax.tree.leaves(m.params)):
            # Two roundings of sums of entries up to about 4; DoRA also divides.
            np.testing.assert_allclose(one, other, 0, 4e-6)
        compiled.apply_adapters(back, factors)


def test_miss_on_stacks_and_heads():
    for name in ("linen", "experts"):
        m = model(name)
        for variant, r in ((True, 3), ("mini", 2), ("bat", 2)):
            if variant == "bat" and name == "experts":
                continue  # five inputs
            miss = adapters.MissConfig(
                target_modules=m.targets,
                r=r,
                mini_r=2,
                init_weights=variant,
                kernel_axes=m.kernel_axes,
            )
            base, blocks = compiled.init_adapters(m.params, miss)
            np.testing.assert_array_equal(
                m.apply(compiled.apply_adapters(base, blocks), m.x), m.apply(m.params, m.x)
            )
            blocks = noise(blocks)
            merged = compiled.merge_adapters(base, blocks)
            back = compiled.unmerge_adapters(merged, blocks)
            for one, other in zip(jax.tree.leaves(back.params), jax.tree.leaves(m.params)):
                np.testing.assert_allclose(one, other, 0, 1e-5)


def test_a_stack_is_many_matrices():
    """Each matrix of a stack has the factors it would have alone."""
    m = model("experts")
    init = adapters.pissa()
    _, factors = compiled.init_adapters(m.params, config(m), init=init)
    for index, kernel in enumerate(m.params["experts"]["kernel"]):
        alone = adapters.LoraConfig(target_modules=["w"], r=2, lora_alpha=3)
        _, expected = compiled.init_adapters({"w": kernel}, alone, init=init)
        for name, value in expected["w"].items():
            found = factors["experts"]["kernel"][name][index]
            np.testing.assert_allclose(found, value, 0, 1e-6 * np.abs(value).max())


def test_everything_under_jit():
    m = model("nnx_state")
    lora = config(m, use_dora=True)

    @jax.jit
    def start(params, key):
        return adapters.init_adapters(params, lora, key, init=adapters.pissa())

    base, factors = start(m.params, KEY)
    eager, expected = adapters.init_adapters(m.params, lora, KEY, init=adapters.pissa())
    assert jax.tree.structure(base) == jax.tree.structure(eager)
    for one, other in zip(jax.tree.leaves(factors), jax.tree.leaves(expected)):
        np.testing.assert_allclose(one, other, 0, 1e-5)

    @jax.jit
    def step(base, factors, state, x):
        def loss(factors):
            return jnp.mean(m.apply(adapters.apply_adapters(base, factors), x) ** 2)

        value, slope = jax.value_and_grad(loss)(factors)
        updates, state = tx.update(slope, state, factors)
        return optax.apply_updates(factors, updates), state, value

    tx = optax.adam(1e-2)
    state, values = tx.init(factors), []
    for _ in range(3):
        factors, state, value = step(base, factors, state, m.x)
        values.append(float(value))
    assert values[2] < values[0]
    assert step._cache_size() == 1  # type: ignore[attr-defined]


def test_sharded_kernels_stay_sharded():
    """Starting, adapting and merging keep a kernel where it is; one device would hold all else."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    params = {
        "attention": {"query": {"kernel": models.draw(50, 8, 2, 4)}},
        "mlp": {"kernel": models.draw(51, 8, 16)},
    }
    shardings = {
        "attention": {"query": {"kernel": NamedSharding(mesh, P("data", "model", None))}},
        "mlp": {"kernel": NamedSharding(mesh, P(None, "model"))},
    }
    placed = jax.device_put(params, shardings)
    config = adapters.LoraConfig(
        target_modules=["query", "mlp"], r=2, kernel_axes=adapters.FLAX_KERNELS, use_dora=True
    )
    base, factors = adapters.init_adapters(placed, config, init=adapters.pissa())
    alone, expected = adapters.init_adapters(params, config, init=adapters.pissa())

    @jax.jit
    def adapted(base, factors):
        return adapters.merge_adapters(base, factors).params

    for tree in (base.params, adapted(base, factors)):
        for leaf, like in zip(jax.tree.leaves(tree), jax.tree.leaves(placed)):
            assert leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim)
    for one, other in zip(
        jax.tree.leaves(adapted(base, factors)), jax.tree.leaves(adapted(alone, expected))
    ):
        np.testing.assert_allclose(one, other, 0, 1e-5)


TREE = {
    "encoder": {
        str(i): {n: {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)} for n in ("query", "up")}
        for i in range(3)
    },
    "embed": {"embedding": jnp.ones((9, 4))},
    "lm_head": {"kernel": jnp.ones((4, 9))},
}


def test_trainable_parameters_without_allocation():
    m = model("experts")

    def init(params):
        return adapters.init_adapters(params, config(m), KEY)

    base, factors = jax.eval_shape(init, m.params)
    found = adapters.trainable_parameters(base, factors)
    assert (found.trained, found.total) == (3 * 2 * (5 + 6), 3 * 5 * 6)
    assert found.kernels == (("experts/kernel", "3", "5 x 6", "2", "1.5", "66"),)
    with pytest.raises(ValueError, match="nothing at 'experts/kernel'"):
        adapters.trainable_parameters(base, {})


def test_bad_input():
    lora = adapters.LoraConfig(target_modules=["up"], r=2)
    base, factors = adapters.init_adapters(TREE, lora, KEY)
    merged = adapters.merge_adapters(base, factors)
    with pytest.raises(ValueError, match="have adapters already"):
        adapters.init_adapters(base, lora, KEY)
    with pytest.raises(TypeError, match="got dict: were adapters applied to it already"):
        adapters.apply_adapters(adapters.apply_adapters(base, factors), factors)
    for function in (adapters.apply_adapters, adapters.merge_adapters):
        with pytest.raises(ValueError, match="are merged into this base already"):
            function(merged, factors)
    with pytest.raises(ValueError, match="no adapters are merged"):
        adapters.unmerge_adapters(base, factors)
    with pytest.raises(ValueError, match="nothing at 'encoder/0/up/kernel'"):
        adapters.apply_adapters(base, {"encoder": {}})
    with pytest.raises(ValueError, match="needs a key"):
        adapters.init_adapters(TREE, lora)
    with pytest.raises(TypeError, match=r"kernel 'w' has dtype int32"):
        adapters.init_adapters(
            {"w": jnp.ones((4, 4), int)}, adapters.LoraConfig(target_modules=["w"], r=1), KEY
        )
    stacked = {"layers": {"kernel": jnp.ones((3, 4, 4))}}
    with pytest.raises(ValueError, match=r"'layers/kernel' of shape \(3, 4, 4\) has 3 axes"):
        adapters.init_adapters(stacked, adapters.LoraConfig(target_modules=["layers"]), KEY)
    wrong = adapters.LoraConfig(
        target_modules=["layers"], kernel_axes={"layers": models.Dims(5, 6)}
    )
    with pytest.raises(ValueError, match=r"kernel_axes of 'layers/kernel' name the axes \(5,\)"):
        adapters.init_adapters(stacked, wrong, KEY)
    with pytest.raises(ValueError, match="kernel_axes: 'layer' matches no kernel"):
        adapters.init_adapters(
            stacked,
            adapters.LoraConfig(target_modules=["layers"], kernel_axes={"layer": models.STACKED}),
            KEY,
        )
