"The table of latents: lawful whatever it holds, within its budget, ordered as said, sent whole to the browser."

import json
import math

import numpy as np
import pytest
from hostile import HOSTILE, texts
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_lab.ground.errors import InputError, UnknownName
from sae_lab.views.browser import SEP, BrowserWidget, Column, LatentTable, known, ordered, packed
from sae_lab.views.payload import check_view, read_html, token_text

maybe = st.none() | texts(8) | st.just(SEP)
numbers = st.none() | st.floats(width=32) | st.integers(0, 10**7) | st.sampled_from([math.nan, math.inf, -math.inf, 0])


@st.composite
def tables(draw):
    n = draw(st.integers(0, 6))
    number = tuple(draw(st.lists(numbers, min_size=n, max_size=n)))
    words = [tuple(draw(st.lists(maybe, min_size=n, max_size=n))) for _ in range(3)]
    columns = (
        Column("a", number, bar=draw(st.sampled_from(["", "linear", "log"])), note=draw(maybe) or ""),
        *(Column(f"b{i}", w, kind) for i, (w, kind) in enumerate(zip(words, ("text", "tokens", "shape")))),
    )
    return LatentTable(
        tuple(range(n)), columns, draw(maybe) or "", draw(maybe) or "", draw(st.sampled_from(["", "a", "latent", "b0"]))
    )


@settings(deadline=None, max_examples=60)
@given(tables())
def test_any_table_is_lawful_and_sent_whole(table):
    check_view(table)
    order = ordered(table)
    assert sorted(order) == list(range(len(table.latents)))
    sent = packed(table)
    assert np.frombuffer(sent["latents"], "<i4").tolist() == list(table.latents)
    block = np.frombuffer(sent["numbers"], "<f4")
    given_numbers = np.array([math.nan if v is None else v for v in table.columns[0].values], "<f4")
    assert np.array_equal(block, given_numbers, equal_nan=True)
    assert [len(column) for column in json.loads(sent["words"])] == [len(table.latents)] * 3


@settings(deadline=None, max_examples=40)
@given(st.lists(numbers, max_size=30))
def test_largest_first_and_unknown_last(values):
    table = LatentTable(tuple(range(len(values))), (Column("a", tuple(values)),), sort="a")
    shown = [values[i] for i in ordered(table)]
    some = [v for v in shown if known(v)]
    assert some == sorted(some, reverse=True) and not any(known(v) for v in shown[len(some) :])


@pytest.mark.parametrize("token", HOSTILE)
def test_hostile_tokens_are_text(token):
    column = (SEP.join([token] * 6),) * 60
    table = LatentTable(
        tuple(range(60)), (Column("t", column, "tokens"), Column(token or "x", (token,) * 60, "text")), token, token
    )
    check_view(table)
    html = table.to_html()
    assert "<script" not in html and "<img" not in html and len(html.encode()) < 60_000
    assert packed(table)["title"] == token_text(token, 160)


def test_shares_are_shown_in_percent_and_kept_as_shares():
    table = LatentTable((0, 1, 2), (Column("density", (0.00905, 0.5, None), unit="%"),), sort="density")
    assert "0.905 %" in table.to_html() and "50 %" in table.to_text() and table.to_text().endswith("–")
    assert table.rows()[0]["density"] == 0.00905 and packed(table)["columns"][0]["unit"] == "%"
    with pytest.raises(UnknownName): Column("a", (1.0,), unit="m")


def test_static_html_says_how_many():
    n = 16_384
    table = LatentTable(tuple(range(n)), (Column("count", tuple(range(n)), bar="log"),), "big", sort="count")
    text = read_html(table.to_html())[0]
    assert "16,384 latents, 50 shown" in text and "16383" in text and table.to_html().count("<tr>") == 50


def test_wrong_tables_are_refused():
    with pytest.raises(InputError):
        LatentTable((1,), (Column("a", (1.0, 2.0)),))
    with pytest.raises(InputError):
        LatentTable((1,), (Column("a", (1.0,)), Column("a", (1.0,))))
    with pytest.raises(InputError):
        Column("a", (1.0,), "text")
    with pytest.raises(UnknownName):
        Column("a", (1.0,), "colour")
    with pytest.raises(UnknownName):
        LatentTable((1,), (Column("a", (1.0,)),), sort="b")


def test_the_widget_keeps_what_a_person_chose():
    table = LatentTable((3, 5), (Column("a", (1.0, 2.0)),), sort="a")
    widget = BrowserWidget(table, selected=5, pinned=[3], filters={"a": "> 1"})
    assert widget.found == [5, 3]
    widget.show(LatentTable((7, 8, 9), (Column("a", (1.0, 2.0, 3.0)),)))
    assert (
        widget.selected == 5 and widget.pinned == [3] and widget.filters == {"a": "> 1"} and widget.found == [7, 8, 9]
    )
