"Sums of products against dense numpy, in all shapes of input, and what is refused."

import numpy as np
import pytest
from scipy.sparse import csc_array, random_array
from sklearn.metrics import jaccard_score

from sae_lab.features.index import FeatureIndex
from sae_lab.features.products import (
    EVIDENCE,
    blocks,
    by_column,
    by_token,
    correlation,
    cross,
    expected,
    given_a,
    given_b,
    jaccard,
    margins,
    one_to_all,
    same_tokens,
    sweep,
)
from sae_lab.ground.errors import InputError, ShapeError, UnknownName


def memory(dense, seen=None, ids=None):
    "An index in memory from dense codes [tokens, latents]."
    from types import SimpleNamespace

    n, stored = len(dense), csc_array(dense.astype(np.float32))
    seen = np.ones((1, n), bool) if seen is None else seen[None]
    wide = np.abs(stored.toarray()).astype(float)
    raw = {
        "count": np.diff(stored.indptr).astype(np.int64),
        "total": wide.sum(0),
        "square": (wide**2).sum(0),
        "negative": (stored.toarray() < 0).sum(0),
    }
    text = SimpleNamespace(ids=np.arange(n)[None] if ids is None else ids, seen=seen)
    facts = {"tokens": int(seen.sum()), "shape": [1, n], "hash": str(wide.sum())}
    return FeatureIndex("memory", facts, stored.indptr, stored.indices, stored.data, text, raw)


def codes(seed, n=500, d=25, signed=False, density=0.15):
    g = np.random.default_rng(seed)
    x = random_array((n, d), density=density, rng=g, dtype=np.float32).toarray()
    x[:, 0], x[:, 1] = 0, 0  # dead, and one that fires once
    x[7, 1] = 0.5
    x[:, 2] = np.abs(g.normal(size=n)) + 0.1  # always on
    return x * (g.choice([-1, 1], x.shape) if signed else 1)


@pytest.mark.parametrize("signed", [False, True])
def test_sums_and_shares_are_the_dense_ones(signed):
    a, b = codes(0, signed=signed), codes(1, d=31, signed=signed)
    one, two = memory(a), memory(b)
    sums = cross(by_column(one), by_token(two), len(a))
    fa, fb = a != 0, b != 0
    assert np.array_equal(sums.both, fa.T.astype(int) @ fb)
    np.testing.assert_allclose(sums.product, a.T.astype(float) @ b, atol=1e-9)
    np.testing.assert_allclose(sums.total_a, a.sum(0, dtype=float))
    np.testing.assert_allclose(sums.square_b, (b.astype(float) ** 2).sum(0))
    with np.errstate(all="ignore"):
        dense = np.nan_to_num(np.corrcoef(a.astype(float), b, rowvar=False)[: a.shape[1], a.shape[1] :])
    np.testing.assert_allclose(correlation(sums), dense, atol=1e-9)
    for i in range(a.shape[1]):
        for j in range(b.shape[1]):
            assert jaccard(sums)[i, j] == jaccard_score(fa[:, i], fb[:, j], zero_division=0)
            assert given_a(sums)[i, j] == (fb[fa[:, i], j].mean() if fa[:, i].any() else 0)
            assert given_b(sums)[i, j] == (fa[fb[:, j], i].mean() if fb[:, j].any() else 0)
            assert expected(sums)[i, j] == pytest.approx(fa[:, i].mean() * fb[:, j].mean() * len(a))


def test_margins_of_every_form():
    for signed in (False, True):
        x = codes(3, signed=signed)
        for form in (memory(x), by_token(memory(x)), by_column(memory(x))):
            found = margins(form)
            assert np.array_equal(found.count, (x != 0).sum(0))
            np.testing.assert_allclose(found.total, x.sum(0, dtype=float))
            np.testing.assert_allclose(found.square, (x.astype(float) ** 2).sum(0))


@pytest.mark.parametrize("entries", [1, 13, 10**6])
def test_pieces_do_not_matter(entries, monkeypatch):
    a, b = memory(codes(0)), memory(codes(1))
    whole = cross(by_column(a), by_token(b), 500)
    monkeypatch.setattr("sae_lab.features.products._ENTRIES", entries)
    again = cross(by_column(a), by_token(b), 500)
    assert np.array_equal(whole.both, again.both)
    np.testing.assert_allclose(whole.product, again.product)
    np.testing.assert_allclose(whole.square_b, again.square_b)
    for other in (b, by_token(b)):
        assert np.array_equal(one_to_all(a, 2, other)["both"], whole.both[2])


def test_one_to_all_is_a_row_of_the_sums():
    a, b = memory(codes(0, signed=True)), memory(codes(1, d=40))
    sums = cross(by_column(a), by_token(b), 500)
    for latent in range(25):
        for other in (b, by_token(b)):
            found = one_to_all(a, latent, other)
            for name, fn in EVIDENCE.items():
                np.testing.assert_allclose(found[name], fn(sums)[latent], atol=1e-12)


@pytest.mark.parametrize("block", [1, 9, 1000])
def test_sweep_is_the_sorted_dense_matrix(block):
    a, b = memory(codes(0)), memory(codes(1, d=40))
    sums = cross(by_column(a), by_token(b), 500)
    done = []
    swept = sweep(a, b, top=6, least=5, block=block, progress=lambda at, of: done.append((at, of)))
    enough = sums.count_b >= 5
    for name, fn in EVIDENCE.items():
        score = np.where(enough, fn(sums), -np.inf)
        for latent in range(25):
            best = swept.best[name]
            if sums.count_a[latent] == 0:
                assert (best.latent[latent] == -1).all() and np.isnan(best.value[latent]).all()
                continue
            np.testing.assert_allclose(best.value[latent], np.sort(score[latent])[::-1][:6], rtol=1e-6, atol=1e-7)
            assert np.array_equal(best.both[latent], sums.both[latent, best.latent[latent]])
    assert done[-1] == (25, 25)
    frame = swept.frame("given_a")
    assert (frame["value"] - frame["both"] / frame["count_a"]).abs().max() < 1e-6


def test_a_latent_is_not_its_own_neighbour():
    a = memory(codes(0))
    best = sweep(a, a, top=25, evidence=("correlation",)).best["correlation"]
    for latent in range(1, 25):
        assert latent not in best.latent[latent]
    assert (best.latent[1] >= 0).sum() == 23  # all but itself and the dead one


def test_blocks_cover_everything_once():
    a, b = memory(codes(0)), memory(codes(1))
    parts = list(blocks(a, b, 10))
    assert [first for first, _ in parts] == [0, 10, 20]
    whole = cross(by_column(a), by_token(b), 500)
    assert np.array_equal(np.concatenate([s.both for _, s in parts]), whole.both)


def test_unseen_tokens_are_not_counted():
    x = codes(0)
    seen = np.ones(500, bool)
    seen[::5] = False
    x[::5] = 0
    index = memory(x, seen)
    found = one_to_all(index, 2, index)["correlation"]
    with np.errstate(all="ignore"):
        dense = np.nan_to_num(np.corrcoef(x[seen].astype(float), rowvar=False)[2])
    np.testing.assert_allclose(found, dense, atol=1e-9)


def test_other_tokens_are_refused():
    a = memory(codes(0))
    with pytest.raises(InputError, match="one text"):
        same_tokens(a, memory(codes(0, n=300)))
    with pytest.raises(InputError, match="one text"):
        sweep(a, memory(codes(1), ids=np.arange(500)[::-1][None]))
    with pytest.raises(ShapeError, match="same tokens"):
        cross(by_column(a), by_token(memory(codes(0, n=300))), 500)
    with pytest.raises(UnknownName, match="evidence"):
        sweep(a, a, evidence=("cosine",))
    with pytest.raises(InputError, match="latent 25"):
        one_to_all(a, 25, a)
