"""The wrong variants of `tests.mutants` still apply to the rules as they are written now."""

from __future__ import annotations

from collections import Counter

import pytest

from tests import mutants
from tests.transforms.rules import OPTIMIZERS


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=str)
def test_mutant_applies(mutant):
    path, source = mutants.mutated_source(mutant)
    compile(source, path, "exec")


def test_copy_of_the_package_is_another_one_with_the_mutant(tmp_path):
    mutant = next(m for m in mutants.MUTANTS if m.file == "_parts")
    copied = mutants.copy_of_the_package(mutant, tmp_path)
    assert copied.frugal.__module__ == f"{copied.__name__}.subspace.frugal"
    (changed,) = tmp_path.rglob("_parts.py")
    assert mutant.new in changed.read_text()


def test_every_rule_has_at_least_eight():
    counts = Counter(mutant.rule for mutant in mutants.MUTANTS if not mutant.same_function)
    for rule in OPTIMIZERS:
        assert counts[str(rule)] >= 8, rule
