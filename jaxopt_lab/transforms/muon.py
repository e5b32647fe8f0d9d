r"""Muon: momentum, orthogonalised by Newton-Schulz.

    b_t = beta b_{t-1} + (1 - beta) g_t
    u_t = beta b_t + (1 - beta) g_t with Nesterov, else b_t
    update = scale * NS(u_t), with NS(U) close to W V^T for the singular value decomposition W S V^T

Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024 (KellerJordan/Muon),
and Liu et al., "Muon is Scalable for LLM Training", 2025, arXiv:2502.16982 (Moonlight).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxopt_lab import _adam, _checks, _compat, _hyperparams, _matrices, _roles, _treatments, _tree
from jaxopt_lab.transforms import _newton_schulz
from jaxopt_lab.transforms._newton_schulz import NS_COEFFS, Coefficients, NsCoeffs

# What the contract of `jaxopt_lab.testing` asks and this rule does not promise.
CONTRACT_EXCEPTIONS = {
    "float32_gradient_1e+25_state": "the square of a gradient above 1.8e19 overflows float32",
}


class ScaleByMuonState(NamedTuple):
    """State of `scale_by_muon`: 4 bytes a parameter in float32.

    Attributes:
      mu: b; shapes of the parameters, dtype `mu_dtype` or the parameter's.
    """

    mu: optax.Updates


def scale_by_muon(
    beta: _hyperparams.Scalar = 0.95,
    eps: _hyperparams.Scalar = 1e-7,
    *,
    nesterov: bool = True,
    ns_coeffs: NsCoeffs | Coefficients | Sequence[Coefficients] = NS_COEFFS,
    ns_steps: int | None = None,
    ns_dtype: Any = None,
    gram: Callable[..., jax.Array] | None = None,
    consistent_rms: _hyperparams.Scalar | None = None,
    dimension_numbers: _matrices.DimensionNumbers = None,
    mu_dtype: Any = None,
) -> optax.GradientTransformation:
    r"""Replaces each matrix of gradients by its orthogonalised momentum.

    .. math::
      b_t &= \beta b_{t-1} + (1 - \beta) g_t, \quad
      u_t = \beta b_t + (1 - \beta) g_t \text{ (Nesterov) or } b_t \\
      X_0 &= \frac{u_t}{\|u_t\|_F + \epsilon}, \quad
      X_{k+1} = a X_k + (b A_k + c A_k^2) X_k, \quad A_k = X_k X_k^\top \\
      \text{update} &= \sqrt{\max(1, \tfrac{out}{in})}\, X_5 \quad \text{or} \quad
      \text{consistent_rms} \sqrt{\max(in, out)}\, X_5

    Five iterations take singular values from [0.003, 1] to [0.68, 1.2]; they do not converge to 1,
    by design. Matrices of equal shape, from whatever leaves, are orthogonalised as one batch.

    `optax.contrib.muon` differs: it corrects the bias of momentum and gradient apart, which changes
    their mix in the first steps.

    Inside a `shard_map` over an axis that splits a weight the rule sees the shard and takes it for
    the whole leaf: call it outside, under `jit` with sharded arrays, where all is right, or gather
    the gradient first.

    Args:
      beta: decay rate of the momentum, in [0, 1).
      eps: added to the Frobenius norm; positive.
      nesterov: orthogonalise the look-ahead momentum.
      ns_coeffs: the coefficients (a, b, c) of the iteration; a sequence with a triple for each
        iteration; or the name of one: "original" or "standard" (Jordan's, the default), "quintic"
        or "dion" (five iterations with polynomials of their own, singular values in [0.9, 1.1]),
        "polar_express" (eight, of which the first few may be taken; converges to 1).
      ns_steps: number of iterations, at least 1: 5 by default, or the number of triples, of which
        a smaller number takes the first.
      ns_dtype: dtype that the iteration keeps its matrices in. By default that of the momentum but
        at least float32, with exact matrix products; `jax.numpy.bfloat16` is the authors' choice
        and several times faster on accelerators: products are accumulated in float32, and each
        expression is rounded once.
      gram: what computes x x^T, of the momentum and of its Gram matrix, as
        `gram(x, precision=..., preferred_element_type=...)` for x (..., m, k); `pallas_kernels`
        has one with 5/8 of the arithmetic. By default the plain product.
      consistent_rms: root mean square of a full-rank update, 0.2 in Moonlight, which lets AdamW's
        learning rate and weight decay carry over; by default Jordan's shape factor.
      dimension_numbers: which axes are inputs and outputs of a matrix, all others count matrices:
        a tree of `optax.contrib.MuonDimensionNumbers`, or a function of the parameters that returns
        one, or a mapping of patterns to them, each a regular expression for a path, or the path of
        a layer, from its beginning or from a "/" to its end, with all other leaves by default. By
        default `muon_dimension_numbers` decides; every leaf must have some.
      mu_dtype: dtype of the momentum; by default the parameter's.

    Returns:
      A `GradientTransformation`; its update needs no `params`.

    Raises:
      ValueError: a hyper-parameter out of range, an unknown name, more `ns_steps` than triples, a
        leaf that is no matrix, or gradients that do not match.
      TypeError: parameters or gradients that are not real floating point.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> tx = scale_by_muon()
      >>> params = jnp.zeros((2, 2))
      >>> updates, _ = tx.update(jnp.array([[3.0, 0.0], [0.0, 0.1]]), tx.init(params))
      >>> [f"{u:.1f}" for u in jnp.linalg.svdvals(updates)]  # of 3 and 0.1
      ['1.1', '0.7']

    References:
      Jordan et al., `Muon: An optimizer for hidden layers in neural networks
      <https://kellerjordan.github.io/posts/muon/>`_, 2024; Liu et al., `Muon is Scalable for LLM
      Training <https://arxiv.org/abs/2502.16982>`_, 2025, equation 4.
    """
    _checks.check_decay(beta=beta)
    _checks.check_positive(eps=eps)
    _checks.check_flag(nesterov=nesterov)
    _matrices.check(dimension_numbers)
    if consistent_rms is not None:
        _checks.check_positive(consistent_rms=consistent_rms)
    coefficients = _newton_schulz.coefficients_of(ns_coeffs, ns_steps)
    if gram is not None:
        _checks.check_function(gram=gram)
    mu_dtype = _checks.canonical_mu_dtype(mu_dtype)
    ns_dtype = _checks.canonical_mu_dtype(ns_dtype, name="ns_dtype")

    def all_axes(params: optax.Params) -> list[_matrices.MatrixAxes]:
        found = _matrices.choices(dimension_numbers, params, default=_matrices.hidden)
        for choice in found:
            if choice.axes is None:
                raise ValueError(
                    f"scale_by_muon has no matrix axes for '{choice.name}' of shape "
                    f"{choice.shape} ({choice.reason}); give them in dimension_numbers, or use "
                    "muon, which leaves it to Adam"
                )
        return [choice.axes for choice in found]  # type: ignore[misc]

    def init_fn(params: optax.Params) -> ScaleByMuonState:
        all_axes(params)
        found = _matrices.choices(dimension_numbers, params, default=_matrices.hidden)
        _treatments.report_choices("scale_by_muon", found, matrix="muon", other="adam")
        return ScaleByMuonState(mu=_tree.zeros_like(params, mu_dtype))

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ScaleByMuonState]:
        state = _tree.check_state(state, ScaleByMuonState)

        def momentum(g: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            b = beta * b + (1 - beta) * g
            return g, b, beta * b + (1 - beta) * g if nesterov else b

        _, mu, *momenta = _tree.map_leaves(momentum, updates, state.mu, like=params)
        axes = all_axes(updates)
        matrices = [
            _matrices.to_matrices(u, a) for u, a in zip(jax.tree.leaves(momenta), axes, strict=True)
        ]

        def newton_schulz(x: jax.Array) -> jax.Array:
            return _newton_schulz.newton_schulz(x, eps, coefficients, ns_steps, ns_dtype, gram)

        def iterate(batch: jax.Array) -> jax.Array:
            # A CPU has its cores busy with one matrix, and keeps one in its cache.
            return _compat.platform_dependent(
                batch, cpu=lambda x: jax.lax.map(newton_schulz, x), default=newton_schulz
            )

        results = []
        dtypes = _tree.update_dtypes(updates, state.mu if params is None else params)
        leaves = jax.tree.leaves(updates)
        found = _newton_schulz.orthogonalize(matrices, iterate)
        for g, x, a, dtype in zip(leaves, found, axes, dtypes):
            _, fan_in, fan_out = x.shape
            if consistent_rms is None:
                scale = max(1.0, fan_out / max(fan_in, 1)) ** 0.5
            else:
                scale = consistent_rms * max(fan_in, fan_out) ** 0.5
            u = _matrices.from_matrices(scale * x, a, jnp.shape(g))
            results.append(u.astype(dtype))
        updates = jax.tree.unflatten(jax.tree.structure(updates), results)
        return updates, ScaleByMuonState(mu=mu)

    return optax.GradientTransformation(init_fn, update_fn)


def muon(
    learning_rate: optax.ScalarOrSchedule,
    beta: _hyperparams.Scalar = 0.95,
    eps: _hyperparams.Scalar = 1e-7,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: _tree.Mask = None,
    *,
    nesterov: bool = True,
    ns_coeffs: NsCoeffs | Coefficients | Sequence[Coefficients] = NS_COEFFS,
    ns_steps: int | None = None,
    ns_dtype: Any = None,
    gram: Callable[..., jax.Array] | None = None,
    consistent_rms: _hyperparams.Scalar | None = None,
    dimension_numbers: _matrices.DimensionNumbers = None,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    adam_b1: _hyperparams.Scalar = 0.9,
    adam_b2: _hyperparams.Scalar = 0.95,
    adam_eps: _hyperparams.Scalar = 1e-10,
    adam_eps_in_root: bool = True,
    adam_weight_decay: optax.ScalarOrSchedule | None = None,
    mu_dtype: Any = None,
) -> optax.GradientTransformation:
    """Muon on hidden matrices, Adam on everything else, both with decoupled weight decay.

    Jordan's setting is `muon(0.02, adam_learning_rate=3e-4)`; Moonlight's, with AdamW's learning
    rate and decay for all, `muon(1e-3, weight_decay=0.1, consistent_rms=0.2, adam_eps=1e-8)`.

    Inside a `shard_map` over an axis that splits a weight the rule sees the shard and takes it for
    the whole leaf: call it outside, under `jit` with sharded arrays, where all is right, or gather
    the gradient first.

    Args:
      learning_rate: step size or schedule of the matrices.
      beta: decay rate of the momentum, in [0, 1).
      eps: added to the Frobenius norm; positive.
      weight_decay: decoupled decay, a number or a schedule, multiplied by the learning rate but not
        by the shape factor.
      mask: tree of booleans, or a function of the parameters that returns one: what decays.
      nesterov: orthogonalise the look-ahead momentum. Adam is the plain one in any case.
      ns_coeffs: the coefficients (a, b, c) of the iteration; a sequence with a triple for each
        iteration; or the name of one: "original" or "standard" (Jordan's, the default), "quintic"
        or "dion" (five iterations with polynomials of their own, singular values in [0.9, 1.1]),
        "polar_express" (eight, of which the first few may be taken; converges to 1).
      ns_steps: number of iterations, at least 1: 5 by default, or the number of triples, of which
        a smaller number takes the first.
      ns_dtype: dtype that the iteration keeps its matrices in. By default that of the momentum but
        at least float32, with exact matrix products; `jax.numpy.bfloat16` is the authors' choice
        and several times faster on accelerators: products are accumulated in float32, and each
        expression is rounded once.
      gram: what computes x x^T, of the momentum and of its Gram matrix, as
        `gram(x, precision=..., preferred_element_type=...)` for x (..., m, k); `pallas_kernels`
        has one with 5/8 of the arithmetic. By default the plain product.
      consistent_rms: root mean square of a full-rank update, 0.2 in Moonlight, which lets AdamW's
        learning rate and weight decay carry over; by default Jordan's shape factor.
      dimension_numbers: which axes are inputs and outputs of a matrix, all others count matrices:
        a tree of `optax.contrib.MuonDimensionNumbers` with None for what goes to Adam, or a
        function of the parameters that returns one, or a mapping of patterns to them, each a
        regular expression for a path, or the path of a layer, from its beginning or from a "/" to
        its end, with all other leaves by default: `{"attention/qkv": MuonDimensionNumbers(0, (1,
        2)), "probe": None}`. By default `muon_dimension_numbers` decides, and
        `jaxopt_lab.treatments` shows what.
      adam_learning_rate: step size or schedule of Adam; by default `learning_rate`.
      adam_b1: Adam's first decay rate, in [0, 1).
      adam_b2: Adam's second decay rate, in [0, 1).
      adam_eps: added to the root of Adam's second moment; positive.
      adam_eps_in_root: whether that root is the bias-corrected one, as in Adam and in Jordan's
        code; Moonlight's adds `adam_eps` before the correction.
      adam_weight_decay: decoupled decay of Adam's parameters; by default `weight_decay`.
      mu_dtype: dtype of the momentum and of Adam's first moment; by default the parameter's.

    Returns:
      A `GradientTransformation`; its update needs `params` if a weight decay is not 0, and
      ignores extra arguments. Updates are computed in float32 at least and rounded once, to the
      wider of the gradient's and the parameter's dtype; where weights of 16 bits are rounded
      stochastically, float32 gradients keep what that needs.

    Raises:
      ValueError: a hyper-parameter out of range, an unknown name, more `ns_steps` than triples, a
        leaf that is no matrix, or gradients that do not match; also a negative learning rate or
        weight decay.
      TypeError: parameters or gradients that are not real floating point, and what is no number, no
        schedule or no flag where one is expected; the message has the argument's name.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> tx = muon(0.02, adam_learning_rate=1e-3)
      >>> params = {"kernel": jnp.zeros((3, 3)), "bias": jnp.zeros(3)}
      >>> grads = {"kernel": jnp.eye(3), "bias": jnp.ones(3)}
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> f"{updates['kernel'][0, 0]:.4f} {updates['bias'][0]:.4f}"
      '-0.0137 -0.0010'

    See Also:
      `scale_by_muon` for the bare rule and the source.
    """
    if adam_weight_decay is None:
        adam_weight_decay = weight_decay
    if adam_learning_rate is None:
        adam_learning_rate = learning_rate

    _matrices.check(dimension_numbers)

    def decided(params: optax.Params) -> list[_matrices.Choice]:
        return _matrices.choices(dimension_numbers, params, default=_matrices.hidden)

    def both(structure: Any, axes: list[Any]) -> optax.GradientTransformationExtraArgs:
        matrix_rule = scale_by_muon(
            beta,
            eps,
            nesterov=nesterov,
            ns_coeffs=ns_coeffs,
            ns_steps=ns_steps,
            ns_dtype=ns_dtype,
            gram=gram,
            consistent_rms=consistent_rms,
            dimension_numbers=structure.unflatten(map(_matrices.specification, axes)),
            mu_dtype=mu_dtype,
        )
        return optax.partition(
            {
                "muon": _hyperparams.ready_made(
                    matrix_rule, learning_rate, weight_decay, mask, method="muon"
                ),
                "adam": _hyperparams.ready_made(
                    adam_rule,
                    adam_learning_rate,
                    adam_weight_decay,
                    mask,
                    method="muon",
                    prefix="adam_",
                ),
            },
            # A function, for a tree of labels may be a module, which can be called.
            lambda _: structure.unflatten("adam" if found is None else "muon" for found in axes),
        )

    adam_rule = _adam.scale_by_adam(
        adam_b1, adam_b2, adam_eps, adam_eps_in_root, mu_dtype, prefix="adam_"
    )
    both(jax.tree.structure(()), [])  # checks the hyper-parameters

    def for_tree(params: optax.Params) -> optax.GradientTransformationExtraArgs:
        # Decided from the whole tree: the two rules see a part of it, without the neighbours.
        return both(jax.tree.structure(params), [choice.axes for choice in decided(params)])

    def init_fn(params: optax.Params) -> optax.OptState:
        _tree.check_params(params)
        _treatments.report_choices("muon", decided(params), matrix="muon", other="adam")
        with _treatments.silent():
            return for_tree(params).init(params)

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        state = _tree.check_state(state, optax.transforms.PartitionState)
        if set(state.inner_states) != {"muon", "adam"}:
            raise ValueError(
                "the state was made by another transformation: it has parts for "
                f"{', '.join(map(str, state.inner_states))}, expected muon and adam"
            )
        # Each leaf has its first moment in one of the two; the other holds a MaskedNode.
        moments = [state.inner_states[label].inner_state[0].mu for label in ("muon", "adam")]
        is_masked = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731
        all_moments = jax.tree.map(
            lambda m, a: a if is_masked(m) else m, *moments, is_leaf=is_masked
        )
        _tree.check_updates(updates, all_moments)
        theirs = jax.tree.leaves(
            jax.tree.map(
                lambda m, a: m if is_masked(m) and is_masked(a) else is_masked(m),
                *moments,
                is_leaf=is_masked,
            )
        )
        for choice, is_adams in zip(decided(updates), theirs):
            if is_adams != (choice.axes is None):
                rule = "Adam" if is_adams else "Muon"
                raise ValueError(
                    f"the state was made by another transformation: '{choice.name}' is left to "
                    f"{rule} there: were dimension_numbers changed?"
                )
        return for_tree(updates).update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def muon_dimension_numbers(params: optax.Params) -> Any:
    """Which leaves Muon takes by default, and which of their axes are the matrix.

    Muon takes hidden kernels, each matrix of a stack by itself:

    - dense kernels: (in, out) if called `kernel` or `w`, as in Flax and Haiku, and (out, in) if
      called `weight`, as in Equinox and PyTorch, unless their biases say otherwise; recurrent cells
      too, whose gates are one matrix;
    - convolutions over 1, 2 or 3 axes, as (window and in) x out; a grouped one cannot be told from
      others, but of a depthwise one (one input a group) no kernel is a matrix: Adam's;
    - attention kernels: `query`, `key` and `value` (embed, heads, head_dim) as embed x (heads
      head_dim), `out` (heads, head_dim, embed) as (heads head_dim) x embed, Gemma's einsum kernels;
    - stacks of all these: layers of a scan or an ensemble, whose biases and norm scales have one
      axis more, leading or, as MaxText scans, second; the leading axis of experts.

    All else is Adam's: biases, scales and all else that is called so or belongs to a norm, stacked
    or not; tables of embeddings, positions and tokens; the output layer, known by names such as
    `lm_head`, `logits_dense`, `classifier`, or outside of all layers `head` and `output`; and the
    input layer of images, the patch embedding of a ViT or the stem of a CNN, for Muon's authors
    leave first and last layers to Adam. A kernel whose axes nothing tells is Adam's too, and a
    warning names it once. `jaxopt_lab.treatments(muon(...), params)` shows what was decided, and
    `dimension_numbers` decides otherwise.

    Args:
      params: the parameters; only shapes and paths are looked at.

    Returns:
      A tree like `params` of `optax.contrib.MuonDimensionNumbers` or None.

    Examples:
      >>> import jax.numpy as jnp
      >>> muon_dimension_numbers({"embed": jnp.zeros((9, 4)), "up": jnp.zeros((4, 8))})
      {'embed': None, 'up': MuonDimensionNumbers(reduction_axis=(0,), output_axis=1)}
    """
    numbers = [_matrices.specification(_matrices.hidden(role)) for role in _roles.roles(params)]
    return jax.tree.unflatten(jax.tree.structure(params), numbers)
