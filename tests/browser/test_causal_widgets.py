"Patch panel, heatmap, dose-response and steering in a real JupyterLab, over one lab and one kernel."
import re
from pathlib import Path

import nbformat
import pytest

pytestmark = pytest.mark.browser
LOOKS = Path(__file__).with_name("looks.js").read_text()

LAB = """
import tempfile, torch
torch.set_num_threads(1)
import ipywidgets
from sae_lab import Lab
from sae_lab.causal.pairs import indirect_object_pairs
lab = Lab(folder=tempfile.mkdtemp())
lab.collect(hook="blocks.2.hook_resid_post", tokens=20_000)
lab.train(d_sae=128, k=8, show=False)
pages = lab.index("topk-128", tokens=8_000)
busy, second = pages.stats["count"].nlargest(2).index.tolist()
pairs = indirect_object_pairs(lab.subject, 4)

def told(widget, of, name):
    "What Python knows, as text beside the widget."
    label = ipywidgets.Label(of(widget))
    widget.observe(lambda _: label.set_trait("value", of(widget)), name)
    return label
"""
CELLS = {
    "patch": "board = lab.patch(pairs, controls=4)\nboard",
    "choice": "told(board.panel, lambda w: f'python: {w.view.choice}', 'facts')",
    "heatmap": "heat = lab.heatmap(pairs, 'resid_post', progress=False)\nheat",
    "cell": "told(heat, lambda w: f'python: {w.cell}', 'selected')",
    "dose": "lab.dose(busy, pairs, strengths=(0, 1, 2), nats=.1)",
    "steer": "live = lab.steer({busy: 1.0, second: 0.0}, 'Once there was a fox', n=24)\nlive",
    "doses": "told(live, lambda w: f'python: {w.status} {w.doses}', ['doses', 'status'])",
}


@pytest.fixture(scope="module")
def desk(new_book):
    "A notebook with every causal widget, alive: the book."
    return new_book().open("causal.ipynb", LAB, *CELLS.values()).run(300)


@pytest.fixture
def at(desk):
    "The output of a cell by name, scrolled to."
    def find(name):
        place = desk.cell(1 + list(CELLS).index(name))
        place.scroll_into_view_if_needed()
        return place
    yield find
    assert desk.page.errors == [] and desk.page.outside == []


def test_a_latent_is_chosen_in_the_prompt_view(at, tmp_path):
    "A row of the prompt view is clicked; the panel edits that latent, shows its checks, and Python knows."
    board, told = at("patch"), at("choice")
    board.locator(".sl-prompt tbody tr, .sl-prompt .sl-p-list tr[tabindex]").first.click()
    panel = board.locator(".sl-patch")
    panel.locator(".sl-x-edit", has_text="ablate latent").wait_for()
    number = panel.get_by_label("latent", exact=True).input_value()
    told.get_by_text(f"Choice(latent={number}").wait_for()
    text = panel.inner_text()
    for said in ("No-op check", "is exactly 0", "Error kept", "decode(f′)", "4 random latents", "4 prompts",
                 "logit difference", "KL", "loss", "answer", "distractor", "edits tried (1)"):
        assert said in text, said
    assert panel.locator(".sl-x-on").count() > 0
    board.screenshot(path=str(tmp_path / "patch.png"))


def test_an_edit_is_changed_and_taken_back(at):
    "Operation, value, place and error reach Python; an earlier edit is made again; what cannot be done is said."
    board, told = at("patch"), at("choice")
    panel = board.locator(".sl-patch")
    panel.get_by_label("latent", exact=True).fill("5")
    panel.get_by_label("latent", exact=True).press("Enter")
    told.get_by_text("latent=5,").wait_for()
    panel.locator("label", has_text="set").first.click()
    panel.get_by_label("value", exact=True).fill("2.5")
    panel.get_by_label("value", exact=True).press("Enter")
    told.get_by_text(re.compile("operation='set', value=2.5")).wait_for()
    panel.locator(".sl-x-token").nth(3).click()
    told.get_by_text("at='chosen', positions=(3,)").wait_for()
    assert "numbers are of it alone" in panel.inner_text() and "1 prompt, so no interval" in panel.inner_text()
    panel.locator("label", has_text="dropped").click()
    told.get_by_text("error='drop'").wait_for()
    panel.get_by_text("unedited").first.wait_for()
    panel.locator(".sl-x-token").nth(0).click()
    panel.get_by_text("Special tokens are never edited.").wait_for()
    panel.get_by_label("answer").fill(" not one token")
    panel.get_by_label("answer").press("Enter")
    panel.locator(".sl-x-says.sl-error", has_text="one token").wait_for()
    panel.locator(".sl-x-past button").last.click()
    told.get_by_text("error='keep'").wait_for()


def test_keys_move_and_choose_tokens(desk, at):
    "Tokens are walked with arrows and chosen with Enter."
    panel, told = at("patch").locator(".sl-patch"), at("choice")
    panel.get_by_label("latent", exact=True).fill("7")
    panel.get_by_label("latent", exact=True).press("Enter")
    told.get_by_text("latent=7,").wait_for()
    panel.locator(".sl-x-token[tabindex='0']").focus()
    for key in ("Home", "ArrowRight", "ArrowRight", "Enter"): desk.page.keyboard.press(key)
    told.get_by_text("positions=(2,)").wait_for()
    assert panel.locator(".sl-x-token:focus").get_attribute("aria-selected") == "true"


def test_another_prompt_is_shown_in_both(at):
    "The prompt view follows the panel, and a text read there is edited in the panel."
    board, told = at("patch"), at("choice")
    panel, chooser = board.locator(".sl-patch"), board.locator(".sl-prompt")
    panel.get_by_label("prompt").fill("2")
    panel.get_by_label("prompt").press("Enter")
    told.get_by_text("prompt=2)").wait_for()
    words = panel.locator(".sl-x-token > span:first-child").all_inner_texts()[1:]
    chooser.locator(".sl-p-strip", has_text="".join(words).strip()[:20]).wait_for()
    box = chooser.locator("textarea")
    box.fill("The small fox saw a crow")
    chooser.get_by_role("button", name="read").click()
    panel.locator(".sl-x-token", has_text="fox").wait_for()
    assert not panel.get_by_label("prompt").is_visible()
    told.get_by_text("prompt=0)").wait_for()


def test_cells_of_a_heatmap(desk, at, tmp_path):
    "A cell is pointed at, chosen by mouse and by keys, and known in Python."
    place, told = at("heatmap"), at("cell")
    picture = place.locator(".sl-h-map svg")
    place.screenshot(path=str(tmp_path / "heatmap.png"))
    box = picture.bounding_box()
    desk.page.mouse.move(box["x"] + 80, box["y"] + box["height"] - 10)
    assert "prompts" in place.locator(".sl-note").inner_text()
    desk.page.mouse.click(box["x"] + 80, box["y"] + box["height"] - 10)
    told.get_by_text("'layer': '3', 'position': 'IO'").wait_for()
    picture.focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowUp", "Enter"): desk.page.keyboard.press(key)
    told.get_by_text("'layer': '2', 'position': 'S2'").wait_for()
    desk.page.keyboard.press("Escape")
    told.get_by_text("python: None").wait_for()


def test_a_dose_shows_its_controls_and_natural_range(at):
    text = at("dose").locator(".sl").inner_text()
    for said in ("matched random controls, 4", "95 % interval over 4 prompts", "0.1 nats", "90 %", "natural range",
                 "change of logit difference, logits", "error kept", "moves logits by at most 0"):
        assert said in text, said


def written(place):
    "The texts, when all are written."
    place.get_by_role("button", name="Run", exact=True).wait_for(timeout=60_000)
    return place.locator(".sl-st-flow").all_inner_texts()


def put(place, label, value):
    "Write a number into a box as a person does."
    box = place.get_by_label(label, exact=True)
    box.click(click_count=3)
    box.press_sequentially(value)
    box.press("Enter")


def test_text_is_streamed_side_by_side(at, tmp_path):
    "Three texts come; a slider moves, they are written anew, and differ; one seed gives them again."
    place, told = at("steer"), at("doses")
    first = written(place)
    assert len(first) == 3 and all(text.startswith("Once there was a fox") for text in first)
    place.get_by_label("dose of latent").first.focus()
    for _ in range(20): place.page.keyboard.press("ArrowRight")
    told.get_by_text(re.compile("running .*'value': 2")).wait_for()
    told.get_by_text(re.compile("finished .*'value': 2")).wait_for(timeout=60_000)
    now = written(place)
    assert now[0] == first[0] and now[1] != first[1]
    assert "above every natural activation" in place.inner_text()
    place.screenshot(path=str(tmp_path / "steering.png"))
    put(place, "seed", "7")
    told.get_by_text("python: running").wait_for()
    assert written(place)[0] != now[0]
    put(place, "seed", "0")
    told.get_by_text("python: running").wait_for()
    assert written(place) == now


def test_with_nothing_added_the_texts_are_the_same(at):
    place, told = at("steer"), at("doses")
    place.get_by_role("button", name="All to 0").click()
    told.get_by_text(re.compile(r"finished .*'value': 0\b.*'value': 0\b")).wait_for(timeout=60_000)
    place.get_by_role("region", name="steered text").get_by_text("nothing is added").wait_for()
    one, two = written(place)
    assert one == two


def test_writing_is_stopped_and_errors_are_read(at):
    "A long text is stopped; a latent that is none is refused; doses are fitted to a divergence."
    place, told = at("steer"), at("doses")
    put(place, "tokens", "200")
    told.get_by_text("python: running").wait_for()
    place.get_by_role("button", name="Stop").click()
    told.get_by_text("python: stopped").wait_for(timeout=60_000)
    place.get_by_text(re.compile(r"stopped after \d+ tokens")).wait_for()
    place.get_by_label("latent", exact=True).fill("128")
    place.get_by_role("button", name="Add").click()
    place.locator(".sl-error", has_text="0 to 127").wait_for()
    put(place, "tokens", "12")
    place.get_by_label("latent", exact=True).fill("3")
    place.get_by_role("button", name="Add").click()
    place.get_by_label("dose of latent 3", exact=True).focus()
    place.page.keyboard.press("ArrowRight")
    told.get_by_text(re.compile(r"finished .*'latent': 3, 'op': 'add', 'value': 0.05")).wait_for(timeout=60_000)
    place.get_by_role("button", name="Scale to KL").click()
    place.get_by_text("a mean KL of 0.1 nats a token").wait_for(timeout=60_000)


@pytest.mark.parametrize(("theme", "width"), [("JupyterLab Dark", 1300), ("JupyterLab Dark", 700),
                                              ("JupyterLab Light", 700)])
def test_themes_and_widths(desk, at, theme, width, tmp_path):
    "Readable, and nothing sticks out."
    page = desk.page
    page.set_viewport_size({"width": width, "height": 1600})
    page.evaluate("theme => window.jupyterapp.commands.execute('apputils:change-theme', { theme })", theme)
    page.wait_for_function("dark => (document.body.dataset.jpThemeLight === 'false') === dark", arg="Dark" in theme)
    for name in ("patch", "heatmap", "dose", "steer"):
        for widget in at(name).locator(".sl").all():
            looks = widget.evaluate(LOOKS)
            assert looks["text"] and not looks["dim"] and not looks["wide"], (name, looks)
        at(name).screenshot(path=str(tmp_path / f"{name}.png"))
    page.set_viewport_size({"width": 1300, "height": 1600})


def test_run_again_and_kept(desk, at):
    "Cells run again show one widget each, and the file keeps what was shown last, for whoever has no kernel."
    desk.run(300)
    for name in ("patch", "heatmap", "steer"): assert at(name).locator(".sl-patch, .sl-heat, .sl-steer").count() == 1
    board, told = at("patch"), at("choice")
    board.get_by_label("latent", exact=True).fill("11")
    board.get_by_label("latent", exact=True).press("Enter")
    told.get_by_text("latent=11,").wait_for()
    at("doses").get_by_text("python: finished").wait_for(timeout=60_000)
    desk.page.wait_for_timeout(300)
    stored = nbformat.read(desk.save("causal.ipynb"), 4)
    html = {name: "".join(out["data"].get("text/html", "") for out in stored.cells[1 + i].outputs if "data" in out)
            for i, name in enumerate(CELLS)}
    assert "ablate latent 11" in html["patch"] and "is exactly 0" in html["patch"]
    assert "steered" in html["steer"] and "new word pairs" in html["steer"]
    assert "controls reach" in html["heatmap"] and "matched random controls" in html["dose"]
