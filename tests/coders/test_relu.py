"ReLU with L1: both paths against dense autograd, shrinkage, recovery."
import pytest
import torch
from plain_loop import distances, gradients, small, train

from sae_lab.coders import relu
from sae_lab.coders.contract import Hints, make, randn
from sae_lab.ground.toy import recovered, sparse_mixture

HINTS = Hints(torch.zeros(512, dtype=torch.bool), 0, 10)


def by_formula(coder, x, l1):
    z = ((x - coder.b_dec) @ coder.enc.T + coder.b_enc).relu()
    total = (x - x.mean(0)).square().sum()
    sigma = (total / len(x)).sqrt()
    return ((x - z @ coder.dec - coder.b_dec).square().sum() + l1 * sigma * z.abs().sum()) / total


@pytest.mark.parametrize("sparse", [0.0, 1.0])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_gradients_on_both_paths(monkeypatch, sparse, dtype, bound):
    monkeypatch.setattr(relu, "SPARSE", sparse)
    coder, x = make("relu_l1", d_in=64, d_sae=512).to(dtype), randn(256, 64, seed=0).to(dtype)
    coder.b_enc.data -= 0.2
    loss, other = relu.relu_l1_objective(coder, x, x, HINTS), by_formula(coder, x, 0.1)
    far = distances(gradients(loss.total, coder), gradients(other, coder))
    assert max(far.values()) < bound, far
    assert torch.allclose(loss.total, other, rtol=10 * bound)


def test_shrinkage_is_half_the_price():
    "One latent, one direction: the best code is the projection less l1 sigma / 2."
    x = torch.tensor([[3.0, 0.0], [-3.0, 0.0]])
    coder = make("relu_l1", d_in=2, d_sae=1)
    with torch.no_grad(): coder.dec.copy_(torch.tensor([[1.0, 0.0]])), coder.enc.copy_(torch.tensor([[1.0, 0.0]]))
    losses = {}
    for shift in torch.linspace(-1, 0, 101):
        coder.b_enc.data.fill_(shift)
        losses[float(shift)] = float(relu.relu_l1_objective(coder, x, x, Hints(HINTS.dead[:1], 0, 1), 0.2).total)
    assert min(losses, key=losses.get) == pytest.approx(-0.1 * 3.0, abs=0.011)


def test_recovery_small():
    toy = sparse_mixture(64, 32, 3, seed=5)
    coder, losses, _ = train(make("relu_l1", d_in=32, d_sae=128), toy.sample(100_000, seed=6)[0], small("relu_l1"))
    assert recovered(coder.W_dec.detach(), toy.directions) >= 0.9
