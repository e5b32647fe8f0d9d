"""Wrong variants of the code, and whether the tests catch them.

`python -m tests.mutants [name or folder ...]` replaces one piece of text in a copy of a package at
a time and runs what should notice. The lists, each a `mutants.py`, lie beside those tests; a name
is that of a rule or a file, a folder one below `tests`. It prints a line a mutant and exits with 1
if one survives that is not marked as the same function. `--quick` leaves out those that run a part
of the suite each, which takes seconds for one.
"""

from __future__ import annotations

import abc
import argparse
import concurrent.futures
import dataclasses
import importlib
import multiprocessing
import os
import pathlib
import sys
import types
from collections.abc import Iterable, Sequence
from typing import ClassVar

from tests import compiler

TESTS = pathlib.Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Mutant(abc.ABC):
    """One replacement in a file of a package: that called `name`, or another that it uses."""

    name: str
    old: str
    new: str
    _: dataclasses.KW_ONLY
    file: str = ""
    same_function: str = ""  # why no test can tell it from what is right
    package: ClassVar[types.ModuleType]
    folder: ClassVar[str] = ""  # of the package, in which no two files are called the same
    runs_suite: ClassVar[bool] = False  # a part of it, in a process of its own

    def __str__(self) -> str:
        return f"{self.name}: {self.old.strip()}  ->  {self.new.strip()}"

    @classmethod
    def root(cls) -> pathlib.Path:
        return pathlib.Path(str(cls.package.__file__)).parent

    def source(self) -> tuple[pathlib.Path, str]:
        """Returns the file that the mutant changes, in the package, and its changed text.

        Raises:
          LookupError: the file does not contain what is to be replaced.
        """
        stem = self.file or self.name
        (path,) = (p for p in (self.root() / self.folder).rglob("*.py") if p.stem == stem)
        source = path.read_text()
        if self.old not in source:
            raise LookupError(f"{path.name} does not contain {self.old!r}")
        return path, source.replace(self.old, self.new)

    def imported(self, folder: pathlib.Path) -> types.ModuleType:
        """Imports a copy of the package in `folder`, with the mutant's file changed."""
        return imported(self.package, folder, dict([self.source()]))

    @abc.abstractmethod
    def verdict(self) -> str:
        """Returns "survives" if the tests accept the mutant.

        Else "caught", or "refused" if it does not run.
        """


def imported(
    package: types.ModuleType, folder: pathlib.Path, changed: dict[pathlib.Path, str]
) -> types.ModuleType:
    """Imports a copy of `package` under a name of its own, with other texts of some files."""
    root = pathlib.Path(str(package.__file__)).parent
    name = f"mutant_{folder.name}"
    for path in (*root.rglob("*.py"), *root.rglob("*.json")):
        target = folder / name / path.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        text = changed[path] if path in changed else path.read_text()
        target.write_text(text.replace(root.name, name))
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))


def lists() -> dict[str, Sequence[Mutant]]:
    """Returns the mutants of each folder that has a list."""
    found = {}
    for path in sorted(TESTS.rglob("*/mutants.py")):
        folder = path.parent.relative_to(TESTS)
        module = importlib.import_module(".".join(["tests", *folder.parts, "mutants"]))
        found[str(folder)] = module.MUTANTS
    return found


def chosen(wanted: Sequence[str]) -> list[Mutant]:
    """Returns the mutants of the names and folders in `wanted`, or all.

    Raises:
      ValueError: nothing is called so.
    """
    every = lists()
    folders = {word: word.strip("/").removeprefix("tests/") for word in wanted}
    names = {mutant.name for mutants in every.values() for mutant in mutants}
    for word, folder in folders.items():
        if folder not in every and word not in names:
            raise ValueError(
                f"no mutants of {word!r}; the folders are {[*every]}, the names {sorted(names)}"
            )
    return [
        mutant
        for folder, mutants in every.items()
        for mutant in mutants
        if not wanted or folder in folders.values() or mutant.name in wanted
    ]


def _verdict(mutant: Mutant) -> str:
    return mutant.verdict()


def report(verdicts: Iterable[tuple[Mutant, str]]) -> int:
    """Prints a line a mutant as it comes, and returns 1 if a verdict is not the right one."""
    count = wrong = 0
    for mutant, found in verdicts:
        right = (found == "survives") == bool(mutant.same_function)
        count, wrong = count + 1, wrong + (not right)
        print(f"{'' if right else 'WRONG':5} {found:8}  {mutant}", flush=True)
    print(f"{count} mutants, {wrong} with the wrong verdict")
    return int(wrong > 0)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m tests.mutants")
    parser.add_argument("wanted", nargs="*", metavar="NAME_OR_FOLDER")
    parser.add_argument("--quick", action="store_true", help="none that runs a part of the suite")
    options = parser.parse_args(arguments)
    mutants = [x for x in chosen(options.wanted) if not (options.quick and x.runs_suite)]
    compiler.set_flags(optimized=False)
    # Compiling keeps one core busy; a process each keeps them all.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        return report(zip(mutants, pool.map(_verdict, mutants)))


if __name__ == "__main__":
    sys.exit(main())
