"""Files as LyCORIS writes them give its outputs here, or are refused as what they are.

Needs the extra `test-peft`, which has an environment of its own.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_lab import adapters

torch = pytest.importorskip("torch")
lycoris = pytest.importorskip("lycoris")

MODULES = ("q", "up_proj", "conv", "point")
INPUTS = np.random.default_rng(0).normal(size=(2, 25, 6)).astype(np.float32)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q = torch.nn.Linear(6, 8)
        self.norm = torch.nn.LayerNorm(8)
        self.up_proj = torch.nn.Linear(8, 8)
        self.conv = torch.nn.Conv2d(8, 4, 3)
        self.point = torch.nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = self.up_proj(self.norm(torch.tanh(self.q(x))))
        return self.point(torch.tanh(self.conv(x.mT.reshape(2, 8, 5, 5))))


def net():
    torch.manual_seed(0)
    return Net()


def outputs(model):
    with torch.no_grad():
        return model.eval()(torch.as_tensor(INPUTS)).numpy()


def turned(weight):
    """(outputs, inputs, window...) to (window..., inputs, outputs), and back."""
    return weight.transpose(*range(2, weight.ndim), 1, 0)


def written(folder, options, more=()):
    """Returns a file of LyCORIS and the outputs under it."""
    model = net()
    lycoris.LycorisNetwork.apply_preset({"target_module": [], "target_name": [*MODULES, *more]})
    network = lycoris.create_lycoris(model, linear_dim=4, linear_alpha=1, **options)
    network.apply_to()
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in network.parameters():
            weight += 0.3 * torch.randn_like(weight)
    path = folder / "style.safetensors"
    expected = outputs(model)
    network.save_weights(str(path), torch.float32, {})
    return path, expected


def read(path):
    state = net().state_dict()
    params = {
        module: {"kernel": jnp.asarray(turned(state[f"{module}.weight"].numpy()))}
        for module in MODULES
    }
    names = {f"{module}/kernel": f"lycoris.{module}" for module in MODULES}
    return adapters.read_kohya_file(path, params, names)


@pytest.mark.parametrize(
    "options",
    [
        {"algo": "lora", "conv_dim": 2, "conv_alpha": 1},
        {"algo": "locon", "conv_dim": 3, "conv_alpha": 2, "rs_lora": True},
        {"algo": "locon", "conv_dim": 3, "use_scalar": True},
    ],
    ids=str,
)
def test_what_is_low_rank_gives_the_same_outputs(tmp_path, options):
    path, expected = written(tmp_path, options)
    new = adapters.apply_adapters(*read(path))
    model = net()
    state = model.state_dict()
    for module in MODULES:
        kernel = np.asarray(new[module]["kernel"])
        state[f"{module}.weight"] = torch.tensor(
            kernel.transpose(-1, -2, *range(kernel.ndim - 2)).copy()
        )
    model.load_state_dict(state)
    assert np.abs(expected - outputs(net())).max() > 0.02  # the adapter does something
    np.testing.assert_allclose(outputs(model), expected, 0, 1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"algo": "locon", "use_tucker": True}, "a convolution in three factors"),
        ({"algo": "locon", "dora_wd": True}, "DoRA, whose lengths are kept"),
        ({"algo": "loha"}, r"LyCORIS \(LoHa\)"),
        ({"algo": "lokr", "factor": 2}, r"LyCORIS \(LoKr\)"),
        ({"algo": "glora"}, r"LyCORIS \(GLoRA\)"),
        ({"algo": "diag-oft"}, r"LyCORIS \(OFT or BOFT\)"),
        ({"algo": "boft"}, r"LyCORIS \(OFT or BOFT\)"),
        ({"algo": "ia3"}, r"LyCORIS \(IA3\)"),
        ({"algo": "full"}, "whole differences of (weights|biases)"),
        ({"algo": "locon", "train_norm": True}, "differences of norms"),
    ],
    ids=str,
)
def test_other_forms_are_refused_by_name(tmp_path, options, message):
    path, _ = written(tmp_path, {"conv_dim": 4, **options}, more=["norm"])
    with pytest.raises(ValueError, match=f"{message}.* is not read here"):
        read(path)
