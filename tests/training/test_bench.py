"The bench of a training step, at a size that only shows that it runs."
from sae_lab.bench import train as bench


def test_rows_have_every_case(monkeypatch):
    "Each case, its bound, and the ladder against the sum of its own steps."
    for name, value in {"D_IN": 16, "K": 2, "BATCH": 32, "THREADS": 1, "SIZES": (32, 64, 128)}.items():
        monkeypatch.setattr(bench, name, value)
    kinds = {"topk": ("topk", {"k": 2}), "batchtopk": ("batchtopk", {"k": 2}), "l1": ("relu_l1", {})}
    monkeypatch.setattr(bench, "KINDS", kinds)
    cases = {"topk/64": 0.0, "batchtopk/128": 0.0, "l1/64": 0.0, "topk/128+aux10": 0.1}
    monkeypatch.setattr(bench, "CASES", cases)
    rows = {row.case: row for row in bench.rows(reps=1)}
    assert list(rows) == [*cases, "ladder/32+64+128"]
    assert all(row.value > 0 and row.bound > 0 and row.ratio > 0 and row.unit == "s" for row in rows.values())
