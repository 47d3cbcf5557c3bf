"Checkpoints: every kind of damage is found, the one before is taken, rotation keeps what it should."
import errno
import shutil

import pytest
import torch

from sae_lab.ground.errors import DamagedFile
from sae_lab.training import checkpoint
from sae_lab.training.checkpoint import checkpoints, last_checkpoint, write_checkpoint


def write(folder, step, keep=2):
    "A small checkpoint."
    tensors = {"a": {"w": torch.full((50,), step)}, "b/c": {"w": torch.zeros(3)}}
    return write_checkpoint(folder, step, tensors, {"n": step}, keep)


def test_rotation_and_strange_names(tmp_path):
    "The newest `keep` stay; a coder's name may hold a slash."
    for step in range(1, 8): write(tmp_path, step, keep=3)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000007", "step-00000006", "step-00000005"]
    assert set(last_checkpoint(tmp_path).tensors) == {"a", "b/c"}


DAMAGE = {
    "truncated": lambda p: (p / "coder-0.safetensors").write_bytes((p / "coder-0.safetensors").read_bytes()[:-7]),
    "altered": lambda p: (p / "coder-0.safetensors").write_bytes((p / "coder-0.safetensors").read_bytes()[:-1] + b"\7"),
    "missing": lambda p: (p / "coder-1.safetensors").unlink(),
    "state": lambda p: (p / "state.json").write_text("{"),
    "manifest": lambda p: (p / "manifest.json").write_text("{}"),
    "empty": lambda p: [shutil.rmtree(p), p.mkdir()],
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_falls_back_with_a_warning(tmp_path, kind):
    "The damaged one is named in a warning and the one before is read."
    write(tmp_path, 1), write(tmp_path, 2)
    DAMAGE[kind](checkpoints(tmp_path)[0])
    with pytest.warns(UserWarning, match="step-00000002 is damaged"): assert last_checkpoint(tmp_path).step == 1
    DAMAGE[kind](checkpoints(tmp_path)[1])
    with pytest.warns(UserWarning), pytest.raises(DamagedFile, match="all 2"): last_checkpoint(tmp_path)


def test_disk_full_leaves_the_one_before(tmp_path, monkeypatch):
    "An OSError half-way leaves no trace but the checkpoints that were whole."
    write(tmp_path, 1)
    def full(*args, **kwargs): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(checkpoint, "write_json", full)
    with pytest.raises(OSError, match="No space"): write(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"] and last_checkpoint(tmp_path).step == 1
