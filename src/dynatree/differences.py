"""In which fields two JSON values differ: for messages that name the field and both values."""

from collections.abc import Sequence
from typing import Any, Final

SHOWN: Final = 6
"""Differences that a message lists before it counts the rest."""


def differences(
    one: Any, other: Any, names: tuple[str, str] = ("measured", "configured"), path: str = ""
) -> list[str]:
    """One line for each field that differs: its path, and both values.

    Args:
        names: what the two sides are called in the lines.
        path: where the values stand, in front of every field.
    """
    if isinstance(one, dict) and isinstance(other, dict):
        keys = [*one, *(key for key in other if key not in one)]
        pairs = [(str(key), one.get(key), other.get(key)) for key in keys]
    elif isinstance(one, list) and isinstance(other, list):
        if len(one) != len(other):
            return [f"{path}: {names[0]} {len(one)} entries, {names[1]} {len(other)}"]
        pairs = [(str(index), *both) for index, both in enumerate(zip(one, other, strict=True))]
    elif one == other:
        return []
    else:
        return [f"{path}: {names[0]} {one!r}, {names[1]} {other!r}"]
    return [
        line
        for key, old, new in pairs
        for line in differences(old, new, names, f"{path}.{key}" if path else key)
    ]


def shown(found: Sequence[str]) -> str:
    """The first of the lines `found`, and how many more there are."""
    more = len(found) - SHOWN
    return "; ".join(found[:SHOWN]) + (f"; and {more} more" if more > 0 else "")
