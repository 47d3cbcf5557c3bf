"Figures are written whole, with their numbers and provenance; without a browser the rest is there."
import csv
import json
import re
import subprocess

import pytest

from sae_lab.ground.errors import InputError, UnknownName
from sae_lab.views.figures import (WIDTHS, drawn, figure, load_figure, missing_browser, missing_converter, paper,
                                   save_figures, to_csv)
from sae_lab.views.payload import views
from sae_lab.views.tokens import TokenStrip
from sae_lab.views.widget import AbstractWidget, Board, widgets

go = pytest.importorskip("plotly.graph_objects")
HISTOGRAM, CURVES, CARD = (views[name].meta["example"]() for name in ("histogram", "curves", "card"))
MISSING = missing_browser() or missing_converter()
browser = pytest.mark.skipif(bool(MISSING), reason=f"images cannot be drawn: {MISSING}")


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


def facts_of(pdf):
    "Pages, width in inches, and the fonts of a PDF as (name, whether it is embedded)."
    told = subprocess.run(["pdfinfo", pdf], capture_output=True, text=True, check=True).stdout
    fonts = subprocess.run(["pdffonts", pdf], capture_output=True, text=True, check=True).stdout.splitlines()[2:]
    width = float(re.search(r"Page size: +([\d.]+)", told)[1]) / 72
    return int(re.search(r"Pages: +(\d+)", told)[1]), width, [(line.split()[0], line.split()[-5]) for line in fonts]


@browser
@pytest.mark.parametrize("width", ["column", "page"])
def test_images_are_what_they_should_be(tmp_path, width):
    plot = go.Figure(go.Scatter(x=[1, 2], y=[3, 1], name="a"))
    items = {"card": CARD, "run": CURVES} if width == "column" else {"hist": HISTOGRAM, "plot": plot}
    saved = save_figures(items, tmp_path / "f", {"seed": 1}, width=width)
    assert not saved.left_out
    for name in items:
        files = {path.suffix: path for path in saved[name]}
        pages, inches, fonts = facts_of(files[".pdf"])
        assert pages == 1 and abs(inches - WIDTHS[width]) < 0.02
        assert fonts and all(embedded == "yes" for _, embedded in fonts), fonts
        assert b"/Subtype /Image" not in files[".pdf"].read_bytes()  # all is vectors
        svg = files[".svg"].read_text()
        assert "<svg" in svg and "<text" not in svg and "font-family" not in svg  # letters are paths
        head = files[".png"].read_bytes()[:24]
        assert head.startswith(b"\x89PNG") and int.from_bytes(head[16:20], "big") == round(3 * 96 * WIDTHS[width])
        assert load_figure(files[".json"]) == items[name]


def test_without_a_converter_the_pdf_is_there(tmp_path, monkeypatch):
    from sae_lab.views import figures
    monkeypatch.setattr(figures, "missing_converter", lambda: "pdftocairo was not found")
    monkeypatch.setattr(figures, "missing_browser", lambda: "")
    monkeypatch.setattr(figures, "print_pdf", lambda html, path: path.write_bytes(b"%PDF"))
    saved = save_figures(CARD, tmp_path / "f")
    assert saved.left_out == {"svg/png": "pdftocairo was not found"} and saved["f"][3].read_bytes() == b"%PDF"


@pytest.mark.parametrize("name", widgets.names())
def test_widgets_are_saved_and_drawn_again(tmp_path, name):
    widget = widgets[name].meta["example"]()
    if not hasattr(widget, "view"): return
    saved = widget.save_figures(tmp_path / name, images=())
    again = load_figure(tmp_path / f"{name}.json")
    assert again.to_html() == widget.view.to_html() and len(saved[name]) == 3


def words_of(pdf):
    "Words of a PDF and where each ends, as a share of the page's width."
    told = subprocess.run(["pdftotext", "-bbox", pdf, "-"], capture_output=True, text=True, check=True).stdout
    wide = float(re.search(r'<page width="([\d.]+)"', told)[1])
    return [(word, float(end) / wide) for end, word in re.findall(r'xMax="([\d.]+)"[^>]*>([^<]*)</word>', told)]


@browser
@pytest.mark.parametrize("name, last", [("prompt", "effect"), ("browser", "state")])
def test_broad_tables_are_printed_whole(tmp_path, name, last):
    "The last column of a table that scrolls on the screen is on the page, at any width."
    for width in ("column", 2.0):
        saved = widgets[name].meta["example"]().save_figures(tmp_path / f"{name}{width}", width=width, images=("pdf",))
        (paths,) = saved.paths.values()
        words = words_of(next(path for path in paths if path.suffix == ".pdf"))
        assert last in [word for word, _ in words] and max(end for _, end in words) <= 1.01


@browser
@pytest.mark.parametrize("name", widgets.names())
def test_every_widget_is_printed(tmp_path, name):
    "One page of a column's width with its fonts inside, letters of the SVG as paths, a PNG, and what is drawn as CSV."
    widget = widgets[name].meta["example"]()
    widget.provenance = {"coder": "ab12", "seed": 3}
    saved = widget.save_figures(tmp_path / name)
    assert not saved.left_out
    files = {path.suffix: path for path in saved[name]}
    assert set(files) == {".html", ".csv", ".json", ".pdf", ".svg", ".png"}
    pages, inches, fonts = facts_of(files[".pdf"])
    assert pages == 1 and abs(inches - WIDTHS["column"]) < 0.02
    assert fonts and all(embedded == "yes" for _, embedded in fonts), fonts
    assert "<text" not in files[".svg"].read_text() and files[".png"].read_bytes().startswith(b"\x89PNG")
    assert json.loads(files[".json"].read_text())["provenance"] == widget.provenance
    rows = widget.view.rows()
    with files[".csv"].open(encoding="utf-8", newline="") as file:
        assert len(list(csv.DictReader(file))) == len(rows) > 0


def test_a_board_is_saved_whole_with_its_provenance(tmp_path):
    card = AbstractWidget(CARD)
    card.provenance = {"coder": "ab12", "seed": 3}
    board = Board([card, AbstractWidget(HISTOGRAM)])
    assert sorted(save_figures({"both": board}, tmp_path / "b", images=()).paths) == ["both-1", "both-2"]
    board.save_figures(tmp_path / "c", images=())
    card.save_figures(tmp_path / "d", images=())
    provenance = [json.loads((tmp_path / f"{name}.json").read_text())["provenance"] for name in ("c-2", "d")]
    assert provenance == [{"widgets": [card.provenance]}, card.provenance]


def test_files_that_hold_no_figure_are_refused(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "b.json").write_text('{"kind": "Nothing", "payload": {}}')
    with pytest.raises(InputError, match="no figure"): load_figure(tmp_path / "a.json")
    with pytest.raises(UnknownName, match="Nothing"): load_figure(tmp_path / "b.json")


def test_numbers_that_are_not_finite_come_back(tmp_path):
    strip = TokenStrip(("NaN", "\ud83d", "</script>"), (float("inf"), float("nan"), -1.0))
    save_figures(strip, tmp_path / "s", images=())
    again = load_figure(tmp_path / "s.json")
    assert again.tokens == strip.tokens and again.values[0] == float("inf") and again.values[1] != again.values[1]


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
