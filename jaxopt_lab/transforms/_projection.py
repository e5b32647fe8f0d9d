r"""The projection that AdamP and SGDP share (Heo et al., 2021, Algorithms 1 and 2).

A weight whose loss does not change with its length has gradients at right angles to it, and a
momentum step with a radial part only makes it longer. For the *channel* view (one vector an
output) and then the *layer* view (the whole matrix as one vector), of dimension D:

    if max_i |<g_i, theta_i>| / (|g_i| |theta_i|) < delta / sqrt(D):
        p_i <- p_i - theta_i <theta_i, p_i> / |theta_i|^2, and weight decay is scaled by wd_ratio
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxopt_lab import _compat, _hyperparams, _matrices, _roles, _tree

# Leaves whose sums are treated together.
_AT_ONCE = 8


def channel_axes(role: _roles.Role) -> _matrices.MatrixAxes | None:
    """Default axes: those of a matrix, a channel for each output; of a table, for each row.

    A row of a table of embeddings is what the authors' code, which takes the first axis of all
    that has two, calls its channel.
    """
    if role.kind == "embedding" and role.axes is not None:
        batch, reduction, output = role.axes
        return _matrices.MatrixAxes(batch, output, reduction)
    return role.axes


class Radial(NamedTuple):
    """What to take out of a direction where the weights look scale-invariant."""

    factor: jax.Array  # of the weights in the radial part, or zero; broadcasts to the parameter
    projects: jax.Array  # whether it is taken out, one boolean a matrix; broadcasts likewise


def channel_sums(
    p: jax.Array, g: jax.Array, theta: jax.Array, axes: _matrices.MatrixAxes
) -> tuple[jax.Array, ...]:
    """Returns the sums over each channel of which `radial_parts` makes the cosines.

    Those of gradient times weights, of both squares, and of weights times direction.
    """
    return tuple(_sum(x, axes.reduction) for x in (g * theta, g * g, theta * theta, theta * p))


def radial_parts(
    sums: Sequence[tuple[jax.Array, ...]],
    shapes: Sequence[tuple[int, ...]],
    axes: Sequence[_matrices.MatrixAxes | None],
    *,
    delta: _hyperparams.Scalar,
    eps: _hyperparams.Scalar,
) -> list[Radial | None]:
    """Returns the radial part of each leaf from its sums, None for a leaf that has none.

    These are small arrays, and those of equal leaves are treated as one: a program has a handful of
    kernels for many leaves, and not a dozen for each.
    """

    def part(sums: jax.Array, shape: tuple[int, ...], axes: _matrices.MatrixAxes) -> Radial:
        """Of sums (leaves, 4, *channels): one kernel for both views where it can be one."""
        fan_in = math.prod(shape[a] for a in axes.reduction)
        fan_out = math.prod(shape[a] for a in axes.output)
        outputs = tuple(a + 1 for a in axes.output)

        def view(sums: jax.Array, dimension: int) -> tuple[jax.Array, jax.Array]:
            g_theta, g_g, theta_theta, theta_p = (sums[:, i] for i in range(4))
            length = _hyperparams.sqrt(theta_theta)
            cosine = jnp.abs(g_theta) / (
                jnp.maximum(_hyperparams.sqrt(g_g), eps) * jnp.maximum(length, eps)
            )
            fires = jnp.max(cosine, outputs, keepdims=True) < delta / math.sqrt(dimension)
            return fires, theta_p / jnp.square(length + eps)

        per_layer = jnp.sum(sums, tuple(a + 1 for a in outputs), keepdims=True)
        channel_fires, channel_radial = view(sums, fan_in)
        layer_fires, layer_radial = view(per_layer, fan_in * fan_out)
        radial = jnp.where(channel_fires, channel_radial, jnp.where(layer_fires, layer_radial, 0))
        return Radial(radial, channel_fires | layer_fires)

    groups: dict[Any, list[int]] = defaultdict(list)
    for index, (found, shape, of) in enumerate(zip(sums, shapes, axes)):
        if found:
            groups[shape, of, _compat.type_of(found[0])].append(index)
    results: list[Radial | None] = [None] * len(sums)
    for (shape, of, _), alike in groups.items():
        # As many at once each time, where that is possible, as XLA translates equal kernels once:
        # that of a leaf depends on the number and on its place among them.
        at_once = math.ceil(len(alike) / math.ceil(len(alike) / _AT_ONCE))
        for first in range(0, len(alike), at_once):
            members = alike[first : first + at_once]
            stacked = jnp.stack([x for index in members for x in sums[index]])
            stacked = stacked.reshape(len(members), -1, *stacked.shape[1:])
            # Behind the barriers XLA neither merges the sums over a layer into the large ones nor
            # repeats what is small in the kernel of each leaf.
            stacked = jax.lax.optimization_barrier(stacked)
            parts = jax.lax.optimization_barrier(part(stacked, shape, of))
            for place, index in enumerate(members):
                results[index] = jax.tree.map(lambda x, place=place: x[place], parts)
    return results


def map_projected(
    sums: Callable[..., tuple[Any, ...]],
    rule: Callable[..., tuple[jax.Array, ...]],
    updates: optax.Updates,
    *states: Any,
    params: Any,
    static: Sequence[tuple[_matrices.MatrixAxes | None, bool]],
    shared: Callable[[Any], Any],
    delta: _hyperparams.Scalar,
    eps: _hyperparams.Scalar,
) -> tuple[Any, ...]:
    """Maps a rule that projects over the leaves: first what each sums, then what each does.

    Args:
      sums: as a rule of `_tree.map_leaves`, with `channel_sums` or () after its results.
      rule: the rule, with a `Radial` or None after its static argument.
      updates: the gradients.
      *states: trees with the parameters' structure and shapes.
      params: the parameters.
      static: the axes, and whether a leaf decays.
      shared: as for `_tree.map_leaves`.
      delta: threshold of the cosine, times the root of the vector's dimension.
      eps: added to the norms.

    Returns:
      As `_tree.map_leaves` of the rule.
    """
    leaves: dict[str, Any] = {"params": params, "static": static, "shared": shared}
    *_, found = _tree.map_leaves(sums, updates, *states, **leaves)
    structure = jax.tree.structure(updates)
    radial = radial_parts(
        structure.flatten_up_to(found) if structure.num_leaves else [],
        [jnp.shape(leaf) for leaf in jax.tree.leaves(params)],
        [axes for axes, _ in static],
        delta=delta,
        eps=eps,
    )
    return _tree.map_leaves(rule, updates, *states, extra=radial, **leaves)


def apart(
    direction: Callable[..., tuple[jax.Array, ...]],
    p: jax.Array,
    theta: jax.Array,
    g: jax.Array,
    *state: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the operands of `channel_sums`: direction, gradient and weights.

    On accelerators the direction is computed a second time, inside the sums: behind the barrier XLA
    does not see that it is `p`, which it would write to memory because two kernels want it. On a
    CPU a root or a quotient inside a column sum is not vectorised, and `p` is better written once.
    """

    def again(_: jax.Array, *inputs: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        theta, g, *state = jax.lax.optimization_barrier(inputs)
        return direction(g, *state)[0], g, theta

    def as_it_is(p: jax.Array, theta: jax.Array, g: jax.Array, *_: jax.Array) -> Any:
        return p, g, theta

    return _compat.platform_dependent(p, theta, g, *state, cpu=as_it_is, default=again)


def _sum(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Sums over `axes`, which stay with length 1; on accelerators in two stages.

    XLA would merge the stages into one pass with a kernel for each column; the barrier, on what is
    small by then, prevents it. A CPU's library sums the columns well as they are.
    """

    def at_once(x: jax.Array) -> jax.Array:
        return jnp.sum(x, axes, keepdims=True)

    def in_two_stages(x: jax.Array) -> jax.Array:
        longest = max(axes, key=lambda axis: x.shape[axis])
        length = x.shape[longest]
        rows = math.gcd(length, 16)
        blocks = x.reshape(*x.shape[:longest], length // rows, rows, *x.shape[longest + 1 :])
        return jnp.sum(
            jax.lax.optimization_barrier(jnp.sum(blocks, longest + 1)), axes, keepdims=True
        )

    return _compat.platform_dependent(x, cpu=at_once, default=in_two_stages)
