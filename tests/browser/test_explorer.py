"The splitting explorer as a page of its own: what it draws, how it is walked, how long it takes."

import pytest

from sae_lab.views.explorer import ExplorerWidget, explorer_example
from sae_lab.views.family import example_splitting, family, ladder
from sae_lab.views.widget import standalone

pytestmark = pytest.mark.browser
HOSTILE = (
    "</script><script>window.hit = 1</script>",
    "<img src=x onerror='window.hit = 1'>",
    "\u202eabc",
    "x" * 10_000,
)
PLACES = """() => [...document.querySelectorAll('.sl-ex-node')].map(g => {
  const box = g.querySelector('.sl-ex-hit');
  return [Number(g.dataset.id), Number(box.getAttribute('y')) + box.getAttribute('height') / 2]; })"""


@pytest.fixture
def open_page(chromium, tmp_path):
    "Open a widget's own page; the page notes what went wrong and what it asked of the network."
    contexts = []

    def show(widget, width=1300, scheme="light", scripts=True):
        path = tmp_path / f"page{len(contexts)}.html"
        path.write_text(standalone(widget))
        context = chromium.new_context(
            viewport={"width": width, "height": 1000}, color_scheme=scheme, java_script_enabled=scripts
        )
        contexts.append(context)
        page = context.new_page()
        page.errors, page.outside = [], []
        page.on("pageerror", lambda e: page.errors.append(str(e)))
        page.on("console", lambda m: page.errors.append(m.text) if m.type == "error" else None)
        page.on(
            "request", lambda r: None if r.url.startswith(("file:", "blob:", "data:")) else page.outside.append(r.url)
        )
        page.goto(path.as_uri())
        if scripts:
            page.wait_for_selector(".sl-ex-flow")
        return page

    yield show
    for context in contexts:
        context.close()


def focus_of(page):
    "What the page looks at, and the latents of its path."
    return page.locator(".sl-ex-title b").inner_text(), page.locator(".sl-ex-card").all_inner_texts()


def test_paints_three_sizes_in_time(open_page):
    "Three dictionaries and 20,000 edges are on screen within 500 ms of the browser's clock."
    widget = explorer_example((512, 4096, 16384), 5.0)
    assert widget.tried > 18_000
    times = [float(open_page(widget).locator(".sl-ex").get_attribute("data-painted")) for _ in range(4)]
    assert min(times) <= 500, times


@pytest.mark.parametrize("level, latent", [(0, None), (1, 3), (1, 7), (2, 9), (2, 40)])
def test_draws_the_family_that_python_finds(open_page, level, latent):
    "The script and the notebook's code agree on who is drawn and in which row."
    widget = explorer_example(level=level, latent=latent)
    page = open_page(widget)
    first = [0, 16, 80]
    members, edges = family(widget.made, level, widget.latent)
    assert dict(page.evaluate(PLACES)) == pytest.approx({first[m.level] + m.latent: 40 + 19 * m.row for m in members})
    assert page.locator("path[data-edge]").count() == len(edges)


def test_is_walked_by_keys_alone(open_page):
    "Arrows walk the tree, Enter looks at a family, Escape goes back."
    page = open_page(explorer_example())
    start, cards = focus_of(page)
    page.focus(".sl-ex-node[tabindex='0']")
    page.keyboard.press("ArrowRight")
    child = page.evaluate("document.activeElement.getAttribute('aria-label')")
    assert child.startswith("64:") and page.locator(".sl-ex-card.sl-ex-now").inner_text().startswith("64")
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") != child
    page.keyboard.press("ArrowLeft")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')").startswith("16:")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert focus_of(page)[0] != start and page.locator(".sl-ex-title").inner_text().count("of 64")
    assert page.evaluate("document.activeElement.classList.contains('sl-ex-node')")
    page.keyboard.press("Escape")
    assert focus_of(page)[0] == start and not page.errors


def test_search_filters_and_modes(open_page):
    "A latent is found by number and by token; filters take edges away and give them back."
    page = open_page(explorer_example())
    page.fill(".sl-ex-search", "64:7")
    page.keyboard.press("Enter")
    assert focus_of(page)[0] == "latent 7" and "of 64" in page.locator(".sl-ex-title").inner_text()
    page.fill(".sl-ex-search", "no such thing")
    assert "no latent is called that" in page.locator(".sl-ex-hits").inner_text()
    page.fill(".sl-ex-search", "fox")
    page.keyboard.press("ArrowDown")
    assert page.locator(".sl-ex-hits [aria-selected=true]").count() == 1
    page.keyboard.press("Escape")
    before = page.locator(".sl-ex-passing").inner_text()
    page.locator(".sl-ex-knobs input[type=range]").first.fill("0.9")
    fewer = page.locator(".sl-ex-passing").inner_text()
    assert int(fewer.split()[0]) < int(before.split()[0])
    page.get_by_role("button", name="reset").click()
    assert page.locator(".sl-ex-passing").inner_text() == before
    page.get_by_role("button", name="tree").click()
    assert page.locator(".sl-ex-line").count() and not page.locator(".sl-ex-ribbon").count()
    assert not page.errors and not page.outside


def test_evidence_stands_beside_its_null(open_page):
    "Each kind of evidence names its null and what it reaches; hovering previews without moving."
    page = open_page(explorer_example())
    start = focus_of(page)
    told = page.locator(".sl-ex-bullet").first.get_attribute("title")
    assert "shuffled coordinates" in told and "10,000 draws" in told and "null" in told
    page.locator(".sl-ex-node").last.hover()
    assert page.locator(".sl-ex-dim").count() == 1 and focus_of(page)[1] != start[1]
    page.mouse.move(5, 5)
    assert focus_of(page) == start
    page.locator(".sl-ex-forest").click(position={"x": 215, "y": 300})
    assert "of 160" in page.locator(".sl-ex-title").inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1300, 700])
def test_fits_and_holds_hostile_text(open_page, scheme, width):
    "Nothing runs, nothing leaves the machine, nothing sticks out."
    texts = [list(HOSTILE) * 4, list(HOSTILE) * 16, list(HOSTILE) * 40]
    page = open_page(ExplorerWidget(ladder(example_splitting(), labels=texts, tokens=texts)), width, scheme)
    page.locator(".sl-ex-node").last.click()
    page.fill(".sl-ex-search", "script")
    assert page.locator(".sl-ex-hit-row").count() and page.evaluate("window.hit") is None
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert not page.errors and not page.outside


def test_says_the_same_without_scripts(open_page):
    "The static picture is there: the family, its evidence, the chart."
    widget = explorer_example()
    page = open_page(widget, scripts=False)
    text = page.locator("body").inner_text()
    assert f"latent {widget.latent}" in text and "children per latent" in text and "P(parent|child)" in text
    assert page.locator("#still svg").count() == 3


def test_holds_where_there_is_nothing(open_page):
    "Dictionaries without a single edge, and a ladder of one."
    bare = example_splitting()
    bare.edges = bare.edges.iloc[:0]
    page = open_page(ExplorerWidget(ladder(bare)))
    assert "0 parents, 0 children" in page.locator(".sl-ex-title").inner_text() and not page.errors
    page.focus(".sl-ex-node")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert not page.errors
