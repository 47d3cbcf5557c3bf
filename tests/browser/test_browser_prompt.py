"The latent browser and the prompt view in a real browser: frames, filters, keys, hostile text, Python and back."

import math
import os

import numpy as np
import pytest

from sae_lab.views.browser import SEP, BrowserWidget, Column, LatentTable
from sae_lab.views.browser import _example as latents_example
from sae_lab.views.histograms import sparkline
from sae_lab.views.prompt import PromptView, PromptWidget
from sae_lab.views.prompt import _example as prompt_example
from sae_lab.views.widget import standalone

pytestmark = pytest.mark.browser
HOSTILE = (
    "</script><script>window.hit=1</script>",
    "<img src=x onerror=window.hit=1>",
    "\u202eabc",
    "\ud83d",
    "\n",
    "",
    "x" * 10_000,
)


@pytest.fixture
def live(new_page, tmp_path):
    "A widget as a page of its own, opened."

    def show(widget, width=1300, height=900, scheme="light"):
        path = tmp_path / "page.html"
        path.write_text(standalone(widget), encoding="utf-8")
        page = new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        page.goto(path.as_uri())
        page.wait_for_selector("#live.sl")
        return page

    return show


def big(n=16_384, seed=0):
    "A table as large as a common dictionary, with every kind of column."
    rng = np.random.default_rng(seed)
    words = [" the", " fox", " crow", "ing", " said", ".", "\n", " winter", " river", "'s"]
    numbers = {
        name: rng.lognormal(0, 2, n) for name in ("density", "count", "max", "mean", "docs", "share", "norm", "bias")
    }
    numbers["mean"][::7] = np.nan

    def tokens():
        return tuple(SEP.join(words[i] for i in row) for row in rng.integers(0, len(words), (n, 3)).tolist())

    shape = tuple(sparkline(row) for row in rng.integers(0, 9, (n, 12)).tolist())
    state = tuple(("dead", "rare", "dense", "")[i] for i in rng.integers(0, 4, n).tolist())
    columns = [
        Column("histogram", shape, "shape"),
        Column("top tokens", tokens(), "tokens"),
        Column("promotes", tokens(), "tokens"),
        Column("state", state, "text"),
        *(Column(name, tuple(v.tolist()), bar="log") for name, v in numbers.items()),
    ]
    return LatentTable(tuple(range(n)), tuple(columns), f"{n:,} latents", sort="density")


def top(page):
    "Latents of the rows in sight."
    page.wait_for_timeout(80)
    return page.evaluate("""() => [...document.querySelectorAll(".sl-b-row:not([hidden])")]
        .sort((a, b) => a.ariaRowIndex - b.ariaRowIndex)
        .map((row) => Number(row.querySelector(".sl-b-latent").textContent))""")


def column(table, name):
    return np.array(
        [math.nan if v is None else v for v in next(c.values for c in table.columns if c.name == name)], "f4"
    )


SCROLL = """async () => {
  const grid = document.querySelector(".sl-b-grid"), whole = grid.scrollHeight - grid.clientHeight, gaps = [];
  const frame = () => new Promise(requestAnimationFrame);
  await frame(); let last = await frame();
  for (let i = 0; i < 150; i++) {  // steps of a wheel, then drags of the bar to anywhere
    grid.scrollTop = i < 75 ? grid.scrollTop + 120 + 40 * i : ((i * 7919) % 150) / 150 * whole;
    const now = await frame();
    gaps.push(now - last); last = now;
  }
  return gaps;
}"""


STEP = """async (i) => {
  const grid = document.querySelector(".sl-b-grid"), whole = grid.scrollHeight - grid.clientHeight;
  grid.scrollTop = i < 30 ? grid.scrollTop + 120 + 40 * i : ((i * 7919) % 60) / 60 * whole;
  await new Promise(requestAnimationFrame); await new Promise(requestAnimationFrame);
}"""


def test_scrolling_16384_latents_keeps_every_frame_under_100_ms(live):
    page = live(BrowserWidget(big()))
    worst, middle = [], []
    for _ in range(4):
        gaps = page.evaluate(SCROLL)
        worst.append(round(max(gaps), 1))
        middle.append(round(float(np.median(gaps)), 1))
        if worst[-1] < 100:
            break
    meter, spent = page.context.new_cdp_session(page), []
    meter.send("Performance.enable", {"timeDomain": "threadTicks"})

    def used():
        return next(
            1000 * m["value"] for m in meter.send("Performance.getMetrics")["metrics"] if m["name"] == "TaskDuration"
        )

    for i in range(60):
        before = used()
        page.evaluate(STEP, i)
        spent.append(used() - before)
    load = os.getloadavg()[0] / os.cpu_count()
    print(
        f"worst frame of 150: {worst} ms, median {middle} ms at a load of {load:.1f} a core; "
        f"the page's own work a step: median {np.median(spent):.1f} ms, worst {max(spent):.1f} ms"
    )
    assert max(spent) < 100, spent  # processor time of the page, whatever else the machine does
    assert min(worst) < 100 or load > 1, worst  # by the clock, where the machine has a core to spare
    assert page.locator(".sl-b-row").count() < 60 and page.errors == []


def test_sort_filter_and_search_equal_numpy(live):
    table = big(3_000)
    page = live(BrowserWidget(table))
    density, mean = column(table, "density"), column(table, "mean")
    assert top(page)[:8] == np.argsort(-density, kind="stable")[:8].tolist()
    page.get_by_role("button", name="mean").click()
    known = np.flatnonzero(~np.isnan(mean))
    assert top(page)[:8] == known[np.argsort(-mean[known], kind="stable")[:8]].tolist()
    page.get_by_role("button", name="mean").click()
    assert top(page)[:8] == known[np.argsort(mean[known], kind="stable")[:8]].tolist()
    page.locator(".sl-b-grid").press("End")
    assert all(math.isnan(mean[i]) for i in top(page)), "what is unknown comes last"
    for text, wanted in (
        ("> 1", mean > 1),
        ("0.5..2", (mean >= 0.5) & (mean <= 2)),
        (">= 0.1 < 0.2", (mean >= 0.1) & (mean < 0.2)),
        ("none", np.isnan(mean)),
        ("known", ~np.isnan(mean)),
        ("1k", mean == 1000),
    ):
        page.locator("[aria-label^='filter mean']").fill(text)
        page.wait_for_timeout(80)
        assert page.locator("[role=status]").inner_text().startswith(f"{int(wanted.sum()):,} of"), text
    page.locator("[aria-label^='filter mean']").fill("> fox")
    page.locator("[role=alert]", has_text="is no range").wait_for()
    page.get_by_role("button", name="clear").click()
    words, state = (next(c.values for c in table.columns if c.name == name) for name in ("top tokens", "state"))
    page.locator("[aria-label^='filter top tokens']").fill("/^ fox$/")
    page.locator("[aria-label^='filter state']").fill("!=dead")
    page.wait_for_timeout(80)
    wanted = sum(" fox" in w.split(SEP) and s != "dead" for w, s in zip(words, state))
    assert page.locator("[role=status]").inner_text().startswith(f"{wanted:,} of")
    page.get_by_role("button", name="clear").click()
    page.get_by_label("search latents").fill("2718")
    assert top(page) == [2718] and page.errors == []


def test_a_column_in_percent_is_filtered_in_percent(live):
    n = 300
    share = (np.arange(n) + 0.5) / n
    page = live(BrowserWidget(LatentTable(tuple(range(n)), (Column("density", tuple(share.tolist()), unit="%"),))))
    assert page.locator(".sl-b-row").nth(3).inner_text().split("\n")[-1] == "1.2"
    assert page.get_by_role("button", name="density, %").count() == 1
    for text, wanted in (("> 5", share > 0.05), ("5%..10%", abs(share - 0.075) <= 0.025), ("< 5 %", share < 0.05)):
        page.locator("[aria-label^='filter density']").fill(text)
        page.wait_for_timeout(80)
        assert page.locator("[role=status]").inner_text().startswith(f"{int(wanted.sum()):,} of"), text
    assert page.errors == []


def test_browser_by_keyboard_alone(live):
    table = big(500)
    page = live(BrowserWidget(table))
    order = np.argsort(-column(table, "density"), kind="stable").tolist()
    page.locator(".sl-b-grid").focus()
    for key in ("ArrowDown", "ArrowDown", "ArrowUp", "Enter"):
        page.keyboard.press(key)
    assert page.locator("[aria-selected=true] .sl-b-latent").inner_text() == str(order[1])
    page.keyboard.press("Space")
    assert page.get_by_role("button", name="★ 1 pinned").is_visible()
    page.keyboard.press("End")
    assert order[-1] in top(page)
    active = page.locator(".sl-b-grid").get_attribute("aria-activedescendant")
    assert page.locator(f"#{active} .sl-b-latent").inner_text() == str(order[-1])
    for key in ("Home", "PageDown", "Enter"):
        page.keyboard.press(key)
    assert page.locator("[aria-selected=true]").count() == 1
    page.keyboard.press("/")
    page.keyboard.type("crow")
    page.keyboard.press("Escape")  # empties the search
    page.keyboard.press("Escape")  # back to the table
    assert page.evaluate("document.activeElement.className") == "sl-b-grid"
    page.keyboard.press("Escape")
    assert page.locator("[aria-selected=true]").count() == 0
    page.get_by_role("button", name="★ 1 pinned").press("Enter")
    assert top(page) == [order[1]] and page.errors == []


@pytest.mark.parametrize(("width", "scheme"), [(1300, "light"), (700, "dark")])
def test_nothing_sticks_out_and_hostile_text_is_text(live, width, scheme):
    n, words = len(HOSTILE), SEP.join(HOSTILE[:3])
    table = LatentTable(
        tuple(range(n)),
        (
            Column("t", (words,) * n, "tokens"),
            Column(HOSTILE[1], HOSTILE, "text"),
            Column("x", (math.nan, math.inf, -math.inf, 0.0, None, 1e-30, 1e30), bar="log"),
        ),
        HOSTILE[0],
        HOSTILE[1],
    )
    view = PromptView(
        HOSTILE,
        (True, *[False] * (n - 1)),
        (None,) * n,
        (5, 6),
        (0, 1),
        (None, 1.0),
        HOSTILE[:2],
        (0, 1, 2, 3),
        (0, 1, 0, 1),
        (1.0, math.nan, -2.0, 1.0),
        (None, 0.5, 1.0, 0.0),
        (None, None, 0.1, -0.1),
        (None, None, 0.1, math.inf),
        HOSTILE[0],
        HOSTILE[1],
    )
    for widget in (
        BrowserWidget(table),
        PromptWidget(view, token=2),
        BrowserWidget(LatentTable((), ())),
        BrowserWidget(latents_example()),
        PromptWidget(PromptView((" a",), (False,), (None,), (), (), (), ())),
        PromptWidget(prompt_example(), token=3),
    ):
        page = live(widget, width, scheme=scheme)
        assert page.evaluate("window.hit") is None and page.errors == [] and page.outside == []
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_prompt_by_keyboard_alone(live):
    page, view = live(PromptWidget(prompt_example(), read=lambda text: prompt_example())), prompt_example()
    page.locator(".sl-p-strip [role=option]").first.focus()
    for _ in range(2):
        page.keyboard.press("ArrowRight")
    page.wait_for_timeout(60)
    assert page.locator(".sl-p-strip [aria-selected=true]").inner_text() == view.tokens[3]
    here = sorted((i for i in range(44) if view.at[i] == 3), key=lambda i: -view.activation[i])
    shown = [int(text) for text in page.locator("td.sl-p-latent").all_text_contents()]
    assert shown == [view.latents[view.which[i]] for i in here]
    page.locator(".sl-p-list tr[tabindex='0']").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.wait_for_timeout(60)
    assert page.locator("tr[aria-selected=true] .sl-p-latent").inner_text() == str(shown[1])
    page.locator("input[value=effect]").focus()
    page.keyboard.press("ArrowLeft")  # from effect to quantile, as radio buttons do
    assert page.locator("input[value=quantile]").is_checked()
    page.locator("input[type=range]").focus()
    for _ in range(20):
        page.keyboard.press("ArrowLeft")
    page.wait_for_timeout(60)
    kept = {view.latents[j] for j in range(14) if view.density[j] <= 0.011}
    page.locator(".sl-p-strip [aria-selected=true]").focus()
    page.keyboard.press("Escape")
    page.wait_for_timeout(60)
    assert {int(text) for text in page.locator("td.sl-p-latent").all_text_contents()} == kept
    assert page.locator(".sl-p-strip [role=option]").count() == 10
    page.get_by_label("begin token").press("Space")
    page.wait_for_timeout(60)
    assert page.locator(".sl-p-strip [role=option]").count() == 11
    picture = page.locator(".sl-p-map svg")
    picture.focus()
    page.keyboard.press("ArrowRight")
    assert page.locator(".sl-note").is_visible()
    page.keyboard.press("Enter")
    page.wait_for_timeout(60)
    assert page.locator(".sl-p-strip [aria-selected=true]").inner_text() == view.tokens[1]
    page.get_by_label("another text").fill("a crow")
    page.keyboard.press("Enter")
    page.locator(".sl-error", has_text="no kernel").wait_for()
    assert page.errors == []


HOVER = """async () => {
  const picture = document.querySelector(".sl-p-map svg"), at = picture.getBoundingClientRect(), seen = [];
  for (let i = 0; i < 20; i++) {
    const begin = performance.now();
    const place = { clientX: at.left + 190 + 16 * (i % 10), clientY: at.top + 90 + 16 * (i % 12), bubbles: true };
    picture.dispatchEvent(new MouseEvent("mousemove", place));
    await new Promise(requestAnimationFrame);
    seen.push(performance.now() - begin);
  }
  const begin = performance.now();
  document.querySelectorAll(".sl-p-strip [role=option]")[40].click();
  await new Promise(requestAnimationFrame); await new Promise(requestAnimationFrame);
  return { hover: Math.max(...seen), pick: performance.now() - begin };
}"""


def test_hover_and_selection_answer_within_100_ms(live):
    n, k, rng = 120, 32, np.random.default_rng(0)
    at, which = np.repeat(np.arange(n), k), rng.integers(0, 900, n * k)
    some = tuple(rng.normal(0, 1, n * k).tolist())
    view = PromptView(
        tuple(f" w{i}" for i in range(n)),
        (False,) * n,
        (1.0,) * n,
        tuple(range(900)),
        (9,) * 900,
        (0.01,) * 900,
        (" a" + SEP + " b",) * 900,
        tuple(at.tolist()),
        tuple(which.tolist()),
        tuple(rng.gamma(2, 1, n * k).tolist()),
        some,
        some,
        some,
    )
    page = live(PromptWidget(view))
    times = [page.evaluate(HOVER) for _ in range(5)]
    print({name: [round(each[name], 1) for each in times] for name in times[0]})
    assert min(each["hover"] for each in times) < 100 and min(each["pick"] for each in times) < 100


def test_python_hears_and_two_linked_widgets_follow(new_book):
    book = new_book().open(
        "linked.ipynb",
        "import traitlets\nfrom sae_lab.views.browser import BrowserWidget, _example as latents\n"
        "from sae_lab.views.prompt import PromptWidget, _example as prompt\nfrom sae_lab.views.widget import Board\n"
        "b = BrowserWidget(latents(), height=200)\np = PromptWidget(prompt(), read=lambda text: prompt(), token=3)\n"
        "traitlets.link((b, 'selected'), (p, 'selected'))\nBoard([b, p])",
        "print('heard', b.selected, b.pinned, len(b.found), b.filters, p.token, p.metric)",
    )
    book.run()
    page = book.page
    page.locator("td.sl-p-latent").first.click()
    latent = page.locator("td.sl-p-latent").first.inner_text()
    page.locator(".sl-b-row[aria-selected=true] .sl-b-latent", has_text=latent).wait_for()
    page.locator("[aria-label^='filter count']").fill("> 100")
    page.locator(".sl-b-row .sl-b-star").first.click()
    page.locator("input[value=total]").click()
    page.get_by_label("another text").fill("a fox")
    page.get_by_role("button", name="read").click()
    page.wait_for_timeout(1500)
    page.evaluate(
        """() => {
        window.jupyterapp.shell.currentWidget.content.activeCellIndex = 1;
        return window.jupyterapp.commands.execute('notebook:run-cell') }"""
    )
    page.locator(".jp-OutputArea-output", has_text=f"heard {latent} [").wait_for(timeout=30_000)
    said = book.cell(1).locator(".jp-OutputArea-output").inner_text()
    counts = next(c.values for c in latents_example().columns if c.name == "count")
    assert f" {sum(c > 100 for c in counts)} {{'count': '> 100'}} 3 total" in said, said
    assert page.errors == [] and page.outside == []
