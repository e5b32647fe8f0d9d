"""The wrong variants of cross-entropy name cases, which accept what is right."""

from __future__ import annotations

import pytest

import pallas_kernels
from tests.mutants import imported
from tests.pallas_kernels.loss import cases, mutants


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=str)
def test_mutant_has_its_case(mutant):
    assert str(mutant.noticed_by()) == mutant.features


def test_an_unchanged_copy_is_right(tmp_path):
    copied = imported(pallas_kernels, tmp_path, {})
    cases.check(copied.cross_entropy, cases.CASES[0])
