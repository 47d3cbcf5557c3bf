"TopK: closed form, gradients and trajectories against a dense implementation, AuxK, recovery."
import functools
from dataclasses import replace

import pytest
import torch
from plain_loop import distances, gradients, small, train

from sae_lab.coders.contract import Hints, coders, make, randn
from sae_lab.coders.topk import topk_objective
from sae_lab.ground.toy import recovered, sparse_mixture


def dense_loss(coder, x, y, hints, select, aux=1 / 32):
    "The formula written densely: `select` gives the mask of what fires."
    pre = (x - coder.b_dec) @ coder.enc.T + coder.b_enc
    z = pre.where(select(pre.detach()), 0).relu()
    error, total = y - z @ coder.dec - coder.b_dec, (y - y.mean(0)).square().sum()
    n_dead, k_aux = int(hints.dead.sum()), coder.d_in // 2
    if not n_dead: return error.square().sum() / total, z
    among = pre.where(hints.dead, -torch.inf)
    kth = among.detach().topk(min(k_aux, n_dead)).values[:, -1:]
    revived = torch.where(among.detach() >= kth, pre, 0).relu() @ coder.dec
    revive = (error.detach() - revived).square().sum()
    return (error.square().sum() + aux * revive) / total, z


def row_mask(pre, k): return pre >= pre.topk(k).values[:, -1:]


def batch_mask(pre, k): return pre >= pre.flatten().topk(round(k * len(pre))).values[-1]


def sized(kind, dtype, k=8):
    coder = make(kind, d_in=64, d_sae=512, k=k, seed=3).to(dtype)
    with torch.no_grad():
        for p in coder.parameters(): p += 0.02 * randn(*p.shape, seed=p.ndim)
    return coder


@pytest.mark.parametrize("kind, mask", [("topk", row_mask), ("batchtopk", batch_mask)])
@pytest.mark.parametrize("n_dead", [0, 20, 300])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_gradients_are_those_of_dense_autograd(kind, mask, n_dead, dtype, bound):
    coder, x = sized(kind, dtype), randn(256, 64, seed=0).to(dtype)
    hints = Hints(torch.arange(512) >= 512 - n_dead, 3, 10)
    loss = coders[kind].meta["recipe"].objective(coder, x, x, hints)
    other, z = dense_loss(coder, x, x, hints, functools.partial(mask, k=8))
    assert torch.equal(loss.codes.dense() != 0, z != 0)
    far = distances(gradients(loss.total, coder), gradients(other, coder))
    assert max(far.values()) < bound, far
    assert torch.allclose(loss.total, other, rtol=10 * bound)


@pytest.mark.parametrize("kind, mask", [("topk", row_mask), ("batchtopk", batch_mask)])
def test_two_hundred_steps_beside_a_dense_implementation(kind, mask):
    recipe = coders[kind].meta["recipe"]
    x = sparse_mixture(64, 16, 4, seed=0).sample(256 * 200, seed=1)[0]

    def dense(coder, batch, y, hints):
        loss = recipe.objective(coder, batch, y, hints)
        total, _ = dense_loss(coder, batch, y, hints, functools.partial(mask, k=4))
        return type(loss)(total, {}, loss.codes, loss.updates)

    mine = train(make(kind, d_in=16, d_sae=128, k=4), x, small(kind))[1]
    other = train(make(kind, d_in=16, d_sae=128, k=4), x, small(kind), objective=dense)[1]
    assert len(mine) == 200 and float(((mine - other) / other).abs().max()) < 1e-3
    assert mine[-20:].mean() < 0.7 * mine[:20].mean()


def test_closed_form():
    coder = make("topk", d_in=4, d_sae=4, k=2)
    with torch.no_grad(): coder.enc.copy_(torch.eye(4)), coder.dec.copy_(torch.eye(4))
    x = torch.tensor([[3.0, -5.0, 1.0, 2.0], [0.5, 0.0, -1.0, -2.0]])
    codes, y = coder(x)
    assert y.tolist() == [[3.0, 0.0, 0.0, 2.0], [0.5, 0.0, 0.0, 0.0]] and codes.l0().tolist() == [2.0, 1.0]
    loss = coders["topk"].meta["recipe"].objective(coder, x, x, Hints(torch.zeros(4, dtype=torch.bool), 0, 1))
    assert loss.total.item() == pytest.approx(31.0 / float((x - x.mean(0)).square().sum()))


def test_dead_latents_are_revived():
    "Half of the latents start too weak to be chosen; AuxK finds use for them, and nothing else does."
    toy = sparse_mixture(128, 32, 3, seed=0)
    x = toy.sample(200_000, seed=1)[0]

    def run(aux):
        coder = make("topk", d_in=32, d_sae=128, k=3)
        coder.enc.data[64:] *= 1e-3
        return train(coder, x, small("topk"), objective=functools.partial(topk_objective, aux=aux))[2]

    assert run(aux=0.0) >= 60 and run(aux=1 / 32) <= 8


def test_recovery_small():
    toy = sparse_mixture(64, 32, 3, seed=5)
    coder, losses, _ = train(make("topk", d_in=32, d_sae=128, k=3), toy.sample(100_000, seed=6)[0],
                             small("topk"))
    assert recovered(coder.W_dec.detach(), toy.directions) >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("kind", ["topk", "batchtopk", "relu_l1"])
def test_recovery(kind, seed):
    "512 features in 64 dimensions, 4 active, 1,024 latents, 1 M tokens in batches of 512."
    toy = sparse_mixture(512, 64, 4, "uniform", seed=seed)
    args = {} if kind == "relu_l1" else {"k": 4}
    coder, _, _ = train(make(kind, d_in=64, d_sae=1024, seed=seed, **args),
                        toy.sample(1_000_000, seed=100 + seed)[0], replace(coders[kind].meta["recipe"], batch=512))
    assert recovered(coder.W_dec.detach(), toy.directions, 0.9) >= 0.9
