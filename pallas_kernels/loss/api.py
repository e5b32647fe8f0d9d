"""The public function."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Literal, overload

import jax

from pallas_kernels import _options
from pallas_kernels.loss import arguments, core, reference, tokens

IMPLEMENTATIONS = ("chunked", "reference")


@overload
def cross_entropy(
    hidden: jax.Array,
    weight: jax.Array,
    labels: jax.Array,
    bias: jax.Array | None = None,
    *,
    class_weights: jax.Array | None = None,
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logits_soft_cap: float | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    return_lse: Literal[False] = False,
    vocabulary_axis: int = 1,
    axis_name: Hashable = None,
    gradient_in_forward: bool = False,
    precision: jax.lax.PrecisionLike = None,
    implementation: Literal["chunked", "reference"] | None = None,
    block_vocabulary: int | None = None,
    block_tokens: int | None = None,
) -> jax.Array: ...
@overload
def cross_entropy(
    hidden: jax.Array,
    weight: jax.Array,
    labels: jax.Array,
    bias: jax.Array | None = None,
    *,
    class_weights: jax.Array | None = None,
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logits_soft_cap: float | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    return_lse: Literal[True],
    vocabulary_axis: int = 1,
    axis_name: Hashable = None,
    gradient_in_forward: bool = False,
    precision: jax.lax.PrecisionLike = None,
    implementation: Literal["chunked", "reference"] | None = None,
    block_vocabulary: int | None = None,
    block_tokens: int | None = None,
) -> tuple[jax.Array, jax.Array]: ...
def cross_entropy(
    hidden: jax.Array,
    weight: jax.Array,
    labels: jax.Array,
    bias: jax.Array | None = None,
    *,
    class_weights: jax.Array | None = None,
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logits_soft_cap: float | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    return_lse: bool = False,
    vocabulary_axis: int = 1,
    axis_name: Hashable = None,
    gradient_in_forward: bool = False,
    precision: jax.lax.PrecisionLike = None,
    implementation: Literal["chunked", "reference"] | None = None,
    block_vocabulary: int | None = None,
    block_tokens: int | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    r"""Cross-entropy of a linear layer, without its logits in memory.

    The output layer and the loss of a language model in one, with a block of the vocabulary at a
    time, forward and backward. With logits :math:`s`, label :math:`y`, :math:`V` classes of weights
    :math:`w` and label smoothing :math:`a`, a token costs

    .. math::

        s = c \tanh\left(\frac{h W + b}{c}\right) \qquad
        \mathrm{lse} = \log \sum_v e^{s_v} \\
        \mathrm{loss} = (1 - a)\, w_y (\mathrm{lse} - s_y)
        + \frac{a}{V} \sum_v w_v (\mathrm{lse} - s_v) + z\, \mathrm{lse}^2

    and the mean is over the tokens that count, each with the weight of its class: 0 where none
    does. An ignored token has loss 0 and gradient 0, whatever its hidden state is. A label that is
    neither a class nor `ignore_index` makes loss and gradients NaN: that is a mistake in the data,
    and nothing else shows it under `jit`.

    Derivatives: reverse mode, and forward mode of a gradient (Hessian-vector products). JAX refuses
    `jax.jvp` of the loss itself, which needs ``implementation="reference"``. Under `vmap` with a
    shared weight its gradient has a copy for each entry; axes of `hidden` need no `vmap`.

    Args:
      hidden: Floating (..., D): what goes into the output layer, with any number of axes of tokens.
        Products are in this dtype and sums in float32 (float64 for float64).
      weight: Floating (D, V), in any floating dtype, its gradient's too; a block at a time is cast
        to that of `hidden`. Neither it nor its gradient is transposed or padded.
      labels: Integers (...), the class of each token.
      bias: Floating (V,), added to the logits. A class of bias -inf is not there.
      class_weights: Floating (V,), constants, how much each class counts.
      ignore_index: The label of tokens that do not count; None if all do.
      label_smoothing: The part a of each label that is spread over all classes, from 0 to 1.
      z_loss: How much the square of the log-sum-exp is added, which keeps logits from drifting.
      logits_soft_cap: The bound c on the size of logits; None for none.
      reduction: ``"mean"`` over counted tokens, ``"sum"``, or ``"none"`` for a loss each.
      return_lse: Whether to return the log-sum-exp of each token too.
      vocabulary_axis: Which axis of `weight` has the classes: 1 for the kernel of a linear layer, 0
        for the table (V, D) of an embedding that is tied to the output.
      axis_name: The axis of a `shard_map` or `vmap` around the call over which the classes are
        split in equal parts: `weight`, `bias` and `class_weights` are those of a part, labels are
        counted through all of them, and every part gets the whole loss. Inside a `vmap` or an
        unchecked `shard_map` gradients are, as JAX has them, of the sum of the parts' losses: take
        them outside.
      gradient_in_forward: Makes the gradients in the forward pass, where there is one, and does not
        make the logits again: a product of four less, and `block_tokens` rows of logits and a
        float32 gradient of the weight more in memory. Not for a loss each, nor for the log-sum-exp.
      precision: Of the products, for float32 inputs, as in `jax.lax.dot_general`.
      implementation: ``"chunked"``, which None means, or ``"reference"``: the plain definition, all
        logits in memory, with derivatives of every kind, on one shard.
      block_vocabulary: Classes a step; by default as many as fit a cache, at least 512.
      block_tokens: Tokens a step of `gradient_in_forward`; by default an eighth of the width D.

    Returns:
      The loss, float32 (float64 for float64): a scalar, or (...) without reduction; with
      `return_lse` also the log-sum-exp (...), differentiable, 0 where ignored.

    Raises:
      ValueError: A shape or value does not fit; the message names the argument.
      TypeError: Likewise a dtype, or a traced value where a number is needed.

    Examples:
      >>> import jax, jax.numpy as jnp, pallas_kernels
      >>> hidden = jax.random.normal(jax.random.key(0), (2, 128, 64))
      >>> embedding = jax.random.normal(jax.random.key(1), (5000, 64))
      >>> labels = jnp.arange(256).reshape(2, 128).at[:, -1].set(-100)
      >>> loss, gradients = jax.value_and_grad(pallas_kernels.cross_entropy, (0, 1))(
      ...     hidden, embedding, labels, vocabulary_axis=0, logits_soft_cap=30.0, z_loss=1e-4)
      >>> [x.shape for x in gradients]
      [(2, 128, 64), (5000, 64)]

    References:
      Wijmans et al., *Cut Your Losses in Large-Vocabulary Language Models*
      (`arXiv 2411.09009 <https://arxiv.org/abs/2411.09009>`_); gradients in the forward pass are
      those of Hsu et al., *Liger Kernel* (`arXiv 2410.10989 <https://arxiv.org/abs/2410.10989>`_);
      the z-loss is that of Chowdhery et al., *PaLM*
      (`arXiv 2204.02311 <https://arxiv.org/abs/2204.02311>`_), section 5.
    """
    return_lse = _options.flag("return_lse", return_lse)
    in_forward = _options.flag("gradient_in_forward", gradient_in_forward)
    if not isinstance(reduction, str) or reduction not in arguments.REDUCTIONS:
        raise ValueError(f"reduction={reduction!r}; expected one of {arguments.REDUCTIONS}")
    plain = _is_reference(implementation, axis_name)
    if block_tokens is not None and not in_forward:
        raise ValueError(
            f"block_tokens={block_tokens!r} is for gradient_in_forward=True; without it a step has "
            "all tokens"
        )
    if in_forward and (reduction == "none" or return_lse or plain):
        found = "return_lse=True" if return_lse else f"reduction={reduction!r}"
        found = "implementation='reference'" if plain else found
        raise ValueError(
            f"gradient_in_forward=True with {found}; expected 'mean' or 'sum' of a chunked loss: "
            "gradients that are there already can be scaled, and not weighted token by token"
        )
    settings, operands, given = arguments.canonical(
        hidden, weight, labels, bias,
        class_weights=class_weights, ignore_index=ignore_index, label_smoothing=label_smoothing,
        z_loss=z_loss, logits_soft_cap=logits_soft_cap, vocabulary_axis=vocabulary_axis,
        axis_name=axis_name, precision=precision, block_vocabulary=block_vocabulary,
        block_tokens=block_tokens,
    )  # fmt: skip
    if in_forward and not isinstance(operands.labels.size, int):
        raise ValueError(
            f"gradient_in_forward=True with hidden {operands.hidden.shape}; expected a known "
            "number of tokens, which are cut into equal parts"
        )
    if in_forward:
        total = core.summed(settings, operands, given)
        return total if reduction == "sum" else tokens.mean(total, given)
    rows: Any = (reference if plain else core).row_sums(settings, operands, given.counted)
    rows = tokens.across_shards(settings, rows)
    loss: Any = tokens.losses(settings, rows, given)
    if reduction != "none":
        loss = loss.sum()
    if reduction == "mean":
        loss = tokens.mean(loss, given)
    return (loss, tokens.of_counted(rows.lse, given)) if return_lse else loss


def _is_reference(implementation: Any, axis_name: Any) -> bool:
    named = isinstance(implementation, str) and implementation in IMPLEMENTATIONS
    if implementation is not None and not named:
        raise ValueError(
            f"implementation={implementation!r}; expected one of {IMPLEMENTATIONS}, or None"
        )
    if implementation == "reference" and axis_name is not None:
        raise ValueError(
            f"implementation='reference' with axis_name={axis_name!r}; expected 'chunked' for a "
            "vocabulary in parts"
        )
    return implementation == "reference"
