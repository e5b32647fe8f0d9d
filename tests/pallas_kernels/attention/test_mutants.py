"""The wrong variants of attention name cases, which accept what is right."""

from __future__ import annotations

import pytest

import pallas_kernels
from tests.mutants import TESTS, imported
from tests.pallas_kernels.attention import cases, mutants


@pytest.mark.parametrize("mutant", mutants.CASES, ids=str)
def test_mutant_has_its_case(mutant):
    assert mutant.noticed_by().name == mutant.case


def test_what_notices_exists():
    for mutant in mutants.SUITES:
        assert all((TESTS / name).is_file() for name in mutant.tests())


@pytest.mark.parametrize("kind", ["gradient", "tangent", "second"])
def test_an_unchanged_copy_is_right(tmp_path, kind):
    copied = imported(pallas_kernels, tmp_path, {})
    mutants.check(copied.__name__, "chunked", cases.CASES[0], kind)


@pytest.mark.slow
@pytest.mark.parametrize("mutant", mutants.CASES[-1:], ids=str)
def test_an_unchanged_copy_decodes_right(tmp_path, mutant):
    copied = imported(pallas_kernels, tmp_path, {})
    mutants.check(copied.__name__, mutant.route, mutant.noticed_by(), mutant.check)
