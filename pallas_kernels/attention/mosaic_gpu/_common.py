"""What the Hopper kernels share: the machine, operands as TMA wants them, rings of slots.

All kernels of this route have the same shape. A program (a thread block) owns a block of rows or
of keys and walks over tiles of the score matrix. One warpgroup copies the operands of coming tiles
into slots of shared memory (`Ring`), the other two compute; they meet only at barriers. `_tiles.py`
says which tiles there are and what their scores are.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._compat import device
from pallas_kernels.attention import tuning
from pallas_kernels.attention.mask import Limits, Mask
from pallas_kernels.attention.mosaic_gpu.config import Blocks, Config, fitting
from pallas_kernels.attention.problem import Operands, Settings, Sizes

LOG2E = math.log2(math.e)
WORKERS = 2  # compute warpgroups of a program, numbered from 0
COPIER = 2  # the warpgroup that copies

# Registers of a thread: the copier gives up what the workers take.
WORKER_REGISTERS = 240
COPIER_REGISTERS = 24

TILE = plgpu.Layout.WGMMA  # (64 m, n) over the registers of a warpgroup
COLUMN = plgpu.Layout.WGMMA.reduce(1)  # one entry for each row of such a tile
ROW = plgpu.Layout.WGMMA.reduce(0)  # one entry for each column


class Machine(NamedTuple):
    """The device, or the interpreter of jax 0.11 and later: the only place that knows which.

    The interpreter has no matrix product whose left operand is in registers and no accumulator that
    starts from a value. There, `multiply_accumulate` goes through a buffer in shared memory that
    the device does not allocate, and adds afterwards.
    """

    interpret: Any  # False or an interpreter's parameter object

    def kernel(self, body: Callable[..., None], **kwargs: Any) -> Callable[..., Any]:
        """Returns `plgpu.kernel` with two workers and a copier, index ``"warpgroup"``."""
        # approx_math: exp2 and log2 are single instructions, good to 2 units in the last place.
        return plgpu.kernel(
            body,
            num_threads=WORKERS + 1,
            thread_name="warpgroup",
            compiler_params=plgpu.CompilerParams(approx_math=True),
            interpret=self.interpret or None,
            **kwargs,
        )

    def stand_ins(self, shape: tuple[int, int], dtype: Any) -> dict[str, Any]:
        """Returns the scratch that the interpreter needs in place of a worker's registers."""
        return {"left": matrix((WORKERS, *shape), dtype)} if self.interpret else {}

    def multiply_accumulate(
        self, c: jax.Array, a: jax.Array, b: Any, scratch: Any, worker: Any
    ) -> jax.Array:
        """Returns ``c + a @ b`` with `a` in registers and `b` in shared memory."""
        if self.interpret:
            left = scratch["left"].at[worker]
            left[...] = a
            plgpu.commit_smem()
            return c + multiply(left, b)

        def product(accumulator: Any) -> None:
            plgpu.wgmma(accumulator, a, b)

        start: Any = plgpu.WGMMAAccumulatorRef.init(c)
        return pl.run_state(product)(start)


def machine(settings: Settings) -> Machine:
    """Returns where a call with `settings` runs."""
    interpret = settings.interpret
    if interpret is True:
        interpret = vars(plgpu)["InterpretGPUParams"]()  # jax 0.10 has none; see `refusal`
    return Machine(interpret)


def divide_work(warpgroup: Any, work: Callable[[Any], None], copy: Callable[[], None]) -> None:
    """Runs ``work(warpgroup)`` in the workers and `copy` in the copier, each with its registers."""

    @pl.when(warpgroup < WORKERS)
    def _() -> None:
        plgpu.set_max_registers(WORKER_REGISTERS, action="increase")
        work(warpgroup)

    @pl.when(warpgroup == COPIER)
    def _() -> None:
        plgpu.set_max_registers(COPIER_REGISTERS, action="decrease")
        copy()


def multiply(a: Any, b: Any, meanwhile: Callable[[], None] = lambda: None) -> jax.Array:
    """Returns ``a @ b`` of two matrices in shared memory, float32.

    `meanwhile` runs when the product is issued and before its result is waited for.
    """

    def product(accumulator: Any) -> jax.Array:
        plgpu.wgmma(accumulator, a, b)
        meanwhile()
        return accumulator[...]

    return pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((a.shape[0], b.shape[1]), jnp.float32))


def transposed(ref: Any) -> Any:
    """Returns a matrix in shared memory as its transpose, without a copy."""
    return ref.transpose((1, 0))


def not_hoisted(index: Any, j: Any) -> Any:
    """Returns `index` in a way that depends on the loop counter `j` for all that a compiler knows.

    The matrix unit takes operands by descriptors, one for each 16 columns. Those of an operand that
    a loop does not change would be computed before the loop and kept, 2 d / 16 registers of each
    thread, which is what spilled at head dimension 256. So would the address of the barrier of a
    slot that is the same for every tile, as the key's is in a ring of two.
    """
    return index + lax.shift_right_logical(j, jnp.int32(30))


_LOAD_TAKES_AN_INDEX = (  # jax 0.10
    "idx" in inspect.signature(plgpu.load).parameters
    and inspect.signature(plgpu.load).parameters["idx"].default is inspect.Parameter.empty
)


def load(ref: Any, layout: Any) -> jax.Array:
    """Reads shared memory into registers in the given layout."""
    index = ((),) if _LOAD_TAKES_AN_INDEX else ()
    return plgpu.load(ref, *index, layout=layout)


def constant(shape: tuple[int, ...], value: Any, layout: Any) -> jax.Array:
    """Returns a float32 constant in registers in the given layout."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def matrix(shape: tuple[int, ...], dtype: Any) -> Any:
    """Describes matrices in shared memory in the form that TMA writes and wgmma reads."""
    swizzle = min(128, shape[-1] * jnp.dtype(dtype).itemsize)  # bytes
    columns_of_tile = swizzle // jnp.dtype(dtype).itemsize
    transforms = (plgpu.TilingTransform((8, columns_of_tile)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


class Ring(NamedTuple):
    """Slots in shared memory that the copier fills and workers read, in turn.

    The n-th filling uses slot ``n mod slots``. Readers wait for `full`, the copier for `free`; each
    barrier has one phase a filling, and every phase is waited for.
    """

    slots: int
    full: Any  # barriers, one a slot; arrivals: copies of a filling
    free: Any  # barriers, one a slot; arrivals: readers

    def slot(self, n: Any) -> Any:
        """Returns the slot of the n-th filling."""
        return not_hoisted(lax.rem(n, jnp.int32(self.slots)), n)

    def reserve(self, n: Any) -> tuple[Any, Any]:
        """Waits until the n-th filling may start; returns its slot and the barrier to signal."""
        slot = self.slot(n)

        @pl.when(n >= self.slots)
        def _() -> None:
            plgpu.barrier_wait(self.free.at[slot])

        return slot, self.full.at[slot]

    def wait(self, n: Any) -> Any:
        """Waits until the n-th filling is there; returns its slot."""
        slot = self.slot(n)
        plgpu.barrier_wait(self.full.at[slot])
        return slot

    def release(self, n: Any) -> None:
        """Says that this reader needs the n-th filling no more."""
        plgpu.barrier_arrive(self.free.at[self.slot(n)])

    def drain(self, count: Any) -> None:
        """Waits until the last of `count` fillings are read, so that no phase is left over."""
        for i in range(self.slots):

            @pl.when(count > i)
            def _(i: int = i) -> None:
                plgpu.barrier_wait(self.free.at[self.slot(count - 1 - i)])


def ring_barriers(name: str, slots: int, copies: int, readers: int) -> dict[str, Any]:
    """Returns the scratch types of a ring's barriers, ``name_full`` and ``name_free``."""
    return {
        f"{name}_full": plgpu.Barrier(num_arrivals=copies, num_barriers=slots),
        f"{name}_free": plgpu.Barrier(num_arrivals=readers, num_barriers=slots),
    }


class Bias(NamedTuple):
    """An additive bias as the kernels read it, with the dense mask in it as -inf.

    `kind` says what varies inside a tile: ``"tile"`` rows and keys, array (B or 1, N or 1, T, S);
    ``"keys"``, float32 (B or 1, N or 1, S); ``"rows"``, float32 (B or 1, N or 1, T). T and S are
    padded, to a multiple of 64 where TMA copies tiles and to `VECTOR` where it copies vectors.
    """

    kind: str
    array: jax.Array


VECTOR = 256  # vectors of rows and keys are padded to a multiple of this, and so of all blocks


def bias_of(operands: Operands) -> Bias | None:
    """Returns the bias and the dense mask as one array, or None if there is neither."""
    bias, dense = operands.bias, operands.mask.dense
    if dense is not None:
        visible = jnp.zeros((), operands.query.dtype) if bias is None else bias
        bias = jnp.where(dense, visible, jnp.array(-jnp.inf, visible.dtype))
    if bias is None:
        return None
    if bias.shape[2] != 1 and bias.shape[3] != 1:
        return Bias("tile", pad(pad(bias, 2, 64), 3, 64))
    bias = bias.astype(jnp.float32)
    if bias.shape[3] == 1:
        rows = jnp.broadcast_to(bias[..., 0], (*bias.shape[:2], operands.sizes.queries))
        return Bias("rows", pad(rows, 2, VECTOR))
    return Bias("keys", pad(bias[:, :, 0], 2, VECTOR))


def lookup_of(operands: Operands) -> tuning.Lookup:
    """Describes a call to the file of block sizes; a dense mask is part of the bias."""
    bias, dense = operands.bias, operands.mask.dense
    shapes = [x.shape for x in (bias, dense) if x is not None]
    bits = 0
    if shapes and 1 not in jnp.broadcast_shapes(*shapes)[2:]:
        bits = 8 * (operands.query if bias is None else bias).dtype.itemsize
    return tuning.lookup_of(operands, device(), "sm_90")._replace(bias=bits)


def pad(x: jax.Array, axis: int, multiple: int, value: Any = 0) -> jax.Array:
    """Pads one axis to a multiple; the same array where it is one already."""
    missing = -x.shape[axis] % multiple
    if not missing:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, missing)
    return jnp.pad(x, widths, constant_values=value)


def for_tma(x: jax.Array, d: int) -> jax.Array:
    """Pads (B, L, heads, width) so that TMA can copy tiles: the width to `d`, L to 8."""
    return pad(pad(x, 3, d), 1, 8)


@dataclasses.dataclass(frozen=True)
class Call:
    """What a kernel knows of a call at trace time."""

    machine: Machine
    settings: Settings
    mask: Mask  # its arrays are among the inputs
    size: Sizes
    d: int  # of queries, keys and values alike: the larger one, padded to a multiple of 64
    dtype: Any
    bias_kind: str | None
    bias_dtype: Any
    lookup: tuning.Lookup

    def blocks(self, kernel: str) -> Blocks:
        """Returns the blocks of a kernel, a field of `Config`."""
        given: Any = self.settings.config
        blocks = tuning.blocks_of("mosaic_gpu", Config, kernel, given, self.lookup)
        if given is not None and getattr(given, kernel) is not None:
            return blocks
        return fitting(kernel, blocks, self.lookup, segments=self.has_segments)

    @property
    def has_segments(self) -> bool:
        """Whether tiles compare segment ids."""
        return self.mask.has_segments

    def is_masked(self, tile: tuple[int, int]) -> bool:
        """Whether some tile of the given shape may have entries to hide."""
        mask = self.mask
        return (
            mask.left is not None
            or mask.right is not None
            or not mask.is_static
            or mask.has_start
            or mask.has_segments
            or any(self.size.keys % block for block in tile)
        )

    def limits(self, inputs: Any, batch: Any) -> Limits:
        """Returns the limits of a batch entry, inside a kernel."""
        if self.mask.is_static:
            return self.mask.static_limits(self.size.queries, self.size.keys)
        return Limits(*(inputs["limits"][batch, i] for i in range(self.mask.columns)))


def prepare(settings: Settings, operands: Operands) -> tuple[Call, dict[str, jax.Array]]:
    """Returns the static part of a call and the arrays that every kernel reads."""
    size, mask = operands.sizes, operands.mask
    bias = bias_of(operands)
    d = -(-max(size.head_dim, size.value_dim) // 64) * 64
    inputs = {
        "query": for_tma(operands.query, d),
        "key": for_tma(operands.key, d),
        "value": for_tma(operands.value, d),
    }
    call = Call(
        machine=machine(settings),
        settings=settings,
        mask=mask,
        size=size,
        d=d,
        dtype=operands.query.dtype,
        bias_kind=None if bias is None else bias.kind,
        bias_dtype=None if bias is None else bias.array.dtype,
        lookup=lookup_of(operands),
    )
    inputs["counts"] = jnp.arange(VECTOR, dtype=jnp.int32)
    if not mask.is_static:
        inputs["limits"] = mask.limits(size.batch, size.queries, size.keys)
    if mask.query_segment_ids is not None and mask.key_value_segment_ids is not None:
        inputs["row_ids"] = pad(mask.query_segment_ids, 1, VECTOR)
        inputs["key_ids"] = pad(mask.key_value_segment_ids, 1, VECTOR)
    if bias is not None:
        inputs["bias"] = bias.array
    if operands.seeds is not None:
        inputs["seeds"] = operands.seeds
    return call, inputs


def entry(array: Any, batch: Any, head: Any) -> tuple[Any, Any]:
    """Returns the index of a batch entry and head in an array whose first two axes may be 1."""
    return (batch if array.shape[0] > 1 else 0, head if array.shape[1] > 1 else 0)


def prepare_backward(
    call: Call,
    inputs: dict[str, jax.Array],
    lse: jax.Array,
    cotangent: jax.Array,
    delta: jax.Array,
) -> dict[str, jax.Array]:
    """Adds cotangent and statistics of rows, base-2 lse and delta (B, N, 2, T), to `inputs`.

    Rows that see nothing, and those past the end, get lse +inf: all their probabilities are 0.
    """
    unseen = lse == -jnp.inf
    lse = pad(jnp.where(unseen, jnp.inf, lse * LOG2E), 2, VECTOR, jnp.inf)
    delta = pad(jnp.where(unseen, 0.0, delta), 2, VECTOR)
    return inputs | {
        "cotangent": for_tma(cotangent, call.d),
        "statistics": jnp.stack([lse, delta], axis=2),
    }
