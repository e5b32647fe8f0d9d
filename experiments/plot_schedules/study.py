"""Short runs of a classifier of digits, whose gradients some schedules follow."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from jaxopt_lab import schedules

START_RATES = (0.01, 0.1, 1.0)
META_RATE = 0.05


def recorded_norms(steps: int) -> np.ndarray:
    """The gradient norms of a run, which a refined schedule is made from."""
    tx = optax.chain(schedules.record_norms("l1", steps), optax.adam(3e-3))
    return np.asarray(_run(tx, steps)[0][0].norms)


def adaptive_rates(steps: int) -> dict[str, np.ndarray]:
    """Rates that correct themselves, from different starts."""
    return {
        f"from {rate:g}": np.asarray(
            _run(
                schedules.hypergradient(optax.identity(), rate, META_RATE, "multiplicative"), steps
            )[1]
        )
        for rate in START_RATES
    }


def _run(tx: Any, steps: int) -> tuple[Any, Any]:
    """Trains softmax regression on the digits; returns the last state and all of the rates."""
    x, y = map(jnp.asarray, _digits())

    def loss(params: Any, batch: jax.Array) -> jax.Array:
        logits = x[batch] @ params["kernel"] + params["bias"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y[batch]).mean()

    def step(carry: Any, key: jax.Array) -> Any:
        params, state = carry
        grads = jax.grad(loss)(params, jax.random.randint(key, (64,), 0, x.shape[0]))
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), getattr(state, "learning_rate", 0.0)

    params = {"kernel": jnp.zeros((64, 10)), "bias": jnp.zeros(10)}
    keys = jax.random.split(jax.random.key(0), steps)
    (_, state), rates = jax.jit(lambda: jax.lax.scan(step, (params, tx.init(params)), keys))()
    return state, rates


def _digits() -> tuple[Any, Any]:
    images, labels = load_digits(return_X_y=True)
    return (images - images.mean(0)) / (images.std(0) + 1e-3), labels
