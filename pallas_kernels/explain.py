"""Command line: which route attention takes on a chip, and why the others cannot serve."""

from __future__ import annotations

import argparse
import sys
import types
from collections.abc import Sequence
from typing import NoReturn

import jax

from pallas_kernels.attention.api import explain
from pallas_kernels.targets.chips import CHIPS


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code, 2 for bad input."""
    parser = _Parser(
        prog="python -m pallas_kernels.explain",
        description="Say which route pallas_kernels.attention takes, from shapes and dtypes alone.",
    )
    parser.add_argument("--shape", required=True, type=_shape, metavar="B,T,N,D", help="of query")
    parser.add_argument(
        "--key-shape", type=_shape, metavar="B,S,K,D", help="of key; by default that of query"
    )
    parser.add_argument("--value-dim", type=int, metavar="DV", help="last axis of value")
    parser.add_argument("--dtype", default="float32", help="of query, key and value")
    parser.add_argument("--chip", choices=CHIPS, help="by default the device of this machine")
    parser.add_argument("--causal", action="store_true", help="is_causal=True")
    parser.add_argument("--window", type=int, metavar="W", help="local_window_size")
    parser.add_argument("--soft-cap", type=float, metavar="CAP", help="logits_soft_cap")
    parser.add_argument("--residual", action="store_true", help="return_residual=True")
    options = parser.parse_args(argv)
    key_shape = options.key_shape or options.shape
    value_shape = (*key_shape[:-1], options.value_dim or key_shape[-1])
    try:
        arrays = [
            jax.ShapeDtypeStruct(shape, options.dtype)
            for shape in (options.shape, key_shape, value_shape)
        ]
        found = explain(
            *arrays,
            chip=options.chip,
            is_causal=options.causal,
            local_window_size=options.window,
            logits_soft_cap=options.soft_cap,
            return_residual=options.residual,
        )
    except (TypeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(found)
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def _shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(x) for x in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} was given; expected B,T,N,D") from error


class _Module(types.ModuleType):
    """Keeps ``pallas_kernels.explain``, the function, what it is where this module is imported."""

    __call__ = staticmethod(explain)


sys.modules[__name__].__class__ = _Module

if __name__ == "__main__":
    sys.exit(main())
