"""The reference values of the schedules, in float64 and in float32."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxopt_lab.schedules.refined import _running_median
from tests.schedules import golden

CASES = golden.load()


def test_there_are_cases_of_every_kind():
    names = " ".join(case.name for case in CASES)
    for kind in ("uba_ch", "uba_co", "kappa", "ref_raw", "ref_tau", "tf_wsd", "tf_lin", "tf_inv"):
        assert kind in names


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_float64(case):
    with jax.enable_x64(True):
        found = golden.table(case.schedule, case.expected.size, case.first, np.float64)
    assert found.dtype == np.float64
    # A few roundings of numbers of size 1; seen: 2e-15.
    np.testing.assert_allclose(found, case.expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_float32(case):
    found = golden.table(case.schedule, case.expected.size, case.first)
    assert found.dtype == np.float32
    # Roundings of angles and quotients of size 1 in float32 (6e-8 each), times the slope of the
    # schedule: highest for 1 - sqrt(q) at its start and for cosines.
    np.testing.assert_allclose(found, case.expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("norms", "width", "expected"),
    [pytest.param(*rest, id=name) for name, *rest in golden.medians()],
)
def test_running_median(norms, width, expected):
    assert width % 2 == 1
    np.testing.assert_array_equal(_running_median(norms, width // 2), expected)


def test_an_unknown_reference_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "adapters").mkdir()
    np.savez(tmp_path / "adapters" / "schedules.npz", tf_new=np.ones(3))
    monkeypatch.setattr(golden, "ROOT", tmp_path)
    with pytest.raises(KeyError, match="tf_new"):
        golden.load()
