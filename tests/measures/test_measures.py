"Every measure against a plain float64 computation that holds everything at once."

from dataclasses import replace

import numpy as np
import pytest
import torch

from sae_lab.coders.contract import make
from sae_lab.ground.errors import InputError, NumericError
from sae_lab.measures.downstream import downstream_totals, measure, null_sums, random_like, scored
from sae_lab.measures.reconstruction import evaluate, frame, measures, reconstruction, reconstruction_totals
from sae_lab.sources.bridge import native
from sae_lab.sources.corpus import Tokens
from sae_lab.sources.stream import Stream, TensorSource
from sae_lab.sources.subject import Subject
from sae_lab.splice.splice import Splice, ports

HOOK = "blocks.0.hook_resid_post"


@pytest.fixture(scope="module")
def subject():
    return Subject.wrap(
        native(d_model=32, d_head=8, n_layers=2, n_ctx=64, n_heads=4, d_vocab=100, act_fn="gelu")
    )


@pytest.fixture(scope="module")
def coder():
    coder = make("topk", d_in=32, d_sae=96, k=6, seed=3)
    coder.spec = coder.spec.with_(hooks_in=(HOOK,), hooks_out=(HOOK,))
    with torch.no_grad():
        coder.get_parameter("b_enc")[:20] = -1e6
    return coder


@pytest.fixture(scope="module")
def tokens():
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 100, (40, 24), generator=g)
    doc = (torch.arange(40 * 24) // 50).reshape(40, 24)
    special = torch.zeros_like(ids, dtype=torch.bool)
    special[:, 0] = special[-1, 15:] = True
    doc[-1, 15:] = -1
    return Tokens(ids, doc, special, tuple(f"d{i}" for i in range(20)), {"source": "noise"})


@pytest.fixture(scope="module")
def found(coder, subject, tokens):
    return measure(coder, subject, tokens, null=make("random", d_in=32, d_sae=96, k=6))


@pytest.fixture(scope="module")
def flat(coder, subject, tokens):
    "Activations, reconstruction and codes of all text tokens, float64."
    x = subject.run(tokens.ids, [HOOK])[HOOK][~tokens.special]
    with torch.no_grad():
        codes, y = coder(x)
    return x.double(), y.double(), codes.dense().double()


def test_reconstruction_measures_are_the_naive_ones(found, flat):
    x, y, z = flat
    fvu = ((x - y) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    naive = {
        "mse": ((x - y) ** 2).sum(1).mean(),
        "fvu": fvu,
        "explained_variance": 1 - fvu,
        "cosine": torch.cosine_similarity(x, y, dim=1).mean(),
        "l2_ratio": (y.norm(dim=1) / x.norm(dim=1)).mean(),
        "reconstruction_bias": (y**2).sum() / (x * y).sum(),
        "l0": (z != 0).sum(1).double().mean(),
        "l1": z.abs().sum(1).mean(),
        "density": (z != 0).double().mean(),
        "dense_1": ((z != 0).double().mean(0) > 0.01).double().mean(),
        "dense_10": ((z != 0).double().mean(0) > 0.1).double().mean(),
        "dead": (z == 0).all(0).double().mean(),
    }
    for name, value in naive.items():
        assert found[name].value == pytest.approx(float(value), rel=1e-5, abs=1e-12), name
    assert found["dead"].value >= 20 / 96 and all(found[name].count == len(x) for name in naive)


def test_downstream_measures_are_the_naive_ones(found, coder, subject, tokens, flat):
    keep, mask, mean = scored(tokens), ~tokens.special, flat[0].mean(0).float()
    target = tokens.ids[:, 1:][keep]

    def run(fn):
        def edit(act):
            out = act.clone()
            if fn:
                out[mask] = fn(act[mask])
            return out

        return subject.run_with(tokens.ids, {HOOK: edit})[0][:, :-1][keep].double().log_softmax(-1)

    with torch.no_grad():
        logp = {
            "clean": run(None),
            "coder": run(lambda a: coder(a)[1]),
            "zero": run(torch.zeros_like),
            "mean": run(lambda a: mean.expand_as(a)),
        }
    ce = {name: -p[torch.arange(len(target)), target].mean().item() for name, p in logp.items()}
    kl = {name: (logp["clean"].exp() * (logp["clean"] - p)).sum(-1).mean().item() for name, p in logp.items()}
    for name in ce:
        assert found[f"ce_{name}"].value == pytest.approx(ce[name], rel=1e-6)
    for name in ("coder", "zero", "mean"):
        assert found[f"kl_{name}"].value == pytest.approx(kl[name], rel=1e-4)
    for floor in ("zero", "mean"):
        assert found[f"ce_recovered_{floor}"].value == pytest.approx(
            (ce[floor] - ce["coder"]) / (ce[floor] - ce["clean"]), rel=1e-3
        )
        assert found[f"kl_recovered_{floor}"].value == pytest.approx(
            (kl[floor] - kl["coder"]) / kl[floor], rel=1e-4
        )


def test_every_measure_is_there_with_interval_null_and_sample(found, tokens):
    assert set(found) == {*measures, "masked"}
    assert (
        found["masked"].value == pytest.approx(tokens.special.double().mean().item())
        and found["masked"].count == tokens.ids.numel()
    )
    for name, m in found.items():
        if name == "masked":
            continue
        assert m.unit and m.docs >= 19 and np.isfinite([m.low, m.high]).all(), name
        assert (m.null is None) == (name in ("ce_clean", "ce_zero", "ce_mean", "kl_zero", "kl_mean"))
        if name not in ("dead", "dense_1", "dense_10"):
            assert m.low <= m.value <= m.high, name
    assert found["dead"].low <= found["dead"].high and len(frame(found)) == len(found)


def test_the_null_is_what_the_null_coder_scores(found, subject, tokens, coder):
    null = make("random", d_in=32, d_sae=96, k=6)
    own = measure(null, subject, tokens, hook=HOOK, r=2)
    for name, m in found.items():
        if m.null is not None:
            assert m.null == pytest.approx(own[name].value, rel=1e-9), name


def test_the_ready_made_null_is_blind_but_knows_the_mean(coder, subject, tokens, flat):
    found = measure(coder, subject, tokens, null="random", r=20)
    blind = random_like(coder, found["l0"].value, flat[0].mean(0).float())
    y = blind(flat[0].float())[1].detach().double()
    naive = ((flat[0] - y) ** 2).sum() / ((flat[0] - flat[0].mean(0)) ** 2).sum()
    assert found["fvu"].null == pytest.approx(float(naive), rel=1e-4) and found["l0"].null == 6
    with pytest.raises(InputError, match="autoencoder"):
        random_like(make("topk", d_in=32, d_sae=8, k=2, d_out=16), 2.0, torch.zeros(32))
    with pytest.raises(InputError, match="null='best'"):
        measure(coder, subject, tokens, null="best", r=2)


def test_batches_do_not_matter(coder, subject, tokens):
    a, b = (
        reconstruction_totals(coder, Stream(subject, tokens, HOOK, batch=size, seed=None))
        for size in (64, 1000)
    )
    for part in a:
        for name, m in evaluate(part, a[part]).items():
            other = evaluate(part, b[part])[name]
            assert (m.value, m.low, m.high) == pytest.approx(
                (other.value, other.low, other.high), rel=1e-5, abs=1e-9
            ), name


def test_shards_add_up(coder, subject, tokens):
    splices = {"coder": Splice(subject, coder, ports(subject, coder), error="drop")}
    whole, first, second = (
        downstream_totals(subject, part, splices) for part in (tokens, tokens[:11], tokens[11:])
    )
    both = first + second
    for name in whole.names:
        assert both[name] == pytest.approx(whole[name], rel=1e-6)
    assert torch.allclose(both.boot, whole.boot, rtol=1e-5)


def test_a_global_mean_not_a_batch_mean():
    x = torch.cat([torch.randn(500, 4), torch.randn(500, 4) + 10])
    coder = make("random", d_in=4, d_sae=4, k=1)
    y = coder(x)[1].detach().double()
    naive = ((x.double() - y) ** 2).sum() / ((x.double() - x.double().mean(0)) ** 2).sum()
    found = reconstruction(coder, TensorSource(x, batch=500, seed=None))
    assert found["fvu"].value == pytest.approx(float(naive), rel=1e-6) and found["fvu"].docs > 1


def test_a_perfect_coder_and_a_blind_one(subject, tokens):
    perfect, blind = make("neurons", d_in=32, k=None), make("topk", d_in=32, d_sae=8, k=1)
    with torch.no_grad():
        blind.get_parameter("b_enc").fill_(-1e6), blind.get_parameter("b_dec").zero_()
    best, worst = (measure(coder, subject, tokens, hook=HOOK, r=20) for coder in (perfect, blind))
    assert (
        best["fvu"].value < 1e-10
        and best["ce_recovered_zero"].value == pytest.approx(1, abs=1e-4)
        and best["kl_recovered_mean"].value == pytest.approx(1, abs=1e-5)
    )
    assert (
        worst["ce_recovered_zero"].value == 0
        and worst["kl_recovered_zero"].value == 0
        and worst["dead"].value == 1
        and worst["l0"].value == 0
    )


def test_a_transcoder_is_measured_at_its_output(subject, tokens):
    read, write = "blocks.0.ln2.hook_normalized", "blocks.0.hook_mlp_out"
    coder = make("topk", d_in=32, d_sae=64, k=4, d_out=32)
    coder.spec = coder.spec.with_(hooks_in=(read,), hooks_out=(write,))
    found = measure(coder, subject, tokens, r=20)
    acts = {name: act[~tokens.special] for name, act in subject.run(tokens.ids, [read, write]).items()}
    y, y_hat = acts[write].double(), coder(acts[read])[1].detach().double()
    assert found["fvu"].value == pytest.approx(
        float(((y - y_hat) ** 2).sum() / ((y - y.mean(0)) ** 2).sum()), rel=1e-5
    )


def test_nan_is_named_and_nothing_is_refused(coder, subject, tokens):
    x = torch.randn(100, 32)
    x[70, 0] = float("nan")
    with pytest.raises(NumericError):
        reconstruction(coder_without_hooks(), TensorSource(x, batch=50, seed=None))
    with pytest.raises(InputError, match="no prediction"):
        downstream_totals(subject, replace(tokens, special=torch.ones_like(tokens.special)), {})


def coder_without_hooks():
    return make("topk", d_in=32, d_sae=16, k=2)


def test_null_sums_stand_in_for_the_coder(coder, subject, tokens):
    where = ports(subject, coder)
    runs = {
        "coder": Splice(subject, coder, where, error="drop"),
        "null": Splice(subject, coder, where, mode="zero"),
    }
    totals = downstream_totals(subject, tokens, runs)
    assert (
        null_sums(totals)["kl_coder"] == totals["kl_null"]
        and null_sums(totals)["ce_clean"] == totals["ce_clean"]
    )
