"The wheel and the source archive hold what they must, and the installed wheel runs the first cells of the tour."
import json
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "Both archives, built from a copy of what git tracks."
    folder = tmp_path_factory.mktemp("built")
    copy = folder / "copy"
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, files.split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder)]
    subprocess.run(command, cwd=copy, check=True, capture_output=True)
    return next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))


def test_contents(built):
    "Modules, static files, the bundled subject, notebooks and tests are inside."
    wheel, archive = built
    inside = set(zipfile.ZipFile(wheel).namelist())
    for name in ("sae_lab/lab.py", "sae_lab/data/subject/model.safetensors",
                 "sae_lab/data/subject/tokenizer.json", "sae_lab/data/fables.json",
                 "sae_lab/nbs/tutorials/tour.ipynb", "sae_lab/tests/test_contracts.py", "sae_lab/bench/train.py"):
        assert name in inside, name
    static = {f"sae_lab/static/{p.name}" for p in (ROOT / "sae_lab" / "static").glob("*.*")}
    assert static <= inside
    with tarfile.open(archive) as tar:
        names = {n.split("/", 1)[1] for n in tar.getnames() if "/" in n}
    assert {"nbs/index.ipynb", "tests/conftest.py", "settings.ini", "LICENSE", "docs/architecture.md"} <= names


def test_installed_wheel_runs(built, tmp_path):
    "The wheel, installed apart from this checkout, runs the tour as far as the first harvest."
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    purelib = Path(subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
                                  capture_output=True, text=True, check=True).stdout.strip())
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(purelib)]
    subprocess.run([*install, str(built[0])], check=True)
    import torch  # what the package needs is lent from here; the package itself is not: a .pth adds no editable install
    (purelib / "lent.pth").write_text(str(Path(torch.__file__).parent.parent) + "\n")
    cells = []
    for cell in json.loads((purelib / "sae_lab/nbs/tutorials/tour.ipynb").read_text())["cells"]:
        if cell["cell_type"] == "code":
            cells.append("".join(cell["source"]))
            if "lab.collect" in cells[-1]:
                break
    code = "\n".join(cells) + "\nimport sae_lab; print(sae_lab.__file__, lab.store.n_tokens)"
    env = {**os.environ, "SAE_LAB_QUICK": "1", "SAE_LAB_TOUR": str(tmp_path / "lab")}
    done = subprocess.run([python, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    where, tokens = done.stdout.split()[-2:]
    assert str(purelib) in where and int(tokens) >= 60_000
