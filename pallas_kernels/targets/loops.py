"""Work out how often a loop of an HLO module runs."""

from __future__ import annotations

from pallas_kernels.targets import hlo


def trip_count(
    module: hlo.Module, computation: hlo.Computation, loop: hlo.Instruction
) -> int | None:
    """Returns how often a ``while`` runs, or None where that depends on data.

    XLA:GPU notes what it has worked out. XLA:TPU does not, so the loops of `jax.lax.scan` and
    `jax.lax.fori_loop` are recognised here: one counter starts at a constant, gains a constant in
    each trip and is compared with a constant.

    Args:
      module: The module of the loop.
      computation: The computation that runs the loop.
      loop: The ``while`` instruction.
    """
    if loop.known_trip_count is not None:
        return loop.known_trip_count
    condition, body = (
        module.computations[loop.called(attribute)[0]] for attribute in ("condition", "body")
    )
    test = hlo.root(condition)
    if test.opcode != "compare" or "direction=LT" not in test.attributes:
        return None
    counter = _resolve(condition, test.operands[0])
    end = _constant(condition, test.operands[1])
    position = counter.tuple_index
    initial, result = computation[loop.operands[0]], hlo.root(body)
    if position is None or initial.opcode != "tuple" or result.opcode != "tuple":
        return None
    start = _constant(computation, initial.operands[position])
    step = _step(body, _resolve(body, result.operands[position]), position)
    if start is None or end is None or step is None:
        return None
    return max(0, -(-(end - start) // step))


def _step(body: hlo.Computation, update: hlo.Instruction, position: int) -> int | None:
    if update.opcode != "add":
        return None
    if _resolve(body, update.operands[0]).tuple_index != position:
        return None
    step = _constant(body, update.operands[1])
    return step if step is not None and step > 0 else None


def _constant(computation: hlo.Computation, name: str) -> int | None:
    value = _resolve(computation, name)
    if value.opcode != "constant" or not value.operands[0].lstrip("-").isdecimal():
        return None
    return int(value.operands[0])


def _resolve(computation: hlo.Computation, name: str) -> hlo.Instruction:
    value = computation[name]
    while value.opcode == "copy":
        value = computation[value.operands[0]]
    return value
