"""The hand-over to `jax.nn`, checked with its plain implementation in cuDNN's place."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOptionalMemberAccess=false

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels._compat import Device
from pallas_kernels.attention import cudnn
from pallas_kernels.attention.mask import Mask
from pallas_kernels.attention.problem import Operands, Settings
from tests.pallas_kernels.attention import cases

HOPPER = Device("gpu", "NVIDIA H200", (9, 0))


def refusal(case, device=HOPPER):
    settings, operands, _ = cases.build(case)
    return cudnn.refusal(settings, operands, device)


SERVED = [
    case
    for case in (c.replace(dtype="bfloat16", name=c.name) for c in cases.CASES)
    if refusal(case) is None
]


def test_what_is_served():
    names = {case.name for case in SERVED}
    assert {"causal", "causal window", "lengths", "bias", "dense mask", "sorted segments"} <= names
    assert not names & {"sinks", "dropout", "soft cap", "offsets", "wide keys", "window"}


@pytest.mark.parametrize("case", SERVED, ids=str)
def test_meaning_of_every_argument(case, monkeypatch):
    monkeypatch.setattr(cudnn, "IMPLEMENTATION", "xla")
    settings, operands, _ = cases.build(case)
    operands = operands._replace(
        query=operands.query.astype(jnp.float32),
        key=operands.key.astype(jnp.float32),
        value=operands.value.astype(jnp.float32),
    )
    output = cases.quick_jit(functools.partial(cudnn.attend, settings))(operands)
    np.testing.assert_allclose(output, cases.expected(case).output, rtol=1e-3, atol=1e-2)


def problem(monkeypatch):
    monkeypatch.setattr(cudnn, "IMPLEMENTATION", "xla")
    draw = np.random.default_rng(0).normal
    x, k, v = (jnp.asarray(draw(size=(3, 2, 5, 2, 8)), jnp.float32) for _ in range(3))
    bias = jnp.asarray(draw(size=(2, 2, 5, 5)), jnp.float32)
    settings, mask = Settings(scale=0.3), Mask(right=0)

    def loss(attend, q, k, v, bias):
        return (attend(settings, Operands(q, k, v, bias, mask=mask)) ** 2).sum()

    return functools.partial(loss, cudnn.attend), functools.partial(loss, cudnn._hand_over), (
        x[0], k[0], v[0], bias,
    ), x  # fmt: skip


def test_gradients_are_those_of_jax(monkeypatch):
    loss, plain, x, queries = problem(monkeypatch)
    axes = (0, *[None] * 3)

    def every(f):
        mapped = jax.vmap(f, axes)
        return (
            [jax.grad(f, of)(*x) for of in ((0, 1, 2, 3), (1, 3))],
            jax.grad(jax.checkpoint(f))(*x),
            jax.grad(lambda *x: mapped(*x).sum(), (0, 1))(queries, *x[1:]),
            jax.vmap(jax.grad(f, (0, 1)), axes)(queries, *x[1:]),
        )

    got, want = cases.quick_jit(lambda: (every(loss), every(plain)))()
    # Float32, the same formula twice.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), got, want)


@pytest.mark.parametrize("compiled", [False, True])
def test_forward_mode_and_second_derivatives_name_the_remedy(monkeypatch, compiled):
    loss, _, x, queries = problem(monkeypatch)
    loss = jax.jit(loss) if compiled else loss
    one = lambda q: loss(q, *x[1:])  # noqa: E731
    for call in (
        lambda: jax.jvp(one, x[:1], x[:1]),
        lambda: jax.linearize(one, x[0])[1](x[0]),
        lambda: jax.jvp(jax.grad(one), x[:1], x[:1]),
        lambda: jax.grad(lambda q: jax.grad(one)(q).sum())(x[0]),
        lambda: jax.jvp(lambda k: jax.grad(loss)(x[0], k, *x[2:]), x[1:2], x[1:2]),
        lambda: jax.vmap(lambda q: jax.jvp(one, (q,), (q,)))(queries),
    ):
        with pytest.raises(
            NotImplementedError, match=r'once, in reverse.*implementation="chunked"'
        ):
            call()


@pytest.mark.parametrize(
    ("case", "device", "reason"),
    [
        (cases.Case("x", dtype="bfloat16"), Device("cpu", "cpu"), "an NVIDIA GPU, not cpu"),
        (cases.Case("x", dtype="bfloat16"), Device("gpu", "V100", (7, 0)), "capability 8.0"),
        (cases.Case("x"), HOPPER, "not float32"),
        (cases.Case("x", dtype="float16", head_dim=100), HOPPER, "head size .* not 100"),
        (cases.Case("x", dtype="float16", head_dim=256), Device("gpu", "A100", (8, 0)), "most 128"),
        (cases.Case("x", dtype="float16", soft_cap=1.0), HOPPER, "has no soft cap"),
        (cases.Case("x", dtype="float16", left=3), HOPPER, "a window that is not causal"),
    ],
    ids=str,
)
def test_refusals(case, device, reason):
    assert re.search(reason, refusal(case, device))
