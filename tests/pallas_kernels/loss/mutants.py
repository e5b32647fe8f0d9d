"""Wrong variants of cross-entropy, and whether the cases of `cases` catch them."""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile

import pallas_kernels
from tests import mutants
from tests.pallas_kernels.loss import cases


@dataclasses.dataclass(frozen=True)
class Mutant(mutants.Mutant):
    """One replacement in a file of `pallas_kernels/loss`, and features that must notice."""

    features: str  # joined by " and "
    package = pallas_kernels
    folder = "loss"

    def noticed_by(self) -> cases.Case:
        """Returns the case."""
        return next(case for case in cases.CASES if str(case) == self.features)

    def verdict(self) -> str:
        with tempfile.TemporaryDirectory() as folder:
            copied = self.imported(pathlib.Path(folder))
            try:
                cases.check(copied.cross_entropy, self.noticed_by())
            except (AssertionError, ValueError, TypeError):
                return "caught"
            return "survives"


MUTANTS = [
    # The running maximum and sum.
    Mutant(
        "chunked",
        "mass = jnp.exp(running.peak - shift) * running.mass",
        "mass = running.mass",
        "plain",
    ),
    Mutant("chunked", "running.peak + jnp.log(running.mass)", "jnp.log(running.mass)", "plain"),
    Mutant(
        "chunked",
        "return step(whole * block, rest, carry) if rest else carry",
        "return carry",
        "plain",
    ),
    Mutant("chunked", "lax.fori_loop(0, whole,", "lax.fori_loop(1, whole,", "plain"),
    Mutant("chunked", "picked = running.picked + jnp", "picked = jnp", "plain"),
    Mutant(
        "chunked",
        "total = total + weighted.sum(axis=-1)",
        "total = weighted.sum(axis=-1)",
        "label smoothing",
    ),
    Mutant(
        "chunked",
        "weighted = s if u is None else s * _of_classes(u, start, s.shape[-1], s)",
        "weighted = s",
        "label smoothing and class weights",
    ),
    # Logits.
    Mutant(
        "chunked",
        "s += _of_classes(operands.bias, start, size, s)",
        "s += _of_classes(operands.bias, 0, size, s)",
        "bias",
    ),
    Mutant(
        "chunked",
        "settings.soft_cap * jnp.tanh(s / settings.soft_cap)",
        "jnp.tanh(s / settings.soft_cap)",
        "soft cap",
    ),
    # Gradients.
    Mutant("chunked", "ds = cotangents.lse[..., None] * p", "ds = p", "plain"),
    Mutant("chunked", "cotangents.picked[..., None], 0)", "cotangents.lse[..., None], 0)", "plain"),
    Mutant("chunked", "ds += total if u is None", "ds -= total if u is None", "label smoothing"),
    Mutant(
        "chunked",
        "total * _of_classes(u, start, s.shape[-1], s)",
        "total",
        "label smoothing and class weights",
    ),
    Mutant("chunked", "1 - jnp.square(s / settings.soft_cap)", "1", "soft cap"),
    Mutant(
        "chunked", "1 - jnp.square(s / settings.soft_cap)", "1 - s / settings.soft_cap", "soft cap"
    ),
    Mutant("chunked", "found.hidden + product(", "product(", "plain"),
    Mutant(
        "chunked",
        "summed = dx.sum(axis=range(dx.ndim - 1))",
        "summed = dx.mean(axis=range(dx.ndim - 1))",
        "bias",
    ),
    Mutant(
        "chunked",
        "pair = (hidden, dx) if axis == 1 else (dx, hidden)",
        "pair = (dx, hidden)",
        "plain",
    ),
    Mutant("chunked", "    if not overwrite:\n", "    if False:\n", "gradient in forward"),
    # What a token costs.
    Mutant("tokens", "loss = rows.lse - rows.picked", "loss = rows.lse", "plain"),
    Mutant("tokens", "loss *= tokens.weights", "loss *= 1", "class weights"),
    Mutant("tokens", "(1 - part) * loss + part", "loss + part", "label smoothing"),
    Mutant("tokens", "part / settings.vocabulary * spread", "part * spread", "label smoothing"),
    Mutant(
        "tokens",
        "settings.vocabulary if tokens.total is None else tokens.total",
        "settings.vocabulary",
        "label smoothing and class weights",
    ),
    Mutant(
        "tokens", "settings.z_loss * jnp.square(rows.lse)", "settings.z_loss * rows.lse", "z-loss"
    ),
    Mutant(
        "tokens",
        "return x if tokens.counted is None else jnp.where(tokens.counted, x, 0)",
        "return x",
        "ignored",
    ),
    Mutant("tokens", "weights = tokens.weights\n", "weights = None\n", "class weights"),
    Mutant("arguments", "counted = labels != jnp", "counted = labels == jnp", "ignored"),
    Mutant("arguments", "return axis % 2", "return 1", "tied embedding"),
    # Gradients in the forward pass.
    Mutant(
        "core",
        "jax.tree.map(lambda x: cotangent * x, gradients)",
        "gradients",
        "gradient in forward",
    ),
    Mutant(
        "core",
        "of_rows = found._replace(hidden=",
        "of_rows = chunked.zeros(here, dtype, dtype)._replace(hidden=",
        "gradient in forward",
    ),
    Mutant(
        "core",
        "counted = split.apart(counted.reshape(-1), False)",
        "counted = split.apart(counted.reshape(-1), True)",
        "gradient in forward",
    ),
    Mutant(
        "core",
        "return total + vary(part, axes),",
        "return vary(part, axes),",
        "gradient in forward",
    ),
    Mutant(
        "core",
        "labels = split.apart(operands.labels.reshape(-1), -1)",
        "labels = split.apart(operands.labels.reshape(-1), 0)",
        "gradient in forward",
        same_function="what fills the last part up is not counted",
    ),
    Mutant(
        "core",
        "return lax.dynamic_index_in_dim(x, i, 1, keepdims=False)",
        "return lax.dynamic_index_in_dim(x, 0, 1, keepdims=False)",
        "gradient in forward",
    ),
]
