r"""PERP: after pruning, few parameters are retrained, and zeros stay zero.

    Z = (K != 0),    "mask_lora": K + s Z (a b),    "scale_lora": K (a b),
    "lora_prune": K + s a b while training, K + s Z (a b) when merged

products of Z and K entry by entry. Zimmer et al., "PERP: Rethinking the Prune-Retrain Paradigm in
the Era of LLMs", 2023, arXiv:2312.15230, section 3.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_lab import _checks, _names
from jaxopt_lab.adapters import _kernels, _starts
from jaxopt_lab.adapters._kernels import Factors, Kernel
from jaxopt_lab.adapters.lora import LoraConfig

_FORMS = ("mask_lora", "lora_prune", "scale_lora")
_NORM = re.compile(r"norm|(^|[^a-z])ln([^a-z]|$)", re.IGNORECASE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerpConfig(LoraConfig):
    r"""Low-rank adapters of pruned kernels, whose zeros stay zero when merged.

    With Z = 1 where the base's kernel is not zero, entry by entry,

    .. math::
      K' = K + s\, Z \odot (a b) \text{ ("mask\_lora")}, \quad
      K' = K \odot (a b) \text{ ("scale\_lora")}

    and "lora_prune" trains K + s a b and merges K + s Z (a b). The factors of "scale_lora" start at
    :math:`1/\sqrt{r}`, so that their product is one; it has no scaling.

    Attributes:
      target_modules: layers by the end of their dotted name, a list of such; a string is a regular
        expression for the whole name; "all-linear" is every kernel but those of embeddings and the
        output head.
      r: rank of the factors; 16 by default, as in the authors' runs.
      lora_alpha: :math:`\alpha`, 32 by default.
      exclude_modules: what is left out of these, by the end of its name or a regular expression.
      use_rslora: divide alpha by the root of the rank.
      use_dora: False; DoRA is no form of PERP.
      init_lora_weights: start of the factors: True (`a` uniform, `b` zero), "gaussian" or
        "orthogonal"; starts that change the base are none here.
      rank_pattern: other ranks by pattern, as `{"attention.query": 16}`.
      alpha_pattern: other values of alpha by pattern.
      layers_to_transform: numbers of the layers that are adapted, all others are left out.
      layers_pattern: name before the number of a layer, if it is not the first number in the path.
      kernel_axes: by pattern, which axes of a kernel are inputs and outputs, as
        `optax.contrib.MuonDimensionNumbers`; by default they follow from names and shapes.
      adapter_dtype: dtype of the factors; by default the widest of float32 and the kernel's.
      bias: biases that are trained whole: "none", "all" of the model, or "lora_only", those of the
        layers with an adapter.
      modules_to_save: modules that are trained whole, by the end of their dotted name.
      task_type: what the model is for, as "CAUSAL_LM".
      lora_dropout: 0; the adapted kernel is used as a whole, and no input of `a` exists.
      form: "mask_lora", "lora_prune" or "scale_lora".

    Raises:
      ValueError: an unknown form, a computed start, or DoRA, and what `LoraConfig` raises.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jaxopt_lab import adapters
      >>> config = adapters.PerpConfig(target_modules=["w"], r=1)
      >>> base, lora = adapters.init_adapters({"w": jnp.eye(2)}, config, jax.random.key(0))
      >>> lora = jax.tree.map(jnp.ones_like, lora)
      >>> adapters.merge_adapters(base, lora).params["w"]
      Array([[33.,  0.],
             [ 0., 33.]], dtype=float32)

    References:
      Zimmer et al., `PERP <https://arxiv.org/abs/2312.15230>`_, 2023, section 3.
    """

    r: int = 16
    lora_alpha: float = 32
    form: str = "mask_lora"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form not in _FORMS:
            raise ValueError(f"form must be one of {_FORMS}, got {self.form!r}")
        if self.use_dora:
            raise ValueError("use_dora rescales kernels as a whole; PerpConfig has no such form")
        self.changes_base(_starts.computed(self.init_lora_weights))

    __hash__ = LoraConfig.__hash__

    @property
    def additive(self) -> bool:
        """Whether the layer uses K + s a b."""
        return self.form == "lora_prune"

    def changes_base(self, init: Any) -> bool:
        """Returns False.

        Raises:
          ValueError: a computed start, whose residual would not be sparse.
        """
        if init is not None:
            raise ValueError("a PerpConfig has no computed start: what it leaves is not sparse")
        return False

    def start(self, kernel: Kernel, matrices: jax.Array, key: Any, init: Any) -> Factors:
        """Returns the first factors of one kernel."""
        if self.form != "scale_lora":
            return super().start(kernel, matrices, key, init)
        count, fan_in, fan_out = matrices.shape
        root = jnp.asarray(1 / math.sqrt(kernel.r), matrices.dtype)
        a = jnp.broadcast_to(root, (count, fan_in, kernel.r))
        return kernel.pair(a, jnp.broadcast_to(root, (count, kernel.r, fan_out)))

    def effective(self, kernel: Kernel, whole: jax.Array, factors: Factors) -> jax.Array:
        """Returns what the layer uses while training."""
        if self.form == "lora_prune":
            return super().effective(kernel, whole, factors)
        return self.merged(kernel, whole, factors)

    def merged(self, kernel: Kernel, whole: jax.Array, factors: Factors) -> jax.Array:
        """Returns what is merged, zero where the kernel is."""
        change = kernel.change(factors)
        if self.form == "scale_lora":
            return whole * change
        return whole + kernel.scaling * jnp.where(whole != 0, change, 0)

    def undo(self, kernel: Kernel, whole: jax.Array, factors: Factors) -> jax.Array:
        """Returns the kernel: a merged entry of zero does not say what it was."""
        del kernel, factors
        return whole

    def restored(self, kernel: Kernel, whole: jax.Array, factors: Factors, undo: Any) -> jax.Array:
        """Returns K."""
        del kernel, whole, factors
        return undo


def perp_labels(params: Any, *, biases: bool = True, norms: bool = True, head: bool = False) -> Any:
    """Labels parameters for `optax.partition`: "train" for the chosen subset, "freeze" otherwise.

    Args:
      params: the pruned model's parameters.
      biases: train everything called `bias` or `b` that is no norm's.
      norms: train `scale`, `bias` and `weight` below a module whose name has "norm" or "ln" in it.
      head: train the output layer, known by names such as `lm_head`, `logits_dense`, `classifier`
        or, outside of all layers, `head` and `output`; no embedding.

    Returns:
      A tree of the same structure; the fraction trained is that of the "train" leaves' sizes.

    Raises:
      ValueError: nothing would be trained.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from jaxopt_lab import adapters
      >>> params = {"dense": {"kernel": jnp.eye(2), "bias": jnp.zeros(2)},
      ...           "norm": {"scale": jnp.ones(2)}}
      >>> adapters.perp_labels(params)
      {'dense': {'bias': 'train', 'kernel': 'freeze'}, 'norm': {'scale': 'train'}}
      >>> transforms = {"train": optax.adamw(5e-4), "freeze": optax.set_to_zero()}
      >>> tx = optax.partition(transforms, adapters.perp_labels)

    References:
      Zimmer et al., `PERP <https://arxiv.org/abs/2312.15230>`_, 2023, section 3.
    """
    _checks.check_flag(biases=biases, norms=norms, head=head)

    def label(path: tuple[Any, ...], leaf: Any) -> str:
        del leaf
        *parents, own = _kernels.leaf_name(path).split("/")
        norm = bool(parents) and bool(_NORM.search(parents[-1]))
        if norm:
            chosen = norms and own in ("scale", "bias", "weight", "b")
        elif own in ("bias", "b"):
            chosen = biases
        else:
            parts = _names.parts_of(_kernels.leaf_name(path))
            chosen = head and not _names.is_table(parts) and _names.is_head(parts)
        return "train" if chosen else "freeze"

    labels = jax.tree_util.tree_map_with_path(label, params)
    if "train" not in jax.tree.leaves(labels):
        raise ValueError(
            f"nothing would be trained: with biases={biases}, norms={norms} and head={head} no "
            "parameter is chosen by its name"
        )
    return labels
