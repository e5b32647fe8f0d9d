#!/usr/bin/env bash
# rank_pattern and alpha_pattern of a peft LoraConfig, with the full name of a module as the key.
#
# Guess before running: a key that is a module's whole name is that module's alone, and of two keys
# the one that is the module's whole name wins.
# Seen with peft 0.21.2 and torch 2.13.0: a key is matched from any dot of a longer name on. With
# {"layers.0.q": 2, "decoder.layers.0.q": 3} both modules get rank 2: the first key that fits is taken,
# and the second module's own key is never asked. In the other order each gets its own, so the order
# of a JSON object decides what a saved adapter computes. No warning. target_modules=["layers.0.q"]
# adapts both modules in the same way. A key that starts with ^ is exact.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q --disable-pip-version-check torch==2.13.0 peft==0.21.2
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import torch
from peft import LoraConfig, get_peft_model


class Both(torch.nn.Module):
    def __init__(self):
        super().__init__()

        def layers():
            return torch.nn.ModuleList([torch.nn.ModuleDict({"q": torch.nn.Linear(4, 4)})])

        self.layers = layers()
        self.decoder = torch.nn.ModuleDict({"layers": layers()})


def ranks(targets, pattern):
    model = get_peft_model(Both(), LoraConfig(r=1, target_modules=targets, rank_pattern=pattern))
    found = {n: m.r["default"] for n, m in model.named_modules() if hasattr(m, "lora_A")}
    return {n.removeprefix("base_model.model."): r for n, r in found.items()}


outer, inner = "layers.0.q", "decoder.layers.0.q"
found = [
    ranks(["q"], {outer: 2, inner: 3}),
    ranks(["q"], {inner: 3, outer: 2}),
    ranks(["q"], {"^layers.0.q": 2, inner: 3}),
    ranks([outer], {}),
]
print(*found, sep="\n")
assert found == [
    {outer: 2, inner: 2},
    {outer: 2, inner: 3},
    {outer: 2, inner: 3},
    {outer: 1, inner: 1},
]
PYTHON
