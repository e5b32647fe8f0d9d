"""FRUGAL (Zmushko et al., 2024, arXiv 2411.07837), as in the authors' code.

A gradient is split into a part inside a small subspace, which takes Adam with state, and the rest,
which takes sign-SGD or SGD without. Every T steps, at t = 1, T + 1, ..., the subspace is new. With
P the restriction to it, P^T the extension by zeros, and n the steps since the last reset:

    theta <- theta (1 - eta lambda)
    s = P(g),   m <- b1 m + (1 - b1) s,   v <- b2 v + (1 - b2) s^2
    u = (m / (1 - b1^n)) / (sqrt(v / (1 - b2^n)) + eps)
    theta <- theta - a P^T(u) - b f(g - P^T(s)),   a = eta s_p,   b = a s_f

f is the sign, the identity or zero. Weight decay takes plain eta, neither scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from .galore import Basis, Side, resolve_side, svd_basis

Kind: TypeAlias = Literal["columns", "rows", "randk", "svd", "leaf"]
FreeRule: TypeAlias = Literal["sign", "sgd", "none"]

FREE_RULES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "sign": np.sign,
    "sgd": lambda r: r,
    "none": np.zeros_like,
}


def size(kind: Kind, shape: Sequence[int], density: float, side: Side = "smaller") -> int:
    """Returns how many rows, columns, entries or singular vectors a density stands for.

    Args:
        kind: "columns" floor(in density), "rows" floor(out density), "randk"
            floor(in out density), "svd" round(size of the projected side density), half to even;
            the smaller side counts for "both".
        shape: (in, out).
        density: rho in [0, 1].
        side: projected axis of "svd".

    Raises:
        ValueError: on a kind that has no size, or a density outside [0, 1].

    >>> size("columns", (6, 10), 0.45), size("rows", (6, 10), 0.45), size("randk", (6, 10), 0.45)
    (2, 4, 27)
    >>> size("svd", (6, 10), 0.45), size("svd", (5, 10), 0.5), size("svd", (6, 10), 0.45, "out")
    (3, 2, 4)
    """
    if not 0 <= density <= 1:
        raise ValueError(f"density must be in [0, 1], found {density}")
    rows, cols = shape
    if kind == "svd":
        sides = {"in": rows, "out": cols, "both": min(rows, cols)}
        return round(sides[resolve_side(shape, side)] * density)
    sizes = {"columns": rows, "rows": cols, "randk": rows * cols}
    if kind not in sizes:
        raise ValueError(f"kind must be columns, rows, randk or svd, found {kind!r}")
    return math.floor(sizes[kind] * density)


def active_leaves(
    names: Sequence[str], density: float, period: int, order: Literal["ascending", "descending"]
) -> set[str]:
    """Returns the leaves that have state in one period, of the two orders without chance.

    Args:
        names: all projected leaves, in model order.
        density: rho; round(rho len(names)) leaves are active, half to even.
        period: periods since the start, from 0.
        order: "ascending" takes the next window of names and wraps around; "descending" does so
            from the last name backwards.

    >>> sorted(active_leaves(["a", "b", "c"], 0.7, 1, "ascending"))
    ['a', 'c']
    >>> sorted(active_leaves(["a", "b", "c"], 0.7, 0, "descending"))
    ['b', 'c']
    """
    if order not in ("ascending", "descending"):
        raise ValueError(f"order must be ascending or descending, found {order!r}")
    ordered = list(names) if order == "ascending" else list(reversed(names))
    count = round(len(ordered) * density)
    return {ordered[(period * count + i) % len(ordered)] for i in range(count)}


class _Entries(NamedTuple):
    """Restriction to the entries that a numpy index names."""

    index: Any
    shape: tuple[int, ...]

    @classmethod
    def make(cls, kind: Kind, value: Any, shape: tuple[int, ...]) -> _Entries:
        if kind == "leaf":
            return cls(np.full(shape, bool(value)), shape)
        if kind == "randk":
            return cls(tuple(np.asarray(axis, dtype=np.intp) for axis in value), shape)
        chosen = np.asarray(value, dtype=np.intp)
        return cls((chosen,) if kind == "columns" else (slice(None), chosen), shape)

    def restrict(self, x: np.ndarray) -> np.ndarray:
        return x[self.index]

    def extend(self, y: np.ndarray) -> np.ndarray:
        x = np.zeros(self.shape)
        x[self.index] = y
        return x


def _carry(
    old: _Entries | Basis, new: _Entries | Basis, m: np.ndarray, v: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Moves the moments from one subspace into the next.

    Entries that stay keep their moments and new ones start at zero. Between bases, with
    R = B_old^T B_new on each side, m goes with R and v with the squares of R's entries.
    """
    if isinstance(old, Basis) and isinstance(new, Basis):
        left, right = old.left.T @ new.left, old.right.T @ new.right
        return left.T @ m @ right, (left**2).T @ v @ right**2
    return new.restrict(old.extend(m)), new.restrict(old.extend(v))


def trajectory(
    param: np.ndarray,
    grads: Sequence[np.ndarray],
    *,
    learning_rate: float,
    kind: Kind,
    selection: Callable[[int], Any] | int,
    side: Side = "smaller",
    update_gap: int = 200,
    on_refresh: Literal["reset", "keep", "project"] = "reset",
    free_rule: FreeRule = "sign",
    full_scale: float = 1.0,
    free_scale: float = 1.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> list[np.ndarray]:
    """Runs FRUGAL on one leaf in float64.

    Args:
        param: initial kernel, shape (in, out); any shape for the kind "leaf".
        grads: one gradient per step, each of the parameter's shape.
        learning_rate: eta.
        kind: what ``selection`` returns. "columns": an array of indices of the axis in; "rows":
            of the axis out; "randk": the pair of index arrays (in, out) of single entries; "svd":
            an orthonormal basis (size of the projected side, r), or the pair (in, r), (out, r)
            for both sides; "leaf": whether the whole leaf has state.
        selection: ``t -> value``, asked at t = 1, T + 1, ... only; or for "svd" the rank r, for
            ``svd_basis`` of the gradient, unless that is all zero: then the basis stays.
        side: projected axis of "svd".
        update_gap: T.
        on_refresh: what becomes of the state at t = T + 1, ...: "reset" sets moments and n to
            zero, "keep" leaves them in their slots, "project" moves them into the new subspace.
        free_rule: f: "sign", "sgd" or "none".
        full_scale: s_p, factor on both parts of the step.
        free_scale: s_f, further factor on the part without state.
        b1: decay of m.
        b2: decay of v.
        eps: added to the corrected root of v; positive.
        weight_decay: lambda, decoupled.

    Returns:
        The parameter after each step. A basis of the whole space leaves no rest: f is not applied
        to its rounding noise, as it is in the authors' code.

    Raises:
        ValueError: on an unknown ``kind``, ``on_refresh`` or ``free_rule``, if ``eps`` is not
            positive, or a rank is given for another kind than "svd".

    >>> step = trajectory(np.zeros((2, 2)), [np.array([[5.0, -5.0], [3.0, 0.0]])],
    ...                   learning_rate=1.0, kind="columns", selection=lambda t: [0],
    ...                   free_scale=0.5)
    >>> step[0].round(6)
    array([[-1. ,  1. ],
           [-0.5,  0. ]])
    """
    if kind not in ("columns", "rows", "randk", "svd", "leaf"):
        raise ValueError(f"kind must be columns, rows, randk, svd or leaf, found {kind!r}")
    if on_refresh not in ("reset", "keep", "project"):
        raise ValueError(f"on_refresh must be reset, keep or project, found {on_refresh!r}")
    if free_rule not in FREE_RULES:
        raise ValueError(f"free_rule must be one of {list(FREE_RULES)}, found {free_rule!r}")
    if eps <= 0:
        raise ValueError(f"eps must be positive, found {eps}")
    if isinstance(selection, int) and kind != "svd":
        raise ValueError(f"selection may be a rank for svd only, found {selection} for {kind}")
    theta = np.array(param, dtype=np.float64)
    a = learning_rate * full_scale
    b = a * free_scale
    space = None
    n = 0
    m = v = np.zeros(0)
    thetas = []
    for t, grad in enumerate(grads, start=1):
        g = np.asarray(grad, dtype=np.float64)
        if space is None or (t - 1) % update_gap == 0:
            old = space
            if isinstance(selection, int):
                if space is None or np.any(g):
                    space = Basis.make(svd_basis(g, selection, side), theta.shape, side)
            elif kind == "svd":
                space = Basis.make(selection(t), theta.shape, side)
            else:
                space = _Entries.make(kind, selection(t), theta.shape)
            if old is None or on_refresh == "reset":
                n, m = 0, np.zeros_like(space.restrict(g))
                v = m
            elif on_refresh == "project":
                m, v = _carry(old, space, m, v)
        theta = theta * (1 - learning_rate * weight_decay)
        n += 1
        s = space.restrict(g)
        m = b1 * m + (1 - b1) * s
        v = b2 * v + (1 - b2) * s**2
        u = (m / (1 - b1**n)) / (np.sqrt(v / (1 - b2**n)) + eps)
        complete = isinstance(space, Basis) and space.complete
        rest = np.zeros_like(g) if complete else g - space.extend(s)
        theta = theta - a * space.extend(u) - b * FREE_RULES[free_rule](rest)
        thetas.append(np.array(theta))
    return thetas


def blocks_trajectory(
    params: Mapping[str, np.ndarray],
    grads: Sequence[Mapping[str, np.ndarray]],
    *,
    learning_rate: float,
    selection: Callable[[int], Collection[str]],
    update_gap: int = 200,
    free_rule: FreeRule = "sign",
    full_scale: float = 1.0,
    free_scale: float = 1.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> list[dict[str, np.ndarray]]:
    """Runs in float64 FRUGAL whose subspace is a set of whole leaves.

    Every period starts with fresh state, also for a leaf that was active before it.

    Args:
        params: initial leaves by name, any shapes.
        grads: the gradients by name, one mapping per step.
        learning_rate: eta.
        selection: ``t -> names of the leaves with state``, asked at t = 1, T + 1, ... only.
        update_gap: T.
        free_rule: f: "sign", "sgd" or "none"; leaves without state decay all the same.
        full_scale: s_p.
        free_scale: s_f.
        b1: decay of m.
        b2: decay of v.
        eps: added to the corrected root of v; positive.
        weight_decay: lambda, decoupled.

    Returns:
        The leaves after each step.

    Raises:
        ValueError: if ``selection`` names a leaf that is not there.

    >>> grads = [{"w": np.array(4.0), "x": np.array(-4.0)}]
    >>> steps = blocks_trajectory({"w": np.array(1.0), "x": np.array(1.0)}, grads,
    ...                           learning_rate=0.25, selection=lambda t: {"w"}, free_rule="sgd")
    >>> {name: round(float(x), 6) for name, x in steps[0].items()}
    {'w': 0.75, 'x': 2.0}
    """
    sets = {t: set(selection(t)) for t in range(1, len(grads) + 1, update_gap)}
    unknown = set().union(*sets.values()) - set(params)
    if unknown:
        raise ValueError(f"selection names {sorted(unknown)}, the leaves are {sorted(params)}")
    leaves = {
        name: trajectory(
            param,
            [g[name] for g in grads],
            learning_rate=learning_rate,
            kind="leaf",
            selection=lambda t, name=name: name in sets[t],
            update_gap=update_gap,
            free_rule=free_rule,
            full_scale=full_scale,
            free_scale=free_scale,
            b1=b1,
            b2=b2,
            eps=eps,
            weight_decay=weight_decay,
        )
        for name, param in params.items()
    }
    return [{name: thetas[i] for name, thetas in leaves.items()} for i in range(len(grads))]
