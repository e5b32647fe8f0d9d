"""A small convolutional classifier on scikit-learn's 1,797 handwritten digits (8 x 8 pixels)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

from experiments.harness.workload import Workload, parameter_count

BATCH_SIZE = 64
HELD_OUT = 360  # a fifth
STEPS = 300


def convolution_by_matmul(
    x: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: str, **unused: Any
) -> jax.Array:
    """NHWC convolution as one product with all patches; `padding` is "SAME", no dilation or groups.

    XLA runs a convolution inside a loop on one slow CPU thread, ten times slower than outside.
    """
    height, width, features_in, features_out = kernel.shape
    pads = jax.lax.padtype_to_pads(x.shape[1:3], (height, width), strides, padding)
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    rows, columns = x.shape[1] - height + 1, x.shape[2] - width + 1
    patches = [
        x[:, i : i + rows : strides[0], j : j + columns : strides[1]]
        for i in range(height)
        for j in range(width)
    ]
    return jnp.concatenate(patches, -1) @ kernel.reshape(height * width * features_in, features_out)


class Classifier(nnx.Module):
    """Two 3 x 3 convolutions, the second with stride 2, and a linear layer on all positions."""

    def __init__(self, rngs: nnx.Rngs):
        by_matmul = {"conv_general_dilated": convolution_by_matmul, "rngs": rngs}
        self.first = nnx.Conv(1, 16, (3, 3), **by_matmul)
        self.second = nnx.Conv(16, 32, (3, 3), strides=2, **by_matmul)
        self.head = nnx.Linear(4 * 4 * 32, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:  # [batch, 8, 8, 1] -> [batch, 10]
        x = nnx.relu(self.second(nnx.relu(self.first(images))))
        return self.head(x.reshape(len(x), -1))


def digits(batch_size: int | None = None) -> Workload:
    """Ten-way classification; the loss is the mean cross-entropy in nats per image."""
    batch_size = batch_size or BATCH_SIZE
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images = (images[order] / 16.0).astype(np.float32).reshape(-1, 8, 8, 1)
    labels = labels[order].astype(np.int32)
    data = {
        "train": (jnp.asarray(images[HELD_OUT:]), jnp.asarray(labels[HELD_OUT:])),
        "validation": (jnp.asarray(images[:HELD_OUT]), jnp.asarray(labels[:HELD_OUT])),
    }
    graph, abstract = nnx.split(nnx.eval_shape(lambda: Classifier(nnx.Rngs(0))), nnx.Param)

    @jax.jit
    def init(key: jax.Array) -> optax.Params:
        return nnx.to_pure_dict(nnx.state(Classifier(nnx.Rngs(key)), nnx.Param))

    def sample(data, key: jax.Array):
        inputs, targets = data["train"]
        rows = jax.random.randint(key, (batch_size,), 0, len(targets))
        return inputs[rows], targets[rows]

    def loss(params: optax.Params, batch) -> jax.Array:
        inputs, targets = batch
        logits = nnx.merge(graph, params)(inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    identity = {
        "workload": "digits",
        "parameters": parameter_count(abstract),
        "batch_size": batch_size,
    }
    return Workload(
        "digits", "nats per image", identity, 1e-2, STEPS, data, init, sample, loss,
        lambda params, data: loss(params, data["validation"]),
    )  # fmt: skip
