"""What every implementation gets: arrays in one canonical form, and the settings that are static.

An implementation is a `Route`: two functions of `Operands`. Everything that they share is decided
before them (arguments checked and brought into form, `arguments.py`) or around them
(differentiation, batching, sharding, `core.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax

from pallas_kernels._compat import Device
from pallas_kernels.attention.mask import Mask


class Operands(NamedTuple):
    """The arrays of one call. B batch, T queries, S keys, N heads, K key/value heads, N = K G."""

    query: jax.Array  # (B, T, N, d)
    key: jax.Array  # (B, S, K, d), the query's dtype
    value: jax.Array  # (B, S, K, dv), the query's dtype
    bias: jax.Array | None = None  # (B or 1, N or 1, T or 1, S or 1), floating
    sinks: jax.Array | None = None  # float32 (N,)
    mask: Mask = Mask()
    seeds: jax.Array | None = None  # int32 (B, N), of the dropout mask; see `dropout.keep`
    diagonals: jax.Array | None = None  # `wide` (B or 1, N, T + S - 1), see `diagonals_of`

    @property
    def sizes(self) -> Sizes:
        """The sizes of all axes."""
        b, t, n, d = self.query.shape
        s, k, dv = self.value.shape[1:]
        return Sizes(b, t, s, n, k, n // k, d, dv)


AXES = {
    "query": "btnd",
    "key": "bskd",
    "value": "bske",
    "bias": "bnts",
    "sinks": "n",
    "offsets": "b",
    "query_lengths": "b",
    "key_value_lengths": "b",
    "query_segment_ids": "bt",
    "key_value_segment_ids": "bs",
    "dense": "bnts",
    "starts": "b",
    "prefix_lengths": "b",
    "seeds": "bn",
    "diagonals": "bnr",
    "output": "btne",
    "lse": "bnt",
}
"""Letters of the axes of each array, as `mapped.call` reads them."""


def names_of(tree: Any) -> list[str]:
    """Returns the names of the arrays of operands, or of a dictionary of some."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [getattr(path[-1], "key", None) or path[-1].name for path, _ in leaves]


def axes_of(tree: Any) -> tuple[str, ...]:
    """Returns the letters of the axes of each array."""
    return tuple(AXES[name] for name in names_of(tree))


class Sizes(NamedTuple):
    """The axes of `Operands`."""

    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    group: int  # query heads of a key/value head
    head_dim: int
    value_dim: int


class Settings(NamedTuple):
    """What is known at trace time and hashable."""

    scale: float
    soft_cap: float | None = None
    dropout_rate: float = 0.0
    precision: Any = None
    config: Hashable = None  # block sizes of the route, None for those of the file
    interpret: Any = False  # False, True or an interpreter's parameter object

    @property
    def is_ordered(self) -> bool:
        """Whether an interpreter with parameters runs the kernels: its effects have an order."""
        return self.interpret not in (False, True)


class Gradients(NamedTuple):
    """What a backward pass returns, each in the dtype and shape of its primal."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    bias: jax.Array | None = None
    diagonals: jax.Array | None = None


class Route(NamedTuple):
    """One implementation.

    `forward(settings, operands)` returns ``(output, lse)``: the output (B, T, N, dv) in the query's
    dtype and the log-sum-exp of each row (B, N, T) in float32, natural units. A row that sees no
    key has output 0 and lse -inf; with a sink, output 0 and lse equal to the sink.

    `backward(settings, operands, lse, cotangent, delta, bias_gradient)` returns `Gradients`, with
    that of bias or diagonals, of which a call has one at most, only if `bias_gradient`.
    `cotangent` is that of the output (B, T, N, dv), in its dtype. `delta` (B, N, T) float32 is

        sum over dv of cotangent * output  -  (cotangent of lse)

    so that ds = p (dp - delta). `lse` is the forward pass's; where it is -inf, p is 0.

    `refusal(settings, operands, device)` returns why the call cannot be served, or None. Operands
    may be tracers or `jax.ShapeDtypeStruct`; under `settings.interpret` any device serves.

    `tangent(settings, operands, lse, moved)` returns ``(weighted, mass)``, how `moved`, tangents of
    query, key, value and bias by name, move each row: the sums of `tangent.py`, (B, T, N, dv) and
    (B, N, T), in float32 or wider. Only routes in plain JAX have one.

    `plain` is a route in plain JAX with a tangent, whose functions stand in for this one's where
    derivatives are differentiated; None for that of `chunked`.

    `axis_name` is the mapped axis over which the route communicates, if it does.

    `choices(operands)` returns what `--tune` tries for each kernel on the device that is compiled
    for: configs that the route accepts for these operands.
    """

    name: str
    forward: Callable[[Settings, Operands], tuple[jax.Array, jax.Array]]
    backward: Callable[
        [Settings, Operands, jax.Array, jax.Array, jax.Array, bool],
        Gradients,
    ]
    refusal: Callable[[Settings, Operands, Device], str | None]
    config_type: type | None = None  # what `Settings.config` may be
    choices: Callable[[Operands], tuple[Any, ...]] = lambda operands: ()  # of `tuning.Choice`
    tangent: Callable[[Settings, Operands, jax.Array, Any], tuple[Any, Any]] | None = None
    plain: Route | None = None
    axis_name: Hashable = None
