"The bench of features at a size that only shows that it runs, and its known hierarchy."

from sae_lab.bench import features as bench
from sae_lab.features.index import FeatureIndex


def test_every_case_runs_and_the_hierarchy_is_found(tmp_path, monkeypatch):
    "Four latents of `large` are one of `small`: splitting shows these edges and no others."
    monkeypatch.setattr(bench, "SIZES", {"small": 64, "large": 256, "again": 256})
    bench.coder.cache_clear()
    tokens = bench.text(6_000)
    for name in bench.SIZES:
        FeatureIndex.build(bench.Reader(name), bench.Drawn(tokens), tokens, tmp_path / name)
    cases = bench.cases(tmp_path)
    assert len(cases) == 7
    found = {name: run() for name, run in cases.items() if name != "neighbours of 10"}
    bench.coder.cache_clear()
    edges = found["splitting"].edges[found["splitting"].edges.shown]
    assert (edges.child // 4 == edges.parent).mean() >= 0.95 and edges.child.nunique() >= 0.9 * 256
    assert len(found["concepts"]) == 256
