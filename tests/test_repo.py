"The repository keeps its own rules: layers, budgets, export in sync, no orphans, light import."
import ast
import inspect
import json
import re
import shutil
import statistics
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NBS, LIB = ROOT / "nbs", ROOT / "sae_lab"
REFERENCE = sorted(p for p in NBS.glob("[0-9]*/*.ipynb"))
EVERY = sorted(p for p in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
LAYERS = ["ground", "coders", "sources", "splice", "training", "features", "measures", "causal", "words", "views"]
TOP = {"lab", "cli", "bench", "workbench", "__init__", "_modidx"}
BY_HAND = {"__init__.py", "_modidx.py"}  # and every module that says "hand-written" in its first line


def cells(path):
    "The cells of a notebook as (type, source)."
    return [(c["cell_type"], "".join(c["source"])) for c in json.loads(path.read_text())["cells"]]


def exported(path):
    "The exported code cells of a notebook."
    return [s for t, s in cells(path) if t == "code" and re.search(r"^#\| *exports?\b", s, re.M)]


def body_lengths(source):
    "Lines of every function's body, its signature and docstring left out."
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            rest = node.body[1:] if ast.get_docstring(node) is not None else node.body
            yield rest[-1].end_lineno - rest[0].lineno + 1 if rest else 0


def module_of(path):
    "The module that a notebook is exported to, or None."
    found = re.search(r"^#\| *default_exp ([\w.]+)", "\n".join(s for _, s in cells(path)), re.M)
    return found and found[1]


def modules():
    "Every module of the package, by hand or generated."
    return sorted(LIB.rglob("*.py"))


def imports(path):
    "The sae_lab modules a file imports, absolute, with the line of each."
    parts = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((a.name, node.lineno) for a in node.names if a.name.startswith("sae_lab"))
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(parts[: len(parts) - node.level]) if node.level else ""
            name = ".".join(x for x in (base, node.module or "") if x)
            if name.startswith("sae_lab"):
                yield name, node.lineno


def layer(name):
    "The rank of a module's layer; the lab and its friends stand above all."
    head = name.split(".")[1] if "." in name else ""
    return LAYERS.index(head) if head in LAYERS else len(LAYERS)


@pytest.mark.parametrize("path", [p for p in modules() if p.name != "__init__.py"],
                         ids=lambda p: str(p.relative_to(LIB)))
def test_imports_run_downward(path):
    "No module imports from a layer above its own."
    own = layer("sae_lab." + ".".join(path.relative_to(LIB).with_suffix("").parts))
    if path.relative_to(LIB).parts[0].removesuffix(".py") in TOP:
        return
    upward = [(n, line) for n, line in imports(path) if layer(n) > own]
    assert not upward, f"{path} imports upward: {upward}"


def test_no_import_cycles():
    "The import graph of the package has no cycle."
    graph = {}
    for path in modules():
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if path.name != "__init__.py":
            graph[name] = {n for n, _ in imports(path)}
    done, walking = set(), []

    def walk(name):
        assert name not in walking, f"import cycle: {' -> '.join([*walking[walking.index(name):], name])}"
        if name in done or name not in graph:
            return
        walking.append(name)
        for other in sorted(graph[name]):
            walk(other)
        done.add(walking.pop())

    for name in sorted(graph):
        walk(name)


@pytest.mark.parametrize("path", REFERENCE, ids=lambda p: p.stem)
def test_notebook_budget(path):
    "A reference notebook has one idea: few cells, short exported cells, small outputs."
    code = exported(path)
    sizes = [sum(bool(line.strip()) for line in s.splitlines() if not line.startswith("#|")) for s in code]
    bodies = [n for s in code for n in body_lengths(s)]
    book = json.loads(path.read_text())
    outputs = sum(len(json.dumps(c.get("outputs", []))) for c in book["cells"])
    assert len(book["cells"]) <= 60 and len(code) <= 15, (len(book["cells"]), len(code))
    assert max(sizes, default=0) <= 40, f"longest exported cell has {max(sizes)} lines"
    assert statistics.median(bodies or [0]) <= 10, f"the median function has {statistics.median(bodies)} lines"
    assert outputs <= 30_000, f"outputs take {outputs} bytes"
    assert not re.search(r'"image/(png|jpeg)"', json.dumps([c.get("outputs", []) for c in book["cells"]]))


@pytest.mark.parametrize("path", EVERY, ids=lambda p: p.stem)
def test_notebook_hygiene(path):
    "Ids on every cell, no __file__, no live widget stored, no star import, nothing relative."
    book = json.loads(path.read_text())
    assert all("id" in c for c in book["cells"])
    text = "\n".join(s for t, s in cells(path) if t == "code")
    assert "__file__" not in text
    assert not re.search(r"^from \S+ import \*", text, re.M)
    assert not re.search(r"^from \.", text, re.M)
    stored = json.dumps([c.get("outputs", []) for c in book["cells"]])
    assert "widget-view+json" not in stored


@pytest.mark.parametrize("path", REFERENCE, ids=lambda p: p.stem)
def test_public_definitions_are_shown(path):
    "After a public definition the next code cell shows or asserts."
    code = [s for t, s in cells(path) if t == "code"]
    for at, source in enumerate(code[:-1]):
        public = re.search(r"^(def|class) [a-z]\w*|^class [A-Z]", source, re.M)
        if public and re.search(r"^#\| *export\b", source, re.M):
            rest = next((s for s in code[at + 1:] if not re.search(r"^#\| *export\b", s, re.M)), "")
            assert rest.strip(), f"nothing shows what this defines: {source[:80]}"


def public_functions():
    "Public functions and classes of generated modules."
    import importlib

    for path in EVERY:
        name = module_of(path)
        if name:
            module = importlib.import_module(f"sae_lab.{name}")
            for key in getattr(module, "__all__", []):
                value = getattr(module, key)
                if inspect.isfunction(value) and value.__module__ == module.__name__:
                    yield key, value


def uncommented(function):
    "Parameters of a function whose line carries no comment."
    lines = inspect.getsource(function).splitlines()
    tree = ast.parse(textwrap.dedent("\n".join(lines))).body[0]
    for arg in [*tree.args.posonlyargs, *tree.args.args, *tree.args.kwonlyargs]:
        if "#" not in lines[arg.end_lineno - 1] and "#" not in lines[arg.lineno - 1]:
            yield arg.arg


def test_public_functions_are_documented():
    "Every public function has a docstring of its own, and a comment beside every parameter."
    found = list(public_functions())
    bare = [f"{f.__module__}.{n}" for n, f in found if not inspect.getdoc(f)]
    silent = [f"{f.__module__}.{n}({arg})" for n, f in found if not hasattr(f, "__wrapped__") for arg in uncommented(f)]
    assert not bare and not silent, (bare, silent)


def test_public_tensors_have_shapes():
    "No public function takes or gives a tensor without its axes."
    import torch

    bare = [f"{f.__module__}.{n}({key})" for n, f in public_functions()
            for key, note in getattr(f, "__annotations__", {}).items() if note is torch.Tensor]
    assert not bare, bare


def test_axes_are_known():
    "Every axis named in a public signature is in the vocabulary."
    from sae_lab.ground.axes import AXES

    odd = set()
    for name, function in public_functions():
        for note in getattr(function, "__annotations__", {}).values():
            dims = getattr(note, "dim_str", None)
            for axis in (dims or "").replace("*", " ").replace("#", " ").split():
                if axis not in AXES and not axis.isdigit() and axis != "...":
                    odd.add((f"{function.__module__}.{name}", axis))
    assert not odd, sorted(odd)


def test_export_is_in_sync(tmp_path):
    "Exporting the notebooks changes nothing in the package."
    copy = tmp_path / "copy"
    left_out = shutil.ignore_patterns(".git", ".venv*", "runs", "_docs", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, copy, ignore=left_out)
    subprocess.run([str(Path(sys.executable).parent / "nbdev-export")], cwd=copy, check=True, capture_output=True)
    new = {p.relative_to(copy): p.read_bytes() for p in (copy / "sae_lab").rglob("*.py")}
    old = {p.relative_to(ROOT): p.read_bytes() for p in LIB.rglob("*.py")}
    assert new.keys() == old.keys(), new.keys() ^ old.keys()
    changed = sorted(str(k) for k in new if new[k] != old[k])
    assert not changed, f"run nbdev-export: {changed}"


def test_no_orphans():
    "Every module is made by a notebook that exists, or says that it is written by hand."
    made = {module_of(p) for p in EVERY} - {None}
    for path in modules():
        name = ".".join(path.relative_to(LIB).with_suffix("").parts)
        if path.name not in BY_HAND and name not in made:
            head = path.read_text().splitlines()[0] if path.read_text() else ""
            assert "hand-written" in head.lower(), f"{path} belongs to no notebook"


def test_import_is_light():
    "`import sae_lab` loads neither torch nor transformer_lens."
    code = "import sys, sae_lab; print([m for m in ('torch', 'numpy', 'transformer_lens') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_version_has_one_value():
    "settings.ini and the package state the same version."
    import sae_lab

    assert f"version = {sae_lab.__version__}" in (ROOT / "settings.ini").read_text()
