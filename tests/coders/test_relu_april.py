"ReLU with L1, April 2024: both paths against dense autograd, the price through unit rows, folding, recovery."
import pytest
import torch
from plain_loop import distances, gradients, small, train

from sae_lab.coders import relu
from sae_lab.coders.contract import Hints, coders, load, make, randn
from sae_lab.coders.dictionary import Dictionary
from sae_lab.coders.gates import Magnitude, Relu, Threshold, TopK
from sae_lab.coders.jumprelu import Jump, LogJump
from sae_lab.coders.relu_april import fold_norms, relu_april_objective
from sae_lab.coders.topk import tied
from sae_lab.ground.errors import InputError
from sae_lab.ground.toy import recovered, sparse_mixture
from sae_lab.sources.stream import TensorSource
from sae_lab.training.fit import train as fit

NONE = torch.zeros(512, dtype=torch.bool)


def moved(dtype=torch.float32, **kw):
    "A coder away from its start: rows of different lengths, biases, sparse."
    coder = make("relu_april", d_in=64, d_sae=512, **kw).to(dtype)
    with torch.no_grad():
        for i, each in enumerate((coder.enc, coder.dec, coder.b_dec)):
            each.add_(0.05 * randn(*each.shape, seed=10 + i).to(dtype))
        coder.dec.mul_(torch.linspace(0.2, 3, 512, dtype=dtype)[:, None])
        coder.b_enc.sub_(0.3)
    return coder


def by_formula(coder, x, y, l1, share):
    z = (x @ coder.enc.T + coder.b_enc).relu()
    total = (y - y.mean(0)).square().sum()
    price = (z * coder.dec.square().sum(1).sqrt()).sum()
    return ((y - z @ coder.dec - coder.b_dec).square().sum() + share * l1 * (total / len(y)).sqrt() * price) / total


@pytest.mark.parametrize("sparse", [0.0, 1.0])
@pytest.mark.parametrize("d_out", [None, 24])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_gradients_on_both_paths(monkeypatch, sparse, d_out, dtype, bound):
    monkeypatch.setattr(relu, "SPARSE", sparse)
    coder, x = moved(dtype, d_out=d_out), randn(256, 64, seed=0).to(dtype)
    y = x if d_out is None else randn(256, d_out, seed=1).to(dtype)
    loss = relu_april_objective(coder, x, y, Hints(NONE, 3, 200))
    other = by_formula(coder, x, y, 0.1, 0.4)
    far = distances(gradients(loss.total, coder), gradients(other, coder))
    assert set(far) == {"enc", "dec", "b_enc", "b_dec"} and max(far.values()) < bound, far
    assert torch.allclose(loss.total, other, rtol=10 * bound)


def test_the_price_is_l1_of_the_folded_coder():
    "Lengths in the rows or in the encoder: the same loss, which is what makes folding the end of this recipe."
    coder, x = moved(torch.float64), randn(256, 64, seed=0).double()
    losses = [relu_april_objective(each, x, x, Hints(NONE, 50, 100)).total for each in (coder, fold_norms(coder))]
    assert torch.allclose(*losses, rtol=1e-12)


GATES = [Relu(), Threshold(512, 0.3), Jump(512), LogJump(512, 0.3)]


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: type(gate).__name__)
def test_folding_is_exact(gate):
    if isinstance(gate, Jump): gate.threshold = torch.linspace(0.1, 0.5, 512)
    given = moved()
    coder = Dictionary(given.enc.detach(), given.dec.detach(), gate).double()
    coder.b_enc.data.copy_(given.b_enc)
    before, x = coder.identity, randn(256, 64, seed=0).double()
    out = fold_norms(coder)
    (codes, y), (folded, same) = coder(x), out(x)
    assert coder.identity == before and type(out.gate) is type(gate)
    assert torch.equal(codes.dense() > 0, folded.dense() > 0) and 0 < codes.l0().mean() < 256
    assert torch.allclose(codes.dense() * coder.dec.norm(dim=1), folded.dense(), rtol=1e-12)
    assert torch.allclose(y, same, rtol=1e-12) and torch.allclose(out.dec.norm(dim=1), torch.ones(512).double())


def test_folding_leaves_a_row_of_zeros_and_refuses_rivalry():
    coder = make("relu_april", d_in=8, d_sae=16)
    coder.dec.data[3] = 0
    out = fold_norms(coder)
    assert all(p.isfinite().all() for p in out.parameters()) and not out.dec[3].any()
    enc, dec, _ = tied(8, 16, None, 0)
    for gate in (TopK(2), Magnitude(2)):
        with pytest.raises(InputError, match=type(gate).__name__): fold_norms(Dictionary(enc, dec, gate))


def test_folded_coder_is_saved_and_trained_on(tmp_path):
    x = sparse_mixture(32, 16, 2, seed=0).sample(4096, seed=1)[0]
    fit(coder := make("relu_april", d_in=16, d_sae=48), TensorSource(x, batch=256, epochs=5), progress=False)
    again = load(fold_norms(coder).save(tmp_path / "coder"))
    assert again.spec == coder.spec and torch.allclose(again(x)[1], coder(x)[1], atol=1e-5)


def test_recipe_is_the_published_one():
    recipe = coders["relu_april"].meta["recipe"]
    assert (recipe.unit_norm, recipe.decay, recipe.scale) == (False, 0.2, True)
    assert recipe.clip == 0.01  # the published 1, in units of a loss divided by a variance of about 100
    assert recipe.betas == (0.9, 0.999) and recipe.resample is None
    coder = make("relu_april", d_in=8, d_sae=32)
    assert torch.equal(coder.W_enc, coder.W_dec.t()) and torch.allclose(coder.W_dec.norm(dim=1), torch.full((32,), 0.1))


def test_recovery_small():
    toy = sparse_mixture(64, 32, 3, seed=5)
    coder, _, _ = train(make("relu_april", d_in=32, d_sae=128), toy.sample(100_000, seed=6)[0], small("relu_april"))
    assert recovered(coder.W_dec.detach(), toy.directions) >= 0.9
