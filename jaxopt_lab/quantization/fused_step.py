r"""A whole optimizer step on int8 state, in one pass over memory.

    m, v = decode(codes);  u, m, v = inner.update(g, m, v, p);  p <- p + u;  codes = encode(m, v)

for a part of each parameter at a time. An int8 code needs the largest entry of its block first;
compiled as a whole, the step makes the new moments once for that and again for the codes, or
writes them. A part of whole blocks does both while it is in a cache or in registers: 16.1 bytes a
parameter for Adam, where 32-bit state takes 28.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import optax

from jaxopt_lab import _checks, _hyperparams, _tree
from jaxopt_lab.quantization import _block_passes, _elementwise, _leaves
from jaxopt_lab.quantization._leaves import CodecChoice, QuantizedState
from jaxopt_lab.quantization.codecs import Blocks, Int8, Tiling


def fused_step(
    inner: optax.GradientTransformation,
    codec: CodecChoice,
    *,
    min_size: int = 4096,
    seed: int = 0,
    implementation: _block_passes.Implementation | None = None,
) -> Callable[..., tuple[optax.Params, QuantizedState]]:
    """Makes a function that does a step of `quantize_state(inner, codec)` and applies it.

    `inner` is traced, and what it does entry by entry to a parameter and its `int8` state is done
    for a part at a time: on a CPU in a loop over parts that fit the cache, on an NVIDIA GPU in a
    kernel, where its rows are multiples of the block size. Whatever else it computes is computed
    before, such as the norm of all gradients in `optax.clip_by_global_norm`. Parameters without
    `int8` state are treated as a whole, as by `quantize_state`, and so are all on other platforms.

    The state is that of `quantize_state`, and the two may take turns; results differ in rounding.
    Arrays must not be split over devices, unless the step is called under `shard_map`.

    Args:
      inner: any optax transformation that keeps no encoded state itself.
      codec: `int8()`, `bfloat16()`, another `Codec`, or a function `(path, leaf) -> codec or None`
        of the leaves of the inner state with at least `min_size` elements, where a path is such as
        `0/mu/kernel`, a leaf a `jax.ShapeDtypeStruct`, and None keeps the leaf exact. It must be
        the one that the state was made with.
      min_size: smallest number of elements of an encoded leaf; that of the state.
      seed: of stochastic rounding, which `bfloat16()` does; an integer.
      implementation: None for the best of the platform, or for all platforms "loop", "kernel",
        "interpreted kernel" (for tests) or "whole".

    Returns:
      A jitted `step(grads, state, params, **extra_args) -> (params, state)`, of gradients and
      parameters of the same shapes. The state is made by `quantize_state(inner, codec, ...).init`
      or by `encode_state`. Donate state and parameters in the `jax.jit` around it, or they are
      copied.

    Raises:
      ValueError: `min_size` below 1, or an unknown `implementation`; at the step, a gradient of
        another shape than its parameter, or a state made with another codec or `min_size`.
      TypeError: `inner` is no transformation (or a factory that was not called), `codec` neither a
        codec nor a function, `min_size` or `seed` no integer; at the step, another state.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jaxopt_lab import quantization
      >>> params = {"kernel": jnp.ones((64, 256)), "bias": jnp.ones(256)}
      >>> adamw, int8 = optax.adamw(1e-3), quantization.int8()
      >>> state = quantization.quantize_state(adamw, int8).init(params)
      >>> step = quantization.fused_step(adamw, int8)
      >>> params, state = step(params, state, params)  # as if the gradients were the parameters
      >>> round(float(params["bias"][0]), 4)
      0.999

    References:
      Dettmers et al., `8-bit Optimizers via Block-wise Quantization
      <https://arxiv.org/abs/2110.02861>`_, ICLR 2022.
    """
    _checks.check_transformation(inner=inner)
    _leaves.check(codec, min_size, seed)
    if implementation is not None:
        _checks.check_choice(_block_passes.IMPLEMENTATIONS, implementation=implementation)
    inner = optax.with_extra_args_support(inner)

    @jax.jit
    def step(
        grads: optax.Updates, state: Any, params: optax.Params, **extra_args: Any
    ) -> tuple[optax.Params, QuantizedState]:
        old = _leaves.unpack_own(state, codec, min_size)
        _tree.check_updates(grads, params, "params")
        count = _hyperparams.increment(state.count)

        def whole(params: Any, leaves: list[Any], grads: Any, extra_args: Any) -> Any:
            inner_state = old.structure.unflatten(leaves)
            updates, inner_state = inner.update(grads, inner_state, params, **extra_args)
            return optax.apply_updates(params, updates), _leaves.flatten_like(old, inner_state)

        decoded = [_leaves.decoded(leaf) for leaf in old.leaves]
        program, (new_params, new_leaves) = _elementwise.trace(
            whole, params, decoded, grads, extra_args
        )
        weights, tree = jax.tree.flatten(params)
        before = [*weights, *old.leaves]
        after = dict(enumerate([*jax.tree.leaves(new_params), *new_leaves]))
        done: dict[int, Any] = {}
        for group in program.groups():
            done |= _in_parts(group, before, implementation)
        results = list((after | done).values())
        first = len(weights)
        encoded = {i - first for i in done if i >= first}
        leaves = _leaves.encode_like(old, results[first:], seed, count, encoded)
        return tree.unflatten(results[:first]), old.pack(count, leaves)

    return step


def _in_parts(
    group: _elementwise.Group,
    before: list[Any],
    implementation: _block_passes.Implementation | None,
) -> dict[int, Any]:
    """Computes the results that belong to a group, or none of them.

    Args:
      group: of the step's program, whose first inputs and outputs are parameters and state.
      before: parameters and state, encoded.
      implementation: see `fused_step`.

    Returns:
      By position in `before`, what takes its place.
    """
    program = group.program
    outputs = {i: program.outputs[i] for i in range(len(before))}
    outputs = {i: out for i, out in outputs.items() if out in group.members}
    tiling = _tiling(program, outputs, before)
    if tiling is None:
        return {}
    equations, sources, scalars = group.needed(list(outputs.values()))
    # What is replaced must be among them, also where the new value does not depend on it.
    sources += [program.inputs[i] for i in outputs if program.inputs[i] not in sources]
    leaves = dict(zip(program.inputs, before))
    leaves = {source: leaves.get(source, program.values[source]) for source in sources}
    matrices = {source: _matrices(leaf, tiling) for source, leaf in leaves.items()}

    def compute(scalar_values: Any, parts: Any, tables: bool) -> list[tuple[jax.Array, ...]]:
        known = dict(zip(scalars, scalar_values))
        parts = iter(parts)
        for source, leaf in leaves.items():
            known[source] = _read(leaf, [next(parts) for _ in matrices[source]], tables)
        shape = known[sources[0]].shape
        values = _elementwise.evaluate(program, equations, known, shape)
        return [_measured(before[i], values[out]) for i, out in outputs.items()]

    def write(found: Any, tables: bool) -> list[jax.Array]:
        return [x for i, own in zip(outputs, found) for x in _written(before[i], own, tables)]

    places = iter(range(sum(map(len, matrices.values()))))
    places = {source: [next(places) for _ in parts] for source, parts in matrices.items()}
    changed = [place for i in outputs for place in places[program.inputs[i]]]
    arrays = [x for parts in matrices.values() for x in parts]
    step = _block_passes.Step(compute, write, changed, tiling)
    given = [program.values[i] for i in scalars]
    new = iter(_block_passes.run(step, given, arrays, implementation))
    return {i: _restored(before[i], new) for i in outputs}


def _tiling(
    program: _elementwise.Program, outputs: dict[int, int], before: list[Any]
) -> Tiling | None:
    """Returns how all arrays are cut into blocks, or None where that differs."""
    codecs = [before[i].codec for i in outputs if _leaves.is_encoded(before[i])]
    if not all(isinstance(codec, Int8) for codec in codecs):
        return None
    for i, out in outputs.items():
        old, new = program.values[program.inputs[i]], program.values[out]
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            return None
    tilings = {codec.tiling(program.values[out].shape) for out in outputs.values()
               for codec in codecs}  # fmt: skip
    return tilings.pop() if len(tilings) == 1 else None


# A leaf is one matrix, or, encoded, that of its codes and that of its scales.


def _matrices(leaf: Any, tiling: Tiling) -> list[jax.Array]:
    shape = tiling.rows, tiling.length
    if not _leaves.is_encoded(leaf):
        return [leaf.reshape(shape)]
    codes, scales = leaf.encoded
    return [codes.reshape(shape), scales.reshape(tiling.rows, tiling.blocks)]


def _read(leaf: Any, parts: list[jax.Array], tables: bool) -> jax.Array:
    if not _leaves.is_encoded(leaf):
        return parts[0]
    return leaf.codec.decode_tile(Blocks(*parts), leaf.encoding.dtype, tables)


def _measured(leaf: Any, value: jax.Array) -> tuple[jax.Array, ...]:
    return (value, leaf.codec.measure_tile(value)) if _leaves.is_encoded(leaf) else (value,)


def _written(leaf: Any, found: tuple[jax.Array, ...], tables: bool) -> tuple[jax.Array, ...]:
    return leaf.codec.encode_tile(*found, tables) if _leaves.is_encoded(leaf) else found


def _restored(leaf: Any, arrays: Iterator[jax.Array]) -> Any:
    if not _leaves.is_encoded(leaf):
        return next(arrays).reshape(leaf.shape)
    encoded = Blocks(*(next(arrays).reshape(x.shape) for x in leaf.encoded))
    return leaf._replace(encoded=encoded)
