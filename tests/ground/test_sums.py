"Sums add up in any order and any batching, and their intervals are what the references say."
import math
from functools import reduce
from operator import add

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from sae_lab.ground.errors import InputError, ShapeError
from sae_lab.ground.sums import (
    Histogram, Measure, Moments, Quantiles, Totals, bootstrap_mean, log_edges, poisson_weights, uniform, wilson,
)

quick = settings(deadline=None, max_examples=60)
seeds = st.integers(0, 2**31)


@st.composite
def cuts(draw, least=1, most=60):
    "Data, and an order and a cut of its rows into batches, some of them empty."
    n = draw(st.integers(least, most))
    seed = draw(seeds)
    draws = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=draws) * 10 ** draw(st.integers(-3, 3)) + draw(st.floats(-100, 100))
    points = sorted(draw(st.lists(st.integers(0, n), max_size=5)))
    batches = torch.randperm(n, generator=draws).tensor_split(points)
    return x, batches


def close(a, b, rtol=1e-9):
    scale = max(1.0, float(b.abs().max())) if b.numel() else 1.0
    return torch.allclose(a, b, rtol=rtol, atol=rtol * scale)


@quick
@given(cuts())
def test_moments_equal_numpy_in_any_order(case):
    x, batches = case
    total = reduce(add, [Moments.of(x[rows]) for rows in batches])
    exact = x.double().numpy()
    assert total.count == len(x)
    assert close(total.mean, torch.tensor(exact.mean(0)))
    assert np.allclose(total.var, exact.var(0), rtol=1e-6, atol=1e-12 * max(1, np.abs(exact).max()) ** 2)
    assert np.array_equal(total.min, exact.min(0)) and np.array_equal(total.max, exact.max(0))


@quick
@given(cuts(least=3))
def test_moments_are_associative(case):
    a, b, c = (Moments.of(part) for part in case[0].tensor_split(3))
    left, right, turned = (a + b) + c, a + (b + c), c + (b + a)
    for other in (right, turned):
        assert close(left.mean, other.mean) and close(left.m2, other.m2) and left.count == other.count


def test_moments_do_not_cancel():
    x = (torch.randn(10_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1e8)
    total = reduce(add, [Moments.of(part) for part in x.split(7)])
    assert abs(float(total.var) / float(x.var(correction=0)) - 1) < 1e-6


def test_moments_of_nothing():
    nothing = Moments.of(torch.empty(0, 2))
    assert nothing.count == 0 and bool(nothing.var.isnan().all())
    assert torch.equal((nothing + Moments.of(torch.ones(3, 2))).mean, torch.ones(2).double())


@quick
@given(cuts(), st.integers(1, 12))
def test_histograms_equal_numpy_in_any_order(case, bins):
    x, batches = case
    edges = torch.linspace(-5, 5, bins + 1)
    x[0, 0], x[0, 1], x[0, 2] = edges[-1], math.nan, math.inf
    total = reduce(add, [Histogram.of(x[rows], edges) for rows in batches])
    flat = x.double().numpy().ravel()
    assert total.counts.tolist() == np.histogram(flat[np.isfinite(flat)], edges.double().numpy())[0].tolist()
    assert total.total == x.numel() and total.nan == 1 and total.over >= 1


@pytest.mark.parametrize("edges", [[1.0], [1.0, 1.0], [2.0, 1.0], [0.0, math.nan]])
def test_histograms_refuse_bad_edges(edges):
    with pytest.raises(InputError): Histogram.of(torch.zeros(3), torch.tensor(edges))
    with pytest.raises(InputError): log_edges(0.0, 1.0)


def test_histograms_with_other_edges_do_not_add():
    x = torch.zeros(3)
    with pytest.raises(InputError):
        Histogram.of(x, torch.tensor([0.0, 1.0])) + Histogram.of(x, torch.tensor([0.0, 2.0]))


@quick
@given(cuts(most=200), st.integers(1, 50), seeds)
def test_quantile_sample_does_not_depend_on_batching(case, m, seed):
    x, batches = case[0][:, 0], case[1]
    keys = torch.arange(len(x))
    whole = Quantiles.of(x, keys, seed, m)
    parts = reduce(add, [Quantiles.of(x[rows], keys[rows], seed, m) for rows in batches])
    assert torch.equal(whole.values, parts.values) and parts.count == len(x)
    assert len(whole.values) == min(m, len(x))


def test_quantile_error_bound_holds():
    n, m, bad = 20_000, 512, 0
    x = torch.arange(n).float()
    for seed in range(40):
        sketch = Quantiles.of(x, torch.arange(n), seed, m)
        ranks = np.arange(1, 100) / 100
        worst = np.abs(np.array(sketch.quantile(ranks.tolist())) / n - ranks).max()
        bad += worst > sketch.error
    assert bad <= 6  # 2 expected at 95 %; more than 6 has probability below 0.4 %


def test_small_samples_give_exact_quantiles():
    x = torch.randn(100)
    sketch = Quantiles.of(x, torch.arange(100))
    assert sketch.error == 0 and sketch.quantile(0.5) == float(np.quantile(x.double(), 0.5))
    assert math.isnan(Quantiles.of(x[:0], torch.arange(0)).quantile(0.5))


@quick
@given(seeds, st.integers(-2**62, 2**62))
def test_uniforms_belong_to_their_key(seed, start):
    keys = start + torch.arange(50)
    whole = uniform(keys, seed, 3)
    assert torch.equal(whole[10:20], uniform(keys[10:20], seed, 3))
    assert torch.equal(whole[:, :2], uniform(keys, seed, 2))
    assert bool(((whole > 0) & (whole < 1)).all())


def test_uniforms_are_uniform_and_independent():
    u = uniform(torch.arange(100_000), seed=3, r=2).numpy()
    assert scipy.stats.kstest(u[:, 0], "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(u[:, 0], u[:, 1])[0, 1]) < 0.01
    assert abs(np.corrcoef(u[1:, 0], u[:-1, 0])[0, 1]) < 0.01
    other = uniform(torch.arange(100_000), seed=4).numpy()[:, 0]
    assert abs(np.corrcoef(u[:, 0], other)[0, 1]) < 0.01


def test_weights_are_poisson():
    weights = poisson_weights(torch.arange(5000)).numpy().ravel()
    found = np.bincount(weights.astype(int), minlength=8)[:8] / len(weights)
    assert np.abs(found - scipy.stats.poisson.pmf(np.arange(8), 1)).max() < 0.002


@st.composite
def documents(draw):
    x, batches = draw(cuts(least=2, most=80))
    doc = torch.randint(0, draw(st.integers(2, 12)), (len(x),), generator=torch.Generator().manual_seed(draw(seeds)))
    return {"x": x[:, 0], "vector": x}, doc, batches


@quick
@given(documents(), seeds)
def test_totals_do_not_depend_on_batching(case, seed):
    stats, doc, batches = case
    whole = Totals.of(stats, doc, seed, r=20)
    parts = [Totals.of({k: v[rows] for k, v in stats.items()}, doc[rows], seed, r=20) for rows in batches]
    for order in (parts, parts[::-1]):
        total = reduce(add, order)
        assert close(total.totals, whole.totals) and close(total.boot, whole.boot)
        assert (total.count, total.docs) == (whole.count, whole.docs) == (len(doc), len(doc.unique()))


@quick
@given(documents(), seeds)
def test_totals_equal_a_naive_bootstrap(case, seed):
    stats, doc, _ = case
    total = Totals.of(stats, doc, seed, r=7)
    weights = poisson_weights(doc, seed, 7).numpy()
    x = stats["x"].double().numpy()
    assert np.allclose(total["x"], x.sum(), rtol=1e-9, atol=1e-9)
    assert np.allclose(total.boot[:, 0], weights.T @ x, rtol=1e-9, atol=1e-9 * max(1, np.abs(x).max()))
    assert np.allclose(total["vector"], stats["vector"].double().sum(0), rtol=1e-9, atol=1e-9)


def test_interval_of_a_mean_equals_scipy():
    draws = np.random.default_rng(0)
    per_doc = draws.normal(2.0, 1.0, 300)
    total = Totals.of({"x": torch.tensor(per_doc), "n": torch.ones(300)}, torch.arange(300), r=2000)
    ours = total.measure("mean", lambda t: t["x"] / t["n"], "-", "neither")
    theirs = scipy.stats.bootstrap((per_doc,), np.mean, n_resamples=2000, method="percentile", random_state=0)
    width = theirs.confidence_interval.high - theirs.confidence_interval.low
    assert ours.value == pytest.approx(per_doc.mean())
    assert abs(ours.low - theirs.confidence_interval.low) < 0.1 * width
    assert abs(ours.high - theirs.confidence_interval.high) < 0.1 * width


def test_interval_is_over_documents_not_tokens():
    draws = torch.Generator().manual_seed(0)
    level = torch.randn(50, generator=draws)
    x, doc = level.repeat_interleave(100), torch.arange(50).repeat_interleave(100)
    total = Totals.of({"x": x, "n": torch.ones(5000)}, doc, r=1000)
    found = total.measure("m", lambda t: t["x"] / t["n"], "-", "neither")
    by_documents = 2 * 1.96 * float(level.std()) / math.sqrt(50)
    assert (found.high - found.low) / by_documents == pytest.approx(1, abs=0.15)


def test_intervals_cover():
    inside = 0
    for seed in range(200):
        x = torch.randn(60, generator=torch.Generator().manual_seed(seed))
        found = Totals.of({"x": x, "n": torch.ones(60)}, torch.arange(60), seed=seed)
        measure = found.measure("m", lambda t: t["x"] / t["n"], "-", "neither")
        inside += measure.low <= 0 <= measure.high
    assert 0.88 <= inside / 200 <= 0.99


def test_totals_refuse_what_does_not_fit():
    x, doc = torch.ones(4), torch.arange(4)
    total = Totals.of({"x": x}, doc)
    for other in (Totals.of({"y": x}, doc), Totals.of({"x": x}, doc, seed=1), Totals.of({"x": x}, doc, r=5)):
        with pytest.raises(InputError): total + other
    with pytest.raises((ShapeError, TypeCheckError)): Totals.of({"x": x[:3]}, doc)
    with pytest.raises(ShapeError): Totals.of({}, doc)
    with pytest.raises(InputError): Totals.of({"x": x}, doc - 1)


def test_a_ratio_without_denominator_is_nan():
    total = Totals.of({"x": torch.zeros(4), "n": torch.zeros(4)}, torch.arange(4))
    measure = total.measure("m", lambda t: t["x"] / t["n"], "-", "higher")
    assert math.isnan(measure.value) and math.isnan(measure.low) and measure.to_dict()["value"] is None


@quick
@given(st.integers(0, 500), st.integers(1, 500))
def test_wilson_equals_scipy(successes, n):
    successes = min(successes, n)
    z = scipy.stats.norm.ppf(0.975)
    theirs = scipy.stats.binomtest(successes, n).proportion_ci(0.95, method="wilson")
    assert np.allclose(wilson(successes, n, z), (theirs.low, theirs.high), atol=1e-9)


@pytest.mark.parametrize("successes, n", [(-1, 3), (4, 3), (0, -1)])
def test_wilson_refuses_nonsense(successes, n):
    with pytest.raises(InputError): wilson(successes, n)


def test_bootstrap_mean_equals_scipy():
    x = np.random.default_rng(1).exponential(1.0, 200)
    low, high = bootstrap_mean(x.tolist())
    theirs = scipy.stats.bootstrap((x,), np.mean, method="percentile", random_state=0).confidence_interval
    assert abs(low - theirs.low) < 0.03 and abs(high - theirs.high) < 0.03
    assert bootstrap_mean(x.tolist()) == (low, high) and all(map(math.isnan, bootstrap_mean([1.0])))


def test_measures_are_checked_and_escaped():
    with pytest.raises(InputError): Measure("m", 1.0, 1.0, 1.0, "-", "more", 1)
    assert "<script>" not in Measure("<script>", 1.0, 1.0, 1.0, "-", "higher", 1)._repr_html_()
