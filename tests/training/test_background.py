"Training in a thread: turns, snapshots, failures, signals."
import math
import shutil
import signal
import threading
import time

import pytest

from sae_lab.coders.contract import make
from sae_lab.ground.errors import InputError, NumericError, Stopped, UnknownName
from sae_lab.ground.toy import sparse_mixture
from sae_lab.sources.stream import TensorSource
from sae_lab.training.background import Background
from sae_lab.training.checkpoint import last_checkpoint
from sae_lab.training.events import Changed, Interrupted, Step, Tick
from sae_lab.training.fit import events, read_log, steer, train
from sae_lab.training.run import begin

D = 16
DATA = sparse_mixture(n_features=32, d=D, active=2, seed=0).sample(20_000, seed=1)[0]


def source(data=DATA):
    "Two hundred batches of a hundred."
    return TensorSource(data, batch=100)


def topk(d_sae=32):
    "A new small coder, the same each time."
    return make("topk", d_in=D, d_sae=d_sae, k=2)


def test_looking_on_changes_nothing(tmp_path):
    "Many visitors at once, pauses and all: the bits of an undisturbed run."
    work = Background({"a": topk(), "b": topk(64)}, source(), folder=tmp_path).start()
    seen = []
    def look():
        for _ in range(5): seen.append(work.snapshot("a"))
    visitors = [threading.Thread(target=look) for _ in range(3)]
    for v in visitors: v.start()
    work.pause()
    at = work.run.step
    time.sleep(0.05)
    assert work.run.step == at and work.status in ("paused", "finished")
    work.resume()
    for v in visitors: v.join()
    coders = work.wait()
    want = train({"a": topk(), "b": topk(64)}, source(), progress=False)
    assert {n: c.identity for n, c in coders.items()} == {n: c.identity for n, c in want.items()}
    assert len(seen) == 15 and all(bool(c.W_dec.isfinite().all()) for c in seen)
    assert work.status == "finished" and work.history[-1]["a"]["l0"] > 0 and work.history[-1]["tokens"] == 20_000


def test_stop_then_go_on(tmp_path):
    "Stopped while paused, it leaves a checkpoint; another Background ends with the bits of one run."
    work = Background(topk(), source(), folder=tmp_path).start().pause()
    at = work.run.step
    coder = work.stop()["topk-32"]
    assert work.status == "stopped" and isinstance(work.events[-1], Interrupted)
    if at: assert coder.spec.provenance["steps"] == last_checkpoint(tmp_path).step == at
    again = Background(topk(), source(), folder=tmp_path).start().wait()["topk-32"]
    assert again.identity == train(topk(), source(), progress=False)["topk-32"].identity


def test_a_failure_is_raised_where_it_is_looked_for():
    "wait, stop and status tell; snapshot still gives the last whole state."
    data = DATA.clone()
    data[5] = math.nan
    work = Background(topk(), source(data)).start()
    for ask in (work.wait, work.stop):
        with pytest.raises(NumericError): ask()
    assert work.status == "failed" and "NumericError" in work._repr_html_()


def test_misuse_is_refused():
    "Twice started, unknown names, too short a wait."
    work = Background({"a": topk(), "b": topk(64)}, source())
    assert work.status == "ready"
    work.start().pause()
    with pytest.raises(InputError, match="another Background"): work.start()
    with pytest.raises(InputError, match="a, b"): work.snapshot()
    with pytest.raises(UnknownName): work.snapshot("c")
    with pytest.raises(Stopped, match="paused"): work.wait(0.01)
    work.stop()


def test_ctrl_c_interrupts_the_waiting_cell_only():
    "The training goes on, and no handler was changed."
    handler = signal.getsignal(signal.SIGINT)
    work = Background(topk(), source()).start().pause()
    threading.Timer(0.2, lambda: signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt): work.wait()
    assert signal.getsignal(signal.SIGINT) is handler and work.status == "paused"
    work.resume()
    assert work.wait()["topk-32"].spec.provenance["steps"] == 200


def relu():
    "A coder whose objective has a price."
    return make("relu_l1", d_in=D, d_sae=32)


def test_a_steered_run_can_be_had_again(tmp_path):
    "Changes are events, lines of the log and provenance; given to another run they give its bits."
    work = Background({"a": relu(), "b": topk()}, source(), folder=tmp_path).start().pause()
    first = work.change("l1", 0.5, "a")
    work.change("lr", 3e-4, "b")
    assert work.coefficients["a"]["l1"] == 0.5 and work.coefficients["b"]["lr"] == 3e-4
    steered = work.resume().wait()
    assert [e.coefficient for e in work.events if isinstance(e, Changed)] == ["l1", "lr"]
    assert [e["value"] for e in read_log(tmp_path) if e["event"] == "changed"] == [0.5, 3e-4]
    again = train({"a": relu(), "b": topk()}, source(), progress=False, changes=work.run.changes)
    plain = train({"a": relu(), "b": topk()}, source(), progress=False)
    for name in "ab":
        assert steered[name].identity == again[name].identity != plain[name].identity
        assert len(steered[name].spec.provenance["changes"]) == 1 and "changes" not in plain[name].spec.provenance
    assert steered["a"].spec.provenance["changes"] == [first.record]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_killed_run_is_steered_again(tmp_path, checkpointed):
    "What was changed after the last checkpoint, or before the first, is changed again: the same bits."
    changes = [Changed(30, 0, "a", "l1", 0.4), Changed(90, 0, "a", "l1", 0.02)]
    whole = train({"a": relu()}, source(), progress=False, changes=changes)["a"]
    run = begin({"a": relu()}, source(), folder=tmp_path, every=4_000 if checkpointed else 10**9)
    happening = events(run)
    for event in happening:
        for each in changes:
            if each.step == event.step and isinstance(event, Tick | Step): steer(run, "a", each.coefficient, each.value)
        if event.step == 110: break
    shutil.copytree(tmp_path, killed := tmp_path.parent / f"{tmp_path.name}-killed")  # as a kill leaves it
    happening.close()
    assert bool(last_checkpoint(killed)) is checkpointed
    resumed = begin({"a": relu()}, source(), folder=killed)
    made = [event for event in events(resumed) if isinstance(event, Changed)]
    assert [each.record for each in resumed.changes] == [each.record for each in changes]
    assert len(made) == (1 if checkpointed else 2)
    assert resumed.given["a"].identity == whole.identity
    assert len([e for e in read_log(killed) if e["event"] == "changed"]) == 2


def test_changes_that_cannot_be_made():
    "Unknown names, numbers that make no sense, a training that does not run."
    work = Background({"a": relu()}, source())
    with pytest.raises(InputError, match="ready"): work.change("l1", 0.1)
    work.start().pause()
    with pytest.raises(UnknownName, match="l1"): work.change("l_1", 0.1)
    with pytest.raises(UnknownName): work.change("l1", 0.1, "b")
    for value in (-1.0, math.nan, math.inf):
        with pytest.raises(InputError): work.change("l1", value)
    work.stop()
    with pytest.raises(InputError, match="stopped"): work.change("l1", 0.1)
    with pytest.raises(UnknownName): train(relu(), source(), progress=False, changes=[Changed(1, 0, "a", "l1", 0.1)])
