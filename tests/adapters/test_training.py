"""What is trained, and how: LoRA+, IST, PERP, and what a step with adapters needs."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxopt_lab import adapters
from jaxopt_lab.adapters.ist import _distinct, _draw
from tests.adapters import models

KEY = jax.random.key(0)


def test_lora_plus_with_gradient_descent():
    m = models.linen()
    config = adapters.LoraConfig(
        target_modules=m.targets, r=2, kernel_axes=m.kernel_axes, use_dora=True
    )
    _, factors = adapters.init_adapters(m.params, config, KEY)
    grads = jax.tree.map(jnp.ones_like, factors)

    def updates(tx):
        return jax.jit(tx.update)(grads, tx.init(factors), factors)[0]

    found = updates(adapters.lora_plus(optax.sgd, lambda count: 0.5 + 0 * count, 8))
    for path, update in jax.tree_util.tree_leaves_with_path(found):
        slow = jax.tree_util.keystr(path[-1:], simple=True) == "lora_a"
        np.testing.assert_array_equal(update, -0.5 if slow else -4.0)
    for one, other in zip(
        *map(
            jax.tree.leaves,
            (updates(adapters.lora_plus(optax.adam, 0.1, 1)), updates(optax.adam(0.1))),
        )
    ):
        np.testing.assert_array_equal(one, other)
    labels = adapters.lora_plus_labels({"norm": {"scale": jnp.ones(3)}, "k": jnp.ones((2, 2))})
    assert labels == {"norm": {"scale": "b"}, "k": "a"}
    with pytest.raises(ValueError, match=r"ratio must be at least 1, got 0.5"):
        adapters.lora_plus(optax.sgd, 0.1, 0.5)
    with pytest.raises(TypeError, match=r"ratio must be a number, got '4' \(str\)"):
        adapters.lora_plus(optax.sgd, 0.1, "4")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"learning_rate must be a number, got '0.1' \(str\)"):
        adapters.lora_plus(optax.sgd, "0.1", 4)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="optimizer must be a function of the learning rate, such"):
        adapters.lora_plus(optax.sgd(0.1), 0.1, 4)  # type: ignore[arg-type]


LAYERS = 8


def layered():
    return {
        "layers": {
            str(i): {"lora_a": jnp.ones((3, 2)), "lora_b": jnp.ones((2, 3))} for i in range(LAYERS)
        },
        "head": {"bias": jnp.zeros(3)},
    }


@pytest.fixture(scope="module")
def ist_run():
    """States and parameters of 25 steps with Adam; the loss needs layer 0 above all."""
    params = layered()
    tx = adapters.ist(optax.adam(0.01), probe_every=5)
    weights = jnp.array([3.0] + [0.01] * (LAYERS - 1))

    def loss(params):
        parts = [jnp.sum(p["lora_a"] @ p["lora_b"]) for p in params["layers"].values()]
        return jnp.sum(weights * (22 - jnp.stack(parts)) ** 2) / 500 + jnp.sum(
            (params["head"]["bias"] - 1) ** 2
        )

    @jax.jit
    def step(params, state):
        updates, new = tx.update(jax.grad(loss)(params), state, params, value_fn=loss)
        return optax.apply_updates(params, updates), new

    state = tx.init(params)
    run = [(params, state)]
    for _ in range(25):
        params, state = step(params, state)
        run.append((params, state))
    assert step._cache_size() == 1  # type: ignore[attr-defined]
    return run, loss


def test_ist_trains_a_fourth_of_the_layers(ist_run):
    run, _ = ist_run
    trained = np.zeros(LAYERS, int)
    for (before, old), (after, new) in itertools.pairwise(run):
        changed = [
            any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (x, y))))
            for x, y in zip(before["layers"].values(), after["layers"].values())
        ]
        assert sum(changed) == LAYERS // 4
        for layer, (one, other) in enumerate(zip(old.inner, new.inner)):
            same = jax.tree.map(lambda a, b: bool((a == b).all()), one, other)
            # Moments and counters of a layer that rests stay, those of the rest move.
            assert all(jax.tree.leaves(same)) == (layer < LAYERS and not changed[layer])
        trained += changed
        assert (after["head"]["bias"] != before["head"]["bias"]).all()
    counts = [int(state[0].count) for state in run[-1][1].inner]
    assert counts == [*trained, 25]


def test_ist_probes_by_the_formula(ist_run):
    run, loss = ist_run
    probes = [i for i, (_, state) in enumerate(run[1:]) if i and i % 5 == 0 and state]
    assert probes == [5, 10, 15, 20]
    for index, ((params, old), (_, new)) in enumerate(itertools.pairwise(run)):
        if index not in probes:
            np.testing.assert_array_equal(new.scores, old.scores)
            continue
        _, key, _ = jax.random.split(old.key, 3)
        sets = np.asarray(_distinct(key, jax.nn.log_sigmoid(old.scores), 4, 3))
        assert (sets.sum(1) == 4).all()
        assert len({tuple(s) for s in sets}) == 3
        losses = []
        for chosen in sets:
            damped = {
                name: {**p, "lora_b": p["lora_b"] * (0.25 if chosen[int(name)] else 1)}
                for name, p in params["layers"].items()
            }
            losses.append(float(loss(params | {"layers": damped})))
        rewards = np.exp(-np.array(losses)) - np.exp(-np.array(losses)).mean()
        p = 1 / (1 + np.exp(-np.asarray(old.scores)))
        expected = old.scores + 10 * (rewards @ sets) * p * (1 - p)
        np.testing.assert_allclose(new.scores, expected, 0, 1e-5)
    scores = run[-1][1].scores
    assert np.argmin(scores) == 0  # the most important layer


def test_ist_draws_by_weight():
    """The first of two drawn has the weights' distribution (20,000 draws: 1% is three sigma)."""
    weights = jnp.array([0.1, 0.2, 0.7])
    draw = jax.vmap(lambda key: _draw(key, jnp.log(weights), 1))
    found = draw(jax.random.split(KEY, 20_000)).mean(0)
    np.testing.assert_allclose(found, weights, 0, 0.01)
    draw = jax.vmap(lambda key: _draw(key, jnp.log(weights), 2))
    # Without 2: first 0 then 1, or first 1 then 0.
    left_out = 1 - draw(jax.random.split(KEY, 20_000)).mean(0)
    assert left_out[2] == pytest.approx(0.1 * 0.2 / 0.9 + 0.2 * 0.1 / 0.8, abs=0.01)


def test_ist_trains_what_is_important():
    """Scores of plus and minus 10: layers 2 and 5 are all but certain."""
    params = layered()
    tx = adapters.ist(optax.sgd(1.0))
    state = tx.init(params)
    assert isinstance(state, adapters.IstState)
    scores = jnp.full(LAYERS, 10.0).at[jnp.array([2, 5])].set(-10.0)
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = tx.update(
        grads, state._replace(scores=scores), params, value_fn=lambda p: jnp.float32(0)
    )
    flat = jax.tree_util.tree_leaves_with_path(updates)
    moved = [jax.tree_util.keystr(p, simple=True, separator="/") for p, u in flat if u.any()]
    layers = [f"layers/{i}/{name}" for i in (2, 5) for name in ("lora_a", "lora_b")]
    assert moved == ["head/bias", *layers]


def test_ist_refuses():
    params = layered()
    with pytest.raises(ValueError, match="matches no parameter, such as 'w'"):
        adapters.ist(optax.sgd(1.0)).init({"w": jnp.ones(2)})
    few = {"layers": {"0": {"lora_b": jnp.ones(2)}, "1": {"lora_b": jnp.ones(2)}}}
    with pytest.raises(ValueError, match="2 layers have fewer than probes=3 different sets of 1"):
        adapters.ist(optax.sgd(1.0)).init(few)
    tx = adapters.ist(optax.sgd(1.0))
    with pytest.raises(TypeError, match="ist needs value_fn"):
        tx.update(params, tx.init(params), params)
    with pytest.raises(ValueError, match=r"trained must be in \[0, 1\], got 1.5"):
        adapters.ist(optax.sgd(1.0), trained=1.5)


def pruned():
    kernel = models.draw(40, 12, 10)
    return {"w": jnp.where(jnp.abs(kernel) > 0.8, kernel, 0)}


@pytest.mark.parametrize("form", ["mask_lora", "lora_prune", "scale_lora"])
def test_perp_keeps_zeros(form):
    params = pruned()
    zero = params["w"] == 0
    config = adapters.PerpConfig(target_modules=["w"], r=3, lora_alpha=6, form=form)
    base, first = adapters.init_adapters(params, config, KEY)
    # Sums of r products of 1 / sqrt(r) are one up to rounding.
    np.testing.assert_allclose(adapters.apply_adapters(base, first)["w"], params["w"], 0, 2e-6)
    leaves, structure = jax.tree.flatten(first)
    factors = jax.tree.unflatten(
        structure, [models.draw(i, *x.shape) for i, x in enumerate(leaves)]
    )
    a, b = factors["w"]["lora_a"], factors["w"]["lora_b"]
    change = params["w"] * (a @ b) if form == "scale_lora" else params["w"] + 2 * (a @ b)
    effective = adapters.apply_adapters(base, factors)["w"]
    expected = change if form == "lora_prune" else jnp.where(zero, 0, change)
    np.testing.assert_allclose(effective, expected, 0, 1e-5)
    merged = adapters.merge_adapters(base, factors)
    assert (merged.params["w"][zero] == 0).all()
    np.testing.assert_allclose(merged.params["w"], jnp.where(zero, 0, change), 0, 1e-5)
    back = adapters.unmerge_adapters(merged, factors)
    np.testing.assert_array_equal(back.params["w"], params["w"])
    x = models.draw(41, 4, 12)
    model = lambda p, x: x @ p["w"]  # noqa: E731
    np.testing.assert_allclose(adapters.factored(model)(base, factors, x), x @ effective, 0, 1e-4)


def test_perp_refuses():
    with pytest.raises(ValueError, match="form must be one of"):
        adapters.PerpConfig(target_modules=["w"], form="lora")
    with pytest.raises(ValueError, match="has no such form"):
        adapters.PerpConfig(target_modules=["w"], use_dora=True)
    config = adapters.PerpConfig(target_modules=["w"], r=2)
    with pytest.raises(ValueError, match="has no computed start"):
        adapters.init_adapters(pruned(), config, init=adapters.pissa())
    with pytest.raises(ValueError, match="nothing would be trained"):
        adapters.perp_labels(pruned())


def test_perp_labels():
    params = {
        "embed": {"embedding": 0},
        "layers": {"0": {"ln_1": {"scale": 0, "bias": 0}, "up": {"kernel": 0, "bias": 0}}},
        "final_norm": {"scale": 0},
        "lm_head": {"kernel": 0, "bias": 0},
        "kiln": {"scale": 0},
    }

    def chosen(**options):
        labels = adapters.perp_labels(params, **options)
        flat = jax.tree_util.tree_leaves_with_path(labels)
        return {
            jax.tree_util.keystr(path, simple=True, separator="/")
            for path, label in flat
            if label == "train"
        }

    norms = {"layers/0/ln_1/scale", "layers/0/ln_1/bias", "final_norm/scale"}
    assert chosen(biases=False) == norms
    assert chosen(norms=False) == {"layers/0/up/bias", "lm_head/bias"}
    assert chosen(biases=False, norms=False, head=True) == {"lm_head/kernel"}


def test_a_step_has_neither_state_nor_gradient_of_the_base():
    """The compiled step against full tuning, at a width where activations are small."""
    width, depth, tokens = 256, 4, 32
    params = {"layers": {str(i): {"kernel": jnp.zeros((width, width))} for i in range(depth)}}
    config = adapters.LoraConfig(target_modules="all-linear", r=4)
    base, lora = adapters.init_adapters(params, config, KEY)
    tx = optax.adam(1e-3)
    x = jnp.zeros((tokens, width))

    def model(params, x):
        for layer in params["layers"].values():
            x = jnp.tanh(x @ layer["kernel"])
        return jnp.mean(x**2)

    def step(of):
        def run(trained, state, frozen, x):
            slope = jax.grad(of)(trained, frozen, x)
            updates, state = tx.update(slope, state, trained)
            return optax.apply_updates(trained, updates), state

        return run

    def memory(of, trained, frozen):
        compiled = (
            jax.jit(step(of), donate_argnums=(0, 1))
            .lower(trained, jax.eval_shape(tx.init, trained), frozen, x)
            .compile()
        )
        found = compiled.memory_analysis()
        assert found is not None
        return found.argument_size_in_bytes, found.temp_size_in_bytes

    kernels = depth * width * width * 4
    full = memory(lambda p, _, x: model(p, x), params, None)
    apart = memory(lambda f, base, x: adapters.factored(model)(base, f, x), lora, base)
    assert full[0] > 3 * kernels
    assert apart[0] < 1.15 * kernels  # kernels, three times 2 r / width of them, and x
    assert full[1] > kernels / 4  # at least one gradient at a time
    assert apart[1] < 0.2 * kernels  # less than one
