"Dictionary: blocks of rows, gradients of encode, the cheap gradient of the bias."
import pytest
import torch
from plain_loop import distances, gradients

from sae_lab.coders import dictionary
from sae_lab.coders.contract import make, randn
from sae_lab.coders.dictionary import training_inputs


def test_blocks_change_nothing(monkeypatch):
    for kind in ["topk", "batchtopk", "relu_l1"]:
        coder, x = make(kind, d_in=8, d_sae=32, **({} if kind == "relu_l1" else {"k": 4})), randn(50, 8, seed=0)
        monkeypatch.setattr(dictionary, "BLOCK", 2**26)
        whole = coder.encode(x).dense()
        monkeypatch.setattr(dictionary, "BLOCK", 32 * 7)
        assert torch.allclose(coder.encode(x).dense(), whole, atol=1e-6)


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "relu_l1", "random"])
def test_encode_is_differentiable(kind):
    args = {} if kind == "relu_l1" else {"k": 4}
    coder = make(kind, d_in=8, d_sae=32, **args).double().requires_grad_(True)
    x, weight = randn(20, 8, seed=0).double().requires_grad_(True), randn(20, 32, seed=1).double()
    codes = coder.encode(x)
    mask = codes.detach().dense() != 0
    mine = torch.autograd.grad((codes.dense() * weight).sum(), [x, coder.enc, coder.b_dec])
    pre = (x - coder.b_dec) @ coder.enc.T + coder.b_enc
    other = torch.autograd.grad((pre * mask * weight).sum(), [x, coder.enc, coder.b_dec])
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(mine, other))


def test_no_gradient_is_kept_where_none_is_wanted():
    coder = make("topk", d_in=8, d_sae=32, k=4)
    with torch.no_grad(): assert not coder.encode(randn(5, 8, seed=0)).values.requires_grad


def test_bias_gradient():
    coder = make("topk", d_in=8, d_sae=32, k=4).double()
    x, weight = randn(50, 8, seed=0).double(), randn(50, 32, seed=1).double()
    inputs, bias = training_inputs(coder, x)
    mine = gradients((weight * (inputs @ coder.enc.T + bias)).sum(), coder)
    other = gradients((weight * ((x - coder.b_dec) @ coder.enc.T + coder.b_enc)).sum(), coder)
    assert max(distances(mine, other).values()) < 1e-12
