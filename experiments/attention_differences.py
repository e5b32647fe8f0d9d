"""Where attention of other libraries means something else by the same call.

    python -m experiments.attention_differences

Each probe asks one question of every library that is installed, on the CPU, and prints what comes
out, beside the library's version: the rows of the table in docs/coming_from/attention.md.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Attend = Callable[..., Any]  # (q, k, v, mask, causal) -> (1, T, 1, dv), all of them numpy arrays


def draw(queries: int, keys: int, dtype: Any = np.float32) -> tuple[np.ndarray, ...]:
    """Draws query (1, T, 1, 8), key and value (1, S, 1, 8)."""
    rng = np.random.default_rng(0)
    return tuple(rng.normal(size=(1, n, 1, 8)).astype(dtype) for n in (queries, keys, keys))


def hidden_rows(attend: Attend) -> str:
    """What a query that may see no key gets."""
    q, k, v = draw(4, 4)
    mask = np.ones((1, 1, 4, 4), bool)
    mask[:, :, 2] = False
    row = np.asarray(attend(q, k, v, mask=mask))[0, 2, 0]
    if np.isnan(row).any():
        return "NaN"
    if np.allclose(row, 0):
        return "0"
    return "mean of all values" if np.allclose(row, v[0, :, 0].mean(0), atol=1e-3) else "other"


def alignment(attend: Attend) -> str:
    """Where the queries of a causal call stand when there are fewer of them than keys."""
    q, k, v = draw(2, 5)
    got = np.asarray(attend(q, k, v, causal=True))[0, :, 0]
    for name, first in (("first key", 0), ("last key", 3)):
        rows = np.arange(2)[:, None] + first
        z = np.einsum("td,sd->ts", q[0, :, 0], k[0, :, 0]) / np.sqrt(8)
        p = np.where(np.arange(5) <= rows, np.exp(z), 0)
        if np.allclose(got, p / p.sum(1, keepdims=True) @ v[0, :, 0], atol=1e-4):
            return name
    return "other"


def float64(attend: Attend) -> str:
    """Whether float64 inputs are computed in float64."""
    q, k, v = draw(4, 4, np.float64)
    got = np.asarray(attend(q, k, v))
    z = np.einsum("td,sd->ts", q[0, :, 0], k[0, :, 0]) / np.sqrt(8)
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    error = np.abs(got[0, :, 0] - p @ v[0, :, 0]).max()
    return f"{got.dtype}, error {error:.0e}"


PROBES = {"fully hidden row": hidden_rows, "causal, T < S": alignment, "float64": float64}


def libraries() -> dict[str, Callable[[], Attend]]:
    """Returns, for each library, what imports it and makes its call one of ours."""

    def ours() -> Attend:
        import pallas_kernels

        return lambda q, k, v, mask=None, causal=False: pallas_kernels.attention(
            *_jax(q, k, v), mask=mask, is_causal=causal
        )

    def jax_nn() -> Attend:
        return lambda q, k, v, mask=None, causal=False: jax.nn.dot_product_attention(
            *_jax(q, k, v), mask=mask, is_causal=causal
        )

    def flax() -> Attend:
        from flax import nnx

        return lambda q, k, v, mask=None, causal=False: nnx.dot_product_attention(
            *_jax(q, k, v), mask=mask, is_causal=causal
        )

    def torch_sdpa() -> Attend:
        import torch

        def attend(q: Any, k: Any, v: Any, mask: Any = None, causal: bool = False) -> Any:
            x = [torch.from_numpy(a).transpose(1, 2) for a in (q, k, v)]
            mask = None if mask is None else torch.from_numpy(mask)
            y = torch.nn.functional.scaled_dot_product_attention(
                *x, attn_mask=mask, is_causal=causal
            )
            return y.transpose(1, 2).numpy()

        return attend

    def torch_flex() -> Attend:
        import torch
        from torch.nn.attention import flex_attention as flex

        def attend(q: Any, k: Any, v: Any, mask: Any = None, causal: bool = False) -> Any:
            x = [torch.from_numpy(a).transpose(1, 2) for a in (q, k, v)]
            block = None
            if mask is not None or causal:
                seen = np.tril(np.ones((q.shape[1], k.shape[1]), bool)) if mask is None else mask
                table = torch.from_numpy(np.broadcast_to(seen, (1, 1, *seen.shape[-2:])).copy())
                block = flex.create_block_mask(
                    lambda b, h, t, s: table[0, 0, t, s], 1, 1, q.shape[1], k.shape[1], device="cpu"
                )
            return flex.flex_attention(*x, block_mask=block).transpose(1, 2).numpy()

        return attend

    def transformers() -> Attend:
        import torch
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        module = torch.nn.Module()
        module.is_causal = False  # pyright: ignore[reportAttributeAccessIssue]

        def attend(q: Any, k: Any, v: Any, mask: Any = None, causal: bool = False) -> Any:
            x = [torch.from_numpy(a).transpose(1, 2) for a in (q, k, v)]
            mask = None if mask is None else torch.from_numpy(mask)
            return sdpa_attention_forward(module, *x, mask, is_causal=causal)[0].numpy()

        return attend

    def keras() -> Attend:
        import os

        os.environ.setdefault("KERAS_BACKEND", "jax")
        import keras

        return lambda q, k, v, mask=None, causal=False: keras.ops.dot_product_attention(
            *_jax(q, k, v), mask=mask, is_causal=causal
        )

    return {
        "pallas_kernels": ours, "jax": jax_nn, "flax": flax, "torch": torch_sdpa,
        "torch flex": torch_flex, "transformers": transformers, "keras": keras,
    }  # fmt: skip


def _jax(*arrays: np.ndarray) -> tuple[Any, ...]:
    return tuple(jnp.asarray(x) for x in arrays)


def answers(attend: Attend) -> dict[str, str]:
    """What a library's attention says to every question, or the error that it raises."""
    found = {}
    for question, probe in PROBES.items():
        try:
            with jax.enable_x64(True):
                found[question] = probe(attend)
        except Exception as error:
            found[question] = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
    return found


def main() -> None:
    """Prints a line for each installed library and probe."""
    for name, make in libraries().items():
        package = "jaxopt_lab" if name == "pallas_kernels" else name.split()[0]
        try:
            attend = make()
            version = importlib.metadata.version(package)
        except Exception as error:  # some fail in ways of their own on versions they do not know
            print(f"{name}: not here ({type(error).__name__}: {error})")
            continue
        for question, answer in answers(attend).items():
            print(f"{name} {version} | {question} | {answer}", flush=True)


if __name__ == "__main__":
    main()
