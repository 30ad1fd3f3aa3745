"""What all sections of the configuration and all specifications are made of: types of fields, the
digest, and problems as lines that name the key, the value and the fix.
"""

import difflib
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError

from dynatree.errors import ConfigError
from dynatree.strategies import Strategy

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")]
"""Names become file names below `results/`, so they hold no separators and no shell characters."""

RuntimeMode = Literal["auto", "eager", "compiled", "cudagraph"]
"""How forwards run; `auto` is CUDA graphs on CUDA and eager elsewhere. See `dynatree.runtime`."""

Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0.0)]
Scalar = bool | int | float | str
"""A value that a field can be compared with, or have in a grid."""


def _one_or_more(value: object) -> object:
    # Checked here, because a union would complain once for each of its members.
    values = value if isinstance(value, list) else [value]
    if not values:
        raise ValueError("must hold a value; add one, or remove the key")
    for entry in values:
        if not isinstance(entry, bool | int | float | str) or entry in ("", math.inf, -math.inf):
            raise ValueError(
                f"must be a number, a text, true or false, or a list of these, got {short(entry)}"
            )
    return value


OneOrMore = Annotated[Scalar | list[Scalar], PlainValidator(_one_or_more)]


class Section(BaseModel):
    """Base of every section: unknown keys and silent type conversions are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def canonical(data: Any) -> str:
    """One JSON text for equal data, whatever the order of its keys."""
    return json.dumps(data, sort_keys=True, ensure_ascii=True, separators=(",", ":"))


def digest(data: Any) -> str:
    """SHA-256 (hex) of the canonical JSON of `data`."""
    return hashlib.sha256(canonical(data).encode()).hexdigest()


_Section = TypeVar("_Section", bound=Section)
_TAGS = [kind.model_fields["strategy"].default for kind in get_args(get_args(Strategy)[0])]


def parse_json(kind: type[_Section], text: str, what: str) -> _Section:
    """Reads back canonical JSON of `kind`, called `what` in messages.

    Raises:
        ConfigError: with the path of each wrong key, its value and the fix.
    """
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        lines = problem_lines(error)
    raise ConfigError(f"the {what} is not valid:\n" + "\n".join(lines))


def repeated(names: list[str]) -> list[str]:
    """The names that are listed more than once, sorted."""
    return sorted({name for name in names if names.count(name) > 1})


def unknown(name: str, among: list[str], kind: str) -> str:
    """Says that `name` is none of `among`, and which it may have meant."""
    close = difflib.get_close_matches(name, among, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(among) or 'none'}"
    return f"unknown {kind} {name!r}; {hint}"


def problem_lines(error: ValidationError, prefix: str = "") -> list[str]:
    """One line per problem: the path of the key, what is wrong, the value, the fix."""
    lines = []
    for item in error.errors(include_url=False):
        # A configuration is flat in the YAML: its section `run`, and the tag that the
        # discriminated union adds to the path, are not written there.
        loc = item["loc"]
        if loc[:1] == ("configs",) and loc[2:3] == ("run",):
            loc = loc[:2] + loc[4:]
        elif loc[:1] and loc[0] in _TAGS:
            loc = loc[1:]
        # A key may hold anything: line breaks, what moves a terminal's cursor, half a character.
        parts = [text if (text := str(part)).isprintable() else ascii(text)[1:-1] for part in loc]
        path = ".".join([prefix, *parts] if prefix else parts)
        value = item.get("input")
        shown = "" if isinstance(value, Mapping) else f", got {short(value)}"
        message = item["msg"].removeprefix("Value error, ")
        match item["type"]:
            case "extra_forbidden":
                lines.append(f"{path}: unknown key; remove it or correct its name")
            case "missing":
                lines.append(f"{path}: missing; add it")
            case "union_tag_not_found":
                lines.append(f"{path}.strategy: missing; add it, one of {', '.join(_TAGS)}")
            case "union_tag_invalid":
                given = value.get("strategy") if isinstance(value, Mapping) else value
                lines.append(f"{path}.strategy: {unknown(str(given), _TAGS, 'strategy')}")
            case "value_error" if not path:
                lines += message.splitlines()
            case "value_error":
                lines.append(f"{path}: {message}")
            case "string_pattern_mismatch" if parts and parts[-1] == "[key]":
                lines.append(f"{path}: use letters, digits, '-' and '_' only{shown}")
            case _:
                lines.append(f"{path}: {message[:1].lower()}{message[1:]}{shown}")
    return lines


def short(value: object) -> str:
    """A value as messages show it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
