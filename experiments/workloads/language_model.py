"""Character-level transformer language model on the text of Python's documentation topics.

The model is a pre-norm causal decoder without biases: learned positions, RMSNorm, GELU, an
output head that is not tied to the embedding. The last tenth of the text is held out.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.harness import UserError
from experiments.harness.workload import Workload, parameter_count

HELD_OUT = 0.1
VALIDATION_WINDOWS = 128


@dataclass(frozen=True)
class Size:
    """Shape of one model; about `12 * layers * width**2` parameters."""

    layers: int
    width: int
    heads: int
    context: int
    batch_size: int
    learning_rate: float  # for optax.adamw; falls with the width, as is usual


SIZES = {
    "0.15M": Size(3, 64, 2, 64, 16, 6e-3),
    "1M": Size(5, 128, 4, 128, 16, 3e-3),
    "10M": Size(8, 320, 5, 256, 32, 2e-3),
    "30M": Size(10, 512, 8, 256, 32, 1.5e-3),
    "100M": Size(14, 768, 12, 512, 32, 1e-3),
}
STEPS = 400


class Block(nnx.Module):
    """Pre-norm causal self-attention and a feed-forward layer, each with a residual."""

    def __init__(
        self,
        size: Size,
        attention_fn: Callable[..., jax.Array],
        dot_general: Callable[..., jax.Array],
        rngs: nnx.Rngs,
    ):
        width = size.width
        # Both branches of all layers add to one stream: this keeps its variance near one.
        out_init = nnx.initializers.variance_scaling(0.5 / size.layers, "fan_in", "normal")

        def linear(n_in: int, n_out: int, init: nnx.Initializer | None = None) -> nnx.Linear:
            init = init or nnx.initializers.lecun_normal()
            return nnx.Linear(
                n_in, n_out, use_bias=False, kernel_init=init, dot_general=dot_general, rngs=rngs
            )

        self.heads, self.attention_fn = size.heads, attention_fn
        self.attention_norm = nnx.RMSNorm(width, rngs=rngs)
        self.query, self.key, self.value = (linear(width, width) for _ in range(3))
        self.out = linear(width, width, out_init)
        self.mlp_norm = nnx.RMSNorm(width, rngs=rngs)
        self.up = linear(width, 4 * width)
        self.down = linear(4 * width, width, out_init)

    def __call__(self, x: jax.Array) -> jax.Array:  # [batch, time, width]
        batch, time, width = x.shape
        normed = self.attention_norm(x)
        split = (batch, time, self.heads, width // self.heads)
        q, k, v = (f(normed).reshape(split) for f in (self.query, self.key, self.value))
        x = x + self.out(self.attention_fn(q, k, v, is_causal=True).reshape(x.shape))
        return x + self.down(nnx.gelu(self.up(self.mlp_norm(x))))


class LanguageModel(nnx.Module):
    """Decoder-only transformer from characters [batch, time] to logits [batch, time, vocabulary].

    Args:
      size: shape of the model.
      vocabulary: number of different characters.
      attention_fn: called as `attention_fn(q, k, v, is_causal=True)` on [batch, time, heads, head
        size]; default `jax.nn.dot_product_attention`.
      dot_general: called as `jax.lax.dot_general` for all products with weights.
      rngs: source of the initial weights.
    """

    def __init__(
        self,
        size: Size,
        vocabulary: int,
        *,
        attention_fn: Callable[..., jax.Array] = jax.nn.dot_product_attention,
        dot_general: Callable[..., jax.Array] = jax.lax.dot_general,
        rngs: nnx.Rngs,
    ):
        self.embed = nnx.Embed(vocabulary, size.width, rngs=rngs)
        self.position = nnx.Embed(size.context, size.width, rngs=rngs)
        self.blocks = nnx.List(
            [Block(size, attention_fn, dot_general, rngs) for _ in range(size.layers)]
        )
        self.norm = nnx.RMSNorm(size.width, rngs=rngs)
        self.head = nnx.Linear(
            size.width, vocabulary, use_bias=False, dot_general=dot_general, rngs=rngs
        )

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens) + self.position(jnp.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def read_text(path: str | None, option: str = "--text") -> str:
    """The user's text, or the documentation topics that every CPython carries."""
    if path is None:
        topics = importlib.import_module("pydoc_data.topics").topics
        return "\n\n".join(topics[name] for name in sorted(topics))
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{option} {path}: cannot be read as UTF-8 text ({error})") from error
    if not text.strip():
        raise UserError(f"{option} {path}: the file is empty; expected text to train on")
    return text


def language_model(
    size: str = "0.15M",
    text: str | None = None,
    batch_size: int | None = None,
    dot_general: Callable[..., jax.Array] = jax.lax.dot_general,
) -> Workload:
    """Next-character prediction; the loss is the mean cross-entropy in nats per character.

    Args:
      size: a name in `SIZES`.
      text: path of a UTF-8 file; default the documentation topics of this Python.
      batch_size: windows per step; default that of the size.
      dot_general: of all products with weights, for instance in few bits.
    """
    if size not in SIZES:
        raise UserError(f"--size {size}: unknown; expected one of {', '.join(SIZES)}")
    characters = read_text(text)
    alphabet, tokens = np.unique(
        np.frombuffer(characters.encode("utf-32-le"), np.uint32), return_inverse=True
    )
    checksum = hashlib.sha256(characters.encode("utf-8")).hexdigest()
    return workload_of_tokens(
        size, tokens, len(alphabet), checksum, f"--text {text}", batch_size, dot_general
    )


def workload_of_tokens(
    size: str,
    tokens: np.ndarray,
    vocabulary: int,
    checksum: str,
    source: str,
    batch_size: int | None = None,
    dot_general: Callable[..., jax.Array] = jax.lax.dot_general,
) -> Workload:
    """As `language_model`, for a text that is numbers already.

    Args:
      size: a name in `SIZES`.
      tokens: the text, numbers below `vocabulary`.
      vocabulary: number of different characters.
      checksum: of the text.
      source: where the text is from, for messages.
      batch_size: windows per step; default that of the size.
      dot_general: of all products with weights.
    """
    shape = SIZES[size]
    batch_size = batch_size or shape.batch_size
    tokens = tokens.astype(np.int32)
    held_out = int(len(tokens) * HELD_OUT)
    if held_out <= shape.context:
        raise UserError(
            f"{source}: {len(tokens)} characters are too few for --size {size}; its context "
            f"of {shape.context} needs at least {int((shape.context + 1) / HELD_OUT) + 1}"
        )
    windows = _spread_windows(tokens[-held_out:], shape.context)
    data = {"train": jnp.asarray(tokens[:-held_out]), "validation": jnp.asarray(windows)}

    def build(rngs: nnx.Rngs) -> LanguageModel:
        return LanguageModel(shape, vocabulary, dot_general=dot_general, rngs=rngs)

    graph, abstract = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))), nnx.Param)

    @jax.jit
    def init(key: jax.Array) -> optax.Params:
        return nnx.to_pure_dict(nnx.state(build(nnx.Rngs(key)), nnx.Param))

    def sample(data: dict[str, jax.Array], key: jax.Array) -> jax.Array:
        last = data["train"].shape[0] - shape.context
        start = jax.random.randint(key, (batch_size, 1), 0, last)
        return data["train"][start + jnp.arange(shape.context + 1)]

    def loss(params: optax.Params, windows: jax.Array) -> jax.Array:
        logits = nnx.merge(graph, params)(windows[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()

    def validation_loss(params: optax.Params, data: dict[str, jax.Array]) -> jax.Array:
        per_window = jax.lax.map(
            lambda window: loss(params, window[None]), data["validation"], batch_size=batch_size
        )
        return per_window.mean()

    identity = {
        "workload": "language_model",
        "size": size,
        "parameters": parameter_count(abstract),
        "vocabulary": vocabulary,
        "context": shape.context,
        "batch_size": batch_size,
        "characters": len(tokens),
        "text_sha256": checksum,
    }
    return Workload(
        "language_model", "nats per character", identity, shape.learning_rate, STEPS, data,
        init, sample, loss, validation_loss,
    )  # fmt: skip


def _spread_windows(tokens: np.ndarray, context: int) -> np.ndarray:
    """At most `VALIDATION_WINDOWS` evenly spread windows of context + 1 tokens."""
    count = min(VALIDATION_WINDOWS, (len(tokens) - 1) // context)
    starts = np.linspace(0, len(tokens) - context - 1, count).astype(np.int64)
    return tokens[starts[:, None] + np.arange(context + 1)]
