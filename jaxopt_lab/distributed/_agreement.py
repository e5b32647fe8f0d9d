"""What replicas decide each for itself, and what waits for it: found before a program runs.

A collective in a branch that some replicas do not take waits for ever on devices, and in a
simulation, where both branches run, gives something else. So does a counter that all replicas
share and that one of them does not count. A value is here a replica's own if it depends on data,
parameters or state that are; a reduction over all replicas makes one that they agree on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.core import Tracer

from jaxopt_lab import _compat, _tree
from jaxopt_lab.distributed import _axes, _stacked

_REDUCTIONS = {
    "psum", "psum_invariant", "pmax", "pmin", "all_gather", "all_gather_invariant"
}  # fmt: skip
_EXCHANGES = _REDUCTIONS | {"reduce_scatter", "all_to_all", "ppermute"}
# Wrappers that decide by each replica's own values, and what to use in their place.
_REMEDIES = {
    "optax.ApplyIfFiniteState": "optax.apply_if_finite stands around it: use "
    "jaxopt_lab.distributed.apply_if_finite(inner, axis_name, ...), with which they agree, or put "
    "optax's behind the exchange",
    "optax.MultiStepsState": "optax.MultiSteps with a should_skip_update_fn stands around it: put "
    "jaxopt_lab.distributed.apply_if_finite around it instead",
    "optax.ConditionallyTransformState": "optax.conditionally_transform stands around it: let its "
    "should_transform_fn depend on the step alone",
    "optax.ScaleByZoomLinesearchState": "a line search of optax exchanges in each of its turns: "
    "use it inside diloco or another of the local updates, or a learning rate without a search",
    "optax.ScaleByBacktrackingLinesearchState": "a line search of optax exchanges in each of its "
    "turns: use it inside diloco or another of the local updates, or a learning rate without one",
    "optax.ConditionallyMaskState": "optax.conditionally_mask stands around it: let its "
    "should_transform_fn depend on the step alone",
}


def check(
    fn: Callable[..., tuple[Any, Any]],
    args: Sequence[Any],
    shared: Sequence[Any],
    axis_name: _axes.AxisName,
    state: Any,
) -> list[bool]:
    """Refuses an update in which replicas could wait for each other, or miscount.

    Args:
      fn: `fn(*args) -> (updates, state)` of one replica, whose axis is bound.
      args: its arguments, arrays or shapes.
      shared: for each argument, whether it is equal on all replicas: booleans, a prefix of it.
      axis_name: the mapped axis.
      state: the state among the arguments.

    Returns:
      For each argument, whether `fn` makes use of it.

    Raises:
      ValueError: a collective in a branch that replicas choose each for itself, or a counter that
        would differ between them; the message says what stands around it.
    """
    shapes = jax.tree.map(jax.ShapeDtypeStruct.like, list(args))
    traced, out = jax.make_jaxpr(fn, return_shape=True)(*shapes)
    own = [not flag for flags, arg in zip(shared, args)
           for flag in _tree.broadcast_prefix(flags, arg, "argument")]  # fmt: skip
    consts = [isinstance(x, Tracer) for x in traced.consts]
    results = _Walk(frozenset(_axes.names(axis_name)), state).run(traced.jaxpr, consts + own)
    new = results[len(results) - len(jax.tree.leaves(out[1])) :]
    flags = _tree.broadcast_prefix(_stacked.shared_counters(out[1]), out[1], "state")
    for (name, _), flag, differs in zip(_tree.leaves_with_names(out[1]), flags, new):
        if flag and differs:
            raise ValueError(
                f"the counter '{name}', which all replicas share, would depend on values of each "
                f"replica's own; {_remedy(state)}"
            )
    read = {id(v) for eqn in traced.jaxpr.eqns for v in eqn.invars}
    read |= {id(v) for v in traced.jaxpr.outvars}
    used, start = [], 0
    for arg in args:
        stop = start + len(jax.tree.leaves(arg))
        used.append(any(id(v) in read for v in traced.jaxpr.invars[start:stop]))
        start = stop
    return used


class _Walk:
    """Follows through a program which values are each replica's own."""

    def __init__(self, axes: frozenset[Any], state: Any):
        self.axes, self.state = axes, state

    def run(self, jaxpr: Any, own: Sequence[bool]) -> list[bool]:
        """Returns which results are, given which constants and arguments are."""
        known = dict(zip(map(id, [*jaxpr.constvars, *jaxpr.invars]), own, strict=True))
        for eqn in jaxpr.eqns:
            found = self._equation(eqn, [known.get(id(v), False) for v in eqn.invars])
            known.update(zip(map(id, eqn.outvars), found))
        return [known.get(id(v), False) for v in jaxpr.outvars]

    def _equation(self, eqn: Any, own: list[bool]) -> list[bool]:
        name, params = eqn.primitive.name, eqn.params
        if name == "cond":
            branches = [b.jaxpr for b in params["branches"]]
            if own[0] and any(map(self._exchanges, branches)):
                self._refuse()
            columns = zip(*(self.run(b, own[1:]) for b in branches))
            return [own[0] or any(column) for column in columns]
        if name == "while":
            return self._while(params, own)
        if name == "scan":
            consts, carry = _compat.scan_sizes(params)
            body = params["jaxpr"].jaxpr
            return self._until_stable(
                lambda now: self.run(body, [*own[:consts], *now, *own[consts + carry :]]),
                own[consts : consts + carry],
            )
        if name == "axis_index":
            return [params["axis_name"] in self.axes]
        if name in _REDUCTIONS and self.axes <= _axes_of(params):
            return [False] * len(eqn.outvars)
        inner = [one for one in map(_jaxpr, params.values()) if one is not None]
        if len(inner) == 1 and len(inner[0].invars) == len(own) and not inner[0].constvars:
            return self.run(inner[0], own)
        if any(own) and any(map(self._exchanges, inner)) and len(inner) > 1:
            self._refuse()
        return [any(own)] * len(eqn.outvars)

    def _while(self, params: Any, own: list[bool]) -> list[bool]:
        condition, body = params["cond_jaxpr"].jaxpr, params["body_jaxpr"].jaxpr
        first, second = params["cond_nconsts"], params["body_nconsts"]
        consts = own[:first], own[first : first + second]

        def turn(now: list[bool]) -> list[bool]:
            (goes_on,) = self.run(condition, [*consts[0], *now])
            if goes_on and (self._exchanges(body) or self._exchanges(condition)):
                self._refuse()
            return [goes_on or x for x in self.run(body, [*consts[1], *now])]

        return self._until_stable(turn, own[first + second :])

    def _until_stable(
        self, turn: Callable[[list[bool]], list[bool]], now: list[bool]
    ) -> list[bool]:
        while True:
            after = turn(now)
            carry = [a or b for a, b in zip(now, after)]
            if carry == now:
                return [*carry, *after[len(carry) :]]
            now = carry

    def _exchanges(self, jaxpr: Any) -> bool:
        """Whether a collective over one of the axes stands anywhere inside."""
        for eqn in jaxpr.eqns:
            if eqn.primitive.name in _EXCHANGES and self.axes & _axes_of(eqn.params):
                return True
            for value in eqn.params.values():
                several = value if isinstance(value, (tuple, list)) else (value,)
                if any(self._exchanges(j) for j in map(_jaxpr, several) if j is not None):
                    return True
        return False

    def _refuse(self) -> None:
        raise ValueError(
            "replicas exchange in a branch that each of them chooses by values of its own, where "
            f"some would wait for others that do not come; {_remedy(self.state)}"
        )


def _axes_of(params: Any) -> frozenset[Any]:
    found = params["axes"] if "axes" in params else params.get("axis_name", ())
    return frozenset(found if isinstance(found, tuple) else (found,))


def _jaxpr(value: Any) -> Any:
    value = getattr(value, "jaxpr", value)
    return value if hasattr(value, "eqns") else None


def _remedy(state: Any) -> str:
    found: list[str] = []

    def look(node: Any) -> bool:
        kind = type(node)
        name = f"{kind.__module__.partition('.')[0]}.{kind.__name__}"
        if name in _REMEDIES and _REMEDIES[name] not in found:
            found.append(_REMEDIES[name])
        return False

    jax.tree.flatten(state, is_leaf=look)
    return "; ".join(found) or "let them agree by a reduction before they branch"
