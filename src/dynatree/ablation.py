"""The schema of `results/ablation.json`: what the table and the figure are made from.

It imports neither the statistics nor the models, so that a changed table module reruns no
measurement and a changed statistic is seen by all that reads it.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from dynatree.certificate import Lossless
from dynatree.facts import Fact, read_facts, write_facts

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Verdict = Literal["gain", "loss", "noise", "unknown"]


class Interval(Fact):
    """A 95 % confidence interval."""

    low: float
    high: float

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}")
        return self


class Estimate(Fact):
    """A value and its interval; there is none when a single prompt was measured."""

    value: float
    interval: Interval | None

    def against(self, neutral: float) -> Verdict:
        """Whether the interval lies above `neutral`, below it, or around it."""
        if self.interval is None:
            return "unknown"
        if self.interval.low > neutral:
            return "gain"
        return "loss" if self.interval.high < neutral else "noise"


class Override(Fact):
    """A strategy value that the pair in use changes."""

    key: str
    value: Any
    instead_of: Any


class DepthAcceptance(Fact):
    """Rounds that offered a draft node at `depth`, and rounds that accepted one there."""

    depth: PositiveInt
    offered: PositiveInt
    accepted: NonNegativeInt


class ConfigurationFacts(Fact):
    """One measured configuration.

    Attributes:
        description: the strategy in words, the pair's overrides applied.
        throughput: new tokens per second of the strategy.
        autoregressive_throughput: the same of the target alone, in the same job.
        speedup: ratio of the two, paired by prompt and run.
        tokens_per_generation: mean number of new tokens.
        tokens_per_round: tokens committed per verification, its bonus token included.
        nodes_per_round: draft nodes verified per round.
        acceptance: draft tokens accepted per level offered; None when nothing was drafted.
        phase_share: share of the time by phase.
        first_token_seconds: median time to the first token.
        unequal_prompts: outputs that differ from autoregressive decoding.
        largest_gap: over these, the largest difference of the target's two largest logits at
            the first differing token; None when every output is equal.
        lossless: what the certificate found; None when there was none.
    """

    name: str
    strategy: str
    description: str
    overrides: list[Override]
    throughput: Estimate
    autoregressive_throughput: Estimate
    speedup: Estimate
    tokens_per_generation: PositiveFloat
    tokens_per_round: NonNegativeFloat
    nodes_per_round: NonNegativeFloat
    acceptance: Share | None
    acceptance_by_depth: list[DepthAcceptance]
    phase_share: dict[str, Share]
    first_token_seconds: PositiveFloat
    peak_memory_bytes: PositiveInt
    unequal_prompts: NonNegativeInt
    largest_gap: NonNegativeFloat | None
    lossless: Lossless | None = None
    threads: PositiveInt
    commit: str | None
    dirty: bool | None


class Row(Fact):
    """One row of a table; the changes are relative (0.1 is 10 % faster), None in the first row."""

    configuration: str
    label: str
    versus_previous: Estimate | None
    versus_first: Estimate | None


class Table(Fact):
    """One table of the configuration file; its name becomes a LaTeX label, unescaped."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
    rows: Annotated[list[Row], Field(min_length=1)]

    @model_validator(mode="after")
    def _only_the_first_row_has_no_change(self) -> Self:
        for index, row in enumerate(self.rows):
            for change in (row.versus_previous, row.versus_first):
                if (change is None) != (index == 0):
                    raise ValueError(f"row {index} ({row.configuration}): changes must be given")
        return self


class Setting(Fact):
    """What was measured, on what and how often."""

    pair: str
    note: str | None
    target: str
    draft: str
    dtype: str
    device_type: str
    device: str
    prompts: PositiveInt
    runs: PositiveInt
    max_new_tokens: PositiveInt


class Ablation(Fact):
    """All that the paper says about the ablation."""

    schema_version: Literal[1] = 1
    setting: Setting
    configurations: Annotated[list[ConfigurationFacts], Field(min_length=1)]
    tables: Annotated[list[Table], Field(min_length=1)]
    notes: list[str]

    @model_validator(mode="after")
    def _rows_are_measured(self) -> Self:
        names = {facts.name for facts in self.configurations}
        for table in self.tables:
            for row in table.rows:
                if row.configuration not in names:
                    raise ValueError(f"table {table.name}: {row.configuration!r} is not measured")
        return self

    def facts(self, name: str) -> ConfigurationFacts:
        """The configuration called `name`; every row of every table has one."""
        return next(facts for facts in self.configurations if facts.name == name)


def write_ablation(path: Path, ablation: Ablation) -> None:
    """Writes `ablation` to `path`, all or nothing."""
    write_facts(path, ablation)


def read_ablation(path: Path) -> Ablation:
    """Reads and validates an aggregation; raises as `read_facts`."""
    return read_facts(path, Ablation, "aggregation")
