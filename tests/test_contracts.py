"Everything that is registered keeps the contract of its kind, from training to measures, whatever is added later."
from itertools import islice

import pytest
import torch

from sae_lab.coders.contract import LAWS, check_coder, coders, load, make
from sae_lab.coders.gates import AbstractGate, gates
from sae_lab.ground.sums import Measure
from sae_lab.ground.toy import sparse_mixture
from sae_lab.measures.reconstruction import measures, reconstruction
from sae_lab.sources.documents import Document
from sae_lab.sources.readers import corpora
from sae_lab.sources.stream import TensorSource
from sae_lab.training.fit import train

TRAINED = [name for name in coders if coders[name].meta["recipe"] is not None]
OFFLINE = [name for name in corpora if name not in ("text", "jsonl", "conllu", "hf")]


def source(n=4096, d=16):
    "Sparse toy data as a source."
    x, _ = sparse_mixture(n_features=32, d=d, active=2, seed=0).sample(n, seed=1)
    return TensorSource(x, batch=256)


def new(kind, d=16):
    "A small coder of a kind; a control that keeps the axes has as many latents as inputs."
    return make(kind, d_in=d, d_sae=d if kind in ("neurons", "pca") else 64)


@pytest.mark.parametrize("kind", coders)
def test_laws(kind):
    "Every coder keeps every law."
    assert check_coder(new(kind)) == list(LAWS)


@pytest.mark.parametrize("kind", coders)
def test_facts(kind):
    "Every coder says what it is, where it is from, and what it is good and bad at."
    meta = coders[kind].meta
    assert meta["idea"] and meta["good"] and meta["bad"]
    assert meta["paper"] or meta["control"]


@pytest.mark.parametrize("kind", TRAINED)
def test_trained_saved_measured(kind, tmp_path):
    "Every trained coder learns through fit, comes back from disk, and is measured with intervals."
    data = source()
    before = reconstruction(new(kind), data)["fvu"]
    coder = next(iter(train(new(kind), TensorSource(data.acts, batch=256, epochs=20), progress=False).values()))
    assert check_coder(coder) == list(LAWS)
    again = load(coder.save(tmp_path / kind))
    found = reconstruction(again, data)
    assert again.identity == coder.identity
    assert found["fvu"].value < before.value
    assert all(isinstance(m, Measure) and m.low <= m.value <= m.high for m in found.values())
    assert all(m.count == data.n_tokens for m in found.values())


@pytest.mark.parametrize("name", gates)
def test_gates(name):
    "Every gate gives codes of the rows it is given, each row on its own."
    kinds = {"k": 3, "d_sae": 24}
    gate_type = gates[name].value
    wanted = gate_type.__init__.__code__.co_varnames[1:gate_type.__init__.__code__.co_argcount]
    gate = gate_type(**{key: kinds[key] for key in wanted if key in kinds})
    assert isinstance(gate, AbstractGate)
    pre = torch.randn(8, 24, generator=torch.Generator().manual_seed(0))
    whole = gate(pre).dense()
    assert whole.shape == pre.shape
    assert torch.equal(torch.cat([gate(row[None]).dense() for row in pre]), whole)
    kept = whole != 0
    assert not gate.affine or torch.equal(whole[kept], pre[kept])


@pytest.mark.parametrize("name", measures)
def test_measures(name):
    "Every measure says its unit, its direction and what it is about."
    meta = measures[name].meta
    assert meta["unit"] and meta["about"] and meta["better"] in ("higher", "lower", "neither")


@pytest.mark.parametrize("name", OFFLINE)
def test_corpora(name):
    "Every corpus that needs no file gives documents with distinct ids, the same each time."
    first, second = (list(islice(corpora[name].value(), 50)) for _ in range(2))
    assert all(isinstance(d, Document) for d in first)
    assert len({d.id for d in first}) == len(first) and first == second


def test_every_kind_trains_on_one_stream():
    "Any mix of kinds, sizes, sparsities, seeds and hooks takes its steps together, each as it would alone."
    x, _ = sparse_mixture(n_features=32, d=16, active=2, seed=0).sample(2048, seed=1)
    data = TensorSource({"a": x, "b": x.flip(1).contiguous()}, batch=256)
    made = {}
    for i, kind in enumerate(TRAINED):
        coder = make(kind, d_in=16, d_sae=64 if i % 2 else 96, seed=i)
        hooks = ("a", "b") if "transcoder" in kind else ("b", "b") if i % 3 else ("a", "a")
        coder.spec = coder.spec.with_(hooks_in=hooks[:1], hooks_out=hooks[1:])
        made[kind] = coder
    crossed = make("crosscoder_batchtopk", d_in=32, d_sae=64, widths=[16, 16], k=3)
    crossed.spec = crossed.spec.with_(hooks_in=("a", "b"), hooks_out=("a", "b"))
    made |= {"both hooks": crossed, "another k": new("topk")}
    made["another k"].spec = made["another k"].spec.with_(hooks_in=("b",), hooks_out=("b",))
    some = {name: made[name].spec for name in ("topk", "jumprelu", "both hooks")}
    apart = {name: make(spec.kind, **spec.args) for name, spec in some.items()}
    for name, coder in apart.items(): coder.spec = made[name].spec
    together = train(made, data, progress=False)
    for name, coder in apart.items():
        assert train(coder, data, progress=False).popitem()[1].identity == together[name].identity, name
    assert all(check_coder(coder) for coder in together.values())
