"""Short texts and a model that compiles fast, for the tests of fine-tuning and merging."""

from __future__ import annotations

from pathlib import Path

from tests.experiments.tiny_low_communication import SIZES

assert "tiny" in SIZES

FIRST = "The quick brown fox jumps over the lazy dog; nothing else happens.\n" * 60
SECOND = "".join(
    f"def f{i}(x): return x + {i}  # \N{GREEK SMALL LETTER ALPHA}\n" for i in range(200)
)
THIRD = "".join(f"{i * 37 % 1000:04d} {i * 11 % 97:02d} | " for i in range(500))


# Of equal length, so that what is compiled for one serves the others.
FIRST, SECOND, THIRD = (text[:4000] for text in (FIRST, SECOND, THIRD))


def write(folder: Path) -> dict[str, Path]:
    """Writes the texts; returns their paths by name."""
    paths = {}
    for name, text in {"first": FIRST, "second": SECOND, "third": THIRD}.items():
        paths[name] = folder / f"{name}.txt"
        paths[name].write_text(text, encoding="utf-8")
    return paths
