"""What becomes of every leaf of the models that people have, against a list written by hand."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import jaxopt_lab
from jaxopt_lab import adapters, distributed
from tests.trees import built, models

RULES = {
    "muon": (jaxopt_lab.muon(0.02, adam_learning_rate=1e-3), "muon", "adam"),
    "adamp": (jaxopt_lab.adamp(1e-3), "adamp", "adam"),
    "sgdp": (jaxopt_lab.sgdp(1e-3), "sgdp", "sgd"),
    "frugal": (jaxopt_lab.frugal_adamw(1e-3, density=0.5), "split", "full"),
    "powersgd": (distributed.powersgd(1, "r", min_compression_rate=0), "powersgd", "mean"),
}


def tree(name: str) -> Any:
    return built.BUILT[name]() if name in built.BUILT else models.shapes(name)


def treated(line: models.Line, rule: str) -> bool:
    """Whether a rule treats a leaf as a matrix: hidden ones, or all whose axes are known."""
    hidden_only = rule in ("muon", "frugal")
    return line.kind == "matrix" or (not hidden_only and line.kind != "vector")


@pytest.mark.parametrize("name", models.MODELS)
def test_every_leaf_of_a_model_is_treated_as_what_it_is(name):
    params, expected = tree(name), {line.path: line for line in models.lines(name)}
    found = {rule: jaxopt_lab.treatments(tx, params) for rule, (tx, _, _) in RULES.items()}
    print(f"\n{name}")
    for index in range(len(expected)):
        row = [found[rule].parameters[index] for rule in RULES]
        path = row[0].name.removesuffix("/value")
        line = expected.pop(path)
        print(f"  {path:75s}{line.what:20s}" + " ".join(f"{one.kind:9s}" for one in row))
        for rule, one in zip(RULES, row):
            assert one.shape == line.shape
            _, matrix, other = RULES[rule]
            assert one.kind == (matrix if treated(line, rule) else other), (rule, path)
            if line.axes and treated(line, rule) and rule != "frugal":
                assert tuple(one.axes) == line.axes, (rule, path)
            if line.kind == "table" and rule in ("adamp", "powersgd"):
                # A row is a channel of AdamP's; it is an output of nothing.
                assert one.axes.output != one.axes.reduction
                assert (len(line.shape) - 1 in one.axes.reduction) == (rule == "adamp")
    assert not expected


@pytest.mark.parametrize("name", models.MODELS)
def test_all_linear_is_the_hidden_matrices(name):
    params = jax.tree.map(lambda x: jnp.zeros(x.shape), tree(name))
    config = adapters.LoraConfig(target_modules="all-linear", r=1)
    base, _ = adapters.init_adapters(params, config, jax.random.key(0))
    hidden = {line.path: line for line in models.lines(name) if line.kind == "matrix"}
    assert {kernel.name for kernel in base.kernels} == set(hidden)
    for kernel in base.kernels:
        assert tuple(kernel.axes) == hidden[kernel.name].axes, kernel.name


def test_a_model_is_the_same_in_every_container():
    """Boxes of nnx and Linen, flat keys of PyTorch, and plain dictionaries have one answer."""
    flat = {line.path: jnp.zeros(line.shape) for line in models.lines("nnx_transformer_scanned")}
    dotted = {path.replace("/", "."): x for path, x in flat.items()}
    trees = [tree("nnx_transformer_scanned"), models.shapes("nnx_transformer_scanned"), dotted]
    tx = jaxopt_lab.muon(0.02)
    found = [jaxopt_lab.treatments(tx, params).parameters for params in trees]
    kinds = [
        sorted(
            (one.name.removesuffix("/value").replace(".", "/"), one.kind, one.axes)
            for one in parameters
        )
        for parameters in found
    ]
    assert kinds[0] == kinds[1] == kinds[2]


def test_optax_muon_takes_what_muon_takes():
    params = jax.tree.map(lambda x: jnp.ones(x.shape), models.shapes("linen_transformer_scanned"))
    numbers = jaxopt_lab.muon_dimension_numbers
    tx = optax.contrib.muon(0.02, muon_weight_dimension_numbers=numbers)
    state: Any = tx.init(params)
    assert state.inner_states["muon"].inner_state[0].mu["head"]["kernel"] == optax.MaskedNode()
