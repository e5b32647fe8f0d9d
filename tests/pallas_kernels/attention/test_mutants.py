"""The wrong variants of `mutants` still apply to the package as it is written now."""

from __future__ import annotations

import pytest

from tests.pallas_kernels.attention import cases, mutants


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=str)
def test_mutant_applies(mutant):
    path, source = mutants.mutated_source(mutant)
    compile(source, path, "exec")
    assert mutant.case in {case.name for case in (*cases.CASES, *cases.BY_DISTANCE)}


@pytest.mark.parametrize("kind", ["gradient", "tangent", "second"])
def test_an_unchanged_copy_is_right(tmp_path, kind):
    name = mutants.copy_of_the_package(None, tmp_path)
    mutants.check(name, "chunked", cases.CASES[0], kind)
