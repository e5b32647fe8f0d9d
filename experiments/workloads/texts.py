"""Texts that every CPython carries, in one alphabet for a model that reads several of them.

The alphabet is that of the first text, which a model is pre-trained on: its characters that occur
at least `RARE` times. All other characters of any text are one more, so that no embedding is met
for the first time in fine-tuning.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.harness import UserError
from experiments.harness.workload import Workload
from experiments.workloads.language_model import SIZES, workload_of_tokens

RARE = 10


def standard_library(*packages: str) -> str:
    """Source of packages of the standard library, in alphabetical order of their files.

    Without a package it is that of all modules which are a file and not a folder; what is generated
    for one machine is left out.
    """
    root = Path(sysconfig.get_path("stdlib"))
    if packages:
        files = [path for name in packages for path in sorted((root / name).rglob("*.py"))]
    else:
        files = sorted(root.glob("*.py"))
    files = [path for path in files if not path.name.startswith("_sysconfigdata")]
    if not files:
        what = f"packages {', '.join(packages)}" if packages else "modules"
        raise UserError(f"this Python carries no source of the {what}: give texts of your own")
    return "".join(path.read_text(encoding="utf-8", errors="replace") for path in files)


@dataclass(frozen=True)
class Alphabet:
    """Numbers for characters; the last number stands for all characters that are not known."""

    codes: np.ndarray  # uint32, sorted

    @classmethod
    def of(cls, text: str) -> Alphabet:
        """That of the characters which `text` has often enough."""
        codes, counts = np.unique(_codes(text), return_counts=True)
        return cls(codes[counts >= RARE])

    def __len__(self) -> int:
        return len(self.codes) + 1

    def tokens(self, text: str) -> np.ndarray:
        """The numbers of the text's characters."""
        codes = _codes(text)
        if not len(self.codes):
            return np.zeros(len(codes), np.int32)
        found = np.minimum(np.searchsorted(self.codes, codes), len(self.codes) - 1)
        return np.where(self.codes[found] == codes, found, len(self.codes)).astype(np.int32)

    def unknown_share(self, text: str) -> float:
        """The share of the text's characters that are not known."""
        return float(np.mean(self.tokens(text) == len(self.codes)))


def workloads(
    size: str, texts: Mapping[str, str], batch_size: int | None = None
) -> dict[str, Workload]:
    """Next-character prediction of each text by one model; the first gives the alphabet.

    Args:
      size: a name in `SIZES`.
      texts: by what names them in messages, in full.
      batch_size: windows per step; default that of the size.
    """
    if size not in SIZES:
        raise UserError(f"--size {size}: unknown; expected one of {', '.join(SIZES)}")
    alphabet = Alphabet.of(next(iter(texts.values())))
    return {
        name: workload_of_tokens(
            size,
            alphabet.tokens(text),
            len(alphabet),
            hashlib.sha256(text.encode("utf-8")).hexdigest(),
            name,
            batch_size,
        )
        for name, text in texts.items()
    }


def _codes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)
