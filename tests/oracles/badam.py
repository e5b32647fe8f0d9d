"""BAdam (Luo, Yu and Li, 2024, arXiv 2404.02827): Adam on one block of leaves at a time.

K steps of AdamW on the leaves of the active block; then m, v and the step counter of every leaf are
thrown away and the next block has its turn. All other leaves are frozen: no step and no decay. With
n the steps since the switch, on active leaves only:

    theta <- theta (1 - eta lambda)
    m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2
    theta <- theta - eta (m / (1 - b1^n)) / (sqrt(v / (1 - b2^n)) + eps)

Two departures from the authors' code: every block gets exactly K steps, the first one too, and the
leaves named as free of decay are free of it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal

import numpy as np


def active_block(
    blocks: Sequence[Collection[str]], period: int, order: Literal["descending", "ascending"]
) -> set[str]:
    """Returns the names of the leaves of the block whose turn it is.

    Args:
        blocks: names of the leaves of each block, in model order.
        period: switches since the start, from 0.
        order: "descending" starts with the last block; "ascending" with the first.

    Raises:
        ValueError: on an unknown order.

    >>> [sorted(active_block([["a", "b"], ["c"]], period, "descending")) for period in range(3)]
    [['c'], ['a', 'b'], ['c']]
    """
    if order not in ("descending", "ascending"):
        raise ValueError(f"order must be descending or ascending, found {order!r}")
    index = period % len(blocks)
    return set(blocks[index if order == "ascending" else -1 - index])


def trajectory(
    params: Mapping[str, np.ndarray],
    grads: Sequence[Mapping[str, np.ndarray]],
    *,
    learning_rate: float,
    selection: Callable[[int], Collection[str]],
    switch_every: int = 50,
    always_active: Collection[str] = (),
    decayed: Collection[str] | None = None,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> list[dict[str, np.ndarray]]:
    """Runs BAdam in float64.

    Args:
        params: initial leaves by name, any shapes.
        grads: the gradients by name, one mapping per step; those of frozen leaves are not read.
        learning_rate: eta.
        selection: ``t -> names of the leaves of the active block``, asked at t = 1, K + 1, ...
            only. The state is discarded there even if the block remains the same.
        switch_every: K.
        always_active: leaves that are trained in every period; their state is discarded as well.
        decayed: leaves with weight decay; None for all.
        b1: decay of m.
        b2: decay of v.
        eps: added to the corrected root of v; positive.
        weight_decay: lambda, decoupled.

    Returns:
        The leaves after each step.

    Raises:
        ValueError: if ``eps`` is not positive, or a name is no leaf.

    >>> grads = [{"w": np.array(4.0), "x": np.array(-4.0)}] * 2
    >>> steps = trajectory({"w": np.array(1.0), "x": np.array(1.0)}, grads, learning_rate=0.25,
    ...                    selection=lambda t: {"w"} if t == 1 else {"x"}, switch_every=1)
    >>> [{name: round(float(x), 6) for name, x in step.items()} for step in steps]
    [{'w': 0.75, 'x': 1.0}, {'w': 0.75, 'x': 1.25}]
    """
    if eps <= 0:
        raise ValueError(f"eps must be positive, found {eps}")
    theta = {name: np.array(x, dtype=np.float64) for name, x in params.items()}
    m: dict[str, np.ndarray] = {}
    v: dict[str, np.ndarray] = {}
    active: set[str] = set()
    n = 0
    steps = []
    for t, gradients in enumerate(grads, start=1):
        if (t - 1) % switch_every == 0:
            active = set(selection(t)) | set(always_active)
            unknown = (active | set(decayed or ())) - set(theta)
            if unknown:
                raise ValueError(f"found {sorted(unknown)}, the leaves are {sorted(theta)}")
            m = {name: np.zeros_like(theta[name]) for name in active}
            v = {name: np.zeros_like(theta[name]) for name in active}
            n = 0
        n += 1
        for name in active:
            g = np.asarray(gradients[name], dtype=np.float64)
            m[name] = b1 * m[name] + (1 - b1) * g
            v[name] = b2 * v[name] + (1 - b2) * g**2
            rate = weight_decay if decayed is None or name in decayed else 0.0
            d = (m[name] / (1 - b1**n)) / (np.sqrt(v[name] / (1 - b2**n)) + eps)
            theta[name] = theta[name] * (1 - learning_rate * rate) - learning_rate * d
        steps.append({name: np.array(x) for name, x in theta.items()})
    return steps
