"""The record of `bench/roofline.py`, as far as its figure needs it."""

from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

from dynatree.ablation import Estimate
from dynatree.errors import ResultError
from dynatree.estimates import estimate, median
from dynatree.facts import first_problem, opened
from dynatree.points import Point


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class Step(_Part):
    """A forward of `nodes` tokens; `seconds` are of as many calls as the record repeats."""

    model: Literal["target", "draft"]
    nodes: PositiveInt
    floor_ms: PositiveFloat
    seconds: Annotated[list[PositiveFloat], Field(min_length=1)]


class Generations(_Part):
    """Rounds of one strategy."""

    nodes_per_round: float
    tokens_per_round: PositiveFloat
    ms_per_round: PositiveFloat


class Roofline(_Part):
    """What one forward takes, and what it could take if memory alone were the limit."""

    repeats: PositiveInt
    steps: dict[str, Step]
    generations: dict[str, Generations]

    @property
    def verifications(self) -> list[Step]:
        """Forwards of the target on the nodes of a tree, by number of nodes."""
        steps = [step for name, step in self.steps.items() if name.startswith("verify ")]
        return sorted(steps, key=lambda step: step.nodes)

    def limits(self) -> list[Point]:
        """Tokens per second that could be verified, by tokens per forward."""
        return [
            Point(step.nodes, Estimate(value=1000 * step.nodes / step.floor_ms, interval=None))
            for step in self.verifications
        ]

    def measured(self) -> list[Point]:
        """Tokens per second that were verified, by tokens per forward: medians over calls."""
        return [Point(step.nodes, self._rate(step)) for step in self.verifications]

    def _rate(self, step: Step) -> Estimate:
        rates = step.nodes * self.repeats / np.asarray(step.seconds)
        return estimate(rates[:, None], median)


def read_roofline(path: Path) -> Roofline:
    """Reads a record of `bench/roofline.py`.

    Raises:
        ResultError: the file is missing, or holds something else.
    """
    try:
        entries, broken = opened(path.read_bytes())
        roofline = Roofline.model_validate(entries)
    except OSError as error:
        raise ResultError(f"{path}: cannot be read: {error}; run: bench/roofline.py") from None
    except ValueError as error:
        broken = first_problem(error)
    if broken is not None:
        raise ResultError(f"{path}: not a record of bench/roofline.py ({broken}); run it again")
    return roofline
