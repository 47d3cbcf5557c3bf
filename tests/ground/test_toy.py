"Toy data is what it says: sums of known directions, as often, as together and as nested as chosen."
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from scipy.optimize import linear_sum_assignment

from sae_lab.ground.errors import InputError, ShapeError
from sae_lab.ground.toy import (
    dimensionality, feature_probabilities, grouped, match, recovered, sparse_mixture, superposition,
)

quick = settings(deadline=None, max_examples=15)


@quick
@given(st.integers(5, 40), st.integers(2, 16), st.integers(1, 4), st.integers(0, 9), st.booleans())
def test_rows_are_sums_of_their_features(m, d, active, seed, zipf):
    toy = sparse_mixture(m, d, active, "zipf" if zipf else "uniform", seed=seed)
    x, codes = toy.sample(200, seed)
    z = codes.dense()
    assert torch.allclose(z @ toy.directions, x, atol=1e-5)
    assert bool((codes.l0() == active).all())
    assert float(z[z > 0].min()) >= 0.5 and float(z.max()) <= 1.5
    assert torch.allclose(toy.directions.norm(dim=1), torch.ones(m), atol=1e-5)


def test_samples_are_pure_and_nested():
    toy = sparse_mixture(64, 16, 3, noise=0.1)
    long, short = toy.sample(9000, seed=4), toy.sample(5000, seed=4)
    assert torch.equal(long[0][:5000], short[0]) and torch.equal(long[1].dense()[:5000], short[1].dense())
    assert not torch.equal(toy.sample(10, seed=5)[0], short[0][:10])
    assert toy.sample(0)[0].shape == (0, 16)


def test_noise_has_its_size():
    toy = sparse_mixture(64, 16, 3, noise=0.1)
    x, codes = toy.sample(20_000)
    assert float((x - codes.dense() @ toy.directions).std()) == pytest.approx(0.1, rel=0.02)


def test_uniform_frequencies_are_uniform():
    counts = sparse_mixture().sample(60_000)[1].counts()
    expected = 60_000 * 4 / 512
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    assert chi2 < 512 + 5 * np.sqrt(2 * 512)


def test_chosen_frequencies_come_out():
    relative = torch.tensor([8.0, 4.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    toy = sparse_mixture(10, 4, 2, relative)
    found = toy.sample(50_000)[1].counts() / 50_000
    assert torch.allclose(found, toy.probabilities, rtol=0.05)
    assert float(found[0] / found[2]) == pytest.approx(4, rel=0.1)


def test_capped_frequencies_still_sum():
    p = feature_probabilities(torch.tensor([100.0, 1.0, 1.0, 1.0]), 4, 2)
    assert float(p.sum()) == pytest.approx(2, abs=1e-4) and float(p.max()) <= 0.95 + 1e-6


def test_correlated_features_go_together():
    def pairs(correlation):
        on = sparse_mixture(40, 16, 4, correlation=correlation).sample(20_000)[1].dense() > 0
        return np.corrcoef(on.numpy().T)
    tied, free = pairs(grouped(40, 4, 0.8)), pairs(None)
    assert tied[0, 1] > 0.3 and abs(free[0, 1]) < 0.15 and tied[0, 5] < 0.05


def test_children_bring_their_ancestors():
    parent = torch.tensor([-1, -1, 0, 0, 2, 4])
    x, codes = sparse_mixture(6, 4, 2, hierarchy=parent).sample(5000)
    on = codes.dense() > 0
    for child, above in enumerate(parent.tolist()):
        if above >= 0: assert bool((~on[:, child] | on[:, above]).all())
    assert codes.l0().max() > 2 and bool((codes.l0() >= 2).all())


@pytest.mark.parametrize("change", [dict(frequencies="often"), dict(frequencies=torch.ones(3)), dict(active=10),
                                    dict(hierarchy=torch.arange(10)), dict(frequencies=torch.zeros(10)),
                                    dict(correlation=torch.ones(10, 10))])
def test_nonsense_is_refused(change):
    with pytest.raises(InputError): sparse_mixture(**{"n_features": 10, "d": 4, "active": 2, **change})


@quick
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 99))
def test_matching_is_one_to_one_and_best(m, d_sae, seed):
    draws = torch.Generator().manual_seed(seed)
    true, W = torch.randn(m, 5, generator=draws), torch.randn(d_sae, 5, generator=draws)
    latent, cosine = match(W, true)
    used = latent[latent >= 0]
    assert len(used) == len(used.unique()) == min(m, d_sae)
    grid = torch.nn.functional.cosine_similarity(true[:, None], W[None], dim=2).numpy()
    assert float(cosine.sum()) == pytest.approx(grid[linear_sum_assignment(-grid)].sum(), abs=1e-4)
    assert torch.equal(match(W * 7, true)[0], latent)


def test_recovered_counts_each_feature_once():
    true = torch.eye(8)
    assert recovered(true[:4].repeat(5, 1), true) == 0.5
    assert recovered(-true, true) == 0.0
    assert recovered(torch.zeros(3, 8), true) == 0.0
    with pytest.raises((ShapeError, TypeCheckError)): recovered(torch.zeros(3, 7), true)


def test_dimensionality_of_known_shapes():
    turn = 2 * torch.pi * torch.arange(5) / 5
    pentagon = torch.stack([turn.cos(), turn.sin()])
    assert torch.allclose(dimensionality(pentagon), torch.full((5,), 0.4), atol=1e-5)
    tetrahedron = torch.tensor([[1.0, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]])
    assert torch.allclose(dimensionality(3 * tetrahedron), torch.full((4,), 0.75), atol=1e-5)


def test_superposition_reads_back_what_it_stores():
    alone = superposition(n_features=2, d=2, sparsity=0.5, steps=800)
    x = torch.rand(100, 2)
    assert float((alone(x) - x).abs().mean()) < 0.05 and alone.loss < 0.01
