r"""The Newton-Schulz iteration that orthogonalises Muon's momentum, and its coefficients.

X_0 = U / (|U|_F + eps),    X_k = a X_{k-1} + (b A + c A^2) X_{k-1},  A = X_{k-1} X_{k-1}^T
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_lab import _checks, _compat, _hyperparams

Coefficients = tuple[float, float, float]
NsCoeffs = Literal["original", "standard", "quintic", "dion", "polar_express"]

NS_COEFFS: Coefficients = (3.4445, -4.7750, 2.0315)
NS_STEPS = 5
# Leaves whose matrices are iterated together.
_AT_ONCE = 32

# Cesista, Jiacheng and Jordan, "Squeezing 1-2% Efficiency Gains Out of Muon by Optimizing the
# Newton-Schulz Coefficients", 2025: each iteration its own polynomial.
_QUINTIC = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
# Amsel et al., "The Polar Express", 2025, arXiv:2505.16932, Algorithm 1: the best polynomial for
# what singular values the ones before it leave of [0.001, 1].
_POLAR = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)
# The paper's margin for rounding divides x by 1.01 in all polynomials but the last.
_POLAR_EXPRESS = (
    *((a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in _POLAR),
    (1.875, -1.25, 0.375),
)
# By the names that optax ("standard", "dion") and timm ("original", "quintic") have for them.
PRESETS: dict[str, Coefficients | tuple[Coefficients, ...]] = {
    "original": NS_COEFFS,
    "standard": NS_COEFFS,
    "quintic": _QUINTIC,
    "dion": _QUINTIC,
    "polar_express": _POLAR_EXPRESS,
}


def orthogonalize(
    matrices: list[jax.Array], iterate: Callable[[jax.Array], jax.Array]
) -> list[jax.Array]:
    """Applies `iterate` to (n, rows, cols) stacks of matrices, those of equal type together."""
    batches: dict[Any, list[int]] = defaultdict(list)
    # The iteration commutes with transposition, and is cheapest with the short side first.
    wide = [jnp.swapaxes(x, 1, 2) if x.shape[1] > x.shape[2] else x for x in matrices]
    for index, x in enumerate(wide):
        if x.size > 0:
            batches[_compat.type_apart_from_leading_axis(x)].append(index)
    results = list(matrices)
    for all_members in batches.values():
        # XLA's time for a kernel grows with the square of the arrays that it reads.
        for first in range(0, len(all_members), _AT_ONCE):
            members = all_members[first : first + _AT_ONCE]
            batch = iterate(jnp.concatenate([_compat.unshard(wide[index]) for index in members]))
            start = 0
            for index in members:
                stop = start + wide[index].shape[0]
                x = _compat.reshard_like(batch[start:stop], wide[index])
                results[index] = x if x.shape == matrices[index].shape else jnp.swapaxes(x, 1, 2)
                start = stop
    return results


def newton_schulz(
    x: jax.Array,
    eps: _hyperparams.Scalar,
    coefficients: Sequence[Coefficients],
    ns_steps: int | None,
    ns_dtype: Any,
    gram: Callable[..., jax.Array] | None = None,
) -> jax.Array:
    """The iteration on matrices (..., rows, cols) with rows <= cols.

    The coefficients stay exact, products accumulate in the dtype that comes in, and each of the
    three expressions of an iteration is rounded once.
    """
    dtype, narrow = x.dtype, jnp.dtype(ns_dtype or x.dtype)
    norm = _hyperparams.sqrt(jnp.sum(jnp.square(x), (-2, -1), keepdims=True))

    def product(left: jax.Array, right: jax.Array) -> jax.Array:
        return jnp.matmul(left, right, precision="highest", preferred_element_type=dtype)

    def symmetric(x: jax.Array) -> jax.Array:
        if gram is None:
            return product(x, jnp.swapaxes(x, -2, -1))
        found = gram(x, precision="highest", preferred_element_type=dtype)
        shape = (*x.shape[:-1], x.shape[-2])
        if jnp.shape(found) != shape or found.dtype != dtype:
            raise ValueError(
                f"gram returned shape {jnp.shape(found)} and dtype {found.dtype} for matrices of "
                f"shape {x.shape}; expected shape {shape} and dtype {dtype}"
            )
        return found

    def iteration(x: jax.Array, abc: jax.Array | Coefficients) -> jax.Array:
        a, b, c = abc
        square = symmetric(x).astype(narrow)
        # It is symmetric, so that its square is such a product too.
        poly = (b * square.astype(dtype) + c * symmetric(square)).astype(narrow)
        return (a * x.astype(dtype) + product(poly, x)).astype(narrow)

    x = (x / (norm + eps)).astype(narrow)
    if len(coefficients) == 1:
        steps = NS_STEPS if ns_steps is None else ns_steps
        x = _compat.fori_loop(0, steps, lambda _, x: iteration(x, coefficients[0]), x)
    else:
        table = jnp.asarray(coefficients, dtype)
        x = _compat.fori_loop(0, len(coefficients), lambda i, x: iteration(x, table[i]), x)
    return x.astype(dtype)


def coefficients_of(
    ns_coeffs: NsCoeffs | Coefficients | Sequence[Coefficients], ns_steps: Any
) -> tuple[Coefficients, ...]:
    """Returns one triple for all iterations, or one for each of them."""
    if isinstance(ns_coeffs, str):
        _checks.check_choice(tuple(PRESETS), ns_coeffs=ns_coeffs)
        ns_coeffs = PRESETS[ns_coeffs]
    table = np.asarray(ns_coeffs, dtype=object)
    if table.ndim not in (1, 2) or table.shape[-1] != 3 or table.shape[0] == 0:
        raise ValueError(
            "ns_coeffs must be three numbers, a triple for each iteration, or one of "
            f"{', '.join(PRESETS)}, got {ns_coeffs!r}"
        )
    triples = [tuple(row) for row in table.reshape(-1, 3)]
    for index, triple in enumerate(triples):
        of = f" of iteration {index}" if table.ndim == 2 else ""
        _checks.check_finite(**{f"ns_coeffs {letter}{of}": x for letter, x in zip("abc", triple)})
    if ns_steps is not None:
        _checks.check_positive_integer(ns_steps=ns_steps)
    if table.ndim == 1 or ns_steps is None:
        return tuple(triples)
    if not _checks.is_number(ns_steps):
        raise TypeError(
            "ns_steps must be an integer where ns_coeffs has a triple for each iteration: leave "
            "it out, or list it in static_args of optax.inject_hyperparams"
        )
    if ns_steps > len(triples):
        raise ValueError(
            f"ns_steps is {ns_steps}, but ns_coeffs has triples for {len(triples)} iterations"
        )
    return tuple(triples[: int(ns_steps)])
