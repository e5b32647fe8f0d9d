"""Layers of each kind in PyTorch and here, and what joins them; for the folder matrix."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
nn = torch.nn

DIM, OUT, CLASSES, ROWS = 6, 8, 4, 5
Arrays = list[np.ndarray]


class Link(NamedTuple):
    """Leaves here and parameters there that have the same numbers."""

    paths: list[str]
    keys: list[str]
    here: Callable[[Arrays], Arrays]
    there: Callable[[Arrays], Arrays]


def same(path: str, key: str) -> Link:
    return Link([path], [key], lambda x: x, lambda x: x)


def moved(path: str, key: str, axes: tuple[int, ...]) -> Link:
    """The axes of PyTorch's parameter in the order that they have here."""
    back = tuple(np.argsort(axes).tolist())
    return Link([path], [key], lambda x: [x[0].transpose(axes)], lambda x: [x[0].transpose(back)])


def dense(path: str, key: str) -> list[Link]:
    return [moved(f"{path}/kernel", f"{key}.weight", (1, 0)), same(f"{path}/bias", f"{key}.bias")]


class Net(nn.Module):
    """Layers of one kind, then a small classifier."""

    def __init__(self, layers: dict[str, Any], body: Callable[..., Any]):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.cls = nn.Linear(OUT, CLASSES)
        self.body = body

    def forward(self, x):
        return self.cls(self.body(self, x))


class Ends(Net):
    """Its ends are found by peft as those of transformers are."""

    def get_input_embeddings(self):
        return self.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head


class Experts(nn.Module):
    """Stacks of experts, (experts, outputs, inputs) as in Mixtral; each sees all inputs."""

    def __init__(self):
        super().__init__()
        self.gate_up = nn.Parameter(0.3 * torch.randn(3, 2 * DIM, DIM))
        self.down = nn.Parameter(0.3 * torch.randn(3, OUT, DIM))

    def forward(self, x):
        gate, up = torch.einsum("bi,eoi->beo", x, self.gate_up).chunk(2, -1)
        return torch.einsum("bei,eoi->bo", torch.tanh(gate) * up, self.down)


@dataclasses.dataclass(frozen=True)
class Kind:
    """How layers are made and called, their names, and what of them is adapted."""

    make: Callable[[], Any]
    links: list[Link]
    names: dict[str, str | list[str]]  # of what is adapted
    targets: list[str]  # the same, as target_modules here
    inputs: np.ndarray
    pattern: tuple[str, str]  # of one of the layers, here and there
    there: dict[str, Any] | None = None  # targets, where they are no modules
    beside: dict[str, str] = dataclasses.field(default_factory=dict)  # names of the others
    merged: bool = False  # compared after merging

    def net(self) -> Any:
        torch.manual_seed(0)
        return self.make()

    def theirs(self) -> dict[str, Any]:
        """What peft adapts."""
        modules = [
            n for own in self.names.values() for n in ([own] if isinstance(own, str) else own)
        ]
        return self.there or {"target_modules": sorted({m.partition("[")[0] for m in modules})}

    @property
    def every_name(self) -> dict[str, Any]:
        """All names that a user would give."""
        return {**self.names, **self.beside, "cls/kernel": "cls"}

    def params(self, net: Any) -> dict[str, Any]:
        """The parameters here."""
        state = {k: v.detach().numpy() for k, v in net.state_dict().items()}
        tree: dict[str, Any] = {}
        for link in self._links():
            for path, value in zip(link.paths, link.here([state[key] for key in link.keys])):
                node, (*above, last) = tree, path.split("/")
                for part in above:
                    node = node.setdefault(part, {})
                node[last] = jnp.asarray(value)
        return tree

    def outputs(self, params: Any) -> np.ndarray:
        """What PyTorch's own layers make of the parameters here."""
        flat, _ = jax.tree_util.tree_flatten_with_path(params)
        found = {
            jax.tree_util.keystr(p, simple=True, separator="/"): np.asarray(v) for p, v in flat
        }
        net, state = self.net(), {}
        for link in self._links():
            state |= zip(link.keys, link.there([found[path] for path in link.paths]))
        state = {k: torch.tensor(np.array(v, np.float32)) for k, v in state.items()}
        net.load_state_dict(state)
        return run(net, self.inputs)

    def _links(self) -> list[Link]:
        return [*self.links, *dense("cls", "cls")]


def run(net: Any, inputs: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return net(torch.as_tensor(inputs)).numpy()


_RNG = np.random.default_rng(0)
_VECTORS = _RNG.normal(size=(ROWS, DIM)).astype(np.float32)
_TOKENS = _RNG.integers(0, 11, (ROWS,))


def _images(*sizes: int) -> np.ndarray:
    return _RNG.normal(size=(2, DIM, *sizes)).astype(np.float32)


def _deep() -> Any:
    return nn.ModuleDict({"q": nn.Linear(OUT, OUT), "norm": nn.LayerNorm(OUT)})


def _convolution(dimensions: int, **options: Any) -> Kind:
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    window = (3, 2, 2)[:dimensions]
    spatial = tuple(range(2, 2 + dimensions))
    return Kind(
        lambda: Net(
            {"conv": layer(DIM, OUT, window, **options)}, lambda m, x: m.conv(x).flatten(2).sum(-1)
        ),
        [
            moved("Conv_0/kernel", "conv.weight", (*spatial, 1, 0)),
            same("Conv_0/bias", "conv.bias"),
        ],
        {"Conv_0/kernel": "conv"},
        ["Conv_0"],
        _images(*(5, 4, 3)[:dimensions]),
        ("Conv_0", "conv"),
    )


def _ends() -> Any:
    layers = {
        "embed_tokens": nn.Embedding(11, DIM),
        "mid": nn.Linear(DIM, DIM),
        "lm_head": nn.Linear(DIM, OUT),
    }
    return Ends(layers, lambda m, x: m.lm_head(torch.tanh(m.mid(m.embed_tokens(x)))))


class Tied(nn.Module):
    """The output layer has the weights of the embedding."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(11, OUT)
        self.out = nn.Linear(OUT, 11, bias=False)
        self.out.weight = self.tokens.weight
        self.cls = nn.Linear(11, CLASSES)

    def forward(self, x):
        return self.cls(self.out(torch.tanh(self.tokens(x))))


KINDS = {
    "dense": Kind(
        lambda: Net(
            {"q": nn.Linear(DIM, OUT), "deep": _deep()},
            lambda m, x: m.deep["norm"](m.deep["q"](torch.tanh(m.q(x)))),
        ),
        [
            *dense("q", "q"),
            *dense("deep/q", "deep.q"),
            same("deep/norm/scale", "deep.norm.weight"),
            same("deep/norm/bias", "deep.norm.bias"),
        ],
        {"q/kernel": "q", "deep/q/kernel": "deep.q"},
        ["q", "deep.q"],
        _VECTORS,
        ("^q", "^q"),
        beside={"deep/norm/bias": "deep.norm"},
    ),
    "embedding": Kind(
        lambda: Net({"wte": nn.Embedding(11, OUT)}, lambda m, x: torch.tanh(m.wte(x))),
        [same("wte/weight", "wte.weight")],
        {"wte/weight": "wte"},
        ["wte"],
        _TOKENS,
        ("wte", "wte"),
    ),
    "ends of a model": Kind(
        _ends,
        [
            same("embed_tokens/embedding", "embed_tokens.weight"),
            *dense("mid", "mid"),
            *dense("lm_head", "lm_head"),
        ],
        {
            "embed_tokens/embedding": "embed_tokens",
            "lm_head/kernel": "lm_head",
        },
        ["embed_tokens", "lm_head"],
        _TOKENS,
        ("lm_head", "lm_head"),
        beside={"mid/kernel": "mid"},
    ),
    "convolution, 1 axis": _convolution(1),
    "convolution, 2 axes": _convolution(2),
    "convolution, 3 axes": _convolution(3),
    "convolution, grouped": _convolution(2, groups=2),
    "heads": Kind(
        lambda: Net(
            {"query": nn.Linear(DIM, OUT), "out": nn.Linear(OUT, OUT)},
            lambda m, x: m.out(torch.tanh(m.query(x))),
        ),
        [
            Link(
                ["attention/query/kernel", "attention/query/bias"],
                ["query.weight", "query.bias"],
                lambda x: [x[0].T.reshape(DIM, 2, 4), x[1].reshape(2, 4)],
                lambda x: [x[0].reshape(DIM, OUT).T, x[1].reshape(OUT)],
            ),
            Link(
                ["attention/out/kernel", "attention/out/bias"],
                ["out.weight", "out.bias"],
                lambda x: [x[0].T.reshape(2, 4, OUT), x[1]],
                lambda x: [x[0].reshape(OUT, OUT).T, x[1]],
            ),
        ],
        {"attention/query/kernel": "query", "attention/out/kernel": "out"},
        ["attention.query", "attention.out"],
        _VECTORS,
        ("query", "query"),
    ),
    "fused qkv": Kind(
        lambda: Net({"c_attn": nn.Linear(DIM, 3 * OUT)}, lambda m, x: _mixed(m.c_attn(x))),
        [
            Link(
                [f"{n}/{leaf}" for n in "qkv" for leaf in ("kernel", "bias")],
                ["c_attn.weight", "c_attn.bias"],
                lambda x: [
                    y for w, b in zip(np.split(x[0], 3), np.split(x[1], 3)) for y in (w.T, b)
                ],
                lambda x: [np.concatenate([w.T for w in x[::2]]), np.concatenate(x[1::2])],
            )
        ],
        {f"{n}/kernel": f"c_attn[{8 * i}:{8 * i + 8}]" for i, n in enumerate("qkv")},
        ["q", "k", "v"],
        _VECTORS,
        ("[qkv]", "c_attn"),
    ),
    "experts": Kind(
        lambda: Net({"experts": Experts()}, lambda m, x: m.experts(x)),
        [
            moved("experts/gate_up/kernel", "experts.gate_up", (0, 2, 1)),
            moved("experts/down/kernel", "experts.down", (0, 2, 1)),
        ],
        {
            "experts/gate_up/kernel": "experts.base_layer:gate_up",
            "experts/down/kernel": "experts:down",
        },
        ["experts.gate_up", "experts.down"],
        _VECTORS,
        (r"experts\.down", r"experts\.down"),
        there={
            "target_modules": [],
            "target_parameters": ["experts.gate_up", "experts.down"],
        },
    ),
    "tied embedding": Kind(
        Tied,
        [
            Link(
                ["tokens/embedding"],
                ["tokens.weight", "out.weight"],
                lambda x: x[:1],
                lambda x: 2 * x,
            )
        ],
        {"tokens/embedding": "tokens"},
        ["tokens"],
        _TOKENS,
        ("tokens", "tokens"),
        merged=True,
    ),
    "stacked": Kind(
        lambda: Net(
            {"layers": nn.ModuleList(nn.Linear(OUT, OUT) for _ in range(3))},
            lambda m, x: _through(m.layers, x),
        ),
        [
            Link(
                ["layers/up/kernel", "layers/up/bias"],
                [f"layers.{i}.{leaf}" for leaf in ("weight", "bias") for i in range(3)],
                lambda x: [np.stack([w.T for w in x[:3]]), np.stack(x[3:])],
                lambda x: [*(w.T for w in x[0]), *x[1]],
            )
        ],
        {"layers/up/kernel": [f"layers.{i}" for i in range(3)]},
        ["layers.up"],
        _RNG.normal(size=(ROWS, OUT)).astype(np.float32),
        (r"layers\.up", "layers.1"),
    ),
}


def _mixed(x: Any) -> Any:
    q, k, v = x.chunk(3, -1)
    return torch.softmax(q @ k.T, -1) @ v


def _through(layers: Any, x: Any) -> Any:
    for layer in layers:
        x = torch.tanh(layer(x))
    return x
