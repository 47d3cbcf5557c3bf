"Matching against brute force and planted copies; pruning, nulls, intervals, and what is refused."

from itertools import permutations

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from scipy.stats import pearsonr
from test_products import codes, memory

from sae_lab.coders.contract import make
from sae_lab.features.matching import assign, assign_few, likeness, match, moved, pruned, shared
from sae_lab.features.products import by_token
from sae_lab.ground.errors import InputError, ShapeError, UnknownName


def two(d=24, d_a=40, d_b=50, copied=25, noise=0.05):
    "Two dictionaries, some latents of one copied into the other with noise, and where they went."
    a, b = make("topk", d_in=d, d_sae=d_a, k=3, seed=0), make("topk", d_in=d, d_sae=d_b, k=3, seed=1)
    g = torch.Generator().manual_seed(2)
    where = torch.randperm(d_b, generator=g)[:copied]
    with torch.no_grad():
        for mine, theirs in ((a.enc, b.enc), (a.dec, b.dec)):
            theirs[where] = mine[:copied] + noise * mine[:copied].norm(dim=1, keepdim=True) * torch.randn(
                copied, d, generator=g
            )
    return a, b, where.tolist()


@pytest.mark.parametrize("shape", [(5, 5), (4, 6), (6, 4)])
def test_assignment_is_the_best_of_all(shape):
    value = np.random.default_rng(0).normal(size=shape)
    wide = value if shape[0] <= shape[1] else value.T
    brute = max(
        sum(wide[i, j] for i, j in enumerate(choice)) for choice in permutations(range(wide.shape[1]), wide.shape[0])
    )
    row, column = assign(value)
    assert value[row, column].sum() == pytest.approx(brute)


@pytest.mark.parametrize("seed", range(5))
def test_sparse_assignment_is_the_dense_one(seed):
    g = np.random.default_rng(seed)
    value = g.random((70, 55)) ** 3
    few, dropped = pruned([(0, value[:30]), (30, value[30:])], 0.2, 55)
    assert dropped == 0 and np.array_equal(few.toarray() > 0, value > 0.2)
    row, column = assign_few(few, 0.2)
    assert len({*row}) == len(row) == len({*column}) and (np.diff(row) > 0).all()
    above = np.maximum(value - 0.2, 0)
    best = above[linear_sum_assignment(above, maximize=True)].sum()
    assert (value[row, column] - 0.2).sum() == pytest.approx(best)


def test_nothing_above_the_floor():
    few, dropped = pruned([(0, np.full((6, 4), 0.1))], 0.2, 3)
    row, column = assign_few(few, 0.2)
    assert len(row) == len(column) == dropped == 0
    alone = match(*two()[:2], floor=1.5, exact=0)
    assert len(alone.pairs) == 0 and np.isnan(alone.likeness.value) and alone._repr_html_()


@pytest.mark.parametrize("by", ["decoder", "encoder"])
@pytest.mark.parametrize("exact", [0, 2**24])
def test_copies_are_found(by, exact):
    a, b, where = two()
    found = match(a, b, by, exact=exact)
    to = dict(zip(found.pairs["a"], found.pairs["b"]))
    assert [to.get(i) for i in range(25)] == where
    rows = (a.W_dec.detach(), b.W_dec.detach()) if by == "decoder" else (a.W_enc.T.detach(), b.W_enc.T.detach())
    for each in found.pairs.itertuples():
        dense = torch.nn.functional.cosine_similarity(rows[0][each.a], rows[1][each.b], dim=0)
        assert each.value == pytest.approx(float(dense), abs=1e-5)
    m = found.likeness
    assert m.low < m.value < m.high and m.null < m.value and m.count == len(found.pairs)


def test_correlations_match_latents_that_fire_alike():
    x = codes(0, n=600, d=30)
    order = np.random.default_rng(1).permutation(30)
    y = x[:, order] * np.random.default_rng(2).uniform(0.5, 1, x.shape)
    a, b = memory(x), memory(y)
    found = match(a, b, "correlation")
    to = dict(zip(found.pairs["a"], found.pairs["b"]))
    assert all(order[to[i]] == i for i in range(3, 30))
    for each in found.pairs[found.pairs["value"] != 0].itertuples():
        assert each.value == pytest.approx(pearsonr(x[:, each.a], y[:, each.b])[0], abs=1e-5)
    assert found.likeness.null < 0.3 < 0.8 < found.likeness.value


def test_moved_keeps_columns_and_unseen_rows():
    x = codes(0)
    seen = np.random.default_rng(0).random(500) < 0.8
    x[~seen] = 0
    index = memory(x, seen)
    for by in (None, 7):
        y = moved(index, by).toarray()
        assert not y[~seen].any() and np.array_equal(y[seen], np.roll(x[seen], by or seen.sum() // 2, 0))
    assert moved(index, 0).toarray().tolist() == by_token(index).toarray().tolist()


def test_shared_counts_copies_and_nothing_else():
    a, b, where = two(d=64)
    found = shared(a, b)
    true = found.pairs[found.pairs["shared"]]
    assert dict(zip(true["a"], true["b"])) == dict(enumerate(where))
    assert found.share.value == 25 / 40 and found.share.low < 25 / 40 < found.share.high and found.share.null == 0
    assert shared(a, b, exact=0).share.value == 25 / 40
    assert shared(a, a).share.value == 1
    assert shared(a, b, cosine=0.9999).share.value == 0


def test_a_half_that_disagrees_is_not_shared():
    a, b, where = two(d=64)
    with torch.no_grad():
        b.enc[where[0]] *= -1  # written alike, read otherwise
    found = shared(a, b)
    assert 0 not in set(found.pairs.loc[found.pairs["shared"], "a"]) and found.share.value == 24 / 40


def test_wrong_calls_are_refused():
    a, b, _ = two()
    with pytest.raises(UnknownName, match="likeness"):
        match(a, b, "sound")
    with pytest.raises(InputError, match="indexes for correlations"):
        match(a, b, "correlation")
    with pytest.raises(InputError, match="coders for cosines"):
        likeness(memory(codes(0)), memory(codes(0)))
    with pytest.raises(ShapeError, match="one hook"):
        match(a, make("topk", d_in=8, d_sae=9, k=2))
    with pytest.raises(ShapeError, match="one hook"):
        shared(a, make("topk", d_in=8, d_sae=9, k=2))
