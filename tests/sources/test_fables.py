"The fables keep their promises over thousands of stories."

import hashlib
import re
from itertools import islice

import pytest

from sae_lab.ground.errors import UnknownName
from sae_lab.sources.documents import Document, Label
from sae_lab.sources.fable_tasks import (
    ATTRIBUTES,
    changed,
    indirect_object,
    number_agreement,
    pronoun_agreement,
    twins,
)
from sae_lab.sources.fable_worlds import held_out, lexicon
from sae_lab.sources.fables import concepts, fables


@pytest.fixture(scope="module")
def stories():
    return list(fables(11, 3000))


def test_every_span_is_what_its_label_says(stories):
    for story in stories:
        for label in story.labels:
            text = story.text[label.start : label.end]
            if label.concept == "character":
                assert text == label.value
            elif label.concept == "gender":
                assert (
                    text.lower()
                    in {
                        "he": ("he", "his", "him"),
                        "she": ("she", "her"),
                        "they": ("they", "their", "them"),
                    }[label.value]
                )
            elif label.concept in ("place", "mood", "kind"):
                assert text == label.value
            elif label.concept == "number":
                assert text.lower() == lexicon()["numbers"][int(label.value) - 2]
            elif label.concept == "weather":
                forms = (label.value, *lexicon()["weather"][label.value])
                assert text in forms or text[0].lower() + text[1:] in forms
            elif label.concept == "dialogue":
                assert text[0] == text[-1] == '"' and '"' not in text[1:-1]


def test_each_name_in_the_text_is_labelled(stories):
    names = set(lexicon()["name_list"])
    for story in stories[:500]:
        inside = {(o.start, o.end) for o in story.labels if o.concept == "character"}
        for word in re.finditer(r"\b[A-Z][a-z]+\b", story.text):
            assert word[0] not in names or word.span() in inside


def test_pronouns_refer_to_a_named_character_of_that_pronoun(stories):
    for story in stories:
        pronoun_of = {who["name"]: who["pronoun"] for who in story.meta["characters"]}
        genders = {(o.start, o.end): o.value for o in story.labels if o.concept == "gender"}
        for o in story.labels:
            if o.concept == "pronoun":
                assert genders[o.start, o.end] == pronoun_of[o.value]
                assert o.value in story.text[: o.start]


def test_role_spans_cover_the_story(stories):
    for story in stories:
        roles = [o for o in story.labels if o.concept == "role"]
        assert roles[0].start == 0 and roles[-1].end == len(story.text)
        assert all(a.end + 1 == b.start for a, b in zip(roles, roles[1:], strict=False))
        assert roles[-1].value == "moral" and "problem" in {o.value for o in roles}


def test_stories_depend_on_seed_and_number_alone():
    assert list(fables(3, 5, start=40)) == list(fables(3, 45))[40:]
    assert next(fables(3)).text != next(fables(4)).text
    assert [o.id for o in islice(fables(5), 3)] == ["fables:5:0", "fables:5:1", "fables:5:2"]


def test_the_text_is_the_same_on_every_machine():
    text = "\n".join(story.text for story in fables(0, 200))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "1ab95e363fe743b4"


def test_the_grammar_leaves_nothing_open(stories):
    for story in stories:
        assert not re.search(
            r"[{}|~]|  | [.,;?!]|\b[Aa] [aeiou]|\b[Aa]n (?!hour)[^aeiou]", story.text
        ), story.text
        assert 60 <= len(story.text.split()) <= 250
        for sentence in re.findall(r"(?:^|[.?!] |\n)(\w)", story.text):
            assert sentence.isupper() or sentence.isdigit()


def test_no_sentence_is_told_twice(stories):
    repeats = 0
    for story in stories:
        roles = [story.text[o.start : o.end] for o in story.labels if o.concept == "role"]
        repeats += len(roles) - len(set(roles))
    assert repeats < len(stories) / 100


def test_lists_number_their_items(stories):
    for story in stories:
        for o in story.labels:
            if o.concept == "role":
                items = [
                    i.value
                    for i in story.labels
                    if i.concept == "list" and o.start <= i.start < o.end
                ]
                assert items == [str(i + 1) for i in range(len(items))]


def test_numbers_agree_with_their_lists(stories):
    counted = re.compile(r"(\w+) things(?: on the table| in the box)?(?::|,) ([^.]*)\.")
    found = 0
    for story in stories:
        for word, items in counted.findall(story.text):
            found += 1
            assert len(re.split(r", | and ", items)) == lexicon()["numbers"].index(word) + 2
    assert found > 100


def test_held_out_pairs_never_share_a_story(stories):
    for story in stories:
        names = [who["name"] for who in story.meta["characters"]]
        assert not any(held_out(a, b) for a in names for b in names if a < b)
        assert not any(held_out(who["name"], who["kind"]) for who in story.meta["characters"])
        for giver, receiver, _ in story.meta["indirect_objects"]:
            assert not held_out(giver, receiver)


def pattern_of(template):
    "A regular expression for what a template may say before its answer."

    def slot(match):
        who, _, form = match[1].partition(".")
        if who.startswith("~"):
            return "(?:" + "|".join(map(re.escape, lexicon()["words"][who[1:].lower()])) + ")"
        fixed = {"l.at": r"\w+ the \w+", "g.an": r"(?:an|a|the) \w+", "a.a": r"an? \w+"}
        return fixed.get(match[1], r"\w+")

    return re.compile("^" + re.sub(r"\{([^}]*)\}", slot, template.split("|")[0]), re.MULTILINE)


@pytest.mark.parametrize("task", ["io", "pronoun", "number"])
def test_held_out_templates_are_never_told(stories, task):
    lines = "\n".join(
        s.text[o.start : o.end] for s in stories for o in s.labels if o.concept == "role"
    )
    for template in lexicon()[task]["train"]:
        assert pattern_of(template).search(lines), f"never told: {template}"
    for template in lexicon()[task]["held_out"]:
        assert not pattern_of(template).search(lines), f"told: {template}"


def test_the_receiver_is_the_name_not_repeated(stories):
    told = sum(len(story.meta["indirect_objects"]) for story in stories)
    assert told > 1.5 * len(stories)
    for split in ("train", "held_out"):
        for prompt in indirect_object(1, 500, split):
            x, y = prompt.meta["names"]
            assert {prompt.answer, prompt.distractor} == {f" {x}", f" {y}"}
            assert len(re.findall(rf"\b{prompt.answer.strip()}\b", prompt.text)) == 1
            assert len(re.findall(rf"\b{prompt.distractor.strip()}\b", prompt.text)) >= 2
            assert prompt.text.endswith(" to")
            assert held_out(x, y) == (split == "held_out")
            assert (prompt.text.find(x) < prompt.text.find(y)) and prompt.meta["order"] in (
                "ABBA",
                "BABA",
            )


def test_both_orders_are_even():
    orders = [prompt.meta["order"] for prompt in indirect_object(2, 1000)]
    assert 430 < orders.count("ABBA") < 570


def test_pronouns_agree_with_their_names():
    for split in ("train", "held_out"):
        for prompt in pronoun_agreement(1, 500, split):
            pronoun = lexicon()["pronoun_of"][prompt.meta["name"]]
            right = {"he": "he his him", "she": "she her", "they": "they their them"}[
                pronoun
            ].split()
            assert prompt.answer.strip() in right and prompt.distractor.strip() not in right
            assert held_out(prompt.meta["name"], prompt.meta["kind"]) == (split == "held_out")


def test_verbs_agree_with_their_subjects():
    for split in ("train", "held_out"):
        for prompt in number_agreement(1, 300, split):
            assert {prompt.answer, prompt.distractor} == {" was", " were"}
            assert held_out(*prompt.meta["nouns"]) == (split == "held_out")


def test_names_meet_their_pronouns_often(stories):
    met = dict.fromkeys(lexicon()["name_list"], 0)
    for story in stories:
        for o in story.labels:
            if o.concept == "pronoun":
                met[o.value] += 1
    assert min(met.values()) > 0.3 * sum(met.values()) / len(met)


@pytest.mark.parametrize("attribute", list(ATTRIBUTES))
def test_twins_differ_in_one_attribute(attribute):
    def rest(document, labels):
        text = document.text
        for label in sorted(labels, key=lambda o: -o.start):
            text = text[: label.start] + "\0" + text[label.end :]
        return text

    pairs = twins(4, 60, attribute)
    assert len(pairs) == 60 and pairs == twins(4, 60, attribute)
    for one, other in pairs:
        left, right = zip(*changed(one, other), strict=True)
        assert {o.concept for o in (*left, *right)} == {attribute}
        assert rest(one, left) == rest(other, right) and one.text != other.text


def test_prompts_are_reproducible_and_bad_names_refused():
    assert indirect_object(1, 20, "train") == indirect_object(1, 30, "train")[:20]
    for wrong in (lambda: indirect_object(1, 1, "test"), lambda: twins(1, 1, "colour")):
        with pytest.raises(UnknownName, match="Expected: one of"):
            wrong()


def test_concepts_are_the_labels(stories):
    assert {label.concept for story in stories for label in story.labels} == set(concepts())


def test_the_language_is_large():
    words = lexicon()
    assert (
        len(words["name_list"]) >= 120
        and len(words["kinds"]) >= 40
        and len(words["place_list"]) >= 40
    )
    assert len(words["objects"]) >= 60 and sum(map(len, words["moods"].values())) >= 30
    assert len(words["plots"]) >= 6 and sum(1 + len(v) for v in words["weather"].values()) >= 30
    assert len(words["io"]["train"]) >= 24 and len(words["io"]["held_out"]) >= 8


def test_a_span_outside_the_text_is_refused():
    with pytest.raises(ValueError, match=r"0 <= start < end <= 2"):
        Document("ab", "0", "test", labels=(Label("role", "moral", 1, 3),))
