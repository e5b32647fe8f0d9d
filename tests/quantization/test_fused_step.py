"""The step in one pass: the numbers of `quantize_state`, and that it is one pass."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

import jaxopt_lab
from jaxopt_lab import quantization
from jaxopt_lab.quantization import _block_passes
from pallas_kernels import targets
from tests.pallas_kernels.targets import needs

# Whole blocks: 70 of them, or 3; the rows of the embedding end in a part of a block, which has no
# kernel; the bias is too small for a code.
PARAMS = {
    "kernel": 0.1 * jax.random.normal(jax.random.key(0), (35, 32)),
    "stack": 0.1 * jax.random.normal(jax.random.key(1), (3, 4, 4)),
    "embedding": 0.1 * jax.random.normal(jax.random.key(2), (8, 20)),
    "bias": jnp.ones(5),
}
ENCODED = {"kernel", "stack", "embedding"}
BLOCK = 16
CODECS = {
    "linear": quantization.int8(BLOCK, "linear"),
    "dynamic": quantization.int8(BLOCK),
    "unaligned": quantization.int8(12, "linear"),  # the rows of the kernel end in a part of a block
    "bfloat16": quantization.bfloat16(stochastic=False),
}
CLIPPED = optax.chain(
    optax.clip_by_global_norm(0.1), optax.adamw(optax.cosine_decay_schedule(1e-2, 10))
)
INNER = {
    "adamw": optax.adamw(1e-2, mask={name: name != "stack" for name in PARAMS}),
    "clipped": CLIPPED,
    "lion": jaxopt_lab.lion(1e-3, weight_decay=0.1),
    "adabelief": jaxopt_lab.adabelief(1e-3),
    "diffgrad": jaxopt_lab.diffgrad(1e-3),
    "exadam": jaxopt_lab.exadam(1e-3),
    "momentum": optax.sgd(1e-2, momentum=0.9, nesterov=True),
    "muon": jaxopt_lab.muon(1e-2),
}
OPTIONS: Any = {"min_size": 16, "seed": 3}


def gradients(params, t) -> Any:
    return jax.tree.map(lambda x: (0.1 * jnp.sin((t + 1) * x)).astype(x.dtype), params)


def trained(step, state, params=PARAMS, steps=4) -> Any:
    for t in range(steps):
        params, state = step(gradients(params, t), state, params)
    return params, state


def plain(inner, codec, **options) -> Any:
    tx = quantization.quantize_state(inner, codec, **(OPTIONS | options))

    @jax.jit
    def step(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return tx, step


def assert_close(found, expected):
    """Sums are rounded in another order, so that an entry between two codes gets the other."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if a.dtype in (jnp.int8, jnp.uint8):
            difference = np.abs(np.asarray(a, np.int32) - np.asarray(b, np.int32))
            assert difference.max(initial=0) <= 1
            assert np.mean(difference > 0) < 0.01
        else:
            # 100 units of float32 rounding: each of four steps rounds products and a quotient.
            np.testing.assert_allclose(
                np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=1e-5, atol=1e-6
            )


@pytest.mark.parametrize(
    ("inner", "codec", "implementation"),
    [
        *((name, "linear", "loop") for name in INNER),
        *(("adamw", "linear", name) for name in (None, "interpreted kernel", "whole")),
        ("adamw", "unaligned", "loop"),
        *(("clipped", "dynamic", name) for name in ("loop", "interpreted kernel")),
    ],
)
def test_a_step_is_update_and_apply_updates(inner, codec, implementation):
    tx, expected = plain(INNER[inner], CODECS[codec])
    step = quantization.fused_step(
        INNER[inner], CODECS[codec], implementation=implementation, **OPTIONS
    )
    state = tx.init(PARAMS)
    assert_close(trained(step, state), trained(expected, state))


@pytest.mark.parametrize("implementation", ["loop", "interpreted kernel"])
def test_parts_that_do_not_divide_the_rows(monkeypatch, implementation):
    """70 rows in turns of 32, and a rest; in a kernel's parts of the largest power that divides."""
    monkeypatch.setattr(_block_passes, "_LOOP_BLOCKS", 32)
    tx, expected = plain(INNER["adamw"], CODECS["linear"])
    step = quantization.fused_step(
        INNER["adamw"], CODECS["linear"], implementation=implementation, **OPTIONS
    )
    state = tx.init(PARAMS)
    assert_close(trained(step, state), trained(expected, state))


def scales_of(state, field, name):
    """Returns the scales that stand beside the codes of a moment."""
    paths = [str(path) for path, _ in jax.tree_util.tree_flatten_with_path(state.inner_state)[0]]
    (index,) = [i for i, path in enumerate(paths) if f"'{field}'" in path and name in path]
    return state.encoding[index].rest.scales


def loops(inner, codec, params=PARAMS, **options):
    """Returns how many loops a step has."""
    options = OPTIONS | options
    state = quantization.quantize_state(inner, codec, **options).init(params)
    step = quantization.fused_step(inner, codec, implementation="loop", **options)
    return str(jax.make_jaxpr(step)(params, state, params)).count(" scan[")


@pytest.mark.parametrize("inner", [name for name in INNER if name != "muon"])
def test_what_is_done_in_parts(inner):
    assert loops(INNER[inner], CODECS["linear"]) == len(ENCODED)


def test_what_is_not_done_in_parts():
    assert loops(INNER["adamw"], CODECS["bfloat16"]) == 0
    assert loops(INNER["adamw"], CODECS["linear"], min_size=10**6) == 0

    # Two moments in blocks of two sizes.
    def codec(path, leaf):
        return CODECS["linear"] if "/mu/" in path else quantization.int8(2 * BLOCK, "linear")

    assert loops(optax.adam(1e-2), codec) == 0


@pytest.mark.parametrize("implementation", ["loop", "interpreted kernel"])
def test_bfloat16_parameters_and_exact_leaves(implementation):
    """One moment in int8, the other as it is; gradients and parameters in 16 bits."""

    def codec(path, leaf):
        return CODECS["linear"] if "/mu/" in path else None

    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    inner = optax.adam(1e-2, mu_dtype=jnp.float32)
    tx, expected = plain(inner, codec)
    step = quantization.fused_step(inner, codec, implementation=implementation, **OPTIONS)
    state = tx.init(params)
    found, _ = trained(step, state, params)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(trained(expected, state, params)[0])):
        assert a.dtype == jnp.bfloat16
        # A unit in the last place of bfloat16 near 0.3.
        np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=0, atol=2**-9)


@pytest.mark.parametrize("implementation", ["loop", "interpreted kernel"])
@pytest.mark.parametrize("code", ["linear", "dynamic"])
def test_nan_infinity_and_zero_stay_in_their_block(code, implementation):
    codec = CODECS[code]
    tx, expected = plain(INNER["adamw"], codec)
    step = quantization.fused_step(INNER["adamw"], codec, implementation=implementation, **OPTIONS)
    grads = gradients(PARAMS, 0)
    grads["kernel"] = grads["kernel"].at[0, 3].set(jnp.nan).at[5, 20].set(jnp.inf).at[7].set(0)
    state = tx.init(PARAMS)
    found: list[Any] = [once(grads, state, PARAMS) for once in (step, expected)]
    (params, state), (wanted_params, wanted) = found
    bad = np.isnan(np.asarray(params["kernel"]))
    np.testing.assert_array_equal(bad, np.isnan(np.asarray(wanted_params["kernel"])))
    scales = scales_of(state, "mu", "kernel")
    assert np.argwhere(np.isnan(scales)).tolist() == [[0, 0]]
    assert np.argwhere(np.isinf(scales)).tolist() == [[5, 1]]
    assert np.all(np.asarray(scales)[7] == 0)
    assert_nan_equal(state, wanted)
    after: Any = step(gradients(PARAMS, 1), state, PARAMS)[0]
    assert np.isfinite(np.asarray(after["stack"])).all()
    assert np.isfinite(np.asarray(after["kernel"])[1:5]).all()


def assert_nan_equal(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        np.testing.assert_array_equal(np.isnan(np.float32(a)), np.isnan(np.float32(b)))


def test_takes_turns_with_quantize_state_and_resumes():
    tx, expected = plain(INNER["adamw"], CODECS["linear"])
    step = quantization.fused_step(INNER["adamw"], CODECS["linear"], **OPTIONS)
    turns = iter([step, expected, step, expected])
    state = tx.init(PARAMS)
    mixed = trained(lambda *args: next(turns)(*args), state)
    assert_close(mixed, trained(expected, state))
    whole = trained(step, state)
    copies = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), trained(step, state, steps=2))
    params, state = copies
    for t in (2, 3):
        params, state = step(gradients(params, t), state, params)
    for a, b in zip(jax.tree.leaves((params, state)), jax.tree.leaves(whole)):
        np.testing.assert_array_equal(a, b)


def test_extra_arguments_and_frozen_parameters():
    def update(updates, state, params=None, **extra_args: Any) -> Any:
        del params
        trace = jax.tree.map(lambda m, g: 0.5 * m + g, state.trace, updates)
        return jax.tree.map(lambda m: extra_args["factor"] * m, trace), optax.TraceState(trace)

    inner = optax.GradientTransformationExtraArgs(
        lambda params: optax.TraceState(jax.tree.map(jnp.zeros_like, params)), update
    )
    step = quantization.fused_step(inner, CODECS["linear"], **OPTIONS)
    state: Any = quantization.quantize_state(inner, CODECS["linear"], **OPTIONS).init(PARAMS)
    params, state = step(PARAMS, state, PARAMS, factor=0.0)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(PARAMS)):
        np.testing.assert_array_equal(a, b)
    codes = np.asarray(state.inner_state.trace["kernel"])
    assert np.any(codes != (0 if codes.dtype == np.int8 else 127))


def test_works_in_place():
    inner, codec = optax.adamw(1e-3), quantization.int8()
    params = {"kernel": jax.ShapeDtypeStruct((512, 1024), jnp.float32)}
    state = jax.eval_shape(quantization.quantize_state(inner, codec).init, params)
    step = jax.jit(quantization.fused_step(inner, codec), donate_argnums=(1, 2))
    program = step.lower(params, state, params).compile()
    memory: Any = program.memory_analysis()
    # A part of the operands, not an array: 64 blocks of 256 in float32 are 64 KiB.
    assert memory.temp_size_in_bytes < 1.5 * 2**20
    text = str(program.as_text())
    assert not re.search(r"\[2048,256\]\S* copy\(", text)
    assert not re.search(r"\[512,1024\]\S* copy\(", text)


def test_under_shard_map():
    """Each device has its part of the rows, and its own blocks."""
    mesh = jax.make_mesh((5,), ("rows",), (AxisType.Auto,), devices=jax.devices()[:5])
    kernel = {"kernel": PARAMS["kernel"]}
    inner = optax.chain(optax.clip(0.05), optax.adam(1e-2))
    tx, expected = plain(inner, CODECS["linear"])
    step = quantization.fused_step(inner, CODECS["linear"], **OPTIONS)
    state = tx.init(kernel)
    specs = jax.tree.map(lambda x: jax.P("rows") if x.ndim else jax.P(), state)
    mapped = jax.jit(
        jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(jax.P("rows"), specs, jax.P("rows")),
            out_specs=(jax.P("rows"), specs),
        )
    )
    assert_close(trained(mapped, state, kernel), trained(expected, state, kernel))


def test_bad_input():
    fast: Any = "fast"
    with pytest.raises(ValueError, match=r"implementation must be one of .*, got 'fast'"):
        quantization.fused_step(optax.adam(1.0), quantization.int8(), implementation=fast)
    with pytest.raises(TypeError, match="codec must be a codec"):
        quantization.fused_step(optax.adam(1.0), 8)  # pyright: ignore
    with pytest.raises(ValueError, match="min_size"):
        quantization.fused_step(optax.adam(1.0), quantization.int8(), min_size=0)
    step = quantization.fused_step(optax.adam(1.0), quantization.int8())
    with pytest.raises(TypeError, match="QuantizedState"):
        step(PARAMS, optax.adam(1.0).init(PARAMS), PARAMS)


def adam_step():
    """The int8 Adam step of two matrices, for a GPU's compiler."""
    inner, codec = optax.adamw(1e-3), quantization.int8(code="linear")
    params = {"a": jnp.zeros((512, 1024)), "b": jnp.zeros((3, 7, 256))}
    params = jax.eval_shape(lambda: params)
    state = jax.eval_shape(quantization.quantize_state(inner, codec).init, params)
    step = quantization.fused_step(inner, codec)
    return lambda p, s, g: step(g, s, p), (params, state, params), (0, 1)


@pytest.mark.parametrize("chip", [needs.on(chip) for chip in ("a100", "h200")])
def test_kernel_moves_nothing_twice(chip):
    """Gradient and parameter read, codes of both moments read and written, parameter written."""
    report = targets.compile_in_child("tests.quantization.test_fused_step:adam_step", chip)
    entries = 512 * 1024 + 3 * 7 * 256
    assert report["traffic"]["total_bytes"] <= 16.1 * entries
