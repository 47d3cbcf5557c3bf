"Counters of dead latents against a naive replay."
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_lab.training.dead import Firing
from sae_lab.training.events import DENSITY_EDGES, activation_histogram, density_histogram


@given(st.lists(st.tuples(st.integers(1, 60), st.integers(0, 2**6 - 1)), min_size=1, max_size=40), st.integers(1, 150))
@settings(max_examples=60, deadline=None)
def test_counters_equal_a_replay(batches, window):
    "Tokens since each latent fired, dead or not, and counts over the last one to two windows."
    firing, since, history = Firing(6, window), [0] * 6, []
    for n, bits in batches:
        counts = [min(n, 1 + j) if bits >> j & 1 else 0 for j in range(6)]
        firing.update(torch.tensor(counts), n)
        since = [0 if c else s + n for c, s in zip(counts, since)]
        history.append((n, counts))
    assert firing.since.tolist() == since
    assert firing.dead.tolist() == [s >= window for s in since]
    covered, recent = 0, []
    while covered < firing.tokens: recent.append(history.pop()); covered += recent[-1][0]
    assert covered == firing.tokens and firing.counts.tolist() == [sum(c[j] for _, c in recent) for j in range(6)]
    assert not history or firing.tokens >= window


def test_counters_come_back():
    "Saved and loaded counters go on alike."
    a, b = Firing(3, 10), Firing(3, 10)
    for step in range(7): a.update(torch.tensor([step % 2, 0, 1]), 4)
    b.load_({name: tensor.clone() for name, tensor in a.tensors().items()})
    for firing in (a, b): firing.update(torch.tensor([0, 1, 0]), 4)
    assert all(torch.equal(a.tensors()[name], b.tensors()[name]) for name in a.tensors())


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=50))
@settings(deadline=None)
def test_density_histogram_counts_every_latent(counts):
    "Every latent is in exactly one bin, by float64 log10."
    histogram = density_histogram(torch.tensor(counts), 1000)
    assert sum(histogram) == len(counts) and histogram[0] == counts.count(0)
    assert len(histogram) == len(DENSITY_EDGES)


def test_activation_histogram_is_in_model_units():
    "Training on x * s and folding leaves the histogram alone."
    x = torch.rand(1000).add(0.01)
    assert activation_histogram(x * 7.3, 7.3) == activation_histogram(x, 1.0)
