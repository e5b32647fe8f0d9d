"""How long does `import jaxopt_lab` take beside `import optax`?

`python -m experiments.bench_import` starts the two imports in turn, each in a fresh interpreter,
and prints the medians and the median ratio of a round.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time


def seconds(module: str) -> float:
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
    return time.perf_counter() - begin


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=11)
    rounds = parser.parse_args(argv).rounds
    if rounds < 1:
        parser.error(f"--rounds must be positive, got {rounds}")
    for module in ("optax", "jaxopt_lab"):
        seconds(module)  # what is read from disk for the first time
    pairs = [(seconds("jaxopt_lab"), seconds("optax")) for _ in range(rounds)]
    ours, theirs = (statistics.median(column) for column in zip(*pairs))
    ratio = statistics.median(a / b for a, b in pairs)
    print(f"import jaxopt_lab {ours:.2f} s, import optax {theirs:.2f} s, ratio {ratio:.3f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
