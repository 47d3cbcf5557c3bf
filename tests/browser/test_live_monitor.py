"A real training, watched and steered in JupyterLab; and the page of its own, with mouse and keys."
import re

import pytest

from sae_lab.views.circuitsvis import AttentionView, NeuronsView, circuits_page
from sae_lab.views.monitor import _live_example
from sae_lab.views.widget import standalone

pytestmark = pytest.mark.browser

SETUP = """
import threading, time
from sae_lab.coders.contract import make
from sae_lab.sources.corpus import named
from sae_lab.sources.stream import Stream
from sae_lab.sources.subject import Subject
from sae_lab.training.background import Background
from sae_lab.workbench.monitor import monitor
subject = Subject.bundled()
text = named("fables").split("explain").tokens(subject, 16_000)
hook = "blocks.1.hook_resid_post"
source = Stream(subject, text, hook, batch=256, epochs=200)
width = subject.hooks[hook]
two = {"topk": make("topk", d_in=width, d_sae=256, k=16), "relu": make("relu_l1", d_in=width, d_sae=256)}
work = Background(two, source, metrics_every=2)
widget = monitor(work, subject, text, few=1_000, every=.5, title="two coders")
widget
"""
ASK = "print('kernel', work.status, [(c.coder, c.coefficient, c.value) for c in work.run.changes])"
CLOSE = """
if work.run.changes:
    widget.close()
    time.sleep(1)
    left = [t.name for t in threading.enumerate() if t.name.startswith('sae_lab')]
    print('left', left, work.status)
"""
AGAIN = """
if work.run.changes:
    work = Background(two, source, metrics_every=2)
    other = monitor(work, subject, text, few=1_000, every=.5, title="once more")
    display(other)
"""


@pytest.fixture
def opened(new_page, tmp_path):
    "Any HTML as a page."
    def open_(html, **options):
        page = new_page(**options)
        (tmp_path / "page.html").write_text(html)
        page.goto(f"file://{tmp_path / 'page.html'}")
        return page
    return open_


def test_a_training_is_watched_and_steered(new_book):
    "Curves move, the kernel is free, buttons and boxes reach the training, a card opens meanwhile; all of it ends."
    book = new_book().open("monitor.ipynb", SETUP, ASK, CLOSE, AGAIN).run(120)
    page, live = book.page, book.cell(0).locator(".sl-mon")
    again = lambda i: (book.cell(i).locator(".cm-content").click(), book.command("notebook:run-cell"))
    seen = live.get_by_text(re.compile(r"of 3,[\d,]+ tokens"))
    first = seen.inner_text()
    live.locator("svg[role=img]").nth(3).wait_for()
    live.get_by_text(re.compile("untouched")).first.wait_for(timeout=60_000)
    assert seen.inner_text() != first
    assert "kernel running []" in book.cell(1).locator(".jp-OutputArea-output").inner_text()

    live.get_by_role("button", name="Pause").click()
    live.get_by_role("button", name="Continue").wait_for()
    live.get_by_label("coder").select_option("relu")
    live.get_by_label("coefficient", exact=True).select_option("l1")
    live.get_by_label("value of the coefficient").fill("0.25")
    live.get_by_label("value of the coefficient").press("Enter")
    live.get_by_text("relu: l1 is 0.25 from step").wait_for()
    live.get_by_text("l1 0.1 → 0.25").wait_for()
    again(1)
    book.cell(1).get_by_text("kernel paused [('relu', 'l1', 0.25)]").wait_for()

    live.get_by_label("latent", exact=True).fill("7")
    live.get_by_label("latent", exact=True).press("Enter")
    again(1)  # the kernel answers while the card is made
    live.locator(".sl-mon-card").get_by_text("latent 7").wait_for(timeout=120_000)
    live.locator(".sl-mon-card").get_by_text("relu after").wait_for()
    live.get_by_role("button", name="in the same copy").wait_for()
    live.get_by_role("button", name="Continue").click()
    live.get_by_role("button", name="Pause").wait_for()
    page.set_viewport_size({"width": 700, "height": 1200})
    assert live.evaluate("el => el.scrollWidth <= el.clientWidth + 1")

    again(2)
    book.cell(2).get_by_text("left [] stopped").wait_for(timeout=30_000)
    again(3)
    once = book.cell(3).locator(".sl-mon")
    once.get_by_text("running").wait_for(timeout=30_000)
    book.restart()
    assert "tokens" in book.cell(3).locator(".jp-OutputArea").inner_text(), "what was last seen stays"
    assert page.outside == [] and page.errors == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_mouse_and_keys(opened, scheme):
    "The mouse and the slider show an earlier time, Escape the present; without a kernel questions are refused."
    page = opened(standalone(_live_example()), color_scheme=scheme)
    chart = page.locator(".sl-mon-body svg[role=img]").first
    bars = page.locator('.sl-mon-body path[fill-opacity=".8"]').first
    now, box = bars.get_attribute("d"), chart.bounding_box()
    page.mouse.move(box["x"] + 80, box["y"] + 60)
    page.locator(".sl-note", has_text="topk-512").wait_for()
    assert bars.get_attribute("d") != now and page.locator(".sl-mon-at").count() == 4
    page.mouse.move(2, 2)
    page.locator(".sl-mon-at").first.wait_for(state="detached")
    assert bars.get_attribute("d") == now and not page.locator(".sl-note").is_visible()
    slider = page.get_by_label("look back in time")
    slider.focus()
    page.keyboard.press("Home")
    page.get_by_text("at 6,000 tokens").wait_for()
    assert "topk-512 loss" in slider.get_attribute("aria-valuetext") and bars.get_attribute("d") != now
    page.keyboard.press("Escape")
    assert slider.input_value() == "1000" and bars.get_attribute("d") == now
    stop = page.get_by_role("button", name="Stop")
    stop.click()
    page.get_by_role("button", name="Stop for good?").wait_for()
    page.get_by_role("button", name="Pause").click()
    page.get_by_text("no kernel answers here").wait_for()
    assert page.outside == [] and page.errors == []


def test_circuitsvis_alone(opened):
    "Two views over one bundle from a file, hostile tokens as text, nothing asked for."
    bad = ("</script><script>window.hit=1</script>", "<img src=x onerror=window.hit=1>", "&lt;b&gt;", "\n")
    eye = tuple(tuple(float(i == j) for j in range(4)) for i in range(4))
    neurons = NeuronsView(bad, tuple(((1.0,),) for _ in bad), bad[:1], bad[1:2])
    page = opened(circuits_page([AttentionView(bad, (eye, eye), bad[:2], bad[0]), neurons]))
    page.get_by_text("Head Selector").wait_for()
    page.get_by_text("onerror").last.wait_for()
    shown = page.locator(".colored-tokens").inner_text().replace("\u2060", "").replace("\xa0", " ")
    assert "<img src=x onerror=window.hit=1>" in shown and "</script>" in shown and "&lt;b&gt;" in shown
    page.wait_for_timeout(300)
    assert page.evaluate("window.hit") is None and page.outside == [] and page.errors == []


def test_circuitsvis_on_a_kernel(new_book):
    "Three views ask once for the bundle; another layer is made by Python."
    cells = ["from sae_lab.sources.subject import Subject\nfrom sae_lab.workbench.attention import attention, neurons\n"
             "subject, asked = Subject.bundled(), []\ndef show(w):\n    give = w.answers['bundle']\n"
             "    w.answers['bundle'] = lambda: (asked.append(1), give())[1]\n    return w\n"
             "w = show(attention(subject, 'The fox saw the crow.'))\nw",
             "show(neurons(subject, 'The fox saw the crow.', layer=1))", "show(attention(subject, 'fox'))",
             "print('asked', len(asked))"]
    book = new_book().open("circuits.ipynb", *cells).run()
    for i in (0, 2): book.cell(i).get_by_text("Head Selector").wait_for(timeout=30_000)
    book.cell(1).get_by_text("Neuron").first.wait_for()
    book.cell(3).locator(".cm-content").click()
    book.command("notebook:run-cell")
    book.cell(3).get_by_text("asked 1").wait_for()
    book.cell(0).locator("select").first.select_option("layer 1")
    book.cell(0).get_by_text("attention of layer 1").wait_for()
    book.cell(0).get_by_text("1.0").first.wait_for()
    assert book.page.outside == [] and book.page.errors == []
