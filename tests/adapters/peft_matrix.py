"""Layers of each kind in PyTorch and here, with the names that join them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch

from tests.adapters import models

DIM, OUT, CLASSES = 6, 8, 4


class Net(torch.nn.Module):
    """Layers of one kind between an input and a small classifier."""

    def __init__(self, layers: dict[str, torch.nn.Module], body: Callable[..., torch.Tensor]):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.cls = torch.nn.Linear(OUT, CLASSES)
        self.body = body

    def forward(self, x):
        return self.cls(self.body(self, x))


class Experts(torch.nn.Module):
    """Two stacks of experts, each for all inputs; (experts, outputs, inputs), as in Mixtral."""

    def __init__(self):
        super().__init__()
        self.gate_up = torch.nn.Parameter(0.3 * torch.randn(3, 2 * DIM, DIM))
        self.down = torch.nn.Parameter(0.3 * torch.randn(3, OUT, DIM))

    def forward(self, x):
        gate, up = torch.einsum("bi,eoi->beo", x, self.gate_up).chunk(2, -1)
        return torch.einsum("bei,eoi->bo", torch.tanh(gate) * up, self.down)


class Table(Net):
    """A model whose ends peft finds as it finds those of transformers."""

    def get_input_embeddings(self):
        return self.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head


@dataclasses.dataclass(frozen=True)
class Kind:
    """How a kind of layer is made, called and carried over."""

    make: Callable[[], torch.nn.Module]
    names: dict[str, Any]  # by the path here
    targets: dict[str, Any]  # for peft
    ours: list[str]  # target_modules here
    inputs: np.ndarray
    patterns: tuple[str, str]  # a pattern of one of the layers, here and there
    axes: dict[str, Any] | None = None
    # By parameter of PyTorch: the path here, and how it stands there from how it stands here.
    carried: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = dataclasses.field(
        default_factory=dict
    )
    back: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] | None = None

    def params(self, net: torch.nn.Module) -> dict[str, Any]:
        """The parameters here."""
        state = {k: v.detach().numpy() for k, v in net.state_dict().items()}
        found = self.back(state) if self.back else {}
        tree: dict[str, Any] = {}
        for path, value in found.items():
            *above, last = path.split("/")
            node = tree
            for part in above:
                node = node.setdefault(part, {})
            node[last] = jnp.asarray(value)
        return tree

    def outputs(self, params: Any) -> np.ndarray:
        """What PyTorch's own layers make of the parameters here."""
        flat = models.flat(params)
        net = self.make()
        state = {key: put(flat) for key, put in self.carried.items()}
        net.load_state_dict({k: torch.tensor(np.array(v)) for k, v in state.items()})
        with torch.no_grad():
            return net(torch.as_tensor(self.inputs)).numpy()
