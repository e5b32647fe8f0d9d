r"""LoRA: the change of a kernel has low rank.

    K' = K + s a b,    s = alpha / r    or, rank-stabilised,    s = alpha / sqrt(r)

Hu et al., "LoRA", ICLR 2022, arXiv:2106.09685; Kalajdzievski, "A Rank Stabilization Scaling Factor
for Fine-Tuning with LoRA", 2023, arXiv:2312.03732.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_lab import _checks
from jaxopt_lab.adapters import _kernels, _targets, dora
from jaxopt_lab.adapters._kernels import Factors, Kernel


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    r"""Low-rank adapters; the names and their meaning are those of `peft.LoraConfig`.

    .. math::
      K' = K + s\, a b, \quad s = \alpha / r \text{ or } \alpha / \sqrt{r}

    By default `a` is uniform in :math:`\pm 1/\sqrt{\text{inputs}}` and `b` zero, so that the
    function starts unchanged; a computed start is `init_adapters(..., init=...)`.

    Attributes:
      target_modules: layers by the end of their dotted name ("query", "blocks.0.up"), a list of
        such; a string is a regular expression for the whole name; "all-linear" is every kernel but
        those of embeddings and the output head. A name with slashes is the same. The layer is what
        holds the kernel, `encoder.query` for `encoder/query/kernel`; the kernel's own name serves
        too, where nothing else does.
      r: rank; the number of columns of `lora_a`.
      lora_alpha: :math:`\alpha`.
      exclude_modules: as `target_modules`, to be left out.
      use_rslora: divide alpha by the root of the rank.
      use_dora: adapt the length of each output unit apart (`dora`); adds `lora_magnitude`, shape
        (batch..., outputs...).
      init_lora_weights: start of the factors where `init_adapters` is given none: True, "gaussian"
        (`a` normal with standard deviation 1/r) or "orthogonal" (both factors random with
        orthogonal ranges, r even).
      rank_pattern: other ranks by pattern, as `{"attention.query": 16}`; a pattern is a regular
        expression for the end of the name, from a dot on. The first that matches counts.
      alpha_pattern: other values of alpha, likewise.
      layers_to_transform: numbers of the layers that are adapted, all others are left out.
      layers_pattern: name before the number of a layer, if it is not the first number in the path.
      kernel_axes: by pattern, as `rank_pattern`, which axes of a kernel are inputs and outputs:
        `optax.contrib.MuonDimensionNumbers(reduction_axis, output_axis)`; all others count
        matrices, each with a pair of its own (scanned layers, experts). By default they follow
        from names, shapes and neighbours, as `jaxopt_lab.muon_dimension_numbers` describes; what
        nothing tells must be named.
      adapter_dtype: dtype of the factors; by default the widest of float32 and the kernel's.

    Raises:
      ValueError: a number out of range or an unknown start; by `init_adapters`, see there.

    Examples:
      >>> from jaxopt_lab.adapters import LoraConfig
      >>> LoraConfig(target_modules=["query", "value"], r=16, lora_alpha=32).scaling("any.query")
      2.0

    References:
      Hu et al., `LoRA <https://arxiv.org/abs/2106.09685>`_; Kalajdzievski, `rsLoRA
      <https://arxiv.org/abs/2312.03732>`_; Liu et al., `DoRA <https://arxiv.org/abs/2402.09353>`_.
    """

    target_modules: str | Sequence[str]
    r: int = 8
    lora_alpha: float = 8
    exclude_modules: str | Sequence[str] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    kernel_axes: Mapping[str, Any] | None = None
    adapter_dtype: Any = None

    def __post_init__(self) -> None:
        for r in (self.r, *self.rank_pattern.values()):
            _checks.check_positive_integer(r=r)
        for alpha in (self.lora_alpha, *self.alpha_pattern.values()):
            _checks.check_positive(lora_alpha=alpha)
        if self.init_lora_weights not in (True, *_STARTS):
            raise ValueError(
                f"init_lora_weights must be True or one of {tuple(_STARTS)}, got "
                f"{self.init_lora_weights!r}; a computed start is init_adapters(..., init=...)"
            )

    def __hash__(self) -> int:
        return hash((str(self.target_modules), self.r, self.lora_alpha))

    def rank(self, name: str) -> int:
        """Returns the rank of a kernel or layer."""
        return _targets.by_pattern(name, self.rank_pattern, self.r)

    def scaling(self, name: str) -> float:
        """Returns s of a kernel or layer."""
        alpha, r = _targets.by_pattern(name, self.alpha_pattern, self.lora_alpha), self.rank(name)
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r

    @property
    def additive(self) -> bool:
        """Whether the layer uses K + s a b."""
        return not self.use_dora

    def kernels(self, params: Any) -> tuple[Kernel, ...]:
        """Returns the kernels that get an adapter; see `init_adapters`."""
        targets = _targets.choose(params, self)
        names = [target.name for target in targets]
        _targets.check_patterns(names, self.rank_pattern, "rank_pattern")
        _targets.check_patterns(names, self.alpha_pattern, "alpha_pattern")
        found = tuple(
            Kernel(t.name, t.shape, t.axes, self.rank(t.name), self.scaling(t.name))
            for t in targets
        )
        for kernel in found:
            if kernel.r > min(kernel.matrix):
                raise ValueError(
                    f"rank {kernel.r} is above the smaller side of kernel '{kernel.name}', whose "
                    f"{kernel.matrix[0]} inputs and {kernel.matrix[1]} outputs allow at most "
                    f"{min(kernel.matrix)}; use rank_pattern or exclude_modules"
                )
        return found

    def changes_base(self, init: Any) -> bool:
        """Whether the base gives up what the first factors add."""
        return init is not None

    def start(self, kernel: Kernel, matrices: jax.Array, key: Any, init: Any) -> Factors:
        """Returns the first factors of one kernel."""
        if init is None:
            if key is None:
                raise ValueError("init_adapters needs a key to draw the factors of LoRA")
            name = "uniform" if self.init_lora_weights is True else str(self.init_lora_weights)
            init = _STARTS[name]
        a, b = init(kernel, matrices, key)
        factors = kernel.pair(a, b)
        if self.use_dora:
            lengths = dora.lengths(kernel, kernel.kernel(matrices))
            factors["lora_magnitude"] = kernel.outputs(lengths)
        return factors

    def effective(self, kernel: Kernel, whole: jax.Array, factors: Factors) -> jax.Array:
        """Returns K + s a b, rescaled with DoRA."""
        return self._effective(kernel, whole, factors)[0]

    def merged(self, kernel: Kernel, whole: jax.Array, factors: Factors) -> jax.Array:
        """Returns the effective kernel."""
        return self.effective(kernel, whole, factors)

    def undo(self, kernel: Kernel, whole: jax.Array, factors: Factors) -> jax.Array | None:
        """Returns DoRA's factors, which cannot be had from what is merged."""
        return self._effective(kernel, whole, factors)[1]

    def restored(self, kernel: Kernel, whole: jax.Array, factors: Factors, undo: Any) -> jax.Array:
        """Returns K."""
        if undo is not None:
            whole = whole / undo.astype(whole.dtype)
        return whole - kernel.scaling * kernel.change(factors)

    def _effective(
        self, kernel: Kernel, whole: jax.Array, factors: Factors
    ) -> tuple[jax.Array, jax.Array | None]:
        changed = whole + kernel.scaling * kernel.change(factors)
        if not self.use_dora:
            return changed, None
        return dora.rescaled(kernel, changed, factors["lora_magnitude"])


def _uniform(kernel: Kernel, matrices: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    count, fan_in, fan_out = matrices.shape
    if kernel.name.split("/")[-1] == "embedding":
        # The factor that is looked up starts at zero: an adapted embedding costs no rounding.
        b = jax.random.normal(key, (count, kernel.r, fan_out), matrices.dtype)
        return jnp.zeros((count, fan_in, kernel.r), matrices.dtype), b
    bound = 1 / math.sqrt(fan_in)
    a = jax.random.uniform(key, (count, fan_in, kernel.r), matrices.dtype, -bound, bound)
    return a, jnp.zeros((count, kernel.r, fan_out), matrices.dtype)


def _gaussian(kernel: Kernel, matrices: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    count, fan_in, fan_out = matrices.shape
    a = jax.random.normal(key, (count, fan_in, kernel.r), matrices.dtype) / kernel.r
    return a, jnp.zeros((count, kernel.r, fan_out), matrices.dtype)


def _orthogonal(kernel: Kernel, matrices: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    count, fan_in, fan_out = matrices.shape
    if kernel.r % 2:
        raise ValueError(
            f"init_lora_weights='orthogonal' halves the rank, which must be even; kernel "
            f"'{kernel.name}' has r={kernel.r}"
        )
    rotation, left, right = jax.random.split(key, 3)
    half, dtype = kernel.r // 2, matrices.dtype
    q = jnp.linalg.qr(jax.random.normal(rotation, (count, kernel.r, kernel.r), dtype))[0]
    a = _kernels.product(jax.random.normal(left, (count, fan_in, half), dtype), q[:, 0::2])
    odd = jnp.swapaxes(q[:, 1::2], -1, -2)
    b = _kernels.product(odd, jax.random.normal(right, (count, half, fan_out), dtype))
    return a / 10, b / 10


_STARTS: dict[str, Callable[..., tuple[jax.Array, jax.Array]]] = {
    "uniform": _uniform,
    "gaussian": _gaussian,
    "orthogonal": _orthogonal,
}
