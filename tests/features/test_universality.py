"Best correlations against dense numpy, and seeds of a network whose features are known by other means."

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_products import codes, memory

from sae_lab.coders.contract import make
from sae_lab.features.matching import moved
from sae_lab.features.universality import best_latent, channel_correlation, median_interval, universality
from sae_lab.ground.errors import InputError
from sae_lab.sources.stream import TensorSource
from sae_lab.training.fit import train

P, D_MLP = 113, 512
ROOT = Path(__file__).resolve().parents[2]
MODELS = Path(os.environ.get("SAE_LAB_DATA", ROOT.parent / "shared" / "data")) / "models" / "modular_addition_5_seeds"
KEYS = {0: {15, 18, 1, 8}, 1: {1, 30, 38, 49}, 2: {49, 3, 19, 44}, 3: {36, 38, 49}, 4: {19, 15, 7, 20, 36}}


def pearson(x, y):
    with np.errstate(all="ignore"):
        return np.nan_to_num(np.corrcoef(x.astype(float), y.astype(float), rowvar=False)[: x.shape[1], x.shape[1] :])


class Channels:
    "Dense channels over the tokens of an index in memory."

    hooks, identity, batch_size, n_batches = ("toy",), {"name": "toy"}, 90, 6

    def __init__(self, x, at=None):
        self.x, self.at = torch.from_numpy(x), np.arange(len(x)) if at is None else at
        self.widths, self.n_tokens = {"toy": x.shape[1]}, len(x)

    def norms(self):
        return {}

    def batches(self, start=0):
        for i in range(0, len(self.x), self.batch_size):
            x, at = self.x[i : i + self.batch_size], torch.from_numpy(self.at[i : i + self.batch_size])
            yield SimpleNamespace(joined=lambda hooks, x=x: x, seq=at * 0, pos=at, token=at)


def test_best_latent_is_the_dense_maximum():
    x, y = codes(0, signed=True), codes(1, d=70)
    latent, value = best_latent(memory(x), memory(y), least=10)
    r = np.where((y != 0).sum(0) >= 10, pearson(x, y), -9)
    np.testing.assert_allclose(value, r.max(1), atol=1e-9)
    assert np.array_equal(latent, r.argmax(1))
    none, nothing = best_latent(memory(x), memory(y), least=10_000)
    assert (none == -1).all() and np.isnan(nothing).all()


def test_channels_are_correlated_over_seen_tokens():
    x, dense = codes(0), np.random.default_rng(1).normal(size=(500, 9))
    dense[:, 3] = 1  # never varies
    np.testing.assert_allclose(channel_correlation(memory(x), Channels(dense)), pearson(x, dense), atol=1e-9)
    seen = np.random.default_rng(2).random(500) < 0.7
    x[~seen] = 0
    found = channel_correlation(memory(x, seen), Channels(dense[seen], np.flatnonzero(seen)))
    np.testing.assert_allclose(found, pearson(x[seen], dense[seen]), atol=1e-9)
    with pytest.raises(InputError, match="each token once"):
        channel_correlation(memory(x, seen), Channels(dense))
    with pytest.raises(InputError, match="other tokens"):
        channel_correlation(memory(x, ids=np.arange(500)[::-1][None]), Channels(dense))


def test_the_summary_is_the_dense_one():
    x = codes(0, n=800, d=60)
    g = np.random.default_rng(3)
    y = x[:, g.permutation(60)] * (g.random(x.shape) < 0.8)
    one, other, dense = memory(x), memory(y), g.normal(size=(800, 12))
    found = universality(one, {"seed": other, "channels": Channels(dense)}, least=20, level=0.6)
    asked, there = (x != 0).sum(0) >= 20, (y != 0).sum(0) >= 20
    truth = {
        "seed": pearson(x, y)[:, there],
        "channels": pearson(x, dense),
        "seed, tokens moved": pearson(x, moved(other).toarray())[:, there],
    }
    assert list(found.summary["against"]) == list(truth)
    for row in found.summary.to_dict("records"):
        best = truth[row["against"]].max(1)[asked]
        assert row["median"] == pytest.approx(np.median(best), abs=1e-6) and row["n"] == asked.sum()
        assert row["share"] == pytest.approx((best > 0.6).mean()) and row["low"] <= row["median"] <= row["high"]
        assert row["candidates"] == truth[row["against"]].shape[1]
        kept = found.best[row["against"]].dropna()
        np.testing.assert_allclose(kept, best, atol=1e-6)
    seed, _, blind = found.summary.to_dict("records")
    assert blind["high"] < 0.3 < 0.6 < seed["low"] and found._repr_html_()


def test_interval_of_a_median_covers():
    draw = np.random.default_rng(0)
    inside = [low <= 0 <= high for low, high in (median_interval(draw.normal(size=60), r=300) for _ in range(200))]
    assert 0.9 <= np.mean(inside) <= 0.99


def modular(seed):
    "MLP activations [113 * 113, 512] of one network on every pair, and its accuracy; plain torch."
    folder = next(MODELS.glob("lr-*" if seed == 0 else f"seed{seed}-*"))
    w = torch.load(folder / "model_epoch_60000.pt", map_location="cpu", weights_only=True)
    a, b = torch.arange(P).repeat_interleave(P), torch.arange(P).repeat(P)
    x = w["embed.W_E"][torch.stack([a, b, torch.full_like(a, P)], 1)] + w["pos_embed.W_pos"]
    weight = lambda name: w[f"blocks.0.{name}"]
    q = torch.einsum("nd,hde->nhe", x[:, 2], weight("attn.W_Q")) + weight("attn.b_Q")
    k, v = (
        torch.einsum("npd,hde->nphe", x, weight(f"attn.W_{c}")) + weight(f"attn.b_{c}") for c in "KV"
    )
    pattern = (torch.einsum("nhe,nphe->nhp", q, k) / 32**0.5).softmax(-1)
    z = torch.einsum("nhp,nphe->nhe", pattern, v)
    mid = x[:, 2] + torch.einsum("nhe,hed->nd", z, weight("attn.W_O")) + weight("attn.b_O")
    mlp = torch.relu(mid @ weight("mlp.W_in") + weight("mlp.b_in"))
    out = mid + mlp @ weight("mlp.W_out") + weight("mlp.b_out")
    logits = out @ w["unembed.W_U"] + w["unembed.b_U"]
    return mlp, float((logits.argmax(1) == (a + b) % P).double().mean())


def power(acts):
    "Power of each column at each frequency 1 to 56 of a, of b, of a + b and of a - b, [m, 56]; the constant left out."
    spectrum = torch.fft.fft2(acts.T.reshape(-1, P, P).double()).abs().square()
    f, g = torch.arange(1, 57), P - torch.arange(1, 57)
    zero = torch.zeros_like(f)
    pairs = [(f, zero), (g, zero), (zero, f), (zero, g), (f, f), (g, g), (f, g), (g, f)]
    return sum(spectrum[:, i, j] for i, j in pairs)


def dominant(found):
    "Share of the columns that vary in which each frequency is the strongest: frequency -> share."
    which = found[found.sum(1) > 0].argmax(1) + 1
    return {int(f): float((which == f).double().mean()) for f in which.unique()}


@pytest.mark.slow
@pytest.mark.skipif(not MODELS.is_dir(), reason=f"no networks in {MODELS}; set SAE_LAB_DATA")
@pytest.mark.parametrize("seed", sorted(KEYS))
def test_coders_find_the_key_frequencies_of_their_own_seed(seed):
    "Latents of a coder trained on one network's MLP carry that network's key frequencies, as its neurons do."
    mlp, accuracy = modular(seed)
    assert accuracy >= 0.999
    coder = make("topk", d_in=D_MLP, d_sae=128, k=16, seed=0)
    source = TensorSource(mlp, batch=512, seed=0, epochs=10)
    (coder,) = train(coder, source, progress=False, seed=0).values()
    with torch.no_grad():
        dense = coder.encode(mlp).dense()
    latents, neurons, keys = power(dense), power(mlp), KEYS[seed]
    shares = {name: dominant(columns) for name, columns in (("latents", latents), ("neurons", neurons))}
    own = {name: sum(share.get(f, 0) for f in keys) for name, share in shares.items()}
    others = sum(shares["latents"].get(f, 0) for f in set.union(*KEYS.values()) - keys)
    print(f"seed {seed}: latents {own['latents']:.2f}, neurons {own['neurons']:.2f}, other seeds' keys {others:.2f},",
          {f: round(share, 2) for f, share in shares["latents"].items() if share >= 0.05})
    for share in shares.values():  # every key is carried by at least 5 % of them; by chance it would be 1 in 56
        assert all(share.get(f, 0) >= 0.05 for f in keys), share
    assert own["latents"] > 0.6 and others < own["latents"] / 2
