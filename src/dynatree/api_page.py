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
    for entry in pkgutil.walk_packages(dynatree.__path__, "dynatree."):
        import_module(entry.name)
    # pdoc reads the dictionary of a module, where names that resolve on first use are not.
    for name in dynatree.__all__:
        vars(dynatree)[name] = getattr(dynatree, name)
    pdoc.render.configure(docformat="google")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        # By name, because `__all__` leaves them out; a package brings its own modules.
        modules = pkgutil.iter_modules(dynatree.__path__, "dynatree.")
        pdoc.pdoc("dynatree", *(entry.name for entry in modules), output_directory=folder)
