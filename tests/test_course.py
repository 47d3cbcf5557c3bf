"The course: each notebook stands by itself in Colab, teaches with exercises, and ends on what it found."
import json
import re
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COURSE = sorted((ROOT / "nbs/tutorials").glob("0*.ipynb"))
FACTS = ConfigParser(delimiters=["="])
FACTS.read(ROOT / "settings.ini", encoding="utf-8")


def cells(path, kind):
    "The sources of a notebook's cells of one kind."
    return ["".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == kind]


def test_begins_with_six():
    "Six notebooks, in order; others may follow."
    first = ["01_hooks_and_activations", "02_superposition", "03_first_dictionary", "04_reading_a_feature",
             "05_feature_splitting", "06_exporting_figures"]
    assert [path.stem for path in COURSE][:6] == first


@pytest.mark.parametrize("path", COURSE, ids=lambda p: p.stem)
def test_opens_in_colab(path):
    "The badge leads to this file in the repository of settings.ini; the first cell installs only what is missing."
    facts = FACTS["DEFAULT"]
    place = f"github/{facts['user']}/{facts['repo']}/blob/{facts['branch']}/{path.relative_to(ROOT)}"
    assert f"(https://colab.research.google.com/{place})" in cells(path, "markdown")[0]
    first = cells(path, "code")[0]
    assert "find_spec" in first and f"git+{facts['git_url']}" in first and "torch" not in first


@pytest.mark.parametrize("path", COURSE, ids=lambda p: p.stem)
def test_teaches(path):
    "Exercises with folded solutions, and assertions on the finding at the end."
    text = "\n".join(cells(path, "markdown"))
    assert text.count("<details><summary>A solution</summary>") == text.count("</details>") >= 2
    assert len(re.findall(r"^assert ", cells(path, "code")[-1], re.M)) >= 3


@pytest.mark.parametrize("path", COURSE, ids=lambda p: p.stem)
def test_uses_the_installed_package_only(path):
    "No cell reaches for the tests, the repository or a shared folder."
    text = "\n".join(cells(path, "code"))
    assert not re.search(r"import tests|sys\.path|SAE_LAB_DATA|\.\./", text)
