"""The pages about the modules: all of them are there, and a warning is an error."""

import pkgutil
import warnings

import pdoc
import pytest

import dynatree
from dynatree import api_page


def test_every_module_has_a_page_and_the_package_shows_its_interface(tmp_path):
    api_page.build(tmp_path)
    for module in pkgutil.walk_packages(dynatree.__path__, "dynatree."):
        assert (tmp_path / f"{module.name.replace('.', '/')}.html").is_file()
    package = (tmp_path / "dynatree.html").read_text(encoding="utf-8")
    assert all(f'id="{name}"' in package for name in dynatree.__all__)
    page = (tmp_path / "dynatree/pairs.html").read_text(encoding="utf-8")
    # A section of a docstring is a heading and not a word of the text.
    assert ">Raises:</h6>" in page
    assert "Only safetensors are read" in page


def test_a_warning_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(pdoc, "pdoc", lambda *_, **__: warnings.warn("unclear", stacklevel=1))
    with pytest.raises(UserWarning, match="unclear"):
        api_page.build(tmp_path)
