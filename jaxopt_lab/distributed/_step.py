"""One step of one replica: gradient, update, and what an update may ask for beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxopt_lab import _checks, _tree
from jaxopt_lab.distributed import _agreement, _axes, _stacked, _weights
from jaxopt_lab.distributed.local_updates import LocalUpdatesState

Loss = Callable[..., Any]


def make(
    loss: Loss,
    tx: optax.GradientTransformation,
    axis_name: _axes.AxisName,
    *,
    has_aux: bool,
    weight: Callable[[Any], Any] | None,
    is_local: bool = False,
) -> Callable[[Any, Any, Any, Any], tuple[Any, Any, Any, Any]]:
    """Returns `step(params, opt_state, mutable, batch) -> (params, opt_state, mutable, losses)`.

    Args:
      loss: `loss(params, batch)`, or `loss(params, mutable, batch)` where there is `mutable`.
      tx: the transformation.
      axis_name: the mapped axis.
      has_aux: whether `loss` returns something beside the loss.
      weight: a function of the batch, or None.
      is_local: whether replicas step on their own, whatever the state says.

    Raises:
      TypeError: `loss` or `weight` is no function, `tx` no transformation.
    """
    for name, fn in {"loss": loss, "weight": weight}.items():
        if not callable(fn) and not (name == "weight" and fn is None):
            raise TypeError(f"{name} must be a function, got {type(fn).__name__}")
    _checks.check_transformation(tx=tx)
    update = optax.with_extra_args_support(tx).update

    def step(params: Any, opt_state: Any, mutable: Any, batch: Any) -> tuple[Any, Any, Any, Any]:
        def of(params: Any) -> tuple[jax.Array, tuple[Any, Any]]:
            """Returns the loss, the new mutable collections and what is beside the loss."""
            if mutable is None:
                found = loss(params, batch)
                value, aux = found if has_aux else (found, None)
                return value, (None, aux)
            # New containers: NNX lets only those be changed that were made in this trace.
            value, rest = loss(params, jax.tree.map(lambda x: x, mutable), batch)
            return value, rest if has_aux else (rest, None)

        (own_value, (new_mutable, aux)), grads = jax.value_and_grad(of, has_aux=True)(params)
        new_mutable = _like(mutable, new_mutable)
        alone = is_local or _steps_alone(opt_state)
        own_weight = None if weight is None else weight(batch)
        if own_weight is not None:
            if alone:
                raise ValueError(
                    "weight is that of a mean over replicas in each step, but replicas step on "
                    "their own between exchanges of their weights"
                )
            grads = _weights.for_mean(grads, own_weight, axis_name)

        def mean(tree: Any) -> Any:
            if alone:
                return tree
            if own_weight is None:
                return _axes.pmean(tree, axis_name)
            parts = _weights.weighted(tree, own_weight, axis_name)
            return jax.tree.map(lambda x: _axes.psum(x, axis_name), parts)

        def value_fn(params: Any) -> jax.Array:
            return mean(of(params)[0])

        def updated(state: Any, grads: Any, params: Any, value: Any, grad: Any) -> Any:
            return update(grads, state, params, value=value, grad=grad, value_fn=value_fn)

        # The mean gradient stands here for its shape; it is made only for who asks for it.
        args = opt_state, grads, params, own_value, grads
        shared = _stacked.shared_counters(opt_state), False, False, alone is False, alone is False
        *_, asks_value, asks_grad = _agreement.check(updated, args, shared, axis_name, opt_state)
        updates, opt_state = updated(
            opt_state,
            grads,
            params,
            mean(own_value) if asks_value else own_value,
            _axes.pmean(grads, axis_name) if asks_grad and not alone else grads,
        )
        params = optax.apply_updates(params, updates)
        return params, opt_state, new_mutable, (own_value, aux) if has_aux else own_value

    return step


def _steps_alone(state: Any) -> bool:
    """Whether replicas exchange their weights, and no gradients."""
    found: list[Any] = []

    def look(node: Any) -> bool:
        found.append(isinstance(node, LocalUpdatesState))
        return found[-1]

    jax.tree.flatten(state, is_leaf=look)
    return any(found)


def _like(old: Any, new: Any) -> Any:
    """Returns `new`, which has to be what `old` is.

    Raises:
      ValueError: another tree or shape; the message has the first differing path.
    """
    if old is not None:
        _tree.check_updates(new, old, "mutable, which loss has to return as it was given")
    return jax.tree.map(lambda o, n: jnp.asarray(n, jnp.result_type(o)), old, new)
