"Concept tables hold for hostile names, undefined scores, too little evidence and thousands of entries."
import math

import numpy as np
import pandas as pd
import pytest
from hostile import texts
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_lab.views.labels import EMPTY, KEEP, ConceptTable, Overlap, concept_table, scale, sure
from sae_lab.views.payload import check_view, read_html, token_text

words = texts(12)
numbers = st.none() | st.floats(width=32) | st.sampled_from([0.0, 1, -1.0, math.nan, math.inf, -math.inf])
counts = st.integers(0, 10**9)
overlaps = st.builds(Overlap, words, words, numbers, numbers, numbers, numbers, numbers, numbers, numbers,
                     counts, counts, counts, counts)


@settings(deadline=None, max_examples=60)
@given(st.lists(overlaps, max_size=4), words, st.sampled_from(["mcc", "iou", "f1", "lift", "recall"]), counts,
       st.none() | counts, words)
def test_any_table_is_lawful(entries, title, by, tokens, of, note):
    table = ConceptTable(title, tuple(entries), by, tokens, of, note)
    check_view(table)
    html = table.to_html()
    assert "<script" not in html and "<img" not in html and len(html) < 12_000
    assert all(token_text(each.name, 60) in read_html(html)[0] for each in entries)


def bar(table):
    "Ends of the drawn bars as shares of their width."
    import re

    return [float(x) / 70 for x in re.findall(r'<rect x="1" y="3" width="([-\d.]+)"', table.to_html())]


def test_bars_have_the_length_of_the_score():
    table = ConceptTable("t", tuple(Overlap(f"c{v}", score=v) for v in (1.0, .5, 0.0, -.3)))
    assert bar(table) == pytest.approx([1, .5, 0, 0], abs=.015)
    lift = ConceptTable("t", (Overlap("a", score=8.0, low=6.0, high=16.0), Overlap("b", score=4.0)), "lift")
    assert scale(lift) == 16 and bar(lift) == pytest.approx([.5, .25], abs=.015)


def test_chance_and_the_unknown_are_said():
    table = ConceptTable("t", (Overlap("good", score=.6, low=.5, high=.7, null=.2), Overlap("bad", score=.1, null=.2)))
    html, text = table.to_html(), table.to_text()
    assert html.count("within chance") == text.count("within chance") == 1
    assert "0.60 (0.50 to 0.70)" in html and "0.10 (interval unknown)" in html
    assert sure(Overlap("a", score=math.nan)).startswith("NaN")
    unknown = ConceptTable("t", (Overlap("rare", score=.6, low=.5, high=.7, null=math.nan),))
    assert "chance –" in unknown.to_html() and "chance –" in unknown.to_text() and "NaN" not in unknown.to_html()
    assert EMPTY in ConceptTable("t").to_html() and EMPTY in ConceptTable("t").to_text()


def test_many_entries_say_how_many_and_stay_small():
    entries = tuple(Overlap(f"latent {i}", "", .5, .4, .6, .2, both=9, fires=9, size=9) for i in range(3000))
    table = ConceptTable("t", entries)
    assert "first 50 of 3,000" in table.to_html() and "latent 49<" in table.to_html()
    assert "latent 50<" not in table.to_html() and len(table.to_html()) < 60_000
    assert len(table.rows()) == 3000 and KEEP == 50


def frame(n):
    g = np.random.default_rng(0)
    made = pd.DataFrame({"latent": np.arange(n), "concept": [f"c{i}" for i in range(n)], "kind": "label", "n": 1000})
    for key in ("both", "fires", "size", "docs"):
        made[key] = g.integers(1, 100, n)
    for name in ("mcc", "f1", "precision", "recall"):
        for end in ("", "_low", "_high", "_null", "_p"):
            made[name + end] = g.random(n)
    return made


def test_frames_become_tables():
    found = frame(4)
    labels, latents = concept_table(found), concept_table(found, "f1", "latent", of=300, note="steps of a union")
    assert [each.name for each in labels.entries] == found.concept.tolist() and labels.title == "labels of latent 0"
    assert [each.name for each in latents.entries] == [f"latent {i}" for i in range(4)]
    assert [each.score for each in latents.entries] == found.f1.tolist() and latents.title == "latents of c0"
    assert [each.null for each in labels.entries] == found.mcc_null.tolist() and labels.tokens == 1000
    assert "first 4 of 300" in latents.to_html() and "steps of a union" in latents.to_html()
    steps = concept_table(found.drop(columns=["concept", "kind", "docs"]), "f1", "latent", "union for c0")
    assert steps.title == "union for c0" and steps.entries[0].docs == 0
    for each in (labels, latents, steps, concept_table(found[:0]), concept_table(found[:0], name="latent")):
        check_view(each)
