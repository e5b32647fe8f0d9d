r"""Refinement: the schedule that the gradient norms of an earlier run ask for.

    w_t = G_t^-2 (SGD, l2 norms)  or  G_t^-1 (Adam, l1 norms),   G smoothed by a running median
    eta_t ~ w_t sum_{p > t} w_p,  scaled to a largest value of 1

Norms that do not change give linear decay; norms that fall early give a warm-up. Defazio et al.,
"Optimal Linear Decay Learning Rate Schedules and Further Refinements", 2023, arXiv:2310.07831.
"""

from __future__ import annotations

import bisect
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from jaxopt_lab import _checks, _hyperparams, _tree
from jaxopt_lab.schedules import _phases

Kind = Literal["l1", "l2"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Keep = Literal["first", "last"]
_EXPONENTS: dict[Kind, float] = {"l1": -1.0, "l2": -2.0}
# A smoothed norm of zero would ask for an infinite step: it counts as this part of the median.
_FLOOR = 1e-6
_NOT_RECORDED = -1.0


class RecordNormsState(NamedTuple):
    """State of `record_norms`: 4 bytes for each recorded update.

    Attributes:
      count: updates so far; int32, shape ().
      norms: shape (length,), float32, or float64 with float64 gradients; -1: none yet.
    """

    count: jax.Array
    norms: jax.Array


def record_norms(kind: Kind, length: int, *, keep: Keep = "first") -> optax.GradientTransformation:
    r"""Passes gradients through and writes down their norm, over all leaves together.

    .. math::
      G_t = \sum_i |g_i| \quad (l_1) \qquad \text{or} \qquad
      G_t = \sqrt{\textstyle\sum_i g_i^2} \quad (l_2)

    First in a chain it sees gradients, last in a chain updates. The buffer is filled from the
    front. Places that no update has reached hold -1, which `refined_schedule` leaves out.

    For a log of a running optimizer, the last norms of gradient and update beside the learning
    rate, there is `jaxopt_lab.log_norms`.

    Args:
      kind: `"l1"` for Adam and its kin, `"l2"` for SGD, where `refined_schedule` is to use them.
      length: how many updates are recorded, from 1 on.
      keep: when the buffer is full, `"first"` keeps what it has, as `refined_schedule` wants it,
        and later norms are not recorded; `"last"` writes the norm of update t over that of
        t - length: the latest is `norms[(count - 1) % length]`.

    Returns:
      A `GradientTransformation` with a `RecordNormsState`; its update needs no `params`.

    Raises:
      ValueError: unknown `kind` or `keep`, or `length` below 1; at update, a state of another
        `length`.
      TypeError: `length` that is no integer, or gradients that are not real floating point.

    Examples:
      >>> import jax.numpy as jnp
      >>> tx = record_norms("l1", length=3)
      >>> state = tx.init({"w": jnp.zeros(2)})
      >>> for size in (4.0, 2.0):
      ...     _, state = tx.update({"w": jnp.array([size, -size])}, state)
      >>> [float(norm) for norm in state.norms]
      [8.0, 4.0, -1.0]

    References:
      Defazio et al., `Optimal Linear Decay Learning Rate Schedules and Further Refinements
      <https://arxiv.org/abs/2310.07831>`_, 2023.
    """
    _checks.check_choice(KINDS, kind=kind)
    _checks.check_choice(get_args(Keep), keep=keep)
    size = _phases.as_steps("length", length, 1)

    def init_fn(params: optax.Params) -> RecordNormsState:
        _tree.check_params(params)
        dtype = _tree.compute_dtype(*(jnp.result_type(leaf) for leaf in jax.tree.leaves(params)))
        return RecordNormsState(jnp.zeros((), jnp.int32), jnp.full(size, _NOT_RECORDED, dtype))

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, RecordNormsState]:
        del params
        state = _tree.check_state(state, RecordNormsState)
        if state.norms.shape != (size,):
            raise ValueError(
                f"the state has room for {state.norms.shape[0]} norms, but length is {size}: it "
                "was made with another length"
            )
        for name, gradient in _tree.leaves_with_names(updates):
            _tree.check_gradient(name, gradient)
        updates = jax.tree.map(jnp.asarray, updates)
        norm = (_l1_norm if kind == "l1" else _tree.l2_norm)(updates, state.norms.dtype)
        place = state.count % size if keep == "last" else state.count
        norms = state.norms.at[place].set(jax.lax.stop_gradient(norm), mode="drop")
        return updates, RecordNormsState(_hyperparams.increment(state.count), norms)

    return optax.GradientTransformation(init_fn, update_fn)


def _l1_norm(tree: optax.Updates, dtype: Any) -> jax.Array:
    sums = (jnp.sum(jnp.abs(x).astype(dtype)) for x in jax.tree.leaves(tree))
    return sum(sums, start=jnp.zeros((), dtype))


def refined_schedule(
    norms: Any,
    total_steps: int,
    peak_value: _phases.Scalar,
    kind: Kind,
    smoothing: float = 0.1,
) -> optax.Schedule:
    r"""Makes a schedule from the gradient norms of an earlier run, whatever that one's schedule.

    .. math::
      w_t = \hat G_t^{-2} \;(l_2, \text{SGD}) \quad \text{or} \quad
      w_t = \hat G_t^{-1} \;(l_1, \text{Adam}), \qquad
      \eta_t = \eta_{peak}\, \frac{w_t \sum_{p > t} w_p}{\max_s w_s \sum_{p > s} w_p}

    :math:`\hat G` is the running median over
    :math:`2 \lfloor \lfloor \tau T \rfloor / 2 \rfloor + 1` norms, mirrored at their end and
    continued by the first at their beginning. The table is computed once, here, in float64 and
    NumPy; the schedule interpolates it linearly in the fraction of the run that is over, so that a
    run of another length can use it. The last update has a rate of exactly zero, as in the source.
    A constant factor in the norms does not matter.

    Norms that are not finite, and the -1 of `record_norms`, are left out. A smoothed norm below a
    millionth of the median (of the positive ones, if half of them are zero) counts as that.

    Args:
      norms: :math:`G`, one for each update of the earlier run, `(updates,)`; concrete, not traced.
        Of the l2 norms for SGD, of the l1 norms for Adam.
      total_steps: length of the new run in updates, from 2 on.
      peak_value: the highest rate; a scalar.
      kind: the kind of `norms`: `"l1"` weighs by :math:`\hat G^{-1}`, `"l2"` by
        :math:`\hat G^{-2}`.
      smoothing: :math:`\tau`, in [0, 1]: the width of the running median as a fraction of the
        norms; 0 for none. The authors use 0.1.

    Returns:
      A function of the step, an integer or a real number of any shape, to the rate in float32 (in
      float64 for a step in float64). Outside of the run the rate stays as it is at its end.

    Raises:
      ValueError: `norms` of another rank, with fewer than two usable ones, with negative ones or
        all zero; a bad rate, unknown `kind`, `smoothing` outside [0, 1], `total_steps` below 2.
      TypeError: `norms` that are traced, `total_steps` that is no integer, or a rate that is no
        real number.

    Examples:
      >>> import numpy as np
      >>> flat = refined_schedule(np.full(50, 3.0), total_steps=5, peak_value=1.0, kind="l2")
      >>> [float(flat(t)) for t in range(5)]
      [1.0, 0.75, 0.5, 0.25, 0.0]
      >>> falling = refined_schedule([4.0, 2.0, 1.0, 1.0, 1.0], 5, 1.0, kind="l1", smoothing=0.0)
      >>> [round(float(falling(t)), 3) for t in range(5)]  # large norms at first: a warm-up
      [0.438, 0.75, 1.0, 0.5, 0.0]

    References:
      Defazio et al., `Optimal Linear Decay Learning Rate Schedules and Further Refinements
      <https://arxiv.org/abs/2310.07831>`_, 2023.
    """
    _checks.check_choice(KINDS, kind=kind)
    _phases.check_rate(peak_value=peak_value)
    total = _phases.as_steps("total_steps", total_steps, 2)
    if not _checks.is_number(smoothing):
        raise TypeError(f"smoothing must be a number, got {type(smoothing).__name__}")
    _checks.check_fraction(smoothing=smoothing)
    table = _refined(_usable(norms), _EXPONENTS[kind], smoothing)
    stretch = (table.size - 1) / (total - 1)

    def schedule(step: Any) -> jax.Array:
        position = jnp.clip(_phases.since(step) * stretch, 0, table.size - 1)
        left = jnp.clip(jnp.floor(position), 0, table.size - 2)
        values = jnp.asarray(table, position.dtype)
        index = left.astype(jnp.int32)
        low, high = values[index], values[index + 1]
        return jnp.asarray(peak_value, position.dtype) * (low + (position - left) * (high - low))

    return schedule


def _usable(norms: Any) -> np.ndarray:
    if isinstance(norms, Tracer):
        raise TypeError("norms must be concrete: call refined_schedule outside of jit")
    values = _checks.as_numbers("norms", norms)
    if values.ndim != 1:
        raise ValueError(f"norms must have shape (updates,), got {values.shape}")
    values = values[np.isfinite(values) & (values != _NOT_RECORDED)]
    if values.size < 2:
        raise ValueError(f"norms must have at least two finite values, got {values.size}")
    if values.min() < 0:
        raise ValueError(f"norms must not be negative, got {values.min()}")
    if values.max() == 0:
        raise ValueError("norms are all zero: there is nothing to weigh steps by")
    return values


def _refined(norms: np.ndarray, exponent: float, smoothing: float) -> np.ndarray:
    """Returns w_t times the sum of the later w, divided by the largest such product."""
    smooth = _running_median(norms, int(smoothing * norms.size) // 2)
    if smooth.max() == 0:  # a few norms that are not zero, all of them filtered out
        smooth = norms
    middle = np.median(smooth) or np.median(smooth[smooth > 0])
    weights = np.maximum(smooth / middle, _FLOOR) ** exponent
    later = np.cumsum(weights[::-1])[::-1] - weights
    later[-1] = 0.0
    rates = weights * later
    return rates / rates.max()


def _running_median(values: np.ndarray, half: int) -> np.ndarray:
    """Returns the median of each value and its `half` neighbours on both sides."""
    padded = np.pad(np.pad(values, (half, 0), "edge"), (0, half), "reflect").tolist()
    window = sorted(padded[: 2 * half])
    medians = []
    for index in range(values.size):
        bisect.insort(window, padded[index + 2 * half])
        medians.append(window[half])
        del window[bisect.bisect_left(window, padded[index])]
    return np.array(medians)
