"Splitting against hierarchies that are known: the tree, the states, and the share of false edges."

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array
from scipy.stats import false_discovery_control, hypergeom

from sae_lab.coders.contract import make
from sae_lab.features.evidence import Side, given_p, judged, q_values, shifted
from sae_lab.features.splitting import Splitting, example_splitting, prefixes, split
from sae_lab.ground.errors import DamagedFile, InputError, ShapeError
from sae_lab.ground.toy import sparse_mixture
from sae_lab.sources.stream import TensorSource
from sae_lab.training.fit import train

LEAVES, ROOTS, D, K = 64, 16, 64, 3


def sparse(codes):
    codes = codes.csr()
    parts = (codes.values.detach().numpy(), codes.indices.numpy(), codes.indptr.numpy())
    return csr_array(parts, shape=(codes.n, codes.d_sae))


def columns(fires, rng):
    "Codes from a list of token sets."
    n = 20_000
    dense = np.zeros((n, len(fires)))
    for i, tokens in enumerate(fires):
        dense[tokens, i] = rng.uniform(0.5, 1.5, len(tokens))
    return csr_array(dense)


def bursty(rng, n, m, share):
    "Activations of independent latents that fire in runs of about ten tokens."
    starts = rng.random((n, m)) < share / 10
    on = np.zeros((n, m), bool)
    for lag in range(10):
        on[lag:] |= starts[: n - lag]
    return csr_array(on * rng.uniform(0.5, 1.5, (n, m)))


def ladder(seed, rows=60_000):
    "Dictionaries of a toy tree, half as large again as the features of their level, and what each latent stands for."
    parent = torch.cat([torch.full((ROOTS,), -1), torch.arange(LEAVES) * ROOTS // LEAVES])
    often = torch.cat([torch.full((ROOTS,), 1e-4), torch.ones(LEAVES)])
    toy = sparse_mixture(ROOTS + LEAVES, D, K, often, hierarchy=parent, values=(0.75, 1.25), seed=seed)
    fresh = {f"{size}": make("topk", d_in=D, d_sae=size, k=K, seed=seed) for size in (24, 96)}
    x, (y, truth) = toy.sample(rows, seed=100 + seed)[0], toy.sample(20_000, seed=200 + seed)
    made = train(fresh, TensorSource(x, batch=512, seed=seed), progress=False, seed=seed)
    codes = [sparse(coder.encode(y)) for coder in made.values()]
    truth = sparse(truth).toarray()
    names = [nearest(codes[0], truth[:, :ROOTS]), nearest(codes[1], truth[:, ROOTS:])]
    return made, codes, names


def nearest(codes, truth):
    "The feature with which each latent's activations correlate most."
    z, t = codes.toarray(), truth
    z, t = z - z.mean(0), t - t.mean(0)
    return (z.T @ t / np.maximum(np.linalg.norm(z, axis=0)[:, None] * np.linalg.norm(t, axis=0), 1e-9)).argmax(1)


def scored(found, names):
    "True and false edges shown, and the share of the tree that they cover."
    shown = found.edges[found.edges.shown]
    root, leaf = names[0][shown.parent], names[1][shown.child]
    true = root == leaf * ROOTS // LEAVES
    return int(true.sum()), int((~true).sum()), len(set(leaf[true].tolist())) / LEAVES


@pytest.fixture(scope="module")
def planted():
    "Twenty-eight parents; one is kept, one split in three, one lives on with a hole, the rest are kept."
    rng, torch_rng = np.random.default_rng(0), torch.Generator().manual_seed(0)
    way = torch.nn.functional.normalize(torch.randn(40, D, generator=torch_rng), dim=1)
    own = torch.nn.functional.normalize(torch.randn(8, D, generator=torch_rng), dim=1)
    fires = [np.sort(rng.choice(20_000, 1000, replace=False)) for _ in range(28)]
    third = rng.permutation(fires[1])
    eaten = rng.permutation(fires[2])
    pieces = [third[:400], third[400:700], third[700:], eaten[250:], eaten[:250]]
    large = [fires[0], *map(np.sort, pieces), np.sort(rng.choice(20_000, 300, replace=False)), np.arange(5), *fires[3:]]
    W_b = torch.cat([way[:1], way[1] + own[:3], way[2:3], way[2:3] + own[3:4], own[4:6], way[3:28]])
    return split([way[:28], W_b], [columns(fires, rng), columns(large, rng)])


def test_states_as_defined(planted):
    state = planted.states[planted.states.level == 1].state.tolist()
    assert state[:8] == ["kept", "split", "split", "split", "kept", "absorbed", "novel", "rare"]
    assert state[8:] == ["kept"] * 25
    assert set(planted.states[planted.states.level == 0].state) == {"first"}


def test_children_and_parents(planted):
    assert sorted(planted.children(0, 1).child) == [1, 2, 3]
    assert planted.parents(1, 5).parent.tolist() == [2]
    assert len(planted.children(0, 0)) == 1 and len(planted.parents(1, 6)) == 0
    per = planted.children_per_latent().iloc[0]
    assert per["n"] == 28 and per["low"] <= per["mean"] == 31 / 28 <= per["high"]
    assert planted.edges.groupby("child").size().index.tolist() == [i for i in range(33) if i != 7]


def test_evidence_equals_a_dense_count(planted):
    rng = np.random.default_rng(3)
    a, b = bursty(rng, 3000, 12, 0.1), bursty(rng, 3000, 20, 0.05)
    W = [torch.randn(size, 8, generator=torch.Generator().manual_seed(size)) for size in (12, 20)]
    found, nulls, tests = judged(Side.of(W[0], a, 1), Side.of(W[1], b, 1), 0.0, 5, rng)
    x, y = a.toarray(), b.toarray()
    i, j = found.parent, found.child
    both = (x > 0).T.astype(float) @ (y > 0)
    unit = [torch.nn.functional.normalize(each, dim=1) for each in W]
    assert tests == 240 and len(nulls) == 3
    np.testing.assert_allclose(found.given, (both / (y > 0).sum(0))[i, j])
    np.testing.assert_allclose(found.reverse, (both / (x > 0).sum(0)[:, None])[i, j])
    np.testing.assert_allclose(found.correlation, np.corrcoef(x.T, y.T)[:12, 12:][i, j], atol=1e-9)
    np.testing.assert_allclose(found.cosine, (unit[0] @ unit[1].T).numpy()[i, j], atol=1e-6)


@pytest.mark.parametrize("burst", [False, True])
def test_unrelated_dictionaries_have_no_edges(burst):
    "Independent latents, in bursts or not, whose decoders share a mean: at most 5 % of runs may show anything."
    runs = 0
    for seed in range(20):
        rng, g = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
        sizes = (20, 60)
        W = [torch.randn(size, 32, generator=g) + 0.7 * torch.ones(32) for size in sizes]
        plain = [csr_array((rng.random((4000, size)) < 0.1) * 1.0) for size in sizes]
        codes = [bursty(rng, 4000, size, 0.1) for size in sizes] if burst else plain
        runs += bool(split(W, codes, least=0.0, draws=20, seed=seed).edges.shown.any())
    assert runs <= 4  # 5 % of 20 runs, with room for chance: P(more than 4) = 0.0026


def test_p_values_hold_their_level():
    rng = np.random.default_rng(1)
    g = torch.Generator().manual_seed(1)
    a, b = bursty(rng, 6000, 40, 0.1), bursty(rng, 6000, 80, 0.1)
    W = [torch.randn(size, 32, generator=g) for size in (40, 80)]
    found, _, tests = judged(Side.of(W[0], a, 10), Side.of(W[1], b, 10), -1.0, 20, rng)
    assert (found.p <= 0.05).sum() / tests <= 0.05 and (found.p <= 0.01).sum() / tests <= 0.01


def test_exact_p_and_q():
    assert given_p(np.array([5]), np.array([40]), np.array([10]), 100)[0] == pytest.approx(hypergeom.sf(4, 100, 40, 10))
    p = np.random.default_rng(0).random(200) ** 3
    np.testing.assert_allclose(q_values(p, 200), false_discovery_control(p))
    whole = false_discovery_control(np.concatenate([p, np.ones(800)]))[:200]
    np.testing.assert_allclose(q_values(p, 1000), whole)
    with pytest.raises(InputError):
        q_values(p, 10)


def test_a_shift_keeps_each_course():
    codes = csr_array(np.random.default_rng(0).random((50, 4)) * (np.random.default_rng(1).random((50, 4)) < 0.3))
    np.testing.assert_array_equal(shifted(codes.tocsc(), 7).toarray(), np.roll(codes.toarray(), 7, axis=0))


def test_saved_and_read(planted, tmp_path):
    for made in (planted, example_splitting()):
        back = Splitting.load(made.save(tmp_path / "s"))
        assert back.names == made.names and back.sizes == made.sizes and back.rules == made.rules
        for name in ("edges", "nulls", "states"):
            assert getattr(back, name).equals(getattr(made, name)), name
    (tmp_path / "s" / "edges.csv").write_text("level\n")
    with pytest.raises(DamagedFile):
        Splitting.load(tmp_path / "s")


def test_refusals():
    rng = np.random.default_rng(0)
    codes = [csr_array(rng.random((50, size))) for size in (4, 8)]
    W = [torch.randn(size, 6) for size in (4, 8)]
    with pytest.raises(InputError):
        split(W, codes[:1])
    with pytest.raises(InputError):
        split(W, codes, fdr=0)
    with pytest.raises(ShapeError):
        split([W[0], torch.randn(8, 7)], codes)
    with pytest.raises(ShapeError):
        split(W, codes[::-1])
    with pytest.raises(ShapeError):
        split(W, [codes[0], codes[1][:40]])


def test_silent_dictionaries():
    W, nothing = [torch.randn(size, 6) for size in (4, 8)], [csr_array((100, size)) for size in (4, 8)]
    found = split(W, nothing)
    assert set(found.states.state) == {"rare"} and not len(found.edges)
    assert found.children_per_latent().n.tolist() == [0] and "rare" in found._repr_html_()


def test_prefixes_of_a_matryoshka_coder_keep_their_latents():
    coder = make("matryoshka", d_in=16, d_sae=64, k=4, prefixes=[16, 64], seed=0)
    coder.get_buffer("gate.threshold").fill_(0.5)
    codes = sparse(coder.encode(torch.randn(3000, 16, generator=torch.Generator().manual_seed(0))))
    parts, indexes = prefixes(coder, codes)
    found = split(parts, indexes)
    assert found.sizes == (16, 64)
    shown = found.edges[found.edges.shown]
    same = set(zip(shown.parent, shown.child))
    assert sum((i, i) in same for i in range(16)) >= 15


@pytest.mark.slow
def test_tree_is_recovered_and_false_edges_are_few():
    "Precision and recall of the tree of 16 roots and 64 leaves, five seeds; dictionaries of other trees beside them."
    true, false, cover, strangers, before = 0, 0, [], 0, None
    for seed in range(5):
        made, codes, names = ladder(seed)
        yes, no, share = scored(split(made, codes, seed=seed), names)
        true, false = true + yes, false + no
        cover.append(share)
        if before:
            other = split([*before[0].values()][:1] + [*made.values()][1:], [before[1][0], codes[1]], seed=seed)
            strangers += bool(other.edges.shown.any())
        before = made, codes
    print(f"precision {true / (true + false):.3f}, recall {np.round(cover, 3)}, {strangers} of 4 unrelated show edges")
    assert false / (true + false) <= 0.05 and np.mean(cover) >= 0.9 and strangers <= 1


def test_tree_is_recovered():
    made, codes, names = ladder(2)
    yes, no, share = scored(split(made, codes), names)
    assert yes / (yes + no) >= 0.9 and share >= 0.9
