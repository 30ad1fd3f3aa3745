"""What happened inside the rounds of a run, with intervals over prompts (`dynatree.estimates`)."""

from typing import Final

import numpy as np

from dynatree.ablation import Estimate
from dynatree.estimates import Floats, estimate
from dynatree.points import Point, RoundTime
from dynatree.results import RunResult

PHASES: Final = ("draft", "verify", "other")
"""The phases of a round; the prefill comes before the first one."""


FEWEST: Final = 10
"""Rounds of which a share is shown. Runs repeat the same rounds, so each must have as many."""


def round_time(result: RunResult) -> RoundTime | None:
    """The mean time of a round of the strategy; None where a prefill was all that was needed."""
    sums = np.zeros((len(result.spec.prompts), 2))
    for record in result.of("strategy"):
        seconds = sum(record.phases.get(phase, 0.0) for phase in PHASES)
        sums[record.prompt] += (1000 * seconds, len(record.rounds))
    if not result.totals.rounds:
        return None
    phases = result.totals.seconds_by_phase
    return RoundTime(
        milliseconds={
            phase: 1000 * phases.get(phase, 0.0) / result.totals.rounds for phase in PHASES
        },
        total=estimate(sums, _ratio_of_sums),
        tokens=result.totals.tokens_per_round,
    )


def acceptance(result: RunResult) -> list[Point]:
    """By depth, the share of rounds that accepted a token there of those that offered one.

    Depths are left out that fewer than half of the prompts, or fewer than `FEWEST` rounds in each
    run, offered: their interval would say nothing. Nor has a share of none or all an interval,
    since resampling equal cases cannot tell how rare others are.
    """
    deepest = max((entry.depth for entry in result.totals.acceptance_by_depth), default=0)
    counts = np.zeros((deepest, len(result.spec.prompts), 2))
    for record in result.of("strategy"):
        for entry in record.rounds:
            counts[: entry.accepted, record.prompt, 0] += 1
            counts[: entry.depth, record.prompt, 1] += 1
    return [
        Point(depth, _share(at))
        for depth, at in enumerate(counts, start=1)
        if 2 * np.count_nonzero(at[:, 1]) >= len(at)
        and at[:, 1].sum() >= FEWEST * result.spec.measure.runs
    ]


def _share(counts: Floats) -> Estimate:
    """Of counts [prompts, 2], the first over the second."""
    found = estimate(counts, _ratio_of_sums)
    return found if 0 < found.value < 1 else Estimate(value=found.value, interval=None)


def _ratio_of_sums(samples: Floats) -> Floats:
    """Sum of the first value over prompts divided by that of the second.

    A sample in which nothing was offered counts as 0, which can only widen the interval downward.
    """
    sums = samples.sum(axis=-2)
    return np.asarray(
        np.divide(
            sums[..., 0], sums[..., 1], out=np.zeros_like(sums[..., 0]), where=sums[..., 1] > 0
        )
    )
