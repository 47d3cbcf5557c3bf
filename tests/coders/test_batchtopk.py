"BatchTopK: published values, exact counts, the threshold of inference."
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_loop import small, train

from sae_lab.coders.batchtopk import batchtopk_objective, next_threshold
from sae_lab.coders.contract import Hints, make, randn
from sae_lab.ground.sparse import Codes
from sae_lab.ground.toy import recovered, sparse_mixture


DEAD = torch.zeros(3, dtype=torch.bool)


def identity(k, d=4):
    coder = make("batchtopk", d_in=d, d_sae=d, k=k)
    with torch.no_grad(): coder.enc.copy_(torch.eye(d)), coder.dec.copy_(torch.eye(d))
    return coder


def test_published_values(data):
    cases = json.loads((data / "interop" / "saelens_forward_values.json").read_text())["saelens_batchtopk"]["cases"]
    for case in cases:
        x = torch.tensor(case["x"], dtype=torch.float32)
        loss = batchtopk_objective(identity(case["k"]), x, x, Hints(torch.zeros(4, dtype=torch.bool), 0, 1))
        assert torch.equal(loss.codes.dense(), torch.tensor(case["out"], dtype=torch.float32))


@settings(max_examples=30, deadline=None)
@given(k=st.floats(0.01, 16), n=st.integers(1, 40), seed=st.integers(0, 99))
def test_exact_count(k, n, seed):
    coder, x = make("batchtopk", d_in=8, d_sae=16, k=k), randn(n, 8, seed=seed)
    loss = batchtopk_objective(coder, x, x, Hints(torch.zeros(16, dtype=torch.bool), 0, 1))
    positive = int(((x @ coder.W_enc) > 0).sum())
    assert int(loss.codes.counts().sum()) == min(round(k * n), positive)


def test_threshold_is_a_mean_then_an_average():
    threshold, least = torch.zeros(3), [2.0, 4.0, 9.0]
    for step, value in enumerate(least):
        codes = Codes.from_dense(torch.tensor([[value, value + 1, 0.0]]))
        threshold = next_threshold(threshold, codes, Hints(DEAD, step, 1000))
    assert torch.allclose(threshold, torch.full((3,), 5.0))
    late = next_threshold(threshold, codes, Hints(DEAD, 900, 1000))
    assert torch.allclose(late, torch.full((3,), 5.0 + 4.0 / 50))
    silent = Codes.from_dense(torch.zeros(2, 3))
    assert torch.equal(next_threshold(threshold, silent, Hints(DEAD, 900, 1000)), threshold)


@pytest.mark.parametrize("k", [3, 2.5])
def test_inference_fires_as_often_as_training(k):
    toy = sparse_mixture(64, 32, 3, seed=5)
    coder, _, _ = train(make("batchtopk", d_in=32, d_sae=128, k=k), toy.sample(100_000, seed=6)[0], small("batchtopk"))
    fresh = toy.sample(20_000, seed=7)[0]
    assert float(coder.encode(fresh).l0().mean()) == pytest.approx(k, rel=0.05)
    assert recovered(coder.W_dec.detach(), toy.directions) >= (0.9 if k == 3 else 0.8)
