"Figures are written whole, with their numbers and provenance; without a browser the rest is there."
import csv
import json
import re

import pytest

from sae_lab.ground.errors import InputError
from sae_lab.views.figures import WIDTHS, drawn, figure, missing_browser, paper, save_figures, to_csv
from sae_lab.views.payload import views

go = pytest.importorskip("plotly.graph_objects")
HISTOGRAM, CURVES, CARD = (views[name].meta["example"]() for name in ("histogram", "curves", "card"))
browser = pytest.mark.skipif(bool(missing_browser()), reason=f"images need a browser: {missing_browser()}")


@pytest.fixture
def no_browser(monkeypatch):
    monkeypatch.setenv("BROWSER_PATH", "/nowhere/chromium")


def test_without_a_browser_the_rest_is_written(tmp_path, no_browser):
    saved = save_figures({"a": HISTOGRAM, "b": CURVES, "c": CARD}, tmp_path / "deep" / "fig", {"seed": 3})
    assert sorted(path.name for paths in saved.paths.values() for path in paths) == sorted(
        f"fig-{name}.{kind}" for name in "abc" for kind in ("html", "csv", "json"))
    assert list(saved.left_out) == ["pdf/svg/png"]
    assert "Chromium" in str(saved) and "BROWSER_PATH" in saved._repr_html_()


def test_csv_holds_what_is_drawn(tmp_path, no_browser):
    saved = save_figures(CURVES, tmp_path / "run")
    rows = list(csv.DictReader(saved["run"][1].open()))
    assert len(rows) == len(CURVES.rows()) and float(rows[3]["value"]) == CURVES.rows()[3]["value"]


def test_json_holds_the_provenance(tmp_path, no_browser):
    saved = save_figures(HISTOGRAM, tmp_path / "h", {"corpus": {"hash": "ab"}, "nan": float("nan")})
    facts = json.loads(saved["h"][2].read_text())
    assert facts["provenance"] == {"corpus": {"hash": "ab"}, "nan": None} and facts["kind"] == "HistogramChart"


def test_html_asks_no_network(tmp_path, no_browser):
    saved = save_figures({"view": CARD, "plot": go.Figure(go.Scatter(x=[1], y=[2]))}, tmp_path / "f")
    view, plot = (saved[name][0].read_text(encoding="utf-8") for name in ("view", "plot"))
    assert "http" not in view and "<script" not in view
    assert not re.search(r"<(script|link)[^>]+(src|href)=.https?:", plot) and '"showSendToCloud": false' in plot


@pytest.mark.parametrize("body", ["exit 3", "sleep 60"])
def test_a_browser_that_fails_is_reported(tmp_path, monkeypatch, body):
    from sae_lab.views import figures
    broken = tmp_path / "chromium"
    broken.write_text(f"#!/bin/sh\nexec {body}\n" if body.startswith("sleep") else f"#!/bin/sh\n{body}\n")
    broken.chmod(0o755)
    monkeypatch.setenv("BROWSER_PATH", str(broken))
    patient = figures._run_browser
    monkeypatch.setattr(figures, "_run_browser", lambda *options: patient(*options, seconds=0.5))
    saved = save_figures(HISTOGRAM, tmp_path / "h")
    assert len(saved["h"]) == 3 and "browser" in saved.left_out["pdf/svg/png"]


@browser
def test_images_are_what_they_should_be(tmp_path):
    saved = save_figures({"hist": HISTOGRAM, "run": CURVES}, tmp_path / "f", {"seed": 1})
    assert not saved.left_out
    for name in ("hist", "run"):
        files = {path.suffix: path.read_bytes() for path in saved[name]}
        assert files[".pdf"].startswith(b"%PDF") and b"FontFile" in files[".pdf"]  # fonts are embedded
        assert b"/Subtype /Image" not in files[".pdf"]                             # and all is vectors
        assert b"<svg" in files[".svg"] and files[".png"].startswith(b"\x89PNG")
    width = int.from_bytes(saved["hist"][5].read_bytes()[16:20], "big")
    assert width == 3 * round(96 * WIDTHS["column"])


@browser
def test_what_is_no_chart_is_reported(tmp_path):
    saved = save_figures({"card": CARD}, tmp_path / "f")
    assert saved.left_out == {"svg of card": "not a chart", "png of card": "not a chart"}
    assert saved["card"][3].read_bytes().startswith(b"%PDF") and b"FontFile" in saved["card"][3].read_bytes()


def test_figures_show_the_numbers_of_their_payload():
    assert list(figure(HISTOGRAM).data[0].y) == list(HISTOGRAM.counts)
    for trace, each in zip(figure(CURVES).data, CURVES.curves, strict=True):
        assert list(trace.y) == list(each.values) and list(trace.x) == list(CURVES.tokens) and trace.name == each.coder


def test_paper_does_not_change_its_argument():
    fig = go.Figure(go.Scatter(x=[1, 2], y=[2, 1]), layout_width=500)
    before = fig.to_json()
    assert paper(fig, 2.0).layout.width == 192 and fig.to_json() == before
    with pytest.raises(InputError, match="column"): paper(fig, "broad")


def test_other_things_are_refused(tmp_path):
    with pytest.raises(InputError): figure(CARD)
    with pytest.raises(InputError): save_figures("not a figure", tmp_path / "x", images=())


def test_csv_of_any_plotly_figure():
    fig = go.Figure([go.Scatter(x=[1, 2], y=[3, 4], name="a"), go.Scatter(y=[5], text=["t"])])
    rows = drawn(fig)
    assert rows == [{"trace": "a", "x": 1, "y": 3, "text": None}, {"trace": "a", "x": 2, "y": 4, "text": None},
                    {"trace": "trace 1", "x": None, "y": 5, "text": "t"}]
    assert to_csv(rows).splitlines()[0] == "trace,x,y,text" and to_csv([]) == ""


def test_markup_in_names_is_text():
    from sae_lab.views.curves import Curve, TrainingCurves
    fig = figure(TrainingCurves((1, 2), (Curve("<a href='x'>", "<b>", (1.0, 2.0)),)))
    assert fig.data[0].name.startswith("&lt;a") and fig.layout.annotations[0].text == "&lt;b&gt;"
