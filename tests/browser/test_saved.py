"A saved notebook with ten widgets is small, and can be read where no widget lives."
import re

import nbformat
import pytest

from sae_lab.views.widget import widgets

pytestmark = pytest.mark.browser
KINDS = [name for name in widgets if name != "circuitsvis"]
TEN = [KINDS[i % len(KINDS)] for i in range(10)]


@pytest.fixture(scope="module")
def saved(new_book):
    "Ten widgets run and saved in JupyterLab: the file."
    book = new_book().open("ten.ipynb", "from sae_lab.views.widget import widgets",
                           *(f"widgets[{name!r}].meta['example']()" for name in TEN))
    book.run()
    book.page.locator(".sl").nth(9).wait_for()
    return book.save("ten.ipynb")


def test_ten_widgets_take_less_than_a_megabyte(saved):
    assert saved.stat().st_size < 1_000_000
    assert "widgets" not in nbformat.read(saved, 4).metadata


def test_reopened_without_a_kernel(saved, new_book):
    "Sent to somebody who does not trust it and has no such kernel: the static HTML, cleaned, is there."
    made = nbformat.read(saved, 4)
    made.metadata = {"kernelspec": {"name": "gone", "display_name": "gone", "language": "gone"},
                     "language_info": {"name": "gone"}}
    nbformat.write(made, saved.with_name("sent.ipynb"))
    book = new_book()
    book.page.goto(f"{book.address}/lab/tree/sent.ipynb?reset")
    book.page.locator(".jp-Dialog .jp-mod-reject", has_text="No Kernel").click(timeout=60_000)
    book.page.locator(".jp-CodeCell").nth(10).wait_for()
    book.page.wait_for_timeout(1_000)
    for i, name in enumerate(TEN, start=1):
        shown = book.cell(i).locator(".jp-RenderedHTML").first
        assert shown.is_visible() and len(shown.inner_text().strip()) > 15, name
    assert book.page.outside == [] and book.page.errors == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_through_nbconvert_with_scripts_stripped(saved, new_page, tmp_path, scheme):
    from nbconvert import HTMLExporter
    html = HTMLExporter(theme=scheme).from_filename(str(saved))[0]
    path = tmp_path / "ten.html"
    path.write_text(re.sub(r"<script\b.*?</script>", "", html, flags=re.S), encoding="utf-8")
    page = new_page(java_script_enabled=False)
    page.goto(path.as_uri())
    seen = [each for each in page.locator(".sl-still").all() if each.is_visible()]
    assert len(seen) == 10 and all(len(each.inner_text().strip()) > 15 for each in seen)
    assert page.outside == []
