r"""MiSS (Bone): one block, repeated along the inputs of a kernel.

    K'[i, o] = K[i, o] + M[i mod r, o],        x K' = x K + (sum of the parts of x) M

Kang and Yin, "MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure"
(earlier "Bone: Block-Affine Adaptation of Large Language Models"), 2024, arXiv:2409.15371.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_lab import _checks
from jaxopt_lab.adapters import _kernels, _targets, _whole
from jaxopt_lab.adapters._kernels import Factors, Kernel


@dataclasses.dataclass(frozen=True, kw_only=True)
class MissConfig:
    r"""Shard-sharing adapters; the names and their meaning are those of `peft.MissConfig`.

    With i an input, o an output, and the inputs and outputs of a kernel flattened,

    .. math::
      K'_{i,o} &= K_{i,o} + M_{i \bmod r,\, o} \quad \text{(True)}, \qquad
      K'_{i,o} = K_{i,o} + M_{i \bmod r,\, o \bmod m} \quad \text{("mini")} \\
      K'_{p,q} &= K_{p,q} + M_q K_{p,q} + M_q \quad \text{("bat", tiles of r inputs and r outputs)}

    (the blocks of "bat" are the transposes of those of `peft`, whose kernels are transposed).
    The block starts at zero, so that the function starts unchanged; its rank is at most r with half
    of LoRA's parameters for a square kernel. There is no scaling.

    Attributes:
      target_modules: layers by the end of their dotted name, a list of such; a string is a regular
        expression for the whole name; "all-linear" is every kernel but those of embeddings and the
        output head.
      r: rows of the block: period along the inputs.
      mini_r: m, the period along the outputs of "mini"; it divides the outputs.
      exclude_modules: what is left out of these, by the end of its name or a regular expression.
      init_weights: True, "mini" or "bat"; for "bat", r divides inputs and outputs.
      layers_to_transform: numbers of the layers that are adapted, all others are left out.
      layers_pattern: name before the number of a layer, if it is not the first number in the path.
      kernel_axes: by pattern, which axes of a kernel are inputs and outputs, as
        `optax.contrib.MuonDimensionNumbers`; by default they follow from names and shapes.
      adapter_dtype: dtype of the factors; by default the widest of float32 and the kernel's.
      bias: biases that are trained whole: "none", "all" of the model, or "lora_only", those of the
        layers with an adapter.
      modules_to_save: modules that are trained whole, by the end of their dotted name.

    Raises:
      ValueError: an unknown variant; at init, sides that r or mini_r do not divide, or
        fewer inputs than r.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jaxopt_lab import adapters
      >>> config = adapters.MissConfig(target_modules=["w"], r=2)
      >>> base, blocks = adapters.init_adapters({"w": jnp.zeros((4, 1))}, config)
      >>> blocks = {"w": {"miss_block": jnp.array([[1.0], [2.0]])}}
      >>> adapters.apply_adapters(base, blocks)["w"].ravel()
      Array([1., 2., 1., 2.], dtype=float32)

    References:
      Kang and Yin, `MiSS <https://arxiv.org/abs/2409.15371>`_, 2024.
    """

    target_modules: str | Sequence[str]
    r: int = 64
    mini_r: int = 1
    exclude_modules: str | Sequence[str] | None = None
    init_weights: bool | str = True
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    kernel_axes: Mapping[str, Any] | None = None
    adapter_dtype: Any = None
    bias: _whole.Bias = "none"
    modules_to_save: Sequence[str] | None = None

    def __post_init__(self) -> None:
        _targets.check(self)
        _checks.check_positive_integer(r=self.r, mini_r=self.mini_r)
        _whole.check(self)
        _checks.canonical_mu_dtype(self.adapter_dtype, "adapter_dtype")
        known = self.init_weights is True or isinstance(self.init_weights, str)
        if not known or self.init_weights not in (True, "mini", "bat"):
            raise ValueError(
                f"init_weights must be True, 'mini' or 'bat', got {self.init_weights!r}"
            )

    def __hash__(self) -> int:
        return hash((str(self.target_modules), self.r, self.mini_r))

    @property
    def additive(self) -> bool:
        """Whether the layer uses K + s a b."""
        return False

    def kernels(self, params: Any) -> tuple[Kernel, ...]:
        """Returns the kernels that get an adapter; see `init_adapters`."""
        targets = _targets.choose(params, self)
        found = tuple(Kernel(t.name, t.shape, t.axes, self.r, 1.0) for t in targets)
        for kernel in found:
            self.check(kernel)
        return found

    def changes_base(self, init: Any) -> bool:
        """Returns False."""
        del init
        return False

    def start(self, kernel: Kernel, matrices: jax.Array, key: Any, init: Any) -> Factors:
        """Returns the block of zeros."""
        del key
        if init is not None:
            raise ValueError("init is a start of low-rank factors; a MissConfig starts at zero")
        return {name: jnp.zeros(s, matrices.dtype) for name, s in self.shapes(kernel).items()}

    def shapes(self, kernel: Kernel) -> dict[str, tuple[int, ...]]:
        """Returns the shape of the block."""
        fan_out = kernel.matrix[1]
        shape = {
            True: (kernel.r, fan_out),
            "mini": (kernel.r, self.mini_r),
            "bat": (fan_out // kernel.r, kernel.r, kernel.r),
        }[self.init_weights]
        return {"miss_block": (*(kernel.shape[i] for i in kernel.axes.batch), *shape)}

    def effective(self, kernel: Kernel, whole: jax.Array, factors: Factors) -> jax.Array:
        """Returns K'."""
        block = self._block(kernel, factors)
        if self.init_weights != "bat":
            return whole + kernel.kernel(self._repeated(kernel, block))
        matrices = kernel.matrices(whole)
        tiles = _tiles(matrices, kernel.r)
        changed = tiles + _kernels.product(block, tiles) + block
        return kernel.kernel(_from_tiles(changed, matrices.shape))

    def merged(self, kernel: Kernel, whole: jax.Array, factors: Factors) -> jax.Array:
        """Returns K'."""
        return self.effective(kernel, whole, factors)

    def undo(self, kernel: Kernel, whole: jax.Array, factors: Factors) -> None:
        """Returns None."""
        del kernel, whole, factors

    def restored(self, kernel: Kernel, whole: jax.Array, factors: Factors, undo: Any) -> jax.Array:
        """Returns K."""
        del undo
        block = self._block(kernel, factors)
        if self.init_weights != "bat":
            return whole - kernel.kernel(self._repeated(kernel, block))
        matrices = kernel.matrices(whole)
        rest = _tiles(matrices, kernel.r) - block
        one_more = jnp.broadcast_to(block + jnp.eye(kernel.r, dtype=block.dtype), rest.shape)
        return kernel.kernel(_from_tiles(jnp.linalg.solve(one_more, rest), matrices.shape))

    def _block(self, kernel: Kernel, factors: Factors) -> jax.Array:
        block = factors["miss_block"]
        if self.init_weights != "bat":
            return block.reshape(-1, *block.shape[-2:])
        # One block for each r outputs, shared by all tiles along the inputs.
        return block.reshape(-1, 1, *block.shape[-3:])

    def _repeated(self, kernel: Kernel, block: jax.Array) -> jax.Array:
        """Returns the block repeated along the inputs, and the outputs of "mini"."""
        fan_in, fan_out = kernel.matrix
        if self.init_weights == "mini":
            block = jnp.tile(block, (1, 1, fan_out // self.mini_r))
        return jnp.tile(block, (1, -(-fan_in // kernel.r), 1))[:, :fan_in]

    def check(self, kernel: Kernel) -> None:
        """Raises ValueError where the block does not fit the sides of `kernel`."""
        fan_in, fan_out = kernel.matrix
        sizes = f"kernel '{kernel.name}' with {fan_in} inputs and {fan_out} outputs"
        if self.r > fan_in:
            raise ValueError(f"r={self.r} is above the inputs of {sizes}")
        if self.init_weights == "mini" and fan_out % self.mini_r:
            raise ValueError(f"mini_r={self.mini_r} must divide the outputs of {sizes}")
        if self.init_weights == "bat" and (fan_in % self.r or fan_out % self.r):
            raise ValueError(f"r={self.r} must divide both sides of {sizes} for 'bat'")


def _tiles(matrices: jax.Array, r: int) -> jax.Array:
    """(matrices, inputs, outputs) to (matrices, inputs / r, outputs / r, r inputs, r outputs)."""
    count, fan_in, fan_out = matrices.shape
    return matrices.reshape(count, fan_in // r, r, fan_out // r, r).transpose(0, 1, 3, 2, 4)


def _from_tiles(tiles: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return tiles.transpose(0, 1, 3, 2, 4).reshape(shape)
