"""Mutants that run tests of the suite in a copy of it."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from typing import ClassVar

import jaxopt_lab
import pallas_kernels
from tests import mutants

ROOT = mutants.TESTS.parent


@dataclasses.dataclass(frozen=True)
class Mutant(mutants.Mutant):
    """One replacement in the file `name`, in a copy where its tests run until one fails."""

    package = jaxopt_lab
    runs_suite = True
    selected: ClassVar[str] = "not slow"  # of those tests

    def tests(self) -> tuple[str, ...]:
        """Returns the files or folders of tests, below `tests`, that must notice."""
        raise NotImplementedError

    def verdict(self) -> str:
        """Returns "caught" if a test fails with the replacement and none without, else "survives".

        Raises:
          RuntimeError: the tests could not be run, or fail without any change.
        """
        if not _pass(self.tests(), self.selected):
            raise RuntimeError(f"{self.tests()} fail without any change")
        return "survives" if _pass(self.tests(), self.selected, self.source()) else "caught"


@functools.cache
def _pass(
    tests: tuple[str, ...], selected: str, change: tuple[pathlib.Path, str] | None = None
) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder)
        shutil.copy(ROOT / "pyproject.toml", copy)
        for name in (jaxopt_lab.__name__, pallas_kernels.__name__, mutants.TESTS.name):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        if change is not None:
            path, source = change
            (copy / path.relative_to(ROOT)).write_text(source)
        run = [sys.executable, "-m", "pytest", "-q", "-x", "-m", selected]
        result = subprocess.run(
            [*run, *(f"tests/{name}" for name in tests)],
            cwd=copy,
            env=os.environ | {"PYTHONPATH": ""},
            capture_output=True,
            text=True,
            check=False,
        )
    if result.returncode > 1:
        raise RuntimeError(f"{tests}: {result.stdout}{result.stderr}")
    return result.returncode == 0
