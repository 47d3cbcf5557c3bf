"A real JupyterLab in a real Chromium, with nothing but this machine to talk to."
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import nbformat
import pytest
from playwright.sync_api import TimeoutError as PlaywrightTimeout


def free_port():
    "A loopback port that nobody uses."
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answers(url, seconds=60):
    "Wait until a server answers."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            return urllib.request.urlopen(url, timeout=2)
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(.3)
    raise TimeoutError(f"{url} gave no answer in {seconds} s")


@pytest.fixture(scope="session")
def chromium():
    "A headless Chromium; tests are skipped where none is installed."
    sync_api = pytest.importorskip("playwright.sync_api")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=path, args=options)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def jupyter(tmp_path_factory):
    "A JupyterLab server with a home of its own: its address and its folder."
    home = tmp_path_factory.mktemp("jupyter")
    root = home / "root"
    root.mkdir()
    port = free_port()
    names = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR",
             "JUPYTERLAB_WORKSPACES_DIR", "SAE_LAB_HOME")
    folders = {name: str(home / name) for name in names}
    command = [sys.executable, "-m", "jupyterlab", "--allow-root", "--no-browser", "--ip=127.0.0.1", f"--port={port}",
               "--IdentityProvider.token=", "--LabApp.news_url=None",
               "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    with open(home / "log", "w") as log:
        server = subprocess.Popen(command, cwd=root, env={**os.environ, **folders}, stdout=log, stderr=log)
        try:
            answers(f"http://127.0.0.1:{port}/api").close()
            yield f"http://127.0.0.1:{port}", root
        finally:
            server.terminate()
            server.wait(20)


@pytest.fixture
def run_cells(chromium, jupyter):
    "Open cells as a notebook in JupyterLab and run them all; the page notes requests that leave the machine."
    address, root = jupyter
    context = chromium.new_context(viewport={"width": 1300, "height": 1600})
    page = context.new_page()
    page.outside, page.errors = [], []
    inside = (address, "data:", "blob:", address.replace("http", "ws"))
    page.on("request", lambda r: None if r.url.startswith(inside) else page.outside.append(r.url))
    page.on("pageerror", lambda e: page.errors.append(str(e)))

    def run(name, *cells):
        kernel = {"name": "python3", "display_name": "python3", "language": "python"}
        book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells],
                                        metadata={"kernelspec": kernel})
        nbformat.write(book, root / name)
        page.goto(f"{address}/lab/tree/{name}?reset")
        idle = ".jp-Notebook-ExecutionIndicator[data-status=idle]"
        page.wait_for_selector(idle, timeout=90_000)
        for _ in range(5):  # a click right after the kernel is ready may be lost
            page.locator(".jp-Notebook .jp-CodeCell").first.click()
            page.get_by_role("menuitem", name="Run", exact=True).click()
            page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
            begun = page.locator(".jp-InputPrompt", has_text="*").or_(page.locator(".jp-OutputArea-output"))
            try:
                begun.first.wait_for(timeout=5_000)
                return page
            except PlaywrightTimeout:
                continue
        raise AssertionError("JupyterLab did not run the cells")

    yield run
    context.close()
