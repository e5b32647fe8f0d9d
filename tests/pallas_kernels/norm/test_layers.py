"""The norms of Flax that are computed by ours, against Flax's own."""

# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import subprocess
import sys
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_kernels.norm import linen
from pallas_kernels.norm import nnx as norms

X = np.random.default_rng(0).normal(size=(3, 4, 8)).astype(np.float32)

OPTIONS = [
    {},
    {"use_scale": False, "epsilon": 1e-2},
    {"dtype": jnp.bfloat16},
    {"param_dtype": jnp.bfloat16},
    {"reduction_axes": (1, 2)},  # left to Flax
]


def nnx_layer(kind: Any, options: dict[str, Any]) -> Any:
    options = {"scale_init": nnx.initializers.normal(1.0), **options}
    return kind(8, rngs=nnx.Rngs(0), **options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["RMSNorm", "LayerNorm"])
def test_nnx(name, options):
    want = nnx_layer(getattr(nnx, name), options)(X)
    found = nnx_layer(getattr(norms, name), options)(X)
    assert found.dtype == want.dtype
    # Rounded once here, and by Flax where it rounds the scale times the inverse.
    np.testing.assert_allclose(found, want, rtol=2**-7 if "dtype" in options else 1e-5, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["RMSNorm", "LayerNorm"])
def test_linen(name, options):
    options = {"scale_init": nn.initializers.normal(1.0), **options}
    plain, ours = getattr(nn, name)(**options), getattr(linen, name)(**options)
    params = plain.init(jax.random.key(0), X)
    jax.tree.map(np.testing.assert_array_equal, ours.init(jax.random.key(0), X), params)
    want, found = plain.apply(params, X), ours.apply(params, X)
    assert found.dtype == want.dtype
    np.testing.assert_allclose(found, want, rtol=2**-7 if "dtype" in options else 1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["RMSNorm", "LayerNorm"])
def test_a_mask_is_left_to_flax(name):
    mask = np.broadcast_to(np.arange(8) < 5, X.shape)
    want = nnx_layer(getattr(nnx, name), {})(X, mask=mask)
    np.testing.assert_array_equal(nnx_layer(getattr(norms, name), {})(X, mask=mask), want)
    plain, ours = getattr(nn, name)(), getattr(linen, name)()
    params = plain.init(jax.random.key(0), X)
    want = plain.apply(params, X, mask=mask)
    np.testing.assert_array_equal(ours.apply(params, X, mask=mask), want)


def test_the_backward_pass_keeps_the_input():
    layer = nnx_layer(norms.RMSNorm, {"dtype": jnp.bfloat16})
    graph, params = nnx.split(layer)
    x = jax.ShapeDtypeStruct(X.shape, jnp.bfloat16)
    fn = lambda params, x: nnx.merge(graph, params)(x)  # noqa: E731
    _, pull = jax.eval_shape(lambda p, x: jax.vjp(fn, p, x), params, x)
    large = [leaf for leaf in jax.tree.leaves(pull) if leaf.size == x.size]
    assert [leaf.dtype for leaf in large] == [jnp.bfloat16]


def test_importing_the_package_does_not_import_flax():
    program = "import sys, pallas_kernels; assert 'flax' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
