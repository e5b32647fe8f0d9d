"""A running optimizer goes into compact state and out of it, and goes on where it was."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from orbax.checkpoint import v1 as ocp

import jaxopt_lab
from jaxopt_lab import quantization
from jaxopt_lab.quantization import decode_state, encode_state

PARAMS = {"w": jnp.linspace(-1, 1, 512).reshape(16, 32), "b": jnp.ones(16)}
CODECS = {
    "linear": quantization.int8(16, "linear"),
    "dynamic": quantization.int8(16),
    "bfloat16": quantization.bfloat16(),
}


def around(adamw: Any) -> Any:
    """A chain whose second link keeps moments."""
    return optax.chain(optax.clip_by_global_norm(1.0), adamw)


ADAMW = optax.adamw(1e-2)
PLAIN = around(ADAMW)


def compact(name, **options) -> Any:
    return around(quantization.quantize_state(ADAMW, CODECS[name], **({"min_size": 64} | options)))


def run(tx, state, steps=3, params=PARAMS) -> Any:
    update = jax.jit(tx.update)
    for _ in range(steps):
        updates, state = update(jax.tree.map(jnp.cos, params), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("name", CODECS)
def test_there_and_back(name):
    tx = compact(name)
    state = run(tx, tx.init(PARAMS))[1]
    plain = decode_state(tx, state, PARAMS)
    assert jax.tree.structure(plain) == jax.tree.structure(PLAIN.init(PARAMS))
    again = encode_state(tx, plain, PARAMS)
    # The values are those that codes stand for, so that the same codes come back: nothing is lost,
    # random bits included, which go on from the rule's own count.
    assert jax.tree.structure(again) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, again, state)
    jax.tree.map(np.testing.assert_array_equal, run(tx, again), run(tx, state))


def test_a_run_goes_on():
    """What the codes round is all that changes: below that, the path is the plain one."""
    tx, (params, state) = compact("dynamic"), run(PLAIN, PLAIN.init(PARAMS), 5)
    found = encode_state(tx, state, params)
    assert found[1].inner_state[0].count == found[1].count == 5
    np.testing.assert_array_equal(found[1].inner_state[0].mu["b"], state[1][0].mu["b"])
    decoded = decode_state(tx, found, params)[1][0]
    for field in ("mu", "nu"):
        got, wanted = getattr(decoded, field)["w"], getattr(state[1][0], field)["w"]
        # Cells of the dynamic code are at most a 28th of their number's size near a block's top,
        # and its blocks of 16 neighbours span less than a decade here.
        np.testing.assert_allclose(got, wanted, rtol=0.1, atol=1e-3 * float(jnp.abs(wanted).max()))
    ours, exact = run(tx, found, 3, params)[0], run(PLAIN, state, 3, params)[0]
    moved = jnp.linalg.norm(exact["w"] - params["w"])
    assert jnp.linalg.norm(ours["w"] - exact["w"]) < 0.05 * moved
    np.testing.assert_array_equal(ours["b"], exact["b"])


# Which it says of one device too.
@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_from_a_checkpoint_without_the_structure(tmp_path):
    params, state = run(PLAIN, PLAIN.init(PARAMS))
    ocp.save(tmp_path / "plain", state)
    restored = ocp.load(tmp_path / "plain")
    tx = compact("dynamic")
    found = encode_state(tx, restored, params)
    jax.tree.map(np.testing.assert_array_equal, found, encode_state(tx, state, params))


def test_orbax_restores_a_compact_state(tmp_path):
    tx = compact("dynamic")
    _, state = run(tx, tx.init(PARAMS))
    ocp.save(tmp_path / "state", state)
    restored = ocp.load(tmp_path / "state", tx.init(PARAMS))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, run(tx, restored), run(tx, state))


def test_in_any_wrapper_and_under_jit():
    def wrapped(tx):
        masked = optax.masked(tx, {"w": True, "b": False})
        return optax.MultiSteps(masked, 2).gradient_transformation()

    tx, plain = wrapped(compact("linear")), wrapped(PLAIN)
    state = run(plain, plain.init(PARAMS))[1]
    found = jax.jit(lambda state: encode_state(tx, state, PARAMS))(state)
    shapes = jax.eval_shape(tx.init, PARAMS)
    assert jax.tree.structure(found) == jax.tree.structure(shapes)
    for leaf, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(shapes)):
        assert (leaf.shape, leaf.dtype) == (wanted.shape, wanted.dtype)
    back = decode_state(tx, found, PARAMS)
    assert jax.tree.structure(back) == jax.tree.structure(state)


def test_a_plain_state_is_refused_with_the_way_in():
    step = quantization.fused_step(ADAMW, CODECS["dynamic"])
    tx = quantization.quantize_state(ADAMW, CODECS["dynamic"])
    for update in (tx.update, step):
        with pytest.raises(TypeError, match=r"QuantizedState, got tuple.*encode_state\(tx, state"):
            update(PARAMS, ADAMW.init(PARAMS), PARAMS)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (lambda: compact("linear"), "encoded by .*'dynamic'.* encodes it by .*'linear'"),
        (lambda: compact("bfloat16"), "encoded by .*'dynamic'.* encodes it by Bfloat16"),
        (lambda: compact("dynamic", min_size=1), "'0/mu/b' is exact, but .* encodes it by Int8"),
        (lambda: compact("dynamic", min_size=9999), "'0/mu/w' is encoded .* keeps it exact"),
        (
            lambda: around(quantization.quantize_state(ADAMW, quantization.int8(32), min_size=64)),
            "block_size=16.* encodes it by .*block_size=32",
        ),
        (
            lambda: around(
                quantization.quantize_state(ADAMW, quantization.int8(16, signed=True), min_size=64)
            ),
            "'0/nu/w' .*signed=False.* encodes it by .*signed=True",
        ),
    ],
    ids=["code", "codec", "smaller min_size", "larger min_size", "block size", "sign"],
)
def test_the_state_of_other_options_is_refused(other, said):
    tx = compact("dynamic")
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match=f"state leaf .*{said}"):
        jax.eval_shape(other().update, PARAMS, state, PARAMS)
    with pytest.raises(ValueError, match=f"state leaf .*{said}"):
        decode_state(other(), state, PARAMS)


def test_another_seed_is_no_other_state():
    tx = compact("bfloat16")
    compact("bfloat16", seed=7).update(PARAMS, tx.init(PARAMS), PARAMS)


def test_refusals():
    tx, state = compact("dynamic"), PLAIN.init(PARAMS)
    with pytest.raises(ValueError, match="'1/0/mu/b' is missing"):
        encode_state(tx, PLAIN.init({"w": PARAMS["w"]}), PARAMS)
    with pytest.raises(ValueError, match="'1/0/mu/c' is not expected"):
        encode_state(tx, PLAIN.init(PARAMS | {"c": jnp.ones(2)}), PARAMS)
    with pytest.raises(ValueError, match=r"'1/0/mu/b' has shape \(3,\).* of shape|shape \(16,\)"):
        encode_state(tx, PLAIN.init(PARAMS | {"b": jnp.ones(3)}), PARAMS)
    with pytest.raises(ValueError, match="encoded already"):
        encode_state(tx, tx.init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match="no quantize_state"):
        encode_state(PLAIN, state, PARAMS)
    with pytest.raises(ValueError, match="made by another transformation"):
        decode_state(tx, state, PARAMS)
    lion = around(quantization.quantize_state(jaxopt_lab.lion(1e-3), CODECS["dynamic"]))
    with pytest.raises(ValueError, match="another transformation"):
        decode_state(lion, tx.init(PARAMS), PARAMS)
    with pytest.raises(TypeError, match=r"tx must be an optax\.Gradient.* call it first"):
        encode_state(optax.adamw, state, PARAMS)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="seed must be an integer"):
        encode_state(tx, state, PARAMS, seed=0.5)  # type: ignore[arg-type]
