"""Products of quantised operands as their definition reads, in numpy and float64."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

# The largest value, and what the largest entry of a group is moved to.
FORMATS = {"int8": (127, 127.5), "int4": (7, 7.5)} | {
    name: (float(ml_dtypes.finfo(name).max),) * 2 for name in ("float8_e4m3fn", "float8_e5m2")
}
GRANULARITIES = ("tensor", "row", 4)

Dimensions = Any


def rounded(x: np.ndarray, format: str, granularity: str | int, contracting: Any) -> np.ndarray:
    """Returns what `x` is after quantising, for a product over the axes `contracting`."""
    if isinstance(granularity, int) and contracting:
        axis = contracting[-1]
        cuts = range(granularity, x.shape[axis], granularity)
        parts = [rounded(part, format, "row", contracting) for part in np.split(x, cuts, axis)]
        return np.concatenate(parts, axis)
    largest, edge = FORMATS[format]
    axes = None if granularity == "tensor" else tuple(contracting)
    scale = np.abs(x).max(axis=axes, keepdims=True) / edge
    scale = np.where(scale == 0, 1, scale)
    q = np.clip(x / scale, -largest, largest)
    q = np.round(q) if format.startswith("int") else q.astype(format).astype(np.float64)
    return q * scale


def spacing(x: np.ndarray, format: str, granularity: str | int, contracting: Any) -> np.ndarray:
    """Returns the most that rounding at random moves each entry by, in groups of one scale."""
    largest, _ = FORMATS[format]
    if granularity != "row":
        raise ValueError(granularity)
    scale = np.abs(x).max(axis=tuple(contracting), keepdims=True) / largest
    if format.startswith("int"):
        return scale * np.ones_like(x)
    info = ml_dtypes.finfo(format)
    exponent = np.maximum(np.frexp(x / scale)[1] - 1, info.minexp)
    return scale * 2.0 ** (exponent - info.nmant)


def product(
    a: np.ndarray,
    b: np.ndarray,
    dimensions: Dimensions,
    formats: tuple[str, str] | None,
    granularity: str | int = "row",
) -> np.ndarray:
    """Returns the product of the rounded operands, or the exact one without formats."""
    (of_a, of_b), (batch_a, batch_b) = dimensions
    if formats is not None:
        a = rounded(a, formats[0], granularity, of_a)
        b = rounded(b, formats[1], granularity, of_b)
    letters_a = [chr(97 + i) for i in range(a.ndim)]
    letters_b = [chr(110 + i) for i in range(b.ndim)]
    for i, j in (*zip(of_a, of_b, strict=True), *zip(batch_a, batch_b, strict=True)):
        letters_b[j] = letters_a[i]
    batch = [letters_a[i] for i in batch_a]
    free = [x for x in letters_a if x not in letters_b]
    free += [x for x in letters_b if x not in letters_a]
    return np.einsum(f"{''.join(letters_a)},{''.join(letters_b)}->{''.join(batch + free)}", a, b)
