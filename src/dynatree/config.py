"""The meaning of `config.yaml`: one pydantic model, used by the Snakefile, the CLI and the API.

There is no second schema. `load_config` either returns a `Config` that can be run or raises one
`ConfigError` that lists every problem with the path of its key, the value and the fix.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

import yaml
from pydantic import Field, PrivateAttr, TypeAdapter, ValidationError, model_validator

from dynatree.devices import Busy
from dynatree.errors import ConfigError
from dynatree.experiments import NODE_BUDGET, FigureKind
from dynatree.schema import (
    Count,
    Name,
    OneOrMore,
    Scalar,
    Section,
    Text,
    canonical,
    digest,
    problem_lines,
    repeated,
    unknown,
)
from dynatree.specs import CertificateSpec, Measure, Models, RunSpec, TreesSpec
from dynatree.strategies import Strategy, StrategyBase
from dynatree.texts import Selection, Workload

ExperimentName = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]{0,31}$")]
"""Names become targets of Snakemake and begin those of points, where a hyphen separates."""

TEXTS = ("numbers", "prose", "tables")
"""Parts of the paper that are made from all sections; each has a template of its name. No section
may be called as one of them, nor as `main`, which includes them."""


MAX_POINTS: Final = 10_000
"""Points of one grid: each is a job."""

MAX_VALUES: Final = 200_000
"""Keys and values of a configuration, those that an anchor repeats counted each time."""

MAX_LEVELS: Final = 32
"""Levels of a configuration; what is nested deeper is no configuration."""

MAX_INTEGER: Final = 2**63 - 1
"""Largest whole number, as a seed of torch."""

MAX_PROBLEMS: Final = 40
"""Problems that one message lists before it counts the rest."""


class Certification(Section):
    """What the losslessness certificate compares: the first `prompts` prompts of the workload."""

    prompts: Count = 8
    max_new_tokens: Count = 64


class TreePage(Section):
    """What `results/trees.html` shows: how `configs` decode the first `prompts` prompts."""

    configs: list[Name] = []
    prompts: Count = 4
    max_new_tokens: Count = 48


class Devices(Section):
    """What becomes of GPUs that are not alike, or not ours alone; no measurement depends on it.

    Attributes:
        busy: what a job does about a GPU that a program uses which knows nothing of our locks:
            `wait` for it, `refuse`, or measure beside it and `flag` the result.
        mixed: what the aggregation does with results of different devices: `refuse` them, or
            `group` the rows of a table by device and compare none across devices.
    """

    busy: Busy = "wait"
    mixed: Literal["refuse", "group"] = "refuse"


class Cluster(Section):
    """What a job that loads the pair asks a cluster for; nothing that a result depends on.

    Attributes:
        threads: CPU cores of the job; elsewhere a job takes all that Snakemake was given.
        memory_mb: of the host, in MB.
        minutes: after which the cluster may stop the job.
        gpu_model: as the cluster calls it, such as `h100`; None takes any.
    """

    threads: Count = 8
    memory_mb: Count = 16_000
    minutes: Count = 60
    gpu_model: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")] | None = None


class PairSpec(Models):
    """The models of a pair, and what changes when that pair is the one in use."""

    note: Text | None = None
    cluster: dict[str, Any] = {}
    measure: dict[str, Any] = {}
    strategies: dict[Name, dict[str, Any]] = {}


class Experiment(Section):
    """Configurations, each measured with every combination of values of a grid.

    Attributes:
        configs: configurations, or sweeps, of which every candidate is measured.
        grid: fields of the strategies, of `measure` and of the workload (`count`,
            `prompt_tokens`). A list of values is an axis; a single value holds for all points.
            Several grids are measured one after the other, such as one parameter at a time.
        title: heading in the paper; the experiment's name by default.
        figure: how it is drawn; what its grid allows by default, see `kind`.
    """

    configs: Annotated[list[Name], Field(min_length=1)]
    grid: Annotated[list[dict[Name, OneOrMore]], Field(min_length=1)] = [{}]
    title: Text | None = None
    figure: FigureKind | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_grid_is_a_mapping(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and isinstance(data.get("grid"), Mapping):
            return {**data, "grid": [data["grid"]]}
        return data

    @model_validator(mode="after")
    def _the_figure_fits_the_grid(self) -> Self:
        if self.figure is not None and self.figure not in self._possible():
            raise ValueError(
                f"figure: {self.figure!r} does not go with this grid; choose one of "
                f"{', '.join(self._possible())}, or leave it out"
            )
        return self

    @property
    def kind(self) -> FigureKind:
        """How it is drawn: as asked for, or in the first way that its grid allows."""
        return self.figure or self._possible()[0]

    def _possible(self) -> list[FigureKind]:
        axes = [
            [key for key, value in grid.items() if isinstance(value, list)] for grid in self.grid
        ]
        numeric = all(
            isinstance(value, int | float) and not isinstance(value, bool)
            for grid in self.grid
            for values in grid.values()
            if isinstance(values, list)
            for value in values
        )
        possible: list[FigureKind] = ["bars"]
        if not numeric or [] in axes:
            return possible
        if len(axes) == 1:
            if len(axes[0]) + (len(self.configs) > 1) in (2, 3) and len(axes[0]) > 1:
                possible.insert(0, "heatmap")
            if len(axes[0]) == 1:
                possible.insert(0, "curves")
            # A prediction needs two other points.
            if axes[0] == [NODE_BUDGET] and len(self.combinations()) > 2:
                possible.insert(0, "budget")
        if all(len(found) == 1 for found in axes):
            possible.insert(0 if len(axes) > 1 else len(possible), "multiples")
        return possible

    def combinations(self) -> list[tuple[dict[str, Scalar], dict[str, Scalar]]]:
        """For each point of the grids: its values on the axes, and the values of all points.

        Raises:
            ValueError: a grid is beyond all measure.
        """
        found = []
        for grid in self.grid:
            single = {key: value for key, value in grid.items() if not isinstance(value, list)}
            axes = {key: value for key, value in grid.items() if isinstance(value, list)}
            points = math.prod(map(len, axes.values()))
            if points > MAX_POINTS:
                raise ValueError(
                    f"a grid of {points} points is more than {MAX_POINTS}; make several "
                    "experiments of it, or drop values"
                )
            found += [
                (dict(zip(axes, values, strict=True)), single) for values in product(*axes.values())
            ]
        return found


class Paper(Section):
    """What `paper/main.pdf` takes in beside the sections: `experiments`, in this order."""

    experiments: list[ExperimentName] = []


@dataclass(frozen=True)
class Measured:
    """What one measurement of the pair in use is about, whatever it is called.

    Attributes:
        digest: SHA-256 (hex); equal exactly if the same is measured. A changed file or pair makes
            a measurement stale and is no other measurement.
    """

    strategy: StrategyBase
    measure: Measure
    workload: Workload

    @property
    def digest(self) -> str:
        return digest(
            {
                "strategy": self.strategy.model_dump(mode="json"),
                "measure": self.measure.model_dump(mode="json"),
                "workload": self.workload.model_dump(mode="json"),
            }
        )


@dataclass(frozen=True)
class Point:
    """One measurement of an experiment.

    Attributes:
        name: of the experiment, the configuration if there are several, and each axis.
        row: the configuration or sweep that the experiment lists.
        config: the configuration itself, or the candidate of the sweep.
        values: on the axes of the grid.
        run: the run that measures it, `results/runs/<pair>/<run>.json`: that of a configuration
            where it measures the same, and the same in every experiment.
    """

    name: str
    row: str
    config: str
    values: dict[str, Scalar]
    run: str


class RunConfig(Section):
    """One ablation configuration: a strategy, and what its row is called in each table."""

    run: Strategy
    labels: dict[Name, Text] = {}

    @model_validator(mode="before")
    @classmethod
    def _split_labels(cls, data: Any) -> Any:
        # In YAML a configuration is flat: the strategy's own keys, and `labels` beside them.
        if isinstance(data, Mapping) and "run" not in data:
            strategy = {key: value for key, value in data.items() if key != "labels"}
            return {"run": strategy, "labels": data.get("labels", {})}
        return data


class Sweep(Section):
    """A row that is whichever of several configurations turns out the fastest, such as a linear
    baseline with its best K; and what the row is called in each table.
    """

    best_of: Annotated[list[Name], Field(min_length=2)]
    labels: dict[Name, Text] = {}


class Config(Section):
    """A whole, valid `config.yaml`."""

    pair: Name
    pairs: Annotated[dict[Name, PairSpec], Field(min_length=1)]
    workloads: Annotated[dict[Name, Workload], Field(min_length=1)]
    measure: Measure
    devices: Devices = Devices()
    cluster: Cluster = Cluster()
    certificate: Certification = Certification()
    trees: TreePage = TreePage()
    configs: Annotated[dict[Name, RunConfig], Field(min_length=1)]
    sweeps: dict[Name, Sweep] = {}
    tables: Annotated[dict[Name, Annotated[list[Name], Field(min_length=1)]], Field(min_length=1)]
    # Each is one file of the paper with these tables; the first is what `snakemake` makes.
    sections: dict[Name, Annotated[list[Name], Field(min_length=1)]] = {}
    experiments: dict[ExperimentName, Experiment] = {}
    paper: Paper = Paper()
    _points: dict[str, list[Point]] = PrivateAttr(default_factory=dict)
    _runs: dict[str, Measured] = PrivateAttr(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _one_section_by_default(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and not data.get("sections"):
            tables = data.get("tables")
            if isinstance(tables, Mapping):
                return {**data, "sections": {"ablation": list(tables)}}
        return data

    @model_validator(mode="after")
    def _names_resolve(self) -> Self:
        problems: list[str] = []

        def known(path: str, name: str, among: Mapping[str, object], kind: str) -> bool:
            if name in among:
                return True
            problems.append(f"{path}: {unknown(name, list(among), kind)}")
            return False

        known("pair", self.pair, self.pairs, "pair")
        known("measure.workload", self.measure.workload, self.workloads, "workload")
        for index, name in enumerate(self.trees.configs):
            known(f"trees.configs.{index}", name, self.configs, "configuration")
        for name in repeated(self.trees.configs):
            problems.append(f"trees.configs: {name!r} is listed twice; remove one")
        for name, sweep in self.sweeps.items():
            if name in self.configs:
                problems.append(f"sweeps.{name}: is a configuration too; rename one")
            for index, candidate in enumerate(sweep.best_of):
                known(f"sweeps.{name}.best_of.{index}", candidate, self.configs, "configuration")
            for candidate in repeated(sweep.best_of):
                problems.append(f"sweeps.{name}.best_of: {candidate!r} is listed twice; remove one")
        for table, rows in self.tables.items():
            for index, row in enumerate(rows):
                known(
                    f"tables.{table}.{index}",
                    row,
                    {**self.configs, **self.sweeps},
                    "configuration or sweep",
                )
            for row in repeated(rows):
                problems.append(f"tables.{table}: {row!r} is listed twice; remove one")
            # One configuration in two rows would be compared with itself.
            shown = [name for row in dict.fromkeys(rows) for name in set(self.candidates(row))]
            for name in repeated(shown):
                problems.append(
                    f"tables.{table}: {name!r} may stand in two rows, because of a sweep; remove "
                    "one of the rows, or the configuration from the sweep"
                )
        for section, tables in self.sections.items():
            if section in ("main", *TEXTS):
                problems.append(
                    f"sections.{section}: paper/{section}.tex is another part of the paper; rename "
                    "the section"
                )
            for index, table in enumerate(tables):
                known(f"sections.{section}.{index}", table, self.tables, "table")
        for name, spec in self.pairs.items():
            try:
                measure = self._measure_for(spec)
                known(
                    f"pairs.{name}.measure.workload", measure.workload, self.workloads, "workload"
                )
            except ValidationError as error:
                problems += problem_lines(error, f"pairs.{name}.measure")
            try:
                self._cluster_for(spec)
            except ValidationError as error:
                problems += problem_lines(error, f"pairs.{name}.cluster")
            for config, overrides in spec.strategies.items():
                path = f"pairs.{name}.strategies.{config}"
                if known(path, config, self.configs, "configuration"):
                    try:
                        _override(self.configs[config].run, overrides)
                    except ValidationError as error:
                        problems += problem_lines(error, path)
        for index, name in enumerate(self.paper.experiments):
            known(f"paper.experiments.{index}", name, self.experiments, "experiment")
        for name in repeated(self.paper.experiments):
            problems.append(f"paper.experiments: {name!r} is listed twice; remove one")
        for name, experiment in self.experiments.items():
            if name in self.sections:
                problems.append(
                    f"experiments.{name}: is a section too, and both are targets; rename one"
                )
            path = f"experiments.{name}.configs"
            for row in repeated(experiment.configs):
                problems.append(f"{path}: {row!r} is listed twice; remove one")
            for index, row in enumerate(experiment.configs):
                known(
                    f"{path}.{index}",
                    row,
                    {**self.configs, **self.sweeps},
                    "configuration or sweep",
                )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @model_validator(mode="after")
    def _experiments_expand(self) -> Self:
        problems: list[str] = []
        measure, workload = self.measurement, self.workload
        # What a table measures keeps its name; so does what some configuration would measure.
        named: dict[str, str] = {}
        for config in [*self.measured, *sorted(self.configs)] if self.experiments else []:
            same = Measured(self.strategy(config), measure, workload)
            named.setdefault(same.digest, config)
        for name, experiment in self.experiments.items():
            points: dict[str, Point] = {}
            try:
                combinations = experiment.combinations()
            except ValueError as error:
                problems.append(f"experiments.{name}.grid: {error}")
                continue
            for row, (values, single) in product(experiment.configs, combinations):
                for config in self.candidates(row):
                    parts = [config] if len(experiment.configs) > 1 or row in self.sweeps else []
                    parts += [_part(key, value) for key, value in values.items()]
                    label = "-".join([name, *parts])
                    try:
                        measured = self._with(config, {**single, **values})
                    except ValidationError as error:
                        problems += problem_lines(error, f"experiments.{name}.grid")
                        continue
                    except ValueError as error:
                        problems.append(f"experiments.{name}.grid.{error}")
                        continue
                    tag = str(measured.strategy.model_dump()["strategy"])
                    run = named.get(measured.digest, f"{tag}-{measured.digest[:12]}")
                    if label in points:
                        problems.append(
                            f"experiments.{name}: {label!r} comes out twice; remove one"
                        )
                    points[label] = Point(label, row, config, values, run)
                    if run not in self.configs:
                        self._runs[run] = measured
            self._points[name] = list(points.values())
        if problems:
            raise ValueError("\n".join(dict.fromkeys(problems)))
        return self

    def _with(self, config: str, values: Mapping[str, Scalar]) -> Measured:
        """Configuration `config` with `values` of fields in place of its own and the pair's."""
        measure = {key: value for key, value in values.items() if key in Measure.model_fields}
        texts = {key: value for key, value in values.items() if key in ("count", "prompt_tokens")}
        strategy = {
            key: value for key, value in values.items() if key not in measure and key not in texts
        }
        settings = Measure.model_validate({**self.measurement.model_dump(), **measure})
        if settings.workload not in self.workloads:
            known = list(self.workloads)
            raise ValueError(f"workload: {unknown(settings.workload, known, 'workload')}")
        workload = self.workloads[settings.workload]
        return Measured(
            strategy=_override(self.strategy(config), strategy),
            measure=settings,
            workload=Workload.model_validate({**workload.model_dump(), **texts}),
        )

    def _measure_for(self, spec: PairSpec) -> Measure:
        return Measure.model_validate({**self.measure.model_dump(), **spec.measure})

    def _cluster_for(self, spec: PairSpec) -> Cluster:
        return Cluster.model_validate({**self.cluster.model_dump(), **spec.cluster})

    @property
    def pair_spec(self) -> PairSpec:
        """The pair in use."""
        return self.pairs[self.pair]

    @property
    def measurement(self) -> Measure:
        """The measuring settings, with the pair's own values applied."""
        return self._measure_for(self.pair_spec)

    @property
    def job(self) -> Cluster:
        """What a job asks a cluster for, with the pair's own values applied."""
        return self._cluster_for(self.pair_spec)

    @property
    def workload(self) -> Workload:
        """The workload in use."""
        return self.workloads[self.measurement.workload]

    @property
    def measured(self) -> list[str]:
        """Every configuration that some table needs, once each, in order of first use."""
        rows = [row for rows in self.tables.values() for row in rows]
        return list(dict.fromkeys(name for row in rows for name in self.candidates(row)))

    def candidates(self, row: str) -> list[str]:
        """The configurations of which `row` of a table shows one: its own, or those of a sweep."""
        return self.sweeps[row].best_of if row in self.sweeps else [row]

    def section(self, name: str) -> "Config":
        """The configuration with the tables of section `name` alone, and no recorded trees."""
        tables = {table: self.tables[table] for table in self.sections[name]}
        return self._reduced(
            [], tables=tables, sections={name: self.sections[name]}, trees=TreePage()
        )

    def experiment(self, name: str) -> "Config":
        """The configuration with experiment `name` alone; raises as `points`."""
        self.points(name)
        return self._reduced([name])

    def _reduced(self, experiments: list[str], **changes: Any) -> "Config":
        """A copy with `experiments` alone, equal to one that was read with no others."""
        kept = {name: self.experiments[name] for name in experiments}
        reduced = self.model_copy(update={**changes, "experiments": kept, "paper": Paper()})
        reduced._points = {name: self._points[name] for name in experiments}
        runs = {point.run for points in reduced._points.values() for point in points}
        reduced._runs = {run: entry for run, entry in self._runs.items() if run in runs}
        return reduced

    def points(self, experiment: str) -> list[Point]:
        """What the experiment of that name measures.

        Raises:
            ConfigError: there is no such experiment.
        """
        if experiment not in self.experiments:
            known = list(self.experiments)
            raise ConfigError(f"experiments: {unknown(experiment, known, 'experiment')}")
        return self._points[experiment]

    def point_runs(self, experiment: str) -> list[str]:
        """The runs of its points, once each, since some measure the same; raises as `points`."""
        return list(dict.fromkeys(point.run for point in self.points(experiment)))

    @property
    def shown(self) -> list[str]:
        """The runs that tables and the paper's experiments are made of, once each."""
        points = (run for name in self.paper.experiments for run in self.point_runs(name))
        return list(dict.fromkeys((*self.measured, *points)))

    def overrides(self, name: str) -> dict[str, Any]:
        """The strategy values that the pair in use changes for configuration `name`."""
        return self.pair_spec.strategies.get(name, {})

    def canonical(self) -> str:
        """One JSON text for equal configurations; `parse_config` reads it back.

        Only the order of tables and grids counts, because they are shown in it. What jobs ask a
        cluster for is left out, so that more memory makes nothing stale.
        """
        kept = self.model_dump(
            mode="json", exclude={"cluster": True, "pairs": {"__all__": {"cluster"}}}
        )
        data = json.loads(canonical(kept))
        data["tables"] = self.tables
        data["sections"] = self.sections
        data["experiments"] = {
            name: experiment.model_dump(mode="json")
            for name, experiment in sorted(self.experiments.items())
        }
        return json.dumps(data, separators=(",", ":"))

    def strategy(self, name: str) -> StrategyBase:
        """The strategy of configuration `name`, with the pair's overrides applied.

        Raises:
            ConfigError: no configuration has that name.
        """
        if name not in self.configs:
            raise ConfigError(f"configs: {unknown(name, list(self.configs), 'configuration')}")
        return _override(self.configs[name].run, self.overrides(name))

    def label(self, row: str, table: str) -> str:
        """What `row`, a configuration or a sweep, is called in `table`, or in an experiment."""
        entry = self.sweeps[row] if row in self.sweeps else self.configs[row]
        return entry.labels.get(table, row)

    def run(self, name: str) -> Measured:
        """What the run called `name` measures: a configuration, or a point of an experiment.

        Raises:
            ConfigError: neither has that name.
        """
        if name in self._runs:
            return self._runs[name]
        return Measured(self.strategy(name), self.measurement, self.workload)

    def files(self, name: str) -> list[str]:
        """The local files that the prompts of run `name` are chosen from; raises as `run`."""
        file = self.run(name).workload.file
        return [] if file is None else [file]

    def spec(self, name: str) -> RunSpec:
        """What the measurement of run `name` depends on.

        Raises:
            ConfigError: there is no such run, or the file with its prompts cannot be read.
        """
        run = self.run(name)
        return RunSpec.model_validate(
            {
                "name": name,
                "pair": self.pair,
                "models": self.pair_spec.model_dump(include=set(Models.model_fields)),
                "strategy": run.strategy.model_dump(),
                "measure": run.measure.model_dump(),
                "prompts": _chosen(run.workload, run.measure),
            }
        )

    def certificate_spec(self, names: Sequence[str]) -> CertificateSpec:
        """What the certificate of the configurations `names` depends on; raises as `spec`."""
        return CertificateSpec.model_validate(
            {
                "pair": self.pair,
                "models": self.pair_spec.model_dump(include=set(Models.model_fields)),
                "strategies": {name: self.strategy(name).model_dump() for name in names},
                "prompts": _chosen(self.workload, self.measurement),
                "max_new_tokens": self.certificate.max_new_tokens,
            }
        ).first(self.certificate.prompts)

    def trees_spec(self, name: str) -> TreesSpec:
        """What the recorded trees of configuration `name` depend on."""
        return TreesSpec.model_validate(
            {
                "name": name,
                "pair": self.pair,
                "models": self.pair_spec.model_dump(include=set(Models.model_fields)),
                "strategy": self.strategy(name).model_dump(),
                "prompts": _chosen(self.workload, self.measurement),
                "max_new_tokens": self.trees.max_new_tokens,
            }
        ).first(self.trees.prompts)


def parse_config(data: Any, origin: str = "config") -> Config:
    """Validates the parsed YAML of a configuration.

    Raises:
        ConfigError: one message that lists every problem.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(
            f"{origin}: expected a mapping with the keys {', '.join(Config.model_fields)}, "
            f"got {type(data).__name__}"
        )
    _Extent().require(data, origin)
    try:
        return Config.model_validate(dict(data))
    except ValidationError as error:
        lines = problem_lines(error)
    more = len(lines) - MAX_PROBLEMS
    if more > 0:
        lines[MAX_PROBLEMS:] = [f"and {more} more"]
    raise ConfigError(f"{origin} is not valid:\n" + "\n".join(f"  {line}" for line in lines))


class _Extent:
    """How many values parsed YAML stands for and how deep they lie, whatever its anchors share.

    A few lines can stand for more values than memory holds, or contain themselves; each part is
    looked at once, however often it is repeated.
    """

    def __init__(self) -> None:
        # By identity: number of values, levels; None while the part is being looked at.
        self._known: dict[int, tuple[int, int] | None] = {}

    def require(self, data: object, origin: str) -> None:
        """Raises ConfigError unless `data` is of a size that a configuration can have."""
        try:
            values, levels = self._of(data, 1)
        except ValueError as error:
            raise ConfigError(f"{origin}: {error}") from None
        if values > MAX_VALUES or levels > MAX_LEVELS:
            raise ConfigError(
                f"{origin}: stands for {values} values in {levels} levels; there may be at most "
                f"{MAX_VALUES} and {MAX_LEVELS}; write it without YAML's anchors (&, *), and "
                "prompts into a file"
            )

    def _of(self, value: object, level: int) -> tuple[int, int]:
        if isinstance(value, int) and abs(value) > MAX_INTEGER:
            raise ValueError(f"a whole number lies beyond {MAX_INTEGER}; use a smaller one")
        if not isinstance(value, Mapping | list | tuple | set):
            return 1, 1
        if level > MAX_LEVELS:
            raise ValueError(f"is nested in more than {MAX_LEVELS} levels; flatten it")
        if id(value) in self._known:
            known = self._known[id(value)]
            if known is None:
                raise ValueError("contains itself by an anchor; write it out")
            return known
        self._known[id(value)] = None
        parts = [*value.keys(), *value.values()] if isinstance(value, Mapping) else value
        found = [self._of(part, level + 1) for part in parts]
        extent = (
            1 + sum(values for values, _ in found),
            1 + max((levels for _, levels in found), default=0),
        )
        self._known[id(value)] = extent
        return extent


def load_config(path: str | Path = "config.yaml") -> Config:
    """Reads and validates a configuration file.

    Raises:
        ConfigError: the file is missing, is not YAML, repeats a key, or does not fit the model.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; run from the project's folder") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    try:
        data = yaml.load(text, _UniqueKeyLoader)
    except Exception as error:
        # With explicit tags, such as !!bool x, PyYAML raises whatever its own code trips over.
        reason = error if isinstance(error, yaml.YAMLError | ValueError) else type(error).__name__
        raise ConfigError(
            f"{path} is not valid YAML: {reason}; compare it with the config.yaml of the repository"
        ) from None
    return parse_config(data, str(path))


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML in which a key given twice is an error; PyYAML lets the last one win silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            try:
                repeated = key in seen
                seen.add(key)
            except TypeError:
                raise yaml.constructor.ConstructorError(
                    None, None, f"a key must be plain text, got {key!r}", key_node.start_mark
                ) from None
            if repeated:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice; remove one", key_node.start_mark
                )
        return super().construct_mapping(node, deep)


_STRATEGY: TypeAdapter[StrategyBase] = TypeAdapter(Strategy)


def _chosen(workload: Workload, measure: Measure) -> list[str] | dict[str, Any]:
    chosen = workload.chosen(f"workloads.{measure.workload}", measure.seed)
    return chosen.model_dump() if isinstance(chosen, Selection) else chosen


SHORT = {
    "branch_factor": "branch",
    "max_new_tokens": "tokens",
    "node_budget": "budget",
    "num_draft_tokens": "k",
    "prompt_tokens": "prompt",
    "prune_threshold": "threshold",
    "workload": "",
}
"""What a field is called in the name of a point, where that is shorter."""


def _part(key: str, value: Scalar) -> str:
    """A value of an axis as part of a file name."""
    shown = str(value).lower() if isinstance(value, bool) else str(value)
    return f"{SHORT.get(key, key)}{shown}"


def _override(strategy: StrategyBase, overrides: Mapping[str, Any]) -> StrategyBase:
    return _STRATEGY.validate_python({**strategy.model_dump(), **overrides})
