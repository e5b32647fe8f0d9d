"""The wrong variants of `tests.suite_mutants` still apply to the code as it is written now."""

from __future__ import annotations

from collections import Counter

import pytest

from tests import mutants, suite_mutants


@pytest.mark.parametrize("mutant", suite_mutants.MUTANTS, ids=str)
def test_mutant_applies(mutant):
    path, source = mutants.mutated_source(mutant)
    compile(source, path, "exec")
    assert path.parent.name in suite_mutants.SUITES


def test_every_file_of_schedules_has_one():
    counts = Counter(mutant.rule for mutant in suite_mutants.MUTANTS)
    files = {path.stem for path in (mutants.PACKAGE / "schedules").glob("*.py")} - {"__init__"}
    assert files <= set(counts)
