"""Text that comes with every CPython: no download, no licence question."""

import ast
import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

from dynatree.errors import PairError


def python_docs(characters: int) -> list[str]:
    """The language reference of `pydoc help`, then docstrings of the standard library.

    Args:
        characters: length of the corpus; the last document is cut there.

    Raises:
        PairError: this Python ships less text.
    """
    documents: list[str] = []
    wanted = characters
    for document in _documents():
        documents.append(document[:wanted])
        wanted -= len(documents[-1])
        if wanted == 0:
            return documents
    raise PairError(
        f"corpus_characters: {characters} asked for, this Python's documentation has "
        f"{characters - wanted}; lower corpus_characters"
    )


def language_reference() -> list[str]:
    """The language reference of `pydoc help`, one document for each topic."""
    return [topics[name] for name in sorted(topics)]


def corpus_digest(documents: list[str]) -> str:
    """SHA-256 (hex) of the documents; the corpus differs between Python versions."""
    total = hashlib.sha256()
    for document in documents:
        total.update(document.encode() + b"\0")
    return total.hexdigest()


def _documents() -> Iterator[str]:
    yield from language_reference()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                docstring = ast.get_docstring(node)
                if docstring:
                    yield docstring
