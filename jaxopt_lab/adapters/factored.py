r"""Low-rank adapters as products of their own: the adapted kernel is never made.

    x K' = x K + s (x a) b,    while training with dropout    x K + s ((m x / (1 - p)) a) b

m zero with probability p and one otherwise, for each entry of x. Hu et al., "LoRA", ICLR 2022,
arXiv:2106.09685, equation 3.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_lab import _checks, _tree
from jaxopt_lab.adapters import _kernels, _trace
from jaxopt_lab.adapters._kernels import Factors
from jaxopt_lab.adapters._trace import Convolution, Dot, Tracked
from jaxopt_lab.adapters.adapt import AdapterBase, AdapterConfig, parts, require_apart

_KEYS = "dropout_keys"


def factored(fun: Callable[..., Any]) -> Callable[..., Any]:
    r"""Turns a function of parameters into one of a base and adapters, with factored products.

    .. math::
      x K' = x K + s (x a) b

    The function is traced, and each product of a kernel that has a low-rank pair becomes three: in
    dense layers, `DenseGeneral` and attention, einsums, experts, convolutions, in layers stacked
    for `jax.lax.scan` or under `jax.checkpoint`, of any framework. What cannot be followed (a
    kernel used in another way, DoRA, MiSS) is given the adapted kernel, as by `apply_adapters`.
    Neither the adapted kernel nor its gradient then exists. This saves memory where the kernels are
    large beside the activations; where activations dominate it does not, as each product has an
    output more. It costs two narrow products.

    With a key the inputs of each `a` have the dropout of `LoraConfig(lora_dropout=p)`, entry by
    entry and anew for each layer, use and step of a scan; the layer's own product sees all of x,
    and embeddings that are looked up have none, as in `peft`. Give another key at each step.

    Args:
      fun: `fun(params, *args)`; positional arguments are trees of arrays.

    Returns:
      `function(base, adapters, *args, key=None)`, without a key equal to
      `fun(merge_adapters(base, adapters).params, *args)` up to rounding.

    Raises:
      TypeError: `base` is not from `init_adapters`, or the key is none.
      ValueError: the adapters are merged into the base, or are for other parameters or of another
        rank; dropout at a kernel that cannot be followed.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jaxopt_lab import adapters
      >>> config = adapters.LoraConfig(target_modules=["w"], r=1)
      >>> base, lora = adapters.init_adapters({"w": jnp.eye(2)}, config, jax.random.key(0))
      >>> model = lambda params, x: jnp.tanh(x @ params["w"])
      >>> adapters.factored(model)(base, lora, jnp.zeros(2))
      Array([0., 0.], dtype=float32)

    References:
      Hu et al., `LoRA <https://arxiv.org/abs/2106.09685>`_, ICLR 2022, equation 3.
    """
    _checks.check_function(fun=fun)

    @functools.wraps(fun)
    def function(
        base: AdapterBase, adapters: Mapping[str, Any], *args: Any, key: jax.Array | None = None
    ) -> Any:
        require_apart(base, "factored")
        factors, whole = parts(base, adapters)
        leaves = _kernels.named_leaves(base.params)
        new = {name: x.astype(leaves[name].dtype) for name, x in whole.items()}
        params = _kernels.replace_leaves(base.params, new)
        rate = getattr(base.config, "lora_dropout", 0.0)
        if key is not None:
            key = _typed(key)
            factors = _with_keys(base, factors, key) if rate else factors
        handler = _Factored(base.config, rate, collections.Counter())
        out, _ = _trace.evaluate(fun, params, base.kernels, factors, handler, *args)
        return out

    return function


def _typed(key: jax.Array) -> jax.Array:
    """Returns one random key, of those with a type of their own."""
    if getattr(key, "dtype", None) == jnp.uint32:
        key = jax.random.wrap_key_data(key)
    dtype = getattr(key, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key) or key.shape != ():
        raise TypeError(f"key must be one random key, as from jax.random.key(0), got {key!r}")
    return key


def _with_keys(
    base: AdapterBase, factors: Mapping[str, Factors], key: jax.Array
) -> dict[str, Factors]:
    """Gives each matrix that drops inputs a key of its own, which scans take apart with it."""
    found = dict(factors)
    for index, kernel in enumerate(base.kernels):
        if not kernel.is_embedding:
            keys = jax.random.split(jax.random.fold_in(key, index), kernel.count)
            batch = [kernel.shape[axis] for axis in kernel.axes.batch]
            found[kernel.name] = {**found[kernel.name], _KEYS: keys.reshape(batch)}
    return found


@dataclasses.dataclass(frozen=True)
class _Factored:
    config: AdapterConfig
    rate: float
    uses: collections.Counter[str]  # products so far in the trace, by kernel

    def materialise(self, kernel: Tracked) -> jax.Array:
        """Returns the adapted kernel, with the axes and the dtype of the value."""
        whole, value = kernel.kernel, kernel.value
        if _KEYS in kernel.factors:
            raise ValueError(
                f"lora_dropout={self.rate} cannot act on kernel '{whole.name}', which is not used "
                "in a product with its inputs that can be followed (a convolution with groups, a "
                "while loop, a branch, a tied table): leave it out (exclude_modules) or set "
                "lora_dropout=0"
            )
        dtype = _tree.compute_dtype(*(x.dtype for x in [value, *kernel.factors.values()]))
        taken = [axis for axis in whole.axes.batch if axis not in kernel.batch]
        # What a scan has taken away counts one here.
        order = sorted(kernel.dims)
        standing = jnp.transpose(value.astype(dtype), kernel.positions(order))
        one = whole._replace(shape=tuple(1 if i in taken else n for i, n in enumerate(whole.shape)))
        factors = {name: x.astype(dtype) for name, x in kernel.factors.items()}
        adapted = self.config.effective(one, standing.reshape(one.shape), factors)
        standing = adapted.reshape(standing.shape)
        back = [order.index(axis) for axis in kernel.dims]
        return jnp.transpose(standing, back).astype(value.dtype)

    def repeated(self, kernel: Tracked, step: jax.Array) -> Tracked:
        """Returns the kernel with other keys for each step."""
        if _KEYS not in kernel.factors:
            return kernel
        keys = kernel.factors[_KEYS]
        folded = jax.vmap(jax.random.fold_in, (0, None))(keys.reshape(-1), step)
        factors = {**kernel.factors, _KEYS: folded.reshape(keys.shape)}
        return dataclasses.replace(kernel, factors=factors)

    def product(self, product: Dot | Convolution) -> tuple[jax.Array, dict[str, Any]] | None:
        """Adds s (x a) b to the product with the kernel as it is."""
        kernel = product.kernel
        if not self.config.additive:
            return None
        a, b = kernel.factors["lora_a"], kernel.factors["lora_b"]
        dtype = jnp.result_type(product.x.dtype, a.dtype)
        x, a, b = (z.astype(dtype) for z in (product.x, a, b))
        if _KEYS in kernel.factors:
            x = self._dropped(kernel, x)
        change = _dot(product, x, a, b) if isinstance(product, Dot) else _conv(product, x, a, b)
        y = product.whole()
        return y + (kernel.kernel.scaling * change).astype(y.dtype), {}

    def _dropped(self, kernel: Tracked, x: jax.Array) -> jax.Array:
        """Returns the inputs of `a`, with some entries zero."""
        # The matrices of a stack that are used at once share a draw of all their inputs.
        key = kernel.factors[_KEYS][(0,) * len(kernel.batch)]
        name = kernel.kernel.name
        key = jax.random.fold_in(key, self.uses[name])
        self.uses[name] += 1
        kept = jax.random.bernoulli(key, 1 - self.rate, x.shape)
        return jnp.where(kept, x / (1 - self.rate), 0)


def _dot(dot: Dot, x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    kernel, params = dot.kernel, dot.eqn.params
    inputs, outputs = kernel.kernel.axes.reduction, kernel.kernel.axes.output
    batch = tuple(range(len(kernel.batch)))
    of_a = tuple(len(batch) + i for i in range(len(inputs)))
    general = functools.partial(jax.lax.dot_general, precision=params["precision"])
    u = general(x, a, ((dot.x_inputs, of_a), (dot.x_batch, batch)))
    z = general(u, b, (((u.ndim - 1,), (len(batch),)), (batch, batch)))
    # z is (batch, axes of x, outputs), each in the kernel's order; the product has its own.
    own_batch = [
        kernel.dims[k] for k in params["dimension_numbers"][1][0 if dot.kernel_is_left else 1]
    ]
    free = [axis for axis in kernel.dims if axis in outputs]
    of_batch = [kernel.batch.index(axis) for axis in own_batch]
    of_x = list(range(len(batch), z.ndim - len(outputs)))
    of_outputs = [z.ndim - len(outputs) + outputs.index(axis) for axis in free]
    rest = [*of_outputs, *of_x] if dot.kernel_is_left else [*of_x, *of_outputs]
    return jnp.transpose(z, [*of_batch, *rest])


def _conv(conv: Convolution, x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """The pair is a convolution with the layer's own window to r channels, and one of size 1."""
    kernel, params = conv.kernel, conv.eqn.params
    spec = params["dimension_numbers"]
    inputs = kernel.kernel.axes.reduction
    order = [
        a.ndim - 1 if place == spec.rhs_spec[0] else inputs.index(axis)
        for place, axis in enumerate(kernel.dims)
    ]
    u = jax.lax.conv_general_dilated(
        x,
        jnp.transpose(a, order),
        params["window_strides"],
        params["padding"],
        params["lhs_dilation"],
        params["rhs_dilation"],
        spec,
        precision=params["precision"],
    )
    feature = spec.out_spec[1]
    z = jax.lax.dot_general(u, b, (((feature,), (0,)), ((), ())))
    return jnp.moveaxis(z, -1, feature)
