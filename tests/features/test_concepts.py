"Concept labels against dense computations and other libraries, on fables; planted latents; what chance reaches."
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn import metrics

from sae_lab.coders.contract import make
from sae_lab.features.concepts import RANKED, SCORES, concept_scores, draw_shifts, greedy, score, summary
from sae_lab.features.index import FeatureIndex
from sae_lab.features.masks import assembled, labelled, masked, matching, placed
from sae_lab.features.pages import Text, token_lists
from sae_lab.ground.errors import InputError, UnknownName
from sae_lab.ground.sums import poisson_weights, uniform
from sae_lab.sources.corpus import named, pack
from sae_lab.sources.stream import Batch

D_SAE, D, N = 192, 24, 50_000


@pytest.fixture(scope="module")
def subject():
    from sae_lab.sources.subject import Subject

    return Subject.bundled()


@pytest.fixture(scope="module")
def tokens(subject):
    return pack(named("fables", seed=5), subject, N, 128)


class Source:
    "What a token reads and what came before it, with noise."

    hooks, identity = ("toy",), {"name": "toy"}

    def __init__(self, tokens, d_vocab):
        g = torch.Generator().manual_seed(1)
        self.seq, self.pos = (~tokens.special).nonzero(as_tuple=True)
        self.token, self.doc = tokens.ids[self.seq, self.pos], tokens.doc[self.seq, self.pos]
        words = torch.randn(2, d_vocab, D, generator=g)
        x = words[0][tokens.ids] + 0.5 * words[1][tokens.ids.roll(1, 1)]
        self.x = (x + 0.1 * torch.randn(x.shape, generator=g))[self.seq, self.pos]
        self.n_tokens = len(self.token)

    def batches(self, start=0):
        for i in range(start * 4096, self.n_tokens, 4096):
            s = slice(i, i + 4096)
            yield Batch({"toy": self.x[s]}, self.token[s], self.doc[s], self.seq[s], self.pos[s])


@pytest.fixture(scope="module")
def fables(tokens, subject, tmp_path_factory):
    "An index of 50,000 tokens of fables, and the dense activations [n, d_sae] behind it."
    source, coder = Source(tokens, subject.d_vocab), make("topk", d_in=D, d_sae=D_SAE, k=6, seed=0)
    strings = subject.strings(torch.arange(subject.d_vocab))
    index = FeatureIndex.build(coder, source, tokens, tmp_path_factory.mktemp("fables") / "index", strings)
    with torch.no_grad():
        dense = coder.encode(source.x).dense().numpy()
    return index, dense


@pytest.fixture(scope="module")
def naive(tokens):
    "Masks [n] by name, from the labels themselves."
    seen, found = ~tokens.special, {}
    for name, concept in tokens.concepts.items():
        found[name] = (concept.codes >= 0)[seen].numpy()
        found |= {f"{name}: {value}": concept.of(value)[seen].numpy() for value in concept.values}
    return {name: mask for name, mask in found.items() if 20 <= mask.sum() < len(mask)}


@pytest.fixture(scope="module")
def scores(fables, tokens):
    return concept_scores(fables[0], labelled(fables[0].text, tokens), shifts=3)


def dense_scores(fires, mask, weight=None):
    "All scores of all pairs, from dense masks [n, d_sae] and [n, m] and how often each token counts."
    weight = np.ones(len(fires)) if weight is None else weight
    both = (fires * weight[:, None]).T @ mask
    f, s, n = (weight @ fires)[:, None], (weight @ mask)[None], weight.sum()
    with np.errstate(all="ignore"):
        p, r = both / f, both / s
        mcc = (both / n - f / n * s / n) / np.sqrt(f / n * (1 - f / n) * s / n * (1 - s / n))
        return both, {"iou": both / (f + s - both), "f1": 2 * both / (f + s), "mcc": mcc,
                      "lift": p / (s / n), "precision": p, "recall": r}


def close(found, naive):
    assert np.allclose(found, naive, rtol=1e-9, atol=1e-12, equal_nan=True)


def test_fables_equal_a_dense_computation(scores, fables, naive):
    fires, mask = (fables[1] != 0).astype(np.float64), np.stack(list(naive.values()), 1).astype(np.float64)
    assert scores.n >= N and set(scores.concepts.names) <= set(naive) and len(scores.concepts) > 100
    missing = {name for name in naive if name not in scores.concepts.names}
    assert all(sum(each.startswith(name.split(":")[0] + ":") for each in naive) == 1 for name in missing)
    mask = np.stack([naive[name] for name in scores.concepts.names], 1).astype(np.float64)
    both, wanted = dense_scores(fires, mask)
    assert np.array_equal(scores.both, both) and np.array_equal(scores.fires, fires.sum(0))
    for name in SCORES:
        close(scores.score(name), wanted[name])


def test_scores_equal_another_library(scores, fables, naive):
    fires, draw = fables[1] != 0, np.random.default_rng(0)
    pairs = np.argwhere(scores.both > 30)
    for latent, concept in pairs[draw.choice(len(pairs), 12, replace=False)]:
        truth, said = naive[scores.concepts.names[concept]], fires[:, latent]
        theirs = {"iou": metrics.jaccard_score, "f1": metrics.f1_score, "mcc": metrics.matthews_corrcoef,
                  "precision": metrics.precision_score, "recall": metrics.recall_score}
        for name, function in theirs.items():
            assert scores.score(name)[latent, concept] == pytest.approx(function(truth, said), rel=1e-9)


def test_null_equals_rolled_masks(scores, fables, naive):
    fires = (fables[1] != 0).astype(np.float64)
    mask = np.stack([naive[name] for name in scores.concepts.names], 1).astype(np.float64)
    for row, shift in enumerate(draw_shifts(fables[0].text, 3, 0)):
        both, wanted = dense_scores(fires, np.roll(mask, -shift, 0))
        for name in RANKED:
            found = np.where(both >= scores.least, wanted[name], -np.inf)
            close(scores.null[name].by_latent[row], found.max(1))
            close(scores.null[name].by_concept[row], found.max(0))


def test_intervals_resample_documents(scores, fables, naive, tokens):
    fires = (fables[1] != 0).astype(np.float64)
    doc = tokens.doc[~tokens.special]
    weights = poisson_weights(doc, 0).numpy()
    latent = int(scores.fires.argmax())
    frame = scores.best(latent, 2, "f1")
    mask = np.stack([naive[name] for name in frame.concept], 1).astype(np.float64)
    drawn = [dense_scores(fires[:, [latent]], mask, weight)[1] for weight in weights.T]
    for name in SCORES:
        low, high = np.quantile([each[name][0] for each in drawn], [.025, .975], axis=0)
        close(frame[f"{name}_low"], np.minimum(low, frame[name]))
        close(frame[f"{name}_high"], np.maximum(high, frame[name]))
    where = [set(doc.numpy()[(fires[:, latent] > 0) & each]) for each in mask.T.astype(bool)]
    assert frame.docs.tolist() == [len(each) for each in where]


@pytest.mark.parametrize("by", RANKED)
def test_best_latents_and_table_agree(scores, by):
    wanted = np.where(scores.both >= scores.least, scores.score(by), -np.inf)
    table = scores.table(by)
    assert table.latent.tolist() == np.flatnonzero(np.isfinite(wanted.max(1))).tolist()
    close(table[by], wanted.max(1)[table.latent])
    alone = scores.best(table.latent[3], 1, by)
    pd.testing.assert_frame_equal(alone, table.iloc[[3]].reset_index(drop=True), check_dtype=False)
    concept = scores.concepts.names[5]
    found = scores.latents(concept, 4, by)
    close(found[by], np.sort(wanted[:, 5])[::-1][:4])
    sure = table[table.docs > 1]
    assert (sure[f"{by}_low"] <= sure[by]).all() and (sure[by] <= sure[f"{by}_high"]).all() and len(sure) > 100
    assert table[table.docs < 2][f"{by}_low"].isna().all()
    assert {"n", "docs", f"{by}_null", f"{by}_p"} <= set(table.columns)


@pytest.mark.parametrize("quantile", [0.3, 0.9])
def test_quantile_keeps_the_stronger(fables, tokens, quantile):
    index, dense = fables
    scores = concept_scores(index, labelled(index.text, tokens, ("pronoun",)), quantile, shifts=0)
    fires = np.zeros(dense.shape)
    for latent, column in enumerate(dense.T):
        strength = np.sort(np.abs(column[column != 0]))
        if len(strength):
            fires[:, latent] = (np.abs(column) >= strength[int(quantile * len(strength))]) & (column != 0)
    assert np.array_equal(scores.fires, fires.sum(0))
    mask = np.zeros(len(dense))
    mask[scores.concepts.tokens("pronoun")] = 1
    assert np.array_equal(scores.both[:, scores.concepts.number("pronoun")], fires.T @ mask)


def test_expressions_by_character(fables, tokens, subject):
    text = fables[0].text
    found = matching(text, {"the + word": r"\bthe \w+", "quoted": r'"[^"]*"', "capital": "[A-Z]"})
    seen = ~tokens.special
    ids, doc = tokens.ids[seen], tokens.doc[seen].numpy()
    for name, pattern in (("the + word", r"\bthe \w+"), ("quoted", r'"[^"]*"'), ("capital", "[A-Z]")):
        wanted = []
        for d in np.unique(doc)[:40]:
            strings = subject.strings(ids[doc == d])
            marks = [False] * sum(map(len, strings))
            for each in re.finditer(pattern, "".join(strings)):
                marks[each.start():each.end()] = [True] * (each.end() - each.start())
            ends = np.cumsum(list(map(len, strings)))
            wanted += [any(marks[end - len(s):end]) for s, end in zip(strings, ends)]
        mask = np.zeros(len(doc), bool)
        mask[found.tokens(name)] = True
        assert np.array_equal(mask[:len(wanted)], wanted) and any(wanted)


def test_places_are_counted(fables, tokens):
    text, seen = fables[0].text, ~tokens.special.numpy()
    doc, places, in_row = tokens.doc.numpy()[seen], [], []
    times, rows = Counter(), Counter()
    for d, row in zip(doc.tolist(), np.nonzero(seen)[0].tolist()):
        times[d] += 1
        rows[row] += 1
        places.append(times[d])
        in_row.append(rows[row])
    found = placed(text)
    assert np.array_equal(found.tokens("place in document: 8 to 15"),
                          np.flatnonzero((np.array(places) >= 8) & (np.array(places) < 16)))
    assert np.array_equal(found.tokens("place in sequence: 1"), np.flatnonzero(np.array(in_row) == 1))
    for name in ("document", "sequence"):
        sizes = [size for each, size in zip(found.names, found.size) if name in each]
        assert sum(sizes) == found.n


# planted latents

def a_text(rows=200, width=65, rows_a_doc=2, seed=0):
    ids = np.random.default_rng(seed).integers(1, 40, (rows, width)).astype(np.int32)
    ids[:, 0] = 0
    doc = np.repeat(np.arange(rows, dtype=np.int32) // rows_a_doc, width).reshape(rows, width)
    names = tuple(f"d{i}" for i in range(int(doc.max()) + 1))
    return Text(ids, doc, ids > 0, *token_lists(ids, ids > 0), names)


def an_index(text, fires, value=None):
    position = [np.flatnonzero(each & text.seen).astype(np.int32) for each in fires]
    indptr = np.cumsum([0, *map(len, position)])
    strength = np.random.default_rng(3).exponential(size=int(indptr[-1])).astype(np.float32) if value is None else \
        np.full(int(indptr[-1]), value, np.float32)
    return FeatureIndex(Path("toy"), {"tokens": int(text.seen.sum())}, indptr,
                        np.concatenate(position).astype(np.int32), strength, text, {})


def blobs(text, share, length, g):
    "A mask in stretches, as labels and latents come."
    start = g.random(text.ids.size) < share / length
    return np.convolve(start, np.ones(length))[:text.ids.size].reshape(text.ids.shape) > 0


def test_a_planted_latent_is_ranked_first():
    text, g = a_text(), np.random.default_rng(0)
    truths = {f"c{i}": blobs(text, share, 4, g) for i, share in enumerate(np.geomspace(.005, .3, 60))}
    noise = [blobs(text, share, 3, g) for share in np.geomspace(.001, .8, 100)]
    for name in ("c3", "c30", "c55"):
        planted = (truths[name] & (g.random(text.ids.shape) < .6)) | (g.random(text.ids.shape) < .001)
        scores = concept_scores(an_index(text, [*noise[:50], planted, *noise[50:]]), masked(text, truths))
        for by in RANKED:
            assert scores.latents(name, 1, by).latent[0] == 50
            if by != "lift":  # a rare concept that overlaps by chance may have more
                assert scores.best(50, 1, by).concept[0] == name
        row = scores.best(50, 1).iloc[0]
        assert row.mcc > row.mcc_null and row.mcc_p < .05 and row.mcc_low <= row.mcc <= row.mcc_high


def test_a_latent_for_a_part_of_speech(subject, data):
    path = data / "labelled" / "ud_english_ewt" / "en_ewt-ud-dev.conllu"
    if not path.is_file():
        pytest.skip(f"no treebank at {path}; set SAE_LAB_DATA")
    tokens, g = pack(named("conllu", path=path), subject, 12_000, 128), np.random.default_rng(3)
    ids, seen = tokens.ids.numpy().astype(np.int32), ~tokens.special.numpy()
    text = Text(ids, tokens.doc.numpy().astype(np.int32), seen, *token_lists(ids, seen), tokens.documents)
    nouns = tokens.concept("upos").of("NOUN").numpy() & (g.random(ids.shape) < .7) | (g.random(ids.shape) < .01)
    noise = [blobs(text, share, 2, g) for share in np.geomspace(.003, .4, 30)]
    scores = concept_scores(an_index(text, [*noise, nouns]), labelled(text, tokens) + placed(text))
    row = scores.best(30, 1).iloc[0]
    assert row.concept == "upos: NOUN" and row.mcc > .7 > row.mcc_null and scores.latents("upos: NOUN").latent[0] == 30
    assert {"deprel: nsubj", "upos: VERB", "place in document: 1"} <= set(scores.concepts.names)


def test_random_latents_reach_no_more_than_chance():
    text, g = a_text(400), np.random.default_rng(1)
    truths = {f"c{i}": blobs(text, .05, 4, g) for i in range(40)}
    scores = concept_scores(an_index(text, [blobs(text, .03, 3, g) for _ in range(400)]), masked(text, truths))
    for by in RANKED:
        share = (scores.table(by)[f"{by}_p"] < .05).mean()
        assert share < .05 + 3 * (.05 * .95 / 400) ** .5
    facts = summary(scores)
    assert facts["labelled"] == 400 and facts["mcc above every shift"] < 3 * facts["by chance"]


def test_places_are_no_null_of_themselves():
    text = a_text(300)
    first = np.zeros(text.ids.shape, bool)
    first[:, 1] = True
    row = concept_scores(an_index(text, [first]), placed(text)).best(0).iloc[0]
    assert row.concept == "place in sequence: 1" and row.mcc == 1 and row.mcc_null < .5 and row.mcc_p < .05


def test_a_union_is_scored_where_it_was_not_chosen():
    text, g = a_text(300), np.random.default_rng(2)
    truth = blobs(text, .04, 3, g)
    part = g.integers(0, 4, text.ids.shape)
    noise = [blobs(text, share, 2, g) for share in np.geomspace(.002, .5, 60)]
    index = an_index(text, [*noise, *(truth & (part == i) & (g.random(part.shape) < .95) for i in range(4))])
    concepts = masked(text, {"spread": truth, "other": blobs(text, .1, 3, g)})
    scores = concept_scores(index, concepts)
    union = scores.union("spread")
    assert sorted(union.latents) == [60, 61, 62, 63]
    last = union.steps.iloc[-1]
    assert last.f1 > .95 and union.steps.f1[0] < .5 and last.f1_null < .3 and last.f1_p < .05
    assert last.f1_low <= last.f1 <= last.f1_high
    away = (uniform(torch.arange(len(text.documents)), 0)[:, 0].numpy() >= .5)[text.doc] & text.seen
    fires = np.isin(np.arange(text.ids.size).reshape(text.ids.shape),
                    np.concatenate([index.activations(each)[0] for each in union.latents]))
    assert (last.both, last.fires, last["size"], last.n) == tuple(
        int((mask & away).sum()) for mask in (truth & fires, fires, truth, away))
    here = text.seen & ~away
    assert last.chosen == pytest.approx(metrics.f1_score(truth[here], fires[here]))
    assert union.docs + len(np.unique(text.doc[here])) == len(text.documents)


def test_no_union_of_noise():
    text, g = a_text(300), np.random.default_rng(4)
    index = an_index(text, [blobs(text, .03, 2, g) for _ in range(80)])
    union = concept_scores(index, masked(text, {"c": blobs(text, .03, 3, g)})).union("c")
    assert not len(union.steps) or union.steps.f1_p.iloc[-1] > .05


def test_greedy_equals_trying_all():
    from scipy import sparse

    g = np.random.default_rng(5)
    fires, mask, among = g.random((12, 300)) < .15, g.random(300) < .3, g.random(300) < .7
    union, reached, wanted = np.zeros(300, bool), 0.0, []
    while len(wanted) < 5:
        tried = [metrics.f1_score(mask[among], (union | each)[among]) for each in fires]
        if max(tried) - reached < .005:
            break
        at = int(np.argmax(tried))
        union, reached = union | fires[at], tried[at]
        wanted.append((at, pytest.approx(reached)))
    assert greedy(sparse.csr_array(fires.astype(int)), mask, among, 5, .005) == wanted


def test_one_count_equals_another(tmp_path):
    assert np.isnan(score("mcc", 0, 0, 3, 10)) and score("iou", 0, 0, 3, 10) == 0
    with pytest.raises(UnknownName):
        score("auc", 1, 1, 1, 1)


# edges

def test_dead_single_and_binary_latents():
    text, g = a_text(), np.random.default_rng(6)
    one = np.zeros(text.ids.shape, bool)
    one[3, 7] = True
    truth = blobs(text, .05, 3, g)
    index = an_index(text, [one & False, one, truth, text.seen], value=1.0)
    for quantile in (0.0, 0.5):
        scores = concept_scores(index, masked(text, {"c": truth}), quantile)
        assert scores.fires.tolist() == [0, 1, (truth & text.seen).sum(), text.seen.sum()]  # all are as strong
        assert scores.best(0).empty and scores.best(1).empty and scores.best(2).mcc[0] == 1
        assert set(scores.table().columns) == set(scores.best(0).columns) and scores.best(0)._repr_html_()
        assert np.isnan(scores.best(3).mcc[0]) if len(scores.best(3)) else True  # it says nothing of anything
    alone = concept_scores(index, masked(text, {"one": one, "c": truth}), least=1).best(1, by="lift").iloc[0]
    assert (alone.concept, alone.both, alone.docs, alone.mcc) == ("one", 1, 1, 1)


def test_chance_is_unknown_where_no_shifted_pair_has_the_evidence():
    text = a_text()
    here = np.zeros(text.ids.size, bool)
    here[np.flatnonzero(text.seen)[100:112]] = True
    here = here.reshape(text.ids.shape)
    index = an_index(text, [here, text.seen])
    scores = concept_scores(index, masked(text, {"c": here}))
    for found in (scores.best(0), scores.table().query("latent == 0")):
        row = found.iloc[0]
        assert row.both == 12 and row.mcc == 1 and row.mcc_p == 1 / 21
        assert np.isnan([row.mcc_null, row.iou_null, row.f1_null, row.lift_null]).all()
    assert not np.isnan(scores.latents("c", by="iou").iou_null).any(), "another latent meets the shifted concept"


def test_no_shifts_no_concepts_one_document():
    text, g = a_text(20, rows_a_doc=20), np.random.default_rng(7)
    truth = blobs(text, .2, 3, g)
    index = an_index(text, [truth])
    alone = concept_scores(index, masked(text, {"c": truth}), shifts=0)
    assert alone.best(0).mcc_null.isna().all() and alone.best(0).mcc_p.isna().all() and alone._repr_html_()
    row = alone.best(0).iloc[0]
    assert row.docs == 1 and (row.mcc_low, row.mcc_high) == (1, 1) or np.isnan(row.mcc_low)
    empty = concept_scores(index, assembled(text, [("everything", np.arange(text.ids.size))], "mask"))
    assert empty.concepts.skipped == ("everything",) and empty.best(0).empty and empty.table().empty
    assert empty._repr_html_() and empty.concepts._repr_html_()
    union = alone.union("c")
    assert union._repr_html_() and len(union.steps) == len(union.latents)


def test_refused(tokens, fables):
    text = a_text()
    index = an_index(text, [text.seen])
    concepts = masked(text, {"c": text.ids < 5})
    with pytest.raises(InputError, match="make them from index.text"):
        concept_scores(fables[0], concepts)
    with pytest.raises(InputError, match="quantile"):
        concept_scores(index, concepts, quantile=1.0)
    with pytest.raises(InputError, match="built on"):
        labelled(text, tokens)
    with pytest.raises(InputError, match="subject_strings"):
        matching(text, {"a": "a"})
    with pytest.raises(InputError, match="twice"):
        concepts + concepts
    with pytest.raises(InputError, match="at least 40"):
        concept_scores(an_index(a_text(2, 9), [a_text(2, 9).seen]), masked(a_text(2, 9), {"c": a_text(2, 9).ids < 20}))
    with pytest.raises(UnknownName, match="mcc"):
        concept_scores(index, concepts).best(0, by="mc")
    with pytest.raises(UnknownName):
        concept_scores(index, concepts).union("d")
    with pytest.raises(InputError, match="latent 1"):
        concept_scores(index, concepts).best(1)
