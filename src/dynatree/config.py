"""The meaning of `config.yaml`: one pydantic model, used by the Snakefile, the CLI and the API.

There is no second schema. `load_config` either returns a `Config` that can be run or raises one
`ConfigError` that lists every problem with the path of its key, the value and the fix.
"""

import difflib
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    ValidationError,
    model_serializer,
    model_validator,
)

from dynatree.embedded.corpus import language_reference
from dynatree.errors import ConfigError
from dynatree.files import digest_of
from dynatree.strategies import Strategy, StrategyBase

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")]
"""Names become file names below `results/`, so they hold no separators and no shell characters."""

ExperimentName = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]{0,31}$")]
"""Names become targets of Snakemake and begin those of points, where a hyphen separates."""

TEXTS = ("numbers", "prose", "tables")
"""Parts of the paper that are made from all sections; each has a template of its name. No section
may be called as one of them, nor as `main`, which includes them."""

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
                f"must be a number, a text, true or false, or a list of these, got {_short(entry)}"
            )
    return value


OneOrMore = Annotated[Scalar | list[Scalar], PlainValidator(_one_or_more)]

RECORD_FILES = (".jsonl", ".parquet")
"""Files of records with fields; every other file is plain text."""


class Section(BaseModel):
    """Base of every section: unknown keys and silent type conversions are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ModelSource(Section):
    """Where one model comes from: a hub repository with a revision, or a local directory."""

    hub: Text | None = None
    revision: Text = "main"
    path: Text | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.hub is None) == (self.path is None):
            raise ValueError("give exactly one of hub (a repository id) and path (a directory)")
        return self


class Transformer(Section):
    """Geometry of a GPT-NeoX model that a recipe trains."""

    layers: Count
    width: Count
    heads: Count

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(
                f"width {self.width} must be heads ({self.heads}) times an even head size"
            )
        return self

    def times(self, trained: "Transformer") -> int:
        """How many copies of the features and heads of `trained` this geometry holds.

        Raises:
            ValueError: no model of this geometry repeats `trained`; see `dynatree.embedded.widen`.
        """
        times = self.width // trained.width
        # Only powers of two divide weights without rounding.
        if self.width % trained.width or times < 2 or times & (times - 1):
            raise ValueError(
                f"width {self.width} must be 2, 4, 8 or another power of two times the trained "
                f"width {trained.width}; correct one of the two"
            )
        if self.heads != times * trained.heads:
            raise ValueError(
                f"heads {self.heads} must be {times * trained.heads}, {times} times the trained "
                f"{trained.heads} as the width is, so that the head size stays "
                f"{trained.width // trained.heads}"
            )
        if self.layers < trained.layers:
            raise ValueError(
                f"layers {self.layers} must be at least the trained {trained.layers}; raise it"
            )
        return times


class Widen(Section):
    """Geometry that a recipe's trained models are carried over to, with what they have learnt."""

    target: Transformer
    draft: Transformer
    vocab_size: Count
    context: Count


class Recipe(Section):
    """How the embedded pair is trained; see `dynatree.embedded`."""

    seed: int = 0
    corpus_characters: Annotated[int, Field(ge=2_000)] = 465_000
    vocab_size: Annotated[int, Field(ge=300, le=65_536)] = 1024
    context: Annotated[int, Field(ge=16)] = 512
    target: Transformer
    draft: Transformer
    sequence: Annotated[int, Field(ge=8)] = 128
    batch: Count = 16
    target_steps: Count
    target_learning_rate: Positive = 4e-3
    rollouts: Count
    rollout_prompt: Count = 24
    rollout_tokens: Count = 96
    draft_steps: Count
    draft_batch: Count = 32
    draft_learning_rate: Positive = 4e-3
    widen: Widen | None = None

    @model_validator(mode="after")
    def _fits_context(self) -> Self:
        longest = max(self.sequence, self.rollout_prompt + self.rollout_tokens)
        if longest > self.context:
            raise ValueError(
                f"context {self.context} is shorter than the {longest} tokens trained on; raise "
                "context or lower sequence, rollout_prompt or rollout_tokens"
            )
        return self

    @model_validator(mode="after")
    def _can_be_widened(self) -> Self:
        if self.widen is None:
            return self
        for role in ("target", "draft"):
            try:
                getattr(self.widen, role).times(getattr(self, role))
            except ValueError as error:
                raise ValueError(f"widen.{role}: {error}") from None
        for name in ("vocab_size", "context"):
            wide, trained = getattr(self.widen, name), getattr(self, name)
            if wide < trained:
                raise ValueError(
                    f"widen.{name}: {wide} must be at least the trained {trained}; raise it"
                )
        return self

    @model_serializer(mode="wrap")
    def _without_absent(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # A recipe that does not widen is the recipe, with the digest, that it was before.
        return {key: value for key, value in serialise(self).items() if value is not None}


class Measure(Section):
    """What one measuring job does; `runs` counts timed passes over the workload."""

    workload: Name
    runs: Count = 5
    warmup: Annotated[int, Field(ge=0)] = 1
    max_new_tokens: Count = 500
    seed: int = 0


class Certification(Section):
    """What the losslessness certificate compares: the first `prompts` prompts of the workload."""

    prompts: Count = 8
    max_new_tokens: Count = 64


class TreePage(Section):
    """What `results/trees.html` shows: how `configs` decode the first `prompts` prompts."""

    configs: list[Name] = []
    prompts: Count = 4
    max_new_tokens: Count = 48


class Models(Section):
    """A target and a draft model: two sources, or the recipe that trains both."""

    target: ModelSource | None = None
    draft: ModelSource | None = None
    recipe: Recipe | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    runtime: RuntimeMode = "auto"

    @model_validator(mode="after")
    def _models_or_recipe(self) -> Self:
        sources = [self.target, self.draft]
        if (None not in sources) == (self.recipe is not None) or len({*map(type, sources)}) > 1:
            raise ValueError("give either both target and draft, or a recipe that trains them")
        return self


class PairSpec(Models):
    """The models of a pair, and what changes when that pair is the one in use."""

    note: Text | None = None
    measure: dict[str, Any] = {}
    strategies: dict[Name, dict[str, Any]] = {}


class TextSource(Section):
    """A text, and how many prompts of what length are chosen from it; see `dynatree.workloads`.

    Attributes:
        file: of this machine: plain text, or records (`.jsonl`, `.parquet`).
        dataset: id on the Hugging Face hub; `name`, `split` and `revision` say which part of it.
        corpus: text that comes with every CPython.
        field: of a record, where its text is; `turns.0` is the first entry of the list `turns`.
        where: fields of a record, and the value or values that they must have for it to count.
        count: prompts chosen, by the seed of the measurement.
        prompt_tokens: exact length of each prompt; without it, a record or a line is a prompt.
    """

    file: Text | None = None
    dataset: Text | None = None
    name: Text | None = None
    split: Text | None = None
    revision: Text | None = None
    corpus: Literal["python_reference"] | None = None
    field: Text = "text"
    where: dict[Text, OneOrMore] = {}
    count: Count | None = None
    prompt_tokens: Count | None = None

    @property
    def has_records(self) -> bool:
        """Whether the text lies in fields of records."""
        return self.dataset is not None or Path(self.file or "").suffix in RECORD_FILES

    @model_validator(mode="after")
    def _options_fit_the_source(self) -> Self:
        options = ("name", "split", "revision") if self.dataset is None else ()
        for option in (*options, *(() if self.has_records else ("field", "where"))):
            if option in self.model_fields_set:
                belongs = "a dataset" if option in options else "a dataset or a .jsonl or .parquet"
                raise ValueError(f"{option} belongs to {belongs}; remove it")
        if self.dataset is not None and self.split is None:
            raise ValueError("a dataset needs its split, such as split: test; add it")
        return self

    @model_serializer(mode="wrap")
    def _as_written(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Only what was given: a workload of inline prompts is nothing but these.
        return {key: value for key, value in serialise(self).items() if key in self.used}

    @property
    def used(self) -> set[str]:
        """The fields that say something about this source."""
        records = {"field", "where"} if self.has_records else set()
        return records | {
            key
            for key in type(self).model_fields
            if key not in ("field", "where") and getattr(self, key) is not None
        }


class Selection(TextSource):
    """Prompts that are chosen where the tokenizer is, as far as a specification can say it.

    Attributes:
        count: prompts chosen; of two selections that differ in it, one begins as the other.
        seed: which are chosen.
        sha256: digest (hex) of the text where it lies on this machine; None for a dataset.
    """

    count: Count
    seed: int
    sha256: str | None = None

    def __len__(self) -> int:
        return self.count


class Workload(TextSource):
    """The prompts that every configuration decodes: written out, or chosen from a text."""

    prompts: Annotated[list[Text], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        sources = (self.prompts, self.file, self.dataset, self.corpus)
        if sum(source is not None for source in sources) != 1:
            raise ValueError("give exactly one of prompts (a list), file, dataset and corpus")
        if self.prompts is None and self.count is None:
            raise ValueError("count is missing: add how many prompts are chosen from the text")
        for option in ("count", "prompt_tokens"):
            if self.prompts is not None and getattr(self, option) is not None:
                raise ValueError(
                    f"{option} does not go with prompts, which are decoded as they are; remove it, "
                    "or use a workload with a file, a dataset or a corpus"
                )
        return self

    def chosen(self, key: str, seed: int) -> list[str] | Selection:
        """What a specification says about the prompts; reads a local file for its digest.

        Args:
            key: of this workload in the configuration, for messages.

        Raises:
            ConfigError: the file cannot be read.
        """
        if self.prompts is not None:
            return self.prompts
        sha256 = None
        if self.corpus is not None:
            sha256 = digest(language_reference())
        elif self.file is not None:
            try:
                sha256 = file_digest(Path(self.file))
            except OSError as error:
                raise ConfigError(
                    f"{key}.file: {self.file!r} cannot be read ({error.strerror}); correct the "
                    "path, which counts from the project's folder, or put the file there"
                ) from None
        return Selection.model_validate({**self.model_dump(), "seed": seed, "sha256": sha256})


class Experiment(Section):
    """Configurations, each measured with every combination of values of a grid.

    Attributes:
        configs: configurations, or sweeps, of which every candidate is measured.
        grid: fields of the strategies, of `measure` and of the workload (`count`,
            `prompt_tokens`). A list of values is an axis; a single value holds for all points.
            Several grids are measured one after the other, such as one parameter at a time.
    """

    configs: Annotated[list[Name], Field(min_length=1)]
    grid: Annotated[list[dict[Name, OneOrMore]], Field(min_length=1)] = [{}]

    @model_validator(mode="before")
    @classmethod
    def _one_grid_is_a_mapping(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and isinstance(data.get("grid"), Mapping):
            return {**data, "grid": [data["grid"]]}
        return data

    def combinations(self) -> list[tuple[dict[str, Scalar], dict[str, Scalar]]]:
        """For each point of the grids: its values on the axes, and the values of all points."""
        found = []
        for grid in self.grid:
            single = {key: value for key, value in grid.items() if not isinstance(value, list)}
            axes = {key: value for key, value in grid.items() if isinstance(value, list)}
            found += [
                (dict(zip(axes, values, strict=True)), single) for values in product(*axes.values())
            ]
        return found


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


class Spec(Section):
    """Everything that a job depends on, and nothing else: when it changes, the outcome is stale."""

    pair: Name
    models: Models
    prompts: Annotated[list[Text], Field(min_length=1)] | Selection

    def first(self, count: int) -> Self:
        """The specification with the first `count` prompts at most."""
        prompts = self.prompts
        fewer = (
            prompts.model_copy(update={"count": min(count, prompts.count)})
            if isinstance(prompts, Selection)
            else prompts[:count]
        )
        return self.model_copy(update={"prompts": fewer})

    def canonical(self) -> str:
        """One JSON text for equal specs."""
        return canonical(self.model_dump(mode="json"))

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the canonical JSON."""
        return digest(self.model_dump(mode="json"))


class RunSpec(Spec):
    """What the measurement of one configuration depends on."""

    name: Name
    strategy: Strategy
    measure: Measure


class CertificateSpec(Spec):
    """What the losslessness certificate of some configurations depends on."""

    strategies: Annotated[dict[Name, Strategy], Field(min_length=1)]
    max_new_tokens: Count

    def only(self, names: Iterable[str]) -> Self:
        """The same of those configurations alone: a certificate may hold other sections' too."""
        kept = {name: self.strategies[name] for name in names if name in self.strategies}
        return self.model_copy(update={"strategies": kept})


class TreesSpec(Spec):
    """What the recorded draft trees of one configuration depend on."""

    name: Name
    strategy: Strategy
    max_new_tokens: Count


class Config(Section):
    """A whole, valid `config.yaml`."""

    pair: Name
    pairs: Annotated[dict[Name, PairSpec], Field(min_length=1)]
    workloads: Annotated[dict[Name, Workload], Field(min_length=1)]
    measure: Measure
    certificate: Certification = Certification()
    trees: TreePage = TreePage()
    configs: Annotated[dict[Name, RunConfig], Field(min_length=1)]
    sweeps: dict[Name, Sweep] = {}
    tables: Annotated[dict[Name, Annotated[list[Name], Field(min_length=1)]], Field(min_length=1)]
    # Each is one file of the paper with these tables; the first is what `snakemake` makes.
    sections: dict[Name, Annotated[list[Name], Field(min_length=1)]] = {}
    experiments: dict[ExperimentName, Experiment] = {}
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
            problems.append(f"{path}: {_unknown(name, list(among), kind)}")
            return False

        known("pair", self.pair, self.pairs, "pair")
        known("measure.workload", self.measure.workload, self.workloads, "workload")
        for index, name in enumerate(self.trees.configs):
            known(f"trees.configs.{index}", name, self.configs, "configuration")
        for name in _repeated(self.trees.configs):
            problems.append(f"trees.configs: {name!r} is listed twice; remove one")
        for name, sweep in self.sweeps.items():
            if name in self.configs:
                problems.append(f"sweeps.{name}: is a configuration too; rename one")
            for index, candidate in enumerate(sweep.best_of):
                known(f"sweeps.{name}.best_of.{index}", candidate, self.configs, "configuration")
            for candidate in _repeated(sweep.best_of):
                problems.append(f"sweeps.{name}.best_of: {candidate!r} is listed twice; remove one")
        for table, rows in self.tables.items():
            for index, row in enumerate(rows):
                known(
                    f"tables.{table}.{index}",
                    row,
                    {**self.configs, **self.sweeps},
                    "configuration or sweep",
                )
            for row in _repeated(rows):
                problems.append(f"tables.{table}: {row!r} is listed twice; remove one")
            # One configuration in two rows would be compared with itself.
            shown = [name for row in dict.fromkeys(rows) for name in set(self.candidates(row))]
            for name in _repeated(shown):
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
                problems += _problems(error, f"pairs.{name}.measure")
            for config, overrides in spec.strategies.items():
                path = f"pairs.{name}.strategies.{config}"
                if known(path, config, self.configs, "configuration"):
                    try:
                        _override(self.configs[config].run, overrides)
                    except ValidationError as error:
                        problems += _problems(error, path)
        for name, experiment in self.experiments.items():
            path = f"experiments.{name}.configs"
            for row in _repeated(experiment.configs):
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
            for row, (values, single) in product(experiment.configs, experiment.combinations()):
                for config in self.candidates(row):
                    parts = [config] if len(experiment.configs) > 1 or row in self.sweeps else []
                    parts += [_part(key, value) for key, value in values.items()]
                    label = "-".join([name, *parts])
                    try:
                        measured = self._with(config, {**single, **values})
                    except ValidationError as error:
                        problems += _problems(error, f"experiments.{name}.grid")
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
            unknown = _unknown(settings.workload, list(self.workloads), "workload")
            raise ValueError(f"workload: {unknown}")
        workload = self.workloads[settings.workload]
        return Measured(
            strategy=_override(self.strategy(config), strategy),
            measure=settings,
            workload=Workload.model_validate({**workload.model_dump(), **texts}),
        )

    def _measure_for(self, spec: PairSpec) -> Measure:
        return Measure.model_validate({**self.measure.model_dump(), **spec.measure})

    @property
    def pair_spec(self) -> PairSpec:
        """The pair in use."""
        return self.pairs[self.pair]

    @property
    def measurement(self) -> Measure:
        """The measuring settings, with the pair's own values applied."""
        return self._measure_for(self.pair_spec)

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
        reduced = self.model_copy(update={**changes, "experiments": kept})
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
            unknown = _unknown(experiment, list(self.experiments), "experiment")
            raise ConfigError(f"experiments: {unknown}")
        return self._points[experiment]

    def overrides(self, name: str) -> dict[str, Any]:
        """The strategy values that the pair in use changes for configuration `name`."""
        return self.pair_spec.strategies.get(name, {})

    def canonical(self) -> str:
        """One JSON text for equal configurations; `parse_config` reads it back.

        Only the order of tables and grids counts, because they are shown in it.
        """
        data = json.loads(canonical(self.model_dump(mode="json")))
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
            raise ConfigError(f"configs: {_unknown(name, list(self.configs), 'configuration')}")
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


def canonical(data: Any) -> str:
    """One JSON text for equal data, whatever the order of its keys."""
    return json.dumps(data, sort_keys=True, ensure_ascii=True, separators=(",", ":"))


def digest(data: Any) -> str:
    """SHA-256 (hex) of the canonical JSON of `data`."""
    return hashlib.sha256(canonical(data).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of the file's content; read again only when its time or size has changed."""
    facts = path.stat()
    return _file_digest(path, facts.st_mtime_ns, facts.st_size)


@cache
def _file_digest(path: Path, modified: int, size: int) -> str:
    return digest_of(path)


def parse_spec(text: str) -> RunSpec:
    """Reads back the canonical JSON of a spec.

    Raises:
        ConfigError: with the path of each wrong key, its value and the fix.
    """
    return _parse_json(RunSpec, text, "run specification")


def parse_certificate_spec(text: str) -> CertificateSpec:
    """Reads back the canonical JSON of a certificate's spec; raises as `parse_spec`."""
    return _parse_json(CertificateSpec, text, "certificate specification")


def parse_trees_spec(text: str) -> TreesSpec:
    """Reads back the canonical JSON of a spec of recorded trees; raises as `parse_spec`."""
    return _parse_json(TreesSpec, text, "specification of recorded trees")


def parse_recipe(text: str) -> Recipe:
    """Reads back the canonical JSON of a recipe; raises as `parse_spec`."""
    return _parse_json(Recipe, text, "recipe")


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
    try:
        return Config.model_validate(dict(data))
    except ValidationError as error:
        problems = _problems(error)
    raise ConfigError(f"{origin} is not valid:\n" + "\n".join(f"  {line}" for line in problems))


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
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
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


_Section = TypeVar("_Section", bound=Section)
_STRATEGY: TypeAdapter[StrategyBase] = TypeAdapter(Strategy)
_TAGS = [kind.model_fields["strategy"].default for kind in get_args(get_args(Strategy)[0])]


def _parse_json(kind: type[_Section], text: str, what: str) -> _Section:
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        problems = _problems(error)
    raise ConfigError(f"the {what} is not valid:\n" + "\n".join(problems))


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


def _repeated(names: list[str]) -> list[str]:
    return sorted({name for name in names if names.count(name) > 1})


def _unknown(name: str, among: list[str], kind: str) -> str:
    close = difflib.get_close_matches(name, among, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(among) or 'none'}"
    return f"unknown {kind} {name!r}; {hint}"


def _problems(error: ValidationError, prefix: str = "") -> list[str]:
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
        parts = [str(part) for part in loc]
        path = ".".join([prefix, *parts] if prefix else parts)
        value = item.get("input")
        shown = "" if isinstance(value, Mapping) else f", got {_short(value)}"
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
                lines.append(f"{path}.strategy: {_unknown(str(given), _TAGS, 'strategy')}")
            case "value_error" if not path:
                lines += message.splitlines()
            case "value_error":
                lines.append(f"{path}: {message}")
            case "string_pattern_mismatch" if parts and parts[-1] == "[key]":
                lines.append(f"{path}: use letters, digits, '-' and '_' only{shown}")
            case _:
                lines.append(f"{path}: {message[:1].lower()}{message[1:]}{shown}")
    return lines


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
