"""The README says what the scripts print, and its examples run."""

from __future__ import annotations

import re

import optax
import pytest

from experiments import readme_tables
from jaxopt_lab import testing

README = readme_tables.README.read_text()


def test_tables_are_what_the_script_prints():
    assert readme_tables.with_tables(README) == README


def test_commands_are_the_two_that_are_promised():
    for name in ("main job", "test command"):
        commands = re.search(rf"<!-- {name} -->\n```sh\n(.*?)```", README, re.DOTALL)
        assert commands
        assert all(
            line.startswith((".venv/", "python3 -m venv")) for line in commands[1].split("\n")[:-1]
        )


def test_number_of_checks():
    assert f"{len(testing.contract_checks())} checks" in README


@pytest.mark.parametrize("number", range(README.count("```python")))
def test_examples_run(number):
    indent, source = re.findall(r"( *)```python\n(.*?)```", README, re.DOTALL)[number]
    program = compile(re.sub(rf"(?m)^{indent}", "", source), "README.md", "exec")
    exec(program, {"optax": optax})
