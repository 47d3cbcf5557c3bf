"The feature index against a dense computation, whatever the chunks, and what it refuses."

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sae_lab.coders.contract import make
from sae_lab.features.index import FeatureIndex, build, open_index
from sae_lab.features.pages import Sizes
from sae_lab.ground.errors import DamagedFile, InputError, NumericError
from sae_lab.measures.reconstruction import reconstruction
from sae_lab.sources.bridge import native
from sae_lab.sources.corpus import Tokens
from sae_lab.sources.stream import Batch, Stream
from sae_lab.sources.subject import Subject

ROWS, WIDTH, D, D_SAE, VOCAB = 60, 24, 12, 40, 50


def corpus(seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCAB, (ROWS, WIDTH), generator=g)
    ids[:, 0] = 0
    doc = (torch.arange(ROWS * WIDTH) // 37).reshape(ROWS, WIDTH)
    names = tuple(f"doc {i}" for i in range(int(doc.max()) + 1))
    return SimpleNamespace(
        ids=ids, doc=doc, special=ids == 0, documents=names, provenance={"source": "toy", "part": "explain"}
    )


class Source:
    "Activations of a corpus: an embedding of the token plus some noise of the place."

    hooks, identity = ("toy",), {"name": "toy"}

    def __init__(self, tokens, batch=100, order=None, poison=False):
        g = torch.Generator().manual_seed(1)
        row, pos = (~tokens.special).nonzero(as_tuple=True)
        order = torch.arange(len(row)) if order is None else order(len(row))
        self.row, self.pos, self.batch, self.n_tokens = row[order], pos[order], batch, len(row)
        self.token, self.doc = tokens.ids[self.row, self.pos], tokens.doc[self.row, self.pos]
        self.x = (
            torch.randn(VOCAB, D, generator=g)[tokens.ids] + 0.5 * torch.randn(ROWS, WIDTH, D, generator=g)
        )[self.row, self.pos]
        if poison:
            self.x[500, 3] = float("nan")

    def batches(self, start=0):
        for i in range(start * self.batch, self.n_tokens, self.batch):
            s = slice(i, i + self.batch)
            yield Batch({"toy": self.x[s]}, self.token[s], self.doc[s], self.row[s], self.pos[s])


@pytest.fixture(scope="module")
def tokens():
    return corpus()


@pytest.fixture(scope="module")
def coder():
    return make("topk", d_in=D, d_sae=D_SAE, k=5, seed=0)


@pytest.fixture
def index(tokens, coder, tmp_path):
    return FeatureIndex.build(
        coder, Source(tokens), tokens, tmp_path / "index", [f"t{i}" for i in range(VOCAB)]
    )


@pytest.fixture
def dense(tokens, coder):
    "Activations [tokens in all, latents], zero where not encoded."
    source, out = Source(tokens), np.zeros((ROWS * WIDTH, D_SAE), np.float32)
    for batch in source.batches():
        out[(batch.seq * WIDTH + batch.pos).numpy()] = (
            coder.encode(batch.acts["toy"]).dense().detach().numpy()
        )
    return out


def test_activations_are_the_dense_columns(index, dense):
    for latent in range(D_SAE):
        position, value = index.activations(latent)
        assert np.array_equal(position, np.flatnonzero(dense[:, latent]))
        assert np.array_equal(value, dense[position, latent])


def test_stats_are_the_naive_ones(index, dense, tokens):
    doc, wide = tokens.doc.numpy().reshape(-1), dense.astype(np.float64)
    assert index.n_tokens == int((~tokens.special).sum())
    for latent, row in index.stats.iterrows():
        fires = np.flatnonzero(dense[:, latent])
        assert (
            row["count"] == len(fires)
            and row["docs"] == len(set(doc[fires]))
            and row["density"] == len(fires) / index.n_tokens
        )
        assert row["density_low"] <= row["density"] <= row["density_high"]
        if len(fires):
            assert row["mean"] == pytest.approx(wide[fires, latent].mean()) and row["std"] == pytest.approx(
                wide[fires, latent].std()
            )
            assert row["max"] == wide[:, latent].max()
            naive = np.histogram(wide[fires, latent], bins=50, range=(0, row["max"]))[0]
            assert np.array_equal(index.raw["histogram"][latent], naive)


@pytest.mark.parametrize("chunk", [1, 333, 10**9])
def test_the_same_bytes_whatever_the_chunks(index, tokens, coder, tmp_path, chunk):
    again = build(
        coder, Source(tokens), tokens, tmp_path / "again", [f"t{i}" for i in range(VOCAB)], chunk=chunk
    )
    assert open_index(again).facts["hash"] == index.facts["hash"]


def test_page_groups_keep_their_rules(index, dense, tokens):
    ids, doc = tokens.ids.numpy().reshape(-1), tokens.doc.numpy().reshape(-1)
    for latent in range(D_SAE):
        page, column = index.page(latent, n_top=6, context=4), dense[:, latent]
        for e in (
            *page.top,
            *page.random,
            *page.negatives,
            *page.near_misses,
            *(e for b in page.quantiles + page.values for e in b.examples),
        ):
            window = np.arange(e.row * WIDTH + e.start, e.row * WIDTH + e.start + len(e.tokens))
            assert np.array_equal(ids[window], e.tokens) and np.array_equal(
                column[window], np.float32(e.activations)
            )
            assert (
                len({*doc[window]}) == 1
                and index.text.documents[doc[window][0]] == e.document
                and len(e.tokens) <= 9
            )
            assert e.strings == tuple(f"t{t}" for t in e.tokens)
        if not column.any():
            continue
        assert page.top[0].value == column.max() and [e.value for e in page.top] == sorted(
            (e.value for e in page.top), reverse=True
        )
        assert all(b.low <= e.value <= b.high for b in page.quantiles for e in b.examples)
        assert all(b.low < e.value <= b.high * (1 + 1e-6) for b in page.values for e in b.examples)
        sizes = [b.count for b in page.quantiles]
        assert (
            max(sizes) - min(sizes) <= 1
            and sum(sizes) == sum(b.count for b in page.values) == sum(page.counts) == page.stats["count"]
        )
        assert not any(any(e.activations) for e in page.negatives + page.near_misses)
        assert {e.tokens[e.focus] for e in page.near_misses} <= {t.token for t in page.tokens}


def test_top_is_the_greedy_choice(index, dense, tokens):
    doc = tokens.doc.numpy().reshape(-1)
    latent = int(np.argmax((dense > 0).sum(0)))
    taken, chosen, read = set(), [], set()
    for p in np.lexsort((np.arange(len(dense)), -dense[:, latent])):
        row = p // WIDTH
        window = [
            q for q in range(max(p - 2, row * WIDTH), min(p + 3, (row + 1) * WIDTH)) if doc[q] == doc[p]
        ]
        text = tuple(tokens.ids.numpy().reshape(-1)[window])
        if dense[p, latent] > 0 and not taken & set(window) and text not in read and len(chosen) < 8:
            chosen.append((row, int(p) % WIDTH))
            taken |= set(window)
            read.add(text)
    assert [(e.row, e.start + e.focus) for e in index.page(latent, n_top=8, context=2).top] == chosen


def test_page_is_json_and_repeats(index):
    a, b, other = (index.page(3, seed=s) for s in (0, 0, 1))
    assert a == b and a != other and json.loads(json.dumps(a.to_dict()))["latent"] == 3
    assert index.page(np.int64(3)) == a and a._repr_html_()
    wider = index.page(3, sizes=Sizes(near_misses=0, negatives=0))
    assert wider.random == a.random and wider.negatives == ()


def test_a_dead_latent_has_a_page(tokens, tmp_path):
    coder = make("topk", d_in=D, d_sae=D_SAE, k=5, seed=0)
    with torch.no_grad():
        coder.get_parameter("b_enc")[7] = -1e6
    page = FeatureIndex.build(coder, Source(tokens), tokens, tmp_path / "i").page(7)
    assert (
        page.stats["count"] == 0
        and page.top == page.near_misses == page.quantiles == ()
        and len(page.negatives) == 10
        and page._repr_html_()
    )


def test_signed_activations_count_by_magnitude(tokens, tmp_path):
    coder = make("pca", d_in=D, d_sae=D)
    index = FeatureIndex.build(coder, Source(tokens), tokens, tmp_path / "i", k=3)
    _, value = index.activations(0)
    assert (
        (value < 0).any()
        and index.stats.loc[0, "max"] == np.abs(value).max()
        and 0 < index.stats.loc[0, "negative"] < 1
    )
    assert (
        abs(index.page(0).top[0].value) == index.stats.loc[0, "max"]
        and len(index.value) == 3 * index.n_tokens
    )


@pytest.mark.parametrize(
    "name", ["position.npy", "value.npy", "ids.npy", "stats.safetensors", "documents.json", "manifest.json"]
)
@pytest.mark.parametrize("harm", ["cut", "flip", "gone"])
def test_damage_is_refused_by_name(index, name, harm):
    path = index.folder / name
    data = bytearray(path.read_bytes())
    if harm == "gone":
        path.unlink()
    else:
        if harm == "cut":
            data = data[:-3]
        else:
            data[len(data) // 2] ^= 1
        path.write_bytes(data)
    with pytest.raises(DamagedFile, match=name):
        FeatureIndex.open(index.folder)


def test_failure_leaves_nothing(tokens, coder, tmp_path):
    build(coder, Source(tokens), tokens, tmp_path / "i")
    before = open_index(tmp_path / "i").facts["hash"]
    with pytest.raises(NumericError, match="batch 5"):
        build(coder, Source(tokens, poison=True), tokens, tmp_path / "i")

    def stop(done, of):
        if done > 400:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(coder, Source(tokens), tokens, tmp_path / "i", chunk=50, progress=stop)
    assert [p.name for p in tmp_path.iterdir()] == ["i"] and open_index(tmp_path / "i").facts[
        "hash"
    ] == before


def test_wrong_sources_are_refused(tokens, coder, tmp_path):
    with pytest.raises(InputError, match="corpus order"):
        build(coder, Source(tokens, order=torch.randperm), tokens, tmp_path / "a")
    with pytest.raises(InputError, match="not those given"):
        build(coder, Source(corpus(5)), tokens, tmp_path / "b")
    with pytest.raises(InputError, match="d_sae|latent 40"):
        build_and_page(tokens, coder, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def build_and_page(tokens, coder, tmp_path):
    return FeatureIndex.build(coder, Source(tokens), tokens, tmp_path / "c").page(40)


def test_a_subject_at_work_is_indexed(tmp_path):
    tiny = native(d_model=32, d_head=8, n_layers=2, n_ctx=64, n_heads=4, d_vocab=VOCAB, act_fn="gelu")
    subject, hook, words = Subject.wrap(tiny), "blocks.0.mlp.hook_post", corpus()
    tokens = Tokens(words.ids, words.doc, words.special, words.documents, words.provenance)
    coder = make("topk", d_in=128, d_sae=64, k=6)
    stream = Stream(subject, tokens, hook, batch=100, block=500, seed=None)
    index = FeatureIndex.build(coder, stream, tokens, tmp_path / "i")
    x = subject.run(tokens.ids, [hook])[hook]
    dense = coder.encode(x.reshape(-1, 128)).dense().detach().numpy() * ~tokens.special.reshape(-1, 1).numpy()
    assert np.array_equal(np.diff(index.indptr), (dense > 0).sum(0)) and index.facts["corpus"] == words.provenance
    for latent in range(64):
        position, value = index.activations(latent)
        assert np.array_equal(position, np.flatnonzero(dense[:, latent]))
        np.testing.assert_allclose(value, dense[position, latent], rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="corpus order"):
        build(coder, Stream(subject, tokens, hook, seed=0), tokens, tmp_path / "j")


def test_other_processing_is_refused(tokens, tmp_path):
    "A coder made for folded weights is not indexed on activations of unfolded ones, unless one insists."
    coder = make("topk", d_in=D, d_sae=D_SAE, k=4)
    coder.spec = coder.spec.with_(subject={"name": "toy", "processing": {"fold_ln": True}})
    source = Source(tokens)
    source.identity = {"kind": "stream", "subject": {"name": "toy", "processing": {"fold_ln": False}}}
    with pytest.raises(InputError, match="made with fold_ln=True, while toy has fold_ln=False"):
        build(coder, source, tokens, tmp_path / "index")
    with pytest.raises(InputError, match="fold_ln"): reconstruction(coder, source)
    assert not list(tmp_path.iterdir())
    assert build(coder, source, tokens, tmp_path / "index", any_processing=True).is_dir()
