"""Merging of models: what each way of merging promises."""

from __future__ import annotations

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_lab.adapters import _task_vectors
from jaxopt_lab.adapters.breadcrumbs import breadcrumbs_merge
from jaxopt_lab.adapters.task_arithmetic import task_arithmetic, task_vector
from jaxopt_lab.adapters.ties import ties_merge
from tests.adapters import compiled


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def models(count: int = 3, dtype: Any = np.float32) -> tuple[Any, list[Any]]:
    rng = np.random.default_rng(0)

    def tree() -> Any:
        return {
            "layer": {"kernel": rng.normal(size=(6, 4)), "bias": rng.normal(size=5)},
            "norm": (rng.normal(size=()),),
        }

    def typed(tree: Any) -> Any:
        floating = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, dtype)), tree)
        return {**floating, "step": jnp.array(np.int32(rng.integers(100)))}

    return typed(tree()), [typed(tree()) for _ in range(count)]


MERGES = {
    "arithmetic": lambda base, tuned: task_arithmetic(base, tuned, [0.5, -0.2, 0.3]),
    "ties": lambda base, tuned: ties_merge(base, tuned, 0.5, [1.0, 0.5, 2.0]),
    "ties-tensor": lambda base, tuned: ties_merge(
        base, tuned, 0.5, scope="tensor", elect="frequency", keep="authors"
    ),
    "breadcrumbs": lambda base, tuned: breadcrumbs_merge(base, tuned, 0.5, 0.2, 0.7),
    "breadcrumbs-layer": lambda base, tuned: breadcrumbs_merge(
        base, tuned, 0.5, 0.2, 0.7, scope="layer", remove_first=False
    ),
}
every_merge = pytest.mark.parametrize("name", MERGES)


@every_merge
@pytest.mark.parametrize("x64", [False, True])
def test_under_strict_settings(name, x64):
    base, tuned = models()
    expected = jax.jit(MERGES[name])(base, tuned)
    with (
        jax.enable_x64(x64),
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
        jax.debug_nans(True),
        jax.debug_infs(True),
    ):
        found = jax.jit(MERGES[name])(base, tuned)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("merge", [ties_merge, breadcrumbs_merge])
def test_without_jit(merge):
    base, tuned = (
        {"w": jnp.zeros((3, 2))},
        [{"w": jnp.array([[1.0, 2.0], [-5.0, 0.5], [3.0, 4.0]])}],
    )
    with jax.disable_jit():
        found = merge(base, tuned, 0.5)
    np.testing.assert_array_equal(
        found["w"], jax.jit(merge, static_argnums=2)(base, tuned, 0.5)["w"]
    )


def test_models_of_several_dtypes(x64):
    """Under strict promotion too, with weights of several types."""
    base, tuned = models(3, np.float64)
    narrow = [jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == float else x, tuned[0])]
    with jax.numpy_dtype_promotion("strict"):
        for merge in map(jax.jit, MERGES.values()):
            found = merge(base, narrow + tuned[1:])
            expected = merge(base, tuned)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)
        weights = [np.float32(0.5), 1, jnp.int32(-1)]
        found = compiled.task_arithmetic(base, tuned, weights)["norm"][0]
    change = [float(t["norm"][0] - base["norm"][0]) for t in tuned]
    assert float(found) == pytest.approx(
        float(base["norm"][0]) + 0.5 * change[0] + change[1] - change[2]
    )


# Whatever is left out, trimmed, outvoted or cut off: as (in a model, in the base) -> in the result.
BROKEN = {
    "nan": (np.nan, 0.0, np.nan),
    "infinity": (np.inf, 0.0, np.inf),
    "minus infinity": (-np.inf, 0.0, -np.inf),
    "infinity less infinity": (np.inf, np.inf, np.nan),
    "nan in the base": (0.0, np.nan, np.nan),
}
TIES: Any = ties_merge  # options by name
CHOOSING = {
    "arithmetic": lambda base, tuned: task_arithmetic(base, tuned, [0.5, 0.25, 0.25]),
    **{
        f"ties-{density}-{scope}-{elect}-{keep}": functools.partial(
            TIES, density=density, scope=scope, elect=elect, keep=keep
        )
        for density in (1.0, 0.5, 0.01)
        for scope, elect, keep in (
            ("global", "mass", "exact"),
            ("tensor", "frequency", "exact"),
            ("global", "frequency", "authors"),
        )
    },
    "ties-weighted": lambda base, tuned: ties_merge(base, tuned, 0.5, [1.0, 0.5, 0.5]),
    **{
        f"breadcrumbs-{keep}-{remove}-{scope}": functools.partial(
            breadcrumbs_merge, keep=keep, remove=remove, scope=scope
        )
        for keep, remove in ((1.0, 0.0), (0.5, 0.2), (0.0, 0.9))
        for scope in ("row", "layer")
    },
}


@pytest.mark.parametrize("name", CHOOSING)
def test_what_is_not_finite_stays_where_it_is_and_nowhere_else(name):
    merge = jax.jit(CHOOSING[name])
    base, tuned = models()
    places = (("layer", "kernel", (2, 1)), ("layer", "bias", (3,)), ("norm", 0, ()))
    for of_model, of_base, expected in BROKEN.values():
        for outer, inner, index in places:

            def broken(tree, value, place=(outer, inner, index)):
                outer, inner, index = place
                leaves = dict(enumerate(tree[outer])) if outer == "norm" else dict(tree[outer])
                leaves[inner] = leaves[inner].at[index].set(value)
                return {**tree, outer: tuple(leaves.values()) if outer == "norm" else leaves}

            found = merge(broken(base, of_base), [broken(tuned[0], of_model), *tuned[1:]])
            # An entry without a change takes as little part in the choice; a broken base changes
            # all of them.
            others = tuned[1:] if np.isfinite(of_base) else [broken(x, 0.0) for x in tuned[1:]]
            sound = merge(broken(base, 0.0), [broken(tuned[0], 0.0), *others])
            np.testing.assert_equal(np.asarray(found[outer][inner][index]), np.float32(expected))
            for a, b in zip(
                jax.tree.leaves(broken(found, 0.0)), jax.tree.leaves(broken(sound, 0.0))
            ):
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_infinities_of_two_models():
    base = {"a": jnp.zeros(3)}
    tuned = [{"a": jnp.array([np.inf, np.inf, 1.0])}, {"a": jnp.array([-np.inf, np.inf, 1.0])}]
    assert str(compiled.ties_merge(base, tuned, 1.0)["a"].tolist()) == "[nan, inf, 1.0]"
    assert str(compiled.breadcrumbs_merge(base, tuned, 0.0, 1.0)["a"].tolist()) == "[nan, inf, 0.0]"
    for found in (
        compiled.task_arithmetic(base, tuned, [1, -1]),
        compiled.ties_merge(base, tuned, 1.0, [1, -1]),
    ):
        assert str(found["a"].tolist()[:2]) == "[inf, nan]"


def test_a_model_that_is_all_nan():
    base, tuned = models()
    bad = [
        jax.tree.map(lambda x: x * jnp.nan if x.dtype == jnp.float32 else x, tuned[0]),
        *tuned[1:],
    ]
    for merge in MERGES.values():
        found = jax.jit(merge)(base, bad)
        assert all(np.isnan(x).all() for x in jax.tree.leaves(found) if x.dtype == jnp.float32)
        assert found["step"] == base["step"]


def test_other_leaves_are_those_of_the_base():
    """Counts, masks and ids are merged by nobody, whatever the models have and weigh."""
    base = {
        "w": jnp.ones(2),
        "ids": np.arange(3),
        "on": jnp.array([True]),
        "empty": jnp.ones((0, 4)),
    }
    tuned = [{**base, "ids": np.arange(3) + k, "on": jnp.array([False])} for k in (1, 2)]
    for merged in (
        compiled.task_arithmetic(base, tuned, [-1.0, -2.0]),
        compiled.ties_merge(base, tuned, 0.5, [-1.0, 2.0]),
        compiled.breadcrumbs_merge(base, tuned),
    ):
        assert merged["ids"].tolist() == [0, 1, 2]
        assert merged["ids"].dtype == jnp.asarray(base["ids"]).dtype
        assert merged["on"].tolist() == [True]
        assert merged["empty"].shape == (0, 4)


def test_negative_weights_take_a_task_away():
    base = {"w": jnp.zeros(3)}
    tuned = [{"w": jnp.array([1.0, 2.0, -3.0])}, {"w": jnp.array([1.0, -1.0, -1.0])}]
    assert compiled.task_arithmetic(base, tuned, [1.0, -1.0])["w"].tolist() == [0, 3, -2]
    # The sign is elected by the changes as they are; the weights come after it.
    assert compiled.ties_merge(base, tuned, 1.0, [1.0, -1.0])["w"].tolist() == [0, 2, -1]


@every_merge
def test_jit_gives_the_same(name):
    base, tuned = models()
    plain, compiled = MERGES[name](base, tuned), jax.jit(MERGES[name])(base, tuned)
    assert jax.tree.structure(plain) == jax.tree.structure(base)
    for a, b, leaf in zip(*map(jax.tree.leaves, (plain, compiled, base))):
        assert a.dtype == b.dtype == leaf.dtype
        assert a.shape == leaf.shape
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)  # a fused product and sum
    assert plain["step"] == base["step"]


@every_merge
def test_bfloat16_is_computed_in_float32(name):
    base, tuned = models(dtype=jnp.bfloat16)

    def widened(tree):
        return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, tree)

    merge = jax.jit(MERGES[name])
    expected = merge(widened(base), [widened(model) for model in tuned])
    found = merge(base, tuned)
    for a, b, leaf in zip(*map(jax.tree.leaves, (found, expected, base))):
        assert a.dtype == leaf.dtype
        np.testing.assert_array_equal(a, b.astype(leaf.dtype))


def test_one_untrimmed_model_is_itself(x64):
    base, (model,) = models(1, np.float64)
    for found in (
        compiled.ties_merge(base, [model], density=1),
        compiled.ties_merge(
            base, [model], density=1, scope="tensor", keep="authors", elect="frequency"
        ),
        compiled.breadcrumbs_merge(base, [model], 1, 0, 1.0),
        compiled.task_arithmetic(base, [model], [1.0]),
    ):
        expected = {**model, "step": base["step"]}
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-15), found, expected)


def test_untouched_breadcrumbs_are_task_arithmetic(x64):
    base, tuned = models(3, np.float64)
    for scope in ("row", "layer"):
        found = compiled.breadcrumbs_merge(base, tuned, 1.0, 0.0, 0.3, scope=scope)
        expected = compiled.task_arithmetic(base, tuned, np.full(3, 0.3))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-15), found, expected)


def test_average_of_models(x64):
    base, tuned = models(3, np.float64)
    found = compiled.task_arithmetic(base, tuned, [1 / 3] * 3)
    np.testing.assert_allclose(
        found["layer"]["kernel"], np.mean([t["layer"]["kernel"] for t in tuned], 0), atol=1e-15
    )


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("elect", ["mass", "frequency"])
def test_properties_of_ties(scope, elect, x64):
    base, tuned = models(3, np.float64)

    def change(tuned, factor=1.0, **options):
        scaled = [compiled.task_arithmetic(base, [model], [factor]) for model in tuned]
        options = {"density": 0.4, "scope": scope, "elect": elect, **options}
        merged = compiled.task_vector(base, compiled.ties_merge(base, scaled, **options))
        return np.concatenate([np.ravel(x) for x in jax.tree.leaves({**merged, "step": ()})])

    vectors = np.stack([change([model], density=1.0) for model in tuned])
    trimmed = np.stack([change([model]) for model in tuned])
    found = change(tuned)
    assert 0 < np.count_nonzero(found) < found.size
    np.testing.assert_allclose(change(tuned[::-1]), found, atol=1e-15)
    assert (np.abs(found) <= np.abs(vectors).max(0) + 1e-12).all()
    np.testing.assert_allclose(change(tuned, factor=3.0), 3 * found, atol=1e-13)
    # Differences of sums have noise where they are zero.
    trimmed = np.where(np.abs(trimmed) < 1e-12, 0, trimmed)
    elected = np.sign((trimmed if elect == "mass" else np.sign(trimmed)).sum(0))
    settled = elected != 0
    agreeing = (np.sign(trimmed) == elected) & (trimmed != 0)
    mean = (trimmed * agreeing).sum(0) / np.maximum(agreeing.sum(0), 1)
    np.testing.assert_allclose(found[settled], mean[settled], atol=1e-13)


def test_zero_signs():
    base = {"a": jnp.zeros(4)}
    tuned = [{"a": jnp.array([1.0, -2.0, -3.0, 0.0])}, {"a": jnp.array([-1.0, -2.0, -1.0, 0.0])}]
    majority = compiled.ties_merge(base, tuned, 1.0)["a"]
    positive = compiled.ties_merge(base, tuned, 1.0, zero_sign="positive")["a"]
    assert majority.tolist() == [-1, -2, -2, 0]
    assert positive.tolist() == [1, -2, -2, 0]
    # The majority of all leaves together, or of the leaf.
    more = {"a": base["a"], "b": jnp.zeros(5)}
    tuned = [{**model, "b": jnp.ones(5)} for model in tuned]
    assert compiled.ties_merge(more, tuned, 1.0)["a"].tolist() == [1, -2, -2, 0]
    assert compiled.ties_merge(more, tuned, 1.0, scope="tensor")["a"].tolist() == [-1, -2, -2, 0]
    # No majority: nothing agrees.
    tuned = [{"a": jnp.array([1.0, -2.0, 2.0, 0.0])}, {"a": jnp.array([-1.0, -2.0, 2.0, 0.0])}]
    assert compiled.ties_merge(base, tuned, 1.0)["a"].tolist() == [0, -2, 2, 0]


def test_equal_magnitudes_keep_the_lower_index():
    base = {"a": jnp.zeros(3), "b": jnp.zeros((2, 2))}
    tuned = [{"a": jnp.array([1.0, -1.0, 5.0]), "b": jnp.array([[1.0, 1.0], [1.0, 0.0]])}]
    kept = compiled.ties_merge(base, tuned, 4 / 7)
    assert kept["a"].tolist() == [1, -1, 5]
    assert kept["b"].tolist() == [[1, 0], [0, 0]]
    authors = compiled.ties_merge(base, tuned, 2 / 7, keep="authors")
    assert authors["b"].tolist() == [[1, 1], [1, 0]]
    assert compiled.ties_merge(base, tuned, 0.1)["a"].tolist() == [0, 0, 0]  # not one whole entry
    assert compiled.ties_merge(base, tuned, 0.1, keep="authors")["a"].tolist() == [0, 0, 5]


def test_largest_is_a_sort():
    rng = np.random.default_rng(1)
    arrays = [np.abs(rng.normal(size=shape)).round(1) for shape in ((7, 3), (0,), (), (40,))]
    flat = np.concatenate([x.ravel() for x in arrays])
    order = np.argsort(-flat, kind="stable")
    largest = jax.jit(_task_vectors.largest, static_argnums=1)
    for count in (0, 1, 5, 30, 61, 62, 100):
        marks = largest([jnp.asarray(x, jnp.float32) for x in arrays], count)
        assert [m.shape for m in marks] == [x.shape for x in arrays]
        found = np.concatenate([m.ravel() for m in marks])
        np.testing.assert_array_equal(np.flatnonzero(found), np.sort(order[:count]))


def test_breadcrumbs_of_rows_and_layers():
    kernel = np.array([[9.0, 1.0], [-5.0, 8.0], [4.0, -7.0], [3.0, 2.0]])

    def middle(name="kernel", **options):
        base = {name: jnp.zeros_like(kernel, jnp.float32)}
        return compiled.breadcrumbs_merge(
            base, [{name: jnp.asarray(kernel)}], 0.5, 0.25, 1.0, **options
        )[name].tolist()

    # Columns of four: one off the top, then two.
    assert middle() == [[0, 0], [-5, 0], [4, -7], [0, 2]]
    assert middle(axis="in") == middle(axis=lambda name, leaf: 0) == middle()
    # Rows of two: none off the top, then one.
    by_rows = [[9, 0], [0, 8], [0, -7], [3, 0]]
    assert middle(axis="last") == middle(axis=lambda name, leaf: -1) == by_rows
    assert middle(name="embedding") == by_rows
    # Eight: 9 and 8 off the top, then four.
    assert middle(scope="layer") == [[0, 0], [-5, 0], [4, -7], [3, 0]]
    # The four at the top, without the two at the very top.
    assert middle(scope="layer", remove_first=False) == [[0, 0], [-5, 0], [0, -7], [0, 0]]


def test_scalars_are_added_whole():
    assert compiled.breadcrumbs_merge(jnp.array(1.0), [jnp.array(3.0)], 0.0, 1.0, 0.5) == 2


def test_properties_of_breadcrumbs():
    base, tuned = models(1)
    vector = compiled.task_vector(base, tuned[0])["layer"]["kernel"]
    found = compiled.task_vector(base, compiled.breadcrumbs_merge(base, tuned, 0.5, 0.34, 1.0))[
        "layer"
    ]["kernel"]
    rows, kept = np.abs(vector).T, np.abs(found).T > 1e-6
    assert (kept.sum(1) <= 3).all()  # of six
    largest = np.argsort(-rows, axis=1)[:, :2]
    assert not np.take_along_axis(kept, largest, 1).any()


def test_task_vector_of_integers():
    base, (model,) = models(1, jnp.bfloat16)
    vector = compiled.task_vector(base, model)
    assert vector["step"] == 0
    assert vector["step"].dtype == base["step"].dtype
    assert vector["layer"]["bias"].dtype == jnp.float32


def test_models_that_do_not_fit():
    base, tuned = models()
    bad = {**tuned[1], "new": jnp.zeros(2)}
    bad["layer"] = {"kernel": jnp.zeros((4, 6)), "scale": jnp.zeros(5)}
    message = (
        "finetuned[1] does not match base: 'layer/bias' is missing; 'layer/scale' is not expected; "
        "'new' is not expected; 'layer/kernel' has shape (4, 6), expected (6, 4)"
    )
    for merge in MERGES.values():
        with pytest.raises(ValueError, match=re.escape(message)):
            merge(base, [tuned[0], bad, tuned[2]])
        with pytest.raises(TypeError, match="finetuned must be a list of models, got dict"):
            merge(base, tuned[0])
        with pytest.raises(ValueError, match="at least one model, got none"):
            merge(base, [])
    larger = {"embed": jnp.ones((12, 4)), "head": jnp.ones((4, 12))}
    smaller = {"embed": jnp.ones((10, 4)), "head": jnp.ones((4, 10))}
    message = (
        "finetuned[0] does not match base: 'embed' has shape (12, 4), expected (10, 4); "
        "'head' has shape (4, 12), expected (4, 10)"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        ties_merge(smaller, [larger])
    with pytest.raises(ValueError, match=re.escape("finetuned[0] does not match base: 'layer/b")):
        task_vector(base, bad)
    with pytest.raises(TypeError, match="leaf 'step' has dtype float32, expected one like int32"):
        task_vector(base, {**tuned[0], "step": jnp.zeros(())})
    with pytest.raises(TypeError, match="base leaf 'z' is complex"):
        task_vector({"z": jnp.zeros(2, jnp.complex64)}, {"z": jnp.zeros(2)})


@pytest.mark.parametrize(
    ("merge", "arguments", "message"),
    [
        (ties_merge, {"density": 0.0}, "density must be a number in (0, 1], got 0.0"),
        (ties_merge, {"density": 20}, "density must be a number in (0, 1], got 20"),
        (ties_merge, {"density": math.nan}, "density must be a number in (0, 1], got nan"),
        (ties_merge, {"scope": "layer"}, "scope must be one of global, tensor, got 'layer'"),
        (ties_merge, {"elect": "x"}, "elect must be one of mass, frequency, got 'x'"),
        (ties_merge, {"zero_sign": "x"}, "zero_sign must be one of majority, positive, got 'x'"),
        (ties_merge, {"keep": "x"}, "keep must be one of exact, authors, got 'x'"),
        (ties_merge, {"weights": [1.0]}, "weights must have shape (3,), one for each model, got"),
        (ties_merge, {"weights": 1.0}, "weights must have shape (3,), one for each model, got ()"),
        (ties_merge, {"scale": math.nan}, "scale must be finite, got nan"),
        (
            ties_merge,
            {"scale": jnp.ones(1)},
            "scale must have shape (), got an array of shape (1,)",
        ),
        (breadcrumbs_merge, {"scale": "0.2"}, "scale must be a number, got '0.2' (str)"),
        (task_arithmetic, {"weights": [1, 2, None]}, "weights[2] must be a number, got None"),
        (task_arithmetic, {"weights": [1, 2, [3]]}, "weights[2] must be a number, got [3]"),
        (
            task_arithmetic,
            {"weights": np.ones((3, 1))},
            "weights must have shape (3,), one for each",
        ),
        (task_arithmetic, {"weights": [1, 2, math.inf]}, "weights must be finite, got inf"),
        (breadcrumbs_merge, {"keep": 1.5}, "keep must be in [0, 1], got 1.5"),
        (breadcrumbs_merge, {"remove": -0.1}, "remove must be in [0, 1], got -0.1"),
        (breadcrumbs_merge, {"keep": jnp.ones(())}, "keep must be a number, got ArrayImpl"),
        (breadcrumbs_merge, {"scope": "x"}, "scope must be one of row, layer, got 'x'"),
        (breadcrumbs_merge, {"axis": 0}, "axis must be one of in, last, got 0"),
        (breadcrumbs_merge, {"axis": "in", "scope": "layer"}, "axis must be None with scope layer"),
        (breadcrumbs_merge, {"axis": lambda n, x: 5}, "axis must return an axis of 'layer/kernel'"),
    ],
)
def test_bad_arguments(merge, arguments, message):
    base, tuned = models()
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        merge(base, tuned, **arguments)
