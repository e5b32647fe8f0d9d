"""The reference numbers under tests/golden/adapters, one case at a time, in JAX layout.

Files and cases are found by listing, so that new ones run without a change here. Kernels are
(inputs, outputs), where the files keep the transposes; see the README beside them.
"""

from __future__ import annotations

import os
import pathlib
import re
from typing import Any, NamedTuple

import numpy as np

ROOT = pathlib.Path(
    os.environ.get("JAXOPT_LAB_GOLDEN", pathlib.Path(__file__).parents[1] / "golden")
)
FOLDER = ROOT / "adapters"


class Case(NamedTuple):
    """One case of a file."""

    file: str
    name: str
    data: dict[str, np.ndarray]

    def __getitem__(self, key: str) -> Any:  # type: ignore[override]
        value = self.data[key]
        return value.item() if value.ndim == 0 else value

    def __str__(self) -> str:
        return f"{self.file}-{self.name}"

    def names(self, pattern: str) -> list[str]:
        """Names of the arrays that match a pattern."""
        return [name for name in self.data if re.fullmatch(pattern, name)]


def cases(file: str) -> list[Case]:
    """The cases of a file, whose arrays begin with `c0_`, `c1_` ...; none without the file."""
    path = FOLDER / f"{file}.npz"
    if not path.exists():
        return []
    with np.load(path) as arrays:
        found: dict[str, dict[str, np.ndarray]] = {}
        for key in arrays.files:
            match = re.fullmatch(r"(c\d+)_(.*)", key)
            if match:
                found.setdefault(match.group(1), {})[match.group(2)] = arrays[key]
    return [Case(file, name, data) for name, data in sorted(found.items())]
