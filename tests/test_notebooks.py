"Every notebook runs from top to bottom, each in a process of its own."
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(p.relative_to(ROOT) for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=str)
def test_notebook(notebook, tmp_path):
    "The notebook's cells run and its assertions hold."
    command = [str(Path(sys.executable).parent / "nbdev-test"), str(notebook), "--n-workers", "0", "--do-print"]
    env = {**os.environ, "SAE_LAB_QUICK": "1", "SAE_LAB_HOME": str(tmp_path), "SAE_LAB_TOUR": str(tmp_path / "lab")}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
