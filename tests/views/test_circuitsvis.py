"CircuitsVis by one adapter: one bundle, nothing from outside, text that stays text."
import json
import math
import re

import numpy as np
import pytest
import torch
from hostile import HOSTILE

from sae_lab.ground.errors import InputError, Unavailable
from sae_lab.sources.subject import Subject
from sae_lab.views import circuitsvis
from sae_lab.views.circuitsvis import (
    AttentionView, CircuitsWidget, NeuronsView, circuits_page, numbers, props, resting, strongest)
from sae_lab.views.payload import check_view
from sae_lab.views.widget import reply
from sae_lab.workbench.attention import attention, neurons


def pattern(n, heads=2, seed=0):
    "Causal patterns whose rows sum to one."
    x = np.tril(np.random.default_rng(seed).random((heads, n, n)))
    return tuple(tuple(map(tuple, head)) for head in (x / x.sum(-1, keepdims=True)).tolist())


def test_views_hold_whatever_comes():
    "Hostile tokens, one token, none, numbers that are none."
    values = tuple(((float(i), math.nan, -math.inf),) for i in range(len(HOSTILE)))
    shown = [AttentionView(HOSTILE, pattern(len(HOSTILE)), HOSTILE[:2], HOSTILE[0]),
             AttentionView(("a",), pattern(1, 1)),
             NeuronsView(HOSTILE, values, (HOSTILE[0],), HOSTILE[:3], HOSTILE[1])]
    for view in shown:
        check_view(view)
        assert "<script" not in view.to_html() and "<img" not in view.to_html()
        json.dumps(props(view), ensure_ascii=False).encode()
        assert np.isfinite(numbers(view)).all()


def test_a_page_has_one_bundle_and_short_numbers():
    "12 heads of 64 tokens: a bundle and a few hundred kilobytes; no script in the data, no address to ask."
    tokens = tuple(f" t{i}" for i in range(64))
    view = AttentionView(tokens, pattern(64, 12))
    page = circuits_page([view, view, NeuronsView(HOSTILE, tuple(((1.0,),) for _ in HOSTILE), ("0",), ("0",))])
    assert page.count("var CircuitsVis=") == 1 and len(page) < 1_300_000 + 2 * 300_000
    assert not re.search(r"(src|href)=[\"']?http|unpkg|google\.com", page)
    data = re.search(r'id="sl-cv-data">(.*?)</script>', page, re.S)[1]
    assert "<" not in data and len(json.loads(data)) == 3
    numbers = json.dumps(json.loads(data)[0]["props"]["attention"])
    assert len(view.to_html()) < 60_000 and all(len(s) < 10 for s in re.findall(r"\d\.\d+", numbers))


def test_strongest_pairs_against_sorting():
    "As a plain sort over all cells finds them."
    view = AttentionView(tuple("abcdefgh"), pattern(8))
    cells = ((v, i, j) for i, row in enumerate(view.patterns[1]) for j, v in enumerate(row) if v > 0 and j)
    assert [(v, i, j) for i, j, v in strongest(view, 1)] == sorted(cells, reverse=True)[:3]
    assert abs(resting(view, 1) - np.mean([row[0] for row in view.patterns[1][1:]])) < 1e-12


def test_without_the_package_it_says_so(monkeypatch):
    "The bundle is refused with what to install; the static HTML does not need it."
    monkeypatch.setattr(circuitsvis, "find_spec", lambda name: None)
    with pytest.raises(Unavailable, match="circuitsvis"): circuitsvis.bundle()
    widget = CircuitsWidget(AttentionView(("a",), pattern(1, 1)))
    assert "pip install" in reply(widget.answers, {"id": 1, "ask": "bundle"})["error"] and "head 0" in widget.html


def test_the_bundle_is_not_in_the_widget():
    "It is asked for, so that a saved notebook does not carry it."
    widget = CircuitsWidget(AttentionView(("a", "b"), pattern(2)))
    assert len(str(widget._esm)) < 20_000 and len(reply(widget.answers, {"id": 1, "ask": "bundle"})["value"]) > 10**6
    with pytest.raises(InputError): AttentionView(("a",), pattern(2))


def test_patterns_against_queries_and_keys():
    "Softmax of scaled products of queries and keys, computed from the hooks' own activations."
    subject, text = Subject.bundled(), "The fox saw the crow and the crow saw the fox."
    ids, layer = subject.tokens(text), 1
    rotated = "rot_" if f"blocks.{layer}.attn.hook_rot_q" in subject.hooks else ""
    acts = subject.run(ids, [f"blocks.{layer}.attn.hook_{rotated}{each}" for each in "qk"])
    q, k = (each[0].reshape(ids.shape[1], -1, subject.model.cfg.d_head) for each in acts.values())
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = torch.einsum("ihd,jhd->hij", q, k) / subject.model.cfg.d_head ** .5
    hidden = torch.ones(ids.shape[1], ids.shape[1]).triu(1).bool()
    want = scores.masked_fill(hidden, -math.inf).softmax(-1)
    np.testing.assert_allclose(numbers(attention(subject, text, layer).view), want.numpy(), atol=1e-3)


def test_layers_reach_python():
    "The trait is what the script sets; one-token prompts hold."
    subject = Subject.bundled()
    for make in (attention, neurons):
        widget = make(subject, "fox")
        widget.layer = 1
        assert "layer 1" in widget.view.title and widget.layers == [f"layer {i}" for i in range(subject.n_layers)]
        check_view(widget.view)
        with pytest.raises(InputError): make(subject, "fox", layer=99)
