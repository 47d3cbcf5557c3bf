"Gates against their definitions and published forward values."
import json

import pytest
import torch

from sae_lab.coders.contract import randn
from sae_lab.coders.dictionary import Dictionary
from sae_lab.coders.gates import Magnitude, Relu, Threshold, TopK, gates


@pytest.mark.parametrize("gate", [TopK(3), Threshold(20, 0.4), Relu(), Magnitude(3), Magnitude()])
def test_scaled_gates_keep_the_support(gate):
    pre = randn(30, 20, seed=0)
    assert torch.equal(gate.scaled(8.0)(pre / 8.0).dense() * 8.0, gate(pre).dense())
    assert gate.homogeneous and gate.affine and len(gates) >= 4


def test_definitions():
    pre = randn(30, 20, seed=1)
    kth = pre.topk(3).values[:, -1:]
    assert torch.equal(TopK(3)(pre).dense(), pre.where(pre >= kth, 0).relu())
    assert torch.equal(Relu()(pre).dense(), pre.relu())
    assert torch.equal(Threshold(20, 0.4)(pre).dense(), pre.where(pre > 0.4, 0))
    assert torch.equal(Threshold(20, -1.0)(pre).dense(), pre.relu())
    big = pre.abs().topk(3).values[:, -1:]
    assert torch.equal(Magnitude(3)(pre).dense(), pre.where(pre.abs() >= big, 0))


def test_published_jumprelu(data):
    case = json.loads((data / "interop" / "saelens_forward_values.json").read_text())["saelens_jumprelu_forward"]
    gate = Threshold(case["d_sae"])
    gate.threshold = torch.tensor(case["threshold"])
    coder = Dictionary(torch.ones(3, 2), torch.ones(3, 2), gate)
    codes, y = coder(torch.tensor(case["x"]))
    assert torch.allclose(codes.dense(), torch.tensor(case["acts_post"]))
    assert torch.allclose(y, torch.tensor(case["recons"]))
