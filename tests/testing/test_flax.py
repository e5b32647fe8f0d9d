"""Flax's optimizers, train states and files around every wrapper that keeps a state of its own."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import jax
import optax
import pytest

import jaxopt_lab
from jaxopt_lab import quantization, subspace, testing

pytest.importorskip("flax")


def _quantized(codec: quantization.Codec) -> Callable[..., optax.GradientTransformation]:
    def make(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
        inner = optax.adamw(learning_rate)
        return jaxopt_lab.quantize_state(inner, codec, min_size=1)

    return make


def _quantized_rule(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    inner = jaxopt_lab.galore_adamw(learning_rate, rank=2, update_gap=2)
    return jaxopt_lab.quantize_state(inner, quantization.int8(4), min_size=1)


def _frugal(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    split = jaxopt_lab.frugal(
        optax.scale_by_adam(), None, subspace.svd(), 0.5, 2, error_feedback=True
    )
    return optax.chain(split, optax.scale_by_learning_rate(learning_rate))


def _two_groups(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    groups: dict[Hashable, optax.GradientTransformation] = {
        "matrix": jaxopt_lab.lion(learning_rate),
        "vector": optax.adam(learning_rate),
    }
    # A function: Flax hands over trees of its own.
    label = lambda leaf: "matrix" if leaf.ndim > 1 else "vector"  # noqa: E731
    return optax.partition(groups, lambda params: jax.tree.map(label, params))


def _recorded(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    return optax.chain(jaxopt_lab.record_norms("l2", 4), jaxopt_lab.adabelief(learning_rate))


def _logged(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    return jaxopt_lab.log_norms(optax.adamw(learning_rate), learning_rate)


WRAPPERS = {
    "int8": _quantized(quantization.int8(4)),
    "bfloat16": _quantized(quantization.bfloat16()),
    "int8 of galore": _quantized_rule,
    "frugal with error feedback": _frugal,
    "two groups": _two_groups,
    "record_norms": _recorded,
    "log_norms": _logged,
}
CHECKS = [check.name for check in testing.contract_checks() if check.group == "flax"]


# The rules themselves go through the whole contract, this group included.
@pytest.mark.slow
@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapper_goes_through_flax(name: str) -> None:
    report = testing.check_transform(WRAPPERS[name], 1e-2, checks=CHECKS, raise_on_failure=False)
    print(report)
    assert report.ok, str(report)
