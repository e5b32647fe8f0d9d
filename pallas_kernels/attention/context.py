"""Context parallelism: attention over a sequence whose slices lie on several devices."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import _options
from pallas_kernels._compat import vary, varying_axes, with_axis
from pallas_kernels.attention import arguments, core, integers, layouts, routes
from pallas_kernels.attention.gather import gather
from pallas_kernels.attention.layouts import LAYOUTS
from pallas_kernels.attention.mask import Mask
from pallas_kernels.attention.parts import key_positions
from pallas_kernels.attention.placement import explicit_sharding, size_of_axis
from pallas_kernels.attention.position_bias import Rule, check_rule
from pallas_kernels.attention.problem import Gradients, Operands, Route, Settings
from pallas_kernels.attention.ring import Axis, ring

METHODS = ("ring", "gather", "all_to_all")


def shard_sequence_order(
    length: int, axis_size: int, layout: str = "zigzag"
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the order in which to lay out a sequence before it is split over devices.

    Of ``x[order]`` every device gets an equal slice, device 0 the first:

    * ``"zigzag"``: of 2 n chunks, device i has number i and number 2 n - 1 - i. Under a causal mask
      all devices have equal work in every step of a ring.
    * ``"striped"``: device i has the positions i, i + n, i + 2 n, ...
    * ``"contiguous"``: device i has the i-th of n chunks, and the order is the natural one.

    Everything that has a position must be laid out alike: tokens, targets, segment ids, and the
    positions that a rotary embedding is given.

    Args:
      length: Length of the whole sequence.
      axis_size: Number n of devices.
      layout: ``"zigzag"``, ``"contiguous"`` or ``"striped"``.

    Returns:
      Two permutations, int32 (length,): `order`, and its inverse, with
      ``x[order][inverse] == x``.

    Raises:
      ValueError: `length` does not split into n equal slices (for ``"zigzag"`` 2 n equal chunks),
        or `layout` is not known.

    Example:
      >>> order, inverse = shard_sequence_order(12, 2)
      >>> order.reshape(2, 6).tolist()  # the positions of each device
      [[0, 1, 2, 9, 10, 11], [3, 4, 5, 6, 7, 8]]
      >>> order[inverse].tolist()
      [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    """
    _check_choice("layout", layout, LAYOUTS)
    length, axis_size = _options.index("length", length), _options.index("axis_size", axis_size)
    if axis_size < 1:
        raise ValueError(f"axis_size={axis_size}; expected at least 1")
    parts = axis_size * layouts.runs_of(layout)
    if length < 0 or length % parts:
        raise ValueError(
            f"length={length} does not divide into {parts} equal parts; expected a multiple of "
            f"{parts} for layout={layout!r} and axis_size={axis_size}"
        )
    order = layouts.positions(layout, axis_size, length // axis_size).ravel().astype(np.int32)
    return order, np.argsort(order).astype(np.int32)


def ring_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    axis_name: Hashable,
    layout: str = "zigzag",
    method: str = "ring",
    bias: Rule | None = None,
    mask: jax.Array | None = None,
    key_value_seq_lengths: int | jax.Array | Sequence[int] | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    local_window_size: int | tuple[int | None, int | None] | None = None,
    logits_soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    query_segment_ids: jax.Array | None = None,
    key_value_segment_ids: jax.Array | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: jax.Array | None = None,
    precision: Any = None,
    return_residual: bool = False,
    implementation: Any = None,
    config: Any = None,
    interpret: Any = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    r"""Attention over a sequence that is spread over the devices of a mapped axis.

    For use inside `jax.shard_map`, `jax.pmap` or ``jax.vmap(axis_name=...)``. Each of the n devices
    gives its slices of query, key and value, laid out by `shard_sequence_order`, and gets its slice
    of what `attention` returns for the whole sequence:

    .. math:: o_t = \sum_s \exp(z_{ts} - \mathrm{lse}_t) v_s, \qquad z_{ts} = \mathrm{scale}\, q_t
       \cdot k_s

    with soft cap, causal mask, window, segments and sinks as there. Windows are in positions of the
    whole sequence. Rows that see no key on any device give output 0, gradients 0 and lse -inf.

    Three methods give the same result, and differ in what a device sends and holds, here per batch
    entry and in elements, for a length T of queries and S of keys:

    * ``"ring"``: keys and values travel from device to device, S K (d + dv) elements in n - 1 steps
      that overlap with the work on the slice before. A window ends the journey as soon as nobody
      sees more. Nothing is held but two slices. The backward pass sends keys, values and
      their float32 gradients. Partial outputs of a route are merged in float32.
    * ``"gather"``: keys and values are gathered, S K (d + dv) elements on each device, in the
      backward pass again. Few large calls and collectives: for short sequences or few heads K.
    * ``"all_to_all"``: devices exchange slices of the sequence for heads, (T N + S K)(d + dv) / n
      elements, attend to whole sequences and exchange back. Needs heads that divide: n must divide
      N, and n must divide K or K divide n; in the second case each key/value head goes to n / K
      devices, and as many times more elements of key and value are sent.

    Between the passes a device keeps query, key, value, output and lse of its slice. All methods
    have the derivatives of `attention`, forward mode and second ones included; tangents of keys and
    values travel along with them. With sinks that are the same on all devices, differentiating
    outside of the mapped function gives their whole gradient; inside of a `shard_map` without its
    check, each device finds its own share.

    Args:
      query: (B, T / n, N, d), floating; any number of leading axes in place of B.
      key: (B, S / n, K, d), of the same dtype; K divides N.
      value: (B, S / n, K, dv), of the same dtype.
      axis_name: Name of the mapped axis.
      layout: How the sequence is laid out, ``"zigzag"``, ``"contiguous"`` or ``"striped"``; keys
        as queries. See `shard_sequence_order`.
      method: ``"ring"``, ``"gather"`` or ``"all_to_all"``.
      bias: A rule of linear memory, `Alibi` or `RelativePositionBias`, between positions of the
        whole sequence; its parameters the same on all devices.
      mask: bool, broadcasts to (B, N, T / n, S): the rows of this device against the keys of all
        devices, in the order in which they are laid out. O(T S / n) memory; not for
        ``"all_to_all"``.
      key_value_seq_lengths: Integers (B,), or one for all, in positions of the whole sequence, the
        same on all devices. Keys and values from there on are never looked at, and may be NaN.
      scale: Factor of the scores, by default ``d ** -0.5``.
      is_causal: Whether position t sees only positions s <= t.
      local_window_size: A position sees ``left`` positions before itself and ``right`` after, given
        as ``(left, right)`` or as one number for both; None in the pair is no limit.
      logits_soft_cap: The scores z become ``cap * tanh(z / cap)``.
      sinks: (N,), floating: a key of value 0 with this score for every query of the head. The same
        on all devices.
      query_segment_ids: int (B, T / n): only equal ids see one another.
      key_value_segment_ids: int (B, S / n).
      dropout_rate: Probability that an attention weight is set to 0, and the others divided by one
        minus it.
      dropout_rng: A PRNG key, the same on all devices. Which weights it drops depends on method,
        layout and number of devices too.
      precision: Of products, as for `attention`.
      return_residual: Whether to return the log-sum-exp too.
      implementation: The route for the work on a device, as for `attention`, out of those with a
        backward pass of their own: all but ``"cudnn"`` and ``"reference"``.
      config: Block sizes of the route, such as `ChunkedConfig`, instead of the stored ones.
      interpret: True, or the parameters of an interpreter, runs a Pallas route on any device.

    Returns:
      The output (B, T / n, N, dv) in the query's dtype, and with `return_residual` the lse
      (B, T / n, N) in float32, which is differentiable.

    Raises:
      ValueError: A shape or a value is wrong, the axis is not bound, or sizes do not divide.
      TypeError: A dtype is wrong.
      NotImplementedError: The route that `implementation` names, or `method`, cannot serve the
        call.

    Example:
      >>> mesh = jax.sharding.Mesh(jax.devices()[:1], ("context",))
      >>> order, inverse = shard_sequence_order(8, 1)
      >>> x = jnp.ones((1, 8, 2, 4))[:, order]
      >>> spread = jax.P(None, "context")
      >>> attend = jax.shard_map(
      ...     lambda q, k, v: ring_attention(q, k, v, axis_name="context", is_causal=True),
      ...     mesh=mesh, in_specs=spread, out_specs=spread)
      >>> attend(x, x, x)[:, inverse].shape
      (1, 8, 2, 4)
    """
    axis = Axis(axis_name, size_of_axis(axis_name))
    _check_choice("layout", layout, LAYOUTS)
    _check_choice("method", method, METHODS)
    _check_runs(layout, query, key)
    _check_whole(method, bias, mask)
    ids = _ids_of_all(query_segment_ids, key_value_segment_ids, axis)
    call = arguments.canonical(
        query,
        key,
        value,
        bias,
        mask,
        scale=scale,
        is_causal=is_causal,
        query_seq_lengths=None,
        key_value_seq_lengths=key_value_seq_lengths,
        local_window_size=local_window_size,
        logits_soft_cap=logits_soft_cap,
        sinks=sinks,
        query_segment_ids=ids[0],
        key_value_segment_ids=ids[1],
        query_offset=None,
        dropout_rate=dropout_rate,
        dropout_rng=dropout_rng,
        precision=precision,
        config=config,
        interpret=interpret,
        axis_size=axis.size,
        key_positions=None
        if key_value_seq_lengths is None
        else key_positions(layout, axis.size, key.shape[-3], lax.axis_index(axis_name)),
    )
    # A list of names would not be hashable.
    names = tuple(implementation) if isinstance(implementation, list) else implementation
    route = _chosen_at_each_call(names)
    output, lse = attend(route, call.settings, call.operands, axis, layout, method)
    return (call.output(output), call.residual(lse)) if return_residual else call.output(output)


def attend(
    route: Route,
    settings: Settings,
    operands: Operands,
    axis: Axis,
    layout: str,
    method: str,
) -> tuple[jax.Array, jax.Array]:
    """Does with the devices of an axis what `core.attend` does on one, with checked arguments."""
    # Arrays that are equal on all devices have gradients that are summed over them: that is what
    # the transpose of this cast does where `shard_map` keeps account of it.
    axes = varying_axes(lax.axis_index(axis.name), *jax.tree.leaves(operands))
    operands = jax.tree.map(lambda x: vary(x, axes), operands)
    beside_explicit = explicit_sharding(operands.query) is not None
    if method == "all_to_all":
        if beside_explicit:
            raise NotImplementedError(
                "method='all_to_all' beside explicit mesh axes; expected 'ring' or 'gather', or "
                "axes of the type AxisType.Auto"
            )
        return _all_to_all(route, settings, operands, axis, layout)
    spread = _spread(method, core.batched(route), axis, layout)
    return core.compiled(core.batched(spread) if beside_explicit else spread, settings, operands)


@functools.cache
def _spread(method: str, route: Route, axis: Axis, layout: str) -> Route:
    """Returns the route that does on all devices what `route` does on one."""
    spread = {"ring": ring, "gather": gather}[method](route, axis, layout)

    def backward(settings: Settings, operands: Operands, *rows: Any) -> Gradients:
        *arrays, bias_gradient = rows

        def fn(operands: Operands, *arrays: jax.Array) -> Gradients:
            lse, cotangent, delta = arrays
            return spread.backward(settings, operands, lse, cotangent, delta, bias_gradient)

        return with_axis(axis.name, axis.size, fn, operands, *arrays)

    plain = None if route.plain is None else ring(route.plain, axis, layout)
    return spread._replace(backward=backward, plain=plain, axis_name=axis.name)


def _all_to_all(
    route: Route,
    settings: Settings,
    operands: Operands,
    axis: Axis,
    layout: str,
) -> tuple[jax.Array, jax.Array]:
    """Attends to whole sequences with a share of the heads."""
    size, mask = operands.sizes, operands.mask
    _check_heads(axis.size, size.heads, size.kv_heads)
    copies = max(1, axis.size // size.kv_heads)

    def to_heads(x: jax.Array) -> jax.Array:
        x = lax.all_to_all(x, axis.name, split_axis=2, concat_axis=1, tiled=True)
        return layouts.to_positions(x, axis.size, layout)

    def to_sequence(x: jax.Array) -> jax.Array:
        x = layouts.from_positions(x, axis.size, layout)
        return lax.all_to_all(x, axis.name, split_axis=1, concat_axis=2, tiled=True)

    def whole(ids: jax.Array | None) -> jax.Array | None:
        if ids is None:
            return None
        everyone = lax.all_gather(ids, axis.name, axis=1, tiled=True)
        return layouts.to_positions(everyone, axis.size, layout)

    def own_heads(x: jax.Array | None, axis_of_heads: int) -> jax.Array | None:
        if x is None:
            return None
        share = size.heads // axis.size
        first = lax.axis_index(axis.name) * share
        return lax.dynamic_slice_in_dim(x, first, share, axis_of_heads)

    output, lse = core.compiled(
        core.batched(route),
        settings,
        Operands(
            query=to_heads(operands.query),
            key=to_heads(jnp.repeat(operands.key, copies, axis=2)),
            value=to_heads(jnp.repeat(operands.value, copies, axis=2)),
            sinks=own_heads(operands.sinks, 0),
            seeds=own_heads(operands.seeds, 1),
            diagonals=own_heads(operands.diagonals, 1),
            mask=Mask(
                left=mask.left,
                right=mask.right,
                key_value_lengths=mask.key_value_lengths,
                query_segment_ids=whole(mask.query_segment_ids),
                key_value_segment_ids=whole(mask.key_value_segment_ids),
            ),
        ),
    )
    return to_sequence(output), to_sequence(lse.transpose(0, 2, 1)).transpose(0, 2, 1)


def _ids_of_all(query_ids: Any, key_ids: Any, axis: Axis) -> tuple[Any, Any]:
    """Returns ids that have the same meaning on all devices, where those have more than 32 bits."""
    ids = [x for x in (query_ids, key_ids) if x is not None]
    if not any(isinstance(x, jax.Array) and x.dtype.itemsize > 4 for x in ids):
        return query_ids, key_ids
    whole = [
        lax.all_gather(jnp.asarray(x).reshape(-1, x.shape[-1]), axis.name, axis=1, tiled=True)
        for x in ids
    ]
    found = integers.same_ids(whole[0], whole[-1])
    own = [
        lax.dynamic_slice_in_dim(
            y, lax.axis_index(axis.name) * x.shape[-1], x.shape[-1], axis=1
        ).reshape(x.shape)
        for x, y in zip(ids, found)
    ]
    rest = iter(own)
    query_ids, key_ids = (None if x is None else next(rest) for x in (query_ids, key_ids))
    return query_ids, key_ids


def _check_choice(name: str, given: str, known: tuple[str, ...]) -> None:
    if given not in known:
        raise ValueError(f"{name}={given!r} is not known; expected one of {', '.join(known)}")


def _check_whole(method: str, bias: Any, mask: Any) -> None:
    check_rule(bias, ", which know all positions")
    if mask is not None and method == "all_to_all":
        raise NotImplementedError(
            "method='all_to_all' cannot take a mask, whose rows are spread over the devices; "
            "expected method='ring' or 'gather'"
        )


def _check_runs(layout: str, query: jax.Array, key: jax.Array) -> None:
    for name, x in (("query", query), ("key", key)):
        if x.ndim >= 3 and x.shape[-3] % layouts.runs_of(layout):
            raise ValueError(
                f"{name} has shape {x.shape}, a slice of {x.shape[-3]} positions; expected an even "
                f"number, since with layout={layout!r} a slice is two chunks"
            )


def _check_heads(axis_size: int, heads: int, kv_heads: int) -> None:
    if heads % axis_size:
        raise ValueError(
            f"query has {heads} heads and the axis {axis_size} devices; expected a multiple of "
            f"{axis_size} for method='all_to_all'"
        )
    if kv_heads % axis_size and axis_size % kv_heads:
        raise ValueError(
            f"key has {kv_heads} heads and the axis {axis_size} devices; expected that one divides "
            "the other for method='all_to_all'"
        )


@functools.cache
def _chosen_at_each_call(implementation: Any) -> Route:
    """Returns the route that takes for each call the one that serves it.

    Only then are the sizes and the mask known. Forward and backward pass may take different ones,
    since all routes give the same lse.
    """

    def forward(settings: Settings, operands: Operands) -> tuple[jax.Array, jax.Array]:
        return _choose(implementation, settings, operands).forward(settings, operands)

    def backward(settings: Settings, operands: Operands, *rows: Any) -> Gradients:
        return _choose(implementation, settings, operands).backward(settings, operands, *rows)

    return Route(str(implementation), forward, backward, lambda *call: None)


def _choose(implementation: Any, settings: Settings, operands: Operands) -> Route:
    if isinstance(implementation, Route):
        return implementation
    name = routes.choose(implementation, settings, operands, residual=True)
    if name not in routes.KERNELS:
        raise NotImplementedError(
            f"implementation={name!r} has no backward pass that takes the log-sum-exp of whole "
            f"rows; expected one of {', '.join(routes.KERNELS)}"
        )
    return routes.load(name)
