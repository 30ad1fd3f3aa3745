"""The schema of `results/experiments/<name>.json`: every point of a grid, with all that a row of a
table says of a configuration, and what it is compared with.

As `dynatree.ablation`, it imports neither the statistics nor the models.
"""

from pathlib import Path
from typing import Annotated, Final, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from dynatree.ablation import ConfigurationFacts, Estimate, PairSetting
from dynatree.facts import Fact, read_facts, write_facts

Value = bool | int | float | str
"""Where on an axis a point lies."""

FigureKind = Literal["bars", "heatmap", "curves", "multiples", "budget"]
"""How an experiment is drawn, and with which point each is compared.

- `bars`: the rows at each place of the grid; with the first row there that drafts.
- `heatmap`: the speedup over two fields, a panel for each value of a third; with the fastest point.
- `curves`: throughput and speedup against a number; with the first point of the row.
- `multiples`: one field at a time, a panel for each; with the point that all panels share, or the
  first of the panel.
- `budget`: the speedup against the node budget and what the cost model predicts; as `curves`.
"""

NODE_BUDGET: Final = "node_budget"

_AXES: Final = {
    "max_new_tokens": "new tokens",
    "num_draft_tokens": "draft tokens",
    "tau_high": "upper confidence",
    "tau_low": "lower confidence",
    "b_max": "largest breadth",
    "d_max": "largest depth",
}


def axis_words(axis: str) -> str:
    """What a field is called on an axis and in a sentence."""
    return _AXES.get(axis, axis.replace("_", " "))


def value_words(value: Value) -> str:
    """A value of a field, as figures and tables print it."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return f"{value:g}" if number else str(value)


def place_words(values: dict[str, Value]) -> str:
    """A place in the grid: `depth 4, 64 new tokens`; a text says by itself what it is."""
    parts = []
    for axis, value in values.items():
        words, shown = axis_words(axis), value_words(value)
        if isinstance(value, str):
            parts.append(shown)
        else:
            parts.append(f"{shown} {words}" if words.endswith("tokens") else f"{words} {shown}")
    return ", ".join(parts)


class Prediction(Fact):
    """What `dynatree.costs` predicts for a point from the other points of its row.

    Attributes:
        round_cost: of a mean round, in tokens of autoregressive decoding of the same job.
        measured_round_cost: the same, as measured.
        speedup: over autoregressive decoding.
    """

    round_cost: PositiveFloat
    measured_round_cost: PositiveFloat
    speedup: PositiveFloat


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
        reference: name of the point that this one is compared with, see `FigureKind`; None for
            that point itself.
        change: of the speedup against that of `reference`, relative (0.1 is 10 % faster).
        predicted: by the cost model; only where the experiment is about the node budget.
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
    reference: str | None
    change: Estimate | None
    predicted: Prediction | None


class Experiment(Fact):
    """All that was measured for one experiment of the configuration.

    Attributes:
        title: heading in the paper.
        axes: fields that vary, in the order of the configuration.
        points: in the order of the configuration.
    """

    schema_version: Literal[2] = 2
    experiment: str
    title: str
    figure: FigureKind
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

    @model_validator(mode="after")
    def _references_are_points(self) -> Self:
        names = {point.name for point in self.points}
        for point in self.points:
            if (point.reference is None) != (point.change is None):
                raise ValueError(f"{point.name}: a change needs a reference, and each the other")
            if point.reference is not None and point.reference not in names:
                raise ValueError(f"{point.name}: its reference {point.reference!r} is no point")
        return self

    @property
    def swept(self) -> list[list[PointFacts]]:
        """The shown points of each row that is the best of several at its places."""
        return [points for _, points in self.rows if len(self.rivals(points[0])) > 1]

    def rivals(self, point: PointFacts) -> list[PointFacts]:
        """The candidates of the row of `point` at its place in the grid, itself among them."""
        place = (point.row, point.values)
        return [other for other in self.points if (other.row, other.values) == place]

    def point(self, name: str) -> PointFacts:
        """The point called `name`."""
        return next(point for point in self.points if point.name == name)

    @property
    def places(self) -> list[tuple[str, list[PointFacts]]]:
        """The shown points at each place of the grid, under the place in words."""
        found: dict[str, list[PointFacts]] = {}
        for point in self.shown:
            found.setdefault(place_words(point.values), []).append(point)
        return list(found.items())

    @property
    def rows(self) -> list[tuple[str, list[PointFacts]]]:
        """The shown points of each row, under what the row is called at its first."""
        found: dict[str, list[PointFacts]] = {}
        for point in self.shown:
            found.setdefault(point.row, []).append(point)
        return [(points[0].label, points) for points in found.values()]

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
