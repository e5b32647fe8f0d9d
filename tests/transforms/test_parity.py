"""Every rule reproduces the trajectories of its authors' implementation."""

from __future__ import annotations

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.transforms import cases, made_up

HERE = pathlib.Path(__file__).parents[1] / "golden" / "optimizers"


def deviation(
    case: cases.Case, tx: optax.GradientTransformation, dtype: type, steps: int | None = None
) -> float:
    """Runs the case and returns the largest error, relative to the largest entry of its leaf."""
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), case.init)
    state = tx.init(params)

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    worst = 0.0
    for t, grads in enumerate(case.grads[:steps], start=1):
        grads = jax.tree.map(lambda g: jnp.asarray(g, dtype), grads)
        params, state = step(params, state, grads)
        for name, expected in case.expected.get(t, {}).items():
            error = np.abs(np.asarray(params[name], np.float64) - expected)
            worst = max(worst, float(error.max() / np.abs(expected).max()))
    assert all(x.dtype == dtype for x in jax.tree.leaves(params))
    return worst


@pytest.mark.parametrize("name", cases.names())
def test_float64_equals_the_reference(name):
    case = cases.load(name)
    with jax.enable_x64(True):
        assert deviation(case, cases.transformation(case), jnp.float64) < 1e-9


@pytest.mark.parametrize("name", cases.names())
def test_float32_follows_the_reference(name):
    case = cases.load(name)
    # With error feedback the rounding of the huge gradient is carried over: 1e4 times 6e-8 of the
    # gradients that follow, forever. Until then these runs are like all others.
    carried = case.hyperparams.get("use_ef", False)
    steps = min(case.huge) - 1 if carried and case.huge else None
    # The tolerance that comes with the reference data; these are below 1e-6.
    assert deviation(case, cases.transformation(case), jnp.float32, steps) < 1e-5


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("golden")
    made_up.write(root)
    return root


@pytest.mark.parametrize("name", made_up.names())
def test_files_of_other_shapes_and_options_are_mapped(name, written, monkeypatch):
    """Wide and tall matrices, every side and order: the numbers are those of the oracles."""
    monkeypatch.setattr(cases, "GOLDEN", written)
    assert name in cases.names()
    test_float64_equals_the_reference(name)


def test_every_reference_is_mapped():
    assert cases.names(), f"no reference trajectories under {cases.GOLDEN}"
    for name in cases.names():
        cases.transformation(cases.load(name))


def test_the_promise_names_the_rules_that_have_a_reference():
    text = (pathlib.Path(__file__).parents[2] / "docs" / "promises.md").read_text(encoding="utf-8")
    sentence = text.split("**Equal to the papers.**")[1].split("reproduce trajectories")[0]
    recorded = {meta["method"] for meta in map(cases.meta, sorted(HERE.glob("*.npz")))}
    recorded -= {"tract"}  # passes of a layer: `tests/pallas_kernels/layers`
    assert set(re.findall(r"`(\w+)`", sentence)) == {cases.METHODS[m][0] for m in recorded}


@pytest.mark.parametrize(
    ("method", "hyperparams", "message"),
    [("lion", {"lr": 0.1, "new": 1}, r"\['new'\] map to no argument"), ("lamb", {}, "'lamb'")],
)
def test_what_maps_to_nothing_fails(method, hyperparams, message):
    case = cases.Case("made_up", method, hyperparams, {}, [], {})
    with pytest.raises(KeyError, match=message):
        cases.transformation(case)
