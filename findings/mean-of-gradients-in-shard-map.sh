#!/usr/bin/env bash
# jax.lax.pmean of a gradient inside jax.shard_map, the line that pmap programs have.
#
# Guess before running: the mean of the devices' gradients, with and without check_vma.
# Seen with jax 0.10.2: with the default checking, the derivative with respect to a parameter that is
# equal on all devices is already the *sum* over them (the transpose of marking it as varying), pmean
# of equal numbers changes nothing, and the result is the number of devices times too large: 6 where
# the mean is 1.5. With check_vma=False the same function returns 1.5. No warning; the loss still
# falls, as under a rate four times as high, and with Adam nothing shows at all.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
XLA_FLAGS=--xla_force_host_platform_device_count=4 JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp

mesh = jax.make_mesh((4,), ("d",), (jax.sharding.AxisType.Auto,))


def mean_gradient(w, batch):
    return jax.lax.pmean(jax.grad(lambda w: jnp.mean(w * batch))(w), "d")


found = {}
for check in (True, False):
    mapped = jax.shard_map(
        mean_gradient, mesh=mesh, in_specs=(jax.P(), jax.P("d")), out_specs=jax.P(), check_vma=check
    )
    found[check] = float(mapped(jnp.ones(()), jnp.arange(4.0)))
print(found, "mean of the devices' gradients: 1.5")
assert found == {True: 6.0, False: 1.5}
PYTHON
