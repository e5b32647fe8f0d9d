r"""IST: a few layers are trained in each step, drawn by how much the loss seems to need them.

    train l with weight sigmoid(-c_l);    every `probe_every` steps, for damped sets S_k of layers:
    rho_k = exp(-loss_k) - mean_j exp(-loss_j),    c_l += lr rho_k p_l (1 - p_l) for l in S_k

with p = sigmoid(c). Yao et al., "Layer-wise Importance Matters: Less Memory for Better Performance
in Parameter-efficient Fine-tuning of Large Language Models", Findings of EMNLP 2024,
arXiv:2410.11772, section 3.3 and algorithm 1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxopt_lab import _checks, _compat, _hyperparams, _tree

# What of a layer's adapter is damped by a probe: one factor of each product.
_DAMPED = ("lora_b", "miss_block")


class IstState(NamedTuple):
    """State of `ist`.

    Attributes:
      count: steps taken; int32, shape ().
      key: random key.
      scores: c, how unimportant each layer seems; float32, shape (layers,).
      inner: state of each layer, then of what is in no layer.
    """

    count: jax.Array
    key: jax.Array
    scores: jax.Array
    inner: tuple[optax.OptState, ...]


def ist(
    inner: optax.GradientTransformation,
    layers: str = r"(?:.*/)?(?:layers|blocks|h)[/_](\d+)(?:/.*)?",
    *,
    trained: float = 0.25,
    damped: float = 0.5,
    damping: float = 0.25,
    probes: int = 3,
    probe_every: int = 10,
    score_learning_rate: _hyperparams.Scalar = 10.0,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Trains a random fourth of the layers in each step, the important ones more often.

    .. math::
      \rho_k = e^{-\ell_k} - \tfrac{1}{K} {\textstyle \sum_j e^{-\ell_j}}, \quad
      c_l \leftarrow c_l + \eta\, \rho_k\, p_l (1 - p_l) \text{ for } l \in S_k, \quad
      p = \sigma(c)

    where :math:`\ell_k` is the loss with the adapters of the layers :math:`S_k` damped. A set whose
    damping costs little makes its layers less important. Layers are drawn without replacement,
    those to train with weights :math:`\sigma(-c)`, those to damp with :math:`\sigma(c)`. A layer
    that is not trained has updates of zero, and nothing of its optimizer state changes, neither
    moments nor counters; its part of `inner` is in a `jax.lax.cond`. The choice is data: nothing is
    compiled again. Gradients are computed for all layers. Leaves that are trained whole go with
    their layer; a probe leaves them as they are, as they have no part that could be damped.

    Args:
      inner: transformation of the adapters; each layer has an instance of its own.
      layers: regular expression for the whole path of a parameter; its first group is the layer.
        What does not match is always trained.
      trained: fraction of the layers trained in each step, rounded down, at least one.
      damped: fraction of the layers damped by each probe, rounded down, at least one.
      damping: factor of a damped layer's adapter.
      probes: K, number of losses of a probe.
      probe_every: number of steps between probes; there is none at the first step.
      score_learning_rate: :math:`\eta`.
      seed: of the draws.

    Returns:
      A transformation whose update needs `params` and, as in `optax.lbfgs`, `value_fn`: a function
      of the adapters that returns the loss of one batch, evaluated K times at each probe.

    Raises:
      ValueError: a number out of range; at init, no layers, or too few for K different sets.
      TypeError: at update, no `value_fn`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jaxopt_lab import adapters
      >>> params = {"layers": {str(i): {"lora_b": jnp.zeros(2)} for i in range(8)}}
      >>> tx = adapters.ist(optax.adam(1e-3))
      >>> grads = jax.tree.map(jnp.ones_like, params)
      >>> loss = lambda params: jnp.float32(0)
      >>> updates, state = tx.update(grads, tx.init(params), params, value_fn=loss)
      >>> sum(int(jnp.any(u != 0)) for u in jax.tree.leaves(updates))
      2

    References:
      Yao et al., `IST <https://arxiv.org/abs/2410.11772>`_, Findings of EMNLP 2024, algorithm 1.
    """
    _checks.check_transformation(inner=inner)
    if not isinstance(layers, str):
        raise TypeError(f"layers must be a regular expression, got {layers!r}")
    for name, value in {"trained": trained, "damped": damped, "damping": damping}.items():
        _checks.check_fraction(**{name: value})
    _checks.check_positive_integer(probes=probes, probe_every=probe_every)
    _checks.check_positive(score_learning_rate=score_learning_rate)
    _checks.check_seed(seed)
    rule = optax.with_extra_args_support(inner)

    def init_fn(params: optax.Params) -> IstState:
        members = _members(params, layers)
        count = len(members) - 1
        if not count:
            name = next((n for n, _ in _tree.leaves_with_names(params)), "none")
            raise ValueError(f"layers={layers!r} matches no parameter, such as '{name}'")
        if math.comb(count, _share(damped, count)) < probes:
            raise ValueError(
                f"{count} layers have fewer than probes={probes} different sets of "
                f"{_share(damped, count)}"
            )
        states = tuple(rule.init(_part(params, own)) for own in members)
        scores = jnp.zeros(count, jnp.float32)
        return IstState(jnp.zeros((), jnp.int32), jax.random.key(seed), scores, states)

    def probed(
        scores: jax.Array, key: jax.Array, params: Any, value_fn: Callable[[Any], jax.Array]
    ) -> jax.Array:
        members = _members(params, layers)
        size = _share(damped, len(scores))
        sets = _distinct(key, jax.nn.log_sigmoid(scores), size, probes)

        def loss(chosen: jax.Array) -> jax.Array:
            return value_fn(_damp(params, members, jnp.where(chosen, damping, 1.0)))

        rewards = jnp.exp(-jax.lax.map(loss, sets).astype(jnp.float32))
        rewards = rewards - jnp.mean(rewards)
        p = jax.nn.sigmoid(scores)
        return scores + score_learning_rate * (rewards @ sets) * p * (1 - p)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        value_fn: Callable[[Any], jax.Array] | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, IstState]:
        state = _tree.check_state(state, IstState)
        params = _tree.require_params(params, "ist")
        if value_fn is None:
            raise TypeError("ist needs value_fn: call update(..., value_fn=loss_of_the_adapters)")
        _tree.check_updates(updates, params, "params")
        members = _members(updates, layers)
        key, for_probe, for_layers = jax.random.split(state.key, 3)
        due = (state.count > 0) & (state.count % probe_every == 0)
        scores = _compat.cond(
            due,
            lambda: probed(state.scores, for_probe, params, value_fn),
            lambda: state.scores,
        )
        count = _share(trained, len(scores))
        chosen = _draw(for_layers, jax.nn.log_sigmoid(-scores), count)
        leaves, structure = jax.tree.flatten(updates)
        states = []
        for index, (own, old) in enumerate(zip(members, state.inner)):
            part, values = _part(updates, own), _part(params, own)

            def train(part: Any = part, old: Any = old, values: Any = values) -> Any:
                return rule.update(part, old, values, **extra)

            def rest(part: Any = part, old: Any = old) -> Any:
                return jax.tree.map(jnp.zeros_like, part), old

            in_a_layer = index < len(scores)
            new, kept = _compat.cond(chosen[index] > 0, train, rest) if in_a_layer else train()
            states.append(kept)
            for place, leaf in zip(own, jax.tree.leaves(new)):
                leaves[place] = leaf
        count = _hyperparams.increment(state.count)
        return jax.tree.unflatten(structure, leaves), IstState(count, key, scores, tuple(states))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _members(params: Any, layers: str) -> list[list[int]]:
    """Returns the places of the leaves of each layer, in order, then of what is in no layer."""
    groups: dict[str, list[int]] = {}
    others = []
    for place, (name, _) in enumerate(_tree.leaves_with_names(params)):
        match = re.fullmatch(layers, name)
        if match is None:
            others.append(place)
        else:
            groups.setdefault(match.group(1), []).append(place)
    order = sorted(groups, key=lambda name: (len(name), name))
    return [*(groups[name] for name in order), others]


def _part(tree: Any, own: list[int]) -> Any:
    """Returns the tree with masks in place of all other leaves."""
    leaves, structure = jax.tree.flatten(tree)
    kept = set(own)
    masked = [x if i in kept else optax.MaskedNode() for i, x in enumerate(leaves)]
    return jax.tree.unflatten(structure, masked)


def _damp(params: Any, members: list[list[int]], factors: jax.Array) -> Any:
    """Scales the adapters of each layer by its factor."""
    flat, structure = jax.tree_util.tree_flatten_with_path(params)
    leaves = [leaf for _, leaf in flat]
    for layer, own in enumerate(members[:-1]):
        for place in own:
            if jax.tree_util.keystr(flat[place][0][-1:], simple=True) in _DAMPED:
                leaves[place] = leaves[place] * factors[layer].astype(leaves[place].dtype)
    return jax.tree.unflatten(structure, leaves)


def _share(fraction: float, count: int) -> int:
    return max(int(fraction * count), 1)


def _draw(key: jax.Array, log_weights: jax.Array, size: int) -> jax.Array:
    """Draws `size` without replacement, one after the other by weight; 1 for those drawn."""
    # The largest sums of log-weights and Gumbel noise have that distribution.
    noise = jax.random.gumbel(key, log_weights.shape, log_weights.dtype)
    _, drawn = jax.lax.top_k(log_weights + noise, size)
    return jnp.zeros_like(log_weights).at[drawn].set(1)


def _distinct(key: jax.Array, log_weights: jax.Array, size: int, count: int) -> jax.Array:
    """Draws `count` different sets, (count, layers), drawing again what is there already."""
    sets: list[jax.Array] = []
    for index in range(count):
        earlier = list(sets)

        def again(state: tuple[jax.Array, jax.Array], earlier: list[jax.Array] = earlier) -> Any:
            equal = [jnp.all(one == state[1]) for one in (*earlier, jnp.zeros_like(log_weights))]
            return jnp.any(jnp.stack(equal))

        def draw(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            key, own = jax.random.split(state[0])
            return key, _draw(own, log_weights, size)

        start = jax.random.fold_in(key, index), jnp.zeros_like(log_weights)
        sets.append(_compat.while_loop(again, draw, start)[1])
    return jnp.stack(sets)
