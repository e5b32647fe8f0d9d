"""The experiments on layers compare what differs in one thing."""

from __future__ import annotations

import jax
import numpy as np

from experiments import bench_norm, first_layer


def test_classifiers_differ_in_the_gradient_of_the_first_kernel_alone():
    found = []
    for name in ("plain", "TrAct, damping 0.1"):
        workload, errors = first_layer.made(first_layer.CONTENDERS[name])
        params = workload.init(jax.random.key(0))
        batch = jax.tree.map(lambda x: x[:64], workload.data["train"])
        found.append((*jax.jit(jax.value_and_grad(workload.loss))(params, batch), errors(params)))
    (loss, plain, errors), (other, tract, others) = found
    np.testing.assert_allclose(other, loss, rtol=1e-5)
    assert errors == others
    differs = jax.tree.map(lambda a, b: not np.allclose(a, b, rtol=1e-3, atol=1e-5), plain, tract)
    paths = [path for path, x in jax.tree.leaves_with_path(differs) if x]
    assert [jax.tree_util.keystr(path) for path in paths] == ["['first']['kernel']"]


def test_inputs_are_standardised():
    images, _ = first_layer.made(first_layer.CONTENDERS["plain"])[0].data["train"]
    np.testing.assert_allclose([images.mean(), images.std()], [0, 1], atol=1e-5)


def test_norms_are_the_same_function_as_their_plain_form():
    for name, (ours, plain, arrays, weights) in bench_norm.NORMS.items():
        x, w = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32)
        arguments = (x, w)[:arrays] + (w[0],) * weights
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
            ours(*arguments),
            plain(*arguments),
        )
        assert set(bench_norm.programs(ours, arguments)) == set(bench_norm.PASSES), name
