r"""How PyTorch lays out a layer's weight and its low-rank factors, and how they stand here.

With r the rank, E experts, and `window` the sizes of a convolution's window,

    dense         W (out, in)               A (r, in)             B (out, r)
    embedding     W (number, size)          A (r, number)         B (size, r)
    convolution   W (out, in, window...)    A (r, in, window...)  B (out, r, 1...)
    experts       W (E, out, in) or         A (E r, in)           B (out, r E)
                    (E, in, out)

Here a matrix is (inputs, outputs) with its axes flattened, a (inputs, r) and b (r, outputs).
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np

from jaxopt_lab import _names
from jaxopt_lab.adapters._kernels import Kernel

Kind = Literal["dense", "embedding", "convolution", "depthwise"]

_GROUPED = ", that of a grouped convolution, which is not supported"


class Layer(NamedTuple):
    """A kernel and what PyTorch's layer of it is."""

    kernel: Kernel
    kind: Kind

    @property
    def window(self) -> tuple[int, ...]:
        """Sizes of a convolution's window; nothing for other layers."""
        return self._split()[0] if self.kind == "convolution" else ()

    def a_shape(self, r: int) -> tuple[int, ...]:
        """Shape of A."""
        if self.kind == "convolution":
            window, channels = self._split()
            return (r, channels, *window)
        return (r, self.kernel.matrix[0])

    def b_shape(self, r: int) -> tuple[int, ...]:
        """Shape of B, for a kernel with all outputs of its module."""
        return (self.kernel.matrix[1], r, *(1 for _ in self.window))

    def read_a(self, a: np.ndarray, where: str) -> np.ndarray:
        """Returns (inputs, r) from A.

        Raises:
          ValueError: the shape is another one.
        """
        r, fan_in = a.shape[0] if a.ndim else 0, self.kernel.matrix[0]
        stored = self._as_stored(a.ndim)
        # A convolution over windows of one is a dense layer, and is stored as either.
        alike = a.ndim > 1 and a.shape[1] == fan_in and math.prod(a.shape[2:]) == 1
        if alike and math.prod(stored.window) == 1:
            return a.reshape(r, -1).T
        needed = stored.a_shape(r)
        if a.shape != needed:
            alike = a.ndim > 2 and a.ndim == len(needed) and a.shape[2:] == needed[2:]
            grouped = alike and a.shape[1] > needed[1] and a.shape[1] % needed[1] == 0
            grouped |= self.kind == "depthwise"
            raise ValueError(
                f"{where} has shape {a.shape}{_GROUPED if grouped else ''}; {self._needs(needed)}"
            )
        if stored.kind == "convolution" and self._channels_last():
            a = np.moveaxis(a, 1, -1)
        return a.reshape(r, -1).T

    def read_b(self, b: np.ndarray, r: int, rows: range | None, where: str) -> np.ndarray:
        """Returns (r, outputs) from B; of the outputs `rows`, or of all.

        Raises:
          ValueError: the shape is another one.
        """
        shape = (
            self.b_shape(r) if rows is None else (f"{rows[-1] + 1} or more", *self.b_shape(r)[1:])
        )
        fits = b.ndim > 1 and b.shape[1] == r and math.prod(b.shape[2:]) == 1
        if fits:
            fits = b.shape[0] == self.kernel.matrix[1] if rows is None else b.shape[0] > rows[-1]
        if not fits:
            grouped = b.ndim > 2 and b.shape[0] == self.kernel.matrix[1] and r % b.shape[1] == 0
            raise ValueError(
                f"{where} has shape {b.shape}{_GROUPED if grouped else ''}; {self._needs(shape)}"
            )
        b = b.reshape(b.shape[0], r)
        return (b if rows is None else b[list(rows)]).T

    def write_a(self, a: np.ndarray) -> np.ndarray:
        """Undoes `read_a`."""
        if self.kind == "convolution" and self._channels_last():
            window, channels = self._split()
            return np.moveaxis(a.T.reshape(-1, *window, channels), -1, 1)
        return a.T.reshape(self.a_shape(a.shape[1]))

    def read_weight(self, weight: np.ndarray, rows: range | None) -> np.ndarray | None:
        """Returns (inputs, outputs) from a module's weight; None if it has another shape."""
        if rows is not None:
            if weight.ndim == 0 or weight.shape[0] <= rows[-1]:
                return None
            weight = weight[list(rows)]
        if self.kind == "embedding":
            return weight if weight.shape == self.kernel.matrix else None
        try:
            matrix = self.read_a(weight, "")
        except ValueError:
            return None
        return matrix if matrix.shape == self.kernel.matrix else None

    def write_weight(self, matrix: np.ndarray) -> np.ndarray:
        """Undoes `read_weight`."""
        return matrix if self.kind == "embedding" else self.write_a(matrix)

    def _as_stored(self, ndim: int) -> Layer:
        """Returns the kind that the file's own axes show where names have left it open."""
        axes = len(self.kernel.axes.reduction)
        if self.kind == "dense" and axes > 1 and ndim == axes + 1:
            return self._replace(kind="convolution")
        named = _names.is_convolution(_names.parts_of(self.kernel.name))
        if self.kind == "convolution" and axes == 2 and ndim == 2 and not named:
            return self._replace(kind="dense")
        return self

    def _needs(self, shape: tuple[object, ...]) -> str:
        fan_in, fan_out = self.kernel.matrix
        return (
            f"kernel '{self.kernel.name}' with {fan_in} inputs and {fan_out} outputs needs "
            f"({', '.join(map(str, shape))})"
        )

    def _channels_last(self) -> bool:
        axes = self.kernel.axes
        return max(axes.output) > max(axes.reduction)

    def _split(self) -> tuple[tuple[int, ...], int]:
        sizes = tuple(self.kernel.shape[axis] for axis in self.kernel.axes.reduction)
        return (sizes[:-1], sizes[-1]) if self._channels_last() else (sizes[1:], sizes[0])


def layer(kernel: Kernel, role_kind: str) -> Layer:
    """Returns what PyTorch's layer of a kernel is, from its role, its axes and its name."""
    parts = _names.parts_of(kernel.name)
    if role_kind == "embedding" or parts[-1:] == ("embedding",):
        return Layer(kernel, "embedding")
    if role_kind == "depthwise":
        return Layer(kernel, "depthwise")
    attention = any({"attention", "attn"} & set(_names.words(part)) for part in parts)
    merges_heads = not _names.is_convolution(parts) and (_names.is_out(parts) or attention)
    if len(kernel.axes.reduction) < 2 or merges_heads or len(kernel.axes.output) > 1:
        return Layer(kernel, "dense")
    return Layer(kernel, "convolution")


def read_experts(
    kernel: Kernel, a: np.ndarray, b: np.ndarray, count: int, legacy: bool, where: str
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns a and b of each expert from A and B of a parameter.

    Args:
      kernel: the kernel here.
      a: A.
      b: B.
      count: number of experts.
      legacy: whether peft was older than 0.19, which took the parameter's second axis for the
        inputs, however the layer uses it.
      where: for messages.

    Raises:
      ValueError: shapes that do not fit, or that fit either way.
    """
    fan_in, fan_out = kernel.matrix
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or a.shape[0] % count:
        raise ValueError(
            f"{where}: 'lora_A.weight' has shape {a.shape} and 'lora_B.weight' {b.shape}; "
            f"{count} experts need (experts * r, inputs) and (outputs, r * experts)"
        )
    first = a.reshape(count, -1, a.shape[1])
    second = np.moveaxis(b.reshape(b.shape[0], -1, count), 2, 0)
    if legacy and fan_in == fan_out:
        raise ValueError(
            f"{where}: peft before 0.19 has written these experts, and for {fan_in} inputs and as "
            "many outputs nothing tells which factor has which; load and save them with a newer one"
        )
    if (a.shape[1], b.shape[0]) == (fan_in, fan_out):
        return [(one.T, two.T) for one, two in zip(first, second)]
    if (a.shape[1], b.shape[0]) == (fan_out, fan_in):
        return [(two, one) for one, two in zip(first, second)]
    raise ValueError(
        f"{where}: 'lora_A.weight' has shape {a.shape} and 'lora_B.weight' {b.shape}; kernel "
        f"'{kernel.name}' has {count} experts with {fan_in} inputs and {fan_out} outputs"
    )


def write_experts(pairs: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Undoes `read_experts`."""
    a = np.concatenate([a.T for a, _ in pairs])
    b = np.stack([b.T for _, b in pairs], axis=-1)
    return a, b.reshape(b.shape[0], -1)
