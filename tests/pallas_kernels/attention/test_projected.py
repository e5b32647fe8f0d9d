"""`attention_projected` is attention, a product and one sum over the axis, cut into chunks."""

from __future__ import annotations

import functools
import inspect
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import pallas_kernels
from pallas_kernels import attention_projected
from pallas_kernels.targets import ENVIRONMENT
from tests.pallas_kernels.attention.cases import quick_jit
from tests.pallas_kernels.attention.context_cases import mesh
from tests.pallas_kernels.targets import needs
from tests.pallas_kernels.targets.test_compile import run_python

# Devices, and sizes of one of them: a cut in the middle of nothing that divides anything.
N, B, T, S, HEADS, D, DV, WIDTH = 4, 2, 13, 11, 2, 4, 6, 5
CUTS = (4, 6)


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


ARRAYS = {  # the first axis is that of the devices
    "query": normal(N, B, T, HEADS, D, seed=1),
    "key": normal(N, B, S, 1, D, seed=2),
    "value": normal(N, B, S, 1, DV, seed=3),
    "kernel": normal(N, HEADS, DV, WIDTH, seed=4),
}
IDS = [np.random.default_rng(5).integers(0, 3, (B, length)) for length in (T, S)]

OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"is_causal": True},
    "window": {"local_window_size": (3, 2), "query_offset": -2},
    "causal window, soft cap": {
        "is_causal": True, "local_window_size": 4, "logits_soft_cap": 1.5, "scale": 0.9
    },
    "causal at the end": {"is_causal": True, "query_offset": S - T},
    "offsets": {"is_causal": True, "query_offset": jnp.array([-6, 3])},
    "far offset": {"local_window_size": (2**33 + 9, 2**33), "query_offset": 2**33},
    "lengths of queries": {"query_seq_lengths": jnp.array([5, 12])},
    "lengths of keys": {"key_value_seq_lengths": jnp.array([0, 9])},
    "first keys, prefixes": {
        "is_causal": True, "key_value_start": jnp.array([1, 3]), "prefix_lengths": jnp.array([7, 2])
    },
    "segments": {"query_segment_ids": IDS[0], "key_value_segment_ids": IDS[1]},
    "mask": {"mask": np.random.default_rng(6).random((B, 1, T, S)) < 0.6},
    "mask of keys": {"mask": np.random.default_rng(7).random((B, 1, 1, S)) < 0.6},
    "dropout": {"dropout_rate": 0.4, "dropout_rng": jax.random.key(8), "is_causal": True},
}  # fmt: skip
PLACED: dict[str, dict[str, Any]] = {  # what devices have parts of
    "bias": {"bias": normal(N, B, HEADS, T, S, seed=9)},
    "bias of heads": {"bias": normal(N, 1, HEADS, 1, 1, seed=10), "sinks": normal(N, HEADS)},
    "distances": {"bias": pallas_kernels.Alibi(jnp.abs(normal(N, HEADS)))},
}


def plain(
    query: Any, key: Any, value: Any, kernel: Any, *, scatter: bool = False, **options: Any
) -> jax.Array:
    """The definition, with one sum."""
    output = pallas_kernels.attention(query, key, value, **options)
    product = jnp.einsum("...tne,new->...tw", output, kernel)
    if scatter:
        return lax.psum_scatter(product, "x", scatter_dimension=product.ndim - 2, tiled=True)
    return lax.psum(product, "x")


def values_and_gradients(fn: Any, arrays: Any, how: str = "vmap", **options: Any) -> Any:
    """Runs `fn` on all devices, and the gradients of a weighted sum of what each one gets."""

    def local(arrays: Any) -> Any:
        return fn(**arrays, **options)

    if how == "vmap":
        spread = jax.vmap(local, axis_name="x")
    else:

        def one(arrays: Any) -> Any:
            return local(jax.tree.map(lambda x: x[0], arrays))[None]

        def on_devices(arrays: Any) -> Any:
            return jax.shard_map(
                one, mesh=mesh(N), in_specs=jax.P("x"), out_specs=jax.P("x"),
                check_vma=how == "checked",
            )(arrays)  # fmt: skip

        spread = on_devices

    def total(arrays: Any) -> Any:
        found = spread(arrays)
        weights = jnp.cos(jnp.arange(found.size, dtype=found.dtype)).reshape(found.shape)
        return (found * weights).sum(), found

    return quick_jit(jax.value_and_grad(total, has_aux=True))(arrays)


def assert_close(got: Any, want: Any) -> None:
    """Chunks add the same float32 terms, up to a few hundred of order one, in another order."""
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=2e-5, atol=2e-5), got, want)


@pytest.mark.parametrize("name", [*OPTIONS, *PLACED])
def test_chunks_give_the_plain_form(name):
    arrays, options = ARRAYS | PLACED.get(name, {}), OPTIONS.get(name, {})
    options = options | {"implementation": "reference"}
    got = values_and_gradients(attention_projected, arrays, axis_name="x", chunks=CUTS, **options)
    assert_close(got, values_and_gradients(plain, arrays, **options))


@functools.cache
def on_devices(how: str, **options: Any) -> Any:
    fn = functools.partial(attention_projected, axis_name="x") if "chunks" in options else plain
    arrays = ARRAYS | {"query": ARRAYS["query"][:, :, 1:]}  # 12 queries: three for each device
    options = {"is_causal": True, "implementation": "reference"} | options
    return values_and_gradients(fn, arrays, how, **options)


@pytest.mark.parametrize("how", ["checked", "unchecked"])
@pytest.mark.parametrize("chunks", [1, 5])
def test_on_devices(how, chunks):
    assert_close(on_devices(how, chunks=chunks), on_devices(how))


def test_on_devices_by_the_route_of_this_machine():
    options = {"implementation": None}
    assert_close(on_devices("checked", chunks=(5,), **options), on_devices("checked", **options))


@pytest.mark.parametrize("how", ["vmap", "checked"])
@pytest.mark.parametrize("chunks", [1, 2, (4, 8)])
def test_scattered_parts_of_each_chunk(how, chunks):
    (_, got), gradients = on_devices(how, chunks=chunks, scatter=True)
    (_, whole), _ = on_devices(how)
    cuts = {1: (0, 12), 2: (0, 4, 12), (4, 8): (0, 4, 8, 12)}[chunks]
    parts = [np.arange(a, b).reshape(N, -1) for a, b in itertools.pairwise(cuts)]
    order = np.concatenate(parts, axis=1)
    assert_close(got, np.stack([whole[0][:, own] for own in order]))
    if chunks == 1:
        assert_close(gradients, on_devices(how, scatter=True)[1])


def test_gradients_of_scattered_chunks():
    arrays = ARRAYS | {"query": ARRAYS["query"][:, :, :12]}
    order = np.concatenate([np.arange(8).reshape(N, 2), np.arange(8, 12).reshape(N, 1)], axis=1)

    def whole(**arrays: Any) -> Any:
        summed = plain(**arrays, **options)
        return jnp.take(summed, jnp.asarray(order)[lax.axis_index("x")], axis=1)

    own: Any = {"axis_name": "x", "chunks": (8,), "scatter": True}
    options: Any = {"is_causal": True, "implementation": "reference"}
    got = values_and_gradients(attention_projected, arrays, **own, **options)
    assert_close(got, values_and_gradients(whole, arrays))


@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_other_batch_axes(batch):
    x, kernel = normal(N, *batch, 5, HEADS, D), normal(N, HEADS, D, WIDTH)
    arrays = {"query": x, "key": x[..., :1, :], "value": x[..., 1:, :], "kernel": kernel}
    options = {"is_causal": True, "implementation": "reference"}
    got = values_and_gradients(attention_projected, arrays, axis_name="x", chunks=2, **options)
    assert got[0][1].shape == (N, *batch, 5, WIDTH)
    assert_close(got, values_and_gradients(plain, arrays, **options))


def test_no_queries():
    arrays = ARRAYS | {"query": ARRAYS["query"][:, :, :0]}
    fn = functools.partial(attention_projected, axis_name="x", chunks=1)
    found = jax.vmap(lambda arrays: fn(**arrays), axis_name="x")(arrays)
    assert found.shape == (N, B, 0, WIDTH)


def lowered(chunks: Any, scatter: bool, gradient: bool = False) -> str:
    def local(arrays: Any) -> Any:
        arrays = jax.tree.map(lambda x: x[0], arrays)
        return attention_projected(
            **arrays, axis_name="x", chunks=chunks, scatter=scatter, implementation="reference"
        )

    fn: Any = jax.shard_map(
        local, mesh=mesh(N), in_specs=jax.P("x"), out_specs=jax.P(None, "x" if scatter else None)
    )
    if gradient:
        fn = jax.value_and_grad(lambda arrays, fn=fn: (fn(arrays) ** 2).sum())
    arrays = ARRAYS | {"query": ARRAYS["query"][:, :, 1:]}
    return jax.jit(fn).lower(arrays).as_text()


def sums(text: str) -> list[int]:
    return [len(re.findall(rf"stablehlo\.{x}\b", text)) for x in ("all_reduce", "reduce_scatter")]


@pytest.mark.parametrize("chunks", [1, 3])
def test_the_program_has_one_sum_for_each_chunk(chunks):
    assert sums(lowered(chunks, scatter=False)) == [chunks, 0]
    assert sums(lowered(chunks, scatter=True)) == [0, chunks]


def test_gradients_of_sums_need_no_sum():
    assert sums(lowered(3, scatter=False, gradient=True)) == [3, 0]


OVERLAP = """\
import re
import jax, jax.numpy as jnp
from pallas_kernels import attention_projected
from pallas_kernels.targets import abstract_devices, compile_for
mesh = jax.sharding.Mesh(abstract_devices("h200", "1x1x4"), ("x",))
def struct(shape, spec):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=jax.NamedSharding(mesh, spec))
heads, rows = jax.P(None, None, "x"), jax.P("x")
x, kernel = struct((1, 4096, 16, 128), heads), struct((16, 128, 2048), rows)
def layer(*arrays):
    return attention_projected(
        *arrays, axis_name="x", chunks=4, scatter={scatter}, is_causal=True,
        implementation="mosaic_gpu")
fn = jax.shard_map(layer, mesh=mesh, in_specs=(heads, heads, heads, rows),
                   out_specs=jax.P(None, "x") if {scatter} else jax.P())
text = compile_for(fn, x, x, x, kernel, chip="h200", topology="1x1x4").as_text()
assert "is_scheduled=true" in text
names = {{"-start": "start", "-done": "done", "custom-call": "attention"}}
found = re.findall(r" = .*? (?:(?:all-reduce|reduce-scatter)(-start|-done)|(custom-call))\\(", text)
print(*(names[a or b] for a, b in found))
"""


@pytest.mark.parametrize(("chip", "scatter"), [needs.on("h200", False), needs.on("h200", True)])
@pytest.mark.slow
def test_each_sum_but_the_last_is_sent_beside_attention_of_the_next_chunk(chip, scatter):
    del chip
    child = run_python(OVERLAP.format(scatter=scatter), **ENVIRONMENT)
    assert child.returncode == 0, child.stderr
    beside = ["attention", *["start", "attention", "done"] * 3, "start", "done"]
    assert child.stdout.split() == beside


X = jnp.ones((1, 12, 2, 4))
KERNEL = jnp.ones((2, 4, 5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"axis_name": "y"}, "axis 'y' is not bound; call inside shard_map"),
        ({"chunks": 0}, "chunks=0; expected 1 to 12 for 12 queries"),
        ({"chunks": 13}, "chunks=13; expected 1 to 12 for 12 queries"),
        ({"chunks": 4, "scatter": True}, "chunks=4; expected 1 to 3 for 12 queries in parts for 4"),
        ({"chunks": 2.0}, "chunks=2.0; expected an integer"),
        ({"chunks": [4, 4]}, r"chunks=\[4, 4\]; expected ascending positions between 0 and 12"),
        ({"chunks": (4, 12)}, r"chunks=\(4, 12\); expected ascending positions between 0 and 12"),
        ({"chunks": (4, 7), "scatter": True}, r"\(4, 7\) cuts 12 queries at .*multiples of the 4"),
        ({"query": X[:, 1:], "scatter": True}, "cuts 11 queries at .*multiples of the 4 devices"),
        ({"scatter": "queries"}, "scatter='queries'; expected True or False"),
        ({"kernel": KERNEL.reshape(8, 5)}, r"kernel has shape \(8, 5\); expected \(heads,"),
        ({"kernel": KERNEL[:1]}, r"kernel has shape \(1, 4, 5\); .*\(2, 4, width\)"),
        ({"kernel": KERNEL.astype(jnp.bfloat16)}, "kernel has dtype bfloat16; .*query, float32"),
        ({"kernel": "out"}, "kernel is a str; expected an array"),
        ({"return_residual": True}, "return_residual is no option here"),
        ({"causal": True}, "causal"),
        ({"key": X[..., :3]}, "query has head size 4, key 3"),
    ],
)
def test_wrong_calls(changes, message):
    call: dict[str, Any] = {"query": X, "key": X, "value": X, "kernel": KERNEL}
    call |= {"axis_name": "x", "chunks": 2} | changes
    with pytest.raises((TypeError, ValueError), match=message):
        jax.eval_shape(jax.vmap(lambda _: attention_projected(**call), axis_name="x"), jnp.ones(4))


def test_all_options_of_attention_are_tried():
    tried = {name for options in (*OPTIONS.values(), *PLACED.values()) for name in options}
    known = set(inspect.signature(pallas_kernels.attention).parameters)
    others = {"query", "key", "value", "precision", "return_residual", "implementation", "config"}
    assert known - tried == others | {"interpret"}
