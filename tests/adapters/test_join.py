"""Joining adapters: the change of each kernel is the weighted sum of theirs."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_lab import adapters
from tests.adapters import compiled, golden, models

KEY = jax.random.key(0)


def tree():
    return {
        "attention": {"query": {"kernel": models.draw(1, 6, 2, 3)}},
        "experts": {"kernel": models.draw(2, 3, 5, 4)},
        "head": {"kernel": models.draw(3, 6, 4), "bias": models.draw(4, 4)},
        "model": {"head": {"kernel": models.draw(5, 6, 4)}},
    }


AXES = {"query": models.Dims((0,), (1, 2)), "experts": models.STACKED}


def trained(seed, **changes):
    """A base and adapters with other values."""
    config = adapters.LoraConfig(**{"r": 2, "kernel_axes": AXES} | changes)
    base, factors = compiled.init_adapters(tree(), config, KEY)
    leaves, structure = jax.tree.flatten(factors)
    new = [x + models.draw(10 * seed + i, *x.shape) for i, x in enumerate(leaves)]
    return base, jax.tree.unflatten(structure, new)


@functools.cache
def three():
    """Other ranks, scalings and kernels in each."""
    return (
        trained(1, target_modules=["query", "experts"], lora_alpha=4),
        trained(2, target_modules=["query", r"model.head"], r=3, lora_alpha=5, use_rslora=True),
        trained(3, target_modules=["experts", "attention.query"], r=1, rank_pattern={"query": 4}),
    )


def apart(pairs) -> tuple[list[adapters.AdapterBase], list[Any]]:
    return [base for base, _ in pairs], [factors for _, factors in pairs]


WEIGHTS = [0.7, -0.4, 1.5]


def exact(pairs, weights):
    """The base plus the weighted sum of what each adapter changes, in float64."""
    start = jax.tree.map(lambda x: np.asarray(x, np.float64), tree())
    new = start
    for (base, factors), weight in zip(pairs, weights):
        moved = compiled.apply_adapters(base, factors)
        new = jax.tree.map(lambda n, m, s, w=weight: n + w * (np.asarray(m) - s), new, moved, start)
    return new


def check(joined, expected, tolerance=3e-6):
    found = compiled.apply_adapters(*joined)
    for one, other in zip(*map(jax.tree.leaves, (found, expected))):
        np.testing.assert_allclose(one, other, 0, tolerance * np.abs(other).max())


@pytest.mark.parametrize("how", [{"combination_type": "cat"},
                                 {"combination_type": "svd", "svd_rank": 7}])  # fmt: skip
def test_the_joined_adapter_is_the_sum_of_all(how):
    pairs = three()
    bases, factors = apart(pairs)
    join = jax.jit(lambda bases, factors: adapters.join_adapters(bases, factors, WEIGHTS, **how))
    joined = join(bases, factors)
    check(joined, exact(pairs, WEIGHTS))
    base, new = joined
    assert [k.name for k in base.kernels] == [
        "attention/query/kernel", "experts/kernel", "model/head/kernel"
    ]  # fmt: skip
    # Ranks add up; a matrix of six inputs and outputs has no more than six directions.
    cat = how["combination_type"] == "cat"
    assert [k.r for k in base.kernels] == ([9, 3, 3] if cat else [6, 3, 3])
    # The config makes the same kernels, so that a run can go on from there.
    again, fresh = adapters.init_adapters(tree(), base.config, KEY)
    assert again.kernels == base.kernels
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, new)
    check((again, new), exact(pairs, WEIGHTS))


def test_svd_is_the_best_approximation():
    pairs = three()
    bases, factors = apart(pairs)
    base, new = adapters.join_adapters(bases, factors, WEIGHTS, "svd", svd_rank=2)
    whole = exact(pairs, WEIGHTS)
    found = adapters.apply_adapters(base, new)
    for kernel in base.kernels:
        change, best, start = (
            kernel.matrices(
                jnp.asarray(functools.reduce(lambda t, k: t[k], kernel.name.split("/"), x))
            )
            for x in (found, whole, tree())
        )
        tail = np.linalg.svd(np.asarray(best - start), compute_uv=False)[:, 2:]
        rest = np.linalg.norm(np.asarray(best - change), axis=(1, 2))
        np.testing.assert_allclose(rest, np.linalg.norm(tail, axis=1), 1e-4, 1e-5)
    # By default the largest rank of the adapters that a kernel has.
    base, _ = adapters.join_adapters(bases, factors, WEIGHTS, "svd")
    assert [k.r for k in base.kernels] == [4, 2, 3]


def test_one_base_for_all_and_weights_that_are_traced():
    base, one = trained(1, target_modules=["query", "experts"])
    _, two = trained(2, target_modules=["query", "experts"])
    expected = exact([(base, one), (base, two)], [0.25, 0.75])

    @jax.jit
    def joined(weights):
        return adapters.apply_adapters(*adapters.join_adapters(base, [one, two], weights, "svd"))

    found = joined(jnp.array([0.25, 0.75]))
    whole = adapters.join_adapters(base, [one, two], [0.25, 0.75])
    check(whole, expected)
    truncated = adapters.join_adapters(base, [one, two], [0.25, 0.75], "svd")
    check(truncated, jax.tree.map(np.asarray, found))


def test_the_config_has_the_choices_of_all():
    one = trained(1, target_modules=["query"], bias="lora_only", modules_to_save=["model"])
    two = trained(2, target_modules=["query"], bias="all", modules_to_save=["experts"])
    joined, _ = adapters.join_adapters(*apart([one, two]), [1.0, 1.0])
    assert joined.config.bias == "all"
    assert joined.config.modules_to_save == ("model", "experts")


def test_leaves_that_are_trained_whole_move_likewise():
    one = trained(1, target_modules=["query"], modules_to_save=["head"])
    two = trained(2, target_modules=["query"], bias="all", modules_to_save=["model.head"])
    base, new = adapters.join_adapters([one[0], two[0]], [one[1], two[1]], [0.5, -2])
    assert base.whole == ("head/bias", "head/kernel", "model/head/kernel")
    check((base, new), exact([one, two], [0.5, -2]))
    again, _ = adapters.init_adapters(tree(), base.config, KEY)
    assert again.whole == base.whole


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_the_numbers_of_peft(kind):
    with np.load(golden.FOLDER / "merging.npz") as arrays:
        data = {name: arrays[name] for name in arrays.files if name.startswith("lw_")}
    with jax.enable_x64(True):
        config = adapters.LoraConfig(
            target_modules=["w"], r=3, lora_alpha=3 * float(data["lw_scaling"])
        )
        base, _ = adapters.init_adapters({"w": jnp.zeros((10, 12))}, config, KEY)
        sides = {"lora_a": "A", "lora_b": "B"}
        both = [
            {"w": {name: jnp.asarray(data[f"lw_{n}_{side}"].T) for name, side in sides.items()}}
            for n in "ab"
        ]
        joined = adapters.join_adapters(
            base, both, data["lw_weights"], kind, svd_rank=6 if kind == "svd" else None
        )
        found = np.asarray(adapters.apply_adapters(*joined)["w"]).T
    for name in (f"lw_{kind}_delta", "lw_exact_delta"):
        # Theirs is stored in float32.
        np.testing.assert_allclose(found, data[name], 0, 2e-6 * np.abs(found).max())


def test_what_cannot_be_joined_is_refused_by_name():
    base, one = trained(1, target_modules=["head"])
    dora = trained(1, target_modules=["head"], use_dora=True)
    pissa = trained(1, target_modules=["model.head"], init_lora_weights="pissa")
    params = tree() | {"head": {"kernel": jnp.ones((6, 5)), "bias": jnp.ones(5)}}
    other = adapters.init_adapters(params, adapters.LoraConfig(target_modules=["head"]), KEY)
    miss = adapters.init_adapters(tree(), adapters.MissConfig(target_modules=["head"], r=2))
    whole = trained(1, target_modules=["query"], modules_to_save=["head"])
    flat = trained(1, target_modules=["query"], kernel_axes={"query": models.Dims((0, 1), (2,))})
    heads = trained(1, target_modules=["query"])
    wide = trained(1, target_modules=["head"], r=3)
    for pairs, message in [
        ([dora], "got adapters of DoRA"),
        ([miss], "got adapters of MissConfig"),
        ([pissa], "has changed their base; convert them with to_plain_lora"),
        ([(base, one), other], r"base 1 has shape \(5,\) at 'head/bias', the first \(4,\)"),
        ([(base, one), whole], "kernel 'head/kernel' is trained whole in one adapter and has"),
        ([heads, flat], "base 1 has other axes for kernel 'attention/query/kernel'"),
        ([(base, wide[1])], r"lora_a of shape \(6, 3\).*'head/kernel'"),
        ([(adapters.merge_adapters(base, one), one)], "join_adapters: adapters are merged"),
    ]:
        bases, factors = apart(pairs)
        with pytest.raises(ValueError, match=message):
            adapters.join_adapters(bases, factors, [1.0] * len(pairs))
    for arguments, message in [
        ((base, [one], [1.0, 2.0]), r"weights must have shape \(1,\)"),
        ((base, [one], [float("nan")]), "weights must be finite"),
        ((base, [], []), "needs adapters, and one base for all"),
        (([base], [one, one], [1, 1]), "got 2 adapters and 1 bases"),
        ((base, [one], [1.0], "linear"), "combination_type must be 'cat' or 'svd', got 'linear'"),
    ]:
        with pytest.raises(ValueError, match=message):
            adapters.join_adapters(*arguments)
    with pytest.raises(ValueError, match="svd_rank is of combination_type='svd'"):
        adapters.join_adapters(base, [one], [1.0], svd_rank=2)
    with pytest.raises(ValueError, match="svd_rank must be a positive integer"):
        adapters.join_adapters(base, [one], [1.0], "svd", svd_rank=0)
    with pytest.raises(TypeError, match="join_adapters needs the base"):
        adapters.join_adapters([tree()], [one], [1.0])  # type: ignore[list-item]
