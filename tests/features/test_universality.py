"Best correlations against dense numpy, and seeds of a network whose features are known by other means."

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from modular import D_MLP, KEYS, MODELS, A, B, P, forward, power, weights
from test_products import codes, memory

from sae_lab.coders.contract import make
from sae_lab.features.matching import moved
from sae_lab.features.universality import best_latent, channel_correlation, median_interval, universality
from sae_lab.ground.errors import InputError
from sae_lab.sources.stream import TensorSource
from sae_lab.training.fit import train


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


def dominant(found):
    "Share of the columns that vary in which each frequency is the strongest: frequency -> share."
    which = found[found.sum(1) > 0].argmax(1) + 1
    return {int(f): float((which == f).double().mean()) for f in which.unique()}


@pytest.mark.slow
@pytest.mark.skipif(not MODELS.is_dir(), reason=f"no networks in {MODELS}; set SAE_LAB_DATA")
@pytest.mark.parametrize("seed", sorted(KEYS))
def test_coders_find_the_key_frequencies_of_their_own_seed(seed):
    "Latents of a coder trained on one network's MLP carry that network's key frequencies, as its neurons do."
    mlp, logits = forward(weights(seed))
    assert (logits.argmax(1) == (A + B) % P).double().mean() >= 0.999
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
