"""The table of measured block sizes: what is written is found, by the nearest case."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOptionalMemberAccess=false

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.attention import routes, tuning
from pallas_kernels.attention.chunks import ChunkedConfig
from pallas_kernels.attention.mask import Mask
from pallas_kernels.attention.problem import Operands
from pallas_kernels.attention.tuning import Entry


class Blocks(NamedTuple):
    q: int
    kv: int


class Nested(NamedTuple):
    forward: Blocks | None = None
    backward: Blocks | None = None


def operands(length=100, head_dim=64, dtype=jnp.float32, causal=False):
    x = jax.ShapeDtypeStruct((1, length, 2, head_dim), dtype)
    return Operands(x, x, x, mask=Mask(right=0 if causal else None))


def entry(length=100, head_dim=64, causal=False, **config):
    return Entry("chunked", "chip", "float32", head_dim, length, causal, config)


@pytest.mark.parametrize(
    ("call", "number"),
    [
        (operands(), 0),
        (operands(length=600), 1),
        (operands(length=10**6), 1),
        (operands(head_dim=65), 2),
        (operands(head_dim=129), None),
        (operands(causal=True), 3),
        (operands(dtype=jnp.bfloat16), None),
    ],
    ids=str,
)
def test_the_nearest_case_is_found(call, number):
    table = [
        entry(n=0), entry(length=1000, n=1), entry(head_dim=128, n=2), entry(causal=True, n=3)
    ]  # fmt: skip
    found = tuning.find("chunked", "chip", call, table)
    assert found == (None if number is None else {"n": number})
    assert tuning.find("chunked", "another chip", call, table) is None
    assert tuning.find("triton", "chip", call, table) is None


def test_save_replaces_the_same_case_and_keeps_others(tmp_path):
    path = tmp_path / "table.json"
    assert tuning.load(path) == ()
    tuning.save([entry(n=1), entry(length=5, n=2)], "first", path)
    tuning.save([entry(n=3)], "second", path)
    assert set(map(str, tuning.load(path))) == {str(entry(n=3)), str(entry(length=5, n=2))}
    assert path.read_text().count("\n") == 5, "one entry a line"


@pytest.mark.parametrize(
    "config", [ChunkedConfig(16, None, 3), Nested(Blocks(1, 2), None), Nested(None, Blocks(3, 4))]
)
def test_configs_survive_json(config):
    assert tuning.build(type(config), tuning.fields(config)) == config


def test_every_entry_of_the_packaged_table_builds():
    for e in tuning.load():
        config_type = routes.load(e.route).config_type
        assert config_type is not None
        assert isinstance(tuning.build(config_type, e.config), config_type)


def test_a_call_takes_its_entry(monkeypatch):
    x = jnp.ones((1, 8, 2, 4))
    kind = jax.devices()[0].device_kind
    table = (Entry("chunked", kind, "float32", 4, 8, False, {"block_q": 4, "block_kv": 2}),)
    monkeypatch.setattr(tuning, "load", lambda: table)
    seen = []
    monkeypatch.setattr(routes.core, "attend", lambda route, settings, _: seen.append(settings))
    settings = routes.Settings(scale=1.0)
    routes.run("chunked", settings, Operands(x, x, x))
    routes.run("chunked", settings._replace(config=ChunkedConfig(8)), Operands(x, x, x))
    assert [s.config for s in seen] == [ChunkedConfig(4, 2), ChunkedConfig(8)]
