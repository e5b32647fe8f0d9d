"""Which cases of a test `--cases` runs."""

from __future__ import annotations

import argparse
import zlib


def positive(text: str) -> int:
    """Returns the number in an option's value.

    Raises:
      ArgumentTypeError: it is zero or negative, with which nothing would be tested.
    """
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text}")
    return number


def spread(name: str, count: int, most: int) -> list[int]:
    """Returns which of `count` cases of a test to run, at most `most`, evenly spread.

    Tests over the same cases begin at others, so that together they run more of them. Of a test the
    first is the same whatever `most`.
    """
    most = min(most, count)
    begin = zlib.crc32(name.encode())
    return [(begin + i * count // most) % count for i in range(most)]
