"Pages opened from disk: every view, and every widget on a page of its own, whatever the theme, the width and the text."
import json
import subprocess
import sys
from pathlib import Path

import pytest

from sae_lab.bench.ui import LIMITS, left_out
from sae_lab.ground.errors import SaeLabError
from sae_lab.views.payload import check_view, page, views
from sae_lab.views.widget import standalone, widgets

pytestmark = pytest.mark.browser
LOOKS = Path(__file__).with_name("looks.js").read_text()
FOREIGN = {"circuitsvis"}  # drawn by another library, whose colours are its own
NASTY = "</script><img src=x onerror='window.hit=1'>\u202e\n\ud83d"
PLACES = [(scheme, width) for scheme in ("light", "dark") for width in (1300, 700)]


@pytest.fixture(scope="module")
def sheet(new_page):
    "One page for all files."
    return new_page()


def complaints(sheet, path, root, name, places=PLACES):
    "Open a file in each theme and width; what a reader would complain about, by place."
    sheet.goto(path.as_uri())
    sheet.locator(root).wait_for()
    found = {}
    for scheme, width in places:
        sheet.emulate_media(color_scheme=scheme)
        sheet.set_viewport_size({"width": width, "height": 900})
        looks = sheet.locator(root).evaluate(LOOKS)
        wrong = [*looks["wide"], *([] if name in FOREIGN else looks["dim"])] if looks["text"] else ["no text"]
        found |= {(scheme, width): wrong} if wrong else {}
    assert sheet.outside == [] and sheet.errors == []
    return found


@pytest.mark.parametrize("name", views.names())
def test_views_are_readable_everywhere(sheet, tmp_path, name):
    path = tmp_path / "view.html"
    path.write_text(page([views[name].meta["example"]()], name), encoding="utf-8")
    assert not complaints(sheet, path, "body", name)


@pytest.mark.parametrize("name", widgets.names())
def test_widgets_are_readable_everywhere(sheet, tmp_path, name):
    path = tmp_path / "widget.html"
    path.write_text(standalone(widgets[name].meta["example"](), name), encoding="utf-8")
    assert not complaints(sheet, path, "#live.sl, #live .sl", name)


def nasty(value):
    "The same with something hostile behind every text."
    if isinstance(value, str): return value + NASTY
    if isinstance(value, list): return [nasty(each) for each in value]
    return {key: nasty(each) for key, each in value.items()} if isinstance(value, dict) else value


def spoiled(view):
    "A view with hostile text in every field that takes it."
    facts = view.to_exact()
    for name in facts:
        try:
            new = view.from_dict(facts | {name: nasty(facts[name])})
            check_view(new)
        except (SaeLabError, KeyError, ValueError, StopIteration):
            continue  # names of kinds and families are not free text
        facts[name] = new.to_exact()[name]
    return view.from_dict(facts)


@pytest.mark.parametrize("name", widgets.names())
def test_hostile_text_is_text(sheet, tmp_path, name):
    widget = widgets[name].meta["example"]()
    widget.show(spoiled(widget.view))
    path = tmp_path / "widget.html"
    path.write_text(standalone(widget, NASTY), encoding="utf-8", errors="replace")
    complaints(sheet, path, "#live.sl, #live .sl", name, PLACES[:1])
    assert sheet.evaluate("window.hit") is None and sheet.locator("#live img[src=x]").count() == 0


@pytest.mark.parametrize("name", widgets.names())
def test_without_scripts_the_static_html_is_there(new_page, tmp_path, name):
    path = tmp_path / "widget.html"
    path.write_text(standalone(widgets[name].meta["example"](), name), encoding="utf-8")
    bare = new_page(java_script_enabled=False)
    bare.goto(path.as_uri())
    assert bare.locator("#still").is_visible() and bare.locator("#still").inner_text().strip()
    bare.context.close()


@pytest.mark.skipif(bool(left_out()), reason="what the bench needs is missing")
def test_the_bench_has_its_cases():
    "Every case is measured; how long it takes is said, not asserted."
    command = [str(Path(sys.executable).with_name("sae-lab")), "bench", "ui", "--json", "--reps", "1"]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)["rows"]
    assert [row["case"] for row in found] == list(LIMITS)
    assert all(row["value"] > 0 and row["unit"] == "ms" for row in found)
