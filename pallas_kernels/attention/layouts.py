"""What a device computes of another device's keys, when each holds a slice of the sequence.

The devices i = 0 ... n - 1 of an axis hold equal slices, in one of three orders. A slice is one or
two *runs* of positions (h is the length of a run):

    contiguous   one run, device i from position i h
    zigzag       two runs, device i from positions i h and (2 n - 1 - i) h
    striped      one run of every n-th position, device i from position i

so for the runs of a query device i and a key device j, row r sees key c iff

    low <= c - r <= high

with two numbers that depend on i, j and the runs: everything here is bookkeeping on them, done in
numpy when the program is traced. Pairs of runs in which nothing is seen are left out, pairs in
which everything is seen are computed without a mask, and neighbouring runs are computed together
where that says the same. What is left to do differs between pairs of devices in few ways, the
*branches*, of which a device takes one at a time.

Under a causal mask the zig-zag order gives all devices equal work in each step of a ring: against
any other device's slice, half of it, as one call without a mask.

References:
  Brandon et al., `Striped Attention <https://arxiv.org/abs/2311.09431>`_; zig-zag order after
  Zhu, `ring-flash-attention <https://github.com/zhuzilin/ring-flash-attention>`_.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

LAYOUTS = ("zigzag", "contiguous", "striped")

_FAR = 1 << 40  # a distance between positions that no sequence has


class Call(NamedTuple):
    """One call of a route: some rows of the query slice against some keys of the other slice."""

    rows: slice
    keys: slice
    left: int | None  # the window, as in `Mask`
    right: int | None
    offset: int | None  # as in `Mask`; None where it differs between devices
    pair: int  # where `Plan.offsets` has that offset

    @property
    def is_static(self) -> bool:
        """Whether the mask is the same on all devices that take the branch."""
        return self.offset is not None


class Plan(NamedTuple):
    """What device i computes of the keys of device j, for those (i, j) that the plan is for."""

    branches: tuple[tuple[Call, ...], ...]
    choice: np.ndarray  # int32 (n, n): which branch
    offsets: np.ndarray  # int32 (n, n, pairs)


class Schedule(NamedTuple):
    """The work of a ring, in whose step t device i holds the keys of device (i - t) mod n."""

    local: Plan  # step 0
    remote: Plan  # steps 1 ... last
    last: int  # after this step no device sees anything that it has not seen


def runs_of(layout: str) -> int:
    """Returns how many runs a slice consists of."""
    return 2 if layout == "zigzag" else 1


def stride_of(layout: str, axis_size: int) -> int:
    """Returns the distance between neighbouring positions of a run."""
    return axis_size if layout == "striped" else 1


def starts(layout: str, axis_size: int, length: int) -> np.ndarray:
    """Returns the first position of each run of each device's slice, (n, runs)."""
    device = np.arange(axis_size)[:, None]
    if layout == "striped":
        return device
    if layout == "contiguous":
        return device * length
    return np.concatenate([device, 2 * axis_size - 1 - device], axis=1) * (length // 2)


def positions(layout: str, axis_size: int, length: int) -> np.ndarray:
    """Returns the position of each element of each device's slice, (n, length)."""
    runs = runs_of(layout)
    within = np.arange(length // runs) * stride_of(layout, axis_size)
    return (starts(layout, axis_size, length)[:, :, None] + within).reshape(axis_size, length)


def to_positions(x: jax.Array, axis_size: int, layout: str) -> jax.Array:
    """Puts axis 1, the slices of all devices one after the other, into the order of positions."""
    split = x.reshape(x.shape[0], axis_size, runs_of(layout), -1, *x.shape[2:])
    if layout == "striped":
        split = split.transpose(0, 3, 1, 2, *range(4, split.ndim))
    elif layout == "zigzag":
        split = jnp.concatenate([split[:, :, 0], split[:, ::-1, 1]], axis=1)
    return split.reshape(x.shape)


def from_positions(x: jax.Array, axis_size: int, layout: str) -> jax.Array:
    """Undoes `to_positions`."""
    if layout == "striped":
        x_by_device = x.reshape(x.shape[0], -1, axis_size, *x.shape[2:]).swapaxes(1, 2)
    elif layout == "zigzag":
        chunks = x.reshape(x.shape[0], 2, axis_size, -1, *x.shape[2:])
        x_by_device = jnp.stack([chunks[:, 0], chunks[:, 1, ::-1]], axis=2)
    else:
        x_by_device = x
    return x_by_device.reshape(x.shape)


def schedule(
    layout: str, axis_size: int, rows: int, keys: int, left: int | None, right: int | None,
    *, by_runs: bool = False,
) -> Schedule:  # fmt: skip
    """Returns the work of a ring for slices of `rows` queries and `keys` keys.

    Args:
      layout: One of `LAYOUTS`.
      axis_size: Number of devices.
      rows: Queries of a device.
      keys: Keys of a device.
      left: The window between positions, as in `Mask`.
      right: Likewise; 0 is causal.
      by_runs: Whether each call is one run of rows against one run of keys.
    """
    device = np.arange(axis_size)
    steps = (device[:, None] - device[None, :]) % axis_size
    low, high = _intervals(layout, axis_size, rows, keys, left, right)
    last = int(steps.max(where=(low <= high).any(axis=(2, 3)), initial=0))
    local, remote = (
        plan(layout, axis_size, rows, keys, left, right, members, by_runs=by_runs)
        for members in (steps == 0, (steps > 0) & (steps <= last))
    )
    return Schedule(local, remote, last)


def plan(
    layout: str,
    axis_size: int,
    rows: int,
    keys: int,
    left: int | None,
    right: int | None,
    members: np.ndarray,
    *,
    by_runs: bool = False,
) -> Plan:
    """Returns what the pairs of devices in `members`, bool (n, n), have to compute.

    The other arguments are those of `schedule`.
    """
    low, high = _intervals(layout, axis_size, rows, keys, left, right)
    runs = runs_of(layout)
    # A branch is what its calls need to know when they are traced. The offset is not part of it:
    # it may come at run time. So the interval enters by which of its ends exist, and its width.
    offsets = np.where(high < _FAR, high, np.where(low > -_FAR, low, 0))
    offsets = np.where(low <= high, offsets, 0)
    width = np.where((low > -_FAR) & (high < _FAR), high - low, 0)
    kinds = np.stack([low > high, low > -_FAR, high < _FAR, width], axis=-1)
    found, which = np.unique(kinds[members], axis=0, return_inverse=True)
    choice = np.zeros(members.shape, np.int32)
    choice[members] = which.ravel()
    branches = []
    for number in range(len(found)):
        here = members & (choice == number)
        branches.append(_calls(low[here], high[here], rows // runs, keys // runs, by_runs))
    flat = offsets.reshape(axis_size, axis_size, runs * runs)
    return Plan(tuple(branches), choice, flat.astype(np.int32))


def _intervals(
    layout: str, n: int, rows: int, keys: int, left: int | None, right: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns `low` and `high` (n, n, runs, runs).

    An end that hides nothing is -_FAR or _FAR, and where nothing is seen ``low > high``.
    """
    before = _FAR if left is None else left
    after = _FAR if right is None else right
    first_row, first_key = starts(layout, n, rows), starts(layout, n, keys)
    distance = first_row[:, None, :, None] - first_key[None, :, None, :]
    # Key s = first_key + stride c and row p = first_row + stride r: -left <= s - p <= right.
    stride = stride_of(layout, n)
    low, high = -((before - distance) // stride), (distance + after) // stride
    t, s = rows // runs_of(layout), keys // runs_of(layout)
    return _shortened(low, high, t, s)


def _shortened(
    low: np.ndarray, high: np.ndarray, rows: int, keys: int
) -> tuple[np.ndarray, np.ndarray]:
    """Drops the ends of intervals that hide nothing from `rows` rows, or no row from the keys."""
    empty = (low > high) | (low > keys - 1) | (high < 1 - rows)
    low = np.where(low <= 1 - rows, -_FAR, low)
    high = np.where(high >= keys - 1, _FAR, high)
    return np.where(empty, _FAR, low), np.where(empty, -_FAR, high)


def _calls(
    low: np.ndarray, high: np.ndarray, rows: int, keys: int, by_runs: bool
) -> tuple[Call, ...]:
    """Returns the calls of a branch from the intervals of its members, (members, runs, runs)."""
    runs = low.shape[1]
    all_rows, all_keys = slice(0, runs * rows), slice(0, runs * keys)
    if not (low <= high).any():
        return ()
    if not by_runs and _as_if_adjacent(low, high, rows, keys):
        return (_call(all_rows, all_keys, low[:, 0, 0], high[:, 0, 0], 0),)

    def run(number: int, length: int) -> slice:
        return slice(number * length, (number + 1) * length)

    calls = []
    whole = ((low == -_FAR) & (high == _FAR)).all(axis=0)
    indices = range(runs)
    together = []
    if not by_runs:
        together += [(all_rows, run(b, keys), np.s_[:, b]) for b in indices]
        together += [(run(a, rows), all_keys, np.s_[a, :]) for a in indices]
    together += [(run(a, rows), run(b, keys), np.s_[a, b]) for a in indices for b in indices]
    for r, k, entries in together:
        if whole[entries].all():
            calls.append(Call(r, k, None, None, 0, 0))
            whole[entries] = False
    for a in indices:
        for b in indices:
            ends = low[:, a, b], high[:, a, b]
            if (ends[0] <= ends[1]).all() and not ((ends[0] == -_FAR) & (ends[1] == _FAR)).all():
                calls.append(_call(run(a, rows), run(b, keys), *ends, a * runs + b))
    return tuple(calls)


def _as_if_adjacent(low: np.ndarray, high: np.ndarray, rows: int, keys: int) -> bool:
    """Whether each row sees the same keys as if the runs of a slice followed on one another."""
    run = np.arange(low.shape[1])
    shift = run[:, None] * rows - run[None, :] * keys
    first_low, first_high = low[:, :1, :1], high[:, :1, :1]
    if (first_low > first_high).any():
        return False
    # An end at _FAR stays there: no shift comes near it.
    as_if = _shortened(first_low + shift, first_high + shift, rows, keys)
    return bool((as_if[0] == low).all() and (as_if[1] == high).all())


def _call(rows: slice, keys: slice, low: np.ndarray, high: np.ndarray, pair: int) -> Call:
    """Writes ``low <= c - r <= high`` as a window of a mask whose offset is one of its ends."""
    has_low, has_high = bool(low[0] > -_FAR), bool(high[0] < _FAR)
    if not has_low and not has_high:
        return Call(rows, keys, None, None, 0, pair)
    ends = high if has_high else low
    left = (int(high[0] - low[0]) if has_high else 0) if has_low else None
    offset = int(ends[0]) if (ends == ends[0]).all() else None
    return Call(rows, keys, left, 0 if has_high else None, offset, pair)
