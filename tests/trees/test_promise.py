"""No leaf is treated otherwise than `treatments` says.

Where a rule's table says that a leaf is treated plainly, its update is the plain one; where it says
that a leaf is matrices, a change of one matrix's gradient changes no other update in the tree. The
gradients of a step are zero where the weights are not, so that AdamP finds them at right angles
from every point of view, and the plain update is known without another program.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
import pytest

import jaxopt_lab
from jaxopt_lab import distributed, subspace
from tests.trees import models, published
from tests.trees.test_trees import tree

DECAY = 0.1
WITH_STACKS = ("equinox", "gemma", "linen_transformer_scanned", "mixture_of_experts_scanned")
RULES: dict[str, Any] = {
    "muon": lambda: jaxopt_lab.muon(1.0, adam_learning_rate=1.0),
    "adamp": lambda: jaxopt_lab.adamp(1.0, weight_decay=DECAY),
    "sgdp": lambda: jaxopt_lab.sgdp(1.0, weight_decay=DECAY),
    "frugal": lambda: jaxopt_lab.frugal_adamw(1.0, density=0.5),
    "galore": lambda: jaxopt_lab.galore_adamw(
        1.0, 1, eps=1e-12, projection=subspace.svd(method="gram")
    ),
    "powersgd": lambda: distributed.powersgd(1, "replica", min_compression_rate=0),
}
# Of the published ones, those whose stacks have other neighbours than a norm.
PUBLISHED = ("deepseek_of_maxtext_scanned", "gpt_oss", "rwkv7_stacked", "siglip_scanned")
CASES = [("muon", name) for name in models.MODELS if name not in published.MODELS]
CASES += [("muon", name) for name in PUBLISHED]
CASES += [(rule, name) for rule in RULES if rule != "muon" for name in WITH_STACKS]


def weights_and_gradients(params: Any) -> tuple[Any, Any]:
    """Normal numbers, each entry in the weights or in the gradients and zero in the other."""
    rng = np.random.default_rng(0)
    leaves, structure = jax.tree.flatten(params)
    draws = [rng.standard_normal((2, *leaf.shape)).astype(np.float32) for leaf in leaves]
    sides = [rng.integers(2, size=leaf.shape).astype(bool) for leaf in leaves]
    weights = [np.where(side, draw[0], 0) for draw, side in zip(draws, sides)]
    gradients = [np.where(side, 0, draw[1]) for draw, side in zip(draws, sides)]
    return structure.unflatten(weights), structure.unflatten(gradients)


def groups(one: Any, is_plain: bool) -> np.ndarray:
    """The number of the group that each entry moves with: its matrix, or itself."""
    if is_plain:
        return np.arange(math.prod(one.shape)).reshape(one.shape)
    axes = one.axes if hasattr(one, "axes") else one.leaf.axes
    batch = np.arange(math.prod(one.shape[a] for a in axes.batch))
    sizes = [n if a in axes.batch else 1 for a, n in enumerate(one.shape)]
    return np.broadcast_to(batch.reshape(sizes), one.shape)


def plain_update(rule: str, weights: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    """The first step of Adam or SGD, or the mean over one replica."""
    if rule == "powersgd":
        return gradient
    direction = gradient if rule == "sgdp" else np.sign(gradient)
    return -direction - (DECAY * weights if rule in ("adamp", "sgdp") else 0)


@pytest.mark.parametrize(("rule", "name"), CASES)
def test_no_leaf_is_treated_otherwise_than_treatments_says(rule, name):
    params, gradients = weights_and_gradients(tree(name))
    tx = RULES[rule]()
    found = jaxopt_lab.treatments(tx, params).parameters
    plain = [one.kind in ("adam", "sgd", "full", "mean") for one in found]
    numbers, start = [], 0
    for one, is_plain in zip(found, plain):
        own = groups(one, is_plain) + start
        numbers.append(own)
        start = int(own.max()) + 1

    def update(gradients: Any) -> list[jax.Array]:
        return jax.tree.leaves(tx.update(gradients, tx.init(params), params)[0])

    @jax.jit
    def run(gradients: Any) -> list[jax.Array]:
        return jax.vmap(jax.vmap(update, axis_name="replica"))(gradients)

    # Any two groups differ in a bit of their numbers: one of them changes and the other does not.
    leaves, structure = jax.tree.flatten(gradients)
    bits = range(max(start - 1, 1).bit_length())
    changed = [[(own >> bit) % 2 == side for own in numbers] for bit in bits for side in (0, 1)]
    changed.insert(0, [np.zeros(own.shape, bool) for own in numbers])
    batches = [
        np.stack([leaf + case[index] * weight for case in changed])[:, None]
        for index, (leaf, weight) in enumerate(zip(leaves, jax.tree.leaves(params)))
    ]
    results = [np.asarray(x)[:, 0] for x in run(structure.unflatten(batches))]

    for index, (one, is_plain, own) in enumerate(zip(found, plain, results)):
        for case, update_of_case in zip(changed, own):
            # The batch may sum in another order; a coupling would show in the first digit.
            np.testing.assert_allclose(
                np.where(case[index], 0, update_of_case),
                np.where(case[index], 0, own[0]),
                atol=2e-5,
                err_msg=str(one),
            )
        expected = plain_update(rule, jax.tree.leaves(params)[index], leaves[index])
        if is_plain:
            np.testing.assert_allclose(own[0], expected, atol=2e-5, err_msg=str(one))
        elif rule in ("muon", "adamp", "sgdp") and own[0].size > 2:
            assert np.abs(own[0] - expected).max() > 1e-2, str(one)
