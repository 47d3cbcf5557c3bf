"What a person waits for in a browser, by the browser's own clock: paint, hover, scroll (hand-written)."
import importlib.util
import json
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sae_lab.bench.frame import Row
from sae_lab.views.browser import BrowserWidget, Column, LatentTable
from sae_lab.views.card_parts import Group, Window
from sae_lab.views.card_widget import CardWidget
from sae_lab.views.explorer import explorer_example
from sae_lab.views.figures import browser_path, missing_browser
from sae_lab.views.payload import views
from sae_lab.views.widget import AbstractWidget, standalone, static

LIMITS = {"card_paint_ms": 150.0, "hover_ms": 100.0, "browser_frame_ms": 100.0, "explorer_paint_ms": 500.0}
LATENTS, SIZES, CHILDREN = 16_384, (512, 4_096, 16_384), 4.0

# In the place of the page's own shim: arrays are at hand, as a comm delivers them; the rest of the message is JSON still to be read.
PACE = """
const { state: saved, packed, source } = JSON.parse(document.getElementById("saved").textContent), arrays = {};
for (const key of packed) {
  arrays[key] = new DataView(Uint8Array.from(atob(saved[key]), (c) => c.charCodeAt(0)).buffer);
  delete saved[key];
}
const message = JSON.stringify(saved), home = document.getElementById("live");
document.getElementById("still").remove();
const widget = (await import(URL.createObjectURL(new Blob([source], { type: "text/javascript" })))).default;
function modelOf(state) {
  const heard = {}, tell = (name, ...args) => (heard[name] ?? []).forEach((f) => f(...args));
  return { get: (key) => state[key], set(key, value) { state[key] = value; tell(`change:${key}`); tell("change"); },
           on: (name, f) => (heard[name] ??= []).push(f), off() {}, save_changes() {}, send() {} };
}
const frame = () => new Promise(requestAnimationFrame);
/** Milliseconds from an act until the frame that shows it has been drawn. */
async function until(act) {
  await frame();
  const start = performance.now();
  await act();
  await frame();  // drawn after this
  await frame();  // has been drawn
  return performance.now() - start;
}
window.bench = {
  paint: () => until(async () => {
    const el = document.createElement("div");
    home.replaceChildren(el);
    await widget.render({ model: modelOf({ ...JSON.parse(message), ...arrays }), el });
  }),
  async hover(selector, event, shown, times) {
    const spent = [], parts = [...home.querySelectorAll(selector)].filter((part) => part.checkVisibility());
    for (let i = 0; i < times; i++) {
      const part = parts[i % parts.length];
      part.scrollIntoView({ block: "center" });
      await frame();
      spent.push(await until(() => part.dispatchEvent(new (event.startsWith("pointer") ? PointerEvent : MouseEvent)(event, { bubbles: true, cancelable: true }))));
      if (!home.querySelector(shown)) throw new Error(`${shown} did not appear`);
      part.dispatchEvent(new PointerEvent("pointerout", { bubbles: true }));
    }
    return spent;
  },
  async scroll(selector, step, frames) {
    const box = home.querySelector(selector), spent = [];
    let last = await frame();
    for (let i = 0; i < frames; i++) {
      box.scrollTop += step;
      const now = await frame();
      spent.push(now - last);
      last = now;
    }
    return { spent, went: box.scrollTop };
  },
};
window.ready = true;
"""


def left_out() -> dict[str, str]:  # case -> why
    "What cannot be measured here, and why."
    playwright = "" if importlib.util.find_spec("playwright") else "playwright is not installed (pip install playwright)"
    why = playwright or missing_browser()
    return dict.fromkeys(LIMITS, why) if why else {}


def large_card() -> CardWidget:
    "A card of 27 windows of 40 tokens, with everything that the example has."
    card, words = views["card"].meta["example"](), "the small fox saw a crow and said nothing at all".split()
    rng = np.random.default_rng(0)
    def window(i: int) -> Window:
        values = np.where(rng.random(40) < 0.2, rng.gamma(2.0, 1.0, 40), 0.0)
        return Window(tuple(f" {words[int(j)]}" for j in rng.integers(0, len(words), 40)), tuple(map(float, values)), 20,
                      f"fables/{i}", 3)
    groups = tuple(Group(f"group {g}", "3 of 905", tuple(window(3 * g + i) for i in range(3)), "top" if not g else "rank")
                   for g in range(9))
    return CardWidget(replace(card, groups=groups), {"effect": lambda **_: None}, lambda latent: card, LATENTS)


def large_table() -> BrowserWidget:
    "A table of 16,384 latents, six columns of numbers and their top tokens."
    rng, words = np.random.default_rng(0), ("fox", "crow", "river", "said", "the", "winter")
    numbers = [Column(f"measure {i}", tuple(rng.gamma(1.0, 1.0, LATENTS)), bar="log") for i in range(6)]
    tokens = Column("top tokens", tuple("\u241f".join(rng.choice(words, 3)) for _ in range(LATENTS)), "tokens")
    return BrowserWidget(LatentTable(tuple(range(LATENTS)), (*numbers, tokens), title="a large dictionary"))


@contextmanager
def _page(browser: Any, widget: AbstractWidget) -> Iterator[Any]:
    "The widget's own page, its model replaced by one that is timed."
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "widget.html"
        file.write_text(standalone(widget).replace(static("shim.js"), PACE), encoding="utf-8")
        page = browser.new_page(viewport={"width": 1300, "height": 900})
        try:
            page.goto(file.as_uri())
            page.wait_for_function("window.ready")
            page.evaluate("bench.paint()")  # the warm-up
            yield page
        finally:
            page.close()


def _row(case: str, times: list[float]) -> Row:
    value = statistics.median(times)
    return Row(case, value, "ms", LIMITS[case], value / LIMITS[case])


def _card(browser: Any, reps: int) -> list[Row]:
    with _page(browser, large_card()) as page:
        paint = [page.evaluate("bench.paint()") for _ in range(reps)]
        hover = page.evaluate("n => bench.hover('.sl-t', 'pointerover', '.sl-note:not([hidden])', n)", 2 * reps)
    return [_row("card_paint_ms", paint), _row("hover_ms", [max(hover)])]


def _browser(browser: Any, reps: int) -> list[Row]:
    with _page(browser, large_table()) as page:
        box = page.evaluate("""() => { const tall = [...document.querySelectorAll('#live *')].find((el) =>
            el.scrollHeight > el.clientHeight + 10_000 && /auto|scroll/.test(getComputedStyle(el).overflowY));
            tall.id = 'scrolled'; return tall.scrollHeight }""")
        worst = []
        for _ in range(reps):
            page.evaluate("document.getElementById('scrolled').scrollTop = 0")
            gone = page.evaluate("step => bench.scroll('#scrolled', step, 60)", box / 70)
            if gone["went"] < box / 2: raise RuntimeError(f"the table scrolled to {gone['went']} of {box}: {json.dumps(gone)[:80]}")
            worst.append(max(gone["spent"][1:]))
    return [_row("browser_frame_ms", worst)]


def _explorer(browser: Any, reps: int) -> list[Row]:
    with _page(browser, explorer_example(SIZES, CHILDREN)) as page:
        return [_row("explorer_paint_ms", [page.evaluate("bench.paint()") for _ in range(reps)])]


def rows(
    reps: int = 5,  # repetitions of each case, after one warm-up
) -> list[Row]:  # milliseconds; bound: what a person may wait; ratio to it
    "Time message to paint, hover to note, the worst frame of a scroll; the hover is the slowest of all, the others medians."
    if left_out(): return []
    from playwright.sync_api import sync_playwright
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=browser_path(), args=["--no-sandbox", "--disable-gpu"])
        try: return [row for part in (_card, _browser, _explorer) for row in part(browser, reps)]
        finally: browser.close()
