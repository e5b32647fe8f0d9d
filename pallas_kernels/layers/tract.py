r"""TrAct: the first layer's weights move so that its outputs move along their gradient.

For inputs a (b, n), one row an example or a window of an image, and the gradient Z (b, out) of the
mean loss in the outputs, the gradient of the weights (n, out) is replaced by

    (a^T a / b + damping I_n)^-1 a^T Z  =  a^T (a a^T / b + damping I_b)^-1 Z

and nothing else changes: outputs, the gradient of the inputs, and that of a bias, which the layer
adds by itself. The smaller of the two systems is solved.

Petersen, Borgelt and Ermon, "TrAct: Making First-layer Pre-Activations Trainable", NeurIPS 2024,
arXiv:2410.23970 (Felix-Petersen/tract). Their implementation leaves dilation out.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import _compat
from pallas_kernels._dtypes import wide
from pallas_kernels._options import hashable, positive

AxisName = Hashable  # or a tuple of them, or None


def tract_dot_general(damping: float = 0.1, *, axis_name: AxisName = None) -> Callable[..., Any]:
    r"""The ``dot_general`` of a first dense layer that is trained by TrAct.

    The product is that of `jax.lax.dot_general`; with a the inputs as rows (b, n) and Z (b, out)
    the gradient that comes back, the kernel's gradient is

    .. math::
      \nabla W = \left(\tfrac{1}{b} a^\top a + \lambda I\right)^{-1} a^\top Z

    to be handed to any optimizer as if it were the gradient. The loss must be a mean over the
    batch, and inputs should have mean 0 and variance 1.

    A large `damping` gives the plain gradient over `damping`. Accumulated gradients of several
    batches are not that of one large batch, as each has a system of its own. There is no forward
    mode, for the replacement is the derivative of no function: `jax.jvp` raises.

    Args:
      damping: what is added to the diagonal, positive: 0.1, or 0.05 for a short training and 0.2
        for a long one.
      axis_name: the mapped axis, or axes, over which the batch is split: their :math:`a^\top a / b`
        are averaged, so that gradients averaged as usual are those of the whole batch. By default
        each device solves a system of its own rows. Arrays sharded under `jax.jit` are whole and
        need none.

    Returns:
      A function with the arguments of `jax.lax.dot_general`, for ``dot_general=`` of
      `flax.nnx.Linear`, `flax.nnx.LinearGeneral` and Linen's ``Dense`` and ``DenseGeneral``; its
      second operand is the kernel. Calls with equal arguments return the same function.

    Raises:
      TypeError: `damping` is no number.
      ValueError: `damping` is not positive; in the product, a batch axis.

    Examples:
      >>> from flax import nnx
      >>> import jax, jax.numpy as jnp, pallas_kernels
      >>> layer = nnx.Linear(
      ...     2, 1, rngs=nnx.Rngs(0), dot_general=pallas_kernels.tract_dot_general(0.5))
      >>> x = jnp.array([[1.0, 0.0], [0.0, 3.0]])
      >>> grads = nnx.grad(lambda layer: layer(x).mean())(layer)
      >>> [f"{g:.2f}" for g in grads.kernel[...][:, 0]]  # by plain training 0.50 and 1.50
      ['0.50', '0.30']

    References:
      Petersen, Borgelt and Ermon, `TrAct: Making First-layer Pre-Activations Trainable
      <https://arxiv.org/abs/2410.23970>`_, NeurIPS 2024, equation 6.
    """
    return _dot_general(positive("damping", damping), hashable("axis_name", axis_name))


def tract_conv(damping: float = 0.1, *, axis_name: AxisName = None) -> Callable[..., Any]:
    r"""The ``conv_general_dilated`` of a first convolution that is trained by TrAct.

    What `tract_dot_general` does, with one row a window of the input: a is (b, n), where b counts
    the positions of the output in all examples and n the entries of a window over all channels.
    Strides, padding and both dilations are those of the call.

    Args:
      damping: what is added to the diagonal, positive: 0.1, or 0.05 for a short training and 0.2
        for a long one.
      axis_name: the mapped axis, or axes, over which the batch is split: their :math:`a^\top a / b`
        are averaged, so that gradients averaged as usual are those of the whole batch. By default
        each device solves a system of its own rows. Arrays sharded under `jax.jit` are whole and
        need none.

    Returns:
      A function with the arguments of `jax.lax.conv_general_dilated`, for
      ``conv_general_dilated=`` of `flax.nnx.Conv` and Linen's ``Conv``. Calls with equal arguments
      return the same function.

    Raises:
      TypeError: `damping` is no number.
      ValueError: `damping` is not positive; in the convolution, groups.

    Examples:
      >>> from flax import nnx
      >>> import jax.numpy as jnp, pallas_kernels
      >>> layer = nnx.Conv(
      ...     3, 8, (5, 5), rngs=nnx.Rngs(0), conv_general_dilated=pallas_kernels.tract_conv())
      >>> x = jnp.ones((2, 8, 8, 3))
      >>> nnx.grad(lambda layer: layer(x).mean())(layer).kernel.shape
      (5, 5, 3, 8)

    References:
      Petersen, Borgelt and Ermon, `TrAct: Making First-layer Pre-Activations Trainable
      <https://arxiv.org/abs/2410.23970>`_, NeurIPS 2024, section 3.
    """
    return _conv(positive("damping", damping), hashable("axis_name", axis_name))


def kernel_gradient(
    a: jax.Array, z: jax.Array, damping: float, axis_name: AxisName = None
) -> jax.Array:
    """Returns the gradient (n, out) for rows a (b, n) and z (b, out), in the dtype of `a`."""
    rows, entries = a.shape
    product = functools.partial(jnp.matmul, precision="highest")
    if rows < entries and axis_name is None:
        return product(a.T, _solve(product(a, a.T) / rows, damping, z))
    moments = product(a.T, a) / rows
    if axis_name is not None:
        moments = _compat.vary_like(lax.pmean(moments, axis_name), z)
    return _solve(moments, damping, product(a.T, z))


def _solve(moments: jax.Array, damping: float, right: jax.Array) -> jax.Array:
    system = moments + damping * jnp.eye(len(moments), dtype=moments.dtype)
    return jax.scipy.linalg.solve(system, right, assume_a="pos")


# Layers of equal settings have equal functions: nnx compares them to tell whether to trace again.
@functools.cache
def _dot_general(damping: float, axis_name: AxisName) -> Callable[..., Any]:
    def dot_general(
        lhs: jax.Array,
        rhs: jax.Array,
        dimension_numbers: Any,
        precision: Any = None,
        preferred_element_type: Any = None,
        *,
        out_sharding: Any = None,
    ) -> jax.Array:
        """`jax.lax.dot_general`, in which the gradient of `rhs` is TrAct's."""
        (of_lhs, of_rhs), batch = dimension_numbers
        if any(batch):
            raise ValueError(
                f"dimension_numbers={dimension_numbers!r} has batch axes; expected none, as TrAct "
                "is for a layer with one kernel"
            )
        plain = functools.partial(
            lax.dot_general,
            dimension_numbers=dimension_numbers,
            precision=precision,
            preferred_element_type=preferred_element_type,
            out_sharding=out_sharding,
        )
        kept = [axis for axis in range(lhs.ndim) if axis not in of_lhs]
        columns = [axis for axis in range(rhs.ndim) if axis not in of_rhs]
        order = (*of_rhs, *columns)
        rows = math.prod(lhs.shape[axis] for axis in kept)
        entries = math.prod(rhs.shape[axis] for axis in of_rhs)
        outputs = math.prod(rhs.shape[axis] for axis in columns)

        def gradient(lhs: jax.Array, cotangent: jax.Array) -> jax.Array:
            a = lhs.transpose(*kept, *of_lhs).reshape(rows, entries)
            z = cotangent.reshape(rows, outputs)
            found = kernel_gradient(a, z, damping, axis_name)
            found = found.reshape([rhs.shape[axis] for axis in order])
            return found.transpose([order.index(axis) for axis in range(rhs.ndim)])

        return _with_gradient(plain, gradient, lhs, rhs)

    return dot_general


@functools.cache
def _conv(damping: float, axis_name: AxisName) -> Callable[..., Any]:
    def conv_general_dilated(
        lhs: jax.Array,
        rhs: jax.Array,
        window_strides: Sequence[int],
        padding: str | Sequence[tuple[int, int]],
        lhs_dilation: Sequence[int] | None = None,
        rhs_dilation: Sequence[int] | None = None,
        dimension_numbers: Any = None,
        feature_group_count: int = 1,
        batch_group_count: int = 1,
        precision: Any = None,
        preferred_element_type: Any = None,
        out_sharding: Any = None,
    ) -> jax.Array:
        """`jax.lax.conv_general_dilated`, in which the gradient of `rhs` is TrAct's."""
        groups = {
            "feature_group_count": feature_group_count,
            "batch_group_count": batch_group_count,
        }
        for name, count in groups.items():
            if count != 1:
                raise ValueError(
                    f"{name}={count}; expected 1, as TrAct is for a layer whose outputs see all "
                    "channels"
                )
        axes = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
        windows = {
            "window_strides": window_strides,
            "padding": padding,
            "lhs_dilation": lhs_dilation,
            "rhs_dilation": rhs_dilation,
            "dimension_numbers": axes,
        }
        plain = functools.partial(
            lax.conv_general_dilated,
            precision=precision,
            preferred_element_type=preferred_element_type,
            out_sharding=out_sharding,
            **windows,
        )

        def rows(x: jax.Array) -> jax.Array:
            batch, features, *space = axes.out_spec
            return x.transpose(batch, *space, features).reshape(-1, x.shape[features])

        def gradient(lhs: jax.Array, cotangent: jax.Array) -> jax.Array:
            shape = [rhs.shape[axis] for axis in axes.rhs_spec]  # out, in, window
            # A product with zeros and ones, exact where the inputs are not rounded for it.
            exact = lax.Precision.HIGHEST
            a = lax.conv_general_dilated_patches(lhs, shape[2:], precision=exact, **windows)
            found = kernel_gradient(rows(a), rows(cotangent), damping, axis_name)
            order = list(axes.rhs_spec)
            return found.T.reshape(shape).transpose([order.index(i) for i in range(rhs.ndim)])

        return _with_gradient(plain, gradient, lhs, rhs)

    return conv_general_dilated


def _with_gradient(
    plain: Callable[[jax.Array, jax.Array], jax.Array],
    gradient: Callable[[jax.Array, jax.Array], jax.Array],
    lhs: jax.Array,
    rhs: jax.Array,
) -> jax.Array:
    """Returns ``plain(lhs, rhs)``, whose gradient in `rhs` is ``gradient(lhs, cotangent)``."""

    @jax.custom_vjp
    def tract(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return plain(lhs, rhs)

    def backward(kept: Any, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
        lhs, rhs = kept
        (of_lhs,) = jax.linear_transpose(lambda x: plain(x, rhs), lhs)(cotangent)
        # A system is solved in float32 at least, whatever the layer computes in.
        dtype = wide(lhs.dtype)
        found = gradient(lhs.astype(dtype), cotangent.astype(dtype))
        return of_lhs, found.astype(rhs.dtype)

    tract.defvjp(lambda lhs, rhs: (plain(lhs, rhs), (lhs, rhs)), backward)
    # A kernel that is equal on all devices gets the sum of what each of them finds.
    return tract(lhs, _compat.vary_like(rhs, lhs))
