"A real JupyterLab and Notebook 7 in a real Chromium, with nothing but this machine to talk to."
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

READY = """() => { const at = window.jupyterapp?.shell.currentWidget?.sessionContext;
return at?.isReady && at.session?.kernel?.connectionStatus === 'connected' && at.session.kernel.status === 'idle' }"""
OURS = ("blob:", "file:")  # where our scripts are run from: console errors from elsewhere are the host's own


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


def write_book(path, cells):
    "Write code cells as a notebook."
    kernel = {"name": "python3", "display_name": "python3", "language": "python"}
    cells = [nbformat.v4.new_code_cell(each) for each in cells]
    book = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    nbformat.write(book, path)


def watch(page, *inside):
    "Let a page note requests that leave the machine, errors nobody caught, and console errors of our scripts."
    page.outside, page.errors = [], []
    inside = ("data:", "blob:", "file:", "about:", "chrome:", *inside)
    page.on("request", lambda r: None if r.url.startswith(inside) else page.outside.append(r.url))
    page.on("websocket", lambda s: None if s.url.startswith(inside) else page.outside.append(s.url))

    def failed(error):
        stack = error.stack or str(error)
        if "/static/" not in stack or any(each in stack for each in OURS):
            page.errors.append(stack)

    page.on("pageerror", failed)

    def heard(message):
        if message.type == "error" and (message.location.get("url") or "").startswith(OURS):
            page.errors.append(message.text)

    page.on("console", heard)
    return page


class Book:
    "A notebook in JupyterLab, driven by the commands that its menus call."

    def __init__(self, page, address, root):
        self.page, self.address, self.root = page, address, root

    def write(self, name, *cells):
        "Write cells as a notebook."
        write_book(self.root / name, cells)

    def open(self, name, *cells):
        "Write cells as a notebook and open it in a fresh workspace."
        if cells:
            self.write(name, *cells)
        self.page.goto(f"{self.address}/lab/tree/{name}?reset")
        self.page.wait_for_function(READY, timeout=90_000)
        return self

    def command(self, name, **args):
        "Start one of JupyterLab's commands; it may wait for a dialog, so nobody waits for it here."
        self.page.evaluate("([name, args]) => { window.jupyterapp.commands.execute(name, args) }", [name, args])

    def run(self, seconds=120):
        "Run all cells and wait for the last one."
        over = self.page.evaluate("""seconds => Promise.race([
            window.jupyterapp.commands.execute('notebook:run-all-cells').then(() => true),
            new Promise(go => setTimeout(go, 1000 * seconds, false))])""", seconds)
        assert over, f"the cells took more than {seconds} s"
        wrong = self.page.evaluate("""() => window.jupyterapp.shell.currentWidget.content.widgets
            .flatMap((cell) => cell.model.outputs?.toJSON() ?? []).filter((output) => output.output_type === 'error')
            .map((output) => `${output.ename}: ${output.evalue}`)""")
        assert not wrong, "\n".join(wrong)[-3000:]
        return self

    def restart(self):
        "Restart the kernel, saying yes to the question."
        self.command("notebook:restart-kernel")
        self.page.locator(".jp-Dialog .jp-mod-accept").click()
        self.page.wait_for_selector(".jp-Dialog", state="detached")
        self.page.wait_for_function(READY, timeout=60_000)

    def save(self, name):
        "Save, and wait until the server has written the file."
        self.page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save').then(() => null)")
        return self.root / name

    def cell(self, i):
        "The cell at a place."
        return self.page.locator(".jp-CodeCell").nth(i)


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
    "A JupyterLab server, which serves Notebook 7 as well, with a home of its own: its address and its folder."
    home = tmp_path_factory.mktemp("jupyter")
    root = home / "root"
    root.mkdir()
    port = free_port()
    names = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR",
             "JUPYTERLAB_WORKSPACES_DIR", "SAE_LAB_HOME")
    folders = {name: str(home / name) for name in names}
    settings = home / "JUPYTERLAB_SETTINGS_DIR" / "@jupyterlab" / "notebook-extension"
    settings.mkdir(parents=True)  # every cell is laid out, in sight or not
    (settings / "tracker.jupyterlab-settings").write_text('{"windowingMode": "none"}')
    command = [sys.executable, "-m", "jupyterlab", "--allow-root", "--no-browser", "--ip=127.0.0.1", f"--port={port}",
               "--IdentityProvider.token=", "--LabApp.news_url=None", "--expose-app-in-browser",
               "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    with open(home / "log", "w") as log:
        server = subprocess.Popen(command, cwd=root, env={**os.environ, **folders}, stdout=log, stderr=log)
        try:
            answers(f"http://127.0.0.1:{port}/api").close()
            yield f"http://127.0.0.1:{port}", root
        finally:
            server.terminate()
            server.wait(20)


@pytest.fixture(scope="module")
def new_page(chromium):
    "Pages of a module, each in a context of its own; they note what leaves the machine and what goes wrong."
    contexts = []

    def new(*inside, **options):
        contexts.append(chromium.new_context(**{"viewport": {"width": 1300, "height": 1600}, **options}))
        return watch(contexts[-1].new_page(), *inside)

    yield new
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def new_book(new_page, jupyter):
    "Notebooks of a module in JupyterLab."
    address, root = jupyter
    return lambda: Book(new_page(address, address.replace("http", "ws")), address, root)


@pytest.fixture
def run_cells(new_book):
    "Open cells as a notebook in JupyterLab and run them all; gives the page."
    def run(name, *cells):
        book = new_book().open(name, *cells)
        book.command("notebook:run-all-cells")
        return book.page

    return run
