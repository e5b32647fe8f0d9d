"""Every rule agrees with a float64 program written from its paper and not from this code."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from tests.transforms import oracle_runs, subspace_runs

RUNS = (*oracle_runs.all_runs(), *subspace_runs.all_runs())


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_float64_equals_the_oracle(run):
    with jax.enable_x64(True):
        # Both are double precision and differ in the order of operations.
        assert oracle_runs.deviation(run, jnp.float64) < 1e-10


@pytest.mark.parametrize("run", [r for r in RUNS if r.float32_tolerance is not None], ids=str)
def test_float32_follows_the_oracle(run):
    assert oracle_runs.deviation(run, jnp.float32) < run.float32_tolerance
