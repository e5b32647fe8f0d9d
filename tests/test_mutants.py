"""The wrong variants of the lists still apply to the code as it is written now."""

from __future__ import annotations

from collections import Counter

import pytest

from tests import mutants
from tests.adapters.mutants import TESTS
from tests.schedules.mutants import MUTANTS as SCHEDULES
from tests.transforms.mutants import MUTANTS as RULES
from tests.transforms.rules import OPTIMIZERS

LISTS = mutants.lists()


@pytest.mark.parametrize("folder", LISTS)
def test_mutants_apply(folder):
    for mutant in LISTS[folder]:
        path, source = mutant.source()
        compile(source, path, "exec")
        assert source != path.read_text(), mutant


def test_copy_of_the_package_is_another_one_with_the_mutant(tmp_path):
    mutant = next(m for m in RULES if m.file == "_parts")
    copied = mutant.imported(tmp_path)
    assert copied.frugal.__module__ == f"{copied.__name__}.subspace.frugal"
    (changed,) = tmp_path.rglob("_parts.py")
    assert mutant.new in changed.read_text()


def test_every_rule_has_at_least_eight():
    counts = Counter(mutant.name for mutant in RULES if not mutant.same_function)
    for rule in OPTIMIZERS:
        assert counts[str(rule)] >= 8, rule


def test_every_file_of_schedules_has_one():
    files = {path.stem for path in (SCHEDULES[0].root() / "schedules").glob("*.py")} - {"__init__"}
    assert files <= {mutant.name for mutant in SCHEDULES}


def test_what_notices_exists():
    for name in {name for names in TESTS.values() for name in names}:
        assert (mutants.TESTS / "adapters" / f"{name}.py").is_file(), name


def test_mutants_are_chosen_by_name_and_by_folder():
    assert mutants.chosen(["lion", "uba"]) == [
        m for m in (*SCHEDULES, *RULES) if m.name in ("lion", "uba")
    ]
    assert mutants.chosen(["tests/schedules/"]) == mutants.chosen(["schedules"]) == SCHEDULES
    assert len(mutants.chosen([])) == sum(map(len, LISTS.values()))
    with pytest.raises(ValueError, match=r"no mutants of 'lyon'; the folders are .*'transforms'"):
        mutants.chosen(["lion", "lyon"])


def test_a_verdict_that_is_not_expected_ends_with_one(capsys):
    (same,) = (m for m in RULES if m.name == "lion" and m.same_function)
    assert mutants.report([(same, "survives")]) == 0
    assert mutants.report([(same, "caught")]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "1 mutants, 1 with the wrong verdict"
