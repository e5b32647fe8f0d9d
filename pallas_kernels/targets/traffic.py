"""Count the bytes that a compiled program moves to and from device memory.

Between two kernels everything lives in device memory, and a kernel reads each operand and writes
each result at least once. The sum over the kernels of the optimised program is therefore the
traffic that no cache can save, up to data that stays in the last-level cache from one kernel to the
next. It depends on the chip compiled for and not on the machine that compiles.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax

from pallas_kernels.targets import hlo
from pallas_kernels.targets.loops import trip_count

# These name, group or order buffers and run no kernel.
_FREE = frozenset(
    {
        "add-dependency",
        "after-all",
        "bitcast",
        "constant",
        "domain",
        "get-tuple-element",
        "opt-barrier",
        "parameter",
        "tuple",
    }
)
_FREE_CUSTOM_CALLS = frozenset({"AllocateBuffer", "ConcatBitcast"})
_HOST_MEMORY = 5
_NO_TRIP_COUNTS: Mapping[str, int] = MappingProxyType({})


class Kernel(NamedTuple):
    """The device memory that one kernel moves.

    Attributes:
      name: name of the instruction in the compiled program.
      opcode: its HLO operation, such as fusion.
      operand_bytes: of one run.
      result_bytes: of one run.
      times: runs in one run of the program.
    """

    name: str
    opcode: str
    operand_bytes: int
    result_bytes: int
    times: int

    @property
    def total_bytes(self) -> int:
        """Bytes moved by all runs."""
        return self.times * (self.operand_bytes + self.result_bytes)


class MemoryTraffic(NamedTuple):
    """The device memory that a program moves, kernel by kernel in the order of execution.

    Attributes:
      kernels: one entry for each kernel.
    """

    kernels: tuple[Kernel, ...]

    @property
    def total_bytes(self) -> int:
        """Bytes moved in one run of the program."""
        return sum(kernel.total_bytes for kernel in self.kernels)


def memory_traffic(
    compiled: jax.stages.Compiled | str, trip_counts: Mapping[str, int] = _NO_TRIP_COUNTS
) -> MemoryTraffic:
    """Counts the bytes of device memory that one run of a compiled program moves.

    Every kernel (fusion, library or custom call, copy, collective, ...) counts each distinct
    operand once and its results once, with these rules:

    - A fusion, slice or gather that takes only parts of an operand counts those parts. An update
      of a slice and a scatter happen in place and count the updates (a scatter twice: it reads
      what it changes). Overlapping parts count each time, up to the whole operand.
    - A loop counts its body times its trips, and its condition once more than that. Loops over a
      constant range (`jax.lax.scan`, most of `jax.lax.fori_loop`) are recognised.
    - A conditional counts its most expensive branch.
    - The start and the end of an asynchronous operation are one kernel.
    - Memory that is not the device's main memory (a TPU's VMEM and SMEM, pinned host memory)
      counts nothing, nor does the scratch space of a cuBLAS or cuDNN call.
    - Shapes count their elements, without the padding of a TPU's tiles.

    Args:
      compiled: A compiled program, or the text of its optimised HLO.
      trip_counts: How often each loop runs whose trip count depends on data, by the name of the
        ``while`` instruction.

    Returns:
      The kernels that move anything, and their total.

    Raises:
      ValueError: A loop's trip count depends on data and is not given, or `compiled` is no text of
        an HLO module.

    Example:
      >>> memory_traffic('''
      ... ENTRY %main (x: f32[256]) -> f32[256] {
      ...   %x = f32[256]{0} parameter(0)
      ...   ROOT %y = f32[256]{0} negate(%x)
      ... }
      ... ''').total_bytes
      2048
    """
    if not isinstance(compiled, str) and not hasattr(compiled, "as_text"):
        raise TypeError(f"compiled={compiled!r}; expected a compiled program or its text")
    text = compiled if isinstance(compiled, str) else compiled.as_text()
    module = hlo.parse(text or "")
    return MemoryTraffic(tuple(_kernels(module, module.entry, 1, trip_counts)))


def _kernels(
    module: hlo.Module, computation: str, times: int, trip_counts: Mapping[str, int]
) -> Iterator[Kernel]:
    body = module.computations[computation]
    for instruction in body.values():
        opcode = instruction.opcode
        if opcode == "while":
            trips = _trips(module, body, instruction, trip_counts)
            (condition,), (loop,) = instruction.called("condition"), instruction.called("body")
            yield from _kernels(module, condition, times * (trips + 1), trip_counts)
            yield from _kernels(module, loop, times * trips, trip_counts)
        elif opcode == "conditional":
            branches = (
                tuple(_kernels(module, name, times, trip_counts)) for name in _branches(instruction)
            )
            yield from max(branches, key=lambda kernels: MemoryTraffic(kernels).total_bytes)
        elif opcode in ("call", "call-start", "async-start"):
            (callee,) = instruction.called("to_apply") or instruction.called("calls")
            yield from _kernels(module, callee, times, trip_counts)
        elif kernel := _kernel(module, body, instruction, times):
            yield kernel


def _trips(
    module: hlo.Module,
    body: hlo.Computation,
    loop: hlo.Instruction,
    trip_counts: Mapping[str, int],
) -> int:
    if loop.name in trip_counts:
        return trip_counts[loop.name]
    trips = trip_count(module, body, loop)
    if trips is None:
        raise ValueError(
            f"the trip count of loop {loop.name!r} depends on data; "
            f"expected it as trip_counts={{{loop.name!r}: n}}"
        )
    return trips


def _branches(conditional: hlo.Instruction) -> tuple[str, ...]:
    return conditional.called("branch_computations") or (
        *conditional.called("true_computation"),
        *conditional.called("false_computation"),
    )


def _kernel(
    module: hlo.Module, body: hlo.Computation, end: hlo.Instruction, times: int
) -> Kernel | None:
    """Counts one instruction; an asynchronous one where it ends, since there its result is."""
    if end.opcode in _FREE or end.custom_call_target in _FREE_CUSTOM_CALLS:
        return None
    if end.opcode.endswith(("-start", "-update")) or end.opcode in ("send", "recv"):
        return None
    start = end
    while start.opcode.endswith(("-done", "-update")):
        start = body[start.operands[0]]
    if start.opcode in ("call-start", "async-start"):
        return None
    opcode = start.opcode.removesuffix("-start")
    reads = {name: _read(module, body, start, opcode, name) for name in start.operands}
    writes = _written(module, body, start, end, opcode)
    if not any(reads.values()) and not writes:
        return None
    return Kernel(start.name, opcode, sum(reads.values()), writes, times)


def _read(
    module: hlo.Module, body: hlo.Computation, reader: hlo.Instruction, opcode: str, operand: str
) -> int:
    """Returns the bytes that `reader` reads of `operand`."""
    whole = _device_bytes(module, body[operand].shape)
    if not whole:
        return 0
    if opcode != "fusion":
        return min(whole, _touched(module, body, reader, opcode, operand, in_place=True))
    (fused,) = (module.computations[name] for name in reader.called("calls"))
    numbers = {str(i) for i, name in enumerate(reader.operands) if name == operand}
    parameters = (p for p in fused.values() if p.opcode == "parameter" and p.operands[0] in numbers)
    return min(whole, sum(_used(module, fused, parameter.name) for parameter in parameters))


def _used(module: hlo.Module, fused: hlo.Computation, value: str) -> int:
    """Returns the bytes that a fused computation uses of one of its parameters."""
    in_place = {update.name for update in _updates(fused)}
    users = (user for user in fused.values() if value in user.operands)
    return sum(
        _used(module, fused, user.name)
        if user.opcode == "bitcast" and not user.is_root
        else _touched(module, fused, user, user.opcode, value, user.name in in_place)
        for user in users
    )


def _touched(
    module: hlo.Module,
    body: hlo.Computation,
    user: hlo.Instruction,
    opcode: str,
    operand: str,
    in_place: bool,
) -> int:
    """Returns the bytes of `operand` that one instruction needs."""
    first = user.operands.index(operand) == 0 and user.operands.count(operand) == 1
    if first and opcode in ("dynamic-slice", "slice", "gather"):
        parts = hlo.elements(user.shape)
        # The result of an asynchronous slice is (operands, result, context).
        return _bytes(parts[1] if len(parts) > 1 else parts[0])
    if first and in_place and opcode == "dynamic-update-slice":
        return 0
    if first and in_place and _is_update(opcode, user):
        return _bytes(body[user.operands[2]].shape)
    return _bytes(body[operand].shape)


def _written(
    module: hlo.Module,
    body: hlo.Computation,
    start: hlo.Instruction,
    end: hlo.Instruction,
    opcode: str,
) -> int:
    """Returns the bytes of results that an instruction writes."""
    whole = _device_bytes(module, end.shape)
    if opcode == "fusion":
        (fused,) = (module.computations[name] for name in start.called("calls"))
        saved = sum(_bytes(u.shape) - _update_bytes(fused, u) for u in _updates(fused))
        return max(0, whole - saved)
    if _is_update(opcode, start):
        return min(whole, _update_bytes(body, start))
    if start.custom_call_target.startswith(("__cublas", "__cudnn")):
        results = hlo.elements(end.shape)
        users = (user for user in body.values() if end.name in user.operands)
        used = {user.tuple_index for user in users if user.tuple_index is not None}
        return sum(_device_bytes(module, results[i]) for i in used) if used else whole
    return whole


def _updates(fused: hlo.Computation) -> Iterator[hlo.Instruction]:
    """Yields the updates that a fusion makes in place: roots that change a parameter."""
    root = hlo.root(fused)
    for name in root.operands if root.opcode == "tuple" else (root.name,):
        result = _through_bitcasts(fused, fused[name])
        if _is_update(result.opcode, result):
            target = _through_bitcasts(fused, fused[result.operands[0]])
            if target.opcode == "parameter":
                yield result


def _through_bitcasts(body: hlo.Computation, value: hlo.Instruction) -> hlo.Instruction:
    while value.opcode == "bitcast":
        value = body[value.operands[0]]
    return value


def _is_update(opcode: str, instruction: hlo.Instruction) -> bool:
    # A scatter of several arrays at once has more operands and counts in full.
    return opcode == "dynamic-update-slice" or (
        opcode == "scatter" and len(instruction.operands) == 3
    )


def _update_bytes(body: hlo.Computation, update: hlo.Instruction) -> int:
    return _bytes(body[update.operands[2 if update.opcode == "scatter" else 1]].shape)


def _bytes(shape: str) -> int:
    return sum(array.bytes for array in hlo.arrays(shape))


def _device_bytes(module: hlo.Module, shape: str) -> int:
    """Returns the bytes of a shape that are in the device's main memory."""
    return sum(
        array.bytes
        for array in hlo.arrays(shape)
        if (array.memory_space == 0 if module.is_tpu else array.memory_space != _HOST_MEMORY)
    )
