"""Every feature of `cross_entropy`, and every pair of them, on small arrays."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels

TOKENS, WIDTH, VOCABULARY = (3, 11), 6, 37
BLOCKS = {"block_vocabulary": 8}  # of which the last one is smaller

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "label smoothing": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 0.01},
    "soft cap": {"logits_soft_cap": 1.5},
    "no index ignored": {"ignore_index": None},
    "sum": {"reduction": "sum"},
    "a loss each": {"reduction": "none"},
    "lse": {"return_lse": True},
    "tied embedding": {"vocabulary_axis": 0},
    # Five steps of seven tokens, two of which are none of the 33.
    "gradient in forward": {"gradient_in_forward": True, "block_tokens": 7},
    "bias": {},
    "class weights": {},
    "ignored": {},
    "one token": {},
}
ALONE = {"plain"}
# Gradients that are there already are of one number.
REFUSED = {
    frozenset({"gradient in forward", "a loss each"}),
    frozenset({"gradient in forward", "lse"}),
    frozenset({"ignored", "no index ignored"}),
    frozenset({"sum", "a loss each"}),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """Some features together."""

    features: tuple[str, ...]

    def __str__(self) -> str:
        return " and ".join(self.features)

    def options(self) -> dict[str, Any]:
        """Returns the keyword arguments that are no arrays."""
        return functools.reduce(lambda a, b: a | b, (OPTIONS[f] for f in self.features), {})

    def arrays(self, dtype: Any = np.float32) -> tuple[Any, ...]:
        """Returns hidden, weight, labels, bias and class weights, the last two perhaps None."""
        draw = np.random.default_rng(0)
        tokens = () if "one token" in self.features else TOKENS
        hidden = draw.normal(size=(*tokens, WIDTH)).astype(dtype)
        weight = draw.normal(size=(WIDTH, VOCABULARY)).astype(dtype)
        labels = draw.integers(0, VOCABULARY, tokens)
        if "ignored" in self.features:
            labels = np.where(draw.random(tokens) < 0.4, -100, labels)
        bias = draw.normal(size=VOCABULARY).astype(dtype) if "bias" in self.features else None
        weights = None
        if "class weights" in self.features:
            weights = draw.uniform(0.2, 3, VOCABULARY).astype(dtype)
        if self.options().get("vocabulary_axis") == 0:
            weight = np.ascontiguousarray(weight.T)
        return hidden, weight, labels.astype(np.int32), bias, weights


def pairs() -> list[Case]:
    """Returns every two features that can go together."""
    names = [name for name in OPTIONS if name not in ALONE]
    return [
        Case(pair) for pair in itertools.combinations(names, 2) if frozenset(pair) not in REFUSED
    ]


CASES = [Case((name,)) for name in OPTIONS] + pairs()


def results(function: Any, case: Case, arrays: tuple[Any, ...], **more: Any) -> list[np.ndarray]:
    """Returns loss, lse where asked for, and the gradients of a sum of both with other factors."""
    hidden, weight, labels, bias, weights = arrays
    options = case.options() | more

    def call(hidden: Any, weight: Any, bias: Any) -> Any:
        return function(hidden, weight, labels, bias, class_weights=weights, **options)

    def program(*moving: Any) -> Any:
        out, pull = jax.vjp(call, *moving)
        leaves = jax.tree.leaves(out)
        factors = [jnp.cos(jnp.arange(x.size, dtype=x.dtype) + i + 1) for i, x in enumerate(leaves)]
        cotangents = [f.reshape(x.shape) for f, x in zip(factors, leaves)]
        return leaves, pull(jax.tree.unflatten(jax.tree.structure(out), cotangents))

    found = jax.jit(program)(hidden, weight, bias)
    return [np.asarray(x) for x in jax.tree.leaves(found)]


@functools.cache
def expected(case: Case) -> list[np.ndarray]:
    """Returns the same of the plain definition in float64."""
    plain = case.options() | {"implementation": "reference"}
    plain.pop("gradient_in_forward", None)
    plain.pop("block_tokens", None)

    def reference(*args: Any, **kwargs: Any) -> Any:
        kwargs = {k: v for k, v in kwargs.items() if k == "class_weights"}
        return pallas_kernels.cross_entropy(*args, **kwargs, **plain, precision="highest")

    with jax.enable_x64(True):
        arrays = case.arrays()
        wide = [
            x.astype(np.float64) if x is not None and x.dtype == np.float32 else x for x in arrays
        ]
        return results(reference, case, tuple(wide))


def check(function: Any, case: Case) -> None:
    """Raises AssertionError where a float32 result is not that of the definition in float64."""
    found = results(function, case, case.arrays(), **BLOCKS)
    # Rounding of sums of up to 37 terms of order 1.
    for a, b in zip(found, expected(case), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
