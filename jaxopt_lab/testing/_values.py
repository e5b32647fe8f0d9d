"""Deterministic trees, and comparisons that say which leaf differs and how."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_lab.testing._causes import describe
from jaxopt_lab.testing._registry import BreachError

# Rounding of a few float32 operations in another order, relative to a leaf's largest entry.
FLOAT32_TOLERANCE = 1e-5
# Two roundings to the 8 significant bits of bfloat16.
BFLOAT16_TOLERANCE = 2.0**-7


def normal(shape: tuple[int, ...], dtype: Any = "float32", seed: int = 0) -> jax.Array:
    """Normal values that depend on nothing but the arguments."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def kernel_and_bias(dtype: Any = "float32", seed: int = 0) -> dict[str, jax.Array]:
    """The tree of most checks: two leaves of different rank, with names a message can cite."""
    return {"kernel": normal((4, 5), dtype, seed), "bias": normal((5,), dtype, seed + 1)}


def mixed_dtypes_tree() -> dict[str, jax.Array]:
    """A leaf of each of three dtypes, named by it."""
    return {
        "bfloat16": normal((4, 3), "bfloat16"),
        "float16": normal((3,), "float16"),
        "float32": normal((3,), "float32"),
    }


def normal_like(tree: Any, seed: int = 10, dtype: Any = None) -> Any:
    """A tree of normal values with the shapes of `tree` and its dtypes, or one given dtype."""
    leaves, structure = jax.tree.flatten(tree)
    values = [
        normal(np.shape(leaf), dtype or jnp.result_type(leaf), seed + index)
        for index, leaf in enumerate(leaves)
    ]
    return structure.unflatten(values)


def full_like(tree: Any, value: float) -> Any:
    return jax.tree.map(lambda leaf: jnp.full(leaf.shape, value, leaf.dtype), tree)


def expect(condition: Any, message: str) -> None:
    if not condition:
        raise BreachError(message)


def host(leaf: Any) -> np.ndarray:
    """A leaf as a NumPy array; a typed random key as its data."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf)


def _pairs(found: Any, expected: Any, what: str) -> list[tuple[str, Any, Any]]:
    structures = jax.tree.structure(found), jax.tree.structure(expected)
    expect(
        structures[0] == structures[1],
        f"{what}: the tree is {structures[0]}, expected {structures[1]}",
    )
    paths = [
        f"{what}{jax.tree_util.keystr(path)}"
        for path, _ in jax.tree_util.tree_flatten_with_path(expected)[0]
    ]
    return list(zip(paths, jax.tree.leaves(found), jax.tree.leaves(expected), strict=True))


def expect_finite(tree: Any, what: str) -> None:
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            continue
        values = np.asarray(leaf)
        # NumPy knows no `isfinite` for bfloat16.
        wide = values.astype(np.complex128 if np.iscomplexobj(values) else np.float64)
        bad = int(np.sum(~np.isfinite(wide)))
        name = f"{what}{jax.tree_util.keystr(path)}"
        expect(bad == 0, f"{name} has {bad} of {values.size} entries that are NaN or infinite")


def expect_same_types(found: Any, expected: Any, what: str, weak_type: bool = False) -> None:
    """Structures, shapes and dtypes are equal, and weak types if asked for."""
    for path, new, old in _pairs(found, expected, what):
        new, old = jax.typeof(new), jax.typeof(old)
        same = (new.shape, new.dtype) == (old.shape, old.dtype)
        expect(same, f"{path} is {new.str_short()}, expected {old.str_short()}")
        if weak_type:
            weak = getattr(new, "weak_type", False), getattr(old, "weak_type", False)
            expect(weak[0] == weak[1], f"{path} has weak_type={weak[0]}, expected {weak[1]}")


def expect_equal(found: Any, expected: Any, what: str) -> None:
    """Equal bits; NaN equals NaN."""
    for path, new, old in _pairs(found, expected, what):
        new, old = host(new), host(old)
        expect(new.dtype == old.dtype, f"{path} is {new.dtype}, expected {old.dtype}")
        expect(new.tobytes() == old.tobytes(), f"{path} differs: {_gap(new, old)}")


def expect_close(
    found: Any, expected: Any, what: str, tolerance: float = FLOAT32_TOLERANCE
) -> None:
    """Equal up to `tolerance` times the largest entry of the expected leaf."""
    for path, new, old in _pairs(found, expected, what):
        new, old = host(new), host(old)
        expect(new.shape == old.shape, f"{path} has shape {new.shape}, expected {old.shape}")
        if old.size and not (new == old).all():
            new, old = new.astype(np.float64), old.astype(np.float64)
            within = np.max(np.abs(new - old)) <= tolerance * np.max(np.abs(old))
            expect(within, f"{path} differs: {_gap(new, old)}, allowed {tolerance:.1g}")


def _gap(new: np.ndarray, old: np.ndarray) -> str:
    if new.shape != old.shape or not new.size:
        return f"shape {new.shape}, expected {old.shape}"
    if new.dtype.kind not in "fV":
        return f"{new.ravel()[:4]}, expected {old.ravel()[:4]}"
    wide = new.astype(np.float64), old.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        gap = np.max(np.abs(wide[0] - wide[1])) / np.max(np.abs(wide[1]))
    return f"by {gap:.2g} of its largest entry"


def expect_refusal(
    call: Callable[[], Any], error: type[Exception], fragments: tuple[str, ...], what: str
) -> None:
    """`call` raises `error`, and its text holds every fragment (spaces do not count)."""
    wanted = f"expected {error.__name__} that names {' and '.join(fragments)}"
    try:
        call()
    except Exception as raised:
        text = "".join(str(raised).split())
        clear = isinstance(raised, error) and all(part in text for part in fragments)
        expect(clear, f"{what}: raised {describe(raised)}; {wanted}")
    else:
        raise BreachError(f"{what}: accepted silently; {wanted}")
