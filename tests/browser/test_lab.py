"The first lines a user types, in a real JupyterLab: curves that move, a card, nothing asked of any network."
import pytest

pytestmark = pytest.mark.browser


def test_train_and_show(run_cells, tmp_path):
    "Training draws curves under one display and the card of a latent appears, hostile text harmless."
    page = run_cells(
        "first.ipynb", "from sae_lab import Lab\nfrom sae_lab.views.tokens import TokenStrip\n"
        f"lab = Lab(folder={str(tmp_path)!r})\nlab.collect(tokens=30_000)\nlab.train(d_sae=[128, 512], k=16);",
        "lab.index('topk-128', tokens=8_000)\nlab.show(int(lab.indexes['topk-128'].stats['count'].idxmax()))",
        "TokenStrip(('<img src=x onerror=window.hit=1>', '</script><script>window.hit=1</script>'), (1.0, .5))")
    outputs = page.locator(".jp-OutputArea-output")
    page.locator(".jp-OutputArea-output", has_text="decoder norm").wait_for(timeout=300_000)
    page.get_by_text("onerror").first.wait_for(timeout=60_000)
    first = page.locator(".jp-CodeCell").nth(0).locator(".jp-OutputArea-output")
    assert first.count() == 1, "curves are redrawn under one display"
    assert first.locator("svg").count() >= 4
    assert outputs.locator("table").count() >= 1
    assert page.evaluate("window.hit") is None
    assert page.outside == [] and page.errors == []
