"""Fused attention, losses and products for JAX on TPU, GPU and CPU, and compilers of absent chips.

`attention` takes the arguments of `jax.nn.dot_product_attention`, and more. `cross_entropy` is an
output layer and its loss in one, without logits in memory. Products in few bits, and those of a
first layer trained by TrAct, take the arguments of `jax.lax.dot_general`. There are norms and
BlockFFN, and `gram` for Muon.
`pallas_kernels.targets` compiles any JAX function for a GPU or TPU that this machine does not have
and reports the memory that the compiled program needs and moves.
"""

from pallas_kernels.attention.api import attention, explain
from pallas_kernels.attention.chunks import ChunkedConfig
from pallas_kernels.attention.context import ring_attention, shard_sequence_order
from pallas_kernels.attention.cost import AttentionCost, attention_cost
from pallas_kernels.attention.decode import decode_attention
from pallas_kernels.attention.flax_attention import flax_attention_fn, make_flax_attention_fn
from pallas_kernels.attention.merge import merge_attention
from pallas_kernels.attention.pages import CompactedPages, compact_pages, take_pages
from pallas_kernels.attention.position_bias import Alibi, RelativePositionBias, alibi_slopes
from pallas_kernels.attention.projected import attention_projected
from pallas_kernels.layers.block_ffn import block_ffn, relu_rms_router
from pallas_kernels.layers.tract import tract_conv, tract_dot_general
from pallas_kernels.loss.api import cross_entropy
from pallas_kernels.matmul.bit_planes import bit_plane_matmul
from pallas_kernels.matmul.gram import gram
from pallas_kernels.matmul.quantized import quantized_dot_general
from pallas_kernels.matmul.weight_only import (
    QuantizedWeight,
    quantize_weight,
    weight_only_dot_general,
)
from pallas_kernels.norm.norms import add_rms_norm, layer_norm, rms_norm

__all__ = [
    "Alibi",
    "AttentionCost",
    "ChunkedConfig",
    "CompactedPages",
    "QuantizedWeight",
    "RelativePositionBias",
    "add_rms_norm",
    "alibi_slopes",
    "attention",
    "attention_cost",
    "attention_projected",
    "bit_plane_matmul",
    "block_ffn",
    "compact_pages",
    "cross_entropy",
    "decode_attention",
    "explain",
    "flax_attention_fn",
    "gram",
    "layer_norm",
    "make_flax_attention_fn",
    "merge_attention",
    "quantize_weight",
    "quantized_dot_general",
    "relu_rms_router",
    "ring_attention",
    "rms_norm",
    "shard_sequence_order",
    "take_pages",
    "tract_conv",
    "tract_dot_general",
    "weight_only_dot_general",
]
