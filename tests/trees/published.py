"""More parameters that people have, of models as they are published; see `models` for the lines."""

from __future__ import annotations

MODELS = {
    # github.com/BlinkDL/RWKV-LM, RWKV-v5/src/model.py.
    "rwkv6": """
blocks/0/att/gate/weight       8x8   1|0
blocks/0/att/gate_w1           8x6   0|1
blocks/0/att/key/weight        8x8   1|0
blocks/0/att/ln_x/weight       8     vector
blocks/0/att/output/weight     8x8   1|0
blocks/0/att/receptance/weight 8x8   1|0
blocks/0/att/time_decay        1x1x8 vector
blocks/0/att/time_decay_w1     8x6   0|1
blocks/0/att/time_decay_w2     6x8   0|1
blocks/0/att/time_faaaa        2x4   vector
blocks/0/att/time_maa_rkvw_w1  8x16  0|1
blocks/0/att/time_maa_rkvw_w2  4x4x8 1|2
blocks/0/att/time_maa_w        1x1x8 vector
blocks/0/att/time_maa_w1       8x20  0|1
blocks/0/att/time_maa_w2       5x4x8 1|2
blocks/0/att/time_maa_x        1x1x8 vector
blocks/0/att/time_value2_w1    8x6   0|1
blocks/0/att/value/weight      8x8   1|0
blocks/0/ffn/key/weight        28x8  1|0
blocks/0/ffn/receptance/weight 8x8   1|0
blocks/0/ffn/time_maa_k        1x1x8 vector
blocks/0/ffn/value/weight      8x28  1|0
blocks/0/ln0/weight            8     vector
blocks/0/ln1/weight            8     vector
emb/weight                     50x8  table
head/weight                    50x8  head 1|0
ln_out/weight                  8     vector
""",
    # RWKV-v7/rwkv_v7_demo.py there, and with a leading axis for the layers.
    "rwkv7": """
blocks/0/att/a0                1x1x8 vector
blocks/0/att/a1                8x6   0|1
blocks/0/att/a2                6x8   0|1
blocks/0/att/g1                8x6   0|1
blocks/0/att/g2                6x8   0|1
blocks/0/att/k_a               1x1x8 vector
blocks/0/att/k_k               1x1x8 vector
blocks/0/att/ln_x/weight       8     vector
blocks/0/att/r_k               2x4   vector
blocks/0/att/receptance/weight 8x8   1|0
blocks/0/att/v0                1x1x8 vector
blocks/0/att/v1                8x6   0|1
blocks/0/att/v2                6x8   0|1
blocks/0/att/w0                1x1x8 vector
blocks/0/att/w1                8x6   0|1
blocks/0/att/w2                6x8   0|1
blocks/0/att/x_r               1x1x8 vector
blocks/0/ffn/key/weight        32x8  1|0
blocks/0/ffn/x_k               1x1x8 vector
blocks/0/ln1/weight            8     vector
emb/weight                     50x8  table
head/weight                    50x8  head 1|0
""",
    "rwkv7_stacked": """
blocks/att/a0                3x8     vector
blocks/att/k_a               3x8     vector
blocks/att/k_k               3x8     vector
blocks/att/r_k               3x2x4   vector
blocks/att/receptance/weight 3x8x8   2|1
blocks/att/time_maa_w1       3x8x20  1|2
blocks/att/time_maa_w2       3x5x4x8 2|3
blocks/att/w0                3x8     vector
blocks/att/w1                3x8x6   1|2
blocks/att/w2                3x6x8   1|2
blocks/att/x_r               3x1x1x8 vector
blocks/ln1/weight            3x8     vector
emb/weight                   50x8    table
""",
    # torch.nn.MultiheadAttention, alone and with keys of another width.
    "attention_of_pytorch": """
attn/bias_k           1x1x8 vector
attn/in_proj_bias     24    vector
attn/in_proj_weight   24x8  1|0
attn/out_proj/bias    8     vector
attn/out_proj/weight  8x8   1|0
cross/in_proj_bias    24    vector
cross/k_proj_weight   8x6   1|0
cross/out_proj/weight 8x8   1|0
cross/q_proj_weight   8x8   1|0
cross/v_proj_weight   8x6   1|0
""",
    # github.com/openai/CLIP, clip/model.py.
    "clip_of_openai": """
ln_final/weight                                     8       vector
logit_scale                                         1       vector
positional_embedding                                16x8    table
text_projection                                     8x6     head 0|1
token_embedding/weight                              50x8    table
transformer/resblocks/0/attn/in_proj_weight         24x8    1|0
visual/attnpool/c_proj/weight                       6x8     1|0
visual/attnpool/positional_embedding                17x8    table
visual/class_embedding                              8       vector
visual/conv1/weight                                 8x3x4x4 input 1 2 3|0
visual/ln_pre/weight                                8       vector
visual/positional_embedding                         17x8    table
visual/proj                                         8x6     head 0|1
visual/transformer/resblocks/0/attn/in_proj_bias    24      vector
visual/transformer/resblocks/0/attn/in_proj_weight  24x8    1|0
visual/transformer/resblocks/0/attn/out_proj/weight 8x8     1|0
visual/transformer/resblocks/0/mlp/c_fc/weight      32x8    1|0
visual/transformer/resblocks/0/mlp/c_proj/weight    8x32    1|0
""",
    # transformers.CLIPModel.
    "clip_of_hugging_face": """
logit_scale                                         1       vector
text_model/embeddings/position_embedding/weight     16x8    table
text_model/embeddings/token_embedding/weight        50x8    table
text_model/encoder/layers/0/self_attn/k_proj/weight 8x8     1|0
text_model/final_layer_norm/weight                  8       vector
text_projection/weight                              6x8     head 1|0
vision_model/embeddings/class_embedding             8       vector
vision_model/embeddings/patch_embedding/weight      8x3x4x4 input 1 2 3|0
vision_model/embeddings/position_embedding/weight   17x8    table
vision_model/encoder/layers/0/mlp/fc1/weight        32x8    1|0
vision_model/post_layernorm/weight                  8       vector
vision_model/pre_layrnorm/weight                    8       vector
visual_projection/weight                            6x8     head 1|0
""",
    # github.com/google-research/big_vision, models/proj/image_text/two_towers.py.
    "siglip_scanned": """
b                                                         1       vector
img/MAPHead_0/MlpBlock_0/Dense_0/kernel                   8x32    0|1
img/MAPHead_0/MlpBlock_0/Dense_1/kernel                   32x8    0|1
img/MAPHead_0/MultiHeadDotProductAttention_0/out/kernel   2x4x8   0 1|2
img/MAPHead_0/MultiHeadDotProductAttention_0/query/bias   2x4     vector
img/MAPHead_0/MultiHeadDotProductAttention_0/query/kernel 8x2x4   0|1 2
img/MAPHead_0/probe                                       1x1x8   table
img/Transformer/encoder_norm/scale                        8       vector
img/Transformer/encoderblock/LayerNorm_0/scale            3x8     vector
img/Transformer/encoderblock/MlpBlock_0/Dense_0/bias      3x32    vector
img/Transformer/encoderblock/MlpBlock_0/Dense_0/kernel    3x8x32  1|2
img/embedding/bias                                        8       vector
img/embedding/kernel                                      4x4x3x8 input 0 1 2|3
img/pos_embedding                                         1x16x8  table
t                                                         1       vector
txt/Embed_0/embedding                                     50x8    table
txt/head/kernel                                           8x8     head 0|1
txt/pos_embedding                                         1x16x8  table
""",
    # github.com/openai/whisper, whisper/model.py.
    "whisper_of_openai": """
decoder/blocks/0/cross_attn/query/weight 8x8   1|0
decoder/ln/weight                        8     vector
decoder/positional_embedding             16x8  table
decoder/token_embedding/weight           50x8  table
encoder/blocks/0/attn/key/weight         8x8   1|0
encoder/blocks/0/attn/out/weight         8x8   1|0
encoder/blocks/0/attn/query/bias         8     vector
encoder/blocks/0/attn/query/weight       8x8   1|0
encoder/blocks/0/attn_ln/weight          8     vector
encoder/blocks/0/mlp/0/weight            32x8  1|0
encoder/blocks/0/mlp/2/weight            8x32  1|0
encoder/conv1/bias                       8     vector
encoder/conv1/weight                     8x5x3 1 2|0
encoder/conv2/bias                       8     vector
encoder/conv2/weight                     8x8x3 1 2|0
encoder/ln_post/weight                   8     vector
encoder/positional_embedding             30x8  table
""",
    # transformers.FlaxWhisperForConditionalGeneration.
    "whisper_of_hugging_face": """
model/decoder/embed_positions/embedding             16x8  table
model/decoder/embed_tokens/embedding                50x8  table
model/decoder/layers/0/encoder_attn/out_proj/kernel 8x8   0|1
model/encoder/conv1/bias                            8     vector
model/encoder/conv1/kernel                          3x5x8 0 1|2
model/encoder/conv2/bias                            8     vector
model/encoder/conv2/kernel                          3x8x8 0 1|2
model/encoder/embed_positions/embedding             30x8  table
model/encoder/layer_norm/scale                      8     vector
model/encoder/layers/0/fc1/kernel                   8x32  0|1
model/encoder/layers/0/self_attn/q_proj/kernel      8x8   0|1
proj_out/kernel                                     8x50  head 0|1
""",
    # transformers.BertForPreTraining and BertForQuestionAnswering.
    "bert_of_pytorch": """
bert/embeddings/LayerNorm/weight                   8    vector
bert/embeddings/position_embeddings/weight         16x8 table
bert/embeddings/token_type_embeddings/weight       2x8  table
bert/embeddings/word_embeddings/weight             50x8 table
bert/encoder/layer/0/attention/output/dense/weight 8x8  1|0
bert/encoder/layer/0/attention/self/query/weight   8x8  1|0
bert/encoder/layer/0/intermediate/dense/weight     32x8 1|0
bert/encoder/layer/0/output/dense/weight           8x32 1|0
bert/pooler/dense/weight                           8x8  1|0
cls/predictions/bias                               50   vector
cls/predictions/decoder/bias                       50   vector
cls/predictions/decoder/weight                     50x8 head 1|0
cls/predictions/transform/LayerNorm/weight         8    vector
cls/predictions/transform/dense/weight             8x8  1|0
cls/seq_relationship/bias                          2    vector
cls/seq_relationship/weight                        2x8  head 1|0
qa_outputs/weight                                  2x8  head 1|0
""",
    # transformers.MambaForCausalLM.
    "mamba": """
backbone/embeddings/weight              50x8   table
backbone/layers/0/mixer/A_log           16x4   vector
backbone/layers/0/mixer/D               16     vector
backbone/layers/0/mixer/conv1d/bias     16     vector
backbone/layers/0/mixer/conv1d/weight   16x1x4 depthwise 1 2|0
backbone/layers/0/mixer/dt_proj/bias    16     vector
backbone/layers/0/mixer/dt_proj/weight  16x4   1|0
backbone/layers/0/mixer/in_proj/weight  32x8   1|0
backbone/layers/0/mixer/out_proj/weight 8x16   1|0
backbone/layers/0/mixer/x_proj/weight   12x16  1|0
backbone/layers/0/norm/weight           8      vector
backbone/norm_f/weight                  8      vector
lm_head/weight                          50x8   head 1|0
""",
    # Mamba and its second version in Linen, the last with a raw kernel of a convolution.
    "mamba_of_flax": """
embedding/embedding            50x8   table
layers_0/mixer/A_log           16x4   vector
layers_0/mixer/D               16     vector
layers_0/mixer/conv1d/bias     16     vector
layers_0/mixer/conv1d/kernel   4x1x16 depthwise 0 1|2
layers_0/mixer/dt_bias         2      vector
layers_0/mixer/dt_proj/kernel  4x16   0|1
layers_0/mixer/in_proj/kernel  8x32   0|1
layers_0/mixer/norm/weight     16     vector
layers_0/mixer/out_proj/kernel 16x8   0|1
layers_0/mixer/x_proj/kernel   16x12  0|1
layers_0/norm/weight           8      vector
layers_1/mixer/A_log           16x4   vector
layers_1/mixer/conv_bias       16     vector
layers_1/mixer/conv_weight     4x16   depthwise 0|1
layers_1/mixer/in_proj/kernel  8x32   0|1
norm_f/weight                  8      vector
""",
    # github.com/google-deepmind/recurrentgemma, recurrentgemma/jax.
    "recurrent_gemma": """
blocks.0/channel_pre_norm/scale              8        vector
blocks.0/mlp_block/ffw_down/kernel           20x8     0|1
blocks.0/mlp_block/ffw_up/b                  2x1x1x20 vector
blocks.0/mlp_block/ffw_up/w                  2x8x20   1|2
blocks.0/recurrent_block/conv_1d/b           8        vector
blocks.0/recurrent_block/conv_1d/w           4x8      depthwise 0|1
blocks.0/recurrent_block/linear_out/kernel   8x8      0|1
blocks.0/recurrent_block/linear_x/kernel     8x8      0|1
blocks.0/recurrent_block/linear_y/kernel     8x8      0|1
blocks.0/recurrent_block/rg_lru/a_gate/b     2x4      vector
blocks.0/recurrent_block/rg_lru/a_gate/w     2x4x4    1|2
blocks.0/recurrent_block/rg_lru/a_real_param 8        vector
blocks.0/recurrent_block/rg_lru/input_gate/b 2x4      vector
blocks.0/recurrent_block/rg_lru/input_gate/w 2x4x4    1|2
blocks.2/attention_block/proj_final/kernel   8x8      0|1
blocks.2/attention_block/proj_q/kernel       8x8      0|1
embedder/input_embedding                     50x8     table
final_norm/scale                             8        vector
""",
    # transformers.Qwen3NextForCausalLM and Qwen2VLModel's images.
    "qwen3_next": """
model/layers/0/linear_attn/A_log               4         vector
model/layers/0/linear_attn/conv1d/weight       16x1x4    depthwise 1 2|0
model/layers/0/linear_attn/dt_bias             4         vector
model/layers/0/linear_attn/in_proj_ba/weight   4x8       1|0
model/layers/0/linear_attn/in_proj_qkvz/weight 24x8      1|0
model/layers/0/linear_attn/norm/weight         4         vector
model/layers/0/linear_attn/out_proj/weight     8x8       1|0
model/layers/0/mlp/shared_expert_gate/weight   1x8       1|0
model/layers/0/self_attn/k_norm/weight         4         vector
model/layers/0/self_attn/q_norm/weight         4         vector
model/layers/0/self_attn/q_proj/bias           8         vector
model/layers/0/self_attn/q_proj/weight         8x8       1|0
visual/blocks/0/attn/qkv/weight                24x8      1|0
visual/merger/ln_q/weight                      8         vector
visual/merger/mlp/0/weight                     32x32     1|0
visual/patch_embed/proj/weight                 8x3x2x4x4 input 1 2 3 4|0
""",
    # transformers.DeepseekV3ForCausalLM with a layer that predicts later tokens.
    "deepseek": """
lm_head/weight                                     50x8 head 1|0
model/embed_tokens/weight                          50x8 table
model/layers/0/self_attn/kv_a_layernorm/weight     5    vector
model/layers/0/self_attn/kv_a_proj_with_mqa/weight 7x8  1|0
model/layers/0/self_attn/kv_b_proj/weight          16x5 1|0
model/layers/0/self_attn/o_proj/weight             8x8  1|0
model/layers/0/self_attn/q_a_layernorm/weight      6    vector
model/layers/0/self_attn/q_a_proj/weight           6x8  1|0
model/layers/0/self_attn/q_b_proj/weight           12x6 1|0
model/layers/1/input_layernorm/weight              8    vector
model/layers/1/mlp/experts/0/down_proj/weight      8x6  1|0
model/layers/1/mlp/experts/0/gate_proj/weight      6x8  1|0
model/layers/1/mlp/gate/e_score_correction_bias    4    vector
model/layers/1/mlp/gate/weight                     4x8  1|0
model/layers/1/mlp/shared_experts/up_proj/weight   6x8  1|0
model/layers/2/eh_proj/weight                      8x16 1|0
model/layers/2/embed_tokens/weight                 50x8 table
model/layers/2/enorm/weight                        8    vector
model/layers/2/hnorm/weight                        8    vector
model/layers/2/shared_head/head/weight             50x8 head 1|0
model/layers/2/shared_head/norm/weight             8    vector
model/norm/weight                                  8    vector
""",
    # github.com/AI-Hypercomputer/maxtext, src/maxtext/layers/attention_mla.py.
    "deepseek_of_maxtext_scanned": """
decoder/layers/mlp/wi_0/kernel                     8x3x20  0|2
decoder/layers/mlp/wo/kernel                       20x3x8  0|2
decoder/layers/pre_self_attention_layer_norm/scale 8x3     vector
decoder/layers/self_attention/kv_norm/scale        5x3     vector
decoder/layers/self_attention/out/kernel           2x3x4x8 0 2|3
decoder/layers/self_attention/q_norm/scale         6x3     vector
decoder/layers/self_attention/wkv_a/kernel         8x3x7   0|2
decoder/layers/self_attention/wkv_b/kernel         5x3x2x8 0|2 3
decoder/layers/self_attention/wq_a/kernel          8x3x6   0|2
decoder/layers/self_attention/wq_b/kernel          6x3x2x6 0|2 3
decoder/logits_dense/kernel                        8x50    head 0|1
token_embedder/embedding                           50x8    table
""",
    # transformers 4, MixtralForCausalLM; then the experts of transformers 5, and of GptOss.
    "mixtral": """
model/layers/0/block_sparse_moe/experts/0/w1/weight 20x8 1|0
model/layers/0/block_sparse_moe/experts/0/w2/weight 8x20 1|0
model/layers/0/block_sparse_moe/experts/0/w3/weight 20x8 1|0
model/layers/0/block_sparse_moe/gate/weight         4x8  1|0
model/layers/0/input_layernorm/weight               8    vector
""",
    "experts_in_one": """
model/layers/0/input_layernorm/weight   8      vector
model/layers/0/mlp/experts/down_proj    4x8x6  2|1
model/layers/0/mlp/experts/gate_up_proj 4x12x8 2|1
model/layers/0/mlp/gate/weight          4x8    1|0
model/norm/weight                       8      vector
""",
    "gpt_oss": """
model/layers/0/input_layernorm/weight        8      vector
model/layers/0/mlp/experts/down_proj         4x6x8  1|2
model/layers/0/mlp/experts/down_proj_bias    4x8    vector
model/layers/0/mlp/experts/gate_up_proj      4x8x12 1|2
model/layers/0/mlp/experts/gate_up_proj_bias 4x12   vector
model/layers/0/mlp/router/bias               4      vector
model/layers/0/mlp/router/weight             4x8    1|0
model/layers/0/self_attn/q_proj/bias         8      vector
model/layers/0/self_attn/q_proj/weight       8x8    1|0
model/layers/0/self_attn/sinks               2      vector
""",
    # transformers.Llama4ForCausalLM.
    "llama4": """
model/layers/0/feed_forward/experts/down_proj              4x6x8  1|2
model/layers/0/feed_forward/experts/gate_up_proj           4x8x12 1|2
model/layers/0/feed_forward/router/weight                  4x8    1|0
model/layers/0/feed_forward/shared_expert/gate_proj/weight 6x8    1|0
model/layers/0/input_layernorm/weight                      8      vector
""",
    # github.com/facebookresearch/DiT, models.py.
    "dit": """
blocks/0/adaLN_modulation/1/bias      48      vector
blocks/0/adaLN_modulation/1/weight    48x8    1|0
blocks/0/attn/proj/weight             8x8     1|0
blocks/0/attn/qkv/weight              24x8    1|0
blocks/0/mlp/fc1/weight               32x8    1|0
blocks/0/mlp/fc2/weight               8x32    1|0
final_layer/adaLN_modulation/1/bias   16      vector
final_layer/adaLN_modulation/1/weight 16x8    1|0
final_layer/linear/weight             16x8    head 1|0
pos_embed                             1x16x8  table
t_embedder/mlp/0/weight               8x16    1|0
t_embedder/mlp/2/weight               8x8     1|0
x_embedder/proj/bias                  8       vector
x_embedder/proj/weight                8x4x2x2 input 1 2 3|0
y_embedder/embedding_table/weight     11x8    table
""",
    # diffusers.SD3Transformer2DModel, and github.com/black-forest-labs/flux, model.py.
    "flux": """
double_blocks/0/img_attn/norm/query_norm/scale    4       vector
double_blocks/0/img_mod/lin/weight                48x8    1|0
final_layer/adaLN_modulation/1/weight             16x8    1|0
final_layer/linear/weight                         16x8    head 1|0
img_in/weight                                     8x4     input 1|0
norm_out/linear/weight                            16x8    1|0
pos_embed/proj/weight                             8x4x2x2 input 1 2 3|0
proj_out/weight                                   16x8    head 1|0
single_transformer_blocks/0/proj_mlp/weight       32x8    1|0
single_transformer_blocks/0/proj_out/weight       8x40    1|0
time_in/in_layer/weight                           8x16    1|0
time_text_embed/text_embedder/linear_1/weight     8x16    1|0
time_text_embed/timestep_embedder/linear_1/weight 8x16    1|0
transformer_blocks/0/attn/add_k_proj/weight       8x8     1|0
transformer_blocks/0/attn/norm_q/weight           4       vector
transformer_blocks/0/attn/to_add_out/weight       8x8     1|0
transformer_blocks/0/attn/to_q/weight             8x8     1|0
transformer_blocks/0/ff/net/0/proj/weight         32x8    1|0
transformer_blocks/0/ff_context/net/2/weight      8x32    1|0
transformer_blocks/0/norm1/linear/weight          48x8    1|0
transformer_blocks/0/norm1_context/linear/weight  48x8    1|0
txt_in/weight                                     8x12    input 1|0
vector_in/out_layer/weight                        8x8     1|0
""",
    # diffusers.UNet2DConditionModel.
    "unet_of_pytorch": """
add_embedding/linear_1/weight                                         32x16   1|0
class_embedding/weight                                                10x32   table
conv_in/weight                                                        8x4x3x3 input 1 2 3|0
conv_norm_out/weight                                                  8       vector
conv_out/weight                                                       4x8x3x3 head 1 2 3|0
down_blocks/0/attentions/0/proj_in/weight                             8x8x1x1 1 2 3|0
down_blocks/0/attentions/0/proj_out/weight                            8x8x1x1 1 2 3|0
down_blocks/0/attentions/0/transformer_blocks/0/attn2/to_k/weight     8x12    1|0
down_blocks/0/attentions/0/transformer_blocks/0/attn2/to_out/0/weight 8x8     1|0
down_blocks/0/attentions/0/transformer_blocks/0/norm1/weight          8       vector
down_blocks/0/resnets/0/conv1/weight                                  8x8x3x3 1 2 3|0
down_blocks/0/resnets/0/time_emb_proj/weight                          8x32    1|0
quant_conv/weight                                                     8x8x1x1 1 2 3|0
time_embedding/linear_1/weight                                        32x8    1|0
time_embedding/linear_2/weight                                        32x32   1|0
up_blocks/0/upsamplers/0/conv/weight                                  8x8x3x3 1 2 3|0
""",
    # transformers.ConvNextForImageClassification and torchvision.models.convnext_tiny.
    "convnext_of_pytorch": """
classifier/weight                                        10x8     head 1|0
convnext/embeddings/layernorm/weight                     8        vector
convnext/embeddings/patch_embeddings/weight              8x3x4x4  input 1 2 3|0
convnext/encoder/stages/0/layers/0/dwconv/bias           8        vector
convnext/encoder/stages/0/layers/0/dwconv/weight         8x1x7x7  depthwise 1 2 3|0
convnext/encoder/stages/0/layers/0/layer_scale_parameter 8        vector
convnext/encoder/stages/0/layers/0/pwconv1/weight        32x8     1|0
convnext/encoder/stages/1/downsampling_layer/0/weight    8        vector
convnext/encoder/stages/1/downsampling_layer/1/weight    16x8x2x2 1 2 3|0
convnext/layernorm/weight                                8        vector
features/1/0/block/0/weight                              8x1x7x7  depthwise 1 2 3|0
features/1/0/layer_scale                                 8x1x1    vector
""",
    # timm.models.eva.
    "eva_of_timm": """
attn_pool/kv/weight       16x8    1|0
attn_pool/latent          1x1x8   table
attn_pool/q/weight        8x8     1|0
blocks/0/attn/proj/weight 8x8     1|0
blocks/0/attn/q_bias      8       vector
blocks/0/attn/qkv/weight  24x8    1|0
blocks/0/gamma_1          8       vector
blocks/0/ls1/gamma        8       vector
blocks/0/mlp/w12/weight   40x8    1|0
blocks/0/norm1/weight     8       vector
cls_token                 1x1x8   table
fc_norm/weight            8       vector
head/weight               10x8    head 1|0
head_dist/weight          10x8    head 1|0
patch_embed/proj/weight   8x3x4x4 input 1 2 3|0
pos_embed                 1x17x8  table
reg_token                 1x4x8   table
""",
    # What is learned without a layer: Perceiver, BLIP-2, DETR, SAM, Swin, prompts, position tables.
    "learned_tables": """
conformer/layers/0/self_attn/linear_pos/weight           8x8     1|0
conformer/layers/0/self_attn/pos_bias_u                  2x4     vector
deformable/level_embed                                   4x8     table
deit/dist_token                                          1x1x8   table
detr/query_embed/weight                                  10x8    table
detr/query_pos                                           10x8    table
detr/row_embed/weight                                    10x4    table
dino/register_tokens                                     1x4x8   table
dino/storage_tokens                                      1x4x8   table
flamingo/frame_embs                                      6x8     table
flamingo/media_time_embs                                 4x1x8   table
mae/decoder_pos_embed                                    1x17x8  table
mae/mask_token                                           1x1x8   table
net/class_token                                          1x1x8   table
net/cls                                                  1x1x8   table
net/cls_pos                                              1x8     table
net/norm/weight                                          8       vector
net/pe                                                   16x8    table
net/pos_emb                                              16x8    table
net/pos_enc                                              16x8    table
net/position_encoding                                    16x8    table
net/positional_encoding                                  1x16x8  table
net/up/kernel                                            8x32    0|1
perceiver/embeddings/latents                             6x8     table
prefix/prompt_embeddings                                 6x8     table
ptuning/prompt                                           6x8     table
ptuning/soft_prompt                                      6x8     table
qformer/query_tokens                                     1x6x8   table
resampler/latents                                        1x6x8   table
sam/image_encoder/blocks/0/attn/rel_pos_h                13x4    table
sam/image_encoder/blocks/0/attn/rel_pos_w                13x4    table
sam/image_encoder/pos_embed                              1x4x4x8 table
sam/mask_decoder/iou_token/weight                        1x8     table
sam/mask_decoder/mask_tokens/weight                      4x8     table
sam/prompt_encoder/not_a_point_embed/weight              1x8     table
sam/prompt_encoder/point_embeddings/0/weight             1x8     table
swin/absolute_pos_embed                                  1x16x8  table
swin/layers/0/blocks/0/attn/relative_position_bias_table 9x2     table
swin/layers/0/downsample/reduction/weight                16x32   1|0
swin2/layers/0/blocks/0/attn/logit_scale                 2x1x1   vector
t5gemma/learned_queries                                  6x8     table
wav2vec2/masked_spec_embed                               8       vector
xl/layers/0/r_w_bias                                     2x4     vector
""",
}
