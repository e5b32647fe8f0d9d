"""A kernel that gets an adapter: its path, its axes, and the matrices that it stands for.

Every method is written for a stack of matrices (matrices, inputs, outputs). A low-rank pair keeps
the kernel's own axes: `lora_a` is (batch..., inputs..., r) and `lora_b` (batch..., r, outputs...),
so that each can be sharded like the kernel and applied by the layer's own product.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_lab import _matrices, _names

Factors = dict[str, jax.Array]


class Kernel(NamedTuple):
    """One kernel with an adapter; hashable, without arrays."""

    name: str  # path, such as "encoder/query/kernel"
    shape: tuple[int, ...]
    axes: _matrices.MatrixAxes
    r: int
    scaling: float  # factor of lora_a @ lora_b; 1 for methods without one

    @property
    def matrix(self) -> tuple[int, int]:
        """Inputs and outputs of each matrix."""
        return self._size(self.axes.reduction), self._size(self.axes.output)

    @property
    def count(self) -> int:
        """Number of matrices: 1 for a kernel that is no stack."""
        return self._size(self.axes.batch)

    @property
    def is_embedding(self) -> bool:
        """Whether it is a table whose rows are looked up, by its name."""
        parts = _names.parts_of(self.name)
        return _names.is_table(parts) and _names.words(parts[-1])[0] not in ("kernel", "w")

    def matrices(self, x: jax.Array) -> jax.Array:
        """Reshapes a kernel to (matrices, inputs, outputs)."""
        return _matrices.to_matrices(x, self.axes)

    def kernel(self, matrices: jax.Array) -> jax.Array:
        """Undoes `matrices`."""
        return _matrices.from_matrices(matrices, self.axes, self.shape)

    def pair(self, a: jax.Array, b: jax.Array) -> Factors:
        """Returns (matrices, inputs, r) and (matrices, r, outputs) with the kernel's axes."""
        shapes = self._replace(r=a.shape[-1]).pair_shapes()
        return {"lora_a": a.reshape(shapes["lora_a"]), "lora_b": b.reshape(shapes["lora_b"])}

    def pair_shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of what `pair` makes."""
        batch, inputs, outputs = (tuple(self.shape[i] for i in group) for group in self.axes)
        return {"lora_a": (*batch, *inputs, self.r), "lora_b": (*batch, self.r, *outputs)}

    def stacks(self, factors: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Undoes `pair`."""
        fan_in, fan_out = self.matrix
        a, b = factors["lora_a"], factors["lora_b"]
        rank = a.shape[-1]
        return a.reshape(-1, fan_in, rank), b.reshape(-1, rank, fan_out)

    def change(self, factors: Mapping[str, jax.Array]) -> jax.Array:
        """Returns a b with the kernel's axes, from products over the factors' own axes."""
        count = len(self.axes.batch)
        a, b = factors["lora_a"], factors["lora_b"]
        batch = tuple(range(count))
        dims = (((a.ndim - 1,), (count,)), (batch, batch))
        found = jax.lax.dot_general(a, b, dims, precision=jax.lax.Precision.HIGHEST)
        return jnp.transpose(found, np.argsort(sum(self.axes, ())).tolist())

    def by_output(self, x: jax.Array) -> jax.Array:
        """Reshapes one value an output unit, (batch..., outputs...), to broadcast over kernels."""
        axes = self.axes.batch + self.axes.output
        standing = jnp.transpose(x, np.argsort(axes).tolist())
        return jnp.expand_dims(standing, self.axes.reduction)

    def outputs(self, x: jax.Array) -> jax.Array:
        """Undoes `by_output`."""
        standing = jnp.squeeze(x, self.axes.reduction)
        axes = self.axes.batch + self.axes.output
        return jnp.transpose(standing, np.argsort(np.argsort(axes)).tolist())

    def _size(self, axes: tuple[int, ...]) -> int:
        return int(np.prod([self.shape[i] for i in axes], dtype=np.int64))


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """Stacked matrix product without the shortcuts of accelerators."""
    return jnp.matmul(a, b, precision="highest")


def insert(tree: dict[str, Any], name: str, value: Any) -> None:
    """Puts `value` at a path of nested dictionaries."""
    *parents, last = name.split("/")
    for key in parents:
        tree = tree.setdefault(key, {})
    tree[last] = value


def lookup(tree: Mapping[str, Any], name: str) -> Any:
    """Returns what `insert` has put there.

    Raises:
      ValueError: there is nothing; the message has the path.
    """
    found: Any = tree
    for key in name.split("/"):
        if not isinstance(found, Mapping) or key not in found:
            raise ValueError(
                f"the adapters have nothing at '{name}': were they made for other parameters?"
            )
        found = found[key]
    return found


def check_factors(factors: Any, name: str, shapes: Mapping[str, tuple[int, ...]], who: str) -> None:
    """Refuses factors of a kernel that are not those of the given names and shapes.

    Raises:
      ValueError: the message begins with `who` and has the path.
    """
    found = factors if isinstance(factors, Mapping) else {"": factors}
    for factor in [*shapes, *found]:
        if factor not in found or factor not in shapes or shape_of(found[factor]) != shapes[factor]:
            has = {key: shown(value) for key, value in found.items()}
            raise ValueError(
                f"{who} {_listed(has)} for kernel '{name}', which needs "
                f"{_listed({k: f'shape {shape}' for k, shape in shapes.items()})}: another rank or "
                "variant, or other parameters?"
            )


def shape_of(value: Any) -> tuple[int, ...] | None:
    """Returns the shape of an array, abstract ones included, or None for anything else."""
    return getattr(value, "shape", None)


def shown(value: Any) -> str:
    """Returns what to call something in a message that is about shapes."""
    shape = shape_of(value)
    return f"a {type(value).__name__}" if shape is None else f"shape {shape}"


def _listed(found: Mapping[str, str]) -> str:
    texts = [f"{name} of {what}" if name else what for name, what in found.items()]
    return ", ".join(texts) or "nothing"


def replace_leaves(params: Any, new: Mapping[str, Any]) -> Any:
    """Returns `params` with the leaves named in `new` replaced; the container stays."""
    flat, structure = jax.tree_util.tree_flatten_with_path(params)
    return jax.tree.unflatten(structure, [new.get(leaf_name(path), leaf) for path, leaf in flat])


def named_leaves(params: Any) -> dict[str, Any]:
    """Returns the leaves by name."""
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    return {leaf_name(path): leaf for path, leaf in flat}


def leaf_name(path: tuple[Any, ...]) -> str:
    """Returns a path as `encoder/query/kernel`, in all containers.

    The leaves of Flax's boxes (`nnx.Variable`, `nn.Partitioned`) are attributes called `value`.
    """
    if len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")
