"""What the runs of one configuration say: throughput, speedup, acceptance, latency.

Notation: a generation's throughput is its new tokens divided by its wall time in seconds.

- Throughput of a configuration: median over its timed generations.
- Speedup of a generation: its throughput divided by that of the autoregressive generation of the
  same job, prompt and run, its neighbour in time. A prompt's speedup is the median over its runs,
  a configuration's the geometric mean over prompts, the one mean of ratios that does not depend
  on which method is the reference (Fleming and Wallace, 1986, CACM 29(3)).
- Change against another row: ratio of the two speedups of a prompt, geometric mean over prompts,
  minus 1. Each row's speedup is paired within its own job, so drift between jobs cancels.
- Row of a sweep: the candidate with the largest speedup, see `dynatree.ablation.Sweep` for what
  that choice does to the numbers. The candidates are all measured and all reported.
- Change of a point of an experiment against another: as between rows where both have the same
  prompts, otherwise the same ratio with the prompts of each resampled independently.
- Acceptance: accepted draft tokens per draft token on the deepest path offered, so never above 1,
  whatever the width of the tree; by depth, rounds that accepted there per round that offered there.
- Tokens per round by position: greedy text that starts to loop inflates acceptance, so rounds are
  also counted by how many new tokens stood before them, beside a measure of the repetition.
- Latency: time to first token (TTFT) is the prefill of target and draft; time per output token
  (TPOT) is the remaining time divided by the remaining tokens; medians over generations.
- Intervals: see `dynatree.estimates`.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from dynatree.ablation import (
    ConfigurationFacts,
    DepthAcceptance,
    Estimate,
    Latency,
    Override,
    PairSetting,
    PositionRounds,
)
from dynatree.certificate import Lossless
from dynatree.config import Config
from dynatree.estimates import (
    Floats,
    estimate,
    geometric_mean,
    median,
    paired_ratios,
)
from dynatree.intake import Origin
from dynatree.results import Method, RunResult

POSITIONS: Final = (0, 100, 500)
"""New tokens after which the ranges of output positions begin; each ends where the next begins."""


def throughputs(result: RunResult, method: Method) -> Floats:
    """Tokens per second [prompts, runs]."""
    rates = np.empty((len(result.spec.prompts), result.spec.measure.runs))
    for record in result.of(method):
        rates[record.prompt, record.run] = record.tokens / record.seconds
    return rates


def prompt_speedups(result: RunResult) -> Floats:
    """Speedup of each prompt [prompts]: the median over its runs of the paired ratio."""
    return paired_ratios(throughputs(result, "strategy"), throughputs(result, "autoregressive"))


def relative_change(samples: Floats) -> Floats:
    """Geometric mean of ratios, minus 1."""
    return geometric_mean(samples) - 1.0


def change_of(speedups: Floats, reference: Floats) -> Estimate:
    """Change of one row's speedups [prompts] against another's of the same prompts."""
    return estimate((speedups / reference)[:, None], relative_change)


def fastest_of(candidates: Sequence[str], speedups: Mapping[str, Floats]) -> str:
    """The candidate with the largest speedup; of equal ones, the first listed."""
    return max(candidates, key=lambda name: float(geometric_mean(speedups[name][:, None])))


def facts_of(
    name: str,
    result: RunResult,
    origin: Origin,
    speedups: Floats,
    overrides: list[Override],
    lossless: Lossless | None,
    device: str | None,
) -> ConfigurationFacts:
    """All that is reported of one run.

    Args:
        speedups: [prompts], as `prompt_speedups` has them.
        overrides: what the pair changes in the configuration.
        lossless: what the certificate found; None if there is none.
        device: what it was measured on, where the runs of a study differ in that.
    """
    records = result.of("strategy")
    rounds = [entry for record in records for entry in record.rounds]
    offered = sum(entry.depth for entry in rounds)
    positions = _position_counts(result)
    repeated = [output.repeated_8grams for output in result.outputs]
    seconds = sum(result.totals.seconds_by_phase.values())
    strategy = result.spec.strategy
    return ConfigurationFacts(
        name=name,
        strategy=str(strategy.model_dump()["strategy"]),
        description=strategy.describe(),
        overrides=overrides,
        throughput=estimate(throughputs(result, "strategy"), median),
        autoregressive_throughput=estimate(throughputs(result, "autoregressive"), median),
        speedup=estimate(speedups[:, None], geometric_mean),
        tokens_per_generation=result.totals.tokens / len(records),
        rounds=len(rounds),
        tokens_per_round=result.totals.tokens_per_round,
        rounds_by_position=[
            PositionRounds(start=start, stop=stop, rounds=count, tokens=tokens)
            for start, stop, (count, tokens) in zip(
                POSITIONS, [*POSITIONS[1:], None], positions.sum(axis=0).tolist(), strict=True
            )
        ],
        later_rounds=_later_change(positions),
        nodes_per_round=result.totals.drafted_nodes / len(rounds) if rounds else 0.0,
        acceptance=sum(entry.accepted for entry in rounds) / offered if offered else None,
        acceptance_by_depth=[
            DepthAcceptance(depth=count.depth, offered=count.offered, accepted=count.accepted)
            for count in result.totals.acceptance_by_depth
        ],
        repeated_8grams_mean=float(np.mean(repeated)),
        repeated_8grams_max=max(repeated),
        phase_share={
            phase: spent / seconds
            for phase, spent in result.totals.seconds_by_phase.items()
            if seconds
        },
        latency=_latency(result),
        peak_memory_bytes=result.peak_memory_bytes,
        unequal_prompts=sum(not output.equal for output in result.outputs),
        largest_gap=max(
            (output.divergence.gap for output in result.outputs if output.divergence), default=None
        ),
        lossless=lossless,
        threads=origin.device.threads,
        commit=origin.git.commit,
        dirty=origin.git.dirty,
        device=device,
    )


def overrides_of(config: Config, name: str) -> list[Override]:
    """The values that the pair changes in configuration `name`."""
    base = config.configs[name].run.model_dump()
    return [
        Override(key=key, value=value, instead_of=base.get(key))
        for key, value in config.overrides(name).items()
        if value != base.get(key)
    ]


def _position_counts(result: RunResult) -> npt.NDArray[np.int64]:
    """Rounds, and tokens that they commit, by range of `POSITIONS` [prompts, ranges, 2]."""
    counts = np.zeros((len(result.spec.prompts), len(POSITIONS), 2), dtype=np.int64)
    for record in result.of("strategy"):
        for start, committed in record.spans:
            counts[record.prompt, bisect_right(POSITIONS, start) - 1] += (1, committed)
    return counts


def _later_change(counts: npt.NDArray[np.int64]) -> Estimate | None:
    """Change of the tokens per round after the first range, over prompts that have rounds in it
    and after it; `counts` [prompts, ranges, 2] as above.
    """
    parts = np.stack((counts[:, 0], counts[:, 1:].sum(axis=1)), axis=1)
    reaching = parts[(parts[:, :, 0] > 0).all(axis=1)]
    if not len(reaching):
        return None
    rates = reaching[:, :, 1] / reaching[:, :, 0]
    return change_of(rates[:, 1], rates[:, 0])


def _latency(result: RunResult) -> Latency:
    shape = (len(result.spec.prompts), result.spec.measure.runs)
    first: dict[Method, Floats] = {}
    later: dict[Method, Floats] = {}
    for method in ("autoregressive", "strategy"):
        first[method], later[method] = np.empty(shape), np.full(shape, np.nan)
        for record in result.of(method):
            at = record.prompt, record.run
            first[method][at] = record.first_token_seconds
            if record.tokens > 1:
                rest = record.seconds - record.first_token_seconds
                later[method][at] = rest / (record.tokens - 1)
    changes = paired_ratios(first["strategy"], first["autoregressive"])
    # A prompt whose output ends with its first token says nothing of further ones.
    going_on = ~np.isnan(later["strategy"] + later["autoregressive"]).any(axis=1)

    def per_token(method: Method) -> Estimate | None:
        return estimate(later[method][going_on], median) if going_on.any() else None

    return Latency(
        first_token=estimate(first["strategy"], median),
        autoregressive_first_token=estimate(first["autoregressive"], median),
        first_token_change=estimate(changes[:, None], relative_change),
        per_token=per_token("strategy"),
        autoregressive_per_token=per_token("autoregressive"),
    )


def setting_columns(facts: ConfigurationFacts, setting: PairSetting) -> dict[str, Any]:
    """Columns that say what was run."""
    return {
        "pair": setting.pair,
        "device": facts.device or setting.device,
        "description": facts.description,
        "overrides": "; ".join(f"{entry.key}={entry.value}" for entry in facts.overrides),
    }


def speed_columns(facts: ConfigurationFacts) -> dict[str, Any]:
    """Columns of throughputs and speedup, with their intervals."""
    return {
        **estimate_columns("throughput_tokens_per_second", facts.throughput),
        **estimate_columns("autoregressive_tokens_per_second", facts.autoregressive_throughput),
        **estimate_columns("speedup", facts.speedup),
    }


def count_columns(facts: ConfigurationFacts, lines: Sequence[ConfigurationFacts]) -> dict[str, Any]:
    """Columns of what was counted, latencies and phases, the same for all `lines` of a file."""
    line = facts.model_dump(
        include={
            "tokens_per_generation",
            "rounds",
            "tokens_per_round",
            "nodes_per_round",
            "acceptance",
            "repeated_8grams_mean",
            "repeated_8grams_max",
            "peak_memory_bytes",
            "unequal_prompts",
            "lossless",
            "threads",
            "commit",
            "dirty",
        }
    )
    line["accepted_length"] = facts.accepted_length
    line |= estimate_columns("first_token_seconds", facts.latency.first_token)
    line |= estimate_columns("first_token_change", facts.latency.first_token_change)
    line |= estimate_columns("seconds_per_token", facts.latency.per_token)
    for part in facts.rounds_by_position:
        where = f"{part.start}_to_{part.stop}" if part.stop else f"from_{part.start}"
        line[f"rounds_{where}"] = part.rounds
        line[f"tokens_per_round_{where}"] = part.tokens_per_round
    line |= estimate_columns("later_rounds", facts.later_rounds)
    by_depth = {entry.depth: entry for entry in facts.acceptance_by_depth}
    deepest = max(len(facts.acceptance_by_depth) for facts in lines)
    for depth in range(1, deepest + 1):
        entry = by_depth.get(depth)
        line[f"acceptance_depth_{depth}"] = entry.accepted / entry.offered if entry else None
    return line | {f"{phase}_share": share for phase, share in facts.phase_share.items()}


def estimate_columns(name: str, estimate: Estimate | None) -> dict[str, float | None]:
    """Columns of a value and its interval; empty ones for None."""
    interval = estimate.interval if estimate else None
    return {
        name: estimate.value if estimate else None,
        f"{name}_low": interval.low if interval else None,
        f"{name}_high": interval.high if interval else None,
    }
