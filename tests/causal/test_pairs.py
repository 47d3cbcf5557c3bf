"Pairs are aligned, their answers are one token, and what is left out is counted by reason."
import json

import pytest
import torch

from sae_lab.causal.metrics import logit_difference
from sae_lab.causal.pairs import (_ends, agreement_file_pairs, agreement_pairs, blimp_pairs, indirect_object_pairs,
                                  pairs_of, pronoun_pairs, twin_pairs)
from sae_lab.ground.errors import DamagedFile, InputError, UnknownName
from sae_lab.sources.bridge import native
from sae_lab.sources.subject import Subject


@pytest.fixture(scope="module")
def subject():
    "The bundled subject."
    return Subject.bundled()


@pytest.fixture
def folder(data, monkeypatch):
    "The pairs among the outside data, found by name."
    monkeypatch.setenv("SAE_LAB_DATA", str(data))
    return data / "pairs"


MADE = {"indirect object": lambda subject, n: indirect_object_pairs(subject, n, seed=2),
        "number": lambda subject, n: agreement_pairs(subject, n, seed=2),
        "pronoun": lambda subject, n: pronoun_pairs(subject, n, seed=2),
        **{name: (lambda subject, n, name=name: twin_pairs(subject, name, n)) for name in ("mood", "gender")}}


@pytest.mark.parametrize("name", MADE)
def test_pairs_of_fables(subject, name):
    "Texts, ids and lengths agree; prompts differ before the end; the first pairs do not depend on how many there are."
    pairs = MADE[name](subject, 12)
    assert len(pairs) == 12 and pairs.clean.shape == pairs.corrupt.shape and (pairs.answer != pairs.distractor).all()
    for i, fact in enumerate(pairs.facts):
        length = int(pairs.length[i])
        for side, answer, ids, token in (("clean", "answer", pairs.clean, pairs.answer),
                                         ("corrupt", "distractor", pairs.corrupt, pairs.distractor)):
            assert subject.tokens(fact[side])[0].tolist() == ids[i, :length].tolist()
            assert subject.tokens(fact[answer], bos=False).tolist() == [[int(token[i])]]
        assert pairs.differs[i, :length].any() and not pairs.differs[i, length:].any()
    few = MADE[name](subject, 5)
    assert [fact["clean"] for fact in few.facts] == [fact["clean"] for fact in pairs.facts[:5]]
    assert sum(few.left_out.values()) <= sum(pairs.left_out.values())


def test_indirect_object_roles(subject):
    "The names stand where the facts say, and the model knows whom to give it to."
    pairs = indirect_object_pairs(subject, 48, seed=3)
    assert (pairs.differs.sum(1) == 1).all()
    for i, fact in enumerate(pairs.facts):
        at = {name: subject.strings(pairs.clean[i, [place]])[0].strip() for name, place in fact["positions"].items()}
        assert fact["answer"].strip().endswith(at["IO"]) and fact["distractor"].strip().endswith(at["S1"])
        assert at["S2"] == fact["distractor"].strip() and bool(pairs.differs[i, fact["positions"]["S2"]])
        assert fact["positions"]["S1"] < fact["positions"]["S2"] < fact["positions"]["end"] == int(pairs.last[i])
    metric = logit_difference(pairs)
    clean, corrupt = (metric(subject.logits(ids), ids) for ids in (pairs.clean, pairs.corrupt))
    assert (clean > 0).float().mean() > 0.8 and (corrupt < 0).float().mean() > 0.8


def test_a_name_ends_with_its_last_token(subject):
    "Also one of several tokens, and one that begins another."
    ids = subject.tokens("Katherine saw Ann. Anna saw Katherine.")[0].tolist()
    words = subject.strings(ids)
    first, second = _ends(subject, ids, "Katherine")
    assert words[first - 1] + words[first] != "Katherine" and "".join(words[1:first + 1]) == "Katherine"
    assert "".join(words[:second + 1]).endswith("saw Katherine") and second > first
    assert len(_ends(subject, ids, "Ann")) == 1 and "".join(words[:_ends(subject, ids, "Anna")[0] + 1]).endswith("Anna")


def test_flipped_and_taken(subject):
    "Twice flipped is as before; the metric changes its sign; rows go with their facts."
    pairs = indirect_object_pairs(subject, 10, seed=4)
    other = pairs.flipped()
    assert torch.equal(other.clean, pairs.corrupt) and torch.equal(other.answer, pairs.distractor)
    assert other.facts[0]["clean"] == pairs.facts[0]["corrupt"]
    assert other.facts[0]["answer"] == pairs.facts[0]["distractor"]
    assert other.facts[0]["positions"]["IO"] == pairs.facts[0]["positions"]["S1"]
    assert other.flipped().facts == pairs.facts and torch.equal(other.flipped().clean, pairs.clean)
    logits = subject.logits(pairs.clean)
    assert torch.equal(logit_difference(pairs)(logits, pairs.clean), -logit_difference(other)(logits, pairs.clean))
    for rows in (slice(2, 5), [2, 3, 4], torch.tensor([2, 3, 4]), torch.arange(10).eq(2) | torch.arange(10).eq(3)):
        some = pairs[rows]
        assert torch.equal(some.clean, pairs.clean[rows]) and len(some) == len(some.facts)
        assert some.facts[0] == pairs.facts[2]
    assert len(pairs[-1]) == 1 and pairs[-1].facts[0] == pairs.facts[9]
    twins = twin_pairs(subject, "mood", 3)
    assert twins.flipped().facts[0]["values"] == twins.facts[0]["values"][::-1]


def test_what_is_left_out_is_counted_and_shown(subject):
    "The first reason that holds, for each row."
    row = dict(clean="Anna saw the cat. The cat saw", corrupt="Milo saw the cat. The cat saw", answer=" Anna",
               distractor=" Milo")
    rows = [row, row | dict(answer=" Anna and"), row | dict(distractor=" Milo and"), row | dict(distractor=" Anna"),
            row | dict(corrupt="Milo saw the big cat. The cat saw"), dict(why="by hand"), row | dict(unless="late"),
            row | dict(clean=" a" * 400, corrupt=" a" * 400)]
    pairs = pairs_of(subject, rows, 100, "rows")
    assert len(pairs) == 1 and pairs.left_out == {
        "answer of several tokens": 1, "distractor of several tokens": 1, "answer and distractor are one token": 1,
        "prompts of different length": 1, "by hand": 1, "late": 1, "longer than the context": 1}
    assert "1 left out: prompts of different length" in pairs._repr_html_() and "7 left out" in repr(pairs)
    assert pairs_of(subject, rows[:1], 1, "rows", {"before": 3}).left_out == {"before": 3}


def test_errors_say_what_to_do(subject, monkeypatch, tmp_path):
    "No pairs, no tokenizer, no file, a damaged file."
    config = dict(d_model=16, d_head=8, n_layers=1, n_ctx=8, n_heads=2, d_vocab=20, act_fn="relu")
    with pytest.raises(InputError, match="at least 1"): pairs_of(subject, [], 0, "none")
    with pytest.raises(InputError, match="no tokenizer"): pairs_of(Subject.wrap(native(**config)), [], 1, "none")
    with pytest.raises(InputError, match="several tokens': 1"):
        pairs_of(subject, [dict(clean="a", corrupt="a", answer=" a a", distractor=" b")], 1, "none")
    with pytest.raises(UnknownName, match="held_out"): indirect_object_pairs(subject, 2, split="heldout")
    monkeypatch.delenv("SAE_LAB_DATA", raising=False)
    with pytest.raises(InputError, match="SAE_LAB_DATA"): blimp_pairs(subject, "passive_1")
    (tmp_path / "torn.jsonl").write_text('{"sentence_good": "a", "one_prefix_method": false}\n{"sentence_good": ')
    with pytest.raises(DamagedFile, match="line 2"): blimp_pairs(subject, tmp_path / "torn.jsonl")


def single(subject, text): return len(subject.tokens(text, bos=False)[0]) == 1


@pytest.mark.parametrize("name", ["determiner_noun_agreement_1", "regular_plural_subject_verb_agreement_1"])
def test_blimp_is_read_as_by_hand(subject, folder, name):
    "Rows of one prefix and two words of one token each, with the nearest prompt whose words are exchanged."
    rows = [json.loads(line) for line in (folder / "blimp" / f"{name}.jsonl").read_text().splitlines()]
    fit = [row for row in rows if row["one_prefix_method"] and single(subject, " " + row["one_prefix_word_good"])
           and single(subject, " " + row["one_prefix_word_bad"])]
    alone = blimp_pairs(subject, name, matched=False)
    assert [fact["pairID"] for fact in alone.facts] == [row["pairID"] for row in fit]
    assert torch.equal(alone.clean, alone.corrupt) and len(alone) + sum(alone.left_out.values()) == len(rows)
    pairs = blimp_pairs(subject, name)
    assert 10 < len(pairs) < len(fit) and len(pairs) + sum(pairs.left_out.values()) == len(rows)
    assert pairs.left_out["no row with the answers exchanged and as many tokens"] == len(fit) - len(pairs)
    words = {}
    for row in fit:
        words.setdefault((row["one_prefix_word_good"], row["one_prefix_word_bad"]), []).append(
            subject.tokens(row["one_prefix_prefix"])[0].tolist())
    for i, fact in enumerate(pairs.facts):
        ids, other = (x[i, :int(pairs.length[i])].tolist() for x in (pairs.clean, pairs.corrupt))
        near = [each for each in words[fact["distractor"].strip(), fact["answer"].strip()] if len(each) == len(ids)]
        apart = lambda each, ids=ids: sum(a != b for a, b in zip(each, ids))
        assert other in near and fact["differ"] == apart(other) == min(filter(None, map(apart, near)))


def test_blimp_without_a_fit_pair_says_why(subject, folder):
    "Every row is accounted for in the error; a name that is not there is answered with those that are."
    reasons = {"anaphor_gender_agreement": "answer of several tokens", "passive_1": "not one prefix and two words"}
    for name, why in reasons.items():
        with pytest.raises(InputError, match=f"{why}.*1000"): blimp_pairs(subject, name)
    with pytest.raises(InputError, match="passive_1"): blimp_pairs(subject, "passive")


@pytest.mark.parametrize("name", ["simple_test", "nounpp_test", "within_rc_test"])
def test_agreement_files_are_read_as_by_hand(subject, folder, name):
    "Answers of one token and prompts of one length; the rest is counted."
    rows = [json.loads(line) for line in (folder / "agreement" / f"{name}.json").read_text().splitlines()]
    words = {each: single(subject, each) for row in rows for each in (row["clean_answer"], row["patch_answer"])}
    length = lambda text: subject.tokens(text).shape[1]
    spoken = [row for row in rows if words[row["clean_answer"]] and words[row["patch_answer"]]]
    fit = [row for row in spoken if length(row["clean_prefix"]) == length(row["patch_prefix"])]
    pairs = agreement_file_pairs(subject, name, n=len(rows))
    assert [fact["clean"] for fact in pairs.facts] == [row["clean_prefix"] for row in fit]
    assert [fact["case"] for fact in pairs.facts] == [row["case"] for row in fit]
    out = pairs.left_out
    assert out["prompts of different length"] == len(spoken) - len(fit) > 0
    assert out["answer of several tokens"] + out["distractor of several tokens"] == len(rows) - len(spoken) > 0
    assert f"{out['prompts of different length']:,} left out" in pairs._repr_html_()
