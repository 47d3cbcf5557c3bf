"What a lab puts on the desk: real activations, real dictionaries, every view alive."
import numpy as np
import pytest

from sae_lab.features.concepts import ConceptScores
from sae_lab.ground.errors import InputError, UnknownName
from sae_lab.lab import Lab

HOOK = "blocks.1.mlp.hook_post"


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "Two small dictionaries."
    lab = Lab(folder=tmp_path_factory.mktemp("lab"))
    lab.collect(hook=HOOK, tokens=20_000)
    lab.train(d_sae=[64, 256], k=8, show=False)
    for name in lab.coders: lab.index(name, tokens=8_000)
    return lab


def test_card_follows_browser(lab):
    "Choosing a latent in the browser opens its card."
    board = lab.browse("topk-256", cards=True)
    browser, card = board.children
    latent = int(lab.indexes["topk-256"].stats["count"].idxmax())
    browser.selected = latent
    assert card.latent == latent and card.view.latent == latent
    browser.selected = -1
    assert card.latent == latent, "nothing selected: the card stays"


def test_card_answers(lab):
    "The effect of a latent at a token is asked from the card."
    pages = lab.indexes["topk-256"]
    card = lab.card(int(pages.stats["count"].idxmax()), "topk-256")
    found = card.answers["try"](text="The fox saw the crow.")
    assert found is not None and card.view.latent == card.latent


def test_prompt(lab):
    "A text is read through the dictionary, and what is chosen opens its card."
    chooser, card = lab.prompt("The fox saw the crow.", "topk-256", cards=True, effects=1).children
    assert len(chooser.view.latents) > 3
    chooser.selected = int(chooser.view.latents[-1])
    assert card.latent == chooser.selected


def test_training_on_the_desk(lab, capsys):
    "A training begun on the desk ends in the lab, the same as one trained straight on."
    work = lab.begin(d_sae=64, k=8)
    widget = lab.monitor(work, tokens=2_000)
    found = lab.keep(work)["topk-64"]
    widget.close()
    straight = Lab(folder=lab.folder / "other")
    straight.collect(hook=HOOK, tokens=20_000)
    assert found.identity == straight.train(d_sae=64, k=8, show=False)["topk-64"].identity
    assert lab.coders["topk-64"] is found
    with pytest.raises(InputError, match="collect"): Lab(folder=lab.folder / "empty").begin()


def test_labels(lab):
    "Every latent against every label of the text."
    found = lab.labels("topk-256", tokens=8_000, shifts=3)
    assert isinstance(found, ConceptScores) and found.score().shape[0] == 256
    assert len(found.latents("pronoun", 3)) <= 3


def test_splitting_is_kept(lab):
    "Parents and children are found once; the explorer walks them."
    found = lab.splitting(["topk-64", "topk-256"], tokens=8_000)
    again = lab.splitting(["topk-64", "topk-256"], tokens=8_000)
    assert found.edges.equals(again.edges) and len(list((lab.folder / "splittings").iterdir())) == 1
    board = lab.explore(["topk-64", "topk-256"], tokens=8_000)
    board.explorer.look(0, 3)
    assert board.explorer.latent == 3
    with pytest.raises(UnknownName): lab.splitting(["topk-64", "topk-25"], tokens=8_000)


def test_model(lab):
    "Attention and neurons of the subject."
    assert "fox" in lab.attention("The fox ran.", 2).html and "fox" in lab.neurons("The fox ran.", 1).html
    assert np.isfinite(len(lab.neurons("a", 0).html))
