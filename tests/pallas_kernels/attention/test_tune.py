"""`experiments.bench_attention --tune`: what it measures, prints and writes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from experiments.bench_attention import methods, study
from experiments.bench_attention import tuning as attention_tuning
from experiments.bench_attention.__main__ import main
from experiments.bench_attention.methods import Shape
from pallas_kernels import _compat
from pallas_kernels.attention import chunked, routes, tuning
from pallas_kernels.attention.chunks import ChunkedConfig
from pallas_kernels.attention.problem import Settings

TINY = Shape(1, 32, 2, 1, 8, True, "float32")


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(methods, "shapes", lambda platform: (TINY,))


def test_what_is_written_is_read_back(tiny, monkeypatch, tmp_path, capsys):
    table = tmp_path / "table.json"
    # The routes' entries for any case stay in.
    table.write_text(tuning.TABLE.read_text())
    before = tuning.load(table)
    arguments = ["--tune", "--rounds", "2", "--write", "--table", str(table)]
    assert main(arguments) == 0
    assert "wrote" in capsys.readouterr().out
    tuning.load.cache_clear()
    [new] = set(map(str, tuning.load(table))) - set(map(str, before))
    kind = jax.devices()[0].device_kind
    [entry] = [e for e in tuning.load(table) if str(e) == new]
    assert entry[:-1] == ("chunked", "all", kind, "float32", 8, 32, True, 0)
    monkeypatch.setattr(tuning, "TABLE", table)
    call = attention_tuning.operands(TINY)
    [choice] = chunked.ROUTE.choices(call)
    assert choice.default == ChunkedConfig(**entry.config)


def test_nothing_is_written_unasked(tiny, tmp_path):
    table = tmp_path / "table.json"
    assert main(["--tune", "chunked", "--rounds", "1", "--table", str(table)]) == 0
    assert not table.exists()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--tune", "reference"], "--tune reference: no route with blocks; expected some of"),
        (["--tune", "mosaic_tpu"], "none of these routes serves any of these shapes here"),
    ],
)
def test_what_cannot_be_tuned_is_named(tiny, capsys, arguments, reason):
    assert main(arguments) == 2
    assert reason in capsys.readouterr().err


def test_a_failure_is_a_line_and_the_fastest_wins(monkeypatch):
    seconds = {512: 3.0, 128: 2.0}  # by rows; None is the default

    def compiled(fn, which):
        assert which == "gradient"
        config = fn.keywords["config"]
        rows = 512 if config is None else config.rows
        return (lambda: rows) if rows in seconds else f"ValueError: rows {rows}"

    def times(programs, rounds):
        return [[seconds[program()]] * rounds for program in programs]

    monkeypatch.setattr(attention_tuning, "times", times)
    monkeypatch.setattr(
        routes, "load", lambda _: chunked.ROUTE._replace(choices=lambda _: (choice,))
    )
    default = ChunkedConfig(rows=512, block_kv=512)
    others = tuple(ChunkedConfig(rows=rows, block_kv=512) for rows in (128, 64))
    choice = tuning.Choice(tuning.ALL, "gradient", default, others)
    [trial] = attention_tuning.tune("chunked", TINY, 3, compiled)
    assert trial.best == others[0]
    assert trial.errors == {others[1]: "ValueError: rows 64"}
    assert trial.row() == ["all", "- 512 - 512", "3000.000", "- 512 - 128", "2000.000", "1.50",
                           "3", "1"]  # fmt: skip
    assert trial.entry("a chip").config == {"block_kv": 512, "rows": 128}
    nothing = trial._replace(seconds={}, errors={default: "no", others[0]: "no"})
    assert nothing.best is None
    assert nothing.row() == ["all", "- 512 - 512", "failed", "none", "", "", "2", "2"]


def test_a_refused_config_does_not_end_the_run(monkeypatch):
    """Through the real compiler: blocks that no kernel has."""

    def refusal(settings, operands, device):
        return "no" if settings.config == broken else None

    default, broken = ChunkedConfig(rows=512, block_kv=512), ChunkedConfig(block_kv=16, rows=16)
    choice = tuning.Choice(tuning.ALL, "gradient", default, (broken,))
    route = chunked.ROUTE._replace(choices=lambda _: (choice,), refusal=refusal)
    monkeypatch.setattr(routes, "load", lambda _: route)
    arrays = study.draw(TINY)

    def compiled(fn, which):
        program = study.compile_one(study.passes(fn)[which], arrays)
        return program if isinstance(program, str) else lambda: program(*arrays)

    [trial] = attention_tuning.tune("chunked", TINY, 1, compiled)
    assert trial.best == default
    assert "cannot serve this call" in trial.errors[broken]


@pytest.mark.parametrize("causal", [False, True])
def test_a_shape_is_what_the_routes_see(causal):
    shape = Shape(2, 16, 4, 2, 8, causal, "bfloat16")
    call = attention_tuning.operands(shape)
    assert (call.mask.right == 0) == causal
    assert call.query.dtype == jnp.bfloat16
    assert chunked.ROUTE.refusal(Settings(1.0), call, _compat.device()) is None
