"""Trajectories of the exchanging transformations, one compilation each, under every mode."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import optax

from tests.distributed import modes


def directions(tx: optax.GradientTransformation, grads: Any, mode: str = "vmap") -> tuple[Any, Any]:
    """Runs `tx` from fresh states on gradients with leading axes (T, K).

    Returns:
      The updates with leading axes (K, T), and the final states with leading axis K.
    """
    replicas = jax.tree.leaves(grads)[0].shape[1]
    by_replica = jax.tree.map(lambda g: np.swapaxes(np.asarray(g), 0, 1), grads)

    def run(own: Any) -> Any:
        def step(state: Any, g: Any) -> Any:
            updates, state = tx.update(g, state)
            return state, updates

        state = tx.init(jax.tree.map(lambda g: g[0], own))
        state, updates = jax.lax.scan(step, state, own)
        return updates, state

    return modes.mapped(mode, run, replicas)(by_replica)


def gradients(steps: int, replicas: int, *shape: int, seed: int = 0) -> np.ndarray:
    """Gradients of shape (steps, replicas, *shape): a slow part, and each replica's own."""
    rng = np.random.default_rng(seed)
    common = rng.standard_normal(shape)
    own = rng.standard_normal((1, replicas, *shape))
    return common + 0.5 * own + rng.standard_normal((steps, replicas, *shape))
