"""Pages about the modules, made of their docstrings by pdoc."""

import pkgutil
import warnings
from importlib import import_module
from pathlib import Path

import pdoc
import pdoc.render

import dynatree


def build(folder: Path) -> None:
    """Writes `folder`/index.html, and a page for each module.

    Raises:
        UserWarning: pdoc has something to complain of, such as an annotation without a meaning.
    """
    # What libraries warn of while they are imported is not about our pages.
    for module in pkgutil.walk_packages(dynatree.__path__, "dynatree."):
        import_module(module.name)
    # pdoc reads the dictionary of a module, where names that resolve on first use are not.
    for name in dynatree.__all__:
        vars(dynatree)[name] = getattr(dynatree, name)
    pdoc.render.configure(docformat="google")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pdoc.pdoc("dynatree", output_directory=folder)
