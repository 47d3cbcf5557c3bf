"Splits, packing and labels, by property and against the text itself."
import itertools
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_lab.ground.errors import DamagedFile, InputError, UnknownName
from sae_lab.sources.bridge import native
from sae_lab.sources.corpus import PARTS, Corpus, Packer, Tokens, group_of, label_codes, named, part_of
from sae_lab.sources.documents import Document, Label
from sae_lab.sources.python_docs import python_docs
from sae_lab.sources.subject import Subject

lengths = st.lists(st.integers(0, 40), min_size=1, max_size=12)


@settings(deadline=None, max_examples=150)
@given(lengths, st.integers(2, 17), st.booleans())
def test_packing_keeps_every_token_in_order(sizes, ctx, with_bos):
    "Each document's tokens come once, in order; boundaries hold; masks say what is text; rows are full but the last."
    bos, pad = (1000 if with_bos else None), 1001
    packer, codes = Packer(ctx, bos, pad, 1), itertools.count()
    documents = [np.array([next(codes) % 997 for _ in range(size)], np.int32) for size in sizes]
    for number, ids in enumerate(documents):
        packer.lay(ids, number, np.zeros(len(ids), np.int32), ids[None] * 2)
    packer.flush()
    rows = np.stack(packer.full, 1) if packer.full else np.empty((4, 0, ctx), np.int32)
    ids, doc, special, code = rows
    text = special == 0
    for number, wanted in enumerate(documents):
        mine = text & (doc == number)
        assert ids[mine].tolist() == wanted.tolist() and code[mine].tolist() == (wanted * 2).tolist()
    assert text.sum() == sum(sizes) and (doc[text] >= 0).all()
    assert ((doc == -1) == (ids == pad)).all() and not (text & (ids == pad)).any()
    assert ((ids == 1000) == ((special == 1) & (doc >= 0))).all()
    assert (code[~text] == -1).all()
    for row in range(ids.shape[0]):
        if with_bos:
            assert ids[row, 0] == bos
        starts = np.flatnonzero((doc[row][1:] != doc[row][:-1]) & (doc[row][1:] >= 0)) + 1
        assert not with_bos or all(ids[row, at] == bos for at in starts)
        gaps = int((doc[row] == -1).sum())
        assert row == ids.shape[0] - 1 or gaps <= (1 if with_bos else 0)


@given(st.text(min_size=1), st.integers(0, 5))
def test_a_part_depends_on_seed_and_name_alone(name, seed):
    "The same answer always, and one of three."
    assert part_of(name, seed) == part_of(name, seed) and part_of(name, seed) in PARTS


def test_shares_are_kept_and_parts_disjoint(stories):
    "Shares within sampling error; the parts are a partition, whatever the order; another seed, another split."
    drawn = [part_of(f"d{i}", 3) for i in range(20_000)]
    for part, share in zip(PARTS, (0.8, 0.1, 0.1)):
        assert abs(drawn.count(part) / 20_000 - share) < 0.01
    corpus, backwards = Corpus(lambda: stories, "a"), Corpus(lambda: stories[::-1], "a")
    ids = [{d.id for d in corpus.split(part)} for part in PARTS]
    assert sum(map(len, ids)) == len(set().union(*ids)) == len(stories)
    assert ids == [{d.id for d in backwards.split(part)} for part in PARTS]
    assert ids != [{d.id for d in corpus.split(part, seed=1)} for part in PARTS]
    with pytest.raises(InputError, match="already"):
        corpus.split("fit").split("score")
    with pytest.raises(UnknownName):
        corpus.split("train")
    with pytest.raises(InputError):
        corpus.split("fit", shares=(0.5, 0.1, 0.1))


def test_no_file_is_in_two_parts():
    "All documents of a Python file, docstrings and code, are in one part; the parts are still a partition."
    root = Path(sysconfig.get_paths()["stdlib"]) / "email"
    documents = [*python_docs(("topic",)), *python_docs(("docstring", "code"), root)]
    corpus = Corpus(lambda: documents, "python_docs")
    for seed in range(3):
        parts = {part: list(corpus.split(part, seed)) for part in PARTS}
        files = [{d.meta["file"] for d in part} for part in parts.values()]
        assert sum(map(len, files)) == len(set().union(*files)) == len({d.meta["file"] for d in documents}) > 20
        assert sorted(d.id for part in parts.values() for d in part) == sorted(d.id for d in documents)
    assert any({"docstring", "code"} <= {d.kind for d in part} for part in parts.values())
    assert corpus.split("fit").provenance["split"] == "by file or document id"


def test_documents_without_a_file_are_split_by_id(stories):
    "Fables, and documents whose file is empty."
    assert [group_of(story) for story in stories] == [story.id for story in stories]
    assert group_of(Document("x", "a", "b", meta={"file": None})) == "a"


def test_labels_reach_the_tokens_that_spell_them(subject, stories):
    "Against offsets done by hand: the text of a run of labelled tokens holds the labelled text."
    tokens = Corpus(lambda: stories, "fables").tokens(subject, 10**9)
    assert len(tokens.documents) == len(stories) and tokens.provenance["counts"]["cut"] == 0
    for concept in tokens.concepts:
        codes = tokens.concept(concept).codes
        for number, story in enumerate(stories[:20]):
            mine = (tokens.doc == number) & ~tokens.special
            values = {label.value for label in story.labels if label.concept == concept}
            found = {tokens.concept(concept).values[i] for i in codes[mine].unique().tolist() if i >= 0}
            assert found <= values
            if concept == "character":
                spelled = subject.text(tokens.ids[mine & (codes >= 0)])
                assert found == values and all(value in spelled for value in values)
    assert (tokens.concept("pronoun").codes[tokens.special] == -1).all()


@given(st.lists(st.tuples(st.integers(0, 18), st.integers(1, 6)), max_size=6), st.integers(1, 4))
def test_codes_equal_the_narrowest_label(spans, width):
    "Character by character: a token has the value of the narrowest label it meets."
    labels = [Label("c", str(i), start, start + size) for i, (start, size) in enumerate(spans)]
    offsets = [(at, at + width) for at in range(0, 24, width)]
    values = {}
    codes = label_codes(offsets, labels, values)
    names = {code: value for value, code in values.items()}
    for (start, end), code in zip(offsets, codes.tolist()):
        met = [each for each in labels if each.start < end and each.end > start]
        assert (code == -1) == (not met)
        if met:
            narrowest = min(each.end - each.start for each in met)
            assert names[code] in {each.value for each in met if each.end - each.start == narrowest}


def test_counts_account_for_every_position(subject, stories):
    "usable + padding + begin + other special = positions, and text + cut = the documents."
    corpus = Corpus(lambda: stories, "fables")
    for wanted in (1, 500, 4000):
        tokens = corpus.tokens(subject, wanted, ctx=40)
        counts = tokens.provenance["counts"]
        assert wanted <= tokens.n < wanted + 40 and counts["usable"] == tokens.n
        parts = counts["usable"] + counts["padding"] + counts["begin"] + counts["other_special"]
        assert parts == counts["positions"] == tokens.ids.numel()
        sizes = [len(subject.tokenizer(s.text)["input_ids"]) for s in stories[: len(tokens.documents)]]
        assert tokens.n + counts["cut"] == sum(sizes)


def test_text_with_special_tokens_in_it(subject):
    "A begin token spelled out in a text is masked and counted."
    corpus = Corpus(lambda: [Document("one<|endoftext|>two", "a", "t")], "t")
    tokens = corpus.tokens(subject, 100)
    assert int(tokens.special.sum()) == tokens.ids.numel() - tokens.n and (tokens.ids == subject.bos).sum() > 1
    assert not (tokens.ids[~tokens.special] == subject.bos).any()


def test_save_and_load(subject, stories, tmp_path):
    "What is saved comes back; a truncated file is refused."
    tokens = Corpus(lambda: stories, "fables").split("fit").tokens(subject, 2000)
    path = tokens.save(tmp_path / "tokens.safetensors")
    again = Tokens.load(path)
    assert again.provenance == tokens.provenance and again.documents == tokens.documents
    assert again.special.equal(tokens.special) and again.concept("mood").values == tokens.concept("mood").values
    assert again[1:3].concept("mood").codes.equal(tokens.concept("mood").codes[1:3])
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DamagedFile):
        Tokens.load(path)


def test_the_same_corpus_gives_the_same_hash(subject, stories):
    "Provenance is stable, and tells parts and seeds apart."
    make = lambda part, seed=0: Corpus(lambda: stories, "f").split(part, seed).tokens(subject, 500).provenance["hash"]
    assert make("score") == make("score") != make("score", 1) and make("fit") != make("explain")


def test_mistakes(subject, stories):
    "No text, no tokenizer, impossible sizes, unknown names."
    empty = Corpus(lambda: [], "empty")
    with pytest.raises(InputError, match="no text"):
        empty.tokens(subject, 5)
    with pytest.raises(InputError, match="from 2 to 64"):
        Corpus(lambda: stories, "f").tokens(subject, 5, ctx=65)
    dumb = Subject.wrap(native(d_model=16, d_head=8, n_layers=1, n_ctx=8, n_heads=2, d_vocab=9, act_fn="relu"))
    with pytest.raises(InputError, match="no tokenizer"):
        Corpus(lambda: stories, "f").tokens(dumb, 5)
    with pytest.raises(UnknownName, match="fables"):
        named("fabels")
    assert torch.equal(*(named("fables", n=20).tokens(subject, 50).ids for _ in range(2)))
