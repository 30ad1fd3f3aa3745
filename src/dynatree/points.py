"""What figures are drawn from: values with intervals, wherever they come from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dynatree.ablation import Estimate


@dataclass(frozen=True)
class Point:
    """A value measured at `x`."""

    x: float
    y: Estimate


@dataclass(frozen=True)
class Series:
    """Points of one curve, in order of x; `predicted` ones are a model's and not measured."""

    label: str
    points: Sequence[Point]
    predicted: bool = False


@dataclass(frozen=True)
class Cell:
    """A value measured at a column and a row of a grid."""

    column: float
    row: float
    value: Estimate


@dataclass(frozen=True)
class RoundTime:
    """Where the time of a configuration's rounds goes.

    Attributes:
        milliseconds: mean per round, by phase.
        total: of all phases, milliseconds.
        tokens: committed per round.
    """

    milliseconds: Mapping[str, float]
    total: Estimate
    tokens: float
