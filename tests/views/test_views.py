"Every view is lawful, whatever the tokens say and whatever the numbers are; hostile text is shown as text."
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from hostile import HOSTILE, texts
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_lab.ground.errors import InputError
from sae_lab.ground.html import escape
from sae_lab.views.card import Group, LatentCard, Window, latent_card
from sae_lab.views.curves import Curve, TrainingCurves, thin, training_curves
from sae_lab.views.histograms import HistogramChart, activation_histogram, density_histogram, sparkline
from sae_lab.views.logits import LogitTable, logit_table
from sae_lab.views.payload import check_view, page, read_html, token_text, views
from sae_lab.views.svg import nice_ticks
from sae_lab.views.tokens import TokenStrip, shade, token_html

quick = settings(deadline=None, max_examples=40)
words = texts(12)
numbers = st.floats(width=32) | st.sampled_from([0.0, 0, 1, -1.0, math.nan, math.inf])


@st.composite
def strips(draw):
    tokens = tuple(draw(st.lists(words, max_size=12)))
    values = tuple(draw(st.lists(numbers, min_size=len(tokens), max_size=len(tokens))))
    return TokenStrip(tokens, values, draw(st.none() | st.floats(0, 10)), draw(st.none() | st.integers(0, 12)),
                      draw(words), draw(words), draw(words))


@pytest.mark.parametrize("name", views.names())
def test_registered_views_are_lawful(name):
    example = views[name].meta["example"]()
    assert isinstance(example, views[name].value) or type(example).__name__ == views[name].value.__name__
    assert check_view(example) == ["frozen", "json", "html", "text", "rows", "pure", "again"]


def test_every_kind_of_view_is_registered():
    wanted = {"card", "curves", "effect", "histogram", "labels", "logits", "prompt", "splitting", "tokens"}
    assert wanted <= set(views.names())


@quick
@given(strips())
def test_any_strip_is_lawful(strip):
    check_view(strip)


@quick
@given(strips())
def test_a_strip_shows_every_token(strip):
    shown = read_html(strip.to_html())[0]
    whole = "".join(token_text(token) for token in strip.tokens)
    assert whole in shown


@pytest.mark.parametrize("token", HOSTILE)
def test_hostile_tokens_are_text_in_every_view(token):
    window = Window((token, " a"), (1.5, 0.0), 0, token, 3)
    table = LogitTable((token,), (1.0,), (token,), (-1.0,), token, token)
    chart = HistogramChart((0.0, 1.0), (3,), token, token, token, 2, token, note=token)
    made = [TokenStrip((token, token), (1.0, -1.0), None, 0, token, token, token), table, chart,
            LatentCard(1, {"count": 3, "density": 0.5}, 6, token, chart, table, (Group(token, token, (window,)),)),
            TrainingCurves((1, 2), (Curve(token, token, (1.0, 2.0)),), (), token, ((token, token),))]
    for view in made:
        check_view(view)
        assert "<script" not in view.to_html() and "<img" not in view.to_html() and len(view.to_html()) < 12_000
    html = page(made, token)
    html.encode("utf-8")
    assert html.count("<script") == 0 and escape(token[:5]) in html


def test_long_tokens_say_how_long_they_are():
    assert "10,000 characters" in TokenStrip(("x" * 10_000,), (1.0,)).to_html()


def test_tokens_are_told_apart():
    strip = TokenStrip(("a", "b", "c", "d"), (1.0, 1.0, 0.0, 0.0))
    assert strip.to_html().count("<b style=\"background:#e70d\" title=\"1\">") == 2
    assert "cd" in strip.to_html()  # silent ones are merged


@quick
@given(st.floats(-10, 10), st.floats(0.1, 10))
def test_shades_rise_with_the_activation(value, scale):
    half, whole = shade(value / 2, scale), shade(value, scale)
    if value / 2: assert int(half[-1], 16) <= int(whole[-1], 16) and half[:-1] == whole[:-1]
    assert shade(0.0, scale) == shade(math.nan, scale) == shade(value, 0.0) == ""


@pytest.mark.parametrize("detail", [2, 1, 0, -1, -2])
def test_every_detail_keeps_the_text(detail):
    tokens, values = [" a", "<b>", "\n", " d"] * 5, [0.0, 3.0, -1.0, 0.2] * 5
    text, wrong = read_html(token_html(tokens, values, 3.0, 4, detail))
    assert not wrong and text == "".join(map(token_text, tokens))


@quick
@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=40), st.booleans(), st.booleans(), words)
def test_any_histogram_is_lawful(counts, log_counts, log_x, text):
    edges = tuple(np.linspace(-3, 1, len(counts) + 1).tolist())
    chart = HistogramChart(edges, tuple(counts), text, text, text, 5, text, log_counts, log_x, note=text)
    check_view(chart)
    assert chart.to_html().count("<rect") == sum(count > 0 for count in counts)
    assert sum(row["count"] for row in chart.rows()) == sum(counts) + (5 if text else 0)


densities = st.lists(st.sampled_from([0.0, 1e-9, 1e-6, 1e-3, 0.5, 1.0]), min_size=1, max_size=60)


@quick
@given(densities, st.none() | st.integers(1, 10**7))
def test_density_histograms_lose_no_latent(density, tokens):
    chart = density_histogram(density, tokens)
    assert sum(chart.counts) + chart.apart == len(density) and chart.apart == density.count(0.0)
    check_view(chart)


def test_charts_of_nothing():
    for chart in (activation_histogram([0, 1], [0]), density_histogram([0.0, 0.0], 10), density_histogram([1.0], 1),
                  LogitTable((), ()), TrainingCurves((), ()), training_curves([]), TokenStrip((), ()),
                  LatentCard(0, {}), LatentCard(0, {"count": 0, "density": 0.0}, groups=(Group("none"),))):
        check_view(chart)
    assert sparkline([]) == "" and sparkline([0, 0]) == "  "


@quick
@given(st.lists(st.tuples(words, numbers), max_size=8), st.lists(st.tuples(words, numbers), max_size=8))
def test_any_logit_table_is_lawful(up, down):
    check_view(LogitTable(tuple(t for t, _ in up), tuple(v for _, v in up), tuple(t for t, _ in down),
                          tuple(v for _, v in down)))


def test_logit_table_cuts_out_both_ends():
    effects = np.random.default_rng(0).normal(size=200)
    table = logit_table(effects, [str(i) for i in range(200)], k=7)
    order = np.argsort(-effects)
    assert table.promoted == tuple(str(i) for i in order[:7])
    assert table.suppressed == tuple(str(i) for i in order[::-1][:7])


coder_quantities = st.tuples(words, st.sampled_from(["fvu", "l0", "<x>"]))


@quick
@given(st.lists(coder_quantities, unique=True, max_size=4), st.integers(0, 5), st.data())
def test_any_curves_are_lawful(pairs, n, data):
    values = st.lists(numbers, min_size=n, max_size=n).map(tuple)
    check_view(TrainingCurves(tuple(range(n)), tuple(Curve(c, q, data.draw(values)) for c, q in pairs)))


def test_curves_are_collected_from_events():
    events = [SimpleNamespace(path="saved")] + [
        SimpleNamespace(tokens=10 * i, losses={"a": {"fvu": 1 / i}, **({"b": {"l0": 3.0}} if i > 1 else {})},
                        density={"a": [i, 1, 2, 3]}) for i in (1, 2, 4)]
    run = training_curves(events, edges=(-3, -2, -1, 0))
    assert run.tokens == (10, 20, 40) and run.coders == ("a", "b")
    assert run.curves[0].values == (1.0, 0.5, 0.25) and math.isnan(run.curves[1].values[0])
    assert run.densities[0].dead == (1, 2, 4) and run.densities[0].counts[0] == (1, 2, 3)
    assert json.loads(run.to_json())["curves"][1]["values"] == [None, 3.0, 3.0]
    log = [json.loads(json.dumps(vars(each))) for each in events]
    assert training_curves(log, edges=(-3, -2, -1, 0)).to_html() == run.to_html()


def test_a_long_run_stays_small():
    events = [SimpleNamespace(tokens=i, losses={n: {"fvu": 1 / i} for n in "abc"},
                              density={n: list(range(29)) for n in "abc"}) for i in range(1, 2000)]
    run = training_curves(events, edges=[-7 + i / 4 for i in range(29)])
    assert len(run.to_html()) < 250_000 and len(thin(2000)) == 60


def example(n, active, seed, focus=10):
    draws = np.random.default_rng(seed)
    values = np.abs(draws.normal(0, 2, n)) * (draws.random(n) < active)
    words = [" fox", "ing", "\n", " the", " lantern", "</b>", " Ġ", ",", " quick", "🦊"]
    return SimpleNamespace(strings=tuple(words[i] for i in draws.integers(0, len(words), n)), activations=tuple(values),
                           focus=focus, document=f"fables/{seed}", start=seed)


def index_page(active):
    made = [example(21, active, i) for i in range(27)]
    stats = {"count": 1234, "docs": 321, "density": 0.0123, "density_low": 0.012, "density_high": 0.0126, "mean": 1.2,
             "std": 1.0, "max": 9.0, "negative": 0.0}
    bands = [SimpleNamespace(low=i, high=i + 1, count=123, examples=made[7 + 2 * i:9 + 2 * i]) for i in range(10)]
    return SimpleNamespace(latent=7, stats=stats, edges=np.linspace(0, 9, 41), counts=np.arange(40), top=made[:7],
                           quantiles=bands, near_misses=made[:3])


@pytest.mark.parametrize("active", [0.02, 0.1, 0.3, 0.6, 1.0])
def test_a_card_of_27_windows_is_below_20_kb(active):
    logits = logit_table(np.linspace(-3, 3, 40), [f" token{i}" for i in range(40)], k=8)
    card = latent_card(index_page(active), logits, 1.0, 100_000, "blocks.1.mlp.hook_post of the bundled subject")
    assert sum(len(group.windows) for group in card.groups) == 27
    assert len(card.to_html().encode()) <= 20_000
    check_view(card)


def test_a_card_names_its_groups_honestly():
    card = latent_card(index_page(0.1), near_misses=3)
    names = [group.name for group in card.groups]
    assert names[:3] == ["strongest", "by rank of activation", "90 to 100 %"] and names[-1] == "silent"
    text = card.to_text()
    assert "biased" in text and "uniform samples" in text and "n = 123 (10 %)" in text


def test_a_page_without_examples_makes_a_card():
    empty = SimpleNamespace(latent=1, stats={"count": 0, "density": 0.0}, edges=(0.0, 1.0), counts=(0,), top=(),
                            quantiles=(), near_misses=())
    card = latent_card(empty, tokens=1000)
    check_view(card)
    assert card.state == "dead" and "never fired" in card.to_html()


some_stats = st.dictionaries(st.sampled_from(["count", "density", "max", "mean"]), st.floats(0, 9))


@quick
@given(st.lists(strips(), max_size=4), some_stats)
def test_any_card_is_lawful(made, stats):
    windows = tuple(Window(strip.tokens, strip.values, None, strip.title) for strip in made)
    check_view(LatentCard(3, stats, groups=(Group("all", "", windows),)))


def test_mismatched_payloads_are_refused():
    for wrong in (lambda: TokenStrip(("a",), ()), lambda: HistogramChart((0.0,), ()),
                  lambda: TrainingCurves((1,), (Curve("a", "b", ()),))):
        with pytest.raises(InputError): wrong()


@quick
@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9), st.integers(1, 8))
def test_ticks_are_few_and_inside(low, span, n):
    ticks = nice_ticks(low, low + span, n)
    slack = 1e-6 * span + 1e-12 * abs(low)  # what float64 can tell apart
    assert len(ticks) <= n + 2 and all(low - slack <= t <= low + span + slack for t in ticks)


@pytest.mark.parametrize("html, wrong", [("<p onclick='x()'>a</p>", True), ("<a href='http://x'>a</a>", True),
                                         ("<svg><script>1</script></svg>", True), ("<p>", True), ("</p>", True),
                                         ("<p style='background:url(http://x)'>a</p>", True), ("<p>a</p>", False),
                                         ("<iframe></iframe>", True), ("<img src='data:,x'>", True)])
def test_the_reader_knows_what_acts(html, wrong):
    assert bool(read_html(html)[1]) == wrong
