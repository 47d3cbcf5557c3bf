"Build the site in _docs from the notebooks: reference, course, gallery, benches, architecture. Needs no network."
import argparse
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT, SOURCE = ROOT / "_docs", ROOT / "_docs" / ".source"
LAYERS = {"00_ground": "Ground", "01_coders": "Coders", "02_sources": "Sources", "03_splice": "Splice",
          "04_training": "Training", "05_features": "Features", "06_measures": "Measures", "07_causal": "Cause",
          "09_views": "Views", "10_lab": "Lab"}
OUTSIDE = re.compile(r"!\[([^\]]*)\]\(https?://[^)]*\)|<img[^>]*src=.https?:[^>]*>")  # pictures from a network: badges


def page(notebook: Path, target: Path) -> None:
    "Copy a notebook for the site: hidden cells out, directives off."
    book = json.loads(notebook.read_text())
    cells = []
    for cell in book["cells"]:
        text = "".join(cell["source"])
        if re.search(r"^#\| *(hide|default_exp)\b", text, re.M):
            continue
        if cell["cell_type"] == "code":
            text = re.sub(r"^#\|.*\n?", "", text, flags=re.M)
            live = "application/vnd.jupyter.widget-view+json"  # its static HTML stands in the output before it
            cell = {**cell, "outputs": [each for each in cell["outputs"] if live not in each.get("data", {})]}
        else:  # a displayed formula is a paragraph of its own, a picture from outside its words
            text = re.sub(r"\s*\$\$(.+?)\$\$\s*", r"\n\n$$\n\1\n$$\n\n", text, flags=re.S)
            text = OUTSIDE.sub(lambda found: found[1] or "picture", text)
        cells.append({**cell, "source": text})
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({**book, "cells": cells}))


def section(name: str, title: str, names: list[str]) -> str:
    "Write the page that lists a section; return its name."
    tree = ["# " + title, "", "```{toctree}", ":maxdepth: 1", "", *names, "```", ""]
    (SOURCE / name).parent.mkdir(parents=True, exist_ok=True)
    (SOURCE / f"{name}.md").write_text("\n".join(tree))
    return name


def notebooks(folder: str) -> list[str]:
    "Lay out the notebooks of a folder; one that was executed below runs/ is shown with what it found."
    names = []
    for notebook in sorted((ROOT / "nbs" / folder).glob("*.ipynb")):
        done = ROOT / "runs" / notebook.stem / notebook.name
        page(done if done.is_file() else notebook, SOURCE / folder / notebook.name)
        names.append(notebook.stem)
    return names


def run_course() -> None:
    "Run each notebook of the course that is newer than its executed copy in runs/; the ladder is trained once."
    from sae_lab.tour import run_notebook, terminal
    for notebook in sorted((ROOT / "nbs" / "tutorials").glob("0*.ipynb")):
        done = ROOT / "runs" / notebook.stem / notebook.name
        if done.is_file() and done.stat().st_mtime > notebook.stat().st_mtime:
            continue
        part = done.with_suffix(".part")
        print(f"{notebook.stem}: {run_notebook(notebook, part, terminal()):.0f} s")
        part.replace(done)  # only where no cell failed


def family(name: str) -> str:
    "Write the table of all coders, from the registry; return its name."
    from sae_lab.coders.contract import coders
    facts = {"idea": "idea", "good at": "good", "bad at": "bad", "paper": "paper"}
    lines = ["# Every coder", "", "| kind | " + " | ".join(facts) + " | made by |", "|---|" + "---|" * (len(facts) + 1)]
    for kind in coders:
        meta = coders[kind].meta
        how = "training" if meta["recipe"] else "solving" if meta["solve"] else "hand"
        cells = [str(meta[key]).replace("|", "\\|") for key in facts.values()]
        lines.append(f"| `{kind}` | " + " | ".join(cells) + f" | {how}{', a control' if meta['control'] else ''} |")
    (SOURCE / name).parent.mkdir(parents=True, exist_ok=True)
    (SOURCE / f"{name}.md").write_text("\n".join(lines) + "\n")
    return name


@contextmanager
def browser():
    "A headless Chromium, or None where there is none."
    from sae_lab.views.figures import browser_path
    if not browser_path() or not importlib.util.find_spec("playwright"):
        yield None
        return
    from playwright.sync_api import sync_playwright
    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=browser_path(), args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


def alone(name: str) -> tuple[str, str]:
    "A widget's example as a page of its own, and what on it is the widget."
    from sae_lab.views.circuitsvis import circuits_page
    from sae_lab.views.widget import standalone, widgets
    example = widgets[name].meta["example"]()
    if name == "circuitsvis" and importlib.util.find_spec("circuitsvis"):  # no kernel hands out its bundle there
        return circuits_page([example.view], name), "#sl-cv-0"
    return standalone(example, name), "#live"


def portrait(chromium, name: str) -> str:
    "Lay out a widget as a page of its own and as two pictures of it; the HTML that shows them."
    folder = SOURCE / "extra" / "gallery"
    folder.mkdir(parents=True, exist_ok=True)
    html, place = alone(name)
    (folder / f"{name}.html").write_text(html, encoding="utf-8")
    shown = f'<p><a href="gallery/{name}.html">Open it</a>: all but what takes a kernel works there.</p>'
    for scheme in ("light", "dark") if chromium else ():
        page = chromium.new_page(viewport={"width": 1100, "height": 700}, color_scheme=scheme, device_scale_factor=1.5)
        page.goto((folder / f"{name}.html").as_uri())
        page.locator("#still").wait_for(state="detached")
        page.wait_for_timeout(500)
        page.locator(place).screenshot(path=folder / f"{name}-{scheme}.png")
        page.close()
        shown += f'<img class="only-{scheme}" alt="{name}" src="gallery/{name}-{scheme}.png" style="max-width:100%">'
    return shown


def gallery(name: str) -> str:
    "Write the page that shows every view and a picture of every widget, from the registries; return its name."
    from sae_lab.views.payload import views
    from sae_lab.views.widget import widgets
    lines = ["# Gallery", "", "Every widget and every view, drawn from made-up examples.", "", "## Widgets", ""]
    raw = lambda html: ["```{raw} html", html.replace("\n", " "), "```", ""]
    with browser() as chromium:
        for each in widgets:
            if each != "plain":
                lines += [f"### {each}", "", f"{widgets[each].meta['idea']}.", "", *raw(portrait(chromium, each))]
    lines += ["## Views", "", "Static HTML: what stays in a saved notebook, without a kernel and without scripts.", ""]
    for each in views:
        html = views[each].meta["example"]().to_html()
        lines += [f"### {each}: a view", "", f"{views[each].meta['idea']}.", "", *raw(html)]
    (SOURCE / f"{name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return name


def check() -> str:
    "Open every page of the site in a browser; what was seen. Ends the build if a page asks for anything outside."
    asked, pages = set(), sorted(OUT.rglob("*.html"))
    with browser() as chromium:
        if not chromium:
            return "no browser: requests were not checked"
        page = chromium.new_page()
        inside = ("file:", "data:", "blob:")
        page.on("request", lambda r: None if r.url.startswith(inside) else asked.add((page.url, r.url)))
        for path in pages:
            page.goto(path.as_uri(), wait_until="load")
    if asked:
        raise SystemExit("\n".join(f"{where} asks for {what}" for where, what in sorted(asked)))
    return f"{len(pages)} pages opened in a browser, none asks for anything outside"


def about() -> list[str]:
    "Lay out the pages that are written as Markdown."
    pages = sorted((ROOT / "docs").rglob("*.md"))
    for path in pages:
        target = SOURCE / "about" / path.relative_to(ROOT / "docs")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    for path in (ROOT / "docs").rglob("*.svg"):  # pictures in them
        shutil.copy(path, SOURCE / "about" / path.relative_to(ROOT / "docs"))
    return [str(p.relative_to(ROOT / "docs").with_suffix("")) for p in pages]


def main() -> None:
    "Run the course, lay the pages out and let Sphinx make them HTML."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--as-it-is", action="store_true", help="do not run the course: show what was run before")
    if not parser.parse_args().as_it_is:
        run_course()
    shutil.rmtree(OUT, ignore_errors=True)
    SOURCE.mkdir(parents=True)
    for name in ("conf.py", "mathml.py"):
        shutil.copy(ROOT / "docs" / name, SOURCE)
    layers = [section(f"{folder}/index", title, notebooks(folder)) for folder, title in LAYERS.items()]
    more = section("tutorials/coders/index", "The coder family", notebooks("tutorials/coders"))
    parts = [section("tutorials/index", "Tutorials", [*notebooks("tutorials"), f"/{more}"]), gallery("gallery"),
             family("coders"),
             section("reference", "Reference", layers), section("about/index", "About", about())]
    readme = (ROOT / "README.md").read_text().replace("](docs/", "](about/")
    tree = ["", "```{toctree}", ":hidden:", "", *parts, "```", ""]
    (SOURCE / "index.md").write_text(readme + "\n".join(tree))
    subprocess.run([sys.executable, "-m", "sphinx", "-q", "-b", "html", str(SOURCE), str(OUT)], check=True, cwd=SOURCE)
    shutil.copytree(SOURCE / "extra", OUT, dirs_exist_ok=True)  # pages and pictures of widgets
    shutil.rmtree(SOURCE)
    shutil.rmtree(ROOT / "jupyter_execute", ignore_errors=True)  # what myst-nb leaves beside the site
    print(f"The site is at {OUT / 'index.html'}: {check()}")


if __name__ == "__main__":
    main()
