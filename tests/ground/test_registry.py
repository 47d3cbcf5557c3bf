"Registries are idempotent, lazy, and helpful when a name is wrong."
import sys

import pytest

from sae_lab.ground.errors import InputError, UnknownName
from sae_lab.ground.registry import Registry


def make(module, name="thing"):
    def thing(): return module
    thing.__module__, thing.__qualname__ = module, name
    return thing


@pytest.mark.parametrize("first, second", [("pkg.a", "pkg.a"), ("__main__", "pkg.a"), ("pkg.a", "__main__")])
def test_the_same_definition_replaces(first, second):
    registry = Registry("thing")
    registry.add("x")(make(first))
    later = registry.add("x")(make(second))
    assert registry["x"].value is later and len(registry) == 1


@pytest.mark.parametrize("other", [make("pkg.b"), make("pkg.a", "other"), make("__main__", "other"), object()])
def test_another_thing_is_refused(other):
    registry = Registry("thing")
    first = registry.add("x")(make("pkg.a"))
    with pytest.raises(InputError, match="registered already"):
        registry.add("x")(other)
    assert registry["x"].value is first


def test_discovers_a_package_on_first_look_up(tmp_path, monkeypatch):
    package = tmp_path / "lazy_pkg"
    package.mkdir()
    (package / "__init__.py").write_text("from sae_lab.ground.registry import Registry\n"
                                         "things = Registry('thing', 'lazy_pkg')\n")
    for name in ("a", "b"):
        (package / f"{name}.py").write_text(f"from lazy_pkg import things\n@things.add('{name}', idea='{name}')\n"
                                            f"def {name}(): return '{name}'\n")
    monkeypatch.syspath_prepend(tmp_path)
    from lazy_pkg import things
    assert "lazy_pkg.a" not in sys.modules
    assert things["a"]() == "a" and things.names() == ["a", "b"] and "lazy_pkg.b" in sys.modules
    with pytest.raises(UnknownName):
        things["c"]


def test_a_broken_module_is_reported_each_time(tmp_path, monkeypatch):
    package = tmp_path / "broken_pkg"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "bad.py").write_text("raise RuntimeError('cannot be imported')")
    monkeypatch.syspath_prepend(tmp_path)
    registry = Registry("thing", "broken_pkg")
    for _ in range(2):
        with pytest.raises(RuntimeError):
            registry.names()


def test_table_is_escaped():
    registry = Registry("thing")
    registry.add("<script>", idea="<b>&")(make("pkg.a"))
    html = registry._repr_html_()
    assert "<script>" not in html and "&lt;b&gt;&amp;" in html
