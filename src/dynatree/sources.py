"""Which project files a script is made of: the pipeline reruns a job when one of them changes.

Snakemake follows the text of a rule but not the modules that its script imports, so a changed
engine would leave old measurements standing. Imports are read from the syntax tree; a script
therefore depends on just the modules that it can reach.
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from dynatree.files import digest_files

PACKAGE = Path(__file__).resolve().parent


def imported_sources(start: str | Path) -> list[Path]:
    """The project modules that `start` imports, directly or through each other, sorted.

    With a module comes the C++ file of its name.
    """
    found: set[Path] = set()
    queue = [Path(start)]
    while queue:
        for module in _imports(queue.pop().read_text(encoding="utf-8")):
            for path in _files(module):
                if path not in found:
                    found.add(path)
                    if path.suffix == ".py":
                        queue.append(path)
    # Relative where that is possible, so that a moved project folder makes nothing stale.
    here = Path.cwd()
    return sorted(path.relative_to(here) if path.is_relative_to(here) else path for path in found)


def source_digest(start: str | Path) -> str:
    """SHA-256 (hex) of `start` and of everything that `imported_sources` finds for it."""
    return digest_files([Path(start), *imported_sources(start)])


# A Snakefile asks for the sources of a dozen scripts, which share most of their modules.
@cache
def _imports(source: str) -> tuple[str, ...]:
    """The names that a module's text imports, in no order."""
    found: list[str] = []
    queue: list[ast.AST] = [ast.parse(source)]
    while queue:
        node = queue.pop()
        if isinstance(node, ast.Import):
            found += (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
            found += (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            queue += node.orelse
        elif not isinstance(node, ast.expr):
            queue += ast.iter_child_nodes(node)
    return tuple(found)


def _files(module: str) -> Iterator[Path]:
    """The files that importing `module` runs, packages above it and what it compiles included."""
    parts = module.split(".")
    if parts[0] != PACKAGE.name:
        return
    for end in range(1, len(parts) + 1):
        path = PACKAGE.joinpath(*parts[1:end])
        if (path / "__init__.py").is_file():
            yield path / "__init__.py"
        elif path.with_suffix(".py").is_file():
            yield path.with_suffix(".py")
            if path.with_suffix(".cpp").is_file():
                yield path.with_suffix(".cpp")
