"""Layers that `peft` trains whole, of the kinds that GPT-2 and image models have.

Needs the extra `test-peft`, which has an environment of its own.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_lab import adapters

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytorch_utils = pytest.importorskip("transformers.pytorch_utils")

INPUTS = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)


def saved(folder, net, module, **options):
    """Writes a folder in which a module is trained whole; returns the outputs."""
    config = peft.LoraConfig(target_modules=["0"], r=2, modules_to_save=[module], **options)
    adapted = peft.get_peft_model(net, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight += 0.1 * torch.randn_like(weight)
        expected = adapted.eval()(torch.as_tensor(INPUTS)).numpy()
    adapted.save_pretrained(str(folder))
    return expected


def arrays(module):
    return {name: jnp.asarray(x.detach().numpy()) for name, x in module.named_parameters()}


def gpt2(outputs):
    """Layers whose weight is (inputs, outputs), as kernels are."""
    torch.manual_seed(0)
    conv1d = pytorch_utils.Conv1D
    net = torch.nn.Sequential(conv1d(6, 6), torch.nn.Tanh(), conv1d(outputs, 6))
    params = {}
    with torch.no_grad():
        for weight in (net[0].weight, net[2].weight):
            weight *= 20  # they start smaller than they move here
    for name in ("0", "2"):
        own = arrays(net[int(name)])
        params[name] = {"kernel": own["weight"], "bias": own["bias"]}
    return net, params


NAMES = {"0/kernel": "0", "2/kernel": "2"}


def outputs_of(params):
    hidden = np.tanh(INPUTS @ params["0"]["kernel"] + params["0"]["bias"])
    return hidden @ params["2"]["kernel"] + params["2"]["bias"]


def test_a_weight_with_its_inputs_first(tmp_path):
    net, params = gpt2(4)
    expected = saved(tmp_path, net, "2", fan_in_fan_out=True)
    found = adapters.apply_adapters(*adapters.read_peft_folder(tmp_path, params, NAMES))
    assert np.abs(outputs_of(params) - expected).max() > 0.05  # the adapter does something
    np.testing.assert_allclose(outputs_of(found), expected, 0, 1e-5)


def test_a_part_of_a_weight_with_its_inputs_first(tmp_path):
    net, params = gpt2(4)
    expected = saved(tmp_path, net, "2", fan_in_fan_out=True)
    whole = params.pop("2")
    for index in range(2):
        rows = slice(2 * index, 2 * index + 2)
        params[f"2{index}"] = {"kernel": whole["kernel"][:, rows], "bias": whole["bias"][rows]}
    names = {"0/kernel": "0", "20/kernel": "2[0:2]", "21/kernel": "2[2:4]"}
    found = adapters.apply_adapters(*adapters.read_peft_folder(tmp_path, params, names))
    joined = {
        leaf: jnp.concatenate([found[name][leaf] for name in ("20", "21")], -1)
        for leaf in ("kernel", "bias")
    }
    np.testing.assert_allclose(outputs_of(found | {"2": joined}), expected, 0, 1e-5)


@pytest.mark.parametrize("told", [True, False], ids=["by its field", "by its values"])
def test_a_square_weight_that_may_have_its_inputs_first_is_refused(tmp_path, told):
    net, params = gpt2(6)
    if not told:  # only the layer that is trained whole is of the kind
        first = torch.nn.Linear(6, 6)
        net[0], params["0"] = first, {"kernel": arrays(first)["weight"].T}
    saved(tmp_path, net, "2", fan_in_fan_out=told)
    with pytest.raises(ValueError, match=r"'base_model.model.2.weight' is square and trained whol"):
        adapters.read_peft_folder(tmp_path, params, NAMES)


def test_a_batch_norm(tmp_path):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8))
    dense, norm = arrays(net[0]), arrays(net[1])
    params = {
        "0": {"kernel": dense["weight"].T, "bias": dense["bias"]},
        "1": {
            "scale": norm["weight"],
            "bias": norm["bias"],
            "mean": jnp.zeros(8),
            "var": jnp.ones(8),
        },
    }
    names = {"0/kernel": "0"} | {f"1/{leaf}": "1" for leaf in params["1"]}
    expected = saved(tmp_path, net, "1")
    found = adapters.apply_adapters(*adapters.read_peft_folder(tmp_path, params, names))
    norm = found["1"]
    hidden = INPUTS @ found["0"]["kernel"] + found["0"]["bias"]
    outputs = (hidden - norm["mean"]) / np.sqrt(norm["var"] + 1e-5) * norm["scale"] + norm["bias"]
    np.testing.assert_allclose(outputs, expected, 0, 1e-5)
