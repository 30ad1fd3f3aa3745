"""Values that know which place of which result file they come from.

`located` puts such values into validated facts, where they are numbers and texts like any other.
What is computed from them carries the places of all its operands. So whatever prints a value can
say where it was found, and the list of these places needs no description of its own.
"""

import operator
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, TypeVar, cast

from dynatree.errors import ResultError
from dynatree.facts import AnyFact, Fact

Value = TypeVar("Value")


@dataclass(frozen=True, order=True)
class Source:
    """A place in a result file: a JSON path (RFC 9535), such as `$.configurations[0].rounds`."""

    file: str
    path: str

    def child(self, key: str | int) -> "Source":
        """The place of an entry of the object or list that lies here."""
        if isinstance(key, int):
            return Source(self.file, f"{self.path}[{key}]")
        plain = re.fullmatch(r"[A-Za-z_]\w*", key)
        return Source(self.file, self.path + (f".{key}" if plain else f"['{key}']"))


Sources = tuple[Source, ...]


class TracedText(str):
    """A text with its places."""

    sources: Sources = ()


class TracedInt(int):
    """A whole number with its places."""

    sources: Sources = ()


class TracedFloat(float):
    """A number with its places."""

    sources: Sources = ()


class TracedList(list[Any]):
    """A list with its places; its entries have their own."""

    sources: Sources = ()


_KINDS: tuple[tuple[type, type], ...] = (
    (str, TracedText),
    (int, TracedInt),
    (float, TracedFloat),
    (list, TracedList),
)


def traced(value: Value, sources: Iterable[Source]) -> Value:
    """`value` as one of `sources`; what has no traced kind (None, a bool) is returned as it is."""
    if value is None or isinstance(value, bool):
        return value
    for plain, kind in _KINDS:
        if isinstance(value, plain):
            # A subclass, such as LaTeX, stays what it is.
            with_places = (type(value) if isinstance(value, kind) else kind)(value)
            with_places.sources = tuple(dict.fromkeys(sources))
            return cast(Value, with_places)
    return value


def sources_of(*values: object) -> Sources:
    """The places of all that `values` hold, each once, in order."""
    found: dict[Source, None] = {}
    for value in values:
        if isinstance(value, Fact):
            parts: Iterable[object] = (getattr(value, name) for name in type(value).model_fields)
            found |= dict.fromkeys(sources_of(*parts))
        elif isinstance(value, TracedText | TracedInt | TracedFloat | TracedList):
            found |= dict.fromkeys(value.sources)
        elif isinstance(value, list | tuple):
            found |= dict.fromkeys(sources_of(*value))
    return tuple(found)


def distinct(values: Iterable[Value]) -> list[Value]:
    """The different values, sorted, each with the places of all that equal it."""
    listed = list(values)
    return [
        traced(value, sources_of(*(other for other in listed if other == value)))
        for value in sorted(set(listed), key=lambda value: cast(Any, value))
    ]


def counted(values: Sequence[object], *sources: object) -> int:
    """How many `values` there are: a number with the places of the list, or of `sources`."""
    return traced(len(values), sources_of(*(sources or (values,))))


def located(value: Value, file: str, path: str = "$") -> Value:
    """`value`, which was read from `file` at `path`, with the place of everything in it."""
    return cast(Value, _located(value, Source(file, path)))


def lookup(data: object, path: str) -> object:
    """What stands at the JSON path `path` of parsed JSON.

    Raises:
        ResultError: nothing does.
    """
    here: Any = data
    for key, index, quoted in re.findall(r"\.(\w+)|\[(\d+)\]|\['([^']*)'\]", path):
        try:
            here = here[int(index)] if index else here[key or quoted]
        except (KeyError, IndexError, TypeError):
            raise ResultError(f"{path}: there is no such place in the result file") from None
    return here


def watched(facts: AnyFact, seen: Callable[[Source], None]) -> AnyFact:
    """`facts`, calling `seen` with the place of each value that is read from them.

    For readers that cannot print where a value comes from, such as a figure.
    """
    return cast(AnyFact, _Watched(facts, seen))


class _Watched:
    def __init__(self, facts: Fact, seen: Callable[[Source], None]) -> None:
        self._facts, self._seen = facts, seen

    def __getattr__(self, name: str) -> Any:
        kind = type(self._facts)
        if name in kind.model_fields:
            return self._watch(getattr(self._facts, name))
        # Methods and properties read through this object as well.
        member = getattr(kind, name)
        if isinstance(member, property):
            return member.__get__(self)
        return partial(member, self)

    def _watch(self, value: Any) -> Any:
        if isinstance(value, Fact):
            return _Watched(value, self._seen)
        if isinstance(value, list):
            return [self._watch(entry) for entry in value]
        if isinstance(value, dict):
            return {key: self._watch(entry) for key, entry in value.items()}
        for source in sources_of(value):
            self._seen(source)
        return value


def _located(value: Any, place: Source) -> Any:
    if isinstance(value, Fact):
        return value.model_copy(
            update={
                name: _located(getattr(value, name), place.child(name))
                for name in type(value).model_fields
            }
        )
    if isinstance(value, dict):
        return {key: _located(entry, place.child(key)) for key, entry in value.items()}
    if isinstance(value, list):
        value = [_located(entry, place.child(index)) for index, entry in enumerate(value)]
    return traced(value, (place,))


def _carrying(operation: Callable[..., Any]) -> Callable[..., Any]:
    """`operation` with a result that has the places of its operands."""

    @wraps(operation)
    def method(*operands: Any) -> Any:
        result = operation(*operands)
        return result if result is NotImplemented else traced(result, sources_of(*operands))

    return method


for _plain, _kind in ((int, TracedInt), (float, TracedFloat)):
    for _name in ("add", "sub", "mul", "truediv"):
        for _operation in (f"__{_name}__", f"__r{_name}__"):
            setattr(_kind, _operation, _carrying(getattr(_plain, _operation)))
    for _operation in (operator.neg.__name__, operator.abs.__name__):
        setattr(_kind, f"__{_operation}__", _carrying(getattr(_plain, f"__{_operation}__")))
