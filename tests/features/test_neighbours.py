"Neighbours against dense numpy, with their intervals, nulls and what is left out."

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, fisher_exact
from sklearn.metrics.pairwise import cosine_similarity

from sae_lab.coders.contract import make
from sae_lab.features.index import FeatureIndex
from sae_lab.features.neighbours import (
    chance_cosine,
    cofiring_p,
    correlation_interval,
    cosines,
    nearest,
    neighbours,
)
from sae_lab.ground.errors import InputError, ShapeError

DOCS, EACH, D, D_SAE = 40, 25, 16, 50
N = DOCS * EACH


class Rows:
    "Activations of a corpus in its order."

    hooks, identity, n_tokens = ("toy",), {"name": "toy"}, N

    def __init__(self, x):
        self.x = x

    def batches(self, start=0):
        row, pos = torch.arange(DOCS).repeat_interleave(EACH), torch.arange(EACH).repeat(DOCS)
        yield SimpleNamespace(joined=lambda hooks: self.x, seq=row, pos=pos, token=row * 0)


def indexed(coder, x, folder):
    text = SimpleNamespace(
        ids=torch.zeros(DOCS, EACH).int(),
        doc=torch.arange(DOCS)[:, None].expand(DOCS, EACH).int(),
        documents=[f"d{i}" for i in range(DOCS)],
        provenance={"source": "toy"},
    )
    return FeatureIndex.build(coder, Rows(x), text, folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
    coder = make("topk", d_in=D, d_sae=D_SAE, k=4, seed=0)
    with torch.no_grad():
        coder.get_parameter("b_enc")[7] = -1e6
    index = indexed(coder, x, tmp_path_factory.mktemp("a") / "index")
    return coder, index, coder.encode(x).dense().detach().numpy().astype(float)


def test_cosines_are_those_of_sklearn(made):
    coder, index, _ = made
    for side, rows in (("decoder", coder.W_dec), ("encoder", coder.W_enc.T)):
        dense = cosine_similarity(rows.detach().numpy())
        np.fill_diagonal(dense, -2)
        for latent in range(D_SAE):
            found = nearest(coder, latent, side, n=6)
            np.testing.assert_allclose(found["value"], np.sort(dense[latent])[::-1][:6], atol=1e-6)
            assert latent not in set(found["latent"])
    assert float(cosines(torch.zeros(1, 4), torch.ones(1, 4))) == 0
    with pytest.raises(ShapeError, match="one hook"):
        cosines(torch.ones(2, 3), torch.ones(2, 4))


def test_every_table_is_the_dense_one(made):
    coder, index, dense = made
    fires = dense > 0
    with np.errstate(all="ignore"):
        pearson = np.nan_to_num(np.corrcoef(dense, rowvar=False))
    both = fires.T.astype(int) @ fires
    count = fires.sum(0)
    either = count[:, None] + count - both
    truth = {
        "correlation": pearson,
        "jaccard": both / np.maximum(either, 1),
        "given_a": both / np.maximum(count, 1)[:, None],
        "given_b": both / np.maximum(count, 1),
    }
    for latent in (0, 1, 20, 49):
        found = neighbours(coder, index, latent, n=5, least=10)
        assert found.n == N and found.count == count[latent] and found.compared == D_SAE - 1
        for name, matrix in truth.items():
            row = np.where((count >= 10) & (both[latent] > 0) & (matrix[latent] > 0), matrix[latent], -9)
            row[latent] = -9
            table = found.tables[name]
            best = np.sort(row)[::-1][:5]
            np.testing.assert_allclose(table["value"], best[best > -9], atol=1e-9)
            for each in table.itertuples():
                assert each.both == both[latent, each.latent] and each.low <= each.value <= each.high
                assert each.expected == pytest.approx(count[latent] * count[each.latent] / N)
                p = fisher_exact(
                    [
                        [each.both, count[latent] - each.both],
                        [count[each.latent] - each.both, N - count[latent] - count[each.latent] + each.both],
                    ],
                    alternative="greater",
                ).pvalue
                assert each.p == pytest.approx(min(1, p * (D_SAE - 1)), rel=1e-6)
                if name != "correlation":
                    low, high = binomtest(int(each.both), int(each.n)).proportion_ci(method="wilson")
                    assert (each.low, each.high) == pytest.approx((low, high), abs=1e-4)


def test_interval_of_a_correlation_covers(made):
    "Of intervals over documents, about 95 % hold the true correlation (documents drawn anew each time)."
    draw, inside = np.random.default_rng(0), 0
    for trial in range(200):
        z = draw.normal(size=(3, N))
        codes = np.stack([z[0] + z[2], z[1] + z[2]], 1)  # true r: 1/2
        index = SimpleNamespace(
            text=SimpleNamespace(doc=np.repeat(np.arange(DOCS), EACH)[None], seen=np.ones((1, N), bool)),
            activations=lambda at, codes=codes: (np.arange(N), codes[:, at]),
        )
        low, high = correlation_interval(index, 0, 1, seed=trial)
        inside += low <= 0.5 <= high
    assert 180 <= inside <= 199, inside


def test_chance_is_what_chance_gives():
    draw = torch.Generator().manual_seed(0)
    for d, m in ((2, 10), (16, 100), (128, 1000)):
        blind = [cosines(torch.randn(1, d, generator=draw), torch.randn(m, d, generator=draw)).max()
                 for _ in range(400)]
        assert (torch.stack(blind) > chance_cosine(d, m)).double().mean() == pytest.approx(0.05, abs=0.04)
    draw = np.random.default_rng(0)
    false = [
        cofiring_p(((draw.random(N) < 0.1) & (draw.random(N) < 0.2)).sum(), 100, 200, N, m=1) < 0.05 for _ in range(500)
    ]
    assert np.mean(false) < 0.12


def test_a_dead_latent_is_told(made):
    coder, index, dense = made
    found = neighbours(coder, index, 7)
    assert found.count == 0 and all(found.tables[name].empty for name in ("correlation", "given_a"))
    assert len(found.tables["decoder"]) == 10 and any("too little evidence" in why for why in found.left_out)
    assert found._repr_html_()
    assert 7 not in set(neighbours(coder, index, 0, n=50).tables["given_a"]["latent"])


def test_in_another_dictionary(made, tmp_path):
    coder, index, dense = made
    order = torch.randperm(D_SAE, generator=torch.Generator().manual_seed(1))
    other = make("topk", d_in=D, d_sae=D_SAE, k=4)
    with torch.no_grad():
        for mine, theirs in zip(coder.parameters(), other.parameters()):
            theirs.copy_(mine[order] if len(mine) == D_SAE else mine)
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
    others = indexed(other, x, tmp_path / "index")
    found = neighbours(coder, index, 3, n=3, among=(other, others))
    there = int((order == 3).nonzero())
    assert found.compared == D_SAE
    for name, table in found.tables.items():
        assert table["latent"][0] == there and table["value"][0] == pytest.approx(1, abs=1e-5), name


def test_coders_without_encoder_directions_say_so(made, tmp_path):
    coder, index, _ = made
    blind = SimpleNamespace(d_sae=D_SAE, W_dec=coder.W_dec)
    assert nearest(blind, 0, "encoder") is None
    with pytest.raises(ShapeError, match="its own index"):
        neighbours(make("topk", d_in=D, d_sae=8, k=2), index, 0)
    with pytest.raises(InputError, match="latent 50"):
        neighbours(coder, index, 50)
