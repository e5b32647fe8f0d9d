"""Flax: its serialisation, its optimizers and train states, and helpers on the states it hands out.

Nothing here is imported before a check runs, and nothing runs where Flax is not installed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxopt_lab.testing._registry import NotApplicableError, check
from jaxopt_lab.testing._subject import DEVICES, Subject, require_devices, training_step
from jaxopt_lab.testing._values import (
    expect,
    expect_close,
    expect_equal,
    expect_same_types,
    kernel_and_bias,
    normal,
    normal_like,
)

_SEEDS = (10, 20, 30)


def _flax(module: str) -> Any:
    try:
        return importlib.import_module(f"flax.{module}")
    except ImportError as error:
        raise NotApplicableError(f"flax cannot be imported: {error}") from error


def _public() -> Any:
    """The library as its users import it: what it offers for a state must work on Flax's too."""
    import jaxopt_lab

    return jaxopt_lab


def _gradients() -> list[dict[str, jax.Array]]:
    return [normal_like(kernel_and_bias(), seed) for seed in _SEEDS]


def _arrays_only(tree: Any, path: str) -> None:
    if isinstance(tree, dict):
        for key, value in tree.items():
            _arrays_only(value, f"{path}/{key}")
    else:
        known = tree is None or isinstance(tree, (jax.Array, np.ndarray, np.generic, int, float))
        expect(known, f"{path} of the state dict is {type(tree).__name__}, expected an array")


@check("flax")
def flax_serialization(subject: Subject) -> None:
    """`to_bytes` and `from_bytes` give back every bit of the state, and the run goes on from it."""
    serialization = _flax("serialization")
    params, gradients = kernel_and_bias(), _gradients()
    run = subject.run(params, *gradients[:2])
    _arrays_only(serialization.to_state_dict(run.state), "state")
    data = serialization.to_bytes(run.state)
    restored = serialization.from_bytes(subject.transform.init(params), data)
    expect_equal(restored, run.state, "state")
    expected = subject.step(run.params, run.state, gradients[2])[0]
    resumed = jax.tree.map(jnp.asarray, restored)
    expect_equal(subject.step(run.params, resumed, gradients[2])[0], expected, "params")


class _Trained:
    """A Flax NNX model of a kernel and a bias, and its optimizer."""

    def __init__(self, transform: Any, params: dict[str, jax.Array] | None = None):
        nnx = self.nnx = _flax("nnx")

        class Model(nnx.Module):
            def __init__(self, kernel: jax.Array, bias: jax.Array):
                self.kernel, self.bias = nnx.Param(kernel), nnx.Param(bias)

        self.model = Model(**(params or kernel_and_bias()))
        self.weights = nnx.state(self.model, nnx.Param)
        self.optimizer = nnx.Optimizer(self.model, transform, wrt=nnx.Param)

        @nnx.jit
        def update(optimizer: Any, model: Any, gradient: dict[str, jax.Array]) -> None:
            def loss(model: Any) -> jax.Array:
                kernel, bias = model.kernel[...], model.bias[...]
                return jnp.sum(kernel * gradient["kernel"]) + jnp.sum(bias * gradient["bias"])

            optimizer.update(model, nnx.grad(loss)(model))

        self._update = update

    def update(self, gradients: Iterable[dict[str, jax.Array]]) -> None:
        for gradient in gradients:
            self._update(self.optimizer, self.model, gradient)

    @property
    def params(self) -> dict[str, jax.Array]:
        return {"kernel": self.model.kernel[...], "bias": self.model.bias[...]}

    def saved(self) -> tuple[Any, Any]:
        """Model and optimizer as dictionaries of NumPy arrays, as a checkpoint has them."""
        states = self.nnx.state(self.model), self.nnx.state(self.optimizer)
        return jax.tree.map(np.array, tuple(map(self.nnx.to_pure_dict, states)))

    def restore(self, saved: tuple[Any, Any]) -> None:
        for node, values in zip((self.model, self.optimizer), saved):
            state = self.nnx.state(node)
            self.nnx.replace_by_pure_dict(state, values)
            self.nnx.update(node, state)


@check("flax")
def nnx_optimizer(subject: Subject) -> None:
    """Three updates in `nnx.Optimizer` equal those of a loop over optax."""
    trained = _Trained(subject.transform)
    gradients = _gradients()
    trained.update(gradients)
    expect_close(trained.params, subject.run(kernel_and_bias(), *gradients).params, "params")


@check("flax")
def nnx_optimizer_restored(subject: Subject) -> None:
    """Saved as dictionaries after two updates and restored anew, the third is bit-equal."""
    gradients = _gradients()
    through = _Trained(subject.transform)
    through.update(gradients[:2])
    saved = through.saved()
    through.update(gradients[2:])
    restored = _Trained(subject.transform, jax.tree.map(jnp.zeros_like, kernel_and_bias()))
    restored.restore(saved)
    restored.update(gradients[2:])
    expect_equal(restored.params, through.params, "params")
    expect_equal(restored.saved()[1], through.saved()[1], "optimizer")


@check("flax")
def linen_train_state(subject: Subject) -> None:
    """Three updates of a `TrainState`, saved to bytes before the last, equal a loop over optax."""
    serialization = _flax("serialization")
    params, gradients = kernel_and_bias(), _gradients()
    create = _flax("training.train_state").TrainState.create
    # One function for both: a train state with another is another type to jit.
    make = lambda: create(apply_fn=jnp.dot, params=params, tx=subject.transform)  # noqa: E731
    apply = jax.jit(lambda state, gradient: state.apply_gradients(grads=gradient))
    state = make()
    for gradient in gradients[:2]:
        state = apply(state, gradient)
    state = serialization.from_bytes(make(), serialization.to_bytes(state))
    state = apply(jax.tree.map(jnp.asarray, state), gradients[2])
    expected = subject.run(params, *gradients)
    expect_close(state.params, expected.params, "params")
    expect_same_types(state.opt_state, expected.state, "state")


def _box(tree: dict[str, Any]) -> dict[str, Any]:
    """Kernel and bias as Linen's partitioned modules hold them, both split over the axis `x`."""
    partitioned = _flax("core.meta").Partitioned
    names = {"kernel": ("x", None), "bias": ("x",)}
    return {key: partitioned(value, names=names[key]) for key, value in tree.items()}


@check("flax")
def linen_partitioned(subject: Subject) -> None:
    """Weights in `nn.Partitioned` boxes: the same updates, and boxes with as many names as axes."""
    meta = _flax("core.meta")
    gradients = _gradients()
    params = _box(kernel_and_bias())
    state = subject.transform.init(params)
    step = jax.jit(training_step(subject.transform))
    for gradient in gradients:
        params, state, _ = step(params, state, _box(gradient))
    expected = subject.run(kernel_and_bias(), *gradients).params
    expect_close(meta.unbox(params), expected, "params")

    is_box: Callable[[Any], bool] = lambda node: isinstance(node, meta.AxisMetadata)  # noqa: E731
    for path, node in jax.tree_util.tree_flatten_with_path(state, is_leaf=is_box)[0]:
        for leaf in jax.tree.leaves(node.unbox()) if is_box(node) else ():
            expect(
                np.ndim(leaf) >= len(node.names),
                f"state{jax.tree_util.keystr(path)} of shape {np.shape(leaf)} is in the box of "
                f"axes {node.names}, from which Flax takes its sharding",
            )


@check("flax", level="library", traced=False)
def linen_partitioned_sharded(subject: Subject) -> None:
    """The state of weights in boxes is made by the shardings that `nn.get_sharding` finds."""
    linen = _flax("linen")
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((DEVICES,), ("x",), auto, devices=require_devices())
    params = _box({"kernel": normal((8, 4)), "bias": normal((4,), seed=1)})
    params = jax.device_put(params, linen.get_sharding(params, mesh))
    abstract = jax.eval_shape(subject.transform.init, params)
    found = linen.get_sharding(abstract, mesh)
    state = jax.jit(subject.transform.init, out_shardings=found)(params)
    expect_same_types(state, subject.transform.init(params), "state")


@check("flax", level="library")
def nnx_current_learning_rate(subject: Subject) -> None:
    """`current_learning_rate` reads a joined schedule's rate from the state of `nnx.Optimizer`."""
    constructor, arguments, _ = subject.require_argument("learning_rate")
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 3, 10)
    transform = constructor(**dict(arguments, learning_rate=schedule))
    trained = _Trained(transform)
    gradients = _gradients()
    trained.update(gradients)
    found = _public().current_learning_rate(trained.optimizer.opt_state, schedule)
    expect_close(jnp.asarray(found), jnp.asarray(schedule(len(gradients))), "the learning rate")


@check("flax", level="library", traced=False)
def nnx_state_bytes(subject: Subject) -> None:
    """`state_bytes` of the weights of an NNX model counts the bytes of the state it has."""
    weights = _Trained(optax.identity()).weights
    found = _public().state_bytes(subject.transform, weights).total
    state = jax.tree.leaves(subject.transform.init(kernel_and_bias()))
    # The data of a typed random key has a dtype, the key itself an extended one.
    expected = sum(leaf.size * leaf.dtype.itemsize for leaf in map(jnp.asarray, state))
    expect(found == expected, f"counts {found} bytes, but the state has {expected}")


@check("flax", level="library", traced=False)
def nnx_treatments(subject: Subject) -> None:
    """`treatments` says of the weights of an NNX model what it says of the same in a dictionary."""
    library = _public()
    treatments = getattr(library, "treatments", None) or library.subspace.treatments
    try:
        expected = treatments(subject.transform, kernel_and_bias())
    except (TypeError, ValueError) as error:
        raise NotApplicableError(f"treats no leaf in another way: {error}") from error
    found = treatments(subject.transform, _Trained(optax.identity()).weights)
    texts = [sorted(str(each).replace("/value", "").splitlines()) for each in (found, expected)]
    expect(texts[0] == texts[1], f"says {texts[0]}, but {texts[1]} of a dictionary")


@check("flax", level="library", traced=False)
def nnx_init_sharded(subject: Subject) -> None:
    """`init_sharded` and `state_shardings` take the weights of an NNX model, sharded or not."""
    library = _public()
    places: list[NamedSharding | None] = [None]
    if jax.device_count() >= DEVICES:
        auto = (jax.sharding.AxisType.Auto,)
        mesh = jax.make_mesh((DEVICES,), ("x",), auto, devices=jax.devices()[:DEVICES])
        places.append(NamedSharding(mesh, P("x")))
    for place in places:
        params = kernel_and_bias()
        if place is not None:
            params["kernel"] = jax.device_put(params["kernel"], place)
        weights = _Trained(optax.identity(), params).weights
        expected = subject.transform.init(weights)
        state = library.init_sharded(subject.transform, weights)
        expect_same_types(state, expected, "state")
        shardings = library.state_shardings(subject.transform, weights)
        if place is None:
            continue
        leaves, wanted = jax.tree.leaves(state), jax.tree.leaves(shardings)
        expect(len(leaves) == len(wanted), f"{len(wanted)} shardings for {len(leaves)} leaves")
        for leaf, sharding in zip(leaves, wanted):
            same = leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
            expect(same, f"a leaf of shape {leaf.shape} is placed as {leaf.sharding}")
