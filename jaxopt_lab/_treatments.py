"""What becomes of each parameter under rules that do not treat all of them alike.

Each such rule reports at init what it has decided. `treatments` runs an init, without arrays, and
collects the reports; otherwise a report only tells, once, of kernels that were left to the plain
rule because nobody knows their axes.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import jax
import optax

from jaxopt_lab import _checks, _compat, _matrices, _roles, _tree


class Described(Protocol):
    """What is said of one parameter."""

    @property
    def rule(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def kind(self) -> str: ...
    @property
    def reason(self) -> str: ...


@dataclasses.dataclass(frozen=True)
class LeafTreatment:
    """How one parameter is treated by a rule.

    Attributes:
      rule: the rule's name, such as "muon".
      name: path of the parameter.
      shape: of the parameter.
      kind: what becomes of it, such as "muon" or "adam".
      reason: why, in a few words.
      axes: the axes that count matrices, those of inputs and those of outputs, or None.
    """

    rule: str
    name: str
    shape: tuple[int, ...]
    kind: str
    reason: str
    axes: _roles.MatrixAxes | None = None

    def __str__(self) -> str:
        """One line: path, shape, treatment and reason."""
        return f"{self.name or 'parameter'} {self.shape}: {self.kind} ({self.reason})"


@dataclasses.dataclass(frozen=True)
class Treatments:
    """What `treatments` found; `str(result)` is a table with one line a parameter.

    Attributes:
      parameters: what becomes of each, in the order of the rules and of the parameters; all have
        `name`, `shape`, `rule`, `kind` and `reason`.
    """

    parameters: tuple[Any, ...]

    def __str__(self) -> str:
        """A line a parameter, under the names of the rules if there are several."""
        rows: dict[str, list[tuple[str, ...]]] = {}
        for one in self.parameters:
            what = str(one).removeprefix(f"{one.name or 'parameter'} {one.shape}: ")
            row = (one.name or "parameter", str(one.shape), what)
            rows.setdefault(one.rule, []).append(row)
        widths = [max(len(row[k]) for group in rows.values() for row in group) for k in (0, 1)]
        lines = []
        for rule, group in rows.items():
            lines += [f"{rule}:"] if len(rows) > 1 else []
            lines += [f"{n:{widths[0]}}  {s:{widths[1]}}  {what}" for n, s, what in group]
        return "\n".join(lines)


_collected: contextvars.ContextVar[list[Any] | None] = contextvars.ContextVar(
    "collected", default=None
)
_told: set[tuple[str, ...]] = set()


def treatments(tx: optax.GradientTransformation, params: optax.Params) -> Treatments:
    """Says what becomes of each parameter under a transformation; nothing is allocated.

    Rules that treat parameters unlike are `muon` and `scale_by_muon`, `adamp`, `sgdp`, `frugal`
    with all that is made of it (`frugal_adamw`, `galore_adamw`, `dct_adamw`, `badam`), and
    `powersgd`. What a leaf is follows from its path, its shape and its neighbours; to decide
    otherwise use the rule's `dimension_numbers`.

    Args:
      tx: a transformation that contains such rules, in any chain or wrapper. Mapped axes that its
        `init` asks for need not be bound.
      params: the parameters, or their `jax.ShapeDtypeStruct`.

    Returns:
      A `Treatments`: its `parameters` have `name`, `shape`, `rule`, `kind` and `reason`, in the
      order of the rules and of the parameters.

    Raises:
      ValueError: `tx` contains no such rule.
      TypeError: `tx` is no transformation.

    Examples:
      >>> import jax.numpy as jnp, jaxopt_lab
      >>> params = {"embed": jnp.zeros((9, 4)), "up": jnp.zeros((4, 8)), "bias": jnp.zeros(8)}
      >>> print(jaxopt_lab.treatments(jaxopt_lab.frugal_adamw(1e-3), params))
      bias   (8,)    full (1 axis)
      embed  (9, 4)  full (embedding or output layer by its path)
      up     (4, 8)  split 1 of 4 (matrix)
      >>> print(jaxopt_lab.treatments(jaxopt_lab.muon(1e-3), params))
      bias   (8,)    adam (1 axis)
      embed  (9, 4)  adam (embedding or output layer by its path)
      up     (4, 8)  muon (matrix)
    """
    _checks.check_transformation(tx=tx)
    _tree.check_arrays("params", params)
    found: list[Any] = []

    def init(params: optax.Params) -> None:
        found.clear()
        token = _collected.set(found)
        try:
            tx.init(params)
        finally:
            _collected.reset(token)

    _compat.eval_with_axes(init, params)
    if not found and jax.tree.leaves(params):
        raise ValueError(
            "tx does not contain frugal, muon, adamp, sgdp or powersgd: it treats all leaves alike"
        )
    return Treatments(tuple(found))


def report(found: Sequence[Described]) -> None:
    """Hands the treatments by a rule to `treatments`, if it is collecting."""
    collected = _collected.get()
    if collected is not None:
        collected.extend(found)


def report_choices(rule: str, choices: Sequence[_matrices.Choice], matrix: str, other: str) -> None:
    """Reports leaves as `matrix` or `other`, and tells of kernels whose axes are unknown."""
    kinds = [other if c.axes is None else matrix for c in choices]
    report(
        [
            LeafTreatment(rule, c.name, c.shape, kind, c.reason, c.axes)
            for c, kind in zip(choices, kinds)
        ]
    )
    tell_of_unknown(rule, choices, other)


def tell_of_unknown(rule: str, choices: Sequence[_matrices.Choice], other: str) -> None:
    """Warns once of kernels that are treated as `other` because their axes are unknown."""
    unknown = [
        c.name
        for c in choices
        if c.role and c.role.kind == "unknown" and c.role.has_kernel_name and math.prod(c.shape)
    ]
    key = (rule, *unknown)
    if not unknown or _collected.get() is not None or key in _told:
        return
    _told.add(key)
    names = ", ".join(f"'{name}'" for name in unknown[:4])
    more = f" and {len(unknown) - 4} more" if len(unknown) > 4 else ""
    warnings.warn(
        f"{rule}: {names}{more}: it is unknown which axes are inputs and outputs, so that they are "
        f"treated as '{other}'; say it, as in dimension_numbers={{'{_pattern(unknown[0])}': "
        "optax.contrib.MuonDimensionNumbers(reduction_axis=..., output_axis=...)}, or None to "
        "leave it so",
        UserWarning,
        stacklevel=2,
    )


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Leaves out what rules inside of another one report of its leaves."""
    token = _collected.set([])
    try:
        yield
    finally:
        _collected.reset(token)


def _pattern(name: str) -> str:
    return _matrices.spellings(name)[-1]
