"""PyTorch's own kernel of attention for a CPU, called as the passes of jax's codes are."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments.bench_attention.methods import Shape


def refusal(shape: Shape, platform: str) -> str | None:
    """Returns why PyTorch is not timed on `shape` here, or None."""
    if importlib.util.find_spec("torch") is None:
        return "is not installed"
    if platform != "cpu":
        return "is compared on a CPU"
    if shape.feature is not None:
        return "gets no dense bias or mask here"
    return None


def programs(shape: Shape, arrays: tuple[jax.Array, ...]) -> dict[str, Callable[..., Any]]:
    """Returns the forward and the gradient pass. They take `arrays`, which they hold already.

    Heads stand before the length, as PyTorch has them; what another order would cost is not timed.
    """
    import torch  # pyright: ignore[reportMissingImports]

    def tensor(x: jax.Array) -> Any:
        heads_first = np.ascontiguousarray(np.asarray(x, np.float32).swapaxes(1, 2))
        return torch.from_numpy(heads_first).to(getattr(torch, shape.dtype))

    query, key, value, cotangent = map(tensor, arrays[:4])
    options = {"is_causal": shape.causal, "enable_gqa": shape.heads != shape.kv_heads}
    attend = torch.nn.functional.scaled_dot_product_attention

    def forward(*_: jax.Array) -> np.ndarray:
        with torch.no_grad():
            return attend(query, key, value, **options).transpose(1, 2).float().numpy()

    moved = [x.detach().clone().requires_grad_() for x in (query, key, value)]

    def gradient(*_: jax.Array) -> None:
        torch.autograd.grad(attend(*moved, **options), moved, cotangent)

    return {"forward": forward, "gradient": gradient}
