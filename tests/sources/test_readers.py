"Readers on real files, where there are some, and on broken ones."
import pytest

from sae_lab.ground.errors import InputError, UnknownName
from sae_lab.sources.documents import Document
from sae_lab.sources.readers import corpora, hf_dataset, json_lines, mixed, text_files


def test_real_text(data):
    "Gutenberg in latin-1, TinyStories with separators, code as JSON lines."
    books = list(text_files(data / "gutenberg", encoding="latin-1"))
    assert len(books) == 15 and sum(len(book.text) for book in books) > 10_000_000
    stories = next(iter((data / "tinystories_sample").iterdir()))
    assert len(list(text_files(stories, separator="<|endoftext|>"))) > 1
    code = list(json_lines(data / "code_python", meta=("path",)))
    assert len(code) == 1164 == len({d.id for d in code}) and code[0].meta["path"].endswith(".py")


@pytest.mark.parametrize("streaming", [False, True])
def test_local_datasets(tmp_path, streaming, monkeypatch):
    "A folder of data files, read whole or as a stream; a saved dataset with splits; no network."
    import datasets

    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = datasets.Dataset.from_list([{"body": f"text {i}"} for i in range(5)])
    (tmp_path / "files").mkdir()
    rows.to_parquet(str(tmp_path / "files" / "train-0.parquet"))
    found = list(hf_dataset(str(tmp_path / "files"), field="body", streaming=streaming))
    assert [d.text for d in found] == [f"text {i}" for i in range(5)] and found[2].id == "files:train:2"
    datasets.DatasetDict(test=rows).save_to_disk(str(tmp_path / "saved"))
    assert len(list(hf_dataset(str(tmp_path / "saved"), field="body", split="test"))) == 5
    with pytest.raises(UnknownName, match="unknown field"):
        list(hf_dataset(str(tmp_path / "saved"), split="test"))
    with pytest.raises(InputError, match="could not be loaded"):
        list(hf_dataset(str(tmp_path / "saved"), split="train"))
    with pytest.raises(InputError, match="could not be loaded"):
        list(hf_dataset(str(tmp_path / "nowhere"), streaming=streaming))


def test_mixing_by_characters():
    "Shares hold at every moment to within a document."
    one = (Document("x" * 10, f"a{i}", "a") for i in range(1000))
    two = (Document("y" * 7, f"b{i}", "b") for i in range(1000))
    size = {"a": 0, "b": 0}
    for number, document in enumerate(mixed({"a": one, "b": two}, {"a": 3.0, "b": 1.0})):
        size[document.source] += len(document.text)
        assert number < 2 or abs(size["a"] / 3 - size["b"]) <= 10
    assert size["a"] > 9000


def test_corpora_by_name():
    "Every name has a line that says what it is, and makes documents."
    assert {"bundled", "conllu", "fables", "hf", "jsonl", "python_docs", "text"} == set(corpora)
    assert all(row["idea"] for row in corpora.table())
    ids = [d.id for d, _ in zip(corpora["bundled"](), range(50))]
    assert ids == [d.id for d, _ in zip(corpora["bundled"](), range(50))] and len(set(ids)) == 50
