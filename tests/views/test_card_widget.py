"The card of a latent: its effect at a token against a hook by hand, its live HTML, hostile text, dead latents."

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hostile import HOSTILE, texts
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_lab.coders.contract import make
from sae_lab.features.index import FeatureIndex
from sae_lab.ground.errors import InputError
from sae_lab.sources.corpus import named
from sae_lab.sources.stream import Stream
from sae_lab.sources.subject import Subject
from sae_lab.views.card import LatentCard
from sae_lab.views.card_parts import (
    LIGHT,
    SOLID,
    Explanation,
    Group,
    Ranking,
    Row,
    Window,
    even,
    evidence,
    page_groups,
    ranking,
    ranking_html,
)
from sae_lab.views.card_widget import CardWidget, live_html
from sae_lab.views.effect import Change, TokenEffect
from sae_lab.views.histograms import activation_histogram
from sae_lab.views.payload import check_view, read_html
from sae_lab.views.svg import bar
from sae_lab.views.widget import standalone
from sae_lab.workbench.card import SIZES, card, heads, live_card, logit_effects, neighbour_rankings, neurons
from sae_lab.workbench.effect import head_parts, latent_on, token_effect, tried, window_effect

HOOKS = ("blocks.1.mlp.hook_post", "blocks.2.hook_resid_pre", "blocks.1.attn.hook_z")


@pytest.fixture(scope="module")
def subject():
    return Subject.bundled()


def coder_at(subject, hook, out=None, d_sae=96, seed=0):
    "A random coder at a hook; what it reconstructs is far from what is there."
    kind, more = ("topk", {}) if out is None else ("transcoder", {"d_out": subject.hooks[out]})
    made = make(kind, d_in=subject.hooks[hook], d_sae=d_sae, k=8, seed=seed, **more)
    made.spec = replace(made.spec, hooks_in=(hook,), hooks_out=(out,) if out else ())
    return made


@pytest.fixture(scope="module")
def bench(subject, tmp_path_factory):
    "A coder and its index over a little text."
    coder, text = coder_at(subject, HOOKS[0]), named("bundled").split("explain", seed=0).tokens(subject, 4_000)
    words = subject.strings(list(range(subject.d_vocab)))
    source = Stream(subject, text, (HOOKS[0],), seed=None)
    return coder, FeatureIndex.build(coder, source, text, tmp_path_factory.mktemp("index") / "index", words)


def by_hand(subject, ids, hook, position, part):
    "A plain forward pass in which a hook of the model itself takes `part` away at one token."

    def change(act, hook):
        flat = act.clone().flatten(2)
        flat[0, position] -= part
        return flat.reshape(act.shape)

    with torch.no_grad():
        return subject.model.run_with_hooks(ids, fwd_hooks=[(hook, change)], return_type="logits")


def losses(logits, ids):
    return F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("position", [1, 6, 11])
def test_the_effect_is_that_of_a_hook_by_hand(subject, hook, position):
    coder, ids = coder_at(subject, hook), subject.tokens("The fox saw the crow and said nothing to the small deer.")
    with torch.no_grad():
        plain = subject.model(ids, return_type="logits")
        x = subject.run(ids, hook)[hook][0].flatten(1)
        z = coder.encode(x).dense()
        latent = int(z[position].argmax())
        there = by_hand(subject, ids, hook, position, z[position, latent] * coder.W_dec[latent])
    seen = token_effect(subject, coder, ids, position, latent, float(z[position, latent]))
    before, after = losses(plain, ids), losses(there, ids)
    assert (
        abs(seen.loss_before - float(before[position])) < 1e-4 and abs(seen.loss_after - float(after[position])) < 1e-4
    )
    assert abs(seen.effect) > 1e-4, "a coder that does nothing would pass"
    later = (after - before)[position + 1 :]
    assert seen.n_later == len(later) and abs(seen.later - float(later.mean())) < 1e-4
    p, q = plain[0, position].softmax(-1), there[0, position].softmax(-1)
    best = int((p - q).argmax())
    assert seen.promoted[0].token == subject.strings([best])[0]
    assert abs(seen.promoted[0].before - float(p[best])) < 1e-4 and abs(seen.promoted[0].after - float(q[best])) < 1e-4
    worst = int((p - q).argmin())
    assert (
        seen.suppressed[0].token == subject.strings([worst])[0]
        and abs(seen.suppressed[0].by - float((p - q)[worst])) < 1e-4
    )


def test_the_effect_of_a_transcoder_is_what_it_does_not_write(subject):
    reads, writes = "blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"
    coder, ids = coder_at(subject, reads, writes), subject.tokens("Hanna the wolf lived near the mill.")
    with torch.no_grad():
        coder.dec.normal_(generator=torch.Generator().manual_seed(0))
        z = coder.encode(subject.run(ids, reads)[reads][0]).dense()
        latent = int(z[4].argmax())
        there = by_hand(subject, ids, writes, 4, z[4, latent] * coder.W_dec[latent])
    seen = token_effect(subject, coder, ids, 4, latent, float(z[4, latent]))
    assert abs(seen.loss_after - float(losses(there, ids)[4])) < 1e-4 and abs(seen.effect) > 1e-5


def test_a_silent_latent_has_no_effect(subject):
    coder, ids = coder_at(subject, HOOKS[0]), subject.tokens("The fox ran.")
    silent = int((coder.encode(subject.run(ids, HOOKS[0])[HOOKS[0]][0]).dense()[2] == 0).nonzero()[0])
    seen = token_effect(subject, coder, ids, 2, silent, 0.0)
    assert abs(seen.effect) < 1e-5 and "silent" not in seen.to_text()


def test_the_window_is_read_in_its_row_and_its_document(subject, bench):
    coder, index = bench
    latent = int(index.stats["count"].idxmax())
    shown = card(subject, coder, index, latent, near=0)
    window = shown.groups[0].windows[0]
    at, row = window.position + window.focus, index.text.ids[window.row]
    seen = window_effect(subject, coder, index, latent, window, window.focus)
    assert subject.strings([int(row[at])])[0] == window.tokens[window.focus] == seen.token
    whole = token_effect(subject, coder, torch.tensor(row.astype(np.int64))[None], at, latent, 1.0)
    assert seen.loss_after == pytest.approx(whole.loss_after, abs=1e-5)
    same = np.flatnonzero(index.text.doc[window.row] == index.text.doc[window.row, at])
    assert seen.n_later == max(0, int(same[same >= at].max()) - at - 1)
    values = latent_on(subject, coder, torch.tensor(row.astype(np.int64))[None], latent)
    assert values[at] == pytest.approx(window.values[window.focus], abs=1e-4)
    for bad in (replace(window, row=None), window):
        with pytest.raises(InputError):
            window_effect(subject, coder, index, latent, bad, 99)


def test_heads_share_the_pre_activation(subject, bench):
    coder, ids = coder_at(subject, HOOKS[2]), subject.tokens(["The fox ran.", "The crow sat."])
    z = subject.run(ids, HOOKS[2])[HOOKS[2]].flatten(2)
    parts = head_parts(subject, coder, ids, [2, 3], 7)
    for i, at in enumerate((2, 3)):
        assert parts[i].sum() == pytest.approx(float(z[i, at] @ coder.W_enc[:, 7]), abs=1e-4)
    width = len(coder.W_enc) // subject.n_heads
    first = coder.W_enc.detach().clone()
    first[width:] = 0
    assert parts[0, 0] == pytest.approx(float(z[0, 2] @ first[:, 7]), abs=1e-4)
    assert heads(subject, *bench, bench[1].page(0)) == ()


def test_neurons_and_logits_are_of_the_decoder_row(subject):
    coder = coder_at(subject, HOOKS[0])
    with torch.no_grad():
        coder.dec[5] = F.one_hot(torch.tensor(33), coder.d_in) * 2.0
    found = neurons(coder, 5)
    assert found.rows[0].name == "neuron 1.33" and found.rows[0].value == pytest.approx(1) and found.rows[1].value == 0
    direct = 2 * subject.model.blocks[1].mlp.W_out[33].detach().float() @ subject.unembed()
    assert np.allclose(logit_effects(subject, coder, 5), direct, atol=1e-5)


def test_neighbours_are_ranked_among_all(subject, bench):
    coder, index = bench
    near = {each.title: each for each in neighbour_rankings(coder, index, 3, 4)}
    cosine = F.cosine_similarity(coder.W_dec[3:4], coder.W_dec, dim=1).detach()
    cosine[3] = -2
    assert [row.latent for row in near["nearest decoders"].rows] == cosine.topk(4).indices.tolist()
    assert "of 95" in near["nearest decoders"].unit


def test_every_latent_has_a_lawful_card_below_60_kb(subject, bench):
    coder, index = bench
    order = index.stats["count"].sort_values().index
    for latent in (int(order[0]), int(order[len(order) // 2]), int(order[-1])):
        made = card(subject, coder, index, latent)
        assert check_view(made) and len(made.to_html().encode()) <= 60_000
        families = [group.family for group in made.groups if group.windows]
        assert sorted(set(families), key=families.index) == [
            f for f in ("top", "rank", "value", "near") if f in families
        ]


@pytest.mark.parametrize("count", [0, 1])
def test_a_card_with_next_to_no_activations(subject, bench, count):
    coder, index = bench
    page = index.page(0)
    few = replace(
        page,
        stats={**page.stats, "count": count},
        top=page.top[:count],
        quantiles=page.quantiles[:count],
        values=(),
        near_misses=(),
    )
    fake = SimpleNamespace(
        page=lambda *a, **k: few, n_tokens=index.n_tokens, text=index.text, facts=index.facts, d_sae=index.d_sae
    )
    made = card(subject, coder, fake, 0, near=0)
    assert check_view(made) and made.state == ("rare" if count else "dead") and read_live(made) == []
    assert ("never fired" if not count else "little evidence") in made.to_html()


@pytest.mark.parametrize("text", ["", "a", "The fox", "<img src=x onerror=alert(1)>", "🦊\u202e"])
def test_any_text_can_be_tried(subject, bench, text):
    strip, facts = tried(subject, *bench, 3, text)
    assert check_view(strip) and np.isnan(strip.values[0]) and "fires on" in facts[0]
    assert len(strip.values) == subject.tokens(text).shape[1]


def test_a_text_that_is_too_long_is_refused(subject, bench):
    with pytest.raises(InputError):
        tried(subject, *bench, 3, "fox " * 5000)


def read_live(made):
    "What in live HTML is neither static HTML nor a mark for the script."
    allowed = ("class=", "data-", "tabindex=", "role=")
    return [each for each in read_html(live_html(made))[1] if not each.startswith(allowed)]


words = texts(5)
numbers = st.floats(width=32) | st.sampled_from([float("nan"), float("inf"), 0.0])
maybe = st.none() | numbers
row = st.builds(Row, words, numbers, maybe, maybe, words, st.none() | st.integers(0, 9))


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(words, numbers), max_size=5),
    st.builds(Ranking, words, st.lists(row, max_size=4).map(tuple), words, words, maybe),
    st.builds(Explanation, words, words, maybe, maybe, maybe, words, st.integers(0, 9)),
    st.sampled_from(["", "top", "rank", "value", "near"]),
)
def test_any_card_is_lawful_and_its_live_html_is_safe(pairs, ranked, said, family):
    tokens, values = tuple(t for t, _ in pairs), tuple(v for _, v in pairs)
    window = Window(tokens, values, None if not pairs else len(pairs) // 2, HOSTILE[1], 3, 0)
    made = LatentCard(
        3,
        {"count": 4, "density": 0.1},
        9,
        HOSTILE[5],
        activation_histogram([0, 1], [3]),
        None,
        (Group(HOSTILE[0], HOSTILE[1], (window,), family),),
        explanation=said,
        rankings=(ranked,),
        label=HOSTILE[1],
    )
    assert check_view(made) and read_live(made) == []


def test_any_effect_is_lawful():
    changes = tuple(Change(token, 0.5, float("nan")) for token in HOSTILE)
    check_view(
        TokenEffect(
            1,
            HOSTILE[0],
            float("nan"),
            HOSTILE[1],
            1.0,
            float("inf"),
            changes,
            changes,
            None,
            0,
            (1.0, -2.0),
            HOSTILE[5],
        )
    )
    check_view(TokenEffect(1, "", 0.0))


def test_setting_the_latent_opens_its_card_and_says_why_not(subject, bench):
    coder, index = bench
    widget = live_card(
        subject, coder, index, 4, explain=lambda latent: Explanation(f"number {latent}") if latent == 9 else None
    )
    widget.latent = 9
    assert widget.view.latent == 9 and "number 9" in widget.html and widget.problem == ""
    widget.latent = 4_000
    assert widget.view.latent == 9 and "0 to 95" in widget.problem
    widget.latent = 9
    assert widget.problem == ""
    alone = CardWidget(widget.view)
    alone.latent = 3
    assert alone.size == 0 and alone.view.latent == 9 and "alone" in alone.problem
    assert "<img src=x" not in standalone(widget)


def test_answers_are_about_the_latent_that_is_shown(subject, bench):
    widget = live_card(subject, *bench, latent=4)
    for latent in (4, 11):
        widget.latent = latent
        group = next(i for i, each in enumerate(widget.view.groups) if each.windows)
        assert widget.answers["effect"](group=group, window=0, token=0).latent == latent
    with pytest.raises(InputError):
        widget.answers["effect"](group=99, window=0, token=0)


def test_bands_are_named_by_how_they_were_cut(bench):
    index = bench[1]
    latent = int(index.stats["count"].idxmax())
    groups = page_groups(index.page(latent, sizes=SIZES), 7, 2, 5, 2)
    count = int(index.stats["count"][latent])
    for family in ("rank", "value"):
        mine = [group for group in groups if group.family == family and group.windows]
        shares = [int(group.note.split("n = ")[1].split(" ")[0].replace(",", "")) for group in mine]
        assert sum(shares) == count
    values = [group for group in groups if group.family == "value" and group.windows]
    assert values[0].name == "4/5 to 5/5 of max"


def test_numbers_of_a_column_share_their_decimals():
    assert (
        [even(x, 1.5) for x in (1.5, 0.25, -0.5)] == ["1.50", "0.25", "-0.50"]
        and even(1e-9, 1.5) == "1e-9"
        and even(3, 5000) == "3"
    )
    made = ranking([{"name": "a", "value": 0.5, "low": 0.4, "high": 0.6}], "t", full=1)
    assert (
        bar(SOLID, 0.4) in ranking_html(made)
        and bar(LIGHT, 0.2, 0.4) in ranking_html(made)
        and evidence(Explanation("x", score=0.5)) == "score 0.5"
    )
