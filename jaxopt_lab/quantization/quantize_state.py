r"""Any optax transformation with a compact state.

    inner_state = decode(state);  inner.update;  state = encode(inner_state)

Compiled for a GPU, bfloat16 state fuses with the update. int8 needs the scale of a block before its
codes: a first kernel makes the scales and the new parameter, a second makes the new moments again
and encodes them. With dynamic levels, or where a last axis is no multiple of the block size, XLA
keeps new moments in full precision in between. `fused_step` does a whole step in one kernel.
"""

from __future__ import annotations

from typing import Any

import jax
import optax

from jaxopt_lab import _checks, _hyperparams
from jaxopt_lab.quantization import _leaves
from jaxopt_lab.quantization._leaves import CodecChoice, QuantizedState

# What the contract of `jaxopt_lab.testing` asks and stochastic rounding does not promise.
CONTRACT_EXCEPTIONS = {
    "nesting_invariance": "the random bits of a leaf depend on its position in the state",
}


def quantize_state(
    inner: optax.GradientTransformation,
    codec: CodecChoice,
    *,
    min_size: int = 4096,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Keeps the state of a transformation encoded between steps.

    Each update decodes the state to the dtypes that `inner.init` made, calls `inner.update`, and
    encodes the result. Encoded are the floating leaves with at least `min_size` elements; smaller
    leaves and counters stay exact. Call `init` under `jax.jit` where the full state would not fit.

    In the state, codes of a leaf's shape take the leaf's place, so that `flax.nnx.Optimizer` and
    the boxes of `flax.linen` with names of mesh axes carry it like the plain state. `encode_state`
    moves the state of a running optimizer there, `decode_state` moves it back.

    Inside a `shard_map` over an axis that splits a weight `min_size` is compared with the size of
    the shard: call it outside, under `jit` with sharded arrays.

    Args:
      inner: any optax transformation that keeps no encoded state itself.
      codec: `int8()`, `bfloat16()`, another `Codec`, or a function `(path, leaf) -> codec or None`
        of the leaves with at least `min_size` elements, where a path is such as `0/mu/kernel`, a
        leaf a `jax.ShapeDtypeStruct`, and None keeps the leaf exact. `int8(signed=None)` becomes
        unsigned for leaves known to be non-negative by their field's name (`nu`, `nu_max`,
        `sum_of_squares`) and signed for all others; `bfloat16` leaves 16-bit leaves as they are.
      min_size: smallest number of elements of an encoded leaf, from 1 on.
      seed: of stochastic rounding, an integer. The key of a step is made of the seed and the number
        of steps taken, so that a run resumes with the same bits; no key is stored.

    Returns:
      A `GradientTransformationExtraArgs` whose state is a `QuantizedState`.

    Raises:
      ValueError: `min_size` below 1; at an update, a state that was made with another codec, block
        size, code, sign or `min_size`, or a gradient of another shape than its parameter and state.
      TypeError: `inner` is no transformation (or a factory that was not called), `codec` neither a
        codec nor a function, `min_size` or `seed` no integer; at init, a codec for a leaf that is
        not real floating point, or an inner state that is encoded already; at an update, a state of
        another transformation.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jaxopt_lab import quantization
      >>> params = {"kernel": jnp.ones((64, 64)), "bias": jnp.ones(64)}
      >>> tx = quantization.quantize_state(optax.adamw(1e-3), quantization.int8())
      >>> state = jax.jit(tx.init)(params)
      >>> sum(leaf.nbytes for leaf in jax.tree.leaves(state))  # optax.adamw: 33284
      8840

    References:
      Dettmers et al., `8-bit Optimizers via Block-wise Quantization
      <https://arxiv.org/abs/2110.02861>`_, ICLR 2022.
    """
    _checks.check_transformation(inner=inner)
    _leaves.check(codec, min_size, seed)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: optax.Params) -> QuantizedState:
        return _leaves.encode_new(inner.init(params), params, codec, min_size, seed)

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, QuantizedState]:
        before = _leaves.unpack_own(state, codec, min_size)
        _leaves.check_gradients(updates, params)
        count = _hyperparams.increment(state.count)
        decoded = before.decoded()
        try:
            new, inner_state = inner.update(updates, decoded, params, **extra_args)
        except AttributeError as error:
            made = None if params is None else jax.eval_shape(inner.init, params)
            if made is None or jax.tree.structure(made) == jax.tree.structure(decoded):
                raise
            raise TypeError(
                f"the state is of another transformation than the one that quantize_state wraps: "
                f"found {_types(decoded)}, expected {_types(made)}"
            ) from error
        leaves = _leaves.flatten_like(before, inner_state)
        _leaves.check_gradients(updates, new)
        return new, before.pack(count, _leaves.encode_like(before, leaves, seed, count))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _types(state: Any) -> str:
    """Names the states in a state."""
    links = [state] if hasattr(state, "_fields") or not isinstance(state, tuple) else state
    return ", ".join(type(link).__name__ for link in links)
