"""Wrong variants of attention, and whether the cases of `cases` and `decode_cases` catch them."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pathlib
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import pallas_kernels
from tests import mutants, suites
from tests.pallas_kernels.attention import cases, decode_cases, tangent_cases

CONFIGS = {"chunked": {"block_q": 48, "block_kv": 40, "tile": 1}}


@dataclasses.dataclass(frozen=True)
class Mutant(mutants.Mutant):
    """One replacement in a file of `pallas_kernels/attention`, and a case that must notice."""

    case: str
    route: str = "chunked"
    check: str = "gradient"  # or "tangent", "second" or "decode"
    package = pallas_kernels
    folder = "attention"

    def noticed_by(self) -> Any:
        """Returns the case."""
        known: Sequence[Any] = (*cases.CASES, *cases.BY_DISTANCE)
        if self.check == "decode":
            known = decode_cases.CASES
        return next(case for case in known if case.name == self.case)

    def verdict(self) -> str:
        with tempfile.TemporaryDirectory() as folder:
            copied = self.imported(pathlib.Path(folder))
            try:
                check(copied.__name__, self.route, self.noticed_by(), self.check)
            except (AssertionError, ValueError, TypeError):
                return "caught"
            return "survives"


@dataclasses.dataclass(frozen=True)
class SuiteMutant(suites.Mutant):
    """One replacement in a file of `pallas_kernels/attention`, and tests that must notice."""

    package = pallas_kernels
    selected = "not aot"

    def tests(self) -> tuple[str, ...]:
        return (f"pallas_kernels/attention/{NOTICED_BY[self.name]}.py",)


NOTICED_BY = {
    "integers": "test_positions",
    "placement": "test_meshes",
    "heads": "test_vmapped",
    "projected": "test_projected",
    "pages": "test_pages",
}


CASES = [
    # The running maximum and sum.
    Mutant("chunked", "total = a * total + p.sum", "total = total + p.sum", "plain"),
    Mutant("chunked", "o = a[..., None] * o + precise", "o = o + precise", "plain"),
    Mutant("chunked", "shift = jnp.where(m_new == -jnp.inf, 0, m_new)", "shift = m_new", "negative offset leaves empty rows"),
    Mutant("chunked", "m + jnp.log(total)", "m / 0.6931471805599453 + jnp.log2(total)", "plain"),
    Mutant("chunked", "lse = jnp.where(empty, -jnp.inf, ", "lse = jnp.where(empty, 0.0, ", "negative offset leaves empty rows"),
    Mutant("chunked", "total = jnp.where(empty, 1, total)", "total = total + 0", "negative offset leaves empty rows"),
    # Scores.
    Mutant("chunked", "settings.scale * rows if exact", "settings.scale**2 * rows if exact", "plain"),
    Mutant("chunked", "z += part(x.bias, start, size).astype(z.dtype)", "z += settings.scale * part(x.bias, start, size).astype(z.dtype)", "bias"),
    Mutant("chunked", "tanh = jnp.tanh(z / settings.soft_cap)", "tanh = jnp.tanh(z)", "soft cap"),
    Mutant("chunked", "settings.soft_cap * tanh, 1 - tanh * tanh", "settings.soft_cap * tanh, 1.0", "soft cap"),
    Mutant("chunked", "z = jnp.where(seen, z, -jnp.inf)", "z = jnp.where(seen, z, -1e4)", "negative offset leaves empty rows"),
    Mutant("chunked", "z = jnp.where(seen, z, -jnp.inf)", "z = z", "causal"),
    # Sinks and dropout.
    Mutant("chunked", "jnp.broadcast_to(sink, shape), jnp.ones(shape, dtype)", "jnp.zeros(shape, dtype), jnp.broadcast_to(sink, shape)", "sinks"),
    Mutant("chunked", "jnp.broadcast_to(sink, shape), jnp.ones(shape, dtype)", "jnp.broadcast_to(sink, shape), jnp.zeros(shape, dtype)", "sinks"),
    Mutant("chunked", "            total = a * total + p.sum(axis=-1)\n            if kept is not None:\n                p = jnp.where(kept, p, 0)\n", "            if kept is not None:\n                p = jnp.where(kept, p, 0)\n            total = a * total + p.sum(axis=-1)\n", "dropout"),
    Mutant("chunked", "o / (total * (1 - settings.dropout_rate))", "o / (total)", "dropout"),
    Mutant("chunked", "dp = jnp.where(kept, dp * keep_scale, 0)", "dp = jnp.where(kept, dp, 0)", "dropout"),
    Mutant("chunked", "dropped = jnp.where(kept, p * keep_scale, 0)", "dropped = p * keep_scale", "dropout"),
    Mutant("dropout", "(keys * KEY) ^ row_key", "keys ^ row_key", "dropout"),
    Mutant("dropout", "math.ceil(rate * 2**24)", "math.ceil((1 - rate) * 2**24)", "dropout"),
    # What hides by its value, and sinks that are none.
    Mutant("chunked", "z = jnp.where(z == -jnp.inf, -jnp.inf, capped) if hides_by_value else capped", "z = capped", "soft cap and a bias that hides"),
    Mutant("derivatives", "sinks[None, :, None] - jnp.where(lse == -jnp.inf, 0, lse))", "sinks[None, :, None] - lse)", "a sink of -inf and empty rows"),
    # Gradients.
    Mutant("chunked", "d_scores = p * (dp - take(delta)[..., None]) * slope", "d_scores = p * (dp - take(delta)[..., None])", "soft cap"),
    Mutant("chunked", "d_scores = p * (dp - take(delta)[..., None]) * slope", "d_scores = p * dp * slope", "plain"),
    Mutant("chunked", "d_key = (settings.scale * d_key)", "d_key = (d_key)", "plain"),
    Mutant("chunked", "(settings.scale * d_query)", "(d_query)", "plain"),
    Mutant("chunked", 'precise("bkgtd,bkgts->bkds", rows.astype(compute), ds)', 'precise("bkgtd,bkgts->bkds", rows[:, :, :1].astype(compute), ds[:, :, :1])', "grouped heads"),
    Mutant("chunked", "jnp.where(lse == -jnp.inf, 0, lse)", "lse", "negative offset leaves empty rows"),
    Mutant("chunked", "(b, q0, k * size.group)", "(b, q0, k)", "grouped heads"),
    Mutant("chunked", "(b, k, 0, q0, k0))", "(b, k, 0, q0, 0))", "bias of keys"),
    Mutant("chunks", "tile = tile.sum(axis=axes, keepdims=True)", "tile = tile.mean(axis=axes, keepdims=True)", "bias of heads"),
    Mutant("derivatives", "delta -= jnp.where(lse == -jnp.inf, 0, d_lse)", "delta += jnp.where(lse == -jnp.inf, 0, d_lse)", "plain"),
    Mutant("derivatives", "return jnp.exp(sinks[None, :, None] - jnp", "return (sinks[None, :, None] - jnp", "sinks"),
    Mutant("derivatives", "= -jnp.sum(share * delta", "= jnp.sum(share * delta", "sinks"),
    # Tangents.
    Mutant("tangent", "ds = p * ds * slope", "ds = p * ds", "soft cap", check="tangent"),
    Mutant("tangent", "ds = p * ds * slope", "ds = ds * slope", "plain", check="tangent"),
    Mutant("tangent", "jnp.where(kept, ds, 0), jnp.where(kept, p, 0)", "jnp.where(kept, ds, 0), p", "dropout", check="tangent"),
    Mutant("tangent", "jnp.where(kept, ds, 0), jnp.where(kept, p, 0)", "ds, jnp.where(kept, p, 0)", "dropout", check="tangent"),
    Mutant("tangent", "            mass += ds.sum(axis=-1)\n            if kept is not None:\n                ds, p = jnp.where(kept, ds, 0), jnp.where(kept, p, 0)\n", "            if kept is not None:\n                ds, p = jnp.where(kept, ds, 0), jnp.where(kept, p, 0)\n            mass += ds.sum(axis=-1)\n", "dropout", check="tangent"),
    Mutant("tangent", "weighted / (1 - settings.dropout_rate)", "weighted", "dropout", check="tangent"),
    Mutant("tangent", "lse = jnp.where(lse == -jnp.inf, 0, lse)", "lse = lse", "negative offset leaves empty rows", check="tangent"),
    Mutant("tangent", 'settings.scale * precise("bkgtd,bksd->bkgts", d_row, keys)', 'precise("bkgtd,bksd->bkgts", d_row, keys)', "plain", check="tangent"),
    Mutant("tangent", 'settings.scale * precise("bkgtd,bksd->bkgts", row, d_keys)', 'precise("bkgtd,bksd->bkgts", row, d_keys)', "plain", check="tangent"),
    Mutant("tangent", "(b, k, 0, q0, j * blocks.kv), p.shape", "(b, k, 0, q0, 0), p.shape", "bias of keys", check="tangent"),
    Mutant("tangent", "(b, k, 0, q0), (blocks.batch", "(b, 0, 0, q0), (blocks.batch", "grouped heads", check="tangent"),
    Mutant("tangent", "a = part(a, (b, q0, k * size.group)", "a = part(a, (b, q0, k)", "grouped heads", check="tangent"),
    Mutant("tangent", 'moved.get("value", operands.value)', "operands.value", "plain", check="tangent"),
    Mutant("derivatives", "(weighted - by_mass)", "(weighted)", "plain", check="tangent"),
    Mutant("derivatives", "mass += _share_of_sinks", "mass -= _share_of_sinks", "sinks", check="tangent"),
    Mutant("derivatives", "return results, _tangent(route, settings, operands, results, moves(tangents[0]))", "return results, jax.tree.map(jnp.zeros_like, results)", "plain", check="second"),
    Mutant("derivatives", "    if moved:\n        longer", "    if moved and form.cotangent is None:\n        longer", "plain", check="second"),
    # The mask.
    Mutant("mask", "near = distance <= mask.right", "near = distance < mask.right", "causal"),
    Mutant("mask", "seen &= distance >= -mask.left", "seen &= distance > -mask.left", "window"),
    Mutant("mask", "seen = (rows < query_length) & (keys < key_value_length)", "seen = (rows < query_length) & (keys >= 0)", "ragged"),
    Mutant("mask", "seen = (rows < query_length) & (keys < key_value_length)", "seen = (rows >= 0) & (keys < key_value_length)", "lengths"),
    Mutant("mask", "distance = keys - rows - offset", "distance = keys - rows + offset", "causal at the end"),
    Mutant("mask", "ends = (last_valid_row + offset + mask.right + 1,", "ends = (last_valid_row + offset + mask.right - 40,", "causal"),
    Mutant("mask", "first_row + offset + mask.right + 1)", "last_row + offset + mask.right + 1)", "causal"),
    Mutant("mask", "start = _maximum(start, first_row + offset - mask.left)", "start = _maximum(start, last_row + offset - mask.left)", "causal window"),
    Mutant("mask", "whole_start = _maximum(0, last_key - mask.right - offset)", "whole_start = _maximum(0, first_key - mask.right - offset)", "causal"),
    Mutant("mask", "stop = _minimum(stop, last_valid_key + mask.left - offset + 1)", "stop = _minimum(stop, first_key + mask.left - offset + 1)", "causal window"),
    Mutant("mask", "needed &= (q_low <= k_high) & (k_low <= q_high)", "needed &= (q_low <= k_low) & (k_high <= q_high)", "sorted segments"),
    Mutant("mask", "whole &= (q_low == q_high) & (k_low == k_high) & (q_low == k_low)", "whole &= (q_low == k_low)", "sorted segments"),
    Mutant("mask", "tiles(False).any(axis=(3, 5)), tiles(True).all", "tiles(False).any(axis=(3, 5)), tiles(True).any", "dense mask"),
    Mutant("mask", "_where(last_row < query_length, _maximum(whole_start", "_where(True, _maximum(whole_start", "lengths"),
    # Biases by rule.
    Mutant("chunked", "z += toeplitz.tile(of_tile[..., 0, :], blocks.q, blocks.kv).astype(z.dtype)", "z += settings.scale * toeplitz.tile(of_tile[..., 0, :], blocks.q, blocks.kv)", "distances"),
    Mutant("chunked", "toeplitz.sums(d_scores)[..., None, :]", "toeplitz.sums(d_scores[..., ::-1, :])[..., None, :]", "distances"),
    Mutant("chunks", "start = j * blocks.kv - i * blocks.q + rows - blocks.q", "start = j * blocks.kv - i * blocks.q + query_length - blocks.q", "distances"),
    Mutant("chunks", "start = j * blocks.kv - i * blocks.q + rows - blocks.q", "start = i * blocks.q - j * blocks.kv + rows - blocks.q", "distances"),
    Mutant("chunks", "widths = (missing(size.queries, blocks.q), missing(size.keys, blocks.kv) + 1)", "widths = (0, missing(size.queries, blocks.q) + missing(size.keys, blocks.kv) + 1)", "distances"),
    Mutant("chunks", "total[..., first : first + shape[2]]", "total[..., : shape[2]]", "distances"),
    Mutant("toeplitz", "flat[..., rows - 1 : rows - 1 + rows * (width - 1)]", "flat[..., rows : rows + rows * (width - 1)]", "distances, window, segments"),
    Mutant("toeplitz", "[*nothing, (rows - 1, 1)]", "[*nothing, (rows, 0)]", "distances, window, segments"),
    # First keys and prefixes.
    Mutant("mask", "seen &= keys >= start", "seen &= keys > start", "first key"),
    Mutant("mask", "near | (keys < prefix)", "near", "prefix"),
    Mutant("mask", "near | (keys < prefix)", "near | (keys <= prefix)", "prefix"),
    Mutant("mask", "else near | (keys < prefix)", "else keys < prefix", "prefix"),
    Mutant("mask", "ends = tuple(_maximum(x, prefix) for x in ends)", "ends = tuple(ends)", "prefix"),
    Mutant("mask", "ends = tuple(_maximum(x, prefix) for x in ends)", "ends = (ends[0], _maximum(ends[0], prefix))", "prefixes"),
    Mutant("mask", "start = whole_start = 0 if first_key is None else first_key", "start, whole_start = (0 if first_key is None else first_key), 0", "first key"),
    Mutant("mask", "start = _where(first_valid_key < prefix, 0, start)", "start = start", "prefix"),
    Mutant("mask", "whole_start = _where(last_key < prefix, 0, whole_start)", "whole_start = _where(first_key < prefix, 0, whole_start)", "prefix"),
    Mutant("mask", "every = every & (first_key >= start_of_keys)", "every = every & (last_key >= start_of_keys)", "first key"),
    # Decoding.
    Mutant("decode", "total = decay * total + p.sum(axis=1)", "total = total + p.sum(axis=1)", "one token", check="decode"),
    Mutant("decode", "decay[..., None] * acc + update", "acc + update", "one token", check="decode"),
    Mutant("decode", "z = z * key_scale[..., None]", "z = z", "int8", check="decode"),
    Mutant("decode", "p = p * jnp.where(needed[..., None], value_scale, 0)[..., None]", "p = p", "int8", check="decode"),
    Mutant("decode", "query *= operands.head_scale[None, :, None, None]", "query *= 1", "one scale for a tensor", check="decode"),
    Mutant("decode", "output *= operands.value_head_scale[None, :, None, None]", "output *= 1", "one scale for a head", check="decode"),
    Mutant("decode", "value = jnp.where(needed[..., None, None], value, 0)", "value = value", "left padding", check="decode"),
    Mutant("decode", "& (positions >= first)", "", "alibi, the whole cache of no whole blocks", check="decode"),
    Mutant("decode", "jnp.broadcast_to(sinks, lse.shape)", "jnp.broadcast_to(0 * sinks, lse.shape)", "sinks", check="decode"),
    Mutant("decode", "rule.at(positions[..., None] - tokens[:, None])", "rule.at(tokens[:, None] - positions[..., None])", "buckets", check="decode"),
    Mutant("decode", "jnp.arange(-settings.queries, 0, dtype=jnp.int32)", "jnp.arange(1 - settings.queries, 1, dtype=jnp.int32)", "alibi", check="decode"),
    Mutant("decode", "// (rows // settings.queries)", "% settings.queries", "two tokens", check="decode"),
    Mutant("decode", "jnp.where(empty, -jnp.inf, peak + jnp.log(total))", "peak + jnp.log(total)", "nothing", check="decode", same_function="`with_empty` takes the least number for -inf"),
    Mutant("decode_problem", "lower = jnp.minimum(first + split * share, last)", "lower = jnp.minimum(first + split, last)", "one token", check="decode"),
    Mutant("decode_problem", 'to_int32("lengths", lengths, 0, most)', 'to_int32("lengths", lengths, 0, most - 1)', "one token", check="decode"),
    Mutant("decode_problem", 'to_int32("page_table", page_table, 0, last)', 'to_int32("page_table", page_table, 0, last // 2)', "pages", check="decode"),
    Mutant("decode_problem", "starts = None if starts is None else jnp.clip(starts, 0, lengths)", "starts = None", "left padding", check="decode"),
    Mutant("decode_problem", "right=_side(right, t)", "right=_side(right, 1)", "a window to both sides", check="decode"),
    # Rules at distances.
    Mutant("position_bias", "return -slopes * jnp.abs(distances)", "return slopes * distances", "alibi, the whole cache of no whole blocks", check="decode"),
    Mutant("position_bias", "ahead = distances > 0", "ahead = distances >= 0", "buckets", check="decode"),
    Mutant("position_bias", "size[..., None] >= limits", "size[..., None] > limits", "buckets", check="decode"),
    Mutant("position_bias", "side = self._side(self.table.shape[0])", "side = self.table.shape[0]", "buckets", check="decode"),
    Mutant("position_bias", "jnp.arange(1 - queries, keys, dtype=jnp.int32)[None] - offset", "jnp.arange(1 - queries, keys, dtype=jnp.int32)[None] + offset", "alibi", "reference", "decode"),
    Mutant("position_bias", "distances - offsets[:, None]", "distances + offsets[:, None]", "alibi", "reference", "decode"),
]  # fmt: skip


SUITES = [
    # Numbers of any type and size.
    SuiteMutant("integers", "max(low, int(info.min)), min(high, int(info.max))", "low, high"),
    SuiteMutant("integers", "jnp.clip(values, low, high).astype(jnp.int32)", "values.astype(jnp.int32)"),
    SuiteMutant("integers", "np.clip(values, low, high).astype(np.int32)", "values.astype(np.int32)"),
    SuiteMutant("integers", 'return to_int32("values", values, -FAR, FAR)', "return jnp.asarray(values)"),
    SuiteMutant("integers", "values = jnp.broadcast_to(values, leading.shape)", "pass"),
    SuiteMutant("integers", "values = values.reshape(leading.shape)", "pass"),
    SuiteMutant("integers", "return leading.merge(values)", "return values"),
    SuiteMutant("integers", "low <= 1 - queries", "low <= 2 - queries"),
    SuiteMutant("integers", "high >= keys - 1", "high >= keys - 2"),
    SuiteMutant("integers", "if not -FAR < offset < FAR:", "if False:"),
    SuiteMutant("integers", "min(low, keys)", "low"),
    SuiteMutant("integers", "max(high, -queries)", "high"),
    SuiteMutant("integers", "None if high is None else high - offset", "high"),
    SuiteMutant("integers", "side >= length - 1 + FAR", "side >= length - 1"),
    SuiteMutant("integers", "((x >= fits.min) & (x <= fits.max)).all()", "True"),
    SuiteMutant("integers", "dtypes[0] == dtypes[1] == jnp.uint32", "False", same_function="ranks take longer and are right too"),
    SuiteMutant("integers", "np.concatenate(ids, axis=1), return_inverse", "np.concatenate(ids[::-1], axis=1), return_inverse"),
    SuiteMutant("integers", "common.itemsize > 4 and not has_64_bits", "False"),
    SuiteMutant("integers", "in_order[:, 1:] != in_order[:, :-1]", "in_order[:, 1:] == in_order[:, :-1]"),
    SuiteMutant("integers", "jnp.argsort(order, axis=1)", "order"),
    # Where arrays lie.
    SuiteMutant("placement", "given == wanted or", "True or"),
    SuiteMutant("placement", "if not any(names[1:]) or", "if True or"),
    SuiteMutant("placement", "size // math.prod(self.mesh.shape[name] for name in names)", "size"),
    SuiteMutant("placement", "PartitionSpec(*entries, *rest), PartitionSpec(sum", "PartitionSpec(*entries, *rest), PartitionSpec(None and sum"),
    SuiteMutant("placement", "if mesh.size == len(devices):", "if False:"),
    SuiteMutant("placement", "if found.is_equivalent_to(sharding, len(shape)):", "if True:"),
    SuiteMutant("placement", "if name not in names}", "if True}"),
    SuiteMutant("placement", "yield (name, *names)", "yield (*names, name)", same_function="all orders are tried"),
    # A mapped axis as heads.
    SuiteMutant("heads", "(axes, mapped) if has_axis) and small", "(axes, mapped) if has_axis)"),
    SuiteMutant("heads", 'return all("n" in own for own, has_axis in zip(axes, mapped) if has_axis) and small', "return small"),
    SuiteMutant("heads", "and shared and x.shape[n] == 1", "and x.shape[n] == 1"),
    SuiteMutant("heads", "jnp.moveaxis(x, 0, n + 1)", "jnp.moveaxis(x, 0, n)"),
    SuiteMutant("heads", "jnp.moveaxis(x, n + 1, 0)", "jnp.moveaxis(x, n, 0)"),
    SuiteMutant("heads", "!= count:", "is None:", file="derivatives"),
    SuiteMutant("heads", 'if "n" not in axes[i] or', "if", file="derivatives"),
    SuiteMutant("heads", '"v" * number + AXES[name]', "AXES[name]", file="derivatives"),
    SuiteMutant("heads", 'fold.unfold("v" * len(levels) + AXES[k], x)', "fold.unfold(AXES[k], x)", file="derivatives"),
    SuiteMutant("heads", "if is_mapped} | {*form.wanted}", "if is_mapped}", file="derivatives"),
    # Chunks of the queries, and one sum for each.
    SuiteMutant("projected", "offset=mask.offset + start", "offset=mask.offset"),
    SuiteMutant("projected", "lengths - start", "lengths"),
    SuiteMutant("projected", "query_segment_ids=cut(mask.query_segment_ids, 1)", "query_segment_ids=mask.query_segment_ids"),
    SuiteMutant("projected", "dense=cut(mask.dense, 2)", "dense=mask.dense"),
    SuiteMutant("projected", "x.shape[axis] == 1 != length", "x.shape[axis] == 0"),
    SuiteMutant("projected", "bias=cut(operands.bias, 2)", "bias=operands.bias"),
    SuiteMutant("projected", "diagonals, length - stop, last", "diagonals, start, diagonals.shape[2] - length + stop"),
    SuiteMutant("projected", "seeds + jnp.int32(start) * dropout.ROW", "seeds"),
    SuiteMutant("projected", "parts // number * multiple", "parts * multiple // number"),
    SuiteMutant("projected", "if any(a >= b for", "if any(a > b for"),
    SuiteMutant("projected", "1 <= number <= max(1, parts)", "1 <= number"),
    SuiteMutant("projected", "devices if scatter else 1", "1"),
    SuiteMutant("projected", "    if not scatter:", "    if True:"),
    SuiteMutant("projected", "return _after(*primals), tangents[1]", "return _after(*primals), tangents[1] * 0"),
    SuiteMutant("projected", "sums.append(_summed(products[-1], axis_name, scatter))", "sums.append(products[-1])"),
    # Pages.
    SuiteMutant("pages", "stable=True", "descending=True"),
    SuiteMutant("pages", "page_size < lengths", "page_size <= lengths"),
    SuiteMutant("pages", "jnp.where(in_use, table, pages)", "table"),
    SuiteMutant("pages", "jnp.where(in_use, place[table], -1)", "place[table]"),
    SuiteMutant("pages", "place[table], -1", "order[table], -1"),
    SuiteMutant("pages", "shape[:2] != found", "shape[0] != found[0]"),
    SuiteMutant("pages", "used=used.sum(dtype=jnp.int32)", "used=in_use.sum(dtype=jnp.int32)"),
]  # fmt: skip
MUTANTS = [*CASES, *SUITES]


def check(package: str, route: str, case: Any, kind: str = "gradient") -> None:
    """Checks `case` on a route of the package called `package`: its `kind` of derivative."""
    if kind == "decode":
        decode: Any = importlib.import_module(f"{package}.attention.decode")
        decode._config = lambda _: decode.ChunkedConfig(512, 1)  # 16 keys at a time, or one page
        splits = {"num_splits": 2} if route == "chunked" else {}
        decode_cases.check(case, sys.modules[package], implementation=route, **splits)
        return
    core, mask, problem, module = (
        importlib.import_module(f"{package}.attention.{name}")
        for name in ("core", "mask", "problem", route)
    )
    settings, operands, cotangents = cases.build(case)
    own_mask = mask.Mask(**{
        field.name: getattr(operands.mask, field.name)
        for field in dataclasses.fields(operands.mask)
    })  # fmt: skip
    operands = problem.Operands(**(operands._asdict() | {"mask": own_mask}))
    config: Any = module.ROUTE.config_type(**CONFIGS[route])
    settings = problem.Settings(**(settings._asdict() | {"config": config}))
    built = cases.Problem(settings, operands, cotangents)
    attend = functools.partial(core.attend, module.ROUTE, settings)
    if kind == "gradient":
        cases.check(case, cases.run(attend, built))
        return
    fn, x = tangent_cases.function(attend, built), tangent_cases.primals(built)
    if kind == "tangent":
        find = functools.partial(tangent_cases.tangents, fn)
    else:
        loss = tangent_cases.loss_of(fn, built)
        find = functools.partial(tangent_cases.forward_over_reverse, loss)
    got = cases.quick_jit(find)(x, tangent_cases.directions(built))
    tangent_cases.check(case, got, tangent_cases.expected(case, second=kind == "second"))
