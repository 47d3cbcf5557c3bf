"fit: shared passes, units, bad batches, interruptions, resumption."
import errno
import functools
import math
import signal
import threading
from dataclasses import replace

import pytest
import torch

from sae_lab.coders.contract import Loss, coders, make
from sae_lab.ground.errors import DamagedFile, InputError, NumericError, ShapeError, UnknownName
from sae_lab.ground.toy import sparse_mixture
from sae_lab.sources.stream import TensorSource
from sae_lab.training import fit as fit_module
from sae_lab.training import run as run_module
from sae_lab.training.checkpoint import checkpoints, last_checkpoint
from sae_lab.training.events import Finished, Saved, Started, Step, Tick
from sae_lab.training.fit import fit, read_log, train

D = 24
DATA = 5 * sparse_mixture(n_features=40, d=D, active=3, seed=0).sample(6000, seed=1)[0]


def source(data=DATA, **kw):
    "Sixty batches of a hundred."
    return TensorSource(data, **{"batch": 100, **kw})


def topk(d_sae=48, **kw):
    "A new small coder, the same each time."
    return make("topk", d_in=D, d_sae=d_sae, **{"k": 3, **kw})


def unscaled(kind="topk"):
    "A recipe that does not look at the data before the first step."
    return replace(coders[kind].meta["recipe"], scale=False)


def test_together_is_bit_identical_to_alone():
    "Neither other coders nor their kinds, sizes or order change a bit."
    def make_all():
        return {"small": topk(), "big": topk(192), "batch": make("batchtopk", d_in=D, d_sae=64, k=2.5),
                "l1": make("relu_l1", d_in=D, d_sae=64)}
    together = train(make_all(), source(), progress=False)
    backwards = train(dict(reversed(make_all().items())), source(), progress=False)
    for name, coder in make_all().items():
        alone = train({name: coder}, source(), progress=False)[name]
        assert alone.identity == together[name].identity == backwards[name].identity, name


def test_events_in_order(tmp_path):
    "Started, ticks with a Step every few, Saved now and then, Finished."
    events = list(fit(topk(), source(), folder=tmp_path, metrics_every=7, every=0.25))
    assert isinstance(events[0], Started) and isinstance(events[-1], Finished)
    assert [e.step for e in events if isinstance(e, Step)] == [7, 14, 21, 28, 35, 42, 49, 56, 60]
    assert [e.step for e in events if isinstance(e, Saved)] == [15, 30, 45, 60]
    assert sum(isinstance(e, Tick | Step) for e in events) == 60
    log = read_log(tmp_path)
    assert log[0]["event"] == "started" and log[0]["run"]["source"] == source().identity
    assert log[0]["run"]["versions"]["torch"] == torch.__version__
    assert len(checkpoints(tmp_path)) == 2


def test_result_is_in_model_units():
    "What training reports of scaled data, the finished coder does on the data themselves."
    coder = topk()
    for event in fit(coder, source()):
        if event.step == 59: break
    *_, step, _ = fit(topk(), source())
    x = next(source().batches(59)).acts["toy"]
    with torch.no_grad(): fvu = ((x - coder(x)[1]) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    assert float(fvu) == pytest.approx(step.losses["topk-48"]["fvu"], rel=1e-4) and fvu < 0.5
    assert coder.spec.scale_in == pytest.approx(math.sqrt(D) / float(DATA.norm(dim=1).mean()), rel=1e-3)
    assert coder.spec.widths_in == (D,) and coder.spec.provenance["recipe"]["lr"] == coders["topk"].meta["recipe"].lr


def test_trained_coder_trains_on():
    "A second run starts where the first ended, in the right units."
    coder = topk()
    first = [e for e in fit(coder, source(epochs=2), metrics_every=1) if isinstance(e, Step)]
    second = [e for e in fit(coder, source(epochs=2), metrics_every=1) if isinstance(e, Step)]
    last, again = first[-1].losses["topk-48"]["fvu"], second[0].losses["topk-48"]["fvu"]
    assert again == pytest.approx(last, rel=0.3) and again < 0.5 * first[0].losses["topk-48"]["fvu"]


def test_several_hooks_and_a_transcoder():
    "One coder reads what another does not; widths and order are the spec's."
    hooks = {"a": DATA, "b": 3 * DATA[:, :10], "c": DATA[:, :16] * 0.1}
    across = make("topk", d_in=34, d_sae=64, k=3)
    across.spec = across.spec.with_(hooks_in=("b", "a"))
    over = make("topk", d_in=D, d_out=16, d_sae=64, k=3)
    over.spec = over.spec.with_(hooks_in=("a",), hooks_out=("c",))
    alone = topk()
    alone.spec = alone.spec.with_(hooks_in=("a",))
    given = {"across": across, "over": over, "alone": alone}
    steps = [e for e in fit(given, source(hooks, epochs=4)) if isinstance(e, Step)]
    assert all(steps[-1].losses[name]["fvu"] < 0.5 * steps[0].losses[name]["fvu"] for name in given)
    assert across.spec.widths_in == (10, D) and len(across.spec.scale_in) == 2
    assert over.spec.scale_out == pytest.approx(4 / float(hooks["c"].norm(dim=1).mean()), rel=1e-3)
    y = over(DATA)[1]
    assert ((hooks["c"] - y) ** 2).sum() < 0.5 * ((hooks["c"] - hooks["c"].mean(0)) ** 2).sum()
    assert alone.identity == train(topk(), source(epochs=4), progress=False)["topk-48"].identity


def test_arguments_are_refused():
    "Wrong widths, hooks, names, lengths and kinds are named before anything is computed."
    with pytest.raises(ShapeError, match="24"): fit(make("topk", d_in=D + 1, d_sae=8, k=2), source())
    lost = topk()
    lost.spec = lost.spec.with_(hooks_in=("tyo",))
    with pytest.raises(UnknownName, match="toy"): fit(lost, source())
    with pytest.raises(UnknownName, match="smal"): fit({"small": topk()}, source(), recipes={"smal": unscaled()})
    with pytest.raises(InputError, match="6000"): fit(topk(), source(), tokens=6001)
    with pytest.raises(InputError, match="control"): fit(make("random", d_in=D, d_sae=48), source())
    with pytest.raises(InputError): fit([], source())
    with pytest.raises(InputError): fit(topk(), source(), keep=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_data_stop_the_run(tmp_path, bad):
    "The batch, hook and rows are named; coders and checkpoint are from just before."
    data = DATA.clone()
    data[2050, 3] = bad
    given = {"one": topk(), "two": topk(96)}
    with pytest.raises(NumericError, match="batch 20 at toy") as caught:
        train(given, source(data, seed=None), recipes=unscaled(), folder=tmp_path, progress=False)
    found = caught.value
    assert (found.batch, found.hook, found.rows, found.what) == (20, "toy", [50], "data")
    good = train({"one": topk(), "two": topk(96)}, source(seed=None), recipes=unscaled(), progress=False)
    assert last_checkpoint(tmp_path).step == 20 and read_log(tmp_path)[-1]["event"] == "interrupted"
    assert all(bool(p.isfinite().all()) for c in given.values() for p in c.parameters())
    assert given["one"].spec.provenance["steps"] == 20 and good["one"].spec.provenance["steps"] == 60
    with pytest.raises(NumericError, match="batch 20"):  # and a resumed run meets it again
        again = {"one": topk(), "two": topk(96)}
        train(again, source(data, seed=None), recipes=unscaled(), folder=tmp_path, progress=False)


def breaking(objective, coder, x, y, hints, at=10, how="loss"):
    "An objective that breaks at one step."
    loss = objective(coder, x, y, hints)
    if hints.step != at: return loss
    total = loss.total * math.nan if how == "loss" else loss.total + (coder.b_dec * 0).sqrt().sum()
    return Loss(total, loss.parts, loss.codes, loss.updates)


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_one_bad_loss_stops_all_coders_at_the_same_step(tmp_path, how):
    "No coder is a step ahead, though another had its gradient already."
    recipe = unscaled()
    bad = replace(recipe, objective=functools.partial(breaking, recipe.objective, how=how))
    given = {"good": topk(), "bad": topk(96)}
    with pytest.raises(NumericError, match=f"{how} of coder 'bad'") as caught:
        train(given, source(), recipes={"good": recipe, "bad": bad}, folder=tmp_path, progress=False)
    assert (caught.value.coder, caught.value.batch, caught.value.what) == ("bad", 10, how)
    other = topk()
    for event in fit({"good": other}, source(), recipes=recipe):
        if event.step == 10: break
    assert given["good"].identity == other.identity and last_checkpoint(tmp_path).step == 10


def interrupt_in(where, monkeypatch, at=25):
    "Raise Ctrl-C inside a gradient or while weights change."
    name = {"gradient": "gradients", "update": "update_"}[where]
    plain, calls = getattr(run_module, name), []
    def wrapped(*args):
        calls.append(1)
        if len(calls) == at:
            if where == "gradient": signal.raise_signal(signal.SIGINT)
            else: signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        return plain(*args)
    monkeypatch.setattr(run_module, name, wrapped)


@pytest.mark.parametrize("where", ["consumer", "gradient", "update"])
def test_ctrl_c_leaves_a_usable_coder_and_an_exact_checkpoint(tmp_path, monkeypatch, where):
    "Wherever it strikes, the run goes on to the bits of one that was never interrupted."
    handler, given = signal.getsignal(signal.SIGINT), {"a": topk(), "b": topk(96)}
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        if where != "consumer": interrupt_in(where, patch)
        for event in fit(given, source(), folder=tmp_path):
            if where == "consumer" and event.step == 13: raise KeyboardInterrupt
    assert signal.getsignal(signal.SIGINT) is handler
    step = last_checkpoint(tmp_path).step
    assert 12 <= step <= 13 and given["a"].spec.provenance["steps"] == step
    x = DATA[:200]
    assert ((x - given["a"](x)[1]) ** 2).sum() < ((x - x.mean(0)) ** 2).sum()
    resumed = train({"a": topk(), "b": topk(96)}, source(), folder=tmp_path, progress=False)
    whole = train({"a": topk(), "b": topk(96)}, source(), progress=False)
    assert {n: c.identity for n, c in resumed.items()} == {n: c.identity for n, c in whole.items()}


def test_log_tells_one_story(tmp_path):
    "After a fall-back to an older checkpoint, lines from beyond it are gone."
    for event in fit(topk(), source(), folder=tmp_path, every=0.1, metrics_every=1):
        if event.step == 33: break
    newest = checkpoints(tmp_path)[0]
    (newest / "coder-0.safetensors").write_bytes(b"torn")
    with pytest.warns(UserWarning, match="damaged"):
        coder = train(topk(), source(), folder=tmp_path, metrics_every=1, every=0.1, progress=False)
    steps = [e["step"] for e in read_log(tmp_path) if e["event"] == "step"]
    assert steps == list(range(1, 61))
    assert coder["topk-48"].identity == train(topk(), source(), progress=False)["topk-48"].identity


def test_a_finished_folder_is_not_trained_again(tmp_path):
    "A second call gives the same coder at once; another run is refused; resume=False starts anew."
    first = train(topk(), source(), folder=tmp_path, progress=False)["topk-48"].identity
    events = list(fit(topk(), source(), folder=tmp_path))
    assert [type(e) for e in events] == [Started, Finished] and events[-1].coders["topk-48"].identity == first
    for what, coder, data in (("coders", topk(64), source()), ("source", topk(), source(seed=1))):
        with pytest.raises(InputError, match=f"another run: {what}"):
            train(coder, data, folder=tmp_path, progress=False)
    other = train(topk(), source(seed=1), folder=tmp_path, resume=False, progress=False)["topk-48"].identity
    assert other != first and read_log(tmp_path)[0]["step"] == 0


def test_disk_full_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    "The error is raised, the coder delivered, the older checkpoint whole."
    coder, plain, calls = topk(), fit_module.write_checkpoint, []
    def full(*args):
        calls.append(1)
        if len(calls) == 2: raise OSError(errno.ENOSPC, "No space left on device")
        return plain(*args)
    monkeypatch.setattr(fit_module, "write_checkpoint", full)
    with pytest.raises(OSError, match="No space"): train(coder, source(), folder=tmp_path, progress=False)
    assert len(calls) == 2 and last_checkpoint(tmp_path).step == 12 and coder.spec.provenance["steps"] == 24


def test_all_checkpoints_damaged_is_said(tmp_path):
    "Nothing is lost in silence: the user decides to start anew."
    train(topk(), source(), folder=tmp_path, progress=False)
    for path in checkpoints(tmp_path): (path / "state.json").unlink()
    with pytest.warns(UserWarning), pytest.raises(DamagedFile, match="resume=False"):
        train(topk(), source(), folder=tmp_path, progress=False)


def test_dead_latents_are_revived_in_a_short_run():
    "Windows follow the length of the run, so AuxK has something to revive."
    steps = [e for e in fit(topk(256, k=2), source(epochs=10)) if isinstance(e, Step)]
    assert max(e.losses["topk-256"]["auxk"] for e in steps) > 0


def test_source_that_ends_early_is_named():
    "A source with fewer batches than it says."
    short = source()
    short.n_batches, short.n_tokens = 70, 7000
    plain = short.batches
    short.batches = lambda start=0: (batch for i, batch in enumerate(plain(start)) if i < 60)
    with pytest.raises((InputError, IndexError)): train(topk(), short, progress=False)
