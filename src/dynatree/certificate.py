"""The schema of `results/certificate.json`: what was compared with `generate`, and the verdict.

In float32 every output must equal the oracle's. In 16 bits two forwards of one token differ when
their batches have different shapes, and a near tie of two logits may then fall either way. How much
a shape changes is therefore measured without the engine, by a control: the target alone, decoding
through batches of the sizes that the strategy's verifications had. The criterion:

    An output passes when each of its tokens is the one that the oracle goes on with after the same
    tokens, or falls short of the oracle's best logit by no more than `SAFETY` times the control's
    noise, the largest change of the best token's lead over a rival that the shape alone caused.

A token b replaces the oracle's a only where the lead of a over b changed by all of that lead, so
one time the noise would do if the control had met the worst case; `SAFETY` allows that it did not.
An output that ends too early, or goes on past its end, never passes.

It imports no models, so that a table can be made from a certificate without them.
"""

from pathlib import Path
from typing import Final, Literal, Self

from pydantic import (
    AwareDatetime,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from dynatree.errors import LosslessError
from dynatree.facts import Fact, read_facts, write_facts
from dynatree.specs import CertificateSpec

SAFETY: Final = 2.0
"""How many times the control's noise a token may fall short of the oracle's best."""

Verdict = Literal["equal", "noise", "failed"]
"""All outputs equal the oracle's; some differ as rounding explains; some differ otherwise."""

Lossless = Literal["equal", "noise"]
"""The verdicts of a certificate that passed."""


class Departure(Fact):
    """A token where an output leaves what the oracle goes on with after the same tokens.

    Attributes:
        index: of the token, from the first new one.
        gap: difference of the oracle's two largest logits there; None beyond its end.
        shortfall: by how much the oracle's logit of the token is below its largest; None when no
            token stands against a token: the output ends too early, or goes on past its end.
    """

    index: NonNegativeInt
    gap: NonNegativeFloat | None
    shortfall: NonNegativeFloat | None


class Control(Fact):
    """The target alone, decoding a prompt through batches as large as a strategy's verifications.

    Attributes:
        rows: of the largest batch.
        noise: largest change, against the oracle's forwards of the same tokens, of the lead of the
            best token over one of its nearest rivals (logits); at least the rounding of the best
            logit itself.
        departure: the first token that the target chooses differently because of the batches.
    """

    prompt: NonNegativeInt
    rows: PositiveInt
    noise: NonNegativeFloat
    departure: Departure | None


class OutputCheck(Fact):
    """One output, compared with the oracle's; a second departure lies in what follows the first.

    Attributes:
        prompt: index into the prompts of the specification.
        end_tokens: those that end the sequence.
        tokens: new tokens generated.
    """

    prompt: NonNegativeInt
    end_tokens: list[NonNegativeInt]
    tokens: PositiveInt
    departures: list[Departure]


class GreedyCheck(Fact):
    """Greedy decoding, compared with greedy `generate`.

    Attributes:
        controls: one for each prompt; none in float32.
        limit: the largest shortfall that noise explains; None in float32, where there is none.
    """

    outputs: list[OutputCheck]
    controls: list[Control]
    limit: NonNegativeFloat | None

    @model_validator(mode="after")
    def _limit_follows_from_the_controls(self) -> Self:
        if self.limit != noise_limit(self.controls):
            raise ValueError(f"limit must be {SAFETY:g} times the largest noise of the controls")
        return self

    def reasons(self) -> list[str]:
        """Why this check fails, one line for each output that cannot be explained."""
        lines = []
        for output in self.outputs:
            wrong = next((one for one in output.departures if not explained(one, self.limit)), None)
            if wrong is None:
                continue
            where = f"prompt {output.prompt} (ending at {output.end_tokens}), token {wrong.index}: "
            if wrong.shortfall is None:
                lines.append(f"{where}one of the two outputs ends here and the other goes on")
            elif self.limit is None:
                lines.append(
                    f"{where}differs from generate, {wrong.shortfall:.3g} below its best logit"
                )
            else:
                lines.append(
                    f"{where}{wrong.shortfall:.3g} below the best logit of generate, more than the "
                    f"{self.limit:.3g} that the noise of the batches explains"
                )
        return lines

    def verdict(self) -> Verdict:
        """What the departures come to."""
        if self.reasons():
            return "failed"
        return "noise" if any(output.departures for output in self.outputs) else "equal"


class SampledDeparture(Fact):
    """Where a sampled output first differs from the oracle's with the same noise."""

    prompt: NonNegativeInt
    index: NonNegativeInt


class SampledCheck(Fact):
    """Coupled sampling, compared with `generate` that chooses each token with the same noise.

    Attributes:
        outputs: compared; the seed is the index of the prompt.
    """

    temperature: PositiveFloat
    top_p: PositiveFloat
    outputs: PositiveInt
    departures: list[SampledDeparture]

    def reasons(self) -> list[str]:
        """Why this check fails, one line for each output that differs."""
        return [
            f"prompt {one.prompt}, sampled with seed {one.prompt}, token {one.index}: differs from "
            "generate with the same noise"
            for one in self.departures
        ]


class ConfigurationCheck(Fact):
    """All checks of one configuration; `reasons` says why it failed, and is empty otherwise.

    Sampling is compared in float32 alone: in 16 bits a sampled text soon meets a near tie, and says
    no more than greedy text does.
    """

    name: str
    greedy: GreedyCheck
    sampled: SampledCheck | None
    verdict: Verdict
    reasons: list[str]

    @classmethod
    def of(cls, name: str, greedy: GreedyCheck, sampled: SampledCheck | None) -> Self:
        """The verdict on what was found."""
        verdict, reasons = cls._judged(greedy, sampled)
        return cls(name=name, greedy=greedy, sampled=sampled, verdict=verdict, reasons=reasons)

    @staticmethod
    def _judged(greedy: GreedyCheck, sampled: SampledCheck | None) -> tuple[Verdict, list[str]]:
        reasons = greedy.reasons() + (sampled.reasons() if sampled is not None else [])
        return "failed" if reasons else greedy.verdict(), reasons

    @model_validator(mode="after")
    def _verdict_follows(self) -> Self:
        if (self.verdict, self.reasons) != self._judged(self.greedy, self.sampled):
            raise ValueError("verdict and reasons do not follow from the checks: it was edited")
        return self


class Certificate(Fact):
    """Whether every configuration of a study is lossless, and what that rests on."""

    schema_version: Literal[1] = 1
    passed: bool
    spec: CertificateSpec
    source_digest: str
    pair_digest: str
    configurations: list[ConfigurationCheck] = Field(min_length=1)
    provenance: dict[str, object]
    started: AwareDatetime
    finished: AwareDatetime

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        if sorted(check.name for check in self.configurations) != sorted(self.spec.strategies):
            raise ValueError("expected one entry for each configuration of the specification")
        prompts, exact = set(range(len(self.spec.prompts))), self.spec.models.dtype == "float32"
        for check in self.configurations:
            if {output.prompt for output in check.greedy.outputs} != prompts:
                raise ValueError(
                    f"{check.name}: outputs of all {len(prompts)} prompts must be given"
                )
            if (check.sampled is None) == exact:
                raise ValueError(
                    f"{check.name}: sampling must be compared in float32, and only there"
                )
            controlled = [control.prompt for control in check.greedy.controls]
            if controlled != ([] if exact else sorted(prompts)):
                raise ValueError(
                    f"{check.name}: controls must be given for every prompt in 16 bits, and for "
                    "none in float32"
                )
        if self.passed != all(check.verdict != "failed" for check in self.configurations):
            raise ValueError("passed does not follow from the configurations: it was edited")
        return self

    def require(self) -> None:
        """Raises LosslessError, which says what failed and why, unless the certificate passed."""
        reasons = [
            f"  {check.name}: {reason}" for check in self.configurations for reason in check.reasons
        ]
        if reasons:
            raise LosslessError("not lossless:\n" + "\n".join(reasons))


def noise_limit(controls: list[Control]) -> float | None:
    """The largest shortfall that the noise of `controls` explains; None without controls."""
    return SAFETY * max(control.noise for control in controls) if controls else None


def explained(departure: Departure, limit: float | None) -> bool:
    """Whether rounding explains a departure; without a limit, nothing does."""
    if limit is None or departure.shortfall is None:
        return False
    return departure.shortfall <= limit


def write_certificate(path: Path, certificate: Certificate) -> None:
    """Writes `certificate` to `path`, all or nothing."""
    write_facts(path, certificate)


def read_certificate(path: Path) -> Certificate:
    """Reads and validates a certificate; raises as `read_facts`."""
    return read_facts(path, Certificate, "certificate")
