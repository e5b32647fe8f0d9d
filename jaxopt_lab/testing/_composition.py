"""Composition with optax: chains, masks, partitions and wrappers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxopt_lab.testing._causes import cause_of
from jaxopt_lab.testing._registry import BreachError, NotApplicableError, check
from jaxopt_lab.testing._subject import Subject, training_step
from jaxopt_lab.testing._values import (
    BFLOAT16_TOLERANCE,
    FLOAT32_TOLERANCE,
    expect,
    expect_close,
    expect_equal,
    expect_finite,
    expect_same_types,
    kernel_and_bias,
    normal_like,
)

# As an array, a decay such as 0.999 is rounded to float32 before 1 - b**t is taken: 1e-4 of it.
_INJECTED_TOLERANCE = 1e-3


def _run(transform: Any, params: Any, *gradients: Any) -> tuple[Any, Any, list[Any]]:
    """Compiled steps of a wrapper, checking the state's types; returns every update."""
    step = jax.jit(training_step(transform))
    initial = state = transform.init(params)
    history = []
    for gradient in gradients:
        params, state, updates = step(params, state, gradient)
        history.append(updates)
    expect_same_types(state, initial, "state")
    return params, state, history


@check("composition")
def chain(subject: Subject) -> None:
    """In a chain with clipping, decay and a schedule: the same as the four by hand."""
    params, gradient = kernel_and_bias(), normal_like(kernel_and_bias())
    clip, decay = optax.clip_by_global_norm(1.0), optax.add_decayed_weights(1e-2)
    schedule = optax.linear_schedule(1.0, 0.5, 4)
    chained = optax.chain(clip, subject.transform, decay, optax.scale_by_schedule(schedule))
    weights, _, found = _run(chained, params, gradient, gradient)

    state = subject.transform.init(params)
    clipped, _ = clip.update(gradient, clip.init(params))
    for index in range(2):
        _, state, updates = subject.step(params, state, clipped)
        updates, _ = decay.update(updates, decay.init(params), params)
        updates = jax.tree.map(lambda leaf: leaf * schedule(index), updates)  # noqa: B023
        expect_close(found[index], updates, "updates")
        params = optax.apply_updates(params, updates)
    expect_close(weights, params, "params")


@check("composition")
def masked(subject: Subject) -> None:
    """Inside `optax.masked`: the chosen leaf as if alone, the other passed through."""
    params, gradient = kernel_and_bias(), normal_like(kernel_and_bias())
    masked = optax.masked(subject.transform, {"kernel": True, "bias": False})
    found = _run(masked, params, gradient, gradient)[2][0]
    alone = subject.run({"kernel": params["kernel"]}, {"kernel": gradient["kernel"]})
    expect_close(found["kernel"], alone.updates["kernel"], "updates['kernel']")
    expect_equal(found["bias"], gradient["bias"], "updates['bias']")


def _partitioned(subject: Subject, partition: Any, labels: dict[str, str]) -> None:
    params, gradient = kernel_and_bias(), normal_like(kernel_and_bias())
    transforms = {"subject": subject.transform, "sgd": optax.sgd(1.0)}
    found = _run(partition(transforms, labels), params, gradient, gradient)[2][0]
    chosen = [name for name, label in labels.items() if label == "subject"]
    if chosen:
        alone = subject.run(
            {name: params[name] for name in chosen}, {name: gradient[name] for name in chosen}
        )
        for name in chosen:
            expect_close(found[name], alone.updates[name], f"updates[{name!r}]")
    for name in params.keys() - set(chosen):
        expect_equal(found[name], -gradient[name], f"updates[{name!r}]")


@check("composition")
def partition(subject: Subject) -> None:
    """Under a label of `optax.partition`: the labelled leaf as if alone."""
    _partitioned(subject, optax.partition, {"kernel": "subject", "bias": "sgd"})


@check("composition")
def partition_empty_label(subject: Subject) -> None:
    """Under a label of `optax.partition` that no leaf has."""
    _partitioned(subject, optax.partition, {"kernel": "sgd", "bias": "sgd"})


@check("composition")
def multi_transform(subject: Subject) -> None:
    """Under a label of `optax.multi_transform`, where optax still has that name."""
    if not hasattr(optax, "multi_transform"):
        raise NotApplicableError("this optax has no multi_transform")
    _partitioned(subject, optax.multi_transform, {"kernel": "subject", "bias": "sgd"})


@check("composition")
def freeze(subject: Subject) -> None:
    """Beside `optax.set_to_zero` in a partition: frozen weights keep their bits."""
    params = kernel_and_bias()
    frozen = optax.partition(
        {"train": subject.transform, "freeze": optax.set_to_zero()},
        {"kernel": "train", "bias": "freeze"},
    )
    gradients = [normal_like(params, seed) for seed in (10, 20, 30)]
    weights, _, updates = _run(frozen, params, *gradients)
    expect_equal(weights["bias"], params["bias"], "params['bias']")
    expect_finite(updates[-1], "updates")


def _any_nonzero(tree: Any) -> bool:
    return any(bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(tree))


def _multi_steps(subject: Subject, dtype: str, tolerance: float) -> None:
    params = kernel_and_bias(dtype)
    gradient = normal_like(params)
    expected = subject.run(params, gradient).updates
    for every in (2, 3):
        wrapped = optax.MultiSteps(subject.transform, every)
        updates = _run(wrapped, params, *[gradient] * every)[2]
        # By value: zero may carry a sign.
        moved = [micro for micro, update in enumerate(updates[:-1], 1) if _any_nonzero(update)]
        expect(not moved, f"updates of micro-steps {moved} of {every} are not zero")
        expect_close(updates[-1], expected, f"updates after {every} micro-steps", tolerance)


@check("composition")
def multi_steps_float32(subject: Subject) -> None:
    """In `optax.MultiSteps` of 2 and 3: zero updates between, then those of the mean gradient."""
    _multi_steps(subject, "float32", FLOAT32_TOLERANCE)


@check("composition")
def multi_steps_bfloat16(subject: Subject) -> None:
    """In `optax.MultiSteps` of 2 and 3 with bfloat16 weights."""
    _multi_steps(subject, "bfloat16", BFLOAT16_TOLERANCE)


def _inject(subject: Subject, **options: Any) -> optax.GradientTransformation:
    constructor, arguments = subject.constructor_and_arguments()
    # What is no number to tune stays as given: a function other than a schedule, a count.
    static = [
        name
        for name, value in arguments.items()
        if name != "learning_rate" and (callable(value) or isinstance(value, int))
    ]
    wrapped = optax.inject_hyperparams(constructor, static_args=static, **options)
    return wrapped(*subject.args, **subject.kwargs)


def _injected_equals_plain(subject: Subject, dtype: str, tolerance: float, **options: Any) -> None:
    injected = _inject(subject, **options)
    params = kernel_and_bias(dtype)
    gradients = [normal_like(params, seed) for seed in (10, 20)]
    _, _, found = _run(injected, params, *gradients)
    expect_same_types(found[-1], params, "updates")
    expect_close(found[-1], subject.run(params, *gradients).updates, "updates", tolerance)


@check("composition")
def inject_hyperparams(subject: Subject) -> None:
    """Through `optax.inject_hyperparams`: the same updates."""
    _injected_equals_plain(subject, "float32", _INJECTED_TOLERANCE)


@check("composition", level="library")
def inject_hyperparams_bfloat16(subject: Subject) -> None:
    """Through `inject_hyperparams(hyperparam_dtype=float32)` with bfloat16 weights: the same."""
    _injected_equals_plain(subject, "bfloat16", BFLOAT16_TOLERANCE, hyperparam_dtype=np.float32)


@check("composition", level="library", traced=False)
def inject_hyperparams_rounded(subject: Subject) -> None:
    """Hyper-parameters rounded to bfloat16: finite updates, or a refusal naming hyperparam_dtype.

    By default `optax.inject_hyperparams` stores them in the weights' dtype, where 0.999 is 1.
    """
    injected = _inject(subject)
    params = kernel_and_bias("bfloat16")
    try:
        state = injected.init(params)
        updates, _ = injected.update(normal_like(params), state, params)
    except ValueError as error:
        if "hyperparam_dtype" not in str(error):
            raise
        return
    expect_finite(updates, "updates")


@check("composition")
def learning_rate_schedule(subject: Subject) -> None:
    """A schedule as `learning_rate`: a constant one gives the same updates as the number."""
    constructor, arguments = subject.constructor_and_arguments()
    rate = arguments.get("learning_rate")
    if not isinstance(rate, (int, float)):
        raise NotApplicableError("has no learning_rate, or it is not a number")
    arguments["learning_rate"] = optax.constant_schedule(rate)
    try:
        scheduled = constructor(**arguments)
    except TypeError as error:
        raise BreachError(f"a schedule as learning_rate is refused: {error}") from error
    params = kernel_and_bias()
    gradients = [normal_like(params, seed) for seed in (10, 20)]
    _, _, found = _run(scheduled, params, *gradients)
    expect_close(found[-1], subject.run(params, *gradients).updates, "updates")


@check("composition")
def apply_if_finite(subject: Subject) -> None:
    """In `optax.apply_if_finite`: NaN and inf change neither weights nor state, then it goes on."""
    wrapped = optax.apply_if_finite(subject.transform, max_consecutive_errors=5)
    step = jax.jit(training_step(wrapped))
    params = kernel_and_bias()
    first, second = normal_like(params, 10), normal_like(params, 20)
    weights, state, _ = step(params, wrapped.init(params), first)
    for value in (np.nan, np.inf):
        bad = dict(first, bias=first["bias"].at[0].set(value))
        kept_weights, kept_state, _ = step(weights, state, bad)
        expect_equal(kept_weights, weights, f"params after {value}")
        expect_equal(kept_state.inner_state, state.inner_state, f"state after {value}")
        state = kept_state
    weights, _, _ = step(weights, state, second)
    expect_close(weights, subject.run(params, first, second).params, "params after recovery")


@check("composition", traced=False)
def extra_arguments(subject: Subject) -> None:
    """Extra keyword arguments of `update` are accepted, and unknown ones change nothing."""
    params = kernel_and_bias()
    transform = optax.with_extra_args_support(subject.transform)
    state, gradient = transform.init(params), normal_like(params)
    plain, _ = transform.update(gradient, state, params)
    extra, _ = transform.update(gradient, state, params, unknown_argument=jnp.ones(()))
    expect_equal(extra, plain, "updates")


@check("composition", traced=False)
def extra_arguments_ready_made(subject: Subject) -> None:
    """`update(..., value=..., grad=..., loss=...)` of a ready-made optimizer ignores what is new.

    Solvers, `flax.nnx.Optimizer` and train states of others pass such arguments unasked.
    """
    subject.require_ready_made("extra_arguments_ready_made")
    params = kernel_and_bias()
    state, gradient = subject.transform.init(params), normal_like(params)
    update: Any = subject.transform.update
    value = jnp.ones(())
    extra = {"value": value, "grad": gradient, "loss": value, "unknown_argument": value}
    try:
        found, _ = update(gradient, state, params, **extra, value_fn=lambda params: value)
    except TypeError as error:
        raise BreachError(f"extra arguments are refused: {cause_of(error).text}") from error
    if not isinstance(subject.transform, optax.GradientTransformationExtraArgs):
        raise BreachError("is no GradientTransformationExtraArgs: wrappers keep extra arguments")
    expected, _ = optax.with_extra_args_support(subject.transform).update(gradient, state, params)
    expect_equal(found, expected, "updates")


@check("composition", traced=False)
def tree_map_params(subject: Subject) -> None:
    """`optax.tree.map_params` reaches every leaf of the state that is shaped like a parameter."""
    params = kernel_and_bias()
    state = subject.transform.init(params)
    mapped = optax.tree.map_params(subject.transform, lambda leaf: _Reached(), state)
    shapes = {leaf.shape for leaf in params.values()}
    reached = jax.tree.leaves(mapped, is_leaf=lambda leaf: isinstance(leaf, _Reached))
    for (path, leaf), new in zip(
        jax.tree_util.tree_flatten_with_path(state)[0], reached, strict=True
    ):
        missed = np.shape(leaf) in shapes and not isinstance(new, _Reached)
        name = jax.tree_util.keystr(path)
        expect(not missed, f"state{name} of shape {np.shape(leaf)} is not reached")


class _Reached:
    """Marks a leaf that a function was applied to."""
