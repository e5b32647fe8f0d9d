"""The smallest task of one's own, to copy: a line through noisy points."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from experiments.harness.workload import Workload


def line() -> Workload:
    """Linear regression of 512 points in 8 dimensions, a quarter of them held out."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (512, 8))
    y = x @ jax.random.normal(keys[1], (8,)) + 0.1 * jax.random.normal(keys[2], (512,))
    data = {"train": (x[128:], y[128:]), "validation": (x[:128], y[:128])}

    def init(key: jax.Array) -> Any:
        return {"w": 0.1 * jax.random.normal(key, (8,)), "b": jnp.zeros(())}

    def sample(data: Any, key: jax.Array) -> Any:
        rows = jax.random.randint(key, (32,), 0, len(data["train"][1]))
        return jax.tree.map(lambda a: a[rows], data["train"])

    def loss(params: Any, batch: Any) -> jax.Array:
        inputs, targets = batch
        return jnp.mean((inputs @ params["w"] + params["b"] - targets) ** 2)

    return Workload(
        name="line",
        loss_unit="squared error",
        identity={"points": 512, "dimensions": 8, "batch_size": 32},
        learning_rate=0.05,
        steps=200,
        data=data,
        init=jax.jit(init),
        sample=sample,
        loss=loss,
        validation_loss=lambda params, data: loss(params, data["validation"]),
    )
