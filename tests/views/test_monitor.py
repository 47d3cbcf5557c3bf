"The monitor: what it says of a run, what it leaves alone, and that it ends."
import math
import threading
import time

import numpy as np
import pytest
from hostile import HOSTILE

from sae_lab.coders.contract import make
from sae_lab.ground.toy import sparse_mixture
from sae_lab.sources.stream import TensorSource
from sae_lab.training.background import Background
from sae_lab.training.events import ACTIVATION_EDGES, DENSITY_EDGES
from sae_lab.training.fit import train
from sae_lab.views.monitor import MonitorWidget, bars_path, geometry, monitor_view, movement_frame, packed
from sae_lab.views.payload import check_view
from sae_lab.views.widget import reply
from sae_lab.workbench.monitor import Watch, monitor, view_of

D = 16
DATA = sparse_mixture(n_features=32, d=D, active=2, seed=0).sample(30_000, seed=1)[0]
EDGES = {"density": DENSITY_EDGES, "activation": ACTIVATION_EDGES}


def source(data=DATA, batch=100):
    "Three hundred batches of a hundred."
    return TensorSource(data, batch=batch)


def two():
    "A pair of coders, the same each time."
    return {"relu": make("relu_l1", d_in=D, d_sae=32), "topk": make("topk", d_in=D, d_sae=32, k=2)}


def threads():
    "Threads of monitors that are alive."
    return [each.name for each in threading.enumerate() if each.name.startswith("sae_lab.monitor")]


def gone(seconds=10):
    "Whether all of them end soon."
    end = time.monotonic() + seconds
    while threads() and time.monotonic() < end: time.sleep(.02)
    return not threads()


def long_run(steps=4_000, coders=4):
    "Steps of a long run of several coders, as a log holds them."
    dice = np.random.default_rng(0)
    for i in range(1, steps + 1):
        losses = {f"coder {j}": {"loss": 1 / i + dice.random(), "fvu": .2, "l0": 30 + j, "dead": 0.0, "lr": 1e-3}
                  for j in range(coders)}
        counts = {name: dice.integers(0, 99, 29).tolist() for name in losses}
        activation = {name: dice.integers(0, 9**5, 56).tolist() for name in losses}
        yield {"tokens": 2048 * i, "losses": losses, "density": counts, "activation": activation}


def test_a_long_run_stays_small_and_quick():
    "4,000 measurements of four coders: at most 60 kB, drawn in a moment."
    steps = list(long_run())
    began = time.perf_counter()
    view = monitor_view(steps, EDGES, goal=2048 * 4_000, tokens=2048 * 4_000, status="finished")
    html, taken = view.to_html(), time.perf_counter() - began
    assert len(html.encode()) <= 60_000 and taken < 5, (len(html), taken)
    assert view.curves.tokens[0] == 2048 and view.curves.tokens[-1] == 2048 * 4_000 and len(view.movements) == 8
    assert len(packed(view)) < 120_000
    check_view(view)


@pytest.mark.parametrize("name", HOSTILE)
def test_names_that_bite(name):
    "They are text, in HTML as elsewhere."
    losses = {name: {"loss": math.nan, "l0": math.inf, "dead": 0.5, name: 1.0}}
    step = {"tokens": 3, "losses": losses, "density": {name: [1] * 29}, "activation": {name: [0] * 56}}
    view = monitor_view([step], EDGES, title=name, status="failed", notes=(name,), goal=9)
    check_view(view)
    assert "<img" not in view.to_html() and "\ud83d" not in view.to_html()
    assert MonitorWidget(view, controls={"status": name}).facts["times"] == 1


def test_points_are_those_of_the_view():
    "What the script reads is what Python drew."
    view = monitor_view(list(long_run(60, 2)), EDGES)
    facts, data = geometry(view), np.frombuffer(packed(view), "<f4")
    n = facts["times"]
    assert np.array_equal(data[:n], view.curves.tokens)
    for i, each in enumerate(view.curves.curves):
        np.testing.assert_allclose(data[n * (1 + i):n * (2 + i)], each.values, rtol=1e-6)
    at = n * (1 + len(facts["curves"]))
    for moved, movement in zip(facts["movements"], view.movements, strict=True):
        frame, first, last = movement_frame(movement)
        assert np.array_equal(data[at:at + moved["times"]], movement.tokens)
        rows = data[at + moved["times"]:at + moved["times"] * (1 + moved["bins"])].reshape(moved["times"], -1)
        assert np.array_equal(rows, np.array(movement.counts)[:, first:last + 1])
        assert bars_path(frame, moved["edges"], rows[-1].astype(int).tolist()) in view.to_html()
        at += moved["times"] * (1 + moved["bins"])
    assert at == len(data)


def test_watching_changes_nothing():
    "The bits of a run that nobody watched; afterwards no thread is left."
    work = Background(two(), source(), metrics_every=2)
    widget = monitor(work, every=0.02)
    found = work.wait()
    assert gone() and widget.view.status == "finished" and widget.view.tokens == 30_000
    want = train(two(), source(), progress=False)
    assert {n: c.identity for n, c in found.items()} == {n: c.identity for n, c in want.items()}
    assert widget.controls["status"] == "finished" and "30,000" in widget.html
    widget.close()


def test_buttons():
    "Pause, change, resume, stop; what cannot be done is said."
    work = Background(two(), source(batch=10), metrics_every=5)
    widget = monitor(work, every=0.05)
    ask = lambda name, **args: reply(widget.answers, {"id": 1, "ask": name, "args": args})
    assert ask("pause") == {"id": 1, "value": ""} and work.status == widget.controls["status"] == "paused"
    assert "from step" in ask("change", coder="relu", coefficient="l1", value=0.4)["value"]
    assert widget.view.marks[0].text == "l1 0.1 → 0.4" and widget.controls["coefficients"]["relu"]["l1"] == 0.4
    assert "l2" in ask("change", coder="relu", coefficient="l2", value=0.4)["error"]
    assert "at least 0" in ask("change", coder="relu", coefficient="l1", value=-1)["error"]
    assert "subject" in ask("card", coder="relu", latent=1)["error"]
    ask("resume")
    assert work.status == "running"
    ask("stop")
    assert work.status == widget.controls["status"] == "stopped" and gone()
    widget.close()


def test_closing_ends_all_of_it(tmp_path):
    "The training stops with a checkpoint, threads end, a second close does nothing; with ends=False it goes on."
    work = Background(two(), source(batch=5), folder=tmp_path, metrics_every=1)
    widget = monitor(work, every=0.05)
    while work.run.step < 3: time.sleep(.01)
    widget.close()
    widget.close()
    assert gone() and work.done.wait(10) and work.status == "stopped" and work.run.saved == work.run.step
    again = Background(two(), source(batch=5), folder=tmp_path, metrics_every=1)
    other = monitor(again, every=0.05, ends=False)
    while not len(again.events) > 3: time.sleep(.01)
    other.close()
    assert gone() and again.status == "running"
    assert min(view_of(again).curves.tokens) > work.run.tokens, "without the log only what came after"
    assert min(Watch(again, None).view().curves.tokens) < work.run.tokens, "with it the whole run"
    again.stop()


def test_a_failure_is_shown():
    "The view says what went wrong, and the threads end."
    data = DATA.clone()
    data[20_000] = math.nan
    work = Background(two(), source(data))
    widget = monitor(work, every=0.02)
    assert work.done.wait(60) and gone()
    assert widget.view.status == "failed" and "NumericError" in widget.html and "NaN" in widget.view.to_text()
    widget.close()


def test_without_a_display_it_is_a_progress_bar(capsys):
    "A bar on the error stream, and the call returns at once."
    work = Background(two(), source())
    widget = monitor(work, every=0.05)
    work.wait()
    assert gone()
    said = capsys.readouterr().err
    assert "30.0k/30.0k" in said and "topk loss" in said
    widget.close()
