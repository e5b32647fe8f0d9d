"""The probes of same-named optimizers: those of the library that is here, and what is printed."""

from __future__ import annotations

import numpy as np
import optax
import pytest

from experiments.optimizer_differences import ROWS, apart, compact, difference, measured

OPTAX = [row for row in ROWS if row.package == "optax"]


def largest(text: str) -> float:
    return max(float(part) for part in text.split(" / "))


@pytest.mark.parametrize("row", OPTAX, ids=lambda row: row.rule)
def test_settings_make_the_rules_of_optax_equal(row) -> None:
    defaults, same = measured(row, steps=3)
    # optax's iterations of Muon and its decomposition for GaLore are in float32: some roundings.
    assert largest(same) < (2e-5 if row.rule in ("Muon", "GaLore") else 1e-13)
    assert largest(defaults) > 1e-4 or row.rule == "AdaBelief"


def test_a_difference_is_relative_to_the_movement_of_each_parameter() -> None:
    ours = {"kernel": np.array([[2.0, -4.0]]), "bias": np.array([1.0])}
    theirs = {"kernel": np.array([[2.0, -3.0]]), "bias": np.array([1.0])}
    assert difference(ours, theirs) == "2e-01 / 0"
    assert apart(np.array([3.0, 4.0]), np.array([3.0, 3.0])) == "0.24 (0.3)"


@pytest.mark.slow
def test_a_compact_state_is_compared_with_the_exact_one() -> None:
    exact, half = compact(optax.adam(1e-2)), compact(optax.adam(5e-3))
    assert {step: apart(half[step], exact[step]) for step in exact} == dict.fromkeys(
        exact, "0.5 (0.5)"
    )
