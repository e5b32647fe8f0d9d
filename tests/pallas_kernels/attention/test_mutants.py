"""The wrong variants of attention name cases, which accept what is right."""

from __future__ import annotations

import pytest

import pallas_kernels
from tests.mutants import imported
from tests.pallas_kernels.attention import cases, mutants


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=str)
def test_mutant_has_its_case(mutant):
    assert mutant.case in {case.name for case in (*cases.CASES, *cases.BY_DISTANCE)}


@pytest.mark.parametrize("kind", ["gradient", "tangent", "second"])
def test_an_unchanged_copy_is_right(tmp_path, kind):
    copied = imported(pallas_kernels, tmp_path, {})
    mutants.check(copied.__name__, "chunked", cases.CASES[0], kind)
