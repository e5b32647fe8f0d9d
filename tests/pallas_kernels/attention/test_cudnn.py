"""The hand-over to `jax.nn`, checked with its plain implementation in cuDNN's place."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOptionalMemberAccess=false

from __future__ import annotations

import functools
import re

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels._compat import Device
from pallas_kernels.attention import cudnn
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
