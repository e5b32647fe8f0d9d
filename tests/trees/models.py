"""Parameters of models that people have, small: each leaf with what it is, written by hand.

A line is a path, a shape and what the leaf is:

- `1|2 3`: a hidden matrix whose inputs are axis 1 and whose outputs are axes 2 and 3; all other
  axes count matrices;
- `head 0|1`, `input 0 1 2|3`, `depthwise 0 1 2|3`: a matrix that hidden rules leave alone;
- `table`: embeddings of tokens or positions;
- `vector`: biases, scales and the like.

The Haiku tree has Haiku's own keys, with slashes in them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tests.trees import published


class Line(NamedTuple):
    path: str
    shape: tuple[int, ...]
    what: str

    @property
    def axes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None:
        """Batch, inputs and outputs of a matrix."""
        if "|" not in self.what:
            return None
        text = self.what.removeprefix(self.kind).strip()
        inputs, outputs = (tuple(map(int, side.split())) for side in text.split("|"))
        batch = tuple(a for a in range(len(self.shape)) if a not in inputs + outputs)
        return batch, inputs, outputs

    @property
    def kind(self) -> str:
        first = self.what.split()[0]
        return "matrix" if first[0].isdigit() else first


def lines(name: str) -> list[Line]:
    found = []
    for line in MODELS[name].strip().splitlines():
        path, shape, what = line.split(maxsplit=2)
        sizes = tuple(int(size) for size in shape.split("x"))
        found.append(Line(path, sizes, what))
    return found


def shapes(name: str) -> Any:
    """The tree, as `jax.ShapeDtypeStruct`."""
    tree: dict[str, Any] = {}
    for path, shape, _ in lines(name):
        *parents, leaf = path.rsplit("/", 1) if name == "haiku" else path.split("/")
        inside = tree
        for parent in parents:
            inside = inside.setdefault(parent, {})
        inside[leaf] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return tree


MODELS = {
    **published.MODELS,
    "gpt2_of_hugging_face": """
transformer/h/0/attn/c_attn/bias   24   vector
transformer/h/0/attn/c_attn/kernel 24x8 1|0
transformer/h/0/attn/c_proj/bias   8    vector
transformer/h/0/attn/c_proj/kernel 8x8  1|0
transformer/h/0/ln_1/bias          8    vector
transformer/h/0/ln_1/scale         8    vector
transformer/h/0/ln_2/bias          8    vector
transformer/h/0/ln_2/scale         8    vector
transformer/h/0/mlp/c_fc/bias      32   vector
transformer/h/0/mlp/c_fc/kernel    32x8 1|0
transformer/h/0/mlp/c_proj/bias    8    vector
transformer/h/0/mlp/c_proj/kernel  8x32 1|0
transformer/ln_f/bias              8    vector
transformer/ln_f/scale             8    vector
transformer/wpe/embedding          16x8 table
transformer/wte/embedding          50x8 table
""",
    "llama_of_hugging_face": """
lm_head/weight                                 50x8 head 1|0
model/embed_tokens/weight                      50x8 table
model/layers/0/input_layernorm/weight          8    vector
model/layers/0/mlp/down_proj/weight            8x20 1|0
model/layers/0/mlp/gate_proj/weight            20x8 1|0
model/layers/0/mlp/up_proj/weight              20x8 1|0
model/layers/0/post_attention_layernorm/weight 8    vector
model/layers/0/self_attn/k_proj/weight         4x8  1|0
model/layers/0/self_attn/o_proj/weight         8x8  1|0
model/layers/0/self_attn/q_proj/weight         8x8  1|0
model/layers/0/self_attn/v_proj/weight         4x8  1|0
model/norm/weight                              8    vector
""",
    "llama_stacked_raw": """
blocks/attention_norm 3x8     vector
blocks/ffn_norm       3x8     vector
blocks/w1             3x8x20  1|2
blocks/w2             3x20x8  1|2
blocks/w3             3x8x20  1|2
blocks/wk             3x8x2x4 1|2 3
blocks/wo             3x2x4x8 1 2|3
blocks/wq             3x8x2x4 1|2 3
blocks/wv             3x8x2x4 1|2 3
norm                  8       vector
output                8x50    head 0|1
tok_embeddings        50x8    table
""",
    "gemma": """
embedder/input_embedding          50x8    table
final_norm/scale                  8       vector
layer_0/attn/_key_norm/scale      4       vector
layer_0/attn/_query_norm/scale    4       vector
layer_0/attn/attn_vec_einsum/w    2x4x8   0 1|2
layer_0/attn/kv_einsum/w          2x1x8x4 2|1 3
layer_0/attn/q_einsum/w           2x8x4   1|0 2
layer_0/mlp/gating_einsum         2x20x8  2|1
layer_0/mlp/linear                20x8    0|1
layer_0/post_attention_norm/scale 8       vector
layer_0/pre_attention_norm/scale  8       vector
layer_0/pre_ffw_norm/scale        8       vector
layer_1/attn/attn_vec_einsum/w    2x4x8   0 1|2
layer_1/attn/qkv_einsum/w         3x2x8x4 2|1 3
layer_1/mlp/gating_einsum/w       2x8x20  1|2
layer_1/mlp/linear/w              20x8    0|1
layer_1/pre_attention_norm/scale  8       vector
""",
    "t5_of_hugging_face": """
decoder/block/0/layer/0/SelfAttention/k/kernel                          8x8  0|1
decoder/block/0/layer/0/SelfAttention/o/kernel                          8x8  0|1
decoder/block/0/layer/0/SelfAttention/q/kernel                          8x8  0|1
decoder/block/0/layer/0/SelfAttention/relative_attention_bias/embedding 32x2 table
decoder/block/0/layer/0/SelfAttention/v/kernel                          8x8  0|1
decoder/block/0/layer/0/layer_norm/weight                               8    vector
decoder/block/0/layer/2/DenseReluDense/wi_0/kernel                      8x20 0|1
decoder/block/0/layer/2/DenseReluDense/wi_1/kernel                      8x20 0|1
decoder/block/0/layer/2/DenseReluDense/wo/kernel                        20x8 0|1
decoder/final_layer_norm/weight                                         8    vector
lm_head/kernel                                                          8x50 head 0|1
shared/embedding                                                        50x8 table
""",
    "t5x_scanned": """
decoder/decoder/mlp/wi_0/kernel                     8x3x20 0|2
decoder/decoder/mlp/wo/kernel                       20x3x8 0|2
decoder/decoder/pre_mlp_layer_norm/scale            8x3    vector
decoder/decoder/pre_self_attention_layer_norm/scale 8x3    vector
decoder/decoder/self_attention/key/kernel           8x3x10 0|2
decoder/decoder/self_attention/out/kernel           10x3x8 0|2
decoder/decoder/self_attention/query/kernel         8x3x10 0|2
decoder/decoder/self_attention/value/kernel         8x3x10 0|2
decoder/decoder_norm/scale                          8      vector
decoder/logits_dense/kernel                         8x50   head 0|1
decoder/relpos_bias/rel_embedding                   2x32   table
token_embedder/embedding                            50x8   table
""",
    "bert_of_hugging_face": """
bert/embeddings/LayerNorm/bias                        8    vector
bert/embeddings/LayerNorm/scale                       8    vector
bert/embeddings/position_embeddings/embedding         16x8 table
bert/embeddings/token_type_embeddings/embedding       2x8  table
bert/embeddings/word_embeddings/embedding             50x8 table
bert/encoder/layer/0/attention/output/LayerNorm/bias  8    vector
bert/encoder/layer/0/attention/output/LayerNorm/scale 8    vector
bert/encoder/layer/0/attention/output/dense/bias      8    vector
bert/encoder/layer/0/attention/output/dense/kernel    8x8  0|1
bert/encoder/layer/0/attention/self/key/bias          8    vector
bert/encoder/layer/0/attention/self/key/kernel        8x8  0|1
bert/encoder/layer/0/attention/self/query/bias        8    vector
bert/encoder/layer/0/attention/self/query/kernel      8x8  0|1
bert/encoder/layer/0/attention/self/value/bias        8    vector
bert/encoder/layer/0/attention/self/value/kernel      8x8  0|1
bert/encoder/layer/0/intermediate/dense/bias          20   vector
bert/encoder/layer/0/intermediate/dense/kernel        8x20 0|1
bert/encoder/layer/0/output/LayerNorm/scale           8    vector
bert/encoder/layer/0/output/dense/bias                8    vector
bert/encoder/layer/0/output/dense/kernel              20x8 0|1
bert/pooler/dense/bias                                8    vector
bert/pooler/dense/kernel                              8x8  0|1
classifier/bias                                       3    vector
classifier/kernel                                     8x3  head 0|1
""",
    "vit": """
Transformer/encoder_norm/bias                                          8       vector
Transformer/encoder_norm/scale                                         8       vector
Transformer/encoderblock_0/LayerNorm_0/bias                            8       vector
Transformer/encoderblock_0/LayerNorm_0/scale                           8       vector
Transformer/encoderblock_0/MlpBlock_3/Dense_0/bias                     20      vector
Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel                   8x20    0|1
Transformer/encoderblock_0/MlpBlock_3/Dense_1/bias                     8       vector
Transformer/encoderblock_0/MlpBlock_3/Dense_1/kernel                   20x8    0|1
Transformer/encoderblock_0/MultiHeadDotProductAttention_1/key/bias     2x4     vector
Transformer/encoderblock_0/MultiHeadDotProductAttention_1/key/kernel   8x2x4   0|1 2
Transformer/encoderblock_0/MultiHeadDotProductAttention_1/out/bias     8       vector
Transformer/encoderblock_0/MultiHeadDotProductAttention_1/out/kernel   2x4x8   0 1|2
Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/bias   2x4     vector
Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel 8x2x4   0|1 2
Transformer/encoderblock_0/MultiHeadDotProductAttention_1/value/bias   2x4     vector
Transformer/encoderblock_0/MultiHeadDotProductAttention_1/value/kernel 8x2x4   0|1 2
Transformer/posembed_input/pos_embedding                               1x17x8  table
cls                                                                    1x1x8   table
embedding/bias                                                         8       vector
embedding/kernel                                                       4x4x3x8 input 0 1 2|3
head/bias                                                              10      vector
head/kernel                                                            8x10    head 0|1
pre_logits/bias                                                        8       vector
pre_logits/kernel                                                      8x8     0|1
""",
    "vit_of_hugging_face": """
classifier/bias                                      10      vector
classifier/kernel                                    8x10    head 0|1
vit/embeddings/cls_token                             1x1x8   table
vit/embeddings/patch_embeddings/projection/bias      8       vector
vit/embeddings/patch_embeddings/projection/kernel    4x4x3x8 input 0 1 2|3
vit/embeddings/position_embeddings                   1x17x8  table
vit/encoder/layer/0/attention/attention/query/bias   8       vector
vit/encoder/layer/0/attention/attention/query/kernel 8x8     0|1
vit/encoder/layer/0/attention/output/dense/bias      8       vector
vit/encoder/layer/0/attention/output/dense/kernel    8x8     0|1
vit/encoder/layer/0/intermediate/dense/bias          20      vector
vit/encoder/layer/0/intermediate/dense/kernel        8x20    0|1
vit/encoder/layer/0/layernorm_before/bias            8       vector
vit/encoder/layer/0/layernorm_before/scale           8       vector
vit/encoder/layer/0/layer_scale/lambda1              8       vector
vit/encoder/layer/0/output/dense/bias                8       vector
vit/encoder/layer/0/output/dense/kernel              20x8    0|1
vit/layernorm/bias                                   8       vector
vit/layernorm/scale                                  8       vector
""",
    "resnet": """
BottleneckResNetBlock_0/BatchNorm_0/bias  4       vector
BottleneckResNetBlock_0/BatchNorm_0/scale 4       vector
BottleneckResNetBlock_0/Conv_0/kernel     1x1x4x4 0 1 2|3
BottleneckResNetBlock_0/Conv_1/kernel     3x3x4x4 0 1 2|3
BottleneckResNetBlock_0/Conv_2/kernel     1x1x4x8 0 1 2|3
BottleneckResNetBlock_0/conv_proj/kernel  1x1x4x8 0 1 2|3
BottleneckResNetBlock_0/norm_proj/bias    8       vector
BottleneckResNetBlock_0/norm_proj/scale   8       vector
Dense_0/bias                              10      vector
Dense_0/kernel                            8x10    0|1
bn_init/bias                              4       vector
bn_init/scale                             4       vector
conv_init/kernel                          7x7x3x4 input 0 1 2|3
""",
    "resnet_of_pytorch": """
bn1/bias                     4       vector
bn1/weight                   4       vector
conv1/weight                 4x3x7x7 1 2 3|0
fc/bias                      10      vector
fc/weight                    10x8    head 1|0
layer1/0/bn1/bias            4       vector
layer1/0/bn1/weight          4       vector
layer1/0/conv1/weight        4x4x3x3 1 2 3|0
layer1/0/downsample/0/weight 8x4x1x1 1 2 3|0
layer1/0/downsample/1/bias   8       vector
layer1/0/downsample/1/weight 8       vector
""",
    "mobilenet_and_convnext": """
convnext/block_0/dwconv/bias             8         vector
convnext/block_0/dwconv/kernel           7x7x1x8   depthwise 0 1 2|3
convnext/block_0/gamma                   8         vector
convnext/block_0/norm/scale              8         vector
convnext/block_0/pwconv1/bias            32        vector
convnext/block_0/pwconv1/kernel          8x32      0|1
convnext/block_0/pwconv2/bias            8         vector
convnext/block_0/pwconv2/kernel          32x8      0|1
mobilenet/block_0/DepthwiseConv_0/kernel 3x3x1x16  depthwise 0 1 2|3
mobilenet/block_0/PointwiseConv_0/kernel 1x1x16x8  0 1 2|3
mobilenet/block_0/bn/bias                8         vector
mobilenet/block_0/bn/scale               8         vector
speech/Conv_0/bias                       8         vector
speech/Conv_0/kernel                     3x4x8     0 1|2
volume/Conv_0/bias                       8         vector
volume/Conv_0/kernel                     3x3x3x4x8 0 1 2 3|4
""",
    "unet_of_diffusers": """
conv_in/bias                                                          4       vector
conv_in/kernel                                                        3x3x4x8 input 0 1 2|3
conv_norm_out/scale                                                   8       vector
conv_out/bias                                                         4       vector
conv_out/kernel                                                       3x3x8x4 head 0 1 2|3
down_blocks_0/attentions_0/norm/scale                                 8       vector
down_blocks_0/attentions_0/proj_in/kernel                             1x1x8x8 0 1 2|3
down_blocks_0/attentions_0/proj_in/bias                               8       vector
down_blocks_0/attentions_0/transformer_blocks_0/attn1/to_k/kernel     8x8     0|1
down_blocks_0/attentions_0/transformer_blocks_0/attn1/to_out_0/bias   8       vector
down_blocks_0/attentions_0/transformer_blocks_0/attn1/to_out_0/kernel 8x8     0|1
down_blocks_0/attentions_0/transformer_blocks_0/attn1/to_q/kernel     8x8     0|1
down_blocks_0/attentions_0/transformer_blocks_0/ff/net_0/proj/kernel  8x20    0|1
down_blocks_0/attentions_0/transformer_blocks_0/ff/net_2/kernel       20x8    0|1
down_blocks_0/attentions_0/transformer_blocks_0/norm1/scale           8       vector
down_blocks_0/downsamplers_0/conv/kernel                              3x3x8x8 0 1 2|3
down_blocks_0/resnets_0/conv1/bias                                    8       vector
down_blocks_0/resnets_0/conv1/kernel                                  3x3x8x8 0 1 2|3
down_blocks_0/resnets_0/conv_shortcut/kernel                          1x1x8x8 0 1 2|3
down_blocks_0/resnets_0/norm1/bias                                    8       vector
down_blocks_0/resnets_0/norm1/scale                                   8       vector
down_blocks_0/resnets_0/time_emb_proj/bias                            8       vector
down_blocks_0/resnets_0/time_emb_proj/kernel                          20x8    0|1
mid_block/resnets_0/conv1/kernel                                      3x3x8x8 0 1 2|3
time_embedding/linear_1/bias                                          20      vector
time_embedding/linear_1/kernel                                        8x20    0|1
time_embedding/linear_2/kernel                                        20x20   0|1
""",
    "maxtext_scanned": """
decoder/decoder_norm/scale                          8       vector
decoder/layers/mlp/wi_0/kernel                      8x3x20  0|2
decoder/layers/mlp/wi_1/kernel                      8x3x20  0|2
decoder/layers/mlp/wo/kernel                        20x3x8  0|2
decoder/layers/post_self_attention_layer_norm/scale 8x3     vector
decoder/layers/pre_self_attention_layer_norm/scale  8x3     vector
decoder/layers/self_attention/key/kernel            8x3x1x4 0|2 3
decoder/layers/self_attention/out/kernel            2x3x4x8 0 2|3
decoder/layers/self_attention/query/kernel          8x3x2x4 0|2 3
decoder/layers/self_attention/value/kernel          8x3x1x4 0|2 3
decoder/logits_dense/kernel                         8x50    head 0|1
token_embedder/embedding                            50x8    table
""",
    "mixture_of_experts_scanned": """
decoder/decoder_norm/scale                          8        vector
decoder/layers/MoeBlock_0/gate/kernel               8x3x5    0|2
decoder/layers/MoeBlock_0/wi_0                      5x3x8x20 2|3
decoder/layers/MoeBlock_0/wi_1                      5x3x8x20 2|3
decoder/layers/MoeBlock_0/wo                        5x3x20x8 2|3
decoder/layers/post_self_attention_layer_norm/scale 8x3      vector
decoder/layers/pre_self_attention_layer_norm/scale  8x3      vector
decoder/layers/self_attention/key/kernel            8x3x1x4  0|2 3
decoder/layers/self_attention/out/kernel            2x3x4x8  0 2|3
decoder/layers/self_attention/query/kernel          8x3x2x4  0|2 3
decoder/layers/self_attention/value/kernel          8x3x1x4  0|2 3
decoder/logits_dense/kernel                         8x50     head 0|1
token_embedder/embedding                            50x8     table
""",
    "mixture_of_experts": """
embed/embedding                    50x8   table
head/kernel                        8x50   head 0|1
layers_0/attention/out/kernel      2x4x8  0 1|2
layers_0/attention/query/kernel    8x2x4  0|1 2
layers_0/experts/wi/bias           5x20   vector
layers_0/experts/wi/kernel         5x8x20 1|2
layers_0/experts/wo/bias           5x8    vector
layers_0/experts/wo/kernel         5x20x8 1|2
layers_0/ln/scale                  8      vector
layers_0/router/kernel             8x5    0|1
layers_0/shared_expert/down/kernel 20x8   0|1
layers_0/shared_expert/up/kernel   8x20   0|1
norm/scale                         8      vector
""",
    "lstm_and_gru": """
Embed_0/embedding             50x8  table
GRUCell_0/hn/bias             8     vector
GRUCell_0/hn/kernel           8x8   0|1
GRUCell_0/hr/kernel           8x8   0|1
GRUCell_0/hz/kernel           8x8   0|1
GRUCell_0/in/bias             8     vector
GRUCell_0/in/kernel           8x8   0|1
GRUCell_0/ir/bias             8     vector
GRUCell_0/ir/kernel           8x8   0|1
GRUCell_0/iz/bias             8     vector
GRUCell_0/iz/kernel           8x8   0|1
OptimizedLSTMCell_0/hf/bias   8     vector
OptimizedLSTMCell_0/hf/kernel 8x8   0|1
OptimizedLSTMCell_0/hg/bias   8     vector
OptimizedLSTMCell_0/hg/kernel 8x8   0|1
OptimizedLSTMCell_0/hi/bias   8     vector
OptimizedLSTMCell_0/hi/kernel 8x8   0|1
OptimizedLSTMCell_0/ho/bias   8     vector
OptimizedLSTMCell_0/ho/kernel 8x8   0|1
OptimizedLSTMCell_0/if/kernel 8x8   0|1
OptimizedLSTMCell_0/ig/kernel 8x8   0|1
OptimizedLSTMCell_0/ii/kernel 8x8   0|1
OptimizedLSTMCell_0/io/kernel 8x8   0|1
logits/bias                   50    vector
logits/kernel                 8x50  head 0|1
lstm_of_nnx/dense_h/bias      32    vector
lstm_of_nnx/dense_h/kernel    8x32  0|1
lstm_of_nnx/dense_i/kernel    8x32  0|1
lstm_of_pytorch/bias_hh_l0    32    vector
lstm_of_pytorch/bias_ih_l0    32    vector
lstm_of_pytorch/weight_hh_l0  32x8  1|0
lstm_of_pytorch/weight_ih_l0  32x10 1|0
""",
    "ensemble_of_critics": """
actor/Dense_0/bias       16      vector
actor/Dense_0/kernel     6x16    0|1
actor/log_std            1x3     vector
critic/Dense_0/bias      2x16    vector
critic/Dense_0/kernel    2x9x16  1|2
critic/Dense_1/bias      2x16    vector
critic/Dense_1/kernel    2x16x16 1|2
critic/LayerNorm_0/bias  2x16    vector
critic/LayerNorm_0/scale 2x16    vector
""",
    "pipeline_of_stages": """
embed/embedding               50x8      table
stages/attention/out/kernel   2x3x2x4x8 2 3|4
stages/attention/query/kernel 2x3x8x2x4 2|3 4
stages/mlp/down/kernel        2x3x20x8  2|3
stages/mlp/up/bias            2x3x20    vector
stages/mlp/up/kernel          2x3x8x20  2|3
stages/norm/scale             2x3x8     vector
unembed/kernel                8x50      head 0|1
""",
    "haiku": """
language_model/embed/embeddings                          50x8    table
language_model/linear/b                                  50      vector
language_model/linear/w                                  8x50    head 0|1
language_model/positional_embeddings                     16x8    table
language_model/transformer/layer_norm/offset             8       vector
language_model/transformer/layer_norm/scale              8       vector
language_model/transformer/linear/b                      32      vector
language_model/transformer/linear/w                      8x32    0|1
language_model/transformer/linear_1/b                    8       vector
language_model/transformer/linear_1/w                    32x8    0|1
language_model/transformer/multi_head_attention/key/b    8       vector
language_model/transformer/multi_head_attention/key/w    8x8     0|1
language_model/transformer/multi_head_attention/linear/b 8       vector
language_model/transformer/multi_head_attention/linear/w 8x8     0|1
language_model/transformer/multi_head_attention/query/b  8       vector
language_model/transformer/multi_head_attention/query/w  8x8     0|1
language_model/~/conv2_d/b                               4       vector
language_model/~/conv2_d/w                               3x3x4x4 0 1 2|3
language_model/~/lstm/linear/b                           32      vector
language_model/~/lstm/linear/w                           16x32   0|1
""",
    "equinox": """
attention/key_proj/weight    8x8     1|0
attention/output_proj/weight 8x8     1|0
attention/query_proj/weight  8x8     1|0
attention/value_proj/weight  8x8     1|0
blocks/first/bias            3x20    vector
blocks/first/weight          3x20x8  2|1
blocks/norm/bias             3x8     vector
blocks/norm/weight           3x8     vector
blocks/second/weight         3x8x20  2|1
convolution/bias             6x1x1   vector
convolution/weight           6x3x1x1 1 2 3|0
depthwise/bias               6x1x1   vector
depthwise/weight             6x1x3x3 depthwise 1 2 3|0
embedding/weight             50x8    table
gru/bias                     24      vector
gru/bias_n                   8       vector
gru/weight_hh                24x8    1|0
gru/weight_ih                24x8    1|0
head/bias                    50      vector
head/weight                  50x8    head 1|0
lstm/bias                    32      vector
lstm/weight_hh               32x8    1|0
lstm/weight_ih               32x8    1|0
norm/bias                    8       vector
norm/weight                  8       vector
""",
    "linen_transformer": """
Block_0/Dense_0/bias                                20    vector
Block_0/Dense_0/kernel                              8x20  0|1
Block_0/Dense_1/bias                                8     vector
Block_0/Dense_1/kernel                              20x8  0|1
Block_0/LayerNorm_0/bias                            8     vector
Block_0/LayerNorm_0/scale                           8     vector
Block_0/MultiHeadDotProductAttention_0/key/bias     2x4   vector
Block_0/MultiHeadDotProductAttention_0/key/kernel   8x2x4 0|1 2
Block_0/MultiHeadDotProductAttention_0/out/bias     8     vector
Block_0/MultiHeadDotProductAttention_0/out/kernel   2x4x8 0 1|2
Block_0/MultiHeadDotProductAttention_0/query/bias   2x4   vector
Block_0/MultiHeadDotProductAttention_0/query/kernel 8x2x4 0|1 2
Block_0/MultiHeadDotProductAttention_0/value/bias   2x4   vector
Block_0/MultiHeadDotProductAttention_0/value/kernel 8x2x4 0|1 2
Embed_0/embedding                                   50x8  table
LayerNorm_0/bias                                    8     vector
LayerNorm_0/scale                                   8     vector
head/bias                                           50    vector
head/kernel                                         8x50  head 0|1
""",
    "linen_transformer_scanned": """
Embed_0/embedding                                       50x8    table
LayerNorm_0/bias                                        8       vector
LayerNorm_0/scale                                       8       vector
ScanBlock_0/Dense_0/bias                                3x20    vector
ScanBlock_0/Dense_0/kernel                              3x8x20  1|2
ScanBlock_0/Dense_1/bias                                3x8     vector
ScanBlock_0/Dense_1/kernel                              3x20x8  1|2
ScanBlock_0/LayerNorm_0/bias                            3x8     vector
ScanBlock_0/LayerNorm_0/scale                           3x8     vector
ScanBlock_0/MultiHeadDotProductAttention_0/key/bias     3x2x4   vector
ScanBlock_0/MultiHeadDotProductAttention_0/key/kernel   3x8x2x4 1|2 3
ScanBlock_0/MultiHeadDotProductAttention_0/out/bias     3x8     vector
ScanBlock_0/MultiHeadDotProductAttention_0/out/kernel   3x2x4x8 1 2|3
ScanBlock_0/MultiHeadDotProductAttention_0/query/bias   3x2x4   vector
ScanBlock_0/MultiHeadDotProductAttention_0/query/kernel 3x8x2x4 1|2 3
ScanBlock_0/MultiHeadDotProductAttention_0/value/bias   3x2x4   vector
ScanBlock_0/MultiHeadDotProductAttention_0/value/kernel 3x8x2x4 1|2 3
head/bias                                               50      vector
head/kernel                                             8x50    head 0|1
""",
    "nnx_transformer": """
blocks/0/attention/key/bias     2x4   vector
blocks/0/attention/key/kernel   8x2x4 0|1 2
blocks/0/attention/out/bias     8     vector
blocks/0/attention/out/kernel   2x4x8 0 1|2
blocks/0/attention/query/bias   2x4   vector
blocks/0/attention/query/kernel 8x2x4 0|1 2
blocks/0/attention/value/bias   2x4   vector
blocks/0/attention/value/kernel 8x2x4 0|1 2
blocks/0/down/bias              8     vector
blocks/0/down/kernel            20x8  0|1
blocks/0/norm/bias              8     vector
blocks/0/norm/scale             8     vector
blocks/0/up/bias                20    vector
blocks/0/up/kernel              8x20  0|1
embed/embedding                 50x8  table
lm_head/kernel                  8x50  head 0|1
norm/bias                       8     vector
norm/scale                      8     vector
""",
    "nnx_transformer_scanned": """
blocks/attention/key/bias     3x2x4   vector
blocks/attention/key/kernel   3x8x2x4 1|2 3
blocks/attention/out/bias     3x8     vector
blocks/attention/out/kernel   3x2x4x8 1 2|3
blocks/attention/query/bias   3x2x4   vector
blocks/attention/query/kernel 3x8x2x4 1|2 3
blocks/attention/value/bias   3x2x4   vector
blocks/attention/value/kernel 3x8x2x4 1|2 3
blocks/down/bias              3x8     vector
blocks/down/kernel            3x20x8  1|2
blocks/norm/bias              3x8     vector
blocks/norm/scale             3x8     vector
blocks/up/bias                3x20    vector
blocks/up/kernel              3x8x20  1|2
embed/embedding               50x8    table
lm_head/kernel                8x50    head 0|1
norm/bias                     8       vector
norm/scale                    8       vector
""",
}
