"What a lab answers who asks for causes: the numbers on the screen are those of an independent computation."
import json
import math

import pytest
import torch
from hostile import HOSTILE

from sae_lab.causal.metrics import logit_difference
from sae_lab.causal.pairs import indirect_object_pairs
from sae_lab.ground.errors import InputError, SaeLabError
from sae_lab.lab import Lab
from sae_lab.sources.subject import token_loss
from sae_lab.views.payload import check_view, read_html
from sae_lab.views.widget import standalone

HOOK = "blocks.2.hook_resid_post"


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "A small dictionary of the stream."
    lab = Lab(folder=tmp_path_factory.mktemp("lab"))
    lab.collect(hook=HOOK, tokens=20_000)
    lab.train(d_sae=128, k=8, show=False)
    lab.index("topk-128", tokens=8_000)
    return lab


@pytest.fixture(scope="module")
def pairs(lab):
    return indirect_object_pairs(lab.subject, 4)


@pytest.fixture(scope="module")
def busy(lab):
    "The latent that fires most often."
    return int(lab.indexes["topk-128"].stats["count"].idxmax())


def by_hand(lab, ids, latent, change):
    "Logits when a latent's activation is changed where it fires, without a splice."
    coder = lab.coders["topk-128"]

    @torch.no_grad()
    def put(y):
        held = coder.encode(y[0]).dense()[:, latent] * (torch.arange(y.shape[1]) > 0)
        step = torch.where(held != 0, change(held) - held, 0.0)
        return y + (step[:, None] * coder.W_dec[latent].detach())[None]

    return lab.subject.run_with(ids, {HOOK: put})[0]


def outcome(view, name):
    return next(each for each in view.effect.outcomes if each.name == name)


@pytest.mark.parametrize(("operation", "change"), [("ablate", lambda x: x * 0), ("set", lambda x: x * 0 + 2.5),
                                                   ("scale", lambda x: x * -1.5), ("add", lambda x: x + 2.5)])
def test_numbers_of_the_panel(lab, operation, change):
    "Logit difference, KL and the loss of every token, against arithmetic on the hook."
    text, value = "Once there was a fox in the wood", {"scale": -1.5}.get(operation, 2.5)
    ids, coder = lab.subject.tokens(text), lab.coders["topk-128"]
    latent = int(coder.encode(lab.subject.run(ids, HOOK)[HOOK][0, 2:]).dense().detach().sum(0).argmax())
    view = lab.patch(text, latent=latent, operation=operation, value=value, prompt=False).view
    clean, edited = lab.subject.logits(ids), by_hand(lab, ids, latent, change)
    assert any(view.effect.edited)
    best = clean[0, -1].topk(2).indices
    gap = lambda logits: float(logits[0, -1, best[0]] - logits[0, -1, best[1]])
    assert math.isclose(outcome(view, "logit difference").change, gap(edited) - gap(clean), abs_tol=1e-4)
    was, now = (logits[0, -1].log_softmax(-1) for logits in (clean, edited))
    assert math.isclose(outcome(view, "KL").after, float((was.exp() * (was - now)).sum()), abs_tol=1e-5)
    for logits, shown in ((clean, view.effect.loss_before), (edited, view.effect.loss_after)):
        assert torch.allclose(token_loss(logits, ids)[0], torch.tensor(shown[1:]), atol=1e-4)
    assert view.effect.noop == 0 and len(outcome(view, "KL").controls) == 16


def test_a_swap_of_everything_is_the_other_prompt(lab, pairs):
    "Latents that are swapped take the other prompt's activations, token for token."
    panel = lab.patch(pairs, latent=0, operation="swap", prompt=False, controls=0)
    for latent in range(0, 128, 16):
        panel.latent = latent
        other = lab.subject.run(pairs.corrupt[:1], HOOK)[HOOK][0]
        held = lab.coders["topk-128"].encode(other).dense()[:, latent].detach()
        shown = panel.view.effect
        for i, (edited, after) in enumerate(zip(shown.edited, shown.after)):
            if edited: assert math.isclose(after, float(held[i]), abs_tol=1e-5)


def test_error_dropped_is_told_against_the_reconstruction(lab, pairs, busy):
    "With the error dropped the no-op moves logits; the change is that of the edit alone."
    view = lab.patch(pairs, latent=busy, operation="scale", value=1.0, error="drop", prompt=False, controls=2).view
    assert view.effect.noop > 0.1 and all(abs(each.change) < 1e-4 for each in view.effect.outcomes)
    text = read_html(view.to_html())[0]
    assert "Error dropped" in text and "unedited" in text and "without an edit, dropping the error moves logits" in text


@pytest.mark.parametrize(("wrong", "said"), [
    ({"latent": 999}, "latent 999"), ({"positions": [77]}, "position 77"), ({"value": None}, "no number"),
    ({"answer": "not one token"}, "one token"), ({"operation": "swap"}, "another prompt")])
def test_a_wrong_choice_is_refused(lab, busy, wrong, said):
    "A sentence, and what was shown stays."
    panel = lab.patch("The fox", latent=busy, prompt=False, controls=2)
    before = panel.view
    with pytest.raises(SaeLabError, match=said): panel.answers["edit"](choice=panel.choice | wrong)
    assert panel.view is before


def test_wrong_prompts_and_doses_are_refused(lab, busy):
    with pytest.raises(InputError, match="as many in both"): lab.patch(("The fox", "The small fox"), prompt=False)
    with pytest.raises(InputError, match="another side"): lab.heatmap("The fox")
    with pytest.raises(InputError, match="latent 999"): lab.steer([busy, 999])
    live = lab.steer({busy: math.nan}, "The fox", wait=True)
    assert live.status == "failed" and "NaN" in live.said
    live.close()


@pytest.mark.parametrize("text", [each for each in HOSTILE if each.isprintable() or "\n" in each][:8])
def test_hostile_text_is_text(lab, busy, text):
    "Any prompt is edited and written on, and is text in the HTML and in the saved page."
    try: panel = lab.patch(text[:200] + " fox", latent=busy, prompt=False, controls=1)
    except InputError: return
    live = lab.steer({busy: 1.0}, text[:200], n=3, wait=True)
    for widget in (panel, live):
        check_view(widget.view)
        page = standalone(widget)
        assert page.count("</script>") == 2 and "<img" not in widget.view.to_html()
    live.close()


def test_one_token_and_a_silent_latent(lab):
    "The smallest prompt, and a latent that never fires: sentences and no NaN."
    index = lab.indexes["topk-128"]
    rare = int(index.stats["count"].idxmin())
    view = lab.patch("a", latent=rare, operation="set", value=1.0, positions=(1,), prompt=False, controls=2).view
    assert check_view(view) and view.effect.edited == (False, True) and "NaN" not in view.to_html()
    quiet = lab.patch("a", latent=rare, prompt=False, controls=2).view
    assert "fires nowhere" in quiet.effect.note and all(each.change == 0 for each in quiet.effect.outcomes)
    live = lab.steer({rare: 1.0}, "a", n=2, wait=True)
    assert live.status == "finished" and check_view(live.view)
    live.close()


def test_steered_text_is_that_of_plain_generation(lab, busy):
    "Token by token, the steered text is what a run over the whole text with a fixed vector gives, greedily."
    live = lab.steer({busy: 2.0}, "Once there was a fox", n=10, temperature=0, wait=True)
    amount = live.view.doses[0].amount
    ids, coder = lab.subject.tokens("Once there was a fox"), lab.coders["topk-128"]
    push = lambda y: y + amount * coder.W_dec[busy].detach() * (torch.arange(y.shape[1]) > 0)[:, None]
    for _ in range(10): ids = torch.cat([ids, lab.subject.run_with(ids, {HOOK: push})[0][:, -1:].argmax(-1)], 1)
    words = lab.subject.strings(ids[0, -10:])
    assert list(live.view.texts[1].tokens) == words[:len(live.view.texts[1].tokens)]
    live.close()


def test_a_heatmap_equals_a_patch_by_hand(lab, pairs):
    "A cell is the clean stream put into the corrupt run at one role."
    widget = lab.heatmap(pairs, "resid_post", progress=False)
    metric, row = logit_difference(pairs), torch.arange(4)
    at = torch.tensor([fact["positions"]["S2"] for fact in pairs.facts])
    hook = "blocks.1.hook_resid_post"
    clean = lab.subject.run(pairs.clean, hook)[hook]

    def put(y):
        y = y.clone()
        y[row, at] = clean[row, at]
        return y

    run = metric(lab.subject.logits(pairs.corrupt), pairs.corrupt)
    change = metric(lab.subject.run_with(pairs.corrupt, {hook: put})[0], pairs.corrupt) - run
    widget.selected = [1, widget.view.along.index("S2"), 0]
    assert math.isclose(widget.cell["value"], float(change.mean()), rel_tol=1e-4) and widget.view.n == 4


def test_a_dose_has_its_null_and_its_range(lab, pairs, busy):
    view = lab.dose(busy, pairs, strengths=(0, 1), controls=2).view
    first = view.curves[0]
    assert first.values[0] == 0 and first.control[0] == 0 and len(view.natural) == 4 and view.controls == 2
    assert first.low[1] <= first.values[1] <= first.high[1]


@pytest.mark.parametrize("name", ["patch", "board", "heatmap", "dose", "steer", "attribute"])
def test_figures_say_where_they_are_from(lab, pairs, busy, name, tmp_path):
    "Subject, coder, corpus, seed and prompts stand beside every figure."
    made = {"patch": lambda: lab.patch(pairs, latent=busy, prompt=False, controls=1),
            "board": lambda: lab.patch(pairs, latent=busy, controls=1),
            "heatmap": lambda: lab.heatmap(pairs, n=2, progress=False),
            "dose": lambda: lab.dose(busy, pairs, strengths=(0, 1), controls=1),
            "steer": lambda: lab.steer({busy: 1.0}, "The fox", n=3, wait=True),
            "attribute": lambda: lab.attribute(pairs, steps=2, top=5)}[name]()
    made.save_figures(tmp_path / "figure", images=())
    facts = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    text = json.dumps(facts)
    assert facts and lab.coders["topk-128"].identity in text and '"topk-128"' in text and '"seed": 0' in text
    assert "indirect object" in text or name == "steer"
