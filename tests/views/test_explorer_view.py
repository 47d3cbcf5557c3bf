"Families, the splitting view and the explorer: equal to a naive walk, lawful for any numbers and any text."

import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hostile import HOSTILE
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_lab.ground.errors import InputError
from sae_lab.views.explorer import SENT, ExplorerWidget, explorer_example, follow_path, packed, path_of
from sae_lab.views.family import COLUMNS, bands, example_splitting, family, find, ladder, main_parents, ranks
from sae_lab.views.payload import check_view, read_html
from sae_lab.views.splitting import outer, ports, splitting_view, stage, walk
from sae_lab.views.widget import standalone

quick = settings(deadline=None, max_examples=40)
numbers = st.floats(-1, 1) | st.sampled_from([0.0, 1.0, math.nan])
EMPTY = pd.DataFrame({"evidence": [], "null": [], "draws": [], "q50": [], "q95": [], "q99": [], "max": []})


def made_of(sizes, edges, nulls=EMPTY, means=None):
    "A splitting of given edges, as `ladder` reads it."
    frame = pd.DataFrame(edges, columns=list(COLUMNS))
    means = pd.DataFrame(means or [], columns=["level", "size", "mean", "low", "high", "n"])
    return SimpleNamespace(
        names=tuple(f"d{size}" for size in sizes),
        sizes=tuple(sizes),
        edges=frame,
        nulls=nulls,
        states=None,
        fdr=0.05,
        children_per_latent=lambda: means,
    )


@st.composite
def splittings(draw):
    "Small dictionaries with any edges and any evidence."
    sizes = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    pairs = [
        (level, a, b) for level in range(len(sizes) - 1) for a in range(sizes[level]) for b in range(sizes[level + 1])
    ]
    chosen = draw(st.lists(st.sampled_from(pairs), max_size=30, unique=True)) if pairs else []
    rows = [
        (
            *pair,
            *(draw(numbers) for _ in range(4)),
            draw(st.integers(0, 9999)),
            draw(numbers),
            draw(numbers),
            draw(st.booleans()),
        )
        for pair in chosen
    ]
    return made_of(sizes, rows)


def naive_kin(splitting, level, latent, step):
    "Every relative on one side, level by level."
    found, own = set(), {latent}
    while own:
        edges = splitting.edges[splitting.edges.shown.astype(bool)]
        near = edges[edges.level == (level if step > 0 else level - 1)]
        own = set(near.child[near.parent.isin(own)]) if step > 0 else set(near.parent[near.child.isin(own)])
        level += step
        found |= {(level, int(each)) for each in own}
    return found


@quick
@given(splittings(), st.data())
def test_a_family_is_every_relative(splitting, data):
    made = ladder(splitting)
    level = data.draw(st.integers(0, len(made.sizes) - 1))
    latent = data.draw(st.integers(0, made.sizes[level] - 1))
    members, edges = family(made, level, latent, most=100)
    assert (members[0].level, members[0].latent) == (level, latent)
    want = {(level, latent)} | naive_kin(splitting, level, latent, 1) | naive_kin(splitting, level, latent, -1)
    kin = [each for each in members if each.branch != -2]
    assert {(each.level, each.latent) for each in kin} == want and len(kin) == len(want)
    beside = {(each.level, each.latent) for each in members if each.branch == -2}
    parents = [each for each in edges if each.main and (each.level + 1, each.child) in beside]
    assert len({(each.level, each.parent) for each in parents}) <= 1
    assert not beside or not (members[0].children or {at for at, _ in beside} != {level})
    want |= beside
    shown = splitting.edges[splitting.edges.shown.astype(bool)]
    inside = [
        row for row in shown.itertuples() if (row.level, row.parent) in want and (row.level + 1, row.child) in want
    ]
    assert sorted((each.level, each.parent, each.child) for each in edges) == sorted(
        (r.level, r.parent, r.child) for r in inside
    )
    for each in members:
        assert each.children == ((shown.level == each.level) & (shown.parent == each.latent)).sum()
        assert each.parents == ((shown.level == each.level - 1) & (shown.child == each.latent)).sum()
    assert sum(each.main for each in edges) == len(members) - 1  # a tree


@quick
@given(splittings(), st.data())
def test_a_small_family_keeps_the_strongest(splitting, data):
    made = ladder(splitting)
    latent = data.draw(st.integers(0, made.sizes[0] - 1))
    whole, small = (family(made, 0, latent, most)[0] for most in (100, 2))
    assert all(sum(each.level == level for each in small) <= 2 for level in range(1, len(made.sizes)))
    first = [each for each in whole if each.level == 1]
    assert sum(each.level == 1 for each in small) + small[0].hidden == len(first)


@quick
@given(splittings(), st.data())
def test_any_splitting_is_lawful(splitting, data):
    texts = [[data.draw(st.sampled_from(HOSTILE)) for _ in range(size)] for size in splitting.sizes]
    made = ladder(splitting, labels=texts, tokens=texts, density=[[math.nan] * size for size in splitting.sizes])
    view = splitting_view(made, data.draw(st.integers(0, len(made.sizes) - 1)), 0, data.draw(st.sampled_from(HOSTILE)))
    check_view(view)
    assert "<script" not in view.to_html() and "<img" not in view.to_html()
    assert len(walk(view)) == len(view.members) and len(path_of(view)) == len(made.sizes)
    assert {edge for edge, _ in outer(view)} <= set(view.edges)


@quick
@given(splittings())
def test_orders_keep_families_together(splitting):
    made = ladder(splitting)
    places, mains = ranks(made), main_parents(made)
    for level, size in enumerate(made.sizes):
        assert sorted(places[level]) == list(range(size))
        if level:
            by_place = np.argsort(places[level])
            own = mains[level][by_place]
            above = np.where(own >= 0, places[level - 1][np.maximum(own, 0)], 10**6)
            assert (np.diff(above) >= 0).all()
    counted = sum(each.bottom - each.top for each in bands(made))
    assert counted == sum(int((main >= 0).sum()) for main in mains[1:])


def test_a_leaf_stands_among_its_siblings():
    rows = [
        (0, 0, child, strength, strength, strength, 0.1, 100, 0.0, 0.0, True)
        for child, strength in ((0, 0.9), (1, 0.8), (2, 0.7))
    ]
    view = splitting_view(ladder(made_of((1, 4), rows)), 1, 1)
    assert [(each.latent, each.branch) for each in view.members if each.level == 1] == [(1, -1), (0, -2), (2, -2)]
    assert {edge.child for edge, _ in outer(view)} == {0, 1, 2}
    assert view.to_text().count("beside") == 2


def test_ribbons_end_in_their_bars():
    view = splitting_view(ladder(example_splitting()))
    place = stage(view)
    for edge, ((x, a, b), (to, c, d)) in ports(view.edges, place).items():
        for at, low, high in (((edge.level, edge.parent), a, b), ((edge.level + 1, edge.child), c, d)):
            y, half = place.ys[at], place.tall[at] / 2 + 0.8
            assert y - half <= low <= high <= y + half
        assert x < to


def test_the_figure_says_what_the_frames_say():
    splitting = made_of(
        (2, 3),
        [(0, 0, 1, 0.9, 0.8, 0.95, 0.3, 400, 1e-9, 1e-6, True), (0, 1, 2, 0.5, 0.4, 0.6, 0.1, 50, 0.2, 0.4, False)],
        pd.DataFrame(
            [
                {
                    "level": 0,
                    "evidence": "cosine",
                    "null": "shuffled",
                    "draws": 77,
                    "q50": 0.0,
                    "q95": 0.1,
                    "q99": 0.2,
                    "max": 0.3,
                }
            ]
        ),
        [{"level": 0, "size": 3, "mean": 1.5, "low": 1.2, "high": 1.9, "n": 2}],
    )
    view = splitting_view(ladder(splitting), 0, 0)
    shown, wrong = read_html(view.to_html())
    assert (
        not wrong
        and "1 of 2 edges shown" in shown
        and "0.95 (0.92 to 0.97)" in shown
        and "77" in shown
        and "1.5" in shown
    )
    assert len(view.rows()) == 1 and view.rows()[0]["p_parent_given_child"] == 0.95
    alone = splitting_view(ladder(splitting), 1, 2)
    assert "beside" not in alone.to_text()
    assert "no shown edge leads to or from it" in alone.to_html() and alone.rows() == []


def test_a_big_ladder_stays_small_on_paper():
    made = ladder(
        example_splitting((512, 4096, 16384), 5.0),
        tokens=[["a token\u200b of text"] * size for size in (512, 4096, 16384)],
    )
    assert made.edges["shown"].sum() > 18_000
    for level, latent in ((0, None), (1, 0), (2, 0)):
        assert len(splitting_view(made, level, latent).to_html().encode()) < 60_000


def test_bad_input_is_refused():
    good = example_splitting()
    with pytest.raises(InputError, match="outside"):
        ladder(made_of((2, 2), [(0, 0, 5, 0.1, 0.1, 0.1, 0.1, 1, 0.1, 0.1, True)]))
    with pytest.raises(InputError, match="labels or numbers"):
        ladder(good, labels=[["a"], None, None])
    with pytest.raises(InputError, match="latent 99"):
        splitting_view(ladder(good), 0, 99)
    with pytest.raises(InputError, match="dictionaries"):
        follow_path(explorer_example(), {7: SimpleNamespace(latent=0)})


def test_what_travels_is_what_was_found():
    made = ladder(example_splitting(), labels=[HOSTILE[:16], None, None])
    sent = packed(made)
    table = np.frombuffer(sent["edges"], "<f4").reshape(len(SENT), -1)
    assert (np.diff(table[SENT.index("strength")]) <= 0).all() and table.shape[1] == sent["tried"]
    got = sorted(map(tuple, table[:3].T.astype(int).tolist()))
    assert got == sorted(zip(*(made.edges[name].tolist() for name in ("level", "parent", "child")), strict=True))
    lines = sent["texts"].decode("utf-8").split("\n")
    assert len(lines) == sum(made.sizes) and all(line.count("\t") == 2 for line in lines)


def test_the_widget_follows_and_saves(tmp_path):
    widget = explorer_example()
    other = (widget.latent + 1) % 16
    widget.latent = other
    assert widget.view.focus.latent == other and f"latent {other}" in widget.html
    widget.latent = 10**6  # of no dictionary: what was shown stays
    assert widget.view.focus.latent == other
    with pytest.raises(InputError):
        widget.look(1, 10**6)
    widget.look(2, 3)
    assert (widget.level, widget.latent, widget.path[2]) == (2, 3, 3)
    assert "<script>alert" not in standalone(widget)


def test_find_is_what_people_type():
    made = ladder(example_splitting(), labels=[{1: "Fox"}, None, None], tokens=[None, {2: "a fox"}, None])
    assert find(made, "fox") == [(0, 1), (1, 2)] and find(made, "160:159") == [(2, 159)]
    assert find(made, "  ") == [] and find(made, "0:9999") == [] and find(made, "²") == []


def test_the_explorer_takes_a_real_result():
    from sae_lab.features.splitting import example_splitting as found

    result = found()
    widget = ExplorerWidget(ladder(result))
    assert widget.sizes == list(result.sizes) and check_view(widget.view)
    shown = result.edges[result.edges.shown & (result.edges.level == 0) & (result.edges.parent == widget.latent)]
    assert widget.view.focus.children == len(shown)
