"The bench of causal estimates, at a size that only shows that it runs, and what its bounds are."
import pytest
import torch

from sae_lab.bench import causal as bench


@pytest.fixture
def small(monkeypatch):
    for name, value in {"PROMPTS": 3, "CONTROLS": 2, "D_SAE": 64, "K": 4, "STEPS": 3}.items():
        monkeypatch.setattr(bench, name, value)


def test_rows_have_every_case(small):
    "Each case, its bound, and the ratio."
    rows = {row.case: row for row in bench.rows(reps=1)}
    assert list(rows) == ["edit/3", "atp", "ig"]
    assert all(row.value > 0 and row.bound > 0 and row.ratio > 0 and row.unit == "s" for row in rows.values())


def test_bounds_are_bare_passes(small):
    "As many passes on either side as the case says; the gradient is that of the metric by the embeddings."
    on, seen = bench.scene(), []
    with torch.no_grad(): assert torch.equal(on.forward(), on.subject.logits(on.pairs.clean))
    with on.subject.lock:
        handle = on.subject.model.unembed.register_forward_hook(lambda *_: seen.append(1))
        try:
            passes = {}
            for name, both in bench.cases(on).items():
                for side, run in zip(("case", "bound"), both):
                    seen.clear()
                    run()
                    passes[name, side] = len(seen)
        finally: handle.remove()
    assert passes == {("edit/3", "case"): 5, ("edit/3", "bound"): 5, ("atp", "case"): 1, ("atp", "bound"): 1,
                      ("ig", "case"): 3, ("ig", "bound"): 1}
    slope, move = on.backward(), torch.randn(on.backward().shape, generator=torch.Generator().manual_seed(0))
    moved = lambda s: on.subject.run_with(on.pairs.clean, {"hook_embed": lambda x: x + s * 1e-3 * move})[0]
    ends = [on.metric(moved(s), on.pairs.clean) for s in (1, -1)]
    torch.testing.assert_close((ends[0] - ends[1]) / 2e-3, (slope * move).sum((1, 2)), rtol=2e-2, atol=2e-2)
