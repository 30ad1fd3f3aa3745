"""Which project files a script is made of: the pipeline reruns a job when one of them changes.

Snakemake follows the text of a rule but not the modules that its script imports, so a changed
engine would leave old measurements standing. Imports are read from the syntax tree; a script
therefore depends on just the modules that it can reach.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

from dynatree.files import digest_files

PACKAGE = Path(__file__).resolve().parent


def imported_sources(start: str | Path) -> list[Path]:
    """The project modules that `start` imports, directly or through each other, sorted."""
    found: set[Path] = set()
    queue = [Path(start)]
    while queue:
        for module in _imports(queue.pop()):
            for path in _files(module):
                if path not in found:
                    found.add(path)
                    queue.append(path)
    # Relative where that is possible, so that a moved project folder makes nothing stale.
    here = Path.cwd()
    return sorted(path.relative_to(here) if path.is_relative_to(here) else path for path in found)


def source_digest(start: str | Path) -> str:
    """SHA-256 (hex) of `start` and of everything that `imported_sources` finds for it."""
    return digest_files([Path(start), *imported_sources(start)])


def _imports(path: Path) -> Iterator[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for statement in node.body
        for child in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _files(module: str) -> Iterator[Path]:
    """The files that importing `module` runs, packages above it included."""
    parts = module.split(".")
    if parts[0] != PACKAGE.name:
        return
    for end in range(1, len(parts) + 1):
        path = PACKAGE.joinpath(*parts[1:end])
        if (path / "__init__.py").is_file():
            yield path / "__init__.py"
        elif path.with_suffix(".py").is_file():
            yield path.with_suffix(".py")
