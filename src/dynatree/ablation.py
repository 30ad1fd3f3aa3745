"""The schema of `results/ablation.json`: what the table and the figure are made from.

It imports neither the statistics nor the models, so that a changed table module reruns no
measurement and a changed statistic is seen by all that reads it.
"""

import operator
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

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

BACKWARD: Final = "backward"
"""The table of this name takes components away from its first row; every other adds them."""


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

    @model_validator(mode="after")
    def _accepts_what_was_offered(self) -> Self:
        if self.accepted > self.offered:
            raise ValueError(
                f"depth {self.depth}: accepted {self.accepted} of {self.offered} offered is above "
                "100 %"
            )
        return self


class PositionRounds(Fact):
    """Rounds that begin after `start` to `stop` - 1 new tokens, and tokens that they commit.

    A round that crosses into the next range counts whole where it begins; `stop` is None in the
    last range, which has no end.
    """

    start: NonNegativeInt
    stop: PositiveInt | None
    rounds: NonNegativeInt
    tokens: NonNegativeInt

    @model_validator(mode="after")
    def _every_round_commits(self) -> Self:
        if self.tokens < self.rounds:
            raise ValueError(f"{self.rounds} rounds commit {self.rounds} tokens or more")
        return self

    @property
    def tokens_per_round(self) -> float | None:
        """None where no round begins."""
        return self.tokens / self.rounds if self.rounds else None


class Latency(Fact):
    """Seconds that a reader waits, and the same of autoregressive decoding in the job.

    Attributes:
        first_token: median time to the first token, the prefill of target and draft (TTFT).
        first_token_change: relative change against autoregressive decoding, paired by prompt and
            run; positive is slower.
        per_token: median time for each further token (TPOT); None when there was none.
    """

    first_token: Estimate
    autoregressive_first_token: Estimate
    first_token_change: Estimate
    per_token: Estimate | None
    autoregressive_per_token: Estimate | None


class ConfigurationFacts(Fact):
    """One measured configuration.

    Attributes:
        description: the strategy in words, the pair's overrides applied.
        throughput: new tokens per second of the strategy.
        autoregressive_throughput: the same of the target alone, in the same job.
        speedup: ratio of the two, paired by prompt and run.
        tokens_per_generation: mean number of new tokens.
        rounds: verifications of all timed generations.
        tokens_per_round: tokens committed per verification, its bonus token included.
        rounds_by_position: the same by where in the output a round begins, without gaps.
        later_rounds: relative change of the tokens per round from the first of these ranges to
            all later ones, paired by prompt; None when no prompt's output reaches both.
        nodes_per_round: draft nodes verified per round.
        acceptance: draft tokens accepted per draft token on the deepest path offered; None when
            nothing was drafted.
        repeated_8grams_mean: mean over outputs of the share of 8-grams that occurred before in
            the same output; text that loops is easy to draft.
        repeated_8grams_max: the same of the output that repeats itself most.
        phase_share: share of the time by phase.
        peak_memory_bytes: largest memory held while the job ran both methods: the device's on
            CUDA, else the process's.
        unequal_prompts: outputs that differ from autoregressive decoding.
        largest_gap: over these, the largest difference of the target's two largest logits at
            the first differing token; None when every output is equal.
        lossless: what the certificate found; None when there was none.
        device: what it was measured on; None where that is the setting's one device.
    """

    name: str
    strategy: str
    description: str
    overrides: list[Override]
    throughput: Estimate
    autoregressive_throughput: Estimate
    speedup: Estimate
    tokens_per_generation: PositiveFloat
    rounds: NonNegativeInt
    tokens_per_round: NonNegativeFloat
    rounds_by_position: Annotated[list[PositionRounds], Field(min_length=1)]
    later_rounds: Estimate | None
    nodes_per_round: NonNegativeFloat
    acceptance: Share | None
    acceptance_by_depth: list[DepthAcceptance]
    repeated_8grams_mean: Share
    repeated_8grams_max: Share
    phase_share: dict[str, Share]
    latency: Latency
    peak_memory_bytes: PositiveInt
    unequal_prompts: NonNegativeInt
    largest_gap: NonNegativeFloat | None
    lossless: Lossless | None = None
    threads: PositiveInt
    commit: str | None
    dirty: bool | None
    device: str | None = Field(default=None, exclude_if=operator.not_)

    @property
    def accepted_length(self) -> float | None:
        """Draft tokens accepted per round; None where nothing was drafted."""
        accepted = sum(entry.accepted for entry in self.acceptance_by_depth)
        return accepted / self.rounds if self.acceptance_by_depth else None

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        offered = sum(entry.offered for entry in self.acceptance_by_depth)
        accepted = sum(entry.accepted for entry in self.acceptance_by_depth)
        if self.acceptance != (accepted / offered if offered else None):
            raise ValueError(
                f"acceptance {self.acceptance} is not the {accepted} of {offered} draft tokens "
                "that its depths add up to"
            )
        parts = self.rounds_by_position
        if self.rounds != sum(part.rounds for part in parts):
            raise ValueError(f"rounds_by_position must add up to {self.rounds} rounds")
        if [0, *(part.stop for part in parts)] != [*(part.start for part in parts), None]:
            raise ValueError("rounds_by_position must begin at 0 and leave no gap")
        return self


class Sweep(Fact):
    """Configurations of which a row shows only the one with the largest speedup, the winner.

    The winner is chosen by the very runs that it reports, so its speedup is biased upward
    (the winner's curse). Where it is the baseline that others are compared with, that is the
    conservative direction: what is claimed over it is understated.
    """

    name: str
    best_of: Annotated[list[str], Field(min_length=2)]
    winner: str


class Row(Fact):
    """One row of a table; the changes are relative (0.1 is 10 % faster).

    They are None in the first row, and where the other row is missing or of another device. Where
    the row is a `sweep`, its configuration is the winner and its label names it.
    """

    configuration: str
    sweep: str | None
    label: str
    versus_previous: Estimate | None
    versus_first: Estimate | None


class MissingRow(Fact):
    """A row of which nothing is known: `below` rows of its table stand above it, for a `reason`."""

    below: NonNegativeInt
    label: str
    reason: str


class Table(Fact):
    """One table of the configuration file; its name becomes a LaTeX label, unescaped."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
    rows: Annotated[list[Row], Field(min_length=1)]
    missing: list[MissingRow] = Field(default_factory=list, exclude_if=operator.not_)

    def missing_below(self, count: int) -> list[MissingRow]:
        """The missing rows that stand after the first `count` rows and before the next."""
        return [row for row in self.missing if row.below == count]

    @model_validator(mode="after")
    def _missing_rows_have_a_place(self) -> Self:
        for row in self.missing:
            if row.below > len(self.rows):
                raise ValueError(f"{row.label!r} stands below {row.below} of {len(self.rows)} rows")
        return self


class PairSetting(Fact):
    """What was measured, and on what."""

    pair: str
    note: str | None
    target: str
    draft: str
    dtype: str
    device_type: str
    device: str


class Setting(PairSetting):
    """The same, and how often."""

    prompts: PositiveInt
    runs: PositiveInt
    max_new_tokens: PositiveInt


class Ablation(Fact):
    """All that the paper says about the ablation."""

    schema_version: Literal[3] = 3
    setting: Setting
    configurations: Annotated[list[ConfigurationFacts], Field(min_length=1)]
    sweeps: list[Sweep]
    tables: Annotated[list[Table], Field(min_length=1)]
    notes: list[str]

    @model_validator(mode="after")
    def _rows_are_measured(self) -> Self:
        speedups = {facts.name: facts.speedup.value for facts in self.configurations}
        for sweep in self.sweeps:
            for name in sweep.best_of:
                if name not in speedups:
                    raise ValueError(f"sweep {sweep.name}: {name!r} is not measured")
            if sweep.winner != max(sweep.best_of, key=speedups.__getitem__):
                raise ValueError(f"sweep {sweep.name}: {sweep.winner!r} is not its fastest")
        winners = {sweep.name: sweep.winner for sweep in self.sweeps}
        devices = {facts.name: facts.device for facts in self.configurations}
        for table in self.tables:
            for index, row in enumerate(table.rows):
                if row.configuration not in speedups:
                    raise ValueError(f"table {table.name}: {row.configuration!r} is not measured")
                if row.sweep is not None and winners.get(row.sweep) != row.configuration:
                    raise ValueError(
                        f"table {table.name}: {row.configuration!r} is not the winner of "
                        f"{row.sweep!r}"
                    )
                above = table.rows[index - 1] if index else None
                for change, other, gap in (
                    (row.versus_previous, above, index),
                    (row.versus_first, above and table.rows[0], 0),
                ):
                    comparable = (
                        other is not None
                        and not table.missing_below(gap)
                        and devices[other.configuration] == devices[row.configuration]
                    )
                    if comparable != (change is not None):
                        raise ValueError(
                            f"table {table.name}: row {index} ({row.configuration}): changes must "
                            "be given where the other row is measured on the same device, and "
                            "nowhere else"
                        )
        return self

    def facts(self, name: str) -> ConfigurationFacts:
        """The configuration called `name`; every row of every table has one."""
        return next(facts for facts in self.configurations if facts.name == name)

    def candidates(self, sweep: str) -> list[ConfigurationFacts]:
        """The configurations of the sweep of that name, in its order."""
        found = next(entry for entry in self.sweeps if entry.name == sweep)
        return [self.facts(name) for name in found.best_of]

    @property
    def shown(self) -> list[ConfigurationFacts]:
        """The configurations that stand in a table, once each: all but a sweep's losers."""
        rows = [row.configuration for table in self.tables for row in table.rows]
        return [self.facts(name) for name in dict.fromkeys(rows)]


def write_ablation(path: Path, ablation: Ablation) -> None:
    """Writes `ablation` to `path`, all or nothing."""
    write_facts(path, ablation)


def read_ablation(path: Path) -> Ablation:
    """Reads and validates an aggregation; raises as `read_facts`."""
    return read_facts(path, Ablation, "aggregation")
