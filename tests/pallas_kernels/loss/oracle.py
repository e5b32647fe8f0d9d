"""The loss in numpy and float64, token by token, straight from the formula."""

from __future__ import annotations

from typing import Any

import numpy as np


def token(
    s: np.ndarray, label: int, weights: np.ndarray, smoothing: float, z_loss: float
) -> tuple[float, float]:
    """Returns the loss of a row of logits, and its log-sum-exp."""
    lse = s.max() + np.log(np.exp(s - s.max()).sum())
    loss = (1 - smoothing) * weights[label] * (lse - s[label])
    loss += smoothing / s.size * (weights * (lse - s)).sum()
    return float(loss + z_loss * lse**2), float(lse)


def cross_entropy(
    hidden: Any,
    weight: Any,
    labels: Any,
    bias: Any = None,
    *,
    class_weights: Any = None,
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logits_soft_cap: float | None = None,
    reduction: str = "mean",
    return_lse: bool = False,
    vocabulary_axis: int = 1,
) -> Any:
    """Returns what `pallas_kernels.cross_entropy` does."""
    hidden, weight = (np.asarray(x, np.float64) for x in (hidden, weight))
    labels = np.asarray(labels)
    weight = weight if vocabulary_axis == 1 else weight.T
    weights = np.ones(weight.shape[1])
    if class_weights is not None:
        weights = np.asarray(class_weights, np.float64)
    losses, lses, counted = np.zeros(labels.shape), np.zeros(labels.shape), 0.0
    for place, label in np.ndenumerate(labels):
        if label == ignore_index:
            continue
        s = hidden[place] @ weight
        if bias is not None:
            s = s + np.asarray(bias, np.float64)
        if logits_soft_cap is not None:
            s = logits_soft_cap * np.tanh(s / logits_soft_cap)
        losses[place], lses[place] = token(s, label, weights, label_smoothing, z_loss)
        counted += weights[label]
    loss: Any = losses
    if reduction != "none":
        loss = losses.sum()
    if reduction == "mean":
        loss = loss / counted if counted else 0.0
    return (loss, lses) if return_lse else loss
