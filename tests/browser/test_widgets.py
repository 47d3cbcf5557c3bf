"Every registered widget in a real JupyterLab and in Notebook 7: it renders, answers, follows, and survives."
import json
import time
from pathlib import Path

import pytest

from sae_lab.views.widget import widgets

PlaywrightTimeout = pytest.importorskip("playwright.sync_api").TimeoutError
pytestmark = pytest.mark.browser
NAMES = list(widgets)
LOOKS = Path(__file__).with_name("looks.js").read_text()
SETUP = """
import json, traitlets
from functools import partial
from sae_lab.views.widget import widgets

def hear(where, change):
    with open("heard.jsonl", "a") as out: print(json.dumps([*where, change["name"]]), file=out)

def asked(where, widget, content, buffers):
    with open("heard.jsonl", "a") as out: print(json.dumps([*where, "ask " + str(content.get("ask"))]), file=out)

shown = {}
for name in widgets:
    one, two = (widgets[name].meta["example"]() for _ in range(2))
    shown[name] = one, two
    plain = [key for key, trait in one.traits(sync=True).items() if not key.startswith("_") and key not in
             ("html", "layout", "tabbable", "tooltip")
             and not isinstance(trait, traitlets.Bytes)]
    for key in plain: traitlets.link((one, key), (two, key))
    for i, each in enumerate((one, two)):
        if plain: each.observe(partial(hear, (name, i)), plain)
        each.on_msg(partial(asked, (name, i)))
"""
CELLS = [SETUP, *(f"shown[{name!r}][{i}]" for name in NAMES for i in (0, 1))]
PARTS = ("button, input, select, textarea, summary, [role=row], [role=treeitem], [role=option], [role=gridcell], "
         "[tabindex='0']")
FOREIGN = {"circuitsvis"}  # drawn by another library, whose colours are its own


# What a person sees of a widget: its HTML, and what stands in its boxes, which is not in the HTML.
SEEN = """el => el.innerHTML + [...el.querySelectorAll('input, select, textarea')]
    .map((box) => `${box.value} ${box.checked}`).join('|')"""
IDLE = {"found", "height"}  # what a widget tells of itself, which is nobody's choice


class Matrix:
    "The notebook with two linked examples of every widget."

    def __init__(self, book):
        self.book, self.page, self.log = book, book.page, book.root / "heard.jsonl"

    def root(self, name, copy=0):
        "The living element of a widget."
        return self.book.cell(1 + 2 * NAMES.index(name) + copy).locator(".sl").first

    def heard(self, name, copy=0):
        "Traits that changed in Python and questions it was asked."
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [what for of, which, what in map(json.loads, lines) if (of, which) == (name, copy) and what not in IDLE]

    def waits(self, name, before, copy=0, seconds=.6):
        "Whether Python hears something more."
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if len(self.heard(name, copy)) > before:
                return True
            time.sleep(.05)
        return False

    def wrong(self, name):
        "What a reader would complain about; nothing when all is well."
        looks = self.root(name).evaluate(LOOKS)
        dim = [] if name in FOREIGN else looks["dim"]
        return [*dim, *looks["wide"]] if looks["text"] else ["no text"]

    def click(self, name):
        "Use the widget's parts with the mouse, one after the other, until Python hears of it; None: it has no parts."
        root, before = self.root(name), len(self.heard(name))
        parts = [part for part in root.locator(PARTS).all() if part.is_visible() and part.is_enabled()][:40]
        for part in parts:
            part.click(timeout=5_000, force=True)
            if self.waits(name, before, seconds=.3):
                return True
        return False if parts else None

    def keys(self, name):
        "Tab into the widget and try the usual keys until Python hears of it; None: nothing takes the focus."
        root, before = self.root(name), len(self.heard(name))
        root.evaluate("el => { const b = document.createElement('button'); b.className = 'sentinel';"
                      "el.before(b); b.focus() }")
        inside = "el => el.contains(document.activeElement)"
        taken = None
        for _ in range(30):
            self.page.keyboard.press("Tab")
            if not root.evaluate(inside):
                break
            taken = False
            ring = self.page.evaluate("() => { const s = getComputedStyle(document.activeElement);"
                                      "return s.outlineStyle !== 'none' || s.boxShadow !== 'none' }")
            assert ring, f"no ring around {self.page.evaluate('document.activeElement.outerHTML.slice(0, 120)')}"
            for key in ("ArrowDown", "ArrowRight", "Enter", "Space"):
                self.page.keyboard.press(key)
                if not root.evaluate(inside):
                    break
            if self.waits(name, before, seconds=.25):
                taken = True
                break
        self.page.evaluate("document.querySelector('.sentinel')?.remove()")
        return taken


@pytest.fixture(scope="module")
def matrix(new_book):
    "All widgets, twice, run once."
    made = Matrix(new_book().open("matrix.ipynb", *CELLS).run())
    made.page.locator(".sl").nth(2 * len(NAMES) - 1).wait_for(timeout=60_000)
    return made


def quiet(page):
    "Nothing left the machine and nothing of ours went wrong."
    assert page.outside == [] and page.errors == []


@pytest.mark.parametrize("name", NAMES)
def test_renders(matrix, name):
    "The widget is there, alive; its static copy gives way."
    matrix.root(name).wait_for()
    cell = matrix.book.cell(1 + 2 * NAMES.index(name))
    assert not cell.locator(".sl-still").first.is_visible()
    assert cell.locator(".jp-RenderedText[data-mime-type*=stderr]").count() == 0
    assert not matrix.wrong(name)
    quiet(matrix.page)


@pytest.mark.parametrize("name", NAMES)
def test_mouse_reaches_python_and_the_linked_twin(matrix, name):
    "A click is heard in Python, and a second widget linked by its traits follows."
    before, twin = matrix.heard(name, 1), matrix.root(name, 1)
    page_before = twin.evaluate(SEEN)
    if matrix.click(name) is None:
        return
    what = matrix.heard(name)
    assert what, "nothing reached Python"
    if [each for each in what if not each.startswith("ask ")]:
        assert matrix.waits(name, len(before), copy=1, seconds=3), "the twin's trait did not follow"
        end = time.monotonic() + 3
        while twin.evaluate(SEEN) == page_before and time.monotonic() < end:
            time.sleep(.05)
        assert twin.evaluate(SEEN) != page_before, "the twin shows nothing of it"
    quiet(matrix.page)


@pytest.mark.parametrize("name", NAMES)
def test_keyboard_reaches_python(matrix, name):
    "Tab goes in with a visible ring, keys are heard in Python, and the notebook keeps its place."
    cell = matrix.book.cell(1 + 2 * NAMES.index(name))
    cell.locator(".jp-InputArea-prompt").first.click()
    count = matrix.page.locator(".jp-CodeCell").count()
    assert matrix.keys(name) is not False, "no key reached Python"
    assert matrix.page.locator(".jp-CodeCell").count() == count, "a key was taken by the notebook"
    quiet(matrix.page)


@pytest.mark.parametrize("theme, width", [("JupyterLab Dark", 1300), ("JupyterLab Dark", 700),
                                          ("JupyterLab Light", 700)])
def test_themes_and_widths(matrix, theme, width):
    "Dark and light, broad and narrow: all text can be read and nothing sticks out."
    page = matrix.page
    page.set_viewport_size({"width": width, "height": 1600})
    page.evaluate("theme => window.jupyterapp.commands.execute('apputils:change-theme', { theme })", theme)
    page.wait_for_function("dark => (document.body.dataset.jpThemeLight === 'false') === dark", arg="Dark" in theme)
    if page.locator("#jp-left-stack").is_visible():
        page.evaluate("window.jupyterapp.commands.execute('application:toggle-left-area')")
    page.wait_for_timeout(400)
    found = {name: wrong for name in NAMES if (wrong := matrix.wrong(name))}
    page.set_viewport_size({"width": 1300, "height": 1600})
    page.evaluate("window.jupyterapp.commands.execute('apputils:change-theme', { theme: 'JupyterLab Light' })")
    assert not found
    quiet(page)


def one_each(matrix):
    "Each output shows either the living widget or its static copy, never both and never nothing."
    for name in NAMES:
        cell = matrix.book.cell(1 + 2 * NAMES.index(name))
        live, still = (cell.locator(each).first for each in (".sl", ".sl-still"))
        seen = [each.count() > 0 and each.is_visible() for each in (live, still)]
        assert sum(seen) == 1, f"{name}: living {seen[0]}, static {seen[1]}"


def test_run_again(matrix):
    "Cells that run a second time show one widget each, which answers."
    matrix.book.run()
    matrix.page.locator(".sl").nth(2 * len(NAMES) - 1).wait_for(timeout=60_000)
    assert matrix.page.locator(".sl:not(.sl .sl)").count() == 2 * len(NAMES)
    one_each(matrix)
    assert False not in [matrix.click(name) for name in NAMES[:2]]
    quiet(matrix.page)


def test_reload(matrix):
    "After the page is loaded anew nothing is lost: each output is alive again or static."
    matrix.book.save("matrix.ipynb")
    matrix.book.open("matrix.ipynb")
    matrix.page.locator(".sl").nth(2 * len(NAMES) - 1).wait_for()
    one_each(matrix)
    quiet(matrix.page)


def test_restart_with_widgets_open(matrix):
    "A kernel that is restarted leaves something to read; run again, all are alive."
    matrix.book.restart()
    matrix.page.wait_for_timeout(1_000)
    one_each(matrix)
    matrix.book.run()
    matrix.page.locator(".sl").nth(2 * len(NAMES) - 1).wait_for(timeout=60_000)
    one_each(matrix)
    quiet(matrix.page)


def test_notebook_7(new_book):
    "The same widget in Notebook 7, with the mouse."
    pytest.importorskip("notebook")
    book = new_book()
    name = next(each for each in ("browser", "card", *NAMES) if each in NAMES)
    book.write("seven.ipynb", SETUP, f"shown[{name!r}][0]")
    page = book.page
    page.goto(f"{book.address}/notebooks/seven.ipynb")
    page.locator(".jp-CodeCell").nth(1).wait_for(timeout=60_000)
    log = book.root / "heard.jsonl"
    for _ in range(6):  # Run All before the kernel is ready is lost
        page.wait_for_timeout(1_500)
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        try:
            page.locator(".sl").first.wait_for(timeout=10_000)
            break
        except PlaywrightTimeout:
            continue
    before = log.read_text() if log.exists() else ""
    for part in page.locator(".sl").first.locator(PARTS).all()[:24]:
        if part.is_visible() and part.is_enabled():
            part.click(force=True)
            page.wait_for_timeout(300)
        if log.exists() and log.read_text() != before:
            break
    assert name == "plain" or log.read_text() != before
    quiet(page)
