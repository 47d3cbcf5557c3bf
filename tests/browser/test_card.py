"The live card: painted in time, answers to mouse and keyboard, opens its neighbours; alone, and on a real kernel."

import re

import pytest

from sae_lab.views.card_widget import _example
from sae_lab.views.widget import standalone

pytestmark = pytest.mark.browser

# A kernel's model that answers at once, so that only the page's own time is measured.
HARNESS = """async () => {
  const { state, source } = JSON.parse(document.getElementById("saved").textContent);
  const heard = {}, tell = (name, ...args) => (heard[name] ?? []).forEach((f) => f(...args));
  window.asked = [];
  window.model = { state, get: (key) => state[key], off() {}, save_changes() {},
    on: (name, f) => (heard[name] ??= []).push(f),
    set(key, value) { if (state[key] === value) return; state[key] = value; tell(`change:${key}`); },
    send({ id, ask, args }) { window.asked.push([ask, args]);
      const value = ask === "effect" ? { html: `<div>effect at ${args.group}.${args.window}.${args.token}</div>` }
        : { html: "<div>tried</div>", facts: [args.text] };
      setTimeout(() => tell("msg:custom", args.text === "boom" ? { id, error: "it broke <b>" } : { id, value })); } };
  const el = document.createElement("div");
  document.body.replaceChildren(...document.querySelectorAll("style"), el);
  const widget = (await import(URL.createObjectURL(new Blob([source], { type: "text/javascript" })))).default;
  const frame = () => new Promise((go) => requestAnimationFrame(() => setTimeout(go)));
  await widget.render({ model: window.model, el });
  window.painted = async (html) => {
    const from = performance.now();
    window.model.set("html", html);
    await frame();
    return performance.now() - from;
  };
}"""


@pytest.fixture
def alive(new_page, tmp_path):
    "A card on a page of its own; what is asked lands in `window.asked`."

    def open_(widget, **options):
        page = new_page(**options)
        path = tmp_path / "card.html"
        path.write_text(standalone(widget))
        page.goto(f"file://{path}")
        page.evaluate(HARNESS)
        return page

    return open_


def big(widget):
    "A card as large as any: 47 windows of 21 tokens, every one active."
    from dataclasses import replace

    from sae_lab.views.card_parts import Group, Window

    words = tuple(f" word{i}" for i in range(21))
    made = tuple(
        Window(words, tuple(0.1 + (i * 7 % 20) / 5 for i in range(21)), 10, f"docs/{j}", 5, 0) for j in range(47)
    )
    groups = tuple(
        Group(f"group {i}", "a note", made[i : i + 2], ("top", "rank", "value", "near")[i // 12])
        for i in range(0, 47, 2)
    )
    return replace(widget.view, groups=groups, rankings=widget.view.rankings * 4, logit_histogram=widget.view.histogram)


def test_a_card_is_painted_in_150_ms_and_marks_in_100(alive):
    widget = _example()
    page, html = alive(widget), widget.drawn(big(widget))
    times = [page.evaluate("([html, i]) => window.painted(html + ' '.repeat(i))", [html, i]) for i in range(7)]
    assert min(times) <= 150, f"the page's own time is the least of {times}: other work on the machine only adds"
    token = page.locator(".sl-w:visible .sl-t").nth(30)
    token.scroll_into_view_if_needed()
    took = token.evaluate("""el => { const from = performance.now();
        el.dispatchEvent(new PointerEvent('pointerover', { bubbles: true }));
        document.body.offsetHeight; return performance.now() - from }""")
    assert took <= 100 and page.locator(".sl-mark").count() > 0 and page.locator(".sl-note").is_visible()
    assert page.errors == [] and page.outside == []


def test_a_token_tells_at_once_and_asks_once(alive):
    page = alive(_example())
    token = page.locator(".sl-w u .sl-t").nth(1)
    token.hover()
    note = page.locator(".sl-note")
    assert "fables/1:5" in note.inner_text() and token.get_attribute("data-v") in note.inner_text()
    page.get_by_text("effect at 0.1.2").wait_for()
    page.mouse.move(5, 5)
    assert not note.is_visible() and page.locator(".sl-mark").count() == 0
    token.hover()
    page.get_by_text("effect at 0.1.2").wait_for()
    assert page.evaluate("window.asked") == [["effect", {"group": 0, "window": 1, "token": 2}]]


def test_bands_and_axis_are_switched(alive):
    page = alive(_example())
    section = lambda family: page.locator(f".sl-sec[data-family={family}]")
    assert section("top").is_visible() and section("rank").is_visible() and not section("value").is_visible()
    page.get_by_role("button", name="by value").click()
    assert (
        section("value").is_visible()
        and not section("rank").is_visible()
        and page.evaluate("model.state.band") == "value"
    )
    assert page.locator(".sl-log").first.is_visible() and not page.locator(".sl-linear").first.is_visible()
    page.get_by_role("button", name="log").first.click()
    assert page.locator(".sl-linear").first.is_visible() and page.evaluate("model.state.log") is False


def test_the_keyboard_reaches_everything(alive):
    page = alive(_example())
    page.locator(".sl-w .sl-t[tabindex='0']").focus()
    page.keyboard.press("ArrowDown")
    page.get_by_text("effect at 0.1.2").wait_for()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.dataset.t") == "11"
    page.keyboard.press("Enter")
    page.get_by_text("effect at 0.1.11").wait_for()
    page.keyboard.press("Escape")
    assert not page.locator(".sl-note").is_visible()
    assert page.locator(".sl-t[tabindex='0']").count() == 1
    page.locator(".sl-go").first.focus()
    page.keyboard.press("Enter")
    assert page.evaluate("model.state.latent") == 88
    page.get_by_label("number of the latent").fill("301")
    page.keyboard.press("Enter")
    assert page.evaluate("model.state.latent") == 301
    page.get_by_role("button", name=re.compile("pin")).click()
    assert page.evaluate("model.state.pinned") == [301]


def test_a_text_is_tried_and_an_error_is_read(alive):
    page = alive(_example())
    box = page.get_by_label("text to try")
    box.fill("the fox")
    box.press("Enter")
    page.get_by_text("tried").wait_for()
    box.fill("boom")
    box.press("Enter")
    page.get_by_text("it broke <b>").wait_for()


def test_it_fits_a_narrow_page(alive):
    for width in (1300, 700):
        page = alive(_example(), viewport={"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        edges = page.evaluate("""() => [...document.querySelectorAll('.sl-w')].map((r) => r.lastElementChild)
            .filter((r) => r.offsetParent).map((r) => Math.round(r.getBoundingClientRect().left))""")
        assert len(set(edges)) == 1, "windows stand under each other, aligned at the token they were chosen for"


CELLS = """
import tempfile
from dataclasses import replace
import torch, traitlets
torch.set_num_threads(1)
from sae_lab.coders.contract import make
from sae_lab.features.index import FeatureIndex
from sae_lab.sources.corpus import named
from sae_lab.sources.stream import Stream
from sae_lab.sources.subject import Subject
from sae_lab.workbench.card import live_card
subject, hook = Subject.bundled(), "blocks.1.mlp.hook_post"
coder = make("topk", d_in=subject.hooks[hook], d_sae=128, k=8, seed=0)
coder.spec = replace(coder.spec, hooks_in=(hook,))
text = named("bundled").split("explain", seed=0).tokens(subject, 4_000)
index = FeatureIndex.build(coder, Stream(subject, text, (hook,), seed=None), text, tempfile.mkdtemp() + "/index",
                           subject.strings(list(range(subject.d_vocab))))
one, two = (live_card(subject, coder, index, int(index.stats["count"].idxmax())) for _ in range(2))
import ipywidgets
from sae_lab.views.widget import Board
number = ipywidgets.BoundedIntText(one.latent, min=0, max=127, description="latent")
traitlets.link((one, "latent"), (two, "latent"))
traitlets.link((one, "latent"), (number, "value"));
"""


def test_on_a_kernel(new_book, tmp_path):
    book = new_book().open("card.ipynb", CELLS, "one", "Board([number, two])").run(300)
    page, one, two = book.page, book.cell(1).locator(".sl-card"), book.cell(2).locator(".sl-card")
    one.locator(".sl-w u .sl-t").nth(1).hover()
    one.locator(".sl-effect").wait_for(timeout=60_000)
    assert "probability" in one.locator(".sl-note").inner_text()
    page.screenshot(path=str(tmp_path / "card_effect.png"))
    page.mouse.move(2, 2)
    one.get_by_label("text to try").fill("The fox saw the crow.")
    one.get_by_role("button", name="try").click()
    one.get_by_text(re.compile(r"fires on \d+ of \d+ tokens")).wait_for(timeout=60_000)
    first = one.locator(".sl-go").first
    wanted = first.get_attribute("data-latent")
    first.click()
    for each in (one, two):
        each.get_by_text(f"latent {wanted}", exact=True).wait_for(timeout=60_000)
    control = book.cell(2).locator(".widget-text input")
    assert control.input_value() == wanted, "a control of ipywidgets follows"
    control.fill("9")
    control.press("Enter")
    for each in (one, two):
        each.get_by_text("latent 9", exact=True).wait_for(timeout=60_000)
    assert page.errors == [] and page.outside == []
