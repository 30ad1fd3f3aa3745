"""Files of facts: pydantic models, validated when written and when read.

Each file is sealed: its last entry is a digest of all others, so that one edited by hand, or with a
bit that has changed, is refused even where it would still make sense. Only layout may change.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Final, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from dynatree.errors import ResultError
from dynatree.files import write_text


class Fact(BaseModel):
    """Base of the schemas: unknown keys and infinite or missing numbers are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


AnyFact = TypeVar("AnyFact", bound=Fact)

SEAL: Final = "content_digest"
"""Last entry of a file: SHA-256 (hex) of the compact JSON of all before it, in their order."""


def sealed(text: str) -> str:
    """`text`, a JSON object with entries, with their digest as one more."""
    entries = text.rstrip().removesuffix("}").rstrip()
    return f'{entries},\n "{SEAL}": "{_digest(_compact(json.loads(text)))}"\n}}\n'


def opened(data: bytes) -> tuple[dict[str, Any], str | None]:
    """The entries of a sealed file, and what is wrong with its seal; None if nothing is.

    Raises:
        ValueError: it is no JSON object, or gives a key twice.
    """
    try:
        entries = json.loads(
            data.decode(), object_pairs_hook=_unique, parse_constant=_no_such_number
        )
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    if not isinstance(entries, dict):
        raise ValueError(f"must be a JSON object, is {type(entries).__name__}")
    seal = entries.pop(SEAL, None)
    if seal is None:
        return entries, f"holds no {SEAL}: written by an older DynaTree, or edited"
    if seal != _digest(_compact(entries)):
        return entries, f"{SEAL} is not the digest of the content: the file was edited or damaged"
    return entries, None


def _compact(entries: dict[str, Any]) -> str:
    return json.dumps(entries, separators=(",", ":"))


def _digest(compact: str) -> str:
    return hashlib.sha256(compact.encode()).hexdigest()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)} is given twice")
    return entries


def _no_such_number(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def write_facts(path: Path, facts: Fact) -> None:
    """Writes `facts` to `path`, all or nothing."""
    # Validated once more, as it will be read: what cannot be read back is never written.
    text = sealed(facts.model_dump_json(indent=1))
    _validated(text.encode(), type(facts))
    write_text(path, text)


def read_facts(path: Path, kind: type[AnyFact], what: str) -> AnyFact:
    """Reads and validates a file that `write_facts` wrote.

    Args:
        what: what the file is called in messages.

    Raises:
        ResultError: the file is missing, cut short, edited, or of another schema version.
    """
    try:
        return _validated(path.read_bytes(), kind)
    except FileNotFoundError:
        raise ResultError(f"{path}: missing; run: snakemake {path}") from None
    except OSError as error:
        raise ResultError(f"{path}: cannot be read: {error}") from None
    except ValueError as error:
        problem = first_problem(error)
    raise ResultError(
        f"{path}: not a valid {what} ({problem}); remove it and run: snakemake {path}"
    )


def _validated(data: bytes, kind: type[AnyFact]) -> AnyFact:
    """The facts in a file; raises ValueError, of which ValidationError is a kind."""
    entries, broken = opened(data)
    _require_version(entries, kind)
    # The schema first: it says where the fault lies.
    try:
        facts = kind.model_validate_json(_compact(entries))
    except ArithmeticError as error:
        raise ValueError(f"holds a number out of all bounds: {error}") from None
    if broken is not None:
        raise ValueError(broken)
    return facts


def _require_version(entries: dict[str, Any], kind: type[Fact]) -> None:
    field = kind.model_fields.get("schema_version")
    if field is None:
        return
    (expected,) = get_args(field.annotation)
    found = entries.get("schema_version")
    if type(found) is not int or found != expected:
        raise ValueError(
            f"schema_version is {found!r}, and this DynaTree reads {expected}; it can be read with "
            "the commit that its provenance names, and is not converted, since what was not "
            "measured then cannot be added now"
        )


def first_problem(error: ValueError, *inside: str) -> str:
    """The first thing wrong: its path, which lies `inside` of these keys, and what it is."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors(include_url=False)[0]
    where = ".".join(map(str, (*inside, *first["loc"])))
    return f"{where}: {first['msg']}" if where else first["msg"]
