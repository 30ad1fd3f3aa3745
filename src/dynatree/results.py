"""The result file of one measuring job: facts only, validated when written and when read."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    AwareDatetime,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from dynatree.facts import Fact, read_facts, write_facts
from dynatree.schema import digest
from dynatree.specs import RunSpec

SCHEMA_VERSION: Final = 3

NGRAM: Final = 8
"""Tokens that must recur together to count as a repetition."""

Seconds = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Method = Literal["autoregressive", "strategy"]


class RoundRecord(Fact):
    """One verification: draft nodes verified, depth of the deepest that there was room to commit,
    draft tokens committed.

    `ngram_nodes` are the nodes that an n-gram gave and the draft model did not, `ngram_accepted`
    the tokens committed of these. Where there are none, the file does not mention them.
    """

    nodes: NonNegativeInt
    depth: NonNegativeInt
    accepted: NonNegativeInt
    ngram_nodes: NonNegativeInt = 0
    ngram_accepted: NonNegativeInt = 0

    @model_validator(mode="after")
    def _accepts_what_was_offered(self) -> Self:
        if not self.accepted <= self.depth <= self.nodes:
            raise ValueError(
                f"accepted {self.accepted} <= depth {self.depth} <= nodes {self.nodes} must hold"
            )
        if not (
            self.ngram_nodes <= self.nodes
            and self.ngram_accepted <= min(self.accepted, self.ngram_nodes)
        ):
            raise ValueError(
                f"ngram_accepted {self.ngram_accepted} <= ngram_nodes {self.ngram_nodes} <= nodes "
                f"{self.nodes} and ngram_accepted <= accepted {self.accepted} must hold"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_absent(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # A record of a strategy without n-grams has the digest that it had before there were any.
        return {
            key: value
            for key, value in serialise(self).items()
            if value or not key.startswith("ngram_")
        }


class RunRecord(Fact):
    """One timed generation.

    Attributes:
        prompt: index into the spec's prompts.
        run: timed pass over the workload, from 0; warm-up passes are not recorded.
        first: this method went first in its pair of generations.
        tokens: new tokens really generated.
        seconds: wall time of the whole generation, prefill included.
        first_token_seconds: prefill of target and draft, until the first token (TTFT).
        phases: seconds by phase: prefill, draft, verify, other.
    """

    prompt: NonNegativeInt
    run: NonNegativeInt
    method: Method
    first: bool
    tokens: PositiveInt
    seconds: Seconds
    first_token_seconds: Seconds
    phases: dict[str, NonNegativeFloat]
    target_forwards: PositiveInt
    draft_forwards: NonNegativeInt
    rounds: list[RoundRecord]

    @model_validator(mode="after")
    def _counts_agree(self) -> Self:
        if self.target_forwards != len(self.rounds) + 1:
            raise ValueError(
                f"{len(self.rounds)} rounds need {len(self.rounds) + 1} target forwards, "
                f"got {self.target_forwards}"
            )
        # The prefill gives one token, each round its accepted tokens and a bonus token; the bonus
        # token of the last round is missing when the end-of-sequence token was drafted.
        most = 1 + sum(entry.accepted + 1 for entry in self.rounds)
        if self.tokens not in (most, most - 1):
            raise ValueError(f"the rounds account for {most} tokens, got {self.tokens}")
        if any(committed == 0 for _, committed in self.spans):
            raise ValueError("the last round committed nothing; every round commits a token")
        return self

    @property
    def spans(self) -> list[tuple[int, int]]:
        """For each round: new tokens before it, which is where in the output it begins, and
        tokens that it commits, at least 1.
        """
        spans, position = [], 1
        for entry in self.rounds:
            committed = min(entry.accepted + 1, self.tokens - position)
            spans.append((position, committed))
            position += committed
        return spans


class Divergence(Fact):
    """Where an output first differs from autoregressive decoding (16-bit only).

    `gap` is the difference of the target's two largest logits there: small means a near tie that
    rounding decided, large means a bug.
    """

    index: NonNegativeInt
    gap: NonNegativeFloat


class Output(Fact):
    """What was generated for one prompt, compared with autoregressive decoding.

    `repeated_8grams` is what the function of that name says of `tokens`.
    """

    prompt: NonNegativeInt
    prompt_tokens: PositiveInt
    tokens: list[NonNegativeInt]
    repeated_8grams: Share
    equal: bool
    divergence: Divergence | None

    @model_validator(mode="after")
    def _divergence_if_unequal(self) -> Self:
        if self.equal != (self.divergence is None):
            raise ValueError("divergence must be given exactly when equal is false")
        return self

    @model_validator(mode="after")
    def _repetition_is_of_the_tokens(self) -> Self:
        if self.repeated_8grams != (share := repeated_8grams(self.tokens)):
            raise ValueError(
                f"repeated_8grams must be {share}, as its tokens say, got {self.repeated_8grams}: "
                "the file was edited"
            )
        return self


class DepthCount(Fact):
    """Rounds that offered a node at `depth`, and rounds that accepted one there."""

    depth: PositiveInt
    offered: NonNegativeInt
    accepted: NonNegativeInt

    @model_validator(mode="after")
    def _accepts_what_was_offered(self) -> Self:
        if self.accepted > self.offered:
            raise ValueError(
                f"depth {self.depth}: accepted {self.accepted} of {self.offered} offered is above "
                "100 %"
            )
        return self


class Totals(Fact):
    """Sums over the timed runs of the strategy.

    Attributes:
        tokens: new tokens, `rounds` of which are bonus tokens of a verification.
        tokens_per_round: tokens committed by rounds (the prefill's token left out) per round.
        ngram_nodes: of `drafted_nodes`, those that an n-gram gave and the draft model did not.
        ngram_accepted: tokens committed of these.
    """

    tokens: PositiveInt
    rounds: NonNegativeInt
    drafted_nodes: NonNegativeInt
    tokens_per_round: NonNegativeFloat
    acceptance_by_depth: list[DepthCount]
    seconds_by_phase: dict[str, NonNegativeFloat]
    ngram_nodes: NonNegativeInt = 0
    ngram_accepted: NonNegativeInt = 0


class RuntimeFacts(Fact):
    """How a method's forwards ran, and what was done for it before anything was timed.

    Attributes:
        seconds: spent on compiling and capturing.
        graphs: CUDA graphs captured.
        graph_bytes: device memory that they hold.
    """

    mode: Literal["eager", "compiled", "cudagraph"]
    seconds: NonNegativeFloat
    graphs: NonNegativeInt
    graph_bytes: NonNegativeInt


class RunResult(Fact):
    """One measured configuration."""

    schema_version: Literal[3] = SCHEMA_VERSION
    spec: RunSpec
    spec_digest: str
    source_digest: str
    prompts_digest: str
    pair_digest: str
    runtimes: dict[Method, RuntimeFacts]
    records: list[RunRecord]
    records_digest: str
    outputs: list[Output]
    totals: Totals
    peak_memory_bytes: PositiveInt
    provenance: dict[str, Any]
    started: AwareDatetime
    finished: AwareDatetime

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        if self.spec_digest != self.spec.digest:
            raise ValueError("spec_digest is not the digest of spec: the file was edited")
        if self.records_digest != records_digest(self.records):
            raise ValueError("records_digest is not the digest of records: the file was edited")
        prompts, runs = range(len(self.spec.prompts)), range(self.spec.measure.runs)
        expected = {
            (prompt, run, method)
            for prompt in prompts
            for run in runs
            for method in ("autoregressive", "strategy")
        }
        seen = [(record.prompt, record.run, record.method) for record in self.records]
        if len(seen) != len(set(seen)) or set(seen) != expected:
            raise ValueError(
                f"expected one record for each of {len(expected)} combinations of prompt, run and "
                f"method, got {len(seen)} records for {len(set(seen))}"
            )
        if [output.prompt for output in self.outputs] != list(prompts):
            raise ValueError(f"expected one output for each of {len(prompts)} prompts, in order")
        if self.totals != totals(self.of("strategy")):
            raise ValueError("totals are not the sums of the records: the file was edited")
        return self

    def of(self, method: Method) -> list[RunRecord]:
        """The records of one method."""
        return [record for record in self.records if record.method == method]


def totals(records: list[RunRecord]) -> Totals:
    """Sums up the records of one method."""
    rounds = [entry for record in records for entry in record.rounds]
    phases: dict[str, float] = {}
    for record in records:
        for phase, seconds in record.phases.items():
            phases[phase] = phases.get(phase, 0.0) + seconds
    deepest = max((entry.depth for entry in rounds), default=0)
    tokens = sum(record.tokens for record in records)
    return Totals(
        tokens=tokens,
        rounds=len(rounds),
        drafted_nodes=sum(entry.nodes for entry in rounds),
        tokens_per_round=(tokens - len(records)) / len(rounds) if rounds else 0.0,
        acceptance_by_depth=[
            DepthCount(
                depth=depth,
                offered=sum(entry.depth >= depth for entry in rounds),
                accepted=sum(entry.accepted >= depth for entry in rounds),
            )
            for depth in range(1, deepest + 1)
        ],
        seconds_by_phase=phases,
        ngram_nodes=sum(entry.ngram_nodes for entry in rounds),
        ngram_accepted=sum(entry.ngram_accepted for entry in rounds),
    )


def repeated_8grams(tokens: Sequence[int]) -> float:
    """Share of the 8-grams of `tokens` that occurred in it before.

    T tokens hold T - 7 windows of 8 successive tokens, overlapping ones included. Those equal to
    a window that begins earlier are counted and divided by T - 7. Fewer than 8 tokens hold no
    window: 0.0. Text that loops with a period of p tokens repeats all windows but the first p.
    """
    windows = [tuple(tokens[at : at + NGRAM]) for at in range(len(tokens) - NGRAM + 1)]
    return (len(windows) - len(set(windows))) / len(windows) if windows else 0.0


def records_digest(records: list[RunRecord]) -> str:
    """SHA-256 (hex) of the records, in their order: notices a time that was changed by hand."""
    return digest([record.model_dump(mode="json") for record in records])


def write_result(path: Path, result: RunResult) -> None:
    """Writes `result` to `path`, all or nothing."""
    write_facts(path, result)


def read_result(path: Path) -> RunResult:
    """Reads and validates a result file; raises as `read_facts`."""
    return read_facts(path, RunResult, "result file")
