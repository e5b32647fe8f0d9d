"""What the names on the way to a parameter say: vector, embedding, output layer, attention ...

Names are compared by their words: `embed_tokens`, `EmbedTokens` and `embed.tokens` have the same.
A layer's own name is that of the module that has the leaf, or of the leaf itself where that is no
mere `kernel`, `w` or `weight`. Numbers in a list have no name.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Set

Parts = tuple[str, ...]


def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


_PLAIN = _set("kernel kernels w weight weights")
_VECTOR = _set(
    "bias biases scale scales gamma beta gain offset shift mean var variance std count "
    "temperature slope lambda lambdas alpha magnitude decay log"
)
# The biases of raw dictionaries: b, b1, b_in, b_ih, bq, bo.
_RAW_BIAS = re.compile(r"b\d*|b_(\d+|(?!proj|emb)[a-z]{1,5})|b[qkvo]|b(ih|hh)|g")
# RWKV's decays, bonuses and mixtures with the token before, one number a channel; its factors end
# in w1 and w2, and are five or so in one array where they make all mixtures.
_MIXTURE = re.compile(r"time_(mix|decay|first|faaaa|maa)(?!\w*_w\d$)\w*|r_k")
_SHORT_MIXTURE = re.compile(r"x_[rwkvag]|k_[ka]|[wav]0")
_FACTOR = re.compile(r"\w+_w\d")
_FACTORS = re.compile(r"time_\w+_w\d")
_NORM = _set("ln bn gn rms layernorm batchnorm groupnorm rmsnorm")
_EMBED = _set("emb embs wte wpe vocab vocabulary codebook codebooks table")
# An embedding followed by one of these is a layer that is applied to it.
_APPLIED = _set("proj projection dense linear mlp mapping fc out conv norm")
_LAYER = _set(
    "layer layers block blocks attention attn mlp ffn ff moe expert experts bottleneck cell "
    "attentions resnet resnets encoderblock decoderblock selfattention crossattention h"
)
_MLP = _set("up down gate ffn ff fc mlp wi w1 w2 w3 linear dense intermediate hidden")
_QUERY = _set("query queries key keys value values q k v wq wk wv wkv qkv kv")
_OUT = _set("out o wo output")
_STRONG_HEAD = _set("classifier unembed unembedding score lm_head embed_out")
_WEAK_HEAD = _set(
    "head heads output outputs out fc final readout predictions to_logits output_layer "
    "out_layer output_projection output_proj output_dense output_linear final_layer "
    "final_dense final_linear final_proj final_projection last_layer dense_out linear_out "
    "conv_out decoder_output qa_outputs seq_relationship proj_out"
)
_INPUT = _set(
    "stem patchify conv_init init_conv conv_stem stem_conv conv_in input_conv conv_input img_in "
    "txt_in"
)
# Learned positions; followed by one of `_NO_POSITION` or `_APPLIED` it is a layer.
_POSITION = _set("pos position positions positional relpos pe")
_NO_POSITION = _set("wise encoder net head query key value q k v bias")
_GRAPH = _set("graph gcn gat gnn sage message edge node")
_LEARNED = _set("learned learnable latent object output")


def parts_of(name: str) -> Parts:
    """Returns the names on a path; Haiku's and PyTorch's paths within one key count as well."""
    return tuple(part for part in re.split(r"[/.]", name) if part not in ("", "~"))


@functools.lru_cache(4096)
def words(part: str) -> tuple[str, ...]:
    """Returns the words of a name in lower case, and its numbers."""
    return tuple(
        word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", part)
    ) or (part,)


def is_plain(parts: Parts) -> bool:
    """Whether a leaf is called as the kernel of a layer is."""
    return not parts or words(parts[-1])[0] in _PLAIN


def is_kernel(parts: Parts) -> bool:
    """Whether a leaf is called as a kernel is, or as one of attention or an MLP."""
    return bool(parts) and (
        is_plain(parts) or _any(own(parts), _MLP | _QUERY | _OUT | {"conv"}) or is_einsum(parts)
    )


def has_outputs_first(parts: Parts) -> bool:
    """Whether a leaf is called as PyTorch and Equinox call kernels: `weight`, `in_proj_weight`."""
    found = words(parts[-1]) if parts else ("",)
    return "weight" in (found[0], found[-1])


def own(parts: Parts) -> str:
    """Returns the name of the layer that a leaf belongs to, or "" if it has none."""
    named = [part for part in _modules(parts) if not part.isdigit()]
    return named[-1] if named else ""


def is_vector(parts: Parts) -> bool:
    """Whether a leaf is called bias, scale or the like, or belongs to a normalisation."""
    if not parts:
        return False
    leaf = parts[-1]
    # PyTorch's `weight_norm` keeps the lengths of a kernel's rows beside it.
    if _MIXTURE.fullmatch(leaf) or leaf == "weight_g" or words(leaf)[-1] in ("bias", "biases"):
        return True
    if _any(leaf, _VECTOR) and not (
        _any(leaf, _APPLIED | {"kernel", "net"}) or _FACTOR.fullmatch(leaf) or _is_bias_table(leaf)
    ):
        return True
    if may_be_bias(parts) and (is_norm(own(parts)) or _any(own(parts), _VECTOR)):
        return True
    if words(leaf)[0] in ("weight", "weights", "w"):
        return is_norm(own(parts))
    return is_norm(leaf)


def is_mixture(parts: Parts, siblings: Set[str]) -> bool:
    """Whether a leaf is one of RWKV's mixtures, also by the short names of its seventh version."""
    if not parts:
        return False
    beside = "r_k" in siblings or {"key", "value"} <= siblings
    return bool(_MIXTURE.fullmatch(parts[-1])) or (
        beside and bool(_SHORT_MIXTURE.fullmatch(parts[-1]))
    )


def are_factors(parts: Parts) -> bool:
    """Whether a leaf with three axes is several of RWKV's factors, inputs before outputs."""
    return bool(parts) and bool(_FACTORS.fullmatch(parts[-1]))


def is_second_factor(parts: Parts) -> bool:
    """Whether a layer gets from a latent to the heads, as in DeepSeek's attention."""
    return words(own(parts) or "-")[-1] == "b" and is_query(parts)


def may_be_bias(parts: Parts) -> bool:
    """Whether a leaf is called `b` or alike, as biases beside a `w` are, and other things too."""
    return bool(parts) and bool(_RAW_BIAS.fullmatch(parts[-1]))


def is_norm(part: str) -> bool:
    """Whether a name is that of a normalisation."""
    found = words(part)
    return any("norm" in word or word in _NORM for word in found) and not _any(
        part, {"proj", "linear", "dense", "mlp", "modulation", "kernel"}
    )


def mates(leaf: str) -> tuple[str, ...]:
    """Returns what the kernel beside a bias may be called."""
    if leaf.startswith("bias"):
        return "kernel" + leaf[4:], "weight" + leaf[4:], "w" + leaf[4:]
    if leaf == "1":  # of a pair without names
        return ("0",)
    if leaf.endswith("_bias"):
        stem = leaf.removesuffix("_bias")
        return f"{stem}_weight", f"{stem}_kernel", f"{stem}_w", stem
    return ("w" + leaf[1:], "weight", "kernel") if leaf.startswith("b") else ()


def is_table(parts: Parts) -> bool:
    """Whether a leaf is a table of embeddings, of positions or of tokens that are learned."""
    if not parts:
        return False
    leaf, name = parts[-1], own(parts)
    # A kernel with the name of what is learned is applied to it.
    if not is_plain(parts) and (_embeds(leaf) or _is_learned(leaf)):
        return True
    if words(leaf)[0] in ("weight", "embedding", "embeddings") and _is_learned(name):
        return True
    if _any(name, {"bias"}) and _any(name, {"relative", "rel", "relpos", "pos", "position"}):
        return True
    return _embeds(name) or (name == "shared" and not in_layer(parts))


def is_input(parts: Parts, window: bool = False) -> bool:
    """Whether a layer makes the first features: a patch embedding, the stem of a CNN.

    Args:
      parts: names on the path.
      window: whether it is a convolution over two axes or more.
    """
    near = [part for part in _modules(parts) if not part.isdigit()][-3:]
    patches = any(
        _any(part, {"patch", "patches"})
        and (_any(part, {"proj", "conv", "projection"}) or any("embed" in w for w in words(part)))
        for part in near
    )
    embeds = window and not in_layer(parts) and any(map(_embeds, near))
    # The first layer of CLIP's images, as its authors call it.
    embeds = embeds or (own(parts) == "conv1" and _sees(parts))
    return patches or embeds or own(parts).lower() in _INPUT


def is_head(parts: Parts, siblings: Iterable[str] = (), stacked: bool = False) -> bool:
    """Whether a layer is the output layer of a model.

    Args:
      parts: names on the path.
      siblings: names beside the layer's own.
      stacked: whether there is one for each layer of a stack.
    """
    modules = _modules(parts)
    if not modules:
        return False
    name, siblings = own(parts), set(siblings)
    if name == "head" and modules[-2:-1] == ("shared_head",):  # of DeepSeek's later tokens
        return True
    if in_layer(parts):
        return False
    found = set(words(name))
    if any(word in ("pre", "scale") for word in found):
        return False
    above = [part for part in modules if not part.isdigit()][:-1]
    parent = above[-1] if above else ""
    if parent and words(parent)[-1] == "in":  # the embedding of a time or a vector
        return False
    # What puts CLIP's images and texts into one space.
    joint = {"visual_projection", "text_projection", "vision_projection", "image_projection"}
    if name in joint or (name == "proj" and _sees(parts)):
        return True
    if _strong(name) or (name == "decoder" and parent in ("predictions", "lm_head")):
        # Of several layers in a list, the last.
        numbers = [int(s) for s in siblings if s.isdigit()] if modules[-1].isdigit() else []
        return not numbers or int(modules[-1]) == max(numbers)
    if stacked or {"query", "key", "query_proj", "q_proj", "q", "to_q"} & siblings:
        return False
    weak = name.lower() in _WEAK_HEAD or ("head" in found and not found & {"multi", "attention"})
    generic = name.lower() in ("dense", "linear", "fc", "proj", "kernel", "layer")
    inherited = parent.lower() in _WEAK_HEAD - {"out", "fc"} or _strong(parent)
    return weak or (generic and inherited)


def in_layer(parts: Parts) -> bool:
    """Whether a layer is inside of a block of layers, and so a hidden one."""
    above = [part for part in _modules(parts) if not part.isdigit()][:-1]
    # The `final_layer` of a model is not one of its layers.
    return any(_any(part, _LAYER) and part.lower() not in _WEAK_HEAD for part in above)


def is_gate(parts: Parts) -> bool:
    """Whether a leaf itself is called a gate, as the factors of residuals are."""
    return bool(parts) and _any(parts[-1], {"gate", "gates"})


def expert(parts: Parts) -> Parts | None:
    """Returns the path down to the experts that a leaf belongs to, or None."""
    for index, part in enumerate(parts):
        if _any(part, {"expert", "experts", "moe"}) and "shared" not in words(part):
            return parts[: index + 1]
    return None


def is_convolution(parts: Parts) -> bool:
    """Whether a layer is called a convolution."""
    return any("conv" in word for word in words(own(parts)))


def is_depthwise(parts: Parts) -> bool:
    """Whether a layer is called a depthwise convolution."""
    return any("depthwise" in word or word in ("dw", "dwconv") for word in words(own(parts)))


def is_pointwise(parts: Parts) -> bool:
    """Whether a layer called a convolution has no window, or that of a graph."""
    found = words(own(parts))
    return not _GRAPH.isdisjoint(found) or any(w.startswith(("pw", "pointwise")) for w in found)


def is_query(parts: Parts) -> bool:
    """Whether a layer makes queries, keys or values."""
    return _any(own(parts), _QUERY)


def is_out(parts: Parts) -> bool:
    """Whether a layer puts the heads of attention together."""
    name = own(parts)
    return _any(name, _OUT) or name == "attn_vec_einsum"


def is_einsum(parts: Parts) -> bool:
    """Whether a kernel stands in an einsum of Gemma, heads first."""
    return own(parts).endswith("_einsum")


def is_mlp(parts: Parts) -> bool:
    """Whether a layer is a dense one from its name, with one axis of inputs and one of outputs."""
    inside = any(_any(part, {"mlp", "ffn", "ff"}) for part in _modules(parts))
    return (inside or _any(own(parts), _MLP)) and not (is_convolution(parts) or is_einsum(parts))


def is_dense(parts: Parts) -> bool:
    """Whether a layer is called as a dense one, which a convolution is not."""
    return _any(own(parts), {"dense", "linear", "mlp", "ffn", "fc", "wi"})


def _modules(parts: Parts) -> Parts:
    return parts[:-1] if is_plain(parts) or is_vector_leaf(parts) else parts


def is_vector_leaf(parts: Parts) -> bool:
    """Whether the last name alone is that of a bias or a scale."""
    return bool(parts) and (_any(parts[-1], _VECTOR) or may_be_bias(parts))


def _embeds(part: str) -> bool:
    found = words(part)
    return (
        any("embed" in word or word in _EMBED for word in found)
        and not any("unembed" in word for word in found)
        and not set(found) & _APPLIED
    )


def _is_learned(part: str) -> bool:
    """Whether a name is that of learned positions, tokens, prompts or latents."""
    found = words(part)
    if found[-1] in ("token", "tokens", "prompt", "prompts", "latent", "latents"):
        return True
    if part in ("cls", "probe") or _is_bias_table(part):
        return True
    if found[-1] == "queries" and found[0] in _LEARNED:
        return True
    return _any(part, _POSITION) and (
        not _any(part, _APPLIED | _NO_POSITION) or part == "query_pos"
    )


def _is_bias_table(part: str) -> bool:
    return _any(part, {"bias"}) and words(part)[-1] == "table"


def _sees(parts: Parts) -> bool:
    """Whether a layer stands at the top of a model of images."""
    above = [part for part in _modules(parts) if not part.isdigit()][:-1]
    return bool(above) and above[-1] in ("visual", "vision_model")


def _strong(part: str) -> bool:
    found = words(part)
    return (
        part.lower() in _STRONG_HEAD
        or any("logit" in word or "unembed" in word for word in found)
        or "classifier" in found
    ) and "pre" not in found


def _any(part: str, chosen: Set[str]) -> bool:
    return not chosen.isdisjoint(words(part))
