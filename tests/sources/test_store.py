"Stores: exact, resumable after SIGKILL and full disks, damaged shards refused by name."
import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from sae_lab.ground.errors import DamagedFile, InputError, NumericError, Stopped
from sae_lab.ground.files import MANIFEST, sha256
from sae_lab.sources import store as module
from sae_lab.sources.store import DTYPES, ActivationStore, shard_name, write_store
from sae_lab.sources.stream import Batch, Stream, TensorSource

WRITER = """
import sys, time, torch
from sae_lab.sources.store import write_store
from sae_lab.sources.stream import TensorSource
torch.set_num_threads(1)
x = torch.randn(6000, 64, generator=torch.Generator().manual_seed(0))
print("ready", flush=True)
write_store(TensorSource(x, batch=100), sys.argv[1], "float32", 500)
"""


def source(dtype=torch.float32):
    "The source the writer writes."
    x = torch.randn(6000, 64, generator=torch.Generator().manual_seed(0))
    return TensorSource(x.to(dtype).float(), batch=100)


def contents(folder):
    "Every file with its hash."
    return {path.name: sha256(path) for path in sorted(Path(folder).iterdir())}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "A store written without interruption."
    return write_store(source(), tmp_path_factory.mktemp("whole"), "float32", 500)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_values_come_back(tmp_path, dtype):
    "Bit for bit what the dtype can hold; mean and scale of the data before rounding."
    values = source(DTYPES[dtype])
    store = ActivationStore.write(values, tmp_path / "s", dtype, 512)
    assert store.complete and store.facts["shard_tokens"] == 600 and len(store.files) == 10
    back, given = (Batch.cat(list(each.batches())) for each in (store.source(batch=333, seed=None), values))
    assert back.acts["toy"].equal(given.acts["toy"]) and back.pos.equal(given.pos)
    (mean, scale), (wanted, other) = store.source().norms()["toy"], values.norms()["toy"]
    assert torch.allclose(mean, wanted, atol=1e-6) and abs(scale - other) < 1e-6


def test_shuffle_is_exact_and_pure(whole):
    "A permutation of everything; batch i alone equals batch i of a run; epochs differ."
    store = ActivationStore.open(whole)
    read = store.source(batch=256, seed=1, epochs=2)
    every = list(read.batches())
    places = torch.cat([each.pos for each in every])
    assert len(every) == read.n_batches and places[:6000].sort().values.equal(torch.arange(6000))
    assert not places[:6000].equal(places[6000:])
    for start in (0, 5, read.n_batches - 1):
        assert next(read.batches(start)).acts["toy"].equal(every[start].acts["toy"])
    x = source().acts["toy"]
    assert all(each.acts["toy"].equal(x[each.pos]) for each in every)


def test_a_stream_becomes_a_store(subject, tokens, tmp_path):
    "Two hooks in one pass, with tokens, documents and places; resumed in the middle it ends with the same bytes."
    hooks = ["blocks.0.mlp.hook_post", "blocks.2.hook_resid_post"]
    stream = Stream(subject, tokens, hooks, batch=256, block=1024)
    first = ActivationStore.write(stream, tmp_path / "a", "float32", 512)
    given, back = Batch.cat(list(stream.batches())), Batch.cat(list(first.source(seed=None).batches()))
    assert all(back.acts[hook].equal(given.acts[hook]) for hook in hooks)
    assert all(getattr(back, key).equal(getattr(given, key)) for key in ("token", "doc", "seq", "pos"))
    write_store(stream, tmp_path / "b", "float32", 512)
    (tmp_path / "b" / shard_name(3)).unlink()
    write_store(stream, tmp_path / "b", "float32", 512)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_killed_writers_end_with_the_same_bytes(whole, tmp_path):
    "SIGKILL at several moments, then on to the end: nothing differs from an uninterrupted store."
    folder, killed = tmp_path / "store", 0
    env = dict(os.environ, OMP_NUM_THREADS="1")
    for delay in (0.0, 0.004, 0.011, 0.023):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(folder)], stdout=subprocess.PIPE, env=env)
        writer.stdout.readline()
        time.sleep(delay)
        writer.send_signal(signal.SIGKILL)
        killed += writer.wait() == -signal.SIGKILL
    assert killed
    before = {p.name: p.stat().st_mtime_ns for p in folder.glob("shard-*")} if folder.exists() else {}
    write_store(source(), folder, "float32", 500)
    assert contents(folder) == contents(whole)
    listed = len(before)
    assert sum(before.get(p.name) == p.stat().st_mtime_ns for p in folder.glob("shard-*")) >= listed - 1


def test_killed_in_the_middle_of_a_shard(whole, tmp_path, monkeypatch):
    "Half a shard on disk, as a kill leaves it, is removed and written again; whole shards are not touched."
    folder = tmp_path / "store"
    real, calls = module.save_tensors, []

    def dies(path, tensors):
        if len(calls) == 4:
            (folder / f".{Path(path).name}.deadbeef.part").write_bytes(b"\0" * 1000)
            raise KeyboardInterrupt
        calls.append(real(path, tensors))

    monkeypatch.setattr(module, "save_tensors", dies)
    with pytest.raises(KeyboardInterrupt):
        write_store(source(), folder, "float32", 500)
    monkeypatch.setattr(module, "save_tensors", real)
    part = ActivationStore.open(folder)
    assert not part.complete and part.n_tokens == 2000 and len(list(part.source(batch=100).batches())) == 20
    times = {p.name: p.stat().st_mtime_ns for p in folder.glob("shard-*")}
    write_store(source(), folder, "float32", 500)
    assert contents(folder) == contents(whole)
    assert all((folder / name).stat().st_mtime_ns == at for name, at in times.items())


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("No space left")])
def test_a_full_disk_leaves_what_was_whole(whole, tmp_path, monkeypatch, error):
    "The error says what to do; what was whole can be read; with room again the same bytes come out."
    folder, real = tmp_path / "store", module.save_tensors

    def full(path, tensors):
        if Path(path).name == shard_name(3):
            raise error
        return real(path, tensors)

    monkeypatch.setattr(module, "save_tensors", full)
    with pytest.raises(Stopped, match="make room"):
        write_store(source(), folder, "float32", 500)
    monkeypatch.setattr(module, "save_tensors", real)
    assert ActivationStore.open(folder).n_tokens == 1500
    write_store(source(), folder, "float32", 500)
    assert contents(folder) == contents(whole)


@pytest.fixture
def small_disk(tmp_path):
    "A file system of one megabyte."
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True)
    if made.returncode:
        pytest.skip("no right to mount a tmpfs")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_really_full(small_disk):
    "On a file system of 1 MB: stopped with the reason, no half shard left, what was whole reads."
    with pytest.raises(Stopped, match="make room"):
        write_store(source(), small_disk / "store", "float32", 500)
    store = ActivationStore.open(small_disk / "store")
    assert 0 < store.n_tokens < 6000 and not store.complete
    assert not list((small_disk / "store").glob(".*"))
    assert sum(len(each) for each in store.source().batches()) == store.n_tokens


@pytest.mark.parametrize("number", [0, 7, 11])
@pytest.mark.parametrize("how", ["cut", "bit", "gone"])
def test_damage_is_refused_by_name(whole, tmp_path, number, how):
    "Whatever is wrong with a shard, the error names it."
    folder = tmp_path / "copy"
    write_store(source(), folder, "float32", 500)
    path = folder / shard_name(number)
    data = bytearray(path.read_bytes())
    if how == "gone":
        path.unlink()
    elif how == "cut":
        path.write_bytes(data[:-1])
    else:
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
    with pytest.raises(DamagedFile, match=shard_name(number)):
        ActivationStore.open(folder)
    if how != "bit":
        with pytest.raises(DamagedFile, match=shard_name(number)):
            ActivationStore.open(folder, verify="size")
    write_store(source(), folder, "float32", 500)
    assert contents(folder) == contents(whole)


def test_mistakes(whole, tmp_path):
    "Another store in the folder, no store, a broken manifest, numbers that do not fit, unknown words."
    with pytest.raises(InputError, match="another store"):
        write_store(TensorSource(torch.zeros(10, 2)), whole)
    with pytest.raises(DamagedFile):
        ActivationStore.open(tmp_path)
    (tmp_path / MANIFEST).write_text('{"facts": {}}')
    with pytest.raises(DamagedFile):
        write_store(source(), tmp_path)
    with pytest.raises(NumericError, match="toy has NaN"):
        write_store(TensorSource(torch.full((5, 2), float("nan"))), tmp_path / "nan")
    with pytest.raises(NumericError, match="bfloat16"):
        write_store(TensorSource(torch.full((5, 2), 1e6)), tmp_path / "large", "float16")
    with pytest.raises(InputError, match="float8"):
        write_store(source(), tmp_path / "x", "float8")
    with pytest.raises(InputError, match="verify"):
        ActivationStore.open(whole, verify="maybe")
