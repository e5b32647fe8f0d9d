r"""Gossip: each replica averages with a few others, whose news travels on from round to round.

    w_i <- mean of w_i and its neighbours' w_j
    corrected:  w <- (w - mu) sqrt(mean_j Var(w_j) / Var(w)) + mu,   mu = mean of w's entries

Boyd et al., "Randomized Gossip Algorithms", 2006; the correction is that of "Vanishing Variance
Problem in Fully Decentralized Neural-Network Systems", 2024, arXiv:2404.04616, algorithm 3.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxopt_lab import _checks, _hyperparams, _tree
from jaxopt_lab.distributed import _axes, pairing
from jaxopt_lab.distributed.local_updates import Exchange, local_updates

Graph = Literal["pairs", "ring", "torus", "exponential"]
_GRAPHS = ("pairs", "ring", "torus", "exponential")


class GossipState(NamedTuple):
    """Exchange state of gossip.

    Attributes:
      round: rounds done; int32, shape (); equal on all replicas.
    """

    round: jax.Array


def gossip_average(
    tree: Any,
    count: jax.typing.ArrayLike,
    *,
    axis_name: _axes.AxisName,
    graph: Graph = "pairs",
    shape: Sequence[int] | None = None,
    variance_corrected: bool = False,
    max_scale: _hyperparams.Scalar | None = None,
    mask: _tree.Mask = None,
    seed: int = 0,
) -> Any:
    r"""Averages each replica's arrays with its neighbours'.

    .. math::
      \bar w = \frac{1}{n} \sum_{j \in G} w_j, \qquad
      w \leftarrow \bar w + (s - 1) (\bar w - \mu), \quad
      s^2 = \frac{\frac{1}{n} \sum_{j \in G} \mathrm{Var}(w_j)}{\mathrm{Var}(\bar w)}

    The mean of n independent random models has an n-th of their variance, and its layers are too
    weak to train from. The correction (the second formula, with s = 1 where it is off) gives it
    back; equal models stay as they are. Averaging keeps the mean over all replicas, the correction
    does not. The average is computed in at least float32; arrays are sent as they are, one permute
    a leaf and neighbour, and the correction sends nothing more.

    Args:
      tree: each replica's arrays.
      count: rounds done; int, shape (), equal on all replicas. It says who the partner is.
      axis_name: the mapped axis, or a tuple of several, which count as one.
      graph: "pairs": a random partner, as in `matchings`; "ring": both neighbours; "torus": the
        neighbours along each dimension; "exponential": the replica 2^k further on, for
        k = 0, 1, ... in turn, and the exact mean after log2(N) rounds if N is a power of two.
      shape: replicas along each dimension of the torus; by default two, as equal as they can be.
      variance_corrected: corrects the variance of what `mask` selects.
      max_scale: largest s; by default sqrt(n), what n uncorrelated models need.
      mask: tree of booleans, or a function of the tree that returns one: what is corrected; by
        default leaves with two axes or more, because biases and scales of norms start equal.
      seed: of the pairs.

    Returns:
      A tree like `tree`.

    Raises:
      ValueError: an unknown graph, a `shape` that does not multiply to the number of replicas or
        without a torus, `max_scale` or `mask` without the correction, or the axis not bound.
      TypeError: arrays that are not real floating point, or `seed` no integer.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jaxopt_lab import distributed
      >>> def ring(x):
      ...     return distributed.gossip_average(x, 0, axis_name="replica", graph="ring")
      >>> jax.vmap(ring, axis_name="replica")(jnp.array([0.0, 0.0, 3.0, 0.0, 0.0]))
      Array([0., 1., 1., 1., 0.], dtype=float32)

    References:
      Boyd et al., `Randomized Gossip Algorithms <https://doi.org/10.1109/TIT.2006.874516>`_, 2006.
      `Vanishing Variance Problem in Fully Decentralized Neural-Network Systems
      <https://arxiv.org/abs/2404.04616>`_, 2024.
    """
    axis_name = _axes.canonical(axis_name)
    _check(graph, shape, variance_corrected, max_scale, mask, seed)
    _tree.check_params(tree)
    tree = jax.tree.map(jnp.asarray, tree)
    models = [tree, *_received(tree, count, axis_name, graph, shape, seed)]
    limit = math.sqrt(len(models)) if max_scale is None else max_scale
    choice = (lambda params: jax.tree.map(_is_matrix, params)) if mask is None else mask
    selected = iter(_tree.mask_leaves(choice, tree))

    def average(*leaves: jax.Array) -> jax.Array:
        compute = _tree.compute_dtype(leaves[0].dtype)
        wide = [leaf.astype(compute) for leaf in leaves]
        mean = functools.reduce(jnp.add, wide) / len(wide)
        corrected = next(selected) and variance_corrected and mean.size > 0
        return (_corrected(mean, wide, limit) if corrected else mean).astype(leaves[0].dtype)

    return jax.tree.map(average, *models)


def gossip_exchange(
    *,
    axis_name: _axes.AxisName,
    graph: Graph = "pairs",
    shape: Sequence[int] | None = None,
    variance_corrected: bool = False,
    max_scale: _hyperparams.Scalar | None = None,
    mask: _tree.Mask = None,
    seed: int = 0,
) -> Exchange:
    """Makes the exchange in which replicas average their parameters with their neighbours'.

    Args:
      axis_name: the mapped axis of the replicas, or a tuple of several.
      graph: "pairs": a random partner, as in `matchings`; "ring": both neighbours; "torus": the
        neighbours along each dimension; "exponential": the replica 2^k further on, for
        k = 0, 1, ... in turn, and the exact mean after log2(N) rounds if N is a power of two.
      shape: replicas along each dimension of the torus; by default two, as equal as they can be.
      variance_corrected: corrects the variance of what `mask` selects.
      max_scale: largest s; by default sqrt(n), what n uncorrelated models need.
      mask: tree of booleans, or a function of the tree that returns one: what is corrected; by
        default leaves with two axes or more, because biases and scales of norms start equal.
      seed: of the pairs.

    Returns:
      An `Exchange` with a `GossipState`.

    Raises:
      ValueError: an unknown graph, a `shape` without a torus, `max_scale` or `mask` without the
        correction; at finish, a `shape` that does not multiply to the number of replicas, or the
        axis not bound.
      TypeError: `axis_name` no name, or `seed` no integer; at finish, parameters that are not real
        floating point, or another state.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jaxopt_lab import distributed
      >>> exchange = distributed.gossip_exchange(axis_name="replica")
      >>> def one_round(theta):
      ...     state = exchange.init(theta)
      ...     return exchange.finish(theta, state, exchange.begin(state))[0]
      >>> jax.vmap(one_round, axis_name="replica")(jnp.array([1.0, 3.0]))
      Array([2., 2.], dtype=float32)

    See Also:
      `gossip_average` for the source.
    """
    axis_name = _axes.canonical(axis_name)
    _check(graph, shape, variance_corrected, max_scale, mask, seed)

    def init(params: optax.Params) -> GossipState:
        del params
        return GossipState(round=jnp.zeros((), jnp.int32))

    def begin(state: GossipState) -> tuple[()]:
        del state
        return ()

    def finish(
        params: optax.Params, state: GossipState, message: Any
    ) -> tuple[optax.Params, GossipState]:
        del message
        state = _tree.check_state(state, GossipState)
        mixed = gossip_average(
            params,
            state.round,
            axis_name=axis_name,
            graph=graph,
            shape=shape,
            variance_corrected=variance_corrected,
            max_scale=max_scale,
            mask=mask,
            seed=seed,
        )
        return mixed, GossipState(round=_hyperparams.increment(state.round))

    return Exchange(init, begin, finish, axis_name)


def gossip(
    inner: optax.GradientTransformation,
    sync_every: int = 1,
    *,
    axis_name: _axes.AxisName,
    graph: Graph = "pairs",
    shape: Sequence[int] | None = None,
    variance_corrected: bool = False,
    max_scale: _hyperparams.Scalar | None = None,
    mask: _tree.Mask = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Local steps with `inner`, and every `sync_every` of them an average with neighbours.

    A replica sends its parameters' bytes once a round and neighbour: one with "pairs" and
    "exponential", two on a ring, four on a torus. There are no slow weights, so that 16-bit
    parameters lose what is below their spacing.

    Args:
      inner: any optax transformation; its state is each replica's own.
      sync_every: local steps in a round.
      axis_name: the mapped axis of the replicas, or a tuple of several.
      graph: "pairs": a random partner, as in `matchings`; "ring": both neighbours; "torus": the
        neighbours along each dimension; "exponential": the replica 2^k further on, for
        k = 0, 1, ... in turn, and the exact mean after log2(N) rounds if N is a power of two.
      shape: replicas along each dimension of the torus; by default two, as equal as they can be.
      variance_corrected: corrects the variance of what `mask` selects.
      max_scale: largest s; by default sqrt(n), what n uncorrelated models need.
      mask: tree of booleans, or a function of the tree that returns one: what is corrected; by
        default leaves with two axes or more, because biases and scales of norms start equal.
      seed: of the pairs.

    Returns:
      A `GradientTransformationExtraArgs` with a `LocalUpdatesState`; its update needs `params`,
      and each replica's own gradient.

    Raises:
      ValueError: `sync_every` below 1, an unknown graph, a `shape` that does not multiply to the
        number of replicas or without a torus, `max_scale` or `mask` without the correction; at
        update, `params` missing, the axis not bound, gradients that do not match or that `jax.grad`
        has already summed (see `vary`).
      TypeError: `inner` no transformation, `axis_name` no name, or `seed` no integer; parameters or
        gradients that are not real floating point, or a state of another transformation.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jaxopt_lab import distributed
      >>> tx = distributed.gossip(optax.sgd(1.0), axis_name="replica", graph="ring")
      >>> def step(gradient):
      ...     params = jnp.zeros(())
      ...     updates, _ = tx.update(gradient, tx.init(params), params)
      ...     return optax.apply_updates(params, updates)
      >>> jax.vmap(step, axis_name="replica")(jnp.array([0.0, 0.0, 3.0, 0.0]))
      Array([ 0., -1., -1., -1.], dtype=float32)

    See Also:
      `local_updates` for how steps and exchanges alternate, `gossip_average` for the source.
    """
    exchange = gossip_exchange(
        axis_name=axis_name,
        graph=graph,
        shape=shape,
        variance_corrected=variance_corrected,
        max_scale=max_scale,
        mask=mask,
        seed=seed,
    )
    return local_updates(inner, exchange, sync_every)


def _received(
    tree: Any, count: Any, axis_name: _axes.AxisName, graph: Graph, shape: Any, seed: int
) -> list[Any]:
    """Returns the neighbours' trees."""
    replicas = _axes.size(axis_name)
    if graph == "pairs":
        return [pairing.receive_from_random(tree, count, axis_name, seed)]
    if graph == "exponential":
        table = pairing.exponential(replicas)
        return [pairing.exchange_with(tree, count % len(table), table, axis_name)]
    if graph == "ring":
        shape = (replicas,)
    elif shape is None:
        shape = pairing.most_square(replicas)
    if math.prod(shape) != replicas:
        raise ValueError(
            f"shape must multiply to the {replicas} replicas of axis {axis_name!r}, got "
            f"{tuple(shape)}"
        )
    return [pairing.receive(tree, row, axis_name) for row in pairing.torus(shape)]


def _corrected(mean: jax.Array, models: list[jax.Array], max_scale: Any) -> jax.Array:
    before = functools.reduce(jnp.add, [jnp.var(model) for model in models]) / len(models)
    # Where all models are constant there is nothing to restore, and the ratio would be 0/0.
    before = jnp.where(before > 0, before, 1)
    scale = jnp.sqrt(before / jnp.maximum(jnp.var(mean), before / max_scale**2))
    # This form, because at a scale of 1 it leaves every bit as it is.
    return mean + (scale - 1) * (mean - jnp.mean(mean))


def _is_matrix(leaf: Any) -> bool:
    return jnp.ndim(leaf) >= 2


def _check(
    graph: Graph,
    shape: Any,
    variance_corrected: bool,
    max_scale: Any,
    mask: Any,
    seed: Any,
) -> None:
    if graph not in _GRAPHS:
        raise ValueError(f"graph must be one of {_GRAPHS}, got {graph!r}")
    if shape is not None and graph != "torus":
        raise ValueError(f"shape is that of a torus, but graph is {graph!r}")
    if shape is not None:
        pairing.torus(shape)
    _checks.check_flag(variance_corrected=variance_corrected)
    _checks.check_per_leaf(mask=mask)
    if not variance_corrected and (max_scale is not None or mask is not None):
        raise ValueError("max_scale and mask are those of variance_corrected, which is False")
    if max_scale is not None:
        _checks.check_scalar(max_scale=max_scale)
        if _checks.is_number(max_scale) and not max_scale >= 1:
            raise ValueError(f"max_scale must be at least 1, got {max_scale}")
    _checks.check_seed(seed)
