"""Files that are either absent or complete."""

import errno
import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from dynatree.errors import FileError

_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it takes `path`'s place at once.

    After an exception or a kill, `path` is what it was before, and never half a file.

    Raises:
        FileError: it cannot be written; the message says what to do.
    """
    try:
        temporary = _temporary(path)
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        # mkstemp makes private files; a result is as readable as any other output.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def require_writable(path: Path) -> None:
    """Raises FileError if `path` cannot be written, before hours of work are lost to it."""
    try:
        _temporary(path).unlink()
    except OSError as error:
        raise _unwritable(path, error) from error


def _temporary(path: Path) -> Path:
    """An empty file beside `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    return Path(name)


def _unwritable(path: Path, error: OSError) -> FileError:
    fix = (
        "free space, or raise the limit on the size of files"
        if error.errno in _FULL
        else "make its folder writable, or correct the path"
    )
    return FileError(
        f"{path}: cannot be written ({error.strerror or error}); what was there before is as it "
        f"was; {fix}, then run the same command again"
    )


def write_text(path: Path, text: str) -> None:
    """Writes `text` as UTF-8, all or nothing."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def digest_of(path: Path) -> str:
    """SHA-256 (hex) of the bytes of one file, as `sha256sum` prints it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_files(paths: Iterable[Path]) -> str:
    """SHA-256 (hex) over contents and names (with the folder's name), wherever the files lie."""
    total = hashlib.sha256()
    for name, path in sorted((f"{path.parent.name}/{path.name}", path) for path in paths):
        total.update(f"{name}\0{digest_of(path)}\n".encode())
    return total.hexdigest()


def weights_digest(folder: Path) -> str:
    """SHA-256 (hex) of a model's weights and configuration in `folder`, as a result names them."""
    return digest_files([*folder.glob("*.safetensors"), folder / "config.json"])


def short_digest(pair_digest: str) -> str:
    """The digest of a pair as messages show it: the beginning of each model's, without its hub."""
    return ":".join(part.rpartition("@")[2][:12] for part in pair_digest.split(":"))
