"""The file of block sizes: which entry a call finds, what a file may hold, what may be tried."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOptionalMemberAccess=false

from __future__ import annotations

import functools
import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import _compat, attention
from pallas_kernels.attention import (
    chunked,
    core,
    decode,
    decode_tpu,
    decode_triton,
    mosaic_gpu,
    mosaic_tpu,
    routes,
    triton,
    tuning,
)
from pallas_kernels.attention.chunks import ChunkedConfig, choose_blocks
from pallas_kernels.attention.mask import Mask
from pallas_kernels.attention.problem import Operands, Settings
from pallas_kernels.attention.tuning import Entry, Lookup
from pallas_kernels.targets import compile_in_child, compile_with_resources
from tests.pallas_kernels.attention.absent import on
from tests.pallas_kernels.targets import needs


class Blocks(NamedTuple):
    q: int
    kv: int = 2
    is_possible = True


class Nested(NamedTuple):
    forward: Blocks | None = None
    backward: Blocks | None = None


DECODE = {
    "decode_chunked": decode.ChunkedConfig,
    "decode_mosaic_tpu": decode_tpu.Config,
    "decode_triton": decode_triton.Config,
}
CONFIGS = DECODE | {name: routes.load(name).config_type for name in routes.KERNELS}


def entry(kernel="forward", **changes):
    any_case = Entry("chunked", kernel, "any", "any", None, None, None, None, {"q": 0})
    config = {"q": changes.pop("q", 0)}
    return any_case._replace(config=config, **changes)


def lookup(**changes):
    return Lookup(("H200", "sm_90"), "bfloat16", 64, 1000, True, 0)._replace(**changes)


def find(tmp_path, entries, call, kernel="forward"):
    path = tmp_path / "table.json"
    tuning.save(entries, "", path)
    return tuning.find("chunked", Nested, kernel, call, path).q


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ({"head_dim": 64}, {"head_dim": 128, "chip": "H200"}),
        ({"head_dim": 256}, {}),
        ({"chip": "H200"}, {"chip": "sm_90", "dtype": "bfloat16"}),
        ({"chip": "sm_90"}, {"dtype": "bfloat16"}),
        ({"dtype": "bfloat16"}, {"dtype": "16-bit", "bias": 0}),
        ({"dtype": "16-bit"}, {"bias": 0}),
        ({"bias": 0}, {"causal": True}),
        ({"causal": True}, {"length": 1000}),
        ({"length": 1200}, {"length": 800}),
        ({"length": 10**6}, {}),
    ],
    ids=str,
)
def test_the_narrowest_then_nearest_entry_is_found(tmp_path, better, worse):
    for first, second in ((better, worse), (worse, better)):
        entries = [entry(**first, q=int(first is better)), entry(**second, q=int(second is better))]
        assert find(tmp_path, entries, lookup()) == 1


@pytest.mark.parametrize(
    "other",
    [
        {"head_dim": 63}, {"chip": "sm_80"}, {"dtype": "float16"}, {"dtype": "32-bit"},
        {"causal": False}, {"bias": 16}, {"kernel": "backward"}, {"route": "triton"},
    ],
    ids=str,
)  # fmt: skip
def test_an_entry_for_something_else_serves_nobody(tmp_path, other):
    path = tmp_path / "table.json"
    tuning.save([entry(**other)], "", path)
    with pytest.raises(LookupError, match="no entry for forward of chunked"):
        tuning.find("chunked", Nested, "forward", lookup(), path)


def test_save_replaces_the_same_case_and_keeps_others(tmp_path):
    path = tmp_path / "table.json"
    assert tuning.load(path) == ()
    tuning.save([entry(q=1), entry(length=5, q=2)], "first", path)
    tuning.save([entry(q=3)], "second", path)
    assert tuning.load(path) == (entry(length=5, q=2), entry(q=3))
    assert path.read_text().count("\n") == 5, "one entry a line"
    assert json.loads(path.read_text())["note"] == "first; second"


GOOD = entry()._asdict()


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (GOOD | {"colour": 1}, "expected the fields route, kernel"),
        ({"route": "chunked"}, "expected the fields route, kernel"),
        (GOOD | {"route": "chunky"}, "expected a route of chunked, mosaic_gpu"),
        (GOOD | {"head_dim": "64"}, "head_dim is '64'; expected int"),
        (GOOD | {"causal": 1}, "causal is 1; expected bool"),
        (GOOD | {"kernel": "sideways"}, "expected a kernel of forward, backward"),
        (GOOD | {"config": {"q": 1, "w": 2}}, "config has 'w'; expected"),
        (GOOD | {"config": {"q": None}}, "config has q=None; expected"),
        (GOOD | {"config": {"kv": 2}}, "config lacks q"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_broken_entry_is_named(tmp_path, row, reason):
    path = tmp_path / "broken.json"
    path.write_text(json.dumps({"note": "", "entries": [row]}))
    with pytest.raises(ValueError, match=r"broken\.json") as error:
        tuning.find("chunked", Nested, "forward", lookup(), path)
    assert json.dumps(row) in str(error.value)
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("route", "kernel", "config"),
    [
        ("mosaic_gpu", "forward", {"block_q": 96, "block_kv": 64, "slots": 4}),
        ("mosaic_tpu", "forward", {"q": 512, "kv": 512, "q_compute": 384, "kv_compute": 512}),
        ("triton", "dq", {"block_q": 48, "block_kv": 64, "num_warps": 4, "num_stages": 1}),
        ("chunked", "all", {"block_kv": 0}),
    ],
)
def test_blocks_that_a_route_does_not_have_are_named(tmp_path, route, kernel, config):
    path = tmp_path / "broken.json"
    tuning.save([entry(kernel, route=route)._replace(config=config)], "", path)
    with pytest.raises(ValueError, match=r"broken\.json: .* no kernel has .*"):
        tuning.find(route, CONFIGS[route], kernel, lookup(), path)


SERVED = [
    *(("mosaic_gpu", chip) for chip in ("h100", "h200")),
    *(("triton", chip) for chip in ("a100", "l4", "h200", "b200")),
    *(("mosaic_tpu", chip) for chip in ("v4", "v5e", "v5p", "v6e", "7x")),
    *(("chunked", chip) for chip in ("a100", "v4")),
]


def operands(head_dim=64, dtype=jnp.bfloat16, length=4096, bias=None, **mask):
    x = jax.ShapeDtypeStruct((2, length, 8, head_dim), dtype)
    y = jax.ShapeDtypeStruct((2, length, 2, head_dim), dtype)
    b = None if bias is None else jax.ShapeDtypeStruct((1, 8, length, length), bias)
    return Operands(x, y, y, b, mask=Mask(**mask))


def tried():
    """Calls of all kinds."""
    for head_dim in (8, 64, 80, 128, 192, 256):
        for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
            for length in (100, 4096):
                for bias in (None, dtype):
                    yield operands(head_dim, dtype, length, bias, right=0)


@pytest.mark.parametrize(("name", "chip"), SERVED)
def test_every_choice_of_a_route_is_accepted(name, chip):
    route, count = routes.load(name), 0
    with on(chip):
        for call in tried():
            if route.refusal(Settings(1.0), call, _compat.device()) is not None:
                continue
            for choice in route.choices(call):
                assert choice.timed in ("forward", "gradient")
                assert choice.configs, choice.kernel
                for config in choice.configs:
                    count += 1
                    reason = route.refusal(Settings(1.0, config=config), call, _compat.device())
                    assert reason is None, (call, config)
                    others = set(config._fields) - {choice.kernel}
                    assert choice.kernel == tuning.ALL or not any(
                        getattr(config, other) for other in others
                    )
    assert count > 100


@pytest.mark.parametrize(("name", "chip"), SERVED)
def test_the_file_serves_every_call(name, chip):
    route = routes.load(name)
    with on(chip):
        for call in tried():
            if route.refusal(Settings(1.0), call, _compat.device()) is not None:
                continue
            family = mosaic_tpu.tables.chip() if name == "mosaic_tpu" else None
            look = tuning.lookup_of(call, _compat.device(), family)
            config = tuning.default(name, route.config_type, look)
            assert route.refusal(Settings(1.0, config=config), call, _compat.device()) is None


def test_every_entry_of_the_packaged_file_is_one_of_its_route():
    entries = tuning.load()
    assert {e.route for e in entries} == set(tuning.ROUTES) == set(CONFIGS)
    for e in entries:
        look = Lookup((e.chip,), "float32", e.head_dim or 64, 1, True, e.bias or 0)
        look = look._replace(dtype={"16-bit": "bfloat16"}.get(e.dtype, "float32"))
        config = tuning.find(e.route, CONFIGS[e.route], e.kernel, look)
        assert config._asdict().items() >= e.config.items()
    rows = [e.config for e in entries if e.route == "chunked"]
    assert all({"rows", "block_kv"} <= set(config) for config in rows)


def test_families_hold_chips_of_one_kind():
    def family(capability):
        device = _compat.Device("gpu", "name", capability)
        return tuning.lookup_of(operands(), device).chips

    assert family((8, 7)) == family((8, 0)) == ("name", "sm_80")
    assert family((9, 0)) == ("name", "sm_90")
    assert family((10, 3)) == family((11, 0)) == ("name", "sm_100")
    assert family((8, 6)) == family((8, 9)) == family((12, 0)) == ("name",)


@pytest.mark.parametrize(
    ("kind", "capability"),
    [
        ("NVIDIA A100-SXM4-40GB", (8, 0)),
        ("NVIDIA A10G", (8, 6)),
        ("NVIDIA L40S", (8, 9)),
        ("NVIDIA GH200 480GB", (9, 0)),
        ("NVIDIA GB200", (10, 0)),
        ("NVIDIA GeForce RTX 4090", (8, 9)),
        ("Tesla T4", None),
    ],
)
def test_capability_of_a_chip_known_by_name(kind, capability):
    assert _compat._capability(kind) == capability


def test_a_bias_of_rows_and_keys_counts_its_bits():
    gpu = mosaic_gpu.lookup_of
    for call, ours, gpus in (
        (operands(), 0, 0),
        (operands(bias=jnp.float32), 32, 32),
        (operands(dense=jnp.zeros((1, 1, 4096, 4096), bool)), 0, 16),
        (operands(dense=jnp.zeros((1, 1, 1, 4096), bool)), 0, 0),
    ):
        assert tuning.lookup_of(call, _compat.device()).bias == ours
        assert gpu(call).bias == gpus


def test_the_callers_fields_come_before_the_file():
    blocks = triton.Blocks(16, 16, 4, 1)
    with on("a100"):
        look = tuning.lookup_of(operands(), _compat.device())
        listed = tuning.default("triton", triton.Config, look)
        given = triton.Config(dq=blocks)
        for kernel in triton.Config._fields:
            got = tuning.blocks_of("triton", triton.Config, kernel, given, look)
            assert got == (blocks if kernel == "dq" else getattr(listed, kernel))


def test_rows_are_shared_by_the_heads_of_a_group():
    def block_q(heads, **config):
        x, y = (jax.ShapeDtypeStruct((1, 2048, n, 8), jnp.float32) for n in (heads, 1))
        settings = Settings(1.0, config=ChunkedConfig(**config))
        return choose_blocks(settings, Operands(x, y, y)).q

    assert block_q(1) == 512
    assert block_q(4) == 128
    assert block_q(4, rows=1024) == 256
    assert block_q(4, block_q=512) == 512


def test_a_config_of_every_route_may_be_given():
    x = jnp.ones((1, 32, 2, 16))
    want = attention(x, x, x, implementation="reference")
    for name, config in (
        ("chunked", ChunkedConfig(block_kv=16)),
        ("triton", triton.Config(forward=triton.Blocks(16, 16, 4, 1))),
        ("mosaic_tpu", mosaic_tpu.Config(mosaic_tpu.Blocks(128, 128, 128, 128))),
    ):
        got = attention(x, x, x, implementation=name, config=config, interpret=True)
        assert jnp.allclose(got, want, atol=1e-5)
    with pytest.raises(NotImplementedError, match="expected a Config"):
        attention(x, x, x, implementation="triton", config=chunked.ChunkedConfig(), interpret=True)


COMPILED = {"mosaic_gpu": "h200", "triton": "a100", "mosaic_tpu": "v5e"}


def largest_choices(name, call):
    """The config with the largest tile of all that a route offers for each kernel."""
    route = routes.load(name)
    with on(COMPILED[name]):
        choices = route.choices(call)
    config_type: Any = route.config_type
    return config_type(**{
        choice.kernel: max(getattr(x, choice.kernel) for x in choice.configs) for choice in choices
    })  # fmt: skip


def with_the_largest_choices(name):
    """A program of values and gradients."""
    route, call = routes.load(name), operands(128, right=0)
    settings = Settings(128**-0.5, config=largest_choices(name, call))

    def gradients(query, key, value, cotangent):
        def fn(query, key, value):
            return core.attend(route, settings, Operands(query, key, value, mask=Mask(right=0)))[0]

        return jax.vjp(fn, query, key, value)[1](cotangent)

    return gradients, (*call[:3], call.query), ()


largest_mosaic_gpu, largest_triton, largest_mosaic_tpu = (
    functools.partial(with_the_largest_choices, name) for name in COMPILED
)


@pytest.mark.slow
@pytest.mark.parametrize(("chip", "name"), [needs.on(chip, x) for x, chip in COMPILED.items()])
def test_the_largest_choices_compile(chip, name):
    program = f"{__name__}:largest_{name}"
    if name != "mosaic_gpu":
        compile_in_child(program, chip)
        return
    config = largest_choices(name, operands(128, right=0))
    kernels = compile_with_resources(program, chip)["resources"]
    assert len(kernels) == 3
    for kernel in kernels:
        part = kernel["name"].removeprefix("attention_")
        blocks = getattr(config, part)
        estimate = mosaic_gpu.shared_memory(part, blocks, 128, 0, segments=False)
        assert estimate - 100 <= kernel["shared_memory"] <= estimate
        assert kernel["spill_stores"] == 0
