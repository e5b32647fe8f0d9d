r"""Optimizer state that is sharded like the parameters from the first step on.

The zeros that `init` makes depend on no parameter, so that under `jax.jit` nothing tells the
partitioner to split them: they land whole on every device, or all on one, and only the first
training step spreads them. That step is then compiled again, for the state that it returned.
"""

from __future__ import annotations

import collections
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jaxopt_lab import _mirrors, _tree

PyTree = Any


def init_sharded(tx: optax.GradientTransformation, params: PyTree) -> PyTree:
    """Makes the state of an optimizer with each moment sharded like its parameter.

    It is `jax.jit(tx.init, out_shardings=state_shardings(tx, params))(params)`: no device ever
    holds more than its shards. A training step that keeps the shardings of its inputs is compiled
    once; `out_shardings` make sure that it does.

    Args:
      tx: any optax transformation.
      params: tree of arrays, sharded over one mesh (with Auto or Explicit axes), or all on one
        device, or without a place of their own such as numpy arrays; see `state_shardings`.
        If a leaf is a `jax.ShapeDtypeStruct`, nothing is allocated.

    Returns:
      The state. If a leaf of `params` is a `jax.ShapeDtypeStruct`, a tree of
      `jax.ShapeDtypeStruct` with shardings, into which a checkpoint can be restored.

    Raises:
      ValueError: see `state_shardings`.
      TypeError: see `state_shardings`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jax.sharding import NamedSharding, PartitionSpec
      >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
      >>> rows = NamedSharding(mesh, PartitionSpec("data"))
      >>> params = {"w": jax.device_put(jnp.ones((64, 32)), rows)}
      >>> tx = optax.adamw(1e-3)
      >>> state = init_sharded(tx, params)
      >>> state[0].mu["w"].sharding == rows
      True
      >>> abstract = jax.tree.map(
      ...     lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=p.sharding), params
      ... )
      >>> init_sharded(tx, abstract)[0].nu["w"].sharding == rows
      True

    See Also:
      `state_shardings` for the rules.
    """
    state = _abstract_state(tx, params)
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params)):
        return state
    return jax.jit(tx.init, out_shardings=_shardings(state))(params)


def state_shardings(tx: optax.GradientTransformation, params: PyTree) -> PyTree:
    """Returns the shardings that an optimizer's state should have, without making the state.

    A leaf of the state belongs to a parameter if it stands in its place in a subtree with the keys
    of `params`, as in `optax.adamw`'s `mu`. If it has the parameter's shape, it gets the
    parameter's sharding. If not, the shorter of the two shapes is laid along the longer one, in
    order, where most sizes agree, and the leaf keeps the mesh axes of the dimensions that agree. If
    some do not agree, and two or more are longer than 1, each mesh axis that is left splits another
    dimension that it divides, one that agrees if there is any, so that moments of a part of the
    rows are not whole on every device where the parameter is split by rows. For a parameter
    (in, out) with `PartitionSpec("x", "y")`

    ==============================  ============  =======================
    leaf                            shape         specification
    ==============================  ============  =======================
    sums over columns               (in,)         ("x",)
    sums over rows                  (out,)        ("y",)
    moments of k directions         (k, out)      (None, ("y", "x"))
    where x y does not divide out   (k, out)      ("x", "y")
    scales of n blocks, see below   (in, n)       ("x", "y")
    history of k steps              (k, in, out)  (None, "x", "y")
    ==============================  ============  =======================

    Where several places fit a shorter leaf, as the sums of a square matrix, the leaves of this
    shape take them in turn, in the order of the state; a longer leaf has its extra dimensions in
    front. Beside a leaf of the parameter's shape in the same place, such as the int8 codes of
    `quantize_state`, n also agrees with a size that is a multiple of it, if each shard holds as
    many blocks, and mesh axes that are left split nothing.

    Arrays that belong to no parameter and have the shape of some, such as the moments of the layer
    whose turn it is in `badam`, get the sharding that most parameters of this shape have. All other
    leaves are replicated over the mesh: counters, keys, indices, and the bases of `galore_adamw`.

    Bytes of state on each of 8 devices, for 8 kernels of (64, 256) in float32, of which FRUGAL
    keeps a quarter, and GaLore and DCT 16 directions each:

    ==================  =========  =========  ================
    state               rows       columns    both, over (4, 2)
    ==================  =========  =========  ================
    `optax.adamw`         131,076    131,076           131,076
    `frugal_adamw`         33,292     33,292            33,292
    `galore_adamw`         65,548     65,548            65,548
    `dct_adamw`            33,292     33,292            33,292
    `badam`                16,404     16,404            16,404
    int8 `optax.adamw`     33,288     36,872            33,800
    ==================  =========  =========  ================

    As `out_shardings` of a user's own jitted step, they make it compile once whatever placement
    the partitioner would have preferred.

    Args:
      tx: any optax transformation; only its `init` is used, and only abstractly.
      params: tree of arrays or `jax.ShapeDtypeStruct` with a `NamedSharding` on one mesh, or all
        on one device. Leaves without a sharding and arrays not committed to a device are taken as
        replicated, if there are others. To a bare array belongs every leaf of the state.

    Returns:
      A tree like the state: of `NamedSharding`, of `SingleDeviceSharding` if all parameters are
      committed to one device, or of None if no parameter has a place.

    Raises:
      ValueError: two leaves are on different meshes or devices, or a mesh does not divide a shape.
      TypeError: a leaf has a sharding of another kind or is traced, or `tx` has no `init`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jax.sharding import NamedSharding, PartitionSpec
      >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
      >>> rows = NamedSharding(mesh, PartitionSpec("data"))
      >>> params = {"w": jax.ShapeDtypeStruct((256, 512), jnp.float32, sharding=rows)}
      >>> found = state_shardings(optax.scale_by_factored_rms(), params)
      >>> found.v_row["w"].spec == PartitionSpec("data")  # shape (256,)
      True
      >>> found.v_col["w"].spec == PartitionSpec(None)  # shape (512,)
      True

    See Also:
      `init_sharded`, which makes such a state.
    """
    return _shardings(_abstract_state(tx, params))


def _shardings(state: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: leaf.sharding, state)


def _abstract_state(tx: optax.GradientTransformation, params: PyTree) -> PyTree:
    if not callable(getattr(tx, "init", None)):
        raise TypeError(f"tx must be an optax.GradientTransformation, got {type(tx).__name__}")
    default, shardings = _placement(params)
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    owners: dict[Any, Any] = {
        path: (jnp.shape(p), like) for (path, p), like in zip(flat, shardings)
    }
    state = jax.eval_shape(tx.init, params)
    leaves, structure = jax.tree.flatten(state)
    if jax.tree_util.all_leaves([params]):
        owned = [_mirrors.Owned((), leaf, (), ()) for leaf in leaves]
    else:
        owned = _mirrors.owned_leaves(state, params)
    whole = {
        (leaf.owner, leaf.mirror)
        for leaf in owned
        if leaf.owner is not None and leaf.leaf.shape == owners[leaf.owner][0]
    }
    turns = collections.Counter()
    alike: dict[Any, collections.Counter] = collections.defaultdict(collections.Counter)
    for shape, like in owners.values():
        alike[shape][like] += 1

    def place(leaf: jax.ShapeDtypeStruct, owner: Any, mirror: Any) -> Sharding | None:
        if owner is None and leaf.ndim and leaf.shape in alike:
            (most, _), *_ = alike[leaf.shape].most_common(1)
            return default if most is None else most
        shape, like = owners[owner] if owner is not None else ((), None)
        if not isinstance(like, NamedSharding):
            return default
        if leaf.shape == shape:
            return like
        turn = turns[owner, leaf.shape]
        turns[owner, leaf.shape] += 1
        return _aligned(leaf.shape, shape, like, turn, blocks=(owner, mirror) in whole)

    found = [place(leaf.leaf, leaf.owner, leaf.mirror) for leaf in owned]
    placed = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding, weak_type=x.weak_type)
        for x, sharding in zip(leaves, found)
    ]
    return structure.unflatten(placed)


def _placement(params: PyTree) -> tuple[Sharding | None, list[Sharding | None]]:
    """Returns the sharding of what belongs to no parameter, and the shardings of the parameters."""
    first: tuple[str, Any] | None = None
    default: Sharding | None = None
    shardings = []
    for name, leaf in _tree.leaves_with_names(params):
        name = name or "params"
        sharding = _sharding(name, leaf)
        shardings.append(sharding)
        if sharding is None:
            continue
        place = sharding.mesh if isinstance(sharding, NamedSharding) else sharding.device_set
        if first is None:
            first = name, place
            named = isinstance(sharding, NamedSharding)
            default = NamedSharding(sharding.mesh, PartitionSpec()) if named else sharding
        elif place != first[1]:
            raise ValueError(
                "the parameters must be on one mesh or on one device: "
                f"'{first[0]}' is on {first[1]}, '{name}' on {place}"
            )
    return default, shardings


def _sharding(name: str, leaf: Any) -> Sharding | None:
    if isinstance(leaf, Tracer):
        raise TypeError(f"'{name}' is traced and has no sharding; call this outside of jax.jit")
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        return None
    if isinstance(sharding, NamedSharding):
        try:
            sharding.shard_shape(jnp.shape(leaf))
        except ValueError as error:
            raise ValueError(f"'{name}': {error}") from error
        return sharding
    if not isinstance(sharding, SingleDeviceSharding):
        raise TypeError(
            f"'{name}' has a {type(sharding).__name__}; expected a NamedSharding or one device"
        )
    return sharding if getattr(leaf, "committed", True) else None


def _aligned(
    shape: Sequence[int],
    param_shape: Sequence[int],
    like: NamedSharding,
    turn: int,
    blocks: bool,
) -> NamedSharding:
    """Returns the sharding of a leaf whose shape is not its parameter's."""
    names = (*like.spec, *[None] * (len(param_shape) - len(like.spec)))
    part = like.shard_shape(tuple(param_shape))
    blocks = blocks and len(shape) == len(param_shape)

    def agree(dim: int, axis: int) -> bool:
        n, size = shape[dim], param_shape[axis]
        evenly = blocks and 0 < n < size and size % n == 0 and n * part[axis] % size == 0
        return n == size or evenly

    longer = len(shape) > len(param_shape)
    long, short = sorted((len(shape), len(param_shape)), reverse=True)
    fits = []
    for chosen in itertools.combinations(range(long), short):
        pairs = zip(chosen, range(short)) if longer else zip(range(short), chosen)
        fits.append({dim: axis for dim, axis in pairs if agree(dim, axis)})
    best = [fit for fit in fits if len(fit) == max(map(len, fits))]
    fit = best[-1] if longer else best[turn % len(best)]
    spec = [names[fit[dim]] if dim in fit else None for dim in range(len(shape))]
    if not blocks and len(fit) < len(shape) and sum(size > 1 for size in shape) > 1:
        left = [name for axis, name in enumerate(names) if axis not in fit.values()]
        spec = _split_further(shape, spec, left, like.mesh.shape, set(fit))
    return NamedSharding(like.mesh, PartitionSpec(*spec), memory_kind=like.memory_kind)


def _split_further(
    shape: Sequence[int],
    spec: list[Any],
    names: Sequence[Any],
    mesh: Mapping[Any, int],
    survives: Any,
) -> list[Any]:
    """Returns a specification that has also the mesh axes in `names`, where they divide a size.

    Args:
      shape: of the leaf.
      spec: its specification so far.
      names: entries of the parameter's specification that the leaf has not.
      mesh: sizes of the mesh axes.
      survives: the dimensions that agree with the parameter's.
    """
    axes = [_axes(name) for name in spec]
    for axis in itertools.chain.from_iterable(map(_axes, names)):
        parts = [math.prod(mesh[name] for name in own) * mesh[axis] for own in axes]
        fits = [dim for dim, size in enumerate(shape) if size and size % parts[dim] == 0]
        if fits:
            # Sides that are there in full first: what is computed between them and the parameter
            # keeps to one exchange. Then what nothing splits yet, the longest, the last.
            dim = max(fits, key=lambda dim: (dim in survives, not axes[dim], shape[dim], dim))
            axes[dim] = (*axes[dim], axis)
    return [own[0] if len(own) == 1 else own or None for own in axes]


def _axes(name: Any) -> tuple[Any, ...]:
    """Returns the mesh axes of one entry of a specification."""
    if isinstance(name, tuple):
        return name
    return (name,) if isinstance(name, str) else ()
