"""The public function, and the one that explains what it chose."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Literal, overload

import jax

from pallas_kernels import _compat, _options
from pallas_kernels.attention import arguments, routes
from pallas_kernels.attention.position_bias import RULES, Rule
from pallas_kernels.attention.routes import Explanation, Implementation


@overload
def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | Rule | None = None,
    mask: jax.Array | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: int | jax.Array | Sequence[int] | None = None,
    key_value_seq_lengths: int | jax.Array | Sequence[int] | None = None,
    key_value_start: int | jax.Array | Sequence[int] | None = None,
    prefix_lengths: int | jax.Array | Sequence[int] | None = None,
    local_window_size: int | tuple[int | None, int | None] | None = None,
    logits_soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    query_segment_ids: jax.Array | None = None,
    key_value_segment_ids: jax.Array | None = None,
    query_offset: int | jax.Array | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: jax.Array | None = None,
    precision: jax.lax.PrecisionLike = None,
    return_residual: Literal[False] = False,
    implementation: Implementation | Sequence[Implementation] | None = None,
    config: Any = None,
    interpret: Any = None,
) -> jax.Array: ...
@overload
def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | Rule | None = None,
    mask: jax.Array | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: int | jax.Array | Sequence[int] | None = None,
    key_value_seq_lengths: int | jax.Array | Sequence[int] | None = None,
    key_value_start: int | jax.Array | Sequence[int] | None = None,
    prefix_lengths: int | jax.Array | Sequence[int] | None = None,
    local_window_size: int | tuple[int | None, int | None] | None = None,
    logits_soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    query_segment_ids: jax.Array | None = None,
    key_value_segment_ids: jax.Array | None = None,
    query_offset: int | jax.Array | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: jax.Array | None = None,
    precision: jax.lax.PrecisionLike = None,
    return_residual: Literal[True],
    implementation: Implementation | Sequence[Implementation] | None = None,
    config: Any = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]: ...
@overload
def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | Rule | None = None,
    mask: jax.Array | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: int | jax.Array | Sequence[int] | None = None,
    key_value_seq_lengths: int | jax.Array | Sequence[int] | None = None,
    key_value_start: int | jax.Array | Sequence[int] | None = None,
    prefix_lengths: int | jax.Array | Sequence[int] | None = None,
    local_window_size: int | tuple[int | None, int | None] | None = None,
    logits_soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    query_segment_ids: jax.Array | None = None,
    key_value_segment_ids: jax.Array | None = None,
    query_offset: int | jax.Array | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: jax.Array | None = None,
    precision: jax.lax.PrecisionLike = None,
    return_residual: bool = False,
    implementation: Implementation | Sequence[Implementation] | None = None,
    config: Any = None,
    interpret: Any = None,
) -> jax.Array | tuple[jax.Array, jax.Array]: ...
def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | Rule | None = None,
    mask: jax.Array | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: int | jax.Array | Sequence[int] | None = None,
    key_value_seq_lengths: int | jax.Array | Sequence[int] | None = None,
    key_value_start: int | jax.Array | Sequence[int] | None = None,
    prefix_lengths: int | jax.Array | Sequence[int] | None = None,
    local_window_size: int | tuple[int | None, int | None] | None = None,
    logits_soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    query_segment_ids: jax.Array | None = None,
    key_value_segment_ids: jax.Array | None = None,
    query_offset: int | jax.Array | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: jax.Array | None = None,
    precision: jax.lax.PrecisionLike = None,
    return_residual: bool = False,
    implementation: Implementation | Sequence[Implementation] | None = None,
    config: Any = None,
    interpret: Any = None,
) -> Any:
    r"""Scaled dot-product attention with linear memory, on any device.

    .. math::
      z_{ts} = \mathrm{cap} \cdot \tanh\!\big(
      (\mathrm{scale} \cdot q_t^\top k_s + \mathrm{bias}_{ts}) / \mathrm{cap}\big), \qquad
      o_t = \sum_s \frac{e^{z_{ts}}}{e^{\mathrm{lse}_t}}\, v_s, \qquad
      \mathrm{lse}_t = \log\Big(e^{\mathrm{sink}} + \sum_s e^{z_{ts}}\Big)

    where the sums run over the keys that query t may see. Its arguments are those of
    `jax.nn.dot_product_attention`, and more, with one difference: **a query that may see no key
    has output 0, gradient 0 and lse -inf**; `jax.nn` averages all values there, padding included,
    and other kernels disagree with it and with each other. With `return_residual` there are two
    more: the lse is float32 (float64 for float64 inputs) and has a gradient, where that of `jax.nn`
    is in the dtype of `key` and has none.

    Query, key, value, bias and sinks can be differentiated in forward and reverse mode and in both
    together, to any order: `jax.jvp`, `jax.linearize`, Hessian-vector products, `jax.grad` of
    either. Memory stays linear in the length. What is not the forward pass of a kernel or its
    gradient runs as ``"chunked"``, plain JAX, on every device.

    Args:
      query: (B, T, N, d), or (T, N, d), or with several batch axes. Any floating dtype.
      key: (B, S, K, d) of the same dtype; K divides N, query head n uses key head n // (N / K).
      value: (B, S, K, dv) of the same dtype; dv may differ from d.
      bias: Added to the scaled scores; broadcasts to (B, N, T, S). Differentiable. Or a rule of
        linear memory, `Alibi` or `RelativePositionBias`, with a gradient of its parameters.
      mask: bool, broadcasts to (B, N, T, S); True where a query may see a key. All masks given here
        hold together.
      scale: Factor of the scores; d ** -0.5 by default.
      is_causal: A query sees the keys up to its own position. Query t stands at position
        ``t + query_offset``, so T != S is aligned at the first key, as in `jax.nn`; with
        ``query_offset = S - T`` at the last one, as in FlashAttention.
      query_seq_lengths: Integers (B,), or one for all. Queries from there on have output 0.
      key_value_seq_lengths: Integers (B,), or one for all. Keys and values from there on are never
        looked at, and may be NaN. What another mask hides must be finite: whether NaN there gets
        out depends on block sizes, so that not seeing it in a test proves nothing.
      key_value_start: Integers (B,), or one for all. Keys and values before it are never looked at,
        as with padding on the left; they may be NaN. Positions count from key 0 all the same.
      prefix_lengths: Integers (B,), or one for all. That many first keys are not hidden on the
        right: every query sees them, its window to the left permitting, also from before (prefix
        LM). Needs something that is hidden there: `is_causal`, or a window with a right side.
      local_window_size: ``w`` or ``(left, right)``: how many keys before and after its own position
        a query sees; None in the pair, or a number beyond the sequence, is no limit. With
        `is_causal`, right is 0. All together, query t at position ``p = t + query_offset`` sees key
        s if ``start <= s < length`` and ``s >= p - left`` and (``s <= p + right`` or ``s <
        prefix``), and t is before its length, its segment is the key's, and `mask` allows it.
      logits_soft_cap: Bounds the scores by ``cap * tanh(z / cap)``, after the bias. A bias of -inf
        hides its key all the same; a large negative one, such as -1e9, becomes -cap and hides
        nothing: use `mask`, or -inf. An infinite cap is none.
      sinks: (N,). A learned key with value 0 for each head, whose score is this number; -inf is
        none.
      query_segment_ids: Integers (B, T). A query sees the keys of its own segment. Given alone,
        with T = S, they are the keys' too.
      key_value_segment_ids: Integers (B, S).
      query_offset: Position of the first query, an integer or integers (B,). Arrays of them are
        clipped to 2^29 on either side; lengths and segment ids may be of any integer type.
      dropout_rate: Probability that an attention weight is set to 0 (and the others divided by
        one minus it). The same `dropout_rng` gives the same mask on every device and route.
      dropout_rng: A PRNG key; needed if the rate is not 0.
      precision: Of the products, for float32 inputs, as in `jax.lax.dot_general`.
      return_residual: Whether to return the lse too.
      implementation: None takes the fastest route that serves the call here. Or the name of one,
        ``"mosaic_gpu"``, ``"mosaic_tpu"``, ``"triton"``, ``"cudnn"``, ``"chunked"`` or
        ``"reference"``, or a sequence of them, of which the first that can serve is taken;
        ``"xla"``, as `jax.nn` has it, is ``"chunked"``. ``"reference"`` is the plain definition,
        with O(T S) memory in all its derivatives. ``"cudnn"`` can be differentiated once, in
        reverse.
      config: Block sizes of the named route, such as `ChunkedConfig`; by default from its table.
      interpret: True, or the parameters of an interpreter, runs a Pallas route on any device.

    Returns:
      The output, (B, T, N, dv) in the dtype of `query`; with `return_residual` also the lse,
      (B, T, N) in float32, natural logarithm, differentiable.

    Raises:
      ValueError: A shape or value does not fit; the message names the argument.
      TypeError: Likewise a dtype, or a traced value where a number is needed.
      NotImplementedError: The route that was named cannot serve the call; the message says why.

    Examples:
      >>> import jax, jax.numpy as jnp, pallas_kernels
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 128, 4, 64))
      >>> pallas_kernels.attention(q, k, v, is_causal=True).shape
      (2, 128, 4, 64)

      Documents packed into one sequence, a window of 32, and the lse:

      >>> documents = jnp.arange(128)[None].repeat(2, 0) // 50
      >>> output, lse = pallas_kernels.attention(
      ...     q, k, v, query_segment_ids=documents, is_causal=True, local_window_size=32,
      ...     return_residual=True)
      >>> lse.shape
      (2, 128, 4)

      How the output moves with the queries, and a Hessian-vector product of a loss:

      >>> def loss(q):
      ...     return jnp.square(pallas_kernels.attention(q, k, v, is_causal=True)).sum()
      >>> _, slope = jax.jvp(loss, (q,), (v,))
      >>> jnp.allclose(slope, jnp.vdot(jax.grad(loss)(q), v), rtol=1e-4)
      Array(True, dtype=bool)
      >>> jax.jvp(jax.grad(loss), (q,), (v,))[1].shape
      (2, 128, 4, 64)

    References:
      Dao et al., *FlashAttention* (`arXiv 2205.14135 <https://arxiv.org/abs/2205.14135>`_); Rabe
      and Staats, *Self-attention Does Not Need O(n^2) Memory*
      (`arXiv 2112.05682 <https://arxiv.org/abs/2112.05682>`_); the sinks are those of Xiao et al.
      (`arXiv 2309.17453 <https://arxiv.org/abs/2309.17453>`_) as learned scores.
    """
    call = arguments.canonical(
        query, key, value, bias, mask,
        scale=scale, is_causal=is_causal, query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths, key_value_start=key_value_start,
        prefix_lengths=prefix_lengths, local_window_size=local_window_size,
        logits_soft_cap=logits_soft_cap, sinks=sinks, query_segment_ids=query_segment_ids,
        key_value_segment_ids=key_value_segment_ids, query_offset=query_offset,
        dropout_rate=dropout_rate, dropout_rng=dropout_rng, precision=precision, config=config,
        interpret=interpret,
    )  # fmt: skip
    return run(call, implementation, return_residual)


def run(
    call: arguments.Canonical,
    implementation: Implementation | Sequence[Implementation] | None,
    return_residual: bool,
) -> Any:
    """Returns what `attention` does, for checked arguments."""
    return_residual = _options.flag("return_residual", return_residual)
    name = routes.choose(implementation, call.settings, call.operands, return_residual)
    size = call.operands.sizes
    if 0 in (size.batch, size.queries, size.keys, size.value_dim):
        name = "reference"  # nothing to compute, and no blocks to compute it in
    output, lse = routes.run(name, call.settings, call.operands, return_residual)
    output = call.output(output)
    if not return_residual:
        return output
    assert lse is not None
    return output, call.residual(lse)


def explain(*args: Any, chip: str | None = None, **kwargs: Any) -> Explanation:
    """Says which route `attention` takes for a call, and why each of the others cannot serve it.

    Args:
      *args: The arguments of `attention`; `jax.ShapeDtypeStruct` stand for arrays.
      chip: A name in `pallas_kernels.targets.CHIPS`, to be told of a call there. Routes follow from
        shapes, dtypes and options, so neither that chip nor its compiler need be installed. By
        default the answer is for the device that would run the call. On the command line: ``python
        -m pallas_kernels.explain --help``.
      **kwargs: Further arguments of `attention`.

    Returns:
      The chosen route and the refusals of all; as text, a line each.

    Raises:
      ValueError: As `attention`, or `chip` is not known.
      TypeError: As `attention`.

    Examples:
      >>> import jax, pallas_kernels
      >>> x = jax.ShapeDtypeStruct((2, 1024, 8, 64), "bfloat16")
      >>> print(pallas_kernels.explain(x, x, x, is_causal=True))  # doctest: +SKIP
         mosaic_gpu needs a GPU of compute capability 9.0, not cpu
         mosaic_tpu needs a TPU, not cpu
         triton     needs an NVIDIA GPU of compute capability 8.0 or more, not cpu
         cudnn      needs an NVIDIA GPU, not cpu
      -> chunked    serves
         reference  serves
      >>> pallas_kernels.explain(x, x, x, is_causal=True, chip="v5e").chosen
      'mosaic_tpu'
    """
    given = inspect.signature(attention).bind(*args, **kwargs)
    given.apply_defaults()
    call: dict[str, Any] = dict(given.arguments)
    implementation, residual = call.pop("implementation"), call.pop("return_residual")
    arrays = {
        k: v
        for k, v in call.items()
        if isinstance(v, (jax.Array, jax.ShapeDtypeStruct, *RULES)) and k not in _NUMBERS
    }
    found: list[Explanation] = []

    def trace(arrays: dict[str, Any]) -> None:
        settings, operands, *_ = arguments.canonical(**(call | arrays))
        found.append(routes.explain(implementation, settings, operands, residual))

    with _compat.as_if_on(chip):
        jax.eval_shape(trace, arrays)
    return found[0]


_NUMBERS = ("scale", "logits_soft_cap", "dropout_rate")
"""Arguments that must be known while tracing, arrays or not."""
