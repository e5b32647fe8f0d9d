"""Which cases of a test `--cases` runs."""

from __future__ import annotations

import argparse
import collections
import zlib
from collections.abc import Mapping, Sequence


def positive(text: str) -> int:
    """Returns the number in an option's value.

    Raises:
      ArgumentTypeError: it is zero or negative, with which nothing would be tested.
    """
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text}")
    return number


def spread(begin: int, count: int, most: int) -> list[int]:
    """Returns which of `count` cases to run, at most `most`, evenly spread from `begin` on."""
    most = min(most, count)
    return [(begin + i * count // most) % count for i in range(most)]


def places(tests: Mapping[str, Sequence[str]], most: int) -> dict[str, list[int]]:
    """Returns which cases of each test to run, from the names of its cases.

    Tests over the same cases begin one after another, so that together they run all that they can.
    """
    turns = collections.Counter[tuple[str, ...]]()
    found = {}
    for test, names in tests.items():
        same = tuple(names)
        begin = zlib.crc32("".join(same).encode()) + turns[same]
        turns[same] += 1
        found[test] = spread(begin, len(same), most)
    return found
