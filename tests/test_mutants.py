"""The wrong variants of `tests.mutants` still apply to the rules as they are written now."""

from __future__ import annotations

from collections import Counter

import pytest

from tests import mutants
from tests.transforms.rules import OPTIMIZERS


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=str)
def test_mutant_applies(mutant):
    mutants.mutated(mutant)


def test_every_rule_has_at_least_eight():
    counts = Counter(mutant.rule for mutant in mutants.MUTANTS if not mutant.same_function)
    for rule in OPTIMIZERS:
        assert counts[str(rule)] >= 8, rule
