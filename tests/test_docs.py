"""The site: every public name has its place, every block of code runs, no list is behind."""

from __future__ import annotations

import importlib
import pathlib
import re
import warnings

import pytest

from jaxopt_lab import testing

DOCS = pathlib.Path(__file__).parents[1] / "docs"
PAGES = {str(page.relative_to(DOCS)): page.read_text() for page in sorted(DOCS.rglob("*.md"))}
PUBLIC = (
    "jaxopt_lab",
    "jaxopt_lab.adapters",
    "jaxopt_lab.diagnostics",
    "jaxopt_lab.distributed",
    "jaxopt_lab.quantization",
    "jaxopt_lab.regularizers",
    "jaxopt_lab.schedules",
    "jaxopt_lab.subspace",
    "jaxopt_lab.testing",
    "pallas_kernels",
    "pallas_kernels.targets",
)


def documented() -> list[tuple[str, str]]:
    """What the pages of the reference describe: (module, name)."""
    found, module = [], ""
    for page in sorted((DOCS / "api").glob("*.rst")):
        for directive, argument in re.findall(r"(?m)^\.\. ([\w:]+):: +(\S+)$", page.read_text()):
            if directive == "currentmodule":
                module = argument
            elif directive in ("autoclass", "autofunction", "autodata", "py:data"):
                found.append((module, argument))
    return found


def test_every_public_folder_is_looked_at():
    folders = {
        f"{package}.{path.parent.name}"
        for package in ("jaxopt_lab", "pallas_kernels")
        for path in (DOCS.parent / package).glob("*/__init__.py")
        if hasattr(importlib.import_module(f"{package}.{path.parent.name}"), "__all__")
    }
    assert folders == {name for name in PUBLIC if "." in name}


def test_the_reference_has_every_public_name_once():
    pages = documented()
    assert len(pages) == len(set(pages))
    places = {id(getattr(importlib.import_module(module), name)) for module, name in pages}
    assert len(places) == len(pages), "one object stands in two places"
    for module in map(importlib.import_module, PUBLIC):
        for name in module.__all__:
            if f"{module.__name__}.{name}" not in PUBLIC:
                assert id(getattr(module, name)) in places, f"{module.__name__}.{name}"


def test_the_reference_has_public_names_only():
    for module, name in documented():
        assert name in importlib.import_module(module).__all__, f"{module}.{name}"


def cells(text: str) -> list[str]:
    return re.findall(r"(?ms)^```\{code-cell\}\n(.*?)^```$", text)


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if cells(text)])
def test_cells_run(page):
    # Each page is a program of its own, as when the site is built. There warnings are printed.
    namespace = {"__name__": "__main__"}
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        for cell in cells(PAGES[page]):
            exec(compile(cell, page, "exec"), namespace)


@pytest.mark.parametrize("page", PAGES)
def test_all_python_is_executed(page):
    assert not re.search(r"(?m)^ *```(python|py|pycon)$", PAGES[page])
    assert bool(cells(PAGES[page])) == PAGES[page].startswith("---\nfile_format: mystnb\n")


@pytest.mark.parametrize("page", ["../README.md", "../CONTRIBUTING.md", *PAGES])
def test_links_lead_somewhere(page):
    file = DOCS / page
    text = re.sub(r"(?ms)^```.*?^```$", "", file.read_text())
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" not in target:
            assert (file.parent / target).exists(), target
    for target in re.findall(r"\{doc\}`([^`]+)`", text):
        found = file.parent / target
        assert any(found.with_suffix(suffix).exists() for suffix in (".md", ".rst")), target


def test_promises_name_tests_and_checks_that_exist():
    names = re.findall(r"`([\w/.]+)`", PAGES["promises.md"])
    checks = {check.name for check in testing.contract_checks()}
    suite = "".join(path.read_text() for path in (DOCS.parent / "tests").rglob("test_*.py"))
    for name in names:
        if name.startswith("tests/"):
            assert (DOCS.parent / name).exists(), name
        elif name.startswith("test_"):
            assert f"def {name}(" in suite, name
        elif name.startswith(("nan_", "nonfinite_", "inject_", "resume_", "nnx_")):
            assert name in checks, name


def test_findings_are_all_listed_with_what_they_were_seen_with():
    rows = re.findall(r"(?m)^\| \[([\w-]+)\]\(\S+\) \|.*\| ([^|]+) \|$", PAGES["findings.md"])
    scripts = {path.stem: path.read_text() for path in (DOCS.parent / "findings").glob("*.sh")}
    assert sorted(name for name, _ in rows) == sorted(scripts)
    for name, versions in rows:
        text = scripts[name].replace("==", " ").lower()
        for version in versions.lower().split(", "):
            assert version in text, f"{name}: {version}"
