"""What the rounds of a strategy should cost, by a linear model, beside what they did.

The model knows three prices, each in tokens of autoregressive decoding of the same job, so that a
machine that was slower during one job changes nothing:

- a draft step, whatever the level holds;
- a verification, a + b * rows, where the rows are the draft nodes of a round and its root;
- whatever else a round does.

For a point of an experiment the prices are learnt from the *other* points of its row, by least
squares, and from autoregressive decoding in their jobs, a verification of one row. So no point
predicts its own time. Taken from the point itself are counts: draft steps and nodes of a mean
round, and, as its measured acceptance, how many tokens a round commits. The prefill, which no
budget changes, is taken as measured. Predicted are the cost of a mean round and, from it and the
tokens that it commits, the speedup of a whole generation. Where the prediction misses, a price is
not what the model takes it for, such as a verification whose time jumps with the number of rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from dynatree.experiments import Prediction
from dynatree.results import RunResult


@dataclass(frozen=True)
class RoundCosts:
    """Sums over the timed generations of a run, times in tokens of autoregressive decoding.

    Attributes:
        tokens: new tokens.
        rounds: verifications after the prefill.
        nodes: draft nodes verified.
        steps: draft forwards after the prefill.
        prefill, draft, verify, other: times by phase.
        single: a verification of one row, in autoregressive decoding.
    """

    tokens: int
    rounds: int
    nodes: int
    steps: int
    prefill: float
    draft: float
    verify: float
    other: float
    single: float

    @property
    def rows(self) -> float:
        """Rows of a mean verification."""
        return 1 + self.nodes / self.rounds

    @property
    def round_cost(self) -> float:
        """Of a mean round, as measured."""
        return (self.draft + self.verify + self.other) / self.rounds


def round_costs(result: RunResult) -> RoundCosts | None:
    """What the rounds of a run cost; None where no round drafted or none was needed."""
    drafted, plain = result.of("strategy"), result.of("autoregressive")
    plain_rounds = sum(len(record.rounds) for record in plain)
    unit = sum(record.seconds for record in plain) / sum(record.tokens for record in plain)
    seconds = {phase: spent / unit for phase, spent in result.totals.seconds_by_phase.items()}
    steps = sum(record.draft_forwards for record in drafted) - len(drafted)
    if not plain_rounds or not result.totals.rounds or steps <= 0:
        return None
    return RoundCosts(
        tokens=result.totals.tokens,
        rounds=result.totals.rounds,
        nodes=result.totals.drafted_nodes,
        steps=steps,
        prefill=seconds.get("prefill", 0.0),
        draft=seconds.get("draft", 0.0),
        verify=seconds.get("verify", 0.0),
        other=seconds.get("other", 0.0),
        single=sum(record.phases.get("verify", 0.0) for record in plain) / unit / plain_rounds,
    )


def predictions(costs: Mapping[str, RoundCosts]) -> dict[str, Prediction]:
    """The prediction for each point of a row from the others; empty for fewer than three points."""
    if len(costs) < 3:
        return {}
    return {
        name: _predicted(own, [other for key, other in costs.items() if key != name])
        for name, own in costs.items()
    }


def _predicted(own: RoundCosts, others: Sequence[RoundCosts]) -> Prediction:
    rows = np.array([1.0] * len(others) + [other.rows for other in others])
    verify = np.array(
        [other.single for other in others] + [other.verify / other.rounds for other in others]
    )
    # Prices are not negative, whatever noise makes of few points.
    (constant, by_row), _ = nnls(np.stack((np.ones_like(rows), rows), axis=1), verify)
    step = np.mean([other.draft / other.steps for other in others])
    rest = np.mean([other.other / other.rounds for other in others])
    cost = float(constant + by_row * own.rows + step * own.steps / own.rounds + rest)
    return Prediction(
        round_cost=cost,
        measured_round_cost=own.round_cost,
        speedup=own.tokens / (own.prefill + own.rounds * cost),
    )
