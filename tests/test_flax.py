"""Nodes of states go through `flax.serialization`, whichever of the two is imported first."""

from __future__ import annotations

import dataclasses
import importlib.util
import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization

import jaxopt_lab
from jaxopt_lab import _flax, adapters

ROOT = pathlib.Path(__file__).parents[1]
PROGRAM = """
import sys
{imports}
import jax, jax.numpy as jnp
params = {{"w": jnp.ones((8, 6)), "b": jnp.ones(6)}}
tx = jaxopt_lab.frugal_adamw(1e-3, 0.5)
state = tx.init(params)
{later}
assert not any(type(finder).__module__ == "jaxopt_lab._flax" for finder in sys.meta_path)
found = serialization.from_bytes(tx.init(params), serialization.to_bytes(state))
assert jax.tree.structure(found) == jax.tree.structure(state)
"""


@pytest.mark.parametrize(
    ("imports", "later"),
    [
        ("from flax import serialization; import jaxopt_lab", ""),
        ("import jaxopt_lab; from flax import serialization", ""),
        ("import jaxopt_lab; assert 'flax' not in sys.modules", "from flax import serialization"),
        ("import jaxopt_lab", "import flax.linen; from flax import serialization"),
    ],
    ids=["flax first", "flax second", "flax after init", "flax as a whole"],
)
def test_order_of_imports_does_not_matter(imports, later):
    program = PROGRAM.format(imports=imports, later=later)
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_finders_that_ask_all_others_find_the_module():
    here, there = _flax._Finder(), _flax._Finder()
    found = sys.modules.pop(_flax._MODULE)
    sys.meta_path[:0] = [here, there]
    try:
        spec = importlib.util.find_spec(_flax._MODULE)
        assert spec is not None
        assert spec.origin == found.__file__
    finally:
        sys.modules[_flax._MODULE] = found
        for finder in (here, there):
            sys.meta_path.remove(finder)


def test_base_of_adapters():
    params = {"up": {"kernel": jnp.ones((4, 6))}}
    config = adapters.LoraConfig(r=2, target_modules="all-linear")
    base, _ = adapters.init_adapters(params, config, jax.random.key(0))
    moved = jax.tree.map(lambda x: 2 * x, base)
    found: Any = serialization.from_bytes(base, serialization.to_bytes(moved))
    assert jax.tree.structure(found) == jax.tree.structure(base)
    np.testing.assert_array_equal(found.params["up"]["kernel"], 2 * params["up"]["kernel"])


@dataclasses.dataclass(frozen=True)
class Node:
    arrays: dict[str, jax.Array]
    rank: int


_flax.register(Node, ["arrays"], made_with=lambda node: f"rank {node.rank}")


def test_what_is_not_saved_comes_from_the_target_and_must_agree():
    saved = serialization.to_bytes({"x": Node({"a": jnp.ones(3)}, 2)})
    found = serialization.from_bytes({"x": Node({"a": jnp.zeros(3)}, 2)}, saved)["x"]
    assert found.rank == 2
    np.testing.assert_array_equal(found.arrays["a"], np.ones(3))
    with pytest.raises(ValueError, match=r"Node at './x'.*other settings .* which has rank 4"):
        serialization.from_bytes({"x": Node({"a": jnp.zeros(3)}, 4)}, saved)
    with pytest.raises(ValueError, match=r"Node at '.' needs the entries .*'made_with'"):
        serialization.from_state_dict(Node({}, 2), {"arrays": {}})


def test_every_subspace_rule_is_restored_bit_for_bit():
    params = {"w": jnp.linspace(-1, 1, 48).reshape(8, 6), "b": jnp.ones(6)}
    for tx in (
        jaxopt_lab.frugal_adamw(1e-3, 0.5),
        jaxopt_lab.galore_adamw(1e-3, 2),
        jaxopt_lab.badam(1e-3),
        jaxopt_lab.dct_adamw(1e-3, 2),
    ):
        update = jax.jit(tx.update)
        _, state = update(params, tx.init(params), params)
        found = serialization.from_bytes(tx.init(params), serialization.to_bytes(state))
        assert jax.tree.structure(found) == jax.tree.structure(state)
        jax.tree.map(np.testing.assert_array_equal, found, state)
        jax.tree.map(
            np.testing.assert_array_equal,
            update(params, found, params),
            update(params, state, params),
        )
