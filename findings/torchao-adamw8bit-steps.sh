#!/usr/bin/env bash
# How far torchao's AdamW8bit moves a weight whose gradients are small beside its neighbours'.
#
# Guess before running: as AdamW within some percent; the dynamic code is the one of the 8-bit paper.
# Seen with torchao 0.18.0 and torch 2.13.0 on a CPU, gradients spread over three decades in each block
# of 256 entries: the first step is AdamW's. In the second, second moments that are far below their
# block's largest have been stored as zero, their first moments have not, and the quotient takes some
# weights a hundred learning rates and more, where AdamW moves none by more than 2.1. After 100 steps
# the whole update is further from AdamW's than AdamW's is from nothing. The 4-bit optimizer of the same
# package, whose second moments have no zero level, moves no weight further than AdamW does.
# A block-wise code for second moments must not have zero for what is not zero.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q --disable-pip-version-check \
    torch==2.13.0 torchao==0.18.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from torchao.optim import AdamW4bit, AdamW8bit


def movement(make, steps):
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(64, 64))
    start = weight.detach().clone()
    optimizer = make([weight], lr=1e-2, weight_decay=0.01)
    scale = 10 ** (-3 * torch.rand(64, 64))
    for _ in range(steps):
        weight.grad = torch.randn(64, 64) * scale
        optimizer.step()
    return (weight.detach() - start) / 1e-2


furthest, apart = {}, {}
for steps in (1, 2, 100):
    exact = movement(torch.optim.AdamW, steps)
    for make in (torch.optim.AdamW, AdamW8bit, AdamW4bit):
        found = movement(make, steps)
        furthest[make.__name__, steps] = far = float(found.abs().max())
        apart[make.__name__, steps] = rms = float(((found - exact).norm() / exact.norm()))
        print(f"{make.__name__}, {steps} steps: furthest weight {far:.1f} learning rates, "
              f"apart from AdamW by {rms:.2g} of its movement")
assert furthest["AdamW8bit", 1] < 1.1 and apart["AdamW8bit", 1] < 1e-3
assert furthest["AdamW", 2] < 2.2 and furthest["AdamW4bit", 2] < 2.3
assert furthest["AdamW8bit", 2] > 50 and apart["AdamW8bit", 100] > 1
PYTHON
