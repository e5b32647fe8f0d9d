"""Attention and its gradients in numpy, from the formulas and from nothing of the package.

The only shared piece is the description of a problem. With `dtype` float64 this is the truth; with
float32 and `rounding` it is textbook code in the precision of the kernels, whose error is the
measure for theirs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Result(NamedTuple):
    """Output and lse, and the gradients of everything that is differentiable."""

    output: Any  # (B, T, N, dv)
    lse: Any  # (B, N, T)
    query: Any
    key: Any
    value: Any
    bias: Any
    sinks: Any
    diagonals: Any = None  # (B or 1, N, T + S - 1)


def visible(mask: Any, b: int, t: int, s: int) -> np.ndarray:
    """Returns the whole mask, entry by entry as the rule reads; broadcastable to (B, N, T, S)."""

    def column(values: Any, default: int) -> np.ndarray:
        return np.broadcast_to(default if values is None else np.asarray(values), (b,))

    rows = np.arange(t)[:, None]
    keys = np.arange(s)[None, :]
    entries = []
    for i in range(b):
        position = rows + mask.offset + column(mask.offsets, 0)[i]
        seen = np.ones((t, s), bool)
        if mask.left is not None:
            seen &= keys >= position - mask.left
        if mask.right is not None:
            near = keys <= position + mask.right
            seen &= near | (keys < mask.prefix + column(mask.prefix_lengths, 0)[i])
        seen &= keys >= mask.start + column(mask.starts, 0)[i]
        seen &= rows < column(mask.query_lengths, t)[i]
        seen &= keys < column(mask.key_value_lengths, s)[i]
        if mask.query_segment_ids is not None:
            q_ids, k_ids = (
                np.asarray(x)[i] for x in (mask.query_segment_ids, mask.key_value_segment_ids)
            )
            seen &= q_ids[:, None] == k_ids[None, :]
        entries.append(seen)
    seen = np.stack(entries)[:, None]
    return seen if mask.dense is None else seen & np.asarray(mask.dense)


def kept(seeds: Any, t: int, s: int, rate: float) -> np.ndarray:
    """Returns the dropout mask, bool (B, N, T, S)."""

    def mix(x: np.ndarray) -> np.ndarray:
        x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
        x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
        return x ^ (x >> 16)

    rows = np.arange(t, dtype=np.uint32)[:, None] * np.uint32(0x9E3779B1)
    keys = np.arange(s, dtype=np.uint32) * np.uint32(0x85EBCA77)
    seeds = np.asarray(seeds).astype(np.uint32)[..., None, None]
    return (mix(keys ^ mix(rows + seeds)) >> 8) >= np.ceil(rate * 2**24)


def attention(problem: Any, dtype: Any = np.float64, rounding: Any = None) -> Result:
    """Returns output, lse and all gradients of `problem` (settings, operands, cotangents).

    Args:
      problem: What `cases.build` returns.
      dtype: The arithmetic.
      rounding: The dtype in which products with probabilities, and results, are stored.
    """
    settings, x, (d_output, d_lse) = problem

    def wide(array: Any) -> np.ndarray:
        return np.asarray(array, np.float32).astype(dtype)

    def rounded(array: np.ndarray) -> np.ndarray:
        return array if rounding is None else array.astype(rounding).astype(dtype)

    q, k, v, d_o, d_lse = (wide(a) for a in (x.query, x.key, x.value, d_output, d_lse))
    (b, t, n, _), (s, heads) = q.shape, k.shape[1:3]
    q, k, v, d_o = (a.transpose(0, 2, 1, 3) for a in (q, k, v, d_o))
    k, v = (np.repeat(a, n // heads, axis=1) for a in (k, v))
    scale = dtype(settings.scale)
    z = scale * (q @ k.swapaxes(2, 3))
    if x.bias is not None:
        z = z + wide(x.bias)
    distances = np.arange(s) - np.arange(t)[:, None] + t - 1
    if x.diagonals is not None:
        z = z + wide(x.diagonals)[:, :, distances]
    slope = None
    if settings.soft_cap is not None:
        tanh = np.tanh(z / dtype(settings.soft_cap))
        z = np.where(z == -np.inf, z, dtype(settings.soft_cap) * tanh)
        slope = 1 - tanh**2
    seen = np.broadcast_to(visible(x.mask, b, t, s), z.shape)
    z = np.where(seen, z, -np.inf)
    peak = z.max(axis=3, initial=-np.inf)
    if x.sinks is not None:
        sinks = wide(x.sinks)[:, None]
        peak = np.maximum(peak, sinks)
    shift = np.where(peak == -np.inf, 0, peak)
    total = np.exp(z - shift[..., None]).sum(axis=3)
    if x.sinks is not None:
        total = total + np.exp(sinks - shift)
    with np.errstate(divide="ignore"):
        lse = np.where(total > 0, shift + np.log(total), -np.inf)
    shift = np.where(lse == -np.inf, 0, lse)
    p = np.exp(z - shift[..., None])
    drop = dtype(1)
    if x.seeds is not None:
        drop = kept(x.seeds, t, s, settings.dropout_rate) / dtype(1 - settings.dropout_rate)
    o = rounded(rounded(p * drop) @ v)

    d_lse = np.where(lse == -np.inf, 0, d_lse)
    delta = (d_o * o).sum(axis=3) - d_lse
    dz = p * ((d_o @ v.swapaxes(2, 3)) * drop - delta[..., None])
    if slope is not None:
        dz = dz * slope
    dz16 = rounded(dz)

    def heads_last(array: np.ndarray, groups: int = 1) -> np.ndarray:
        summed = array.reshape(b, -1, groups, *array.shape[2:]).sum(axis=2)
        return rounded(summed).transpose(0, 2, 1, 3)

    bias = sinks_gradient = diagonals = None
    if x.diagonals is not None:
        summed = dz.sum(axis=0, keepdims=True) if x.diagonals.shape[0] == 1 else dz
        diagonals = np.stack([(summed * (distances == i)).sum((2, 3)) for i in range(t + s - 1)], 2)
    if x.bias is not None:
        axes = tuple(i for i in range(4) if x.bias.shape[i] == 1)
        bias = dz.sum(axis=axes, keepdims=True)
        if np.dtype(x.bias.dtype) != np.float32:
            bias = rounded(bias)
    if x.sinks is not None:
        sinks_gradient = -(np.exp(sinks - np.where(lse == -np.inf, 0, lse)) * delta).sum(
            axis=(0, 2)
        )
    return Result(
        output=o.transpose(0, 2, 1, 3),
        lse=lse,
        query=heads_last(scale * (dz16 @ k)),
        key=heads_last(scale * (dz16.swapaxes(2, 3) @ q), n // heads),
        value=heads_last(rounded(p * drop).swapaxes(2, 3) @ d_o, n // heads),
        bias=bias,
        sinks=sinks_gradient,
        diagonals=diagonals,
    )
