"""What a script is made of: transitive imports, and a digest of content."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dynatree import sources
from dynatree.sources import imported_sources, source_digest

PROJECT = Path(__file__).resolve().parent.parent


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Writes modules of a package named `dynatree`, found instead of the real one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sources, "PACKAGE", tmp_path / "dynatree")

    def write(**modules):
        for name, text in {"__init__": "", **modules}.items():
            path = tmp_path / "dynatree" / f"{name.replace('__dot__', '/')}.py"
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        return tmp_path / "dynatree"

    return write


def names(start):
    return [str(path) for path in imported_sources(start)]


def stems(script):
    return {path.stem for path in imported_sources(PROJECT / "scripts" / script)}


def test_imports_are_followed_through_each_other_and_in_circles(package):
    folder = package(
        a="from dynatree.b import x", b="import dynatree.c", c="import dynatree.a", d="x = 1"
    )
    assert names(folder / "a.py") == [f"dynatree/{name}.py" for name in ("__init__", "a", "b", "c")]


@pytest.mark.parametrize(
    "text",
    [
        "from dynatree import b",
        "import os, dynatree.b as c",
        "def later():\n    from dynatree.b import x",
        "if True:\n    import dynatree.b",
    ],
)
def test_every_form_of_import_counts(package, text):
    folder = package(a=text, b="x = 1")
    assert names(folder / "a.py") == ["dynatree/__init__.py", "dynatree/b.py"]


@pytest.mark.parametrize("text", ["import os", "import dynatreeish.b", "'dynatree.b'"])
def test_nothing_else_counts(package, text):
    assert names(package(a=text, b="") / "a.py") == []


def test_imports_for_type_checking_are_skipped_and_their_else_is_not(package):
    folder = package(
        a="if TYPE_CHECKING:\n    from dynatree import b\nelse:\n    from dynatree import c",
        b="",
        c="",
    )
    assert names(folder / "a.py") == ["dynatree/__init__.py", "dynatree/c.py"]


def test_a_subpackage_brings_the_packages_above_it(package):
    folder = package(sub__dot____init__="", sub__dot__b="", a="import dynatree.sub.b")
    assert names(folder / "a.py") == [
        "dynatree/__init__.py",
        "dynatree/sub/__init__.py",
        "dynatree/sub/b.py",
    ]


def test_with_a_module_comes_the_cpp_file_of_its_name(package):
    folder = package(a="import dynatree.b", b="")
    for name in ("a", "b", "c"):
        (folder / f"{name}.cpp").write_text("import dynatree.c")
    assert names(folder / "a.py") == ["dynatree/__init__.py", "dynatree/b.cpp", "dynatree/b.py"]
    before = source_digest(folder / "a.py")
    (folder / "b.cpp").write_text("")
    assert source_digest(folder / "a.py") != before


def test_a_measurement_needs_the_engine_and_no_table():
    found = stems("measure.py")
    assert found >= {"measure", "decode", "tree", "runner", "cache", "strategies", "results"}
    assert not found & {"render", "figures", "aggregate", "ablation", "train", "cli"}


def test_tables_and_training_need_no_engine():
    engine = {"measure", "decode", "tree", "runner", "cache"}
    for script, own in (
        ("render_table.py", "render"),
        ("draw_figure.py", "figures"),
        ("aggregate.py", "aggregate"),
        ("train_pair.py", "train"),
    ):
        assert own in stems(script)
        assert not stems(script) & engine


def test_every_module_that_measuring_loads_is_a_source():
    listing = (
        "import runpy, sys; runpy.run_path(sys.argv[1]);"
        "print(*(m.__file__ for n, m in sys.modules.items() if n.split('.')[0] == 'dynatree'))"
    )
    script = PROJECT / "scripts" / "measure.py"
    loaded = subprocess.run(
        [sys.executable, "-c", listing, str(script)], capture_output=True, text=True, check=True
    )
    found = {path.absolute() for path in imported_sources(script)}
    assert found >= set(map(Path, loaded.stdout.split()))


def test_the_digest_follows_content_and_not_location(package, tmp_path, monkeypatch):
    folder = package(a="from dynatree import b", b="x = 1", c="")
    before = source_digest(folder / "a.py")
    (folder / "c.py").write_text("y = 1")
    moved = Path(shutil.copytree(folder, tmp_path / "elsewhere" / "dynatree"))
    monkeypatch.setattr(sources, "PACKAGE", moved)
    assert source_digest(moved / "a.py") == before
    (moved / "b.py").write_text("x = 2")
    assert source_digest(moved / "a.py") != before
