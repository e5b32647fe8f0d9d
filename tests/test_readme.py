"""The README and the site say what the scripts print, and the README's examples run."""

from __future__ import annotations

import re

import optax
import pytest

from experiments import readme_tables
from jaxopt_lab import testing

ROOT = readme_tables.ROOT
PAGES = {str(page.relative_to(ROOT)): page.read_text() for page in readme_tables.PAGES}
README = PAGES["README.md"]


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if "<!-- /" in text])
def test_tables_are_what_the_script_prints(page):
    assert readme_tables.with_tables(PAGES[page]) == PAGES[page]


@pytest.mark.parametrize("name", readme_tables.SECTIONS)
def test_every_table_has_its_page(name):
    assert any(f"<!-- {name} -->\n" in text for text in PAGES.values())


def test_readme_is_short():
    assert len(README.splitlines()) <= 200


def test_commands_are_the_two_that_are_promised():
    for name in ("main job", "test command"):
        commands = re.search(rf"<!-- {name} -->\n```sh\n(.*?)```", README, re.DOTALL)
        assert commands
        assert all(
            line.startswith((".venv/", "python3 -m venv")) for line in commands[1].split("\n")[:-1]
        )


def test_number_of_checks():
    said = {page: re.findall(r"(\d+) checks", text) for page, text in PAGES.items()}
    assert said["README.md"]
    for page, numbers in said.items():
        assert set(numbers) <= {str(len(testing.contract_checks()))}, page


@pytest.mark.parametrize("number", range(README.count("```python")))
def test_examples_run(number):
    source = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[number]
    exec(compile(source, "README.md", "exec"), {"optax": optax})


def test_nobody_is_told_to_install_a_name_of_an_index():
    files = [ROOT / page for page in PAGES]
    for folder in ("jaxopt_lab", "pallas_kernels", "experiments"):
        files += (ROOT / folder).rglob("*.py")
    for file in files:
        # From a checkout: a path, or the extras of the folder at hand.
        for command in re.findall(r"pip install ([^`\n]*)", file.read_text()):
            for name in re.findall(r"[^\s\"']*jaxopt[-_]lab[^\s\"']*", command):
                assert name.startswith(("./", "../", "/")), f"{file}: pip install {command}"
