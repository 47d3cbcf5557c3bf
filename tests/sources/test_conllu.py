"Treebanks: every word on its own characters, in a real treebank and in awkward ones."
import re
from collections import Counter

import pytest

from sae_lab.ground.errors import DamagedFile, UnknownName
from sae_lab.sources.conllu import COLUMNS, conllu, sentences
from sae_lab.sources.corpus import named, pack
from sae_lab.sources.readers import corpora


def write(folder, text, name="toy.conllu"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def word(id, form, upos="X", misc="_", deprel="dep", feats="_"):
    return "\t".join([id, form, "_", upos, "_", feats, "0", deprel, "_", misc])


def made(folder, *lines, **kwargs):
    return list(conllu(write(folder, "\n".join(lines) + "\n"), **kwargs))


@pytest.fixture(scope="module")
def treebank(data):
    path = data / "labelled" / "ud_english_ewt"
    if not path.is_dir():
        pytest.skip(f"no treebank at {path}; set SAE_LAB_DATA")
    return path


def counted(path):
    "Sentences and words of a file as the format counts them, by regular expressions alone."
    text = path.read_text(encoding="utf-8")
    return len(re.findall(r"^# text = ", text, re.M)), Counter(re.findall(r"^\d+\t.*?\t.*?\t(.*?)\t", text, re.M))


def test_every_word_of_a_treebank_is_labelled_once(treebank):
    for path in sorted(treebank.glob("*.conllu")):
        documents = list(conllu(path))
        n, upos = counted(path)
        found = Counter(label.value for each in documents for label in each.labels if label.concept == "upos")
        assert sum(each.meta["sentences"] for each in documents) == n
        joined = Counter(part for value, times in found.items() for part in value.split("+") for _ in range(times))
        assert joined == upos
        assert len({each.id for each in documents}) == len(documents) > 100


def test_labels_stand_on_their_words(treebank):
    path = treebank / "en_ewt-ud-dev.conllu"
    forms = [each["form"] for s in sentences(path) for each in s.words if each["id"].isdigit()]
    spans = [text for each in conllu(path) for text, _ in each.spans("upos")]
    differ = sum(a != b for a, b in zip(forms, spans)) if len(forms) == len(spans) else abs(len(forms) - len(spans))
    assert differ / len(forms) < 0.01  # words that a contraction does not spell out stand together


def test_documents_read_as_written(treebank):
    path = treebank / "en_ewt-ud-dev.conllu"
    written = re.findall(r"^# text = (.*)$", path.read_text(encoding="utf-8"), re.M)
    at, documents = 0, list(conllu(path))
    for each in documents:
        place = 0
        for sentence in written[at:at + each.meta["sentences"]]:
            place = each.text.index(sentence.strip(), place) + len(sentence.strip())
        assert place == len(each.text)
        at += each.meta["sentences"]
    assert at == len(written)


def test_labels_reach_the_tokens(treebank, subject):
    tokens = pack(named("conllu", path=treebank), subject, 5000, subject.n_ctx)
    upos = tokens.concept("upos")
    assert {"NOUN", "VERB", "PUNCT", "DET"} <= set(upos.values) and (upos.codes >= 0).double().mean() > 0.8
    the = [upos.at(*at) for at in (tokens.ids == subject.tokenizer.encode(" the")[0]).nonzero().tolist()]
    assert not the or Counter(the).most_common(1)[0][0] == "DET"


def test_registered():
    assert "conllu" in corpora and corpora["conllu"].meta["idea"]


def test_words_on_one_stretch(tmp_path):
    [one] = made(tmp_path, "# text = du lac", word("1-2", "du"), word("1", "de", "ADP"), word("2", "le", "DET"),
                 word("3", "lac", "NOUN"))
    assert one.spans("upos") == [("du", "ADP+DET"), ("lac", "NOUN")]
    [two] = made(tmp_path, word("1-2", "don't"), word("1", "do", "AUX"), word("2", "n't", "PART"))
    assert two.text == "don't" and two.spans("upos") == [("do", "AUX"), ("n't", "PART")]


def test_spaces_paragraphs_documents(tmp_path):
    lines = ["# newdoc id = a", word("1", "One", misc="Gloss=x|SpaceAfter=No"), word("2", ".", misc="SpaceAfter=No"),
             "", word("1", "Two"), "", "# newpar", word("1", "Three"), "", "", "# newdoc", word("1", "Four")]
    one, two = made(tmp_path, *lines)
    assert (one.text, two.text) == ("One.Two\n\nThree", "Four")
    assert (one.id, two.id) == ("toy.conllu#a", "toy.conllu#1")
    assert [one.text[label.start:label.end] for label in one.labels if label.concept == "upos"] == \
        ["One", ".", "Two", "Three"]


def test_forms_with_spaces_odd_text_and_endings(tmp_path):
    path = tmp_path / "odd.conllu"
    lines = ["# text = 10 000  🦊s <b>&amp;</b>\u00a0!", word("1", "10 000", "NUM"), word("2", "🦊s", "NOUN"),
             word("3", "<b>&amp;</b>", "X"), word("4", "!", "PUNCT")]
    path.write_bytes(("\ufeff" + "\r\n".join(lines)).encode())
    [one] = conllu(path)
    assert [text for text, _ in one.spans("upos")] == ["10 000", "🦊s", "<b>&amp;</b>", "!"]


def test_features_are_concepts(tmp_path):
    [one] = made(tmp_path, word("1", "foxes", "NOUN", feats="Number=Plur|Typo=Yes"), columns=("feats", "upos"))
    assert one.spans("Number") == [("foxes", "Plur")] and one.spans("Typo") == [("foxes", "Yes")]
    assert one.spans("upos") and not one.spans("deprel")


@pytest.mark.parametrize("lines,says", [
    (["1\tonly\tfour\tcolumns"], "line 1, has 4 columns"),
    ([word("1", "a"), word("2", "")], "line 2, has 10 columns, some empty"),
    (["# text = a c", word("1", "a"), word("2", "b")], "line 3: the text goes on 'c'")])
def test_damage_is_named_with_its_line(tmp_path, lines, says):
    with pytest.raises(DamagedFile, match=re.escape(says)):
        made(tmp_path, *lines)


def test_refused(tmp_path):
    (tmp_path / "latin.conllu").write_bytes(b"# text = caf\xe9\n")
    with pytest.raises(DamagedFile, match="UTF-8"):
        list(conllu(tmp_path))
    with pytest.raises(UnknownName) as caught:
        next(conllu(tmp_path, columns=("pos",)))
    assert set(caught.value.known) == set(COLUMNS[2:8])
    assert made(tmp_path, "") == []
