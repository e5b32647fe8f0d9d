"""What `ring_attention` refuses, and how."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention.context import ring_attention
from tests.pallas_kernels.attention.context_cases import PLAIN, N


def call(shape=(1, 8, 4, 8), axis_name="x", dtype=jnp.float32, **changes):
    x = {name: jnp.zeros(shape, dtype) for name in ("query", "key", "value")} | {
        k: changes.pop(k) for k in ("query", "key", "value") if k in changes
    }

    def fn(i):
        del i
        return ring_attention(**x, axis_name=axis_name, **changes)

    return jax.vmap(fn, axis_name="x")(jnp.arange(N))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"axis_name": "y"}, "axis 'y' is not bound; call inside shard_map or pmap"),
        ({"layout": "spiral"}, "layout='spiral' is not known; expected one of zigzag"),
        ({"method": "mesh"}, "method='mesh' is not known; expected one of ring, gather"),
        ({"implementation": "fast"}, "implementation='fast' names no route; expected one of"),
        ({"shape": (1, 7, 4, 8)}, r"query has shape \(1, 7, 4, 8\), a slice of 7 positions"),
        ({"shape": (4, 8)}, r"query must be \[batch, length, heads, size\]"),
        ({"sinks": jnp.zeros(3)}, r"sinks has shape \(3,\)"),
        ({"local_window_size": -1}, "local_window_size=-1; expected integers of at least 0"),
        (
            {"method": "all_to_all", "shape": (1, 8, 6, 8)},
            "query has 6 heads and the axis 4 devices; expected a multiple of 4",
        ),
        (
            {
                "method": "all_to_all",
                "query": jnp.zeros((1, 8, 12, 8)),
                "key": jnp.zeros((1, 8, 3, 8)),
                "value": jnp.zeros((1, 8, 3, 8)),
            },
            "key has 3 heads and the axis 4 devices; expected that one divides",
        ),
    ],
)
def test_bad_input(changes, message):
    with pytest.raises(ValueError, match=message):
        call(**changes)


@pytest.mark.parametrize("name", ["reference", "cudnn"])
def test_routes_without_a_backward_pass_are_refused(name):
    with pytest.raises(NotImplementedError, match=f"'{name}'"):
        call(implementation=[name])


def test_no_batch_axis():
    assert np.shape(call(shape=(8, 4, 8), implementation=PLAIN)) == (N, 8, 4, 8)


def test_axis_outside_of_any_map():
    x = jnp.zeros((1, 8, 4, 8))
    with pytest.raises(ValueError, match="axis 'context' is not bound; call inside shard_map"):
        ring_attention(x, x, x, axis_name="context")
