"A saved figure says which model, text, dictionary and seed it is of, and gives its payload back."
import json
from importlib.metadata import version

import pytest

from sae_lab.lab import Lab
from sae_lab.views.figures import load_figure, save_figures

TEXT = "The fox saw the crow."


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "Two small dictionaries, not with the usual seed."
    lab = Lab(folder=tmp_path_factory.mktemp("lab"), seed=5)
    lab.collect(hook="blocks.1.mlp.hook_post", tokens=10_000)
    lab.train(d_sae=[32, 64], k=4, show=False)
    for name in lab.coders: lab.index(name, tokens=4_000)
    return lab


def read(path) -> dict: return json.loads(path.with_suffix(".json").read_text())


def check_origin(found: dict, lab: Lab, name: str) -> None:
    "Hashes of all that a figure of one dictionary depends on."
    coder, pages = lab.coders[name], lab.indexes[name]
    assert found["coder"]["hash"] == coder.identity == found["index"]["coder"]
    assert found["coder"]["name"] == name and found["coder"]["args"] == coder.spec.args
    assert found["subject"] == lab.subject.identity and len(found["subject"]["weights"]) > 10
    assert found["corpus"] == pages.facts["corpus"] and found["corpus"]["part"] == "explain"
    assert found["index"]["hash"] == pages.facts["hash"] and found["index"]["tokens"] == pages.n_tokens


@pytest.mark.parametrize("make", [
    lambda lab: lab.card(1, "topk-64"), lambda lab: lab.browse("topk-64"),
    lambda lab: lab.prompt(TEXT, "topk-64", effects=0)], ids=["card", "browser", "prompt"])
def test_widgets_of_one_dictionary(lab, tmp_path, make):
    "The JSON holds the hashes, and the figure drawn from it is the same."
    widget = make(lab)
    widget.save_figures(tmp_path / "a", images=())
    facts = read(tmp_path / "a")
    check_origin(facts["provenance"], lab, "topk-64")
    assert facts["provenance"]["seed"] == 5 and facts["version"] == version("sae_lab")
    assert load_figure(tmp_path / "a.json") == widget.view


def test_card_remade(lab, tmp_path):
    "What the JSON says is enough to make the same card, in a lab opened again."
    lab.card(3, "topk-32").save_figures(tmp_path / "card", images=())
    facts, again = read(tmp_path / "card")["provenance"], Lab.open(lab.save(tmp_path / "lab"))
    name = next(each for each, coder in again.coders.items() if coder.identity == facts["coder"]["hash"])
    assert again.indexes[name].facts["hash"] == facts["index"]["hash"] and again.seed == facts["seed"]
    assert again.card(3, name).view == load_figure(tmp_path / "card.json")


def test_boards(lab, tmp_path):
    "Every figure of a board names every dictionary on it."
    lab.browse("topk-32", cards=True).save_figures(tmp_path / "both", images=())
    for place in ("both-1", "both-2"):
        found = read(tmp_path / place)["provenance"]["widgets"]
        assert len(found) == 2 and found[0]["coder"]["name"] == "topk-32"
        check_origin(found[1], lab, "topk-32")


def test_explorer(lab, tmp_path):
    "An explorer names its dictionaries and the rules by which edges are shown."
    board = lab.explore(tokens=4_000)
    board.save_figures(tmp_path / "walk", images=())
    explorer, cards = read(tmp_path / "walk-1")["provenance"]["widgets"]
    assert explorer == read_widget(board.explorer, tmp_path)
    assert explorer["splitting"]["seed"] == 5 and explorer["splitting"]["fdr"] == 0.05
    for name, found in zip(["topk-32", "topk-64"], explorer["dictionaries"], strict=True):
        check_origin(found, lab, name)
    hashes = [each["coder"]["hash"] for each in cards["widgets"]]
    assert hashes == [lab.coders[name].identity for name in ("topk-32", "topk-64")]
    assert load_figure(tmp_path / "walk-1.json") == board.explorer.view


def read_widget(widget, folder) -> dict:
    widget.save_figures(folder / "one", images=())
    return read(folder / "one")["provenance"]


def test_model_and_training(lab, tmp_path):
    "Attention names the model and the text, a monitor what is trained on what."
    assert lab.attention(TEXT).provenance == {"subject": lab.subject.identity, "text": TEXT}
    work = lab.begin(d_sae=32, k=4)
    widget = lab.monitor(work, tokens=2_000)
    work.wait()
    found = read_widget(widget, tmp_path)
    widget.close()
    assert found["seed"] == 5 and found["training"]["source"] == lab.store.source(seed=5).identity
    assert found["training"]["coders"]["topk-32"]["args"]["d_sae"] == 32 and found["subject"] == lab.subject.identity


def test_saved_by_hand(lab, tmp_path):
    "A static view is saved with what the lab tells of it."
    save_figures(lab.show(2, "topk-64"), tmp_path / "shown", lab.origin("topk-64"), images=())
    check_origin(read(tmp_path / "shown")["provenance"], lab, "topk-64")
