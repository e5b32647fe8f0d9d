"""The steps that are timed, and which other step each is compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jaxopt_lab

Step = tuple[Callable[..., Any], Callable[..., Any]]  # init; parameters, state, gradients -> both

# Ours, each beside the step that its ratio is taken to.
RATIOS = {
    "optax.lion": "optax.adamw",
    "optax.adabelief": "optax.adamw",
    "lion": "optax.adamw",
    "adabelief": "optax.adamw",
    "exadam": "optax.adamw",
    "diffgrad": "optax.adamw",
    "adamp": "optax.adamw",
    "sgdp": "optax.adamw",
    "cautious_lion": "optax.adamw",
    "muon": "optax.contrib.muon",
    "frugal_adamw": "optax.adamw",
    "badam": "optax.adamw",
    "dct_adamw": "optax.adamw",
    "int8_linear_adamw": "optax.adamw",
    "int8_dynamic_adamw": "optax.adamw",
    "fused_int8_linear_adamw": "optax.adamw",
    "fused_int8_dynamic_adamw": "optax.adamw",
    "bfloat16_adamw": "optax.adamw",
    "products_of_dct": "optax.adamw",
    "products_of_galore": "optax.contrib.galore",
    "galore_adamw": "optax.contrib.galore",
    "galore_adamw_gram": "optax.contrib.galore",
    "galore_adamw_gram_128": "optax.contrib.galore_128",
}
GAP = 200  # steps between two refreshes of a projection

RATE = 1e-4
# Their rank is this part of the width; with it grow the two products of a step.
DCT_RANK, GALORE_RANK = 12, 4


def optimizers(width: int) -> dict[str, optax.GradientTransformation]:
    rate = RATE
    rank = width // GALORE_RANK
    gram = jaxopt_lab.subspace.svd(method="gram")
    quantize, quantization = jaxopt_lab.quantize_state, jaxopt_lab.quantization
    return {
        "optax.adamw": optax.adamw(rate),
        "optax.lion": optax.lion(rate),
        "optax.adabelief": optax.adabelief(rate),
        "lion": jaxopt_lab.lion(rate, weight_decay=1e-3),
        "adabelief": jaxopt_lab.adabelief(rate),
        "exadam": jaxopt_lab.exadam(rate),
        "diffgrad": jaxopt_lab.diffgrad(rate),
        "adamp": jaxopt_lab.adamp(rate, weight_decay=1e-3),
        "sgdp": jaxopt_lab.sgdp(rate, momentum=0.9, nesterov=True),
        "cautious_lion": optax.chain(
            jaxopt_lab.cautious(jaxopt_lab.scale_by_lion()),
            optax.add_decayed_weights(1e-3),
            optax.scale_by_learning_rate(rate),
        ),
        "optax.contrib.muon": optax.contrib.muon(
            rate, muon_weight_dimension_numbers=jaxopt_lab.muon_dimension_numbers
        ),
        "muon": jaxopt_lab.muon(rate),
        "frugal_adamw": jaxopt_lab.frugal_adamw(rate, update_gap=GAP),
        "badam": jaxopt_lab.badam(rate, update_gap=GAP),
        "dct_adamw": jaxopt_lab.dct_adamw(rate, rank=width // DCT_RANK, update_gap=GAP),
        "int8_linear_adamw": quantize(optax.adamw(rate), quantization.int8(code="linear")),
        "int8_dynamic_adamw": quantize(optax.adamw(rate), quantization.int8()),
        "bfloat16_adamw": quantize(optax.adamw(rate), quantization.bfloat16()),
        "optax.contrib.galore": optax.contrib.galore(rate, rank=rank, update_proj_gap=GAP),
        "galore_adamw": jaxopt_lab.galore_adamw(rate, rank, GAP),
        "galore_adamw_gram": jaxopt_lab.galore_adamw(rate, rank, GAP, projection=gram),
        "optax.contrib.galore_128": optax.contrib.galore(rate, rank=128, update_proj_gap=GAP),
        "galore_adamw_gram_128": jaxopt_lab.galore_adamw(rate, 128, GAP, projection=gram),
    }


# Steps that apply their updates themselves, by the optimizer that makes their state.
FUSED = {
    "fused_int8_linear_adamw": "int8_linear_adamw",
    "fused_int8_dynamic_adamw": "int8_dynamic_adamw",
}


def steps(width: int) -> dict[str, Step]:
    """Returns for each name its init, and its step from parameters, state and gradients."""

    def fused(name: str) -> Callable[..., Any]:
        codec = jaxopt_lab.quantization.int8(code="dynamic" if "dynamic" in name else "linear")
        step = jaxopt_lab.quantization.fused_step(optax.adamw(RATE), codec)
        return lambda params, state, grads: step(grads, state, params)

    def products(rank: int) -> Callable[..., Any]:
        """Projects each matrix and back, without a state and without choosing a subspace."""

        def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
            def move(p: jax.Array, g: jax.Array) -> jax.Array:
                if g.ndim < 2 or width not in g.shape:
                    return p
                basis = jnp.full((width, rank), 1e-3)
                if g.shape[0] == width:
                    return p - basis @ (basis.T @ g)
                return p - (g @ basis) @ basis.T

            return jax.tree.map(move, params, grads), state

        return step

    found = optimizers(width)
    bare = {"products_of_dct": width // DCT_RANK, "products_of_galore": width // GALORE_RANK}
    return (
        {name: separate(tx) for name, tx in found.items()}
        | {name: (found[base].init, fused(name)) for name, base in FUSED.items()}
        | {name: (optax.identity().init, products(rank)) for name, rank in bare.items()}
    )


def has_refresh(name: str) -> bool:
    return not name.startswith("products") and any(
        part in name for part in ("frugal", "badam", "dct", "galore")
    )


def separate(tx: optax.GradientTransformation) -> Step:
    """The step of an optimizer: its update, and the parameters with it applied."""

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return tx.init, step
