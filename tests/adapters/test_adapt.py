"""Adapters on every kind of layer and container: starts, products, merging, and bad input."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend import core
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxopt_lab import adapters
from jaxopt_lab.adapters import _kernels
from tests.adapters import models

KEY = jax.random.key(0)


@functools.cache
def model(name: str) -> models.Model:
    return models.MODELS[name]()


def config(m: models.Model, **changes) -> adapters.LoraConfig:
    arguments = {"target_modules": m.targets, "r": 2, "lora_alpha": 3} | changes
    return adapters.LoraConfig(kernel_axes=m.kernel_axes, **arguments)


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
        base, factors = adapters.init_adapters(m.params, lora, KEY, init=init)
        assert jax.tree.structure(base.params) == jax.tree.structure(m.params)
        found = m.apply(adapters.apply_adapters(base, factors), m.x)
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
        base, factors = adapters.init_adapters(m.params, lora, KEY)
        factors = noise(factors)
        merged = adapters.merge_adapters(base, factors)
        expected = m.apply(adapters.apply_adapters(base, factors), m.x)
        np.testing.assert_array_equal(m.apply(merged.params, m.x), expected)
        back = adapters.unmerge_adapters(merged, factors)
        for one, other in zip(jax.tree.leaves(back.params), jax.tree.leaves(m.params)):
            # Two roundings of sums of entries up to about 4; DoRA also divides.
            np.testing.assert_allclose(one, other, 0, 4e-6)
        adapters.apply_adapters(back, factors)


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
            base, blocks = adapters.init_adapters(m.params, miss)
            np.testing.assert_array_equal(
                m.apply(adapters.apply_adapters(base, blocks), m.x), m.apply(m.params, m.x)
            )
            blocks = noise(blocks)
            merged = adapters.merge_adapters(base, blocks)
            back = adapters.unmerge_adapters(merged, blocks)
            for one, other in zip(jax.tree.leaves(back.params), jax.tree.leaves(m.params)):
                np.testing.assert_allclose(one, other, 0, 1e-5)


def test_a_stack_is_many_matrices():
    """Each matrix of a stack has the factors it would have alone."""
    m = model("experts")
    init = adapters.pissa()
    _, factors = adapters.init_adapters(m.params, config(m), init=init)
    for index, kernel in enumerate(m.params["experts"]["kernel"]):
        alone = adapters.LoraConfig(target_modules=["w"], r=2, lora_alpha=3)
        _, expected = adapters.init_adapters({"w": kernel}, alone, init=init)
        for name, value in expected["w"].items():
            found = factors["experts"]["kernel"][name][index]
            np.testing.assert_allclose(found, value, 0, 1e-6 * np.abs(value).max())


def test_pissa_is_the_best_approximation():
    """What stays in the base is the rest of the spectrum, for any alpha, in any axes."""
    m = model("linen")
    for alpha in (1, 16):
        base, _ = adapters.init_adapters(
            m.params, config(m, lora_alpha=alpha), init=adapters.pissa()
        )
        for kernel in base.kernels:
            rest, whole = (
                kernel.matrices(_kernels.named_leaves(p)[kernel.name])[0]
                for p in (base.params, m.params)
            )
            tail = np.linalg.svd(whole, compute_uv=False)[2:]
            np.testing.assert_allclose(np.linalg.norm(rest), np.linalg.norm(tail), 1e-5)


def test_randomized_pissa_is_as_good_as_promised():
    """With 2 r test vectors and 4 iterations the median error is 2e-4 for a slow spectrum."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(n, 24)))[0] for n in (24, 32))
    kernel = jnp.asarray(u * 0.85 ** np.arange(24) @ v.T, jnp.float32)
    lora = adapters.LoraConfig(target_modules=["w"], r=4, lora_alpha=4)
    _, exact = adapters.init_adapters({"w": kernel}, lora, init=adapters.pissa("full"))
    expected = exact["w"]["lora_a"] @ exact["w"]["lora_b"]
    errors = []
    for seed in range(9):
        _, found = adapters.init_adapters(
            {"w": kernel}, lora, jax.random.key(seed), init=adapters.pissa("randomized")
        )
        error = np.linalg.norm(found["w"]["lora_a"] @ found["w"]["lora_b"] - expected)
        errors.append(error / np.linalg.norm(expected))
    assert np.median(errors) < 1e-3


def test_bfloat16_base_loses_one_rounding():
    kernel = jax.random.normal(KEY, (12, 8)).astype(jnp.bfloat16)
    lora = adapters.LoraConfig(target_modules=["w"], r=3)
    for init in (adapters.pissa(), adapters.olora()):
        base, factors = adapters.init_adapters({"w": kernel}, lora, init=init)
        assert base.params["w"].dtype == jnp.bfloat16
        assert factors["w"]["lora_a"].dtype == jnp.float32
        a, b = (factors["w"][name] for name in ("lora_a", "lora_b"))
        whole = base.params["w"].astype(jnp.float32) + base.kernels[0].scaling * a @ b
        rest = np.abs(np.asarray(base.params["w"], np.float32))
        half_ulp = 2.0 ** (np.floor(np.log2(np.maximum(rest, 1e-30))) - 8)
        assert (np.abs(whole - kernel.astype(jnp.float32)) <= half_ulp * 1.01 + 2e-7).all()


def test_lora_ga_first_step_is_the_gradients_best_part():
    """One step of gradient descent on both factors, seen in the kernel, is parallel to the best
    part of rank 2 r, and does not depend on the loss's scale."""
    rng = np.random.default_rng(1)
    x, y = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((64, 20), (64, 24)))
    params = {"w": jnp.asarray(rng.normal(size=(20, 24)) / 5, jnp.float32)}

    def loss(params, scale):
        return scale * jnp.mean((jnp.tanh(x @ params["w"]) - y) ** 2)

    lora = adapters.LoraConfig(target_modules=["w"], r=4, lora_alpha=8, use_rslora=True)
    steps = []
    for scale in (1.0, 1000.0):
        found = adapters.estimate_gradients(loss, params, [scale], lora)
        base, factors = adapters.init_adapters(params, lora, init=adapters.lora_ga(found))

        def of_factors(factors, base=base, scale=scale):
            return loss(adapters.apply_adapters(base, factors), scale)

        assert of_factors(factors) == pytest.approx(float(loss(params, scale)), rel=2e-7 * 4)
        slope = jax.grad(of_factors)(factors)["w"]
        a, b = factors["w"]["lora_a"], factors["w"]["lora_b"]
        change = -(slope["lora_a"] @ b + a @ slope["lora_b"]) / scale
        u, s, vt = np.linalg.svd(found["w"] / scale, full_matrices=False)
        best = -(u[:, :8] * s[:8]) @ vt[:8]
        cosine = np.sum(change * best) / np.linalg.norm(change) / np.linalg.norm(best)
        assert cosine > 1 - 1e-6
        steps.append((np.asarray(a), np.asarray(change)))
    np.testing.assert_allclose(steps[0][0], steps[1][0], 0, 1e-5)
    np.testing.assert_allclose(steps[0][1], steps[1][1], 0, 1e-4 * np.abs(steps[0][1]).max())


def test_second_moments_of_stacks():
    """In a scan over layers, with experts, and over several uses of one kernel."""
    m = model("scanned")
    found = adapters.estimate_covariances(m.apply, m.params, [m.x], config(m))["layers/kernel"]
    x = np.asarray(m.x, np.float64)
    for index in range(3):
        kernel, bias = (np.asarray(m.params["layers"][n][index]) for n in ("kernel", "bias"))
        scaled = x / np.abs(x.max())
        np.testing.assert_allclose(found[index], scaled.T @ scaled, 1e-4, 1e-5)
        x = np.tanh(x @ kernel + bias)
    m = model("experts")
    found = adapters.estimate_covariances(m.apply, m.params, [m.x], config(m))["experts/kernel"]
    x = np.asarray(m.x)  # experts, batch, inputs
    scaled = x / np.abs(x.max((1, 2), keepdims=True))
    np.testing.assert_allclose(found, np.einsum("ebi,ebj->eij", scaled, scaled), 1e-5, 1e-6)

    def twice(params, x):
        return jax.lax.scan(lambda x, _: (x @ params["w"], None), x, length=2)[0]

    params, x = {"w": 2 * jnp.eye(3)}, models.draw(30, 4, 3)
    lora = adapters.LoraConfig(target_modules=["w"], r=1)
    (found,) = adapters.estimate_covariances(twice, params, [x, x], lora)["w"]
    scaled = x / np.abs(x.max())
    np.testing.assert_allclose(found, scaled.T @ scaled, 1e-5, 1e-6)  # doubling changes nothing


def test_corda_modes_share_a_kernel():
    """What one mode takes of rank r, the other leaves: together they are the kernel."""
    params = {"w": models.draw(31, 7, 5)}
    x = models.draw(32, 40, 7) * jnp.arange(1, 8)
    forward = lambda params, x: x @ params["w"]  # noqa: E731
    total = 0
    cases: Any = (("ipm", 2), ("kpm", 3))
    for method, r in cases:
        lora = adapters.LoraConfig(target_modules=["w"], r=r, lora_alpha=r)
        moments = adapters.estimate_covariances(forward, params, [x], lora)
        _, factors = adapters.init_adapters(params, lora, init=adapters.corda(moments, method))
        total += factors["w"]["lora_a"] @ factors["w"]["lora_b"]
    np.testing.assert_allclose(total, params["w"], 0, 2e-5)


def test_lora_ga_random_halves_and_clipping():
    kernel = models.draw(60, 10, 12)
    gradient = {"w": np.asarray(models.draw(61, 10, 12))}
    config = adapters.LoraConfig(target_modules=["w"], r=3, lora_alpha=3)

    def factors(**options):
        init = adapters.lora_ga(gradient, **options)
        return adapters.init_adapters({"w": kernel}, config, KEY, init=init)[1]["w"]

    u, _, vt = np.linalg.svd(gradient["w"], full_matrices=False)
    for compat in (None, "peft"):
        found = factors(direction="random", scale="unit", compat=compat)
        of_a = np.abs(u[:, :6].T @ found["lora_a"]).max(1) > 0.5
        of_b = np.abs(found["lora_b"] @ vt[:6].T).max(0) > 0.5
        assert of_a.sum() == of_b.sum() == 3
        assert (of_a == of_b).all() if compat else not (of_a & of_b).any()
    clipped, plain = (factors(stable_gamma=1e-4, norm_clip=clip) for clip in (True, False))
    largest = np.abs(kernel).max()
    assert np.abs(plain["lora_a"] @ plain["lora_b"]).max() > 2 * largest
    clipped_to = np.abs(clipped["lora_a"] @ clipped["lora_b"]).max()
    np.testing.assert_allclose(clipped_to, largest, 1e-5)


def test_gradients_in_groups_and_in_halves():
    m = model("linen")
    lora = config(m)

    def loss(p, x):
        return jnp.mean(m.apply(p, x) ** 2)

    x = models.draw(20, 4, 3, 8)
    whole = adapters.estimate_gradients(loss, m.params, [x], lora)
    halves = adapters.estimate_gradients(loss, m.params, [x[2:], x[:2]], lora, kernels_at_once=2)
    assert set(whole) == set(halves) == {k.name for k in lora.kernels(m.params)}
    for name, value in whole.items():
        assert isinstance(value, np.ndarray)
        np.testing.assert_allclose(halves[name], value, 0, 1e-6 * np.abs(value).max())


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


def test_gaussian_and_orthogonal():
    params = {"w": jnp.zeros((400, 300))}
    lora = adapters.LoraConfig(target_modules=["w"], r=4, init_lora_weights="gaussian")
    _, factors = adapters.init_adapters(params, lora, KEY)
    assert np.std(factors["w"]["lora_a"]) == pytest.approx(1 / 4, rel=0.1)
    assert not factors["w"]["lora_b"].any()
    lora = adapters.LoraConfig(target_modules=["w"], r=4, init_lora_weights="orthogonal")
    _, factors = adapters.init_adapters(params, lora, KEY)
    assert np.abs(factors["w"]["lora_a"] @ factors["w"]["lora_b"]).max() < 1e-6
    assert factors["w"]["lora_b"].any()
    lora = adapters.LoraConfig(target_modules=["w"], r=4)
    _, factors = adapters.init_adapters(params, lora, KEY)
    assert 0.98 / 20 < np.abs(factors["w"]["lora_a"]).max() <= 1 / 20


TREE = {
    "encoder": {
        str(i): {n: {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)} for n in ("query", "up")}
        for i in range(3)
    },
    "embed": {"embedding": jnp.ones((9, 4))},
    "lm_head": {"kernel": jnp.ones((4, 9))},
}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"target_modules": ["query"]}, [f"encoder/{i}/query/kernel" for i in range(3)]),
        ({"target_modules": ["encoder.1.up"]}, ["encoder/1/up/kernel"]),
        ({"target_modules": ["encoder/1/up"]}, ["encoder/1/up/kernel"]),
        ({"target_modules": r".*\.[02]\.(query|up)"}, [
            f"encoder/{i}/{n}/kernel" for i in (0, 2) for n in ("query", "up")
        ]),
        ({"target_modules": "all-linear", "exclude_modules": ["query"]}, [
            f"encoder/{i}/up/kernel" for i in range(3)
        ]),
        ({"target_modules": "all-linear", "layers_to_transform": [1]}, [
            "encoder/1/query/kernel", "encoder/1/up/kernel"
        ]),
        ({"target_modules": ["up"], "layers_to_transform": 2, "layers_pattern": "encoder"}, [
            "encoder/2/up/kernel"
        ]),
        ({"target_modules": ["embed"]}, ["embed/embedding"]),
    ],
)  # fmt: skip
def test_kernels_are_chosen_by_name(arguments, expected):
    kernels = adapters.LoraConfig(r=2, **arguments).kernels(TREE)
    assert [kernel.name for kernel in kernels] == expected


def test_ranks_and_alphas_by_pattern():
    lora = adapters.LoraConfig(
        target_modules=["query", "up"],
        r=2,
        lora_alpha=4,
        rank_pattern={"query": 1, r"2\.up": 4},
        alpha_pattern={"encoder.0.query": 8},
    )
    found = {k.name: (k.r, k.scaling) for k in lora.kernels(TREE)}
    assert found["encoder/0/query/kernel"] == (1, 8)
    assert found["encoder/1/query/kernel"] == (1, 4)
    assert found["encoder/1/up/kernel"] == (2, 2)
    assert found["encoder/2/up/kernel"] == (4, 1)


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_modules": ["quary"]}, r"'quary' matches no kernel.*encoder\.0\.query"),
        ({"target_modules": ".*qry"}, r"'\.\*qry' matches no kernel"),
        ({"target_modules": ["p"]}, "'p' matches no kernel"),  # up ends with it, but in a word
        ({"target_modules": ["up"], "rank_pattern": {"p": 1}}, "rank_pattern: 'p'"),
        ({"target_modules": ["up"], "exclude_modules": ["upp"]}, "exclude_modules: 'upp'"),
        ({"target_modules": ["up"], "exclude_modules": ["up"]}, "no kernel is left"),
        ({"target_modules": ["up"], "rank_pattern": {"query": 1}}, "rank_pattern: 'query'"),
        ({"target_modules": ["up"], "alpha_pattern": {"q": 1}}, "alpha_pattern: 'q'"),
        ({"target_modules": ["up"], "r": 0}, "r must be a positive integer"),
        ({"target_modules": ["up"], "lora_alpha": 0}, "lora_alpha must be positive"),
    ],
)
def test_bad_configs(arguments, message):
    with pytest.raises(ValueError, match=message):
        adapters.init_adapters(TREE, adapters.LoraConfig(**{"r": 2} | arguments), KEY)


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


def test_bad_starts():
    params = {"w": jnp.ones((4, 6))}
    lora = adapters.LoraConfig(target_modules=["w"], r=2)
    good = {"w": np.ones((4, 6), np.float32)}
    for init, message in [
        (adapters.lora_ga({}), "no gradient of kernel 'w'"),
        (adapters.lora_ga({"w": np.ones((6, 4))}), r"has shape \(6, 4\), the kernel \(4, 6\)"),
        (adapters.lora_ga({"w": 0 * good["w"]}), "zero or not finite"),
        (adapters.lora_ga(good, direction="random"), "needs the key"),
        (adapters.pissa("randomized"), "needs a key"),
    ]:
        with pytest.raises(ValueError, match=message):
            adapters.init_adapters(params, lora, init=init)
    wide = adapters.LoraConfig(target_modules=["w"], r=3)
    with pytest.raises(ValueError, match=r"2 r = 6 directions .* kernel 'w'.* has 4"):
        adapters.init_adapters(params, wide, init=adapters.lora_ga(good))
    moment = {"w": np.eye(4, dtype=np.float32)}
    for init, message in [
        (adapters.corda({}), "no second moment of the inputs of kernel 'w'"),
        (adapters.corda(moment), r"has shape \(4, 4\); expected \(1, 4, 4\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            adapters.init_adapters(params, lora, init=init)
    for fun, x, message in [
        (lambda p, x: jnp.sum(p["w"]) + x, 0.0, "found no product .* kernel 'w'"),
        (lambda p, x: x @ p["w"], jnp.zeros((2, 4)), "all inputs of kernel 'w' were zero"),
    ]:
        with pytest.raises(ValueError, match=message):
            adapters.estimate_covariances(fun, params, [x], lora)
    with pytest.raises(ValueError, match="at least one batch"):
        adapters.estimate_covariances(lambda p, x: x, params, [], lora)
    wrong: Any = adapters  # what a type checker would tell
    with pytest.raises(ValueError, match="corda_method must be"):
        wrong.corda({}, "IPM")
    for make in (
        lambda: wrong.lora_ga(good, direction="AB"),
        lambda: wrong.lora_ga(good, scale="gd_scale"),
        lambda: wrong.lora_ga(good, compat="torch"),
    ):
        with pytest.raises(ValueError, match="must be"):
            make()
    with pytest.raises(ValueError, match="at least one batch"):
        adapters.estimate_gradients(lambda p, x: jnp.sum(x), params, [], lora)
    with pytest.raises(ValueError, match="method must be"):
        wrong.pissa("exact")
    miss = adapters.MissConfig(target_modules=["w"], r=3, init_weights="bat")
    with pytest.raises(ValueError, match="r=3 must divide both sides of kernel 'w'"):
        adapters.init_adapters(params, miss)
    with pytest.raises(ValueError, match="starts at zero"):
        adapters.init_adapters(
            params, adapters.MissConfig(target_modules=["w"], r=2), init=adapters.pissa()
        )
