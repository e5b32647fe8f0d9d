"""What `ring_attention` compiles to: collectives, memory, and transfers beside work."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.attention.context import ring_attention
from pallas_kernels.targets import ENVIRONMENT
from tests.pallas_kernels.attention.context_cases import PLAIN, SPREAD, N, mesh
from tests.pallas_kernels.targets import needs
from tests.pallas_kernels.targets.test_compile import run_python

COLLECTIVES = ("collective-permute", "all-gather", "all-reduce", "reduce-scatter", "all-to-all")


def compiled(method, n=N, length=64, gradient=False):
    """Compiles causal attention over `n` slices of `length`."""
    x = jax.ShapeDtypeStruct((1, n * length, 4, 8), jnp.float32)
    fn = jax.shard_map(
        lambda *x: ring_attention(
            *x, axis_name="x", is_causal=True, method=method, implementation=PLAIN
        ),
        mesh=mesh(n),
        in_specs=SPREAD,
        out_specs=SPREAD,
    )

    def backward(*x):
        output, vjp = jax.vjp(fn, *x)
        return vjp(output)

    return jax.jit(backward if gradient else fn).lower(x, x, x).compile()


def collectives(text):
    found = Counter(re.findall(r" = .*? ([\w-]+)\(", text))
    return {name for name in COLLECTIVES if found[name] or found[f"{name}-start"]}


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize(
    ("method", "forward", "backward"),
    [
        ("ring", {"collective-permute"}, {"collective-permute"}),
        ("gather", {"all-gather"}, {"all-gather", "reduce-scatter"}),
        ("all_to_all", {"all-to-all"}, {"all-to-all"}),
    ],
)
def test_collectives(method, forward, backward, gradient):
    text = compiled(method, gradient=gradient).as_text()
    assert collectives(text) == (backward if gradient else forward)


@pytest.mark.slow
def test_temporaries_of_a_ring_do_not_grow_with_the_sequence():
    def temporaries(method, n):
        memory: Any = compiled(method, n, gradient=True).memory_analysis()
        return memory.temp_size_in_bytes

    assert temporaries("ring", 4) <= 1.05 * temporaries("ring", 3)
    assert temporaries("gather", 4) > 1.2 * temporaries("gather", 3)


OVERLAP = """\
import re
import jax, jax.numpy as jnp
from pallas_kernels.attention.context import ring_attention
from pallas_kernels.targets import abstract_devices, compile_for
mesh = jax.sharding.Mesh(abstract_devices({chip!r}, {topology!r}), ("x",))
assert mesh.size == 4
spec = jax.P(None, "x")
x = jax.ShapeDtypeStruct((1, 4096, 4, 128), jnp.bfloat16, sharding=jax.NamedSharding(mesh, spec))
fn = jax.shard_map(
    lambda *x: ring_attention(*x, axis_name="x", is_causal=True, implementation="chunked"),
    mesh=mesh, in_specs=spec, out_specs=spec)
def backward(*x):
    output, vjp = jax.vjp(fn, *x)
    return vjp(output)
for program in (fn, backward):
    text = compile_for(program, x, x, x, chip={chip!r}, topology={topology!r}).as_text()
    assert "is_scheduled=true" in text
    assert "all-gather" not in text
    under_way, work = set(), 0
    for line in text.splitlines():
        if found := re.match(r" *%?([\\w.-]+) = .* collective-permute-start\\(", line):
            under_way.add(found[1])
        elif found := re.search(r" collective-permute-done\\(.*?%?([\\w.-]+)\\)", line):
            under_way.discard(found[1])
        elif re.search(r" = .* (conditional|while)\\(", line):
            work += bool(under_way)
        elif line.startswith("}}"):
            under_way = set()
    print(text.count(" collective-permute-start("), text.count(" collective-permute-done("), work)
"""


KERNELS = """\
import jax, jax.numpy as jnp
from pallas_kernels.attention.context import ring_attention
from pallas_kernels.targets import abstract_devices, compile_for
mesh = jax.sharding.Mesh(abstract_devices({chip!r}, {topology!r}), ("x",))
spec = jax.P(None, "x")
x = jax.ShapeDtypeStruct((1, 2048, 4, 128), jnp.bfloat16, sharding=jax.NamedSharding(mesh, spec))
def program(method, checked):
    attend = jax.shard_map(
        lambda *x: ring_attention(*x, axis_name="x", is_causal=True, method=method,
                                  implementation={implementation!r}),
        mesh=mesh, in_specs=spec, out_specs=spec, check_vma=checked)
    def values_and_gradients(*x):
        output, vjp = jax.vjp(attend, *x)
        return output, vjp(output)
    return values_and_gradients
for method, checked in (("ring", True), ("gather", True), ("all_to_all", False)):
    fn = program(method, checked)
    compiled = compile_for(fn, x, x, x, chip={chip!r}, topology={topology!r})
    print(method, compiled.memory_analysis().temp_size_in_bytes)
"""


@pytest.mark.parametrize(
    ("chip", "topology", "implementation"),
    [
        needs.on("h100", "1x1x4", "mosaic_gpu"),
        needs.on("a100", "1x1x4", "triton"),
        needs.on("v5e", "v5e:2x2", "mosaic_tpu"),
    ],
)
@pytest.mark.slow
def test_kernels_of_chips_compile_as_the_local_route(chip, topology, implementation):
    program = KERNELS.format(chip=chip, topology=topology, implementation=implementation)
    child = run_python(program, **ENVIRONMENT)
    assert child.returncode == 0, child.stderr
    methods = [line.split()[0] for line in child.stdout.splitlines()]
    assert methods == ["ring", "gather", "all_to_all"]


@pytest.mark.parametrize(
    ("chip", "topology"), [needs.on("h100", "1x1x4"), needs.on("v5e", "v5e:2x2")]
)
@pytest.mark.slow
def test_transfers_overlap_with_work(chip, topology):
    child = run_python(OVERLAP.format(chip=chip, topology=topology), **ENVIRONMENT)
    assert child.returncode == 0, child.stderr
    for line in child.stdout.splitlines():
        starts, dones, overlapped = map(int, line.split())
        assert starts == dones > 0
        assert overlapped > 0
