"""Files of facts: pydantic models, validated when written and when read."""

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from dynatree.errors import ResultError
from dynatree.files import write_text


class Fact(BaseModel):
    """Base of the schemas: unknown keys and infinite or missing numbers are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


AnyFact = TypeVar("AnyFact", bound=Fact)


def write_facts(path: Path, facts: Fact) -> None:
    """Writes `facts` to `path`, all or nothing."""
    # Validated once more, as it will be read: what cannot be read back is never written.
    text = facts.model_dump_json(indent=1)
    type(facts).model_validate_json(text)
    write_text(path, text + "\n")


def read_facts(path: Path, kind: type[AnyFact], what: str) -> AnyFact:
    """Reads and validates a file that `write_facts` wrote.

    Args:
        what: what the file is called in messages.

    Raises:
        ResultError: the file is missing, cut short, edited, or of another schema version.
    """
    try:
        return kind.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise ResultError(f"{path}: missing; run: snakemake {path}") from None
    except OSError as error:
        raise ResultError(f"{path}: cannot be read: {error}") from None
    except ValidationError as error:
        raise ResultError(
            f"{path}: not a valid {what} ({first_problem(error)}); remove it and run: "
            f"snakemake {path}"
        ) from None


def first_problem(error: ValidationError, *inside: str) -> str:
    """The first thing wrong: its path, which lies `inside` of these keys, and what it is."""
    first = error.errors(include_url=False)[0]
    where = ".".join(map(str, (*inside, *first["loc"])))
    return f"{where}: {first['msg']}" if where else first["msg"]
