r"""LoRA: the change of a kernel has low rank.

    K' = K + s a b,    s = alpha / r    or, rank-stabilised,    s = alpha / sqrt(r)

Hu et al., "LoRA", ICLR 2022, arXiv:2106.09685; Kalajdzievski, "A Rank Stabilization Scaling Factor
for Fine-Tuning with LoRA", 2023, arXiv:2312.03732.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import jax

from jaxopt_lab import _checks
from jaxopt_lab.adapters import _starts, _targets, _whole, dora
from jaxopt_lab.adapters._kernels import Factors, Kernel

TaskType = Literal[
    "SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    r"""Low-rank adapters; the names and their meaning are those of `peft.LoraConfig`.

    .. math::
      K' = K + s\, a b, \quad s = \alpha / r \text{ or } \alpha / \sqrt{r}

    By default `a` is uniform in :math:`\pm 1/\sqrt{\text{inputs}}` and `b` zero, so that the
    function starts unchanged; other starts are `init_lora_weights` and `init_adapters(..., init=)`.

    Attributes:
      target_modules: layers by the end of their dotted name ("query", "blocks.0.up"), a list of
        such; a string is a regular expression for the whole name; "all-linear" is every kernel but
        those of embeddings and the output head. A name with slashes is the same. The layer is what
        holds the kernel, `encoder.query` for `encoder/query/kernel`; the kernel's own name serves
        too, where nothing else does.
      r: rank; the number of columns of `lora_a`.
      lora_alpha: :math:`\alpha`.
      exclude_modules: what is left out of these, by the end of its name or a regular expression.
      use_rslora: divide alpha by the root of the rank.
      use_dora: adapt the length of each output unit apart (`dora`); adds `lora_magnitude`, shape
        (batch..., outputs...).
      init_lora_weights: start of the factors where `init_adapters` is given none: True; "gaussian"
        (`a` normal with standard deviation 1/r); "orthogonal" (both factors random with orthogonal
        ranges, r even); "pissa", "pissa_niter_N" (randomized, N power iterations) and "olora", as
        `pissa` and `olora`; False, where both factors are random and the function starts changed.
      rank_pattern: other ranks by pattern, as `{"attention.query": 16}`; a pattern is a regular
        expression for the end of the name, from a dot on. The first that matches counts.
      alpha_pattern: other values of alpha by pattern, as `{"attention.query": 32}`.
      layers_to_transform: numbers of the layers that are adapted, all others are left out.
      layers_pattern: name before the number of a layer, if it is not the first number in the path.
      kernel_axes: by pattern, as `rank_pattern`, which axes of a kernel are inputs and outputs:
        `optax.contrib.MuonDimensionNumbers(reduction_axis, output_axis)`; all others count
        matrices, each with a pair of its own (scanned layers, experts). By default they follow
        from names, shapes and neighbours, as `jaxopt_lab.muon_dimension_numbers` describes, those
        of Flax's attention and convolutions among them; what nothing tells must be named.
      adapter_dtype: dtype of the factors; by default the widest of float32 and the kernel's.
      bias: biases that are trained whole: "none", "all" of the model, or "lora_only", those of the
        layers with an adapter.
      modules_to_save: modules that are trained whole, by the end of their dotted name, with all
        floating leaves in them; kernels in them get no factors. The adapters have them at their own
        path, as arrays of their own dtype unless `adapter_dtype` names one.
      task_type: what the model is for, as "CAUSAL_LM"; kept for `write_peft_folder`.
      lora_dropout: probability with which each input of `a` is zero while training; the others are
        divided by the rest. It acts on activations, so that only `factored` with a `key` has it.

    Raises:
      ValueError: a number out of range, an unknown option or start, dropout with DoRA; by
        `init_adapters`, see there.
      TypeError: `modules_to_save` that is no list.

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
    bias: _whole.Bias = "none"
    modules_to_save: Sequence[str] | None = None
    task_type: TaskType | None = None
    lora_dropout: float = 0.0

    def __post_init__(self) -> None:
        _targets.check(self)
        _checks.check_mapping("of ranks by pattern", rank_pattern=self.rank_pattern)
        _checks.check_mapping("of alphas by pattern", alpha_pattern=self.alpha_pattern)
        for r in (self.r, *self.rank_pattern.values()):
            _checks.check_positive_integer(r=r)
        for alpha in (self.lora_alpha, *self.alpha_pattern.values()):
            _checks.check_positive(lora_alpha=alpha)
        _checks.check_flag(use_rslora=self.use_rslora, use_dora=self.use_dora)
        _starts.check(self.init_lora_weights)
        _whole.check(self)
        _checks.canonical_mu_dtype(self.adapter_dtype, "adapter_dtype")
        if self.task_type is not None:
            _checks.check_choice(get_args(TaskType), task_type=self.task_type)
        _checks.check_decay(lora_dropout=self.lora_dropout)
        if self.lora_dropout and not self.additive:
            raise ValueError(
                f"lora_dropout={self.lora_dropout} needs layers that use K + s a b as two products "
                "(factored); DoRA and PERP use the adapted kernel: set lora_dropout=0"
            )

    def __hash__(self) -> int:
        return hash((str(self.target_modules), self.r, self.lora_alpha))

    def rank(self, name: str) -> int:
        """Returns the rank of the kernel or layer called `name`."""
        return _targets.by_pattern(name, self.rank_pattern, self.r)

    def scaling(self, name: str) -> float:
        """Returns s of the kernel or layer called `name`."""
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
        return tuple(
            Kernel(t.name, t.shape, t.axes, self.rank(t.name), self.scaling(t.name))
            for t in targets
        )

    def shapes(self, kernel: Kernel) -> dict[str, tuple[int, ...]]:
        """Returns the shape of each factor of a kernel."""
        shapes = kernel.pair_shapes()
        if self.use_dora:
            shapes["lora_magnitude"] = tuple(kernel.shape[i] for i in sum(kernel.axes[::2], ()))
        return shapes

    def changes_base(self, init: Any) -> bool:
        """Whether the base gives up what the first factors add."""
        init = _starts.computed(self.init_lora_weights) if init is None else init
        return init is not None and not getattr(init, "keeps_base", False)

    def start(self, kernel: Kernel, matrices: jax.Array, key: Any, init: Any) -> Factors:
        """Returns the first factors of one kernel."""
        init = _starts.computed(self.init_lora_weights) if init is None else init
        if init is None:
            if key is None:
                raise ValueError("init_adapters needs a key to draw the factors of LoRA")
            init = _starts.drawn(self.init_lora_weights)
        elif kernel.r > min(kernel.matrix) and self.changes_base(init):
            raise ValueError(
                f"rank {kernel.r} is above the smaller side of kernel '{kernel.name}', whose "
                f"{kernel.matrix[0]} inputs and {kernel.matrix[1]} outputs give a computed start "
                f"at most {min(kernel.matrix)} directions; use rank_pattern or exclude_modules"
            )
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


def of_kernels(
    config: LoraConfig, ranks: Mapping[str, int], alphas: Mapping[str, float]
) -> LoraConfig:
    """Returns the config that chooses just the given kernels, with the given ranks and alphas.

    Args:
      config: all else.
      ranks: by the kernel's path, at least one.
      alphas: likewise.
    """
    r, rank_pattern = _targets.patterns(ranks)
    lora_alpha, alpha_pattern = _targets.patterns({name: alphas[name] for name in ranks})
    return dataclasses.replace(
        config,
        target_modules="|".join(map(_targets.exactly, ranks)),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        r=r,
        lora_alpha=lora_alpha,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        init_lora_weights=True,
    )
