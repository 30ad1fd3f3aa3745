"""The schema of `results/experiments/<name>.json`: every point of a grid, with all that a row of a
table says of a configuration.

As `dynatree.ablation`, it imports neither the statistics nor the models.
"""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from dynatree.ablation import ConfigurationFacts, PairSetting
from dynatree.facts import Fact, read_facts, write_facts

Value = bool | int | float | str
"""Where on an axis a point lies."""


class PointFacts(ConfigurationFacts):
    """One measured point; its `name` is that of the experiment and its place in the grid.

    Attributes:
        run: the run that measured it, `results/runs/<pair>/<run>.json`.
        spec_digest: of that run.
        row: the configuration or sweep that the experiment lists.
        configuration: the configuration whose strategy it is, but for the values of the grid.
        label: what the row is called; that of a sweep names the candidate.
        shown: false for a candidate of a sweep that is not the fastest at its place; see
            `dynatree.ablation.Sweep` for what that choice does to the numbers.
        values: the place in the grid, by axis.
        workload: name of the workload in the configuration.
        prompts_digest: SHA-256 (hex) of the exact prompt tokens.
        prompt_tokens_mean: mean over prompts of their length.
        runs: timed passes over the prompts.
    """

    run: str
    spec_digest: str
    row: str
    configuration: str
    label: str
    shown: bool
    values: dict[str, Value]
    workload: str
    prompts: PositiveInt
    prompts_digest: str
    prompt_tokens_mean: PositiveFloat
    max_new_tokens: PositiveInt
    runs: PositiveInt


class Experiment(Fact):
    """All that was measured for one experiment of the configuration.

    Attributes:
        axes: fields that vary, in the order of the configuration.
        points: in the order of the configuration.
    """

    schema_version: Literal[1] = 1
    experiment: str
    setting: PairSetting
    axes: list[str]
    points: Annotated[list[PointFacts], Field(min_length=1)]
    notes: list[str]

    @model_validator(mode="after")
    def _the_fastest_are_shown(self) -> Self:
        names = [point.name for point in self.points]
        if len(set(names)) < len(names):
            raise ValueError("two points have the same name")
        for point in self.points:
            if not set(point.values) <= set(self.axes):
                raise ValueError(f"{point.name}: its values are not on the axes {self.axes}")
            shown = [rival for rival in self.rivals(point) if rival.shown]
            if len(shown) != 1 or shown[0].speedup.value < point.speedup.value:
                raise ValueError(f"{point.name}: the fastest candidate of its row must be shown")
        return self

    def rivals(self, point: PointFacts) -> list[PointFacts]:
        """The candidates of the row of `point` at its place in the grid, itself among them."""
        place = (point.row, point.values)
        return [other for other in self.points if (other.row, other.values) == place]

    @property
    def shown(self) -> list[PointFacts]:
        """The points that tables and figures show: all but a sweep's losers."""
        return [point for point in self.points if point.shown]


def write_experiment(path: Path, experiment: Experiment) -> None:
    """Writes `experiment` to `path`, all or nothing."""
    write_facts(path, experiment)


def read_experiment(path: Path) -> Experiment:
    """Reads and validates an aggregated experiment; raises as `read_facts`."""
    return read_facts(path, Experiment, "experiment")
