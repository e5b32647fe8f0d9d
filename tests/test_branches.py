"""Branches and loops whose parts vary over different mesh axes are one mechanism."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxopt_lab import _compat

CASES = {
    "cond": lambda x: _compat.cond(
        lax.psum(x, "a") > 1, lambda y: y, lambda y: 0.0 * lax.psum(y, "a"), x
    ),
    "cond by its own value": lambda x: _compat.cond(
        x > 1, lambda: (1.0, x), lambda: (2.0, 2 * x)
    )[0],
    "switch": lambda x: _compat.switch(jnp.int32(2), [lambda: x, lambda: 0.0, lambda: 5.0]),
    "platform_dependent": lambda x: _compat.platform_dependent(
        x, cpu=lambda y: jnp.ones_like(y), default=lambda y: y
    ),
    "fori_loop": lambda x: _compat.fori_loop(0, 3, lambda i, s: s + i * x, 0.0),
    "while_loop": lambda x: _compat.while_loop(
        lambda s: s[0] < 3, lambda s: (s[0] + 1, s[1] + x), (0, 0.0)
    )[1],
    "while_loop by its own value": lambda x: _compat.while_loop(
        lambda s: s < x + 3, lambda s: s + 1, 0.0
    ),
    "scan": lambda x: _compat.scan(lambda s, y: (s + y * x, s), 0.0, jnp.arange(3.0))[0],
    "scan of what varies": lambda x: _compat.scan(
        lambda s, y: (jnp.maximum(s, y), None), 0.0, x + jnp.arange(3.0)
    )[0],
    "scan of nothing": lambda x: _compat.scan(lambda s, y: (s + y, None), x, jnp.zeros(0))[0],
    "chain of carries": lambda x: _compat.fori_loop(
        0, 3, lambda i, s: (s[1], s[2], s[2] + x), (0.0, 0.0, 0.0)
    )[0],
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_parts_that_vary_meet_parts_that_do_not(name):
    mesh = jax.make_mesh((4,), ("a",), (jax.sharding.AxisType.Auto,))
    x = jnp.arange(4.0)
    mapped = jax.shard_map(
        lambda x: CASES[name](x[0])[None] + jnp.zeros(1), mesh=mesh, in_specs=jax.P("a"),
        out_specs=jax.P("a"),
    )  # fmt: skip
    expected = jax.vmap(CASES[name], axis_name="a")(x)
    np.testing.assert_array_equal(jax.jit(mapped)(x), jnp.broadcast_to(expected, 4))


def test_what_is_chosen_by_a_value_that_varies_varies():
    mesh = jax.make_mesh((2,), ("a",), (jax.sharding.AxisType.Auto,))

    def fn(x):
        for found in (
            _compat.cond(x[0] > 0, lambda: 1.0, lambda: 2.0),
            _compat.switch(x[0].astype(int), [lambda: 1.0, lambda: 2.0]),
            _compat.while_loop(lambda s: s < x[0], lambda s: s + 1, 0.0),
        ):
            assert _compat.varying_axes(found) == {"a"}
        assert not _compat.varying_axes(_compat.cond(True, lambda: 1.0, lambda: 2.0))
        return x

    jax.shard_map(fn, mesh=mesh, in_specs=jax.P("a"), out_specs=jax.P("a"))(jnp.arange(2.0))


def test_derivatives_pass_through():
    mesh = jax.make_mesh((2,), ("a",), (jax.sharding.AxisType.Auto,))

    def fn(x):
        return _compat.cond(x[0] > 0, lambda: jnp.zeros(1), lambda: x**2)

    mapped = jax.shard_map(jax.grad(lambda x: fn(x)[0]), mesh=mesh, in_specs=jax.P("a"),
                           out_specs=jax.P("a"))  # fmt: skip
    np.testing.assert_array_equal(mapped(jnp.array([-3.0, 3.0])), [-6.0, 0.0])


def test_branches_that_do_not_match_are_jax_s_to_refuse():
    mesh = jax.make_mesh((2,), ("a",), (jax.sharding.AxisType.Auto,))

    def fn(x):
        return _compat.cond(True, lambda: (x, x), lambda: x)

    with pytest.raises(TypeError):
        jax.shard_map(fn, mesh=mesh, in_specs=jax.P("a"), out_specs=jax.P("a"))(jnp.ones(2))
