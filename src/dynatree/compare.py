"""Whether two results differ beyond noise: of two machines, two commits, two versions of torch.

Two run results are compared prompt by prompt. Their ratio is a geometric mean over prompts of
ratios of medians over runs, its interval that of `estimates.crossed_ratio`: over prompts, and over
the timed passes of each job, so that a machine that was slower during one pass is noise too. A
whole job that was slowed down is not seen from inside; the autoregressive decoding that each job
times beside its strategy is the control for that, and the ratio of the two speedups is free of it.

Two aggregations hold no prompts. The interval of a ratio then follows from the two intervals alone,
on a logarithmic scale, by the method of variance estimates recovery (Zou and Donner, 2008,
Statistics in Medicine 27(10)). It takes the two as independent; since the prompts are the same they
are not, and the interval is wider than it need be.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dynatree.ablation import Ablation, ConfigurationFacts, Estimate, Interval, read_ablation
from dynatree.differences import SHOWN, differences, shown
from dynatree.errors import ResultError
from dynatree.estimates import crossed_ratio
from dynatree.results import RunResult, read_result
from dynatree.run_facts import throughputs

NAMES: Final = ("A", "B")

FREE_MODELS: Final = {"target", "draft", "recipe", "device", "runtime"}
FREE_MEASURE: Final = {"workload", "runs", "warmup"}
FREE: Final[dict[str, bool | set[str]]] = {
    "name": True,
    "pair": True,
    "models": FREE_MODELS,
    "measure": FREE_MEASURE,
}
"""Fields of a specification in which comparable runs may differ: names, how a job ran, and where
the models came from, since the digest of the weights says whether they are the same."""


@dataclass(frozen=True)
class Quantity:
    """A measured quantity of both results.

    Attributes:
        values: of A and of B.
        ratio: of B over A; above 1, B is faster.
    """

    name: str
    values: tuple[float, float]
    ratio: Estimate

    @property
    def differs(self) -> bool:
        """Whether the two differ beyond noise."""
        return self.ratio.against(1.0) in ("gain", "loss")

    def verdict(self) -> str:
        """What the interval says, in words."""
        ratio = f"{self.ratio.value:.2f}x"
        if self.ratio.interval is not None:
            ratio += f" [{self.ratio.interval.low:.2f}, {self.ratio.interval.high:.2f}]"
        return {
            "gain": f"B is faster by {ratio}",
            "loss": f"B is slower, {ratio}",
            "noise": f"no difference beyond noise, {ratio}",
            "unknown": f"a single prompt has no interval and no verdict, {ratio}",
        }[self.ratio.against(1.0)]


@dataclass(frozen=True)
class Comparison:
    """What two comparable results have in common, and what not.

    Attributes:
        equal_outputs: prompts whose tokens are equal, and all prompts; None where the files hold no
            tokens.
        differing: provenance and settings that differ, one line each.
        remarks: what the reader must know of the method, or what was left out.
    """

    quantities: list[Quantity]
    equal_outputs: tuple[int, int] | None
    differing: list[str]
    remarks: list[str]

    def lines(self) -> list[str]:
        """The report, a verdict for each quantity last."""
        if self.equal_outputs is None:
            outputs = "aggregations hold no tokens; compare two run results"
        else:
            outputs = "tokens equal for {} of {} prompts".format(*self.equal_outputs)
        found = sum(quantity.differs for quantity in self.quantities)
        total = len(self.quantities)
        summary = f"{found} of {total} quantities differ beyond noise"
        if total >= MANY:
            summary += f"; where nothing differs, about {CHANCE * total:.0f} may by chance"
        return [
            *(f"differs: {line}" for line in self.differing or ["no provenance, no setting"]),
            f"outputs: {outputs}",
            *self.remarks,
            *(
                f"{quantity.name}: A {quantity.values[0]:.4g}, B {quantity.values[1]:.4g}: "
                f"{quantity.verdict()}"
                for quantity in self.quantities
            ),
            summary,
        ]


CHANCE: Final = 0.05
"""How often a 95 % interval misses."""

MANY: Final = 10
"""Quantities of which one may well differ by chance."""


def compare_files(one: Path, other: Path) -> Comparison:
    """Compares two run results or two aggregations.

    Raises:
        ResultError: a file is missing, damaged or of neither kind, the two are of different kinds,
            or they cannot be compared; the message names the fields.
    """
    kinds = [_kind(path) for path in (one, other)]
    if kinds[0] != kinds[1]:
        raise ResultError(f"{one}: {kinds[0]}, {other}: {kinds[1]}; give two files of one kind")
    where = f"{one} (A) and {other} (B)"
    if kinds[0] == "run result":
        return compare_runs(read_result(one), read_result(other), where)
    return compare_ablations(read_ablation(one), read_ablation(other), where)


def compare_runs(one: RunResult, other: RunResult, where: str = "A and B") -> Comparison:
    """Compares two results of one strategy on the same prompts with the same weights.

    Args:
        where: what the two are called in an error.

    Raises:
        ResultError: they differ in what decides how much work there is to do.
    """
    fixed = [
        {
            **result.spec.model_dump(mode="json", exclude={**FREE}),
            "prompts_digest": result.prompts_digest,
            "pair_digest": result.pair_digest,
        }
        for result in (one, other)
    ]
    _require_equal(fixed[0], fixed[1], where)
    rates = {
        method: (throughputs(one, method), throughputs(other, method))
        for method in ("strategy", "autoregressive")
    }
    speedups = tuple(rates["strategy"][at] / rates["autoregressive"][at] for at in (0, 1))
    named = {
        "tokens/s": rates["strategy"],
        "autoregressive tokens/s": rates["autoregressive"],
        "speedup over autoregressive": speedups,
    }
    quantities = []
    for name, (a, b) in named.items():
        values, ratio = crossed_ratio(b, a)
        quantities.append(Quantity(name, (values[1], values[0]), ratio))
    equal = sum(a.tokens == b.tokens for a, b in zip(one.outputs, other.outputs, strict=True))
    remarks = []
    if min(one.spec.measure.runs, other.spec.measure.runs) == 1:
        remarks.append("note: with one timed run, how much runs differ is not in the interval")
    if quantities[1].differs:
        remarks.append(
            "note: autoregressive decoding differs too: of the tokens/s, that much is the machine "
            "or its load; the ratio of the speedups is free of it"
        )
    return Comparison(
        quantities,
        (equal, len(one.outputs)),
        differences(_surroundings(one), _surroundings(other), NAMES),
        remarks,
    )


def compare_ablations(one: Ablation, other: Ablation, where: str = "A and B") -> Comparison:
    """Compares the configurations that two aggregations of one setting share; see `compare_runs`.

    Raises:
        ResultError: another pair, dtype, number of prompts or length, or nothing in common.
    """
    ways = {"device", "device_type", "runs", "note"}
    settings = [ablation.setting.model_dump(mode="json") for ablation in (one, other)]
    fixed = [
        {key: value for key, value in setting.items() if key not in ways} for setting in settings
    ]
    _require_equal(fixed[0], fixed[1], where, "setting")
    facts = [{entry.name: entry for entry in ablation.configurations} for ablation in (one, other)]
    left_out = [
        f"note: {name} left out: only in {NAMES[at]}"
        for at in (0, 1)
        for name in facts[at]
        if name not in facts[1 - at]
    ]
    quantities = []
    differing = differences(
        {key: settings[0][key] for key in sorted(ways)},
        {key: settings[1][key] for key in sorted(ways)},
        NAMES,
        "setting",
    )
    for name in facts[0]:
        if name not in facts[1]:
            continue
        a, b = facts[0][name], facts[1][name]
        if a.description != b.description:
            left_out.append(
                f"note: {name} left out: description: A {a.description!r}, B {b.description!r}"
            )
            continue
        differing += differences(_circumstances(a), _circumstances(b), NAMES, name)
        for quantity, attribute in (
            ("tokens/s", "throughput"),
            ("autoregressive tokens/s", "autoregressive_throughput"),
            ("speedup over autoregressive", "speedup"),
        ):
            values = (getattr(a, attribute), getattr(b, attribute))
            quantities.append(
                Quantity(
                    f"{name}, {quantity}",
                    (values[0].value, values[1].value),
                    unpaired_ratio(values[1], values[0]),
                )
            )
    if not quantities:
        raise ResultError(
            f"{where} have no configuration in common: " + "; ".join(left_out[:SHOWN])
        )
    method = "note: intervals are not paired by prompt, so wide; two run results give narrower ones"
    return Comparison(quantities, None, differing, [method, *left_out])


def unpaired_ratio(value: Estimate, reference: Estimate) -> Estimate:
    """Ratio of two positive estimates; its interval follows from theirs, taken as independent."""
    ratio = value.value / reference.value
    if value.interval is None or reference.interval is None:
        return Estimate(value=ratio, interval=None)
    # Distances on a logarithmic scale. A median may lie outside of its bootstrap interval.
    below, above = _distances(value.value, value.interval)
    below_reference, above_reference = _distances(reference.value, reference.interval)
    return Estimate(
        value=ratio,
        interval=Interval(
            low=ratio * math.exp(-math.hypot(below, above_reference)),
            high=ratio * math.exp(math.hypot(above, below_reference)),
        ),
    )


def _distances(value: float, interval: Interval) -> tuple[float, float]:
    below = math.log(value / interval.low) if interval.low > 0 else math.inf
    return max(0.0, below), max(0.0, math.log(interval.high / value))


def _kind(path: Path) -> str:
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ResultError(
            f"{path}: no such file; give results/runs/<pair>/<name>.json or results/ablation.json"
        ) from None
    except (OSError, ValueError) as error:
        raise ResultError(f"{path}: cannot be read as JSON: {error}") from None
    if isinstance(data, Mapping) and "records" in data:
        return "run result"
    if isinstance(data, Mapping) and "tables" in data:
        return "aggregation"
    raise ResultError(
        f"{path}: neither a run result (has records) nor an aggregation (has tables); give "
        "results/runs/<pair>/<name>.json or results/ablation.json"
    )


def _require_equal(one: Any, other: Any, where: str, path: str = "") -> None:
    found = differences(one, other, NAMES, path)
    if found:
        raise ResultError(
            f"{where} cannot be compared: {shown(found)}; measure both with the same values"
        )


def _surroundings(result: RunResult) -> dict[str, Any]:
    """All that may differ between two comparable runs, but for times and paths of the command."""
    spec = result.spec
    return {
        "spec": {
            "name": spec.name,
            "pair": spec.pair,
            "models": spec.models.model_dump(mode="json", include=FREE_MODELS),
            "measure": spec.measure.model_dump(mode="json", include=FREE_MEASURE),
        },
        "source_digest": result.source_digest,
        "runtimes": {method: facts.mode for method, facts in result.runtimes.items()},
        "provenance": {
            key: value
            for key, value in result.provenance.items()
            if key not in ("command", "models")
        },
    }


def _circumstances(facts: ConfigurationFacts) -> dict[str, Any]:
    return facts.model_dump(mode="json", include={"threads", "commit", "dirty"})
