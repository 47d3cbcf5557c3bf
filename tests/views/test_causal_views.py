"Scatter, heatmap and dose-response: lawful for any numbers and any text, small, and equal to what they were given."
import json
import math

import numpy as np
import pandas as pd
import pytest
from hostile import HOSTILE, texts
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from sae_lab.ground.errors import InputError, ShapeError, UnknownName
from sae_lab.views.dose import COLUMNS, DoseCurve, DoseView
from sae_lab.views.heatmap import HeatmapView, HeatmapWidget, grid_of, heatmap, packed, scale, sure
from sae_lab.views.payload import check_view, read_html
from sae_lab.views.scatter import SPOTS, ScatterView, drawable, rank_correlation, scatter, spots
from sae_lab.views.svg import Frame
from sae_lab.views.widget import standalone

quick = settings(deadline=None, max_examples=40)
words = texts(12)
numbers = st.floats(width=32) | st.sampled_from([0.0, 0, 1, -1.0, math.nan, math.inf, -math.inf, 1e308, 1e-300])
maybe = st.none() | numbers


def many(draw, n, kind=numbers):
    return tuple(draw(st.lists(kind, min_size=n, max_size=n)))


def either(draw, n, kind=numbers):
    "As many, or none."
    return many(draw, n, kind) if draw(st.booleans()) else ()


@st.composite
def scatters(draw):
    n = draw(st.integers(0, 14))
    rank, low, high = (draw(maybe) for _ in range(3))
    return ScatterView(many(draw, n), many(draw, n), either(draw, n, words), either(draw, n, words), rank, low, high,
                       *(draw(words) for _ in range(6)), draw(st.integers(0, 8)))


@st.composite
def heatmaps(draw):
    n = [draw(st.integers(0, 4)) for _ in range(3)]
    cells, spread = n[0] * n[1] * n[2], draw(st.booleans())
    names = [many(draw, each, words) for each in n]
    low, high = (many(draw, cells) if spread else () for _ in range(2))
    return HeatmapView(names[1], names[2], many(draw, cells), names[0], low, high, draw(st.integers(0, 99)),
                       draw(st.integers(0, max(0, n[0] - 1))), quantity=draw(words), unit=draw(words), null=draw(maybe),
                       title=draw(words), note=draw(words))


@st.composite
def doses(draw):
    n = draw(st.integers(0, 9))
    curves = []
    for _ in range(draw(st.integers(0, 3))):
        pairs = [(many(draw, n), many(draw, n)) if draw(st.booleans()) else ((), ()) for _ in range(2)]
        curves.append(DoseCurve(draw(words), many(draw, n), *pairs[0], either(draw, n), *pairs[1], draw(maybe),
                                draw(words)))
    natural = draw(st.lists(st.tuples(numbers, numbers), max_size=4))
    marks = draw(st.lists(st.tuples(words, numbers), max_size=3))
    sizes = draw(st.integers(0, 9)), draw(st.integers(0, 9))
    return DoseView(many(draw, n), tuple(curves), tuple(natural), tuple(marks), *sizes, draw(words), draw(words),
                    draw(words))


@quick
@given(scatters() | heatmaps() | doses())
def test_anything_is_lawful(view):
    check_view(view)
    html = view.to_html()
    assert "<script" not in html and "<img" not in html and 'NaN"' not in html
    assert "nan" not in html.replace("aria-label", "").split("<svg")[0]
    assert len(html.encode()) < 60_000
    html.encode("utf-8")


@quick
@given(heatmaps())
def test_any_heatmap_lives(view):
    widget = HeatmapWidget(view)
    assert len(widget.numbers) == 12 * len(view.values)
    json.dumps(widget.facts, allow_nan=False)
    page = standalone(widget)
    assert page.count("</script>") == 2 and page.encode("utf-8", errors="strict")


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_names_are_text(text):
    both, all_ = {"title": text, "note": text}, [text, text]
    curve = DoseCurve(text, (1.0, 2.0), unit=text)
    made = [scatter([1.0, 2.0], [1.0, 2.0], all_, all_, over=text, x_label=text, unit=text, **both),
            HeatmapView((text,), (text,), (-1.0,), (text,), (-2.0,), (-0.5,), quantity=text, unit=text, **both),
            DoseView((0.0, 1.0), (curve,), ((0.9, 0.5),), ((text, 0.5),), **both)]
    for view in made:
        check_view(view)
        assert "<script" not in view.to_html() and "<img" not in view.to_html() and len(view.to_html()) < 20_000


@quick
@given(st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), min_size=2, max_size=40))
def test_the_rank_correlation_is_scipys(pairs):
    one, two = ([float(each[i]) for each in pairs] for i in (0, 1))
    found = rank_correlation(one, two)
    if len(set(one)) == 1 or len(set(two)) == 1: assert math.isnan(found)
    else: assert np.isclose(found, spearmanr(one, two).statistic)


def test_what_is_not_finite_is_left_out_and_counted():
    view = scatter([1.0, math.nan, 2.0, 3.0], [1.0, 2.0, math.inf, 5.0])
    assert drawable(view) == [0, 3] and "n = 2, 2 left out: not finite" in view.to_html() and view.rank == 1.0
    assert "not known" in scatter([1.0], [2.0]).to_html() and "nothing to draw" in scatter([], []).to_html()


def test_many_points_stay_a_small_file():
    draw = np.random.default_rng(0).normal(size=(2, 50_000))
    view = scatter(draw[0], draw[0] + draw[1], range(50_000), ["latent"] * 49_000 + ["error"] * 1_000)
    assert len(view.to_html().encode()) < 60_000 and "n = 50,000" in view.to_html()
    found = spots(Frame((-5, 5), (-5, 5)), *draw.tolist())
    assert len(found) <= SPOTS and sum(found.values()) == 50_000


def test_a_heatmap_of_a_frame_keeps_every_value():
    ends = {"low": 1.0, "high": 2.0}
    rows = [{"layer": layer, "position": at, "latent": f"f{j}", "effect": 100 * j + 10 * layer + at} | ends
            for layer in range(3) for at in (5, 6) for j in range(2)]
    view = heatmap(pd.DataFrame(rows), choice="latent", n=7)
    assert view.choices == ("f0", "f1") and view.down == ("0", "1", "2") and view.along == ("5", "6") and view.n == 7
    for row in view.rows():
        assert row["value"] == 100 * int(row["latent"][1]) + 10 * int(row["layer"]) + int(row["position"])
    assert grid_of(view, 1).tolist() == [[105, 106], [115, 116], [125, 126]] and sure(view).all() and scale(view) == 126
    lacking = heatmap(rows[:-1], choice="latent")
    assert math.isnan(grid_of(lacking, 1)[2, 1])
    assert "?" in read_html(heatmap(rows[:-1], choice="latent", chosen=1).to_html())[0]
    with pytest.raises(UnknownName): heatmap(rows, down="layers")
    assert heatmap([]).values == ()


def test_a_heatmap_says_what_it_marks():
    view = HeatmapView(("0",), ("a", "b"), (0.5, -0.25), ("",), (0.4, -0.3), (0.6, 0.1), n=64, null=0.1, unit="logits")
    assert sure(view).tolist() == [[True, False]]
    text = read_html(view.to_html())[0]
    for said in ("n = 64 prompts", "controls reach 0.1", "framed", "0.5 (0.4 to 0.6) logits"): assert said in text


def test_bad_input_is_refused():
    with pytest.raises(ShapeError): ScatterView((1.0,), (1.0,), ("a", "b"))
    with pytest.raises(ShapeError): HeatmapView(("a",), ("b",), (1.0,), ("",), (0.0,))
    with pytest.raises(InputError, match="grid 3"): HeatmapView(("a",), ("b",), (1.0,), chosen=3)
    with pytest.raises(InputError, match="alike"): HeatmapView(("a",), ("b",), (1.0,), down_label="x", along_label="x")
    with pytest.raises(ShapeError): DoseView((0.0,), (DoseCurve("x", (1.0, 2.0)),))
    with pytest.raises(ShapeError): DoseView((0.0,), (DoseCurve("x", (1.0,), control_low=(1.0,)),))


def test_a_cell_is_found_by_its_place():
    view = HeatmapView(("0", "1"), ("a", "b", "c"), tuple(map(float, range(12))), ("x", "y"))
    widget = HeatmapWidget(view)
    assert widget.cell is None
    widget.selected = [1, 2, 1]
    assert widget.cell == {"latent": "y", "layer": "1", "position": "c", "value": 11.0, "low": None, "high": None}
    widget.show(HeatmapView(("0",), ("a",), (1.0,)))
    assert widget.selected == [] and np.frombuffer(widget.numbers, "<f4")[0] == 1.0
    assert packed(view)["facts"]["scale"] == 11.0


def test_a_dose_says_its_ends_and_its_natural_range():
    curve = DoseCurve("KL", (0.0, 0.5, math.nan), (0.0, 0.4, math.nan), (0.0, 0.6, math.nan), (0.0, 0.1, 0.2),
                      base=0.0, unit="nats")
    view = DoseView((0.0, 1.0, 2.0), (curve,), ((0.5, 0.4), (0.99, 1.2)), (("0.1 nats", 0.6),), 64, 16)
    text = read_html(view.to_html())[0]
    assert "over 64 prompts" in text and "controls, 16" in text and "50 %" in text and "0.1 nats" in text
    assert "KL: 0 at strength 0, 0.5 at 1" in view.to_text() and set(COLUMNS) - {"values"} < set(view.rows()[0])
