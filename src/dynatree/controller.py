"""Which candidate of `Auto` drafts the next round: the one that gives most tokens per second.

What a round costs is measured once per process (`CostModel`), what it gives is estimated from the
rounds that were decoded (`Controller`). All of it is host arithmetic on a few floats, from what the
host reads once per round anyway.
"""

import weakref
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from transformers import PreTrainedModel

from dynatree.strategies import StrategyBase

MEMORY = 64
"""Rounds after which an observed acceptance counts for 1/e: some 300 tokens of text."""

YIELD_MEMORY = 256
"""The same, in rounds of one candidate, of what it achieved of what acceptance promised: its rule,
more than the text, decides that."""

EXPLORE_EVERY, WORTH_EXPLORING = 8, 0.8
"""How often, in rounds that draft, another candidate is tried, and what share of the best rate it
must be expected to reach: at most 2.5 % of the time, and mostly far less."""

PRIOR_TRIALS = 4.0
"""Weight of what is assumed of acceptance at one depth and rank, in observed nodes."""

PRIOR_ACCEPTED = 4.0
"""Weight of the assumption that a candidate achieves what acceptance promises, in tokens."""

MAX_PAUSE = 64
"""Most rounds in a row without a draft, unless no draft could ever pay."""


@dataclass(frozen=True)
class CostModel:
    """Seconds of a round, by what it runs.

    Attributes:
        steps: of one draft step, by candidate; 0 where nothing is drafted.
        rows: numbers of rows that a verification was measured with, rising from 1.
        verify: of a verification of so many rows and its commitment, not falling: fewer rows can
            always be padded to more.
    """

    steps: tuple[float, ...]
    rows: tuple[int, ...]
    verify: tuple[float, ...]

    @classmethod
    def fitted(
        cls, steps: Sequence[float], rows: Sequence[int], verify: Sequence[float]
    ) -> "CostModel":
        """The model of measured times, which noise may have made fall."""
        return cls(tuple(steps), tuple(rows), tuple(accumulate(verify, max)))

    def verification(self, rows: int) -> float:
        """Seconds to verify `rows` rows; linear between those that were measured."""
        above = bisect_left(self.rows, rows)
        if above == len(self.rows):
            return self.verify[-1]
        if self.rows[above] == rows or above == 0:
            return self.verify[above]
        low, high = self.rows[above - 1], self.rows[above]
        share = (rows - low) / (high - low)
        return self.verify[above - 1] + share * (self.verify[above] - self.verify[above - 1])

    def round(self, candidate: int, steps: int, rows: int) -> float:
        """Seconds of a round of `candidate` with so many draft steps and rows to verify."""
        return steps * self.steps[candidate] + self.verification(rows)


_COSTS: weakref.WeakKeyDictionary[
    PreTrainedModel, weakref.WeakKeyDictionary[PreTrainedModel, dict[object, CostModel]]
] = weakref.WeakKeyDictionary()


def measured_once(
    target: PreTrainedModel,
    draft: PreTrainedModel,
    key: object,
    measure: Callable[[], CostModel],
) -> CostModel:
    """The costs of a pair under `key` (its runtime and candidates), measured on the first call."""
    known = _COSTS.setdefault(target, weakref.WeakKeyDictionary()).setdefault(draft, {})
    if key not in known:
        known[key] = measure()
    return known[key]


class Controller:
    """Estimates what each candidate's rounds give and cost, and chooses among them.

    With q(d, r) the probability that the child of rank r is accepted, given that its parent, at
    depth d - 1, was, a tree of breadth b and depth D that lacks no node is expected to give
    1 + sum over d <= D of the product over i <= d of sum over r < b of q(i, r) tokens, as in
    Sequoia (Chen et al., 2024, arXiv:2402.12374, section 3.1), with depth. Every round that drafts
    says something of q, whichever candidate drafted, so a change of the text is noticed for all of
    them at once. The q are counted with exponential forgetting and start from what is known of
    their rank at all depths.

    What a candidate achieves of that, because it prunes, stops or grafts, is its own factor, the
    ratio of tokens accepted and promised, 1 until it is tried: an untried candidate looks better
    than it is. Its cost is the mean over its rounds. Now and then the least tried of the
    candidates that are nearly as good has its turn, so that no unlucky start is final.

    While drafting nothing is best, the best other candidate is tried after 1, 2, 4, ...,
    `MAX_PAUSE` rounds; the pause starts over when a try pays. Where a draft could not pay even if
    all of it were accepted, none is tried.

    What was learnt is kept from one sequence to the next: rounds are few and estimates noisy, and
    a text of another kind is noticed as a change within a text is.
    """

    def __init__(self, costs: CostModel, candidates: Sequence[StrategyBase]) -> None:
        self._costs = costs
        self._depths = [candidate.max_depth for candidate in candidates]
        self._breadths = [candidate.max_children for candidate in candidates]
        deepest, widest = max(self._depths), max(self._breadths)
        self._trials = [[0.0] * widest for _ in range(deepest)]
        self._hits = [[0.0] * widest for _ in range(deepest)]
        # Before the first round: the first child is right more often than not, the others share
        # what is left.
        self._prior = [0.6 * 0.3**rank for rank in range(widest)]
        self._accepted = [0.0] * len(candidates)
        self._promised = [0.0] * len(candidates)
        self._rounds = [0] * len(candidates)
        # Of a tree that was not tried yet, two nodes per level stand for what pruning leaves.
        self._seconds = [
            costs.round(index, depth, 1 + min(candidate.max_nodes, depth * min(2, breadth)))
            for index, (candidate, depth, breadth) in enumerate(
                zip(candidates, self._depths, self._breadths, strict=True)
            )
        ]
        self._plain = self._depths.index(0) if 0 in self._depths else None
        self._idle = 0
        self._pause = 1
        self._drafted = 0
        self._estimate()

    def choose(self) -> int:
        """The candidate for the next round to grow."""
        rates = self.rates()
        best = max(range(len(rates)), key=rates.__getitem__)
        if best != self._plain:
            self._idle, self._pause = 0, 1
            self._drafted += 1
            if self._drafted % EXPLORE_EVERY:
                return best
            near = [
                index
                for index, rate in enumerate(rates)
                if rate >= WORTH_EXPLORING * rates[best] and index not in (best, self._plain)
            ]
            return min(near, key=self._rounds.__getitem__, default=best)
        hopes = [
            index
            for index, depth in enumerate(self._depths)
            if (1 + depth) / self._seconds[index] > rates[best]
        ]
        if self._idle < self._pause or not hopes:
            self._idle += 1
            return best
        self._idle = 0
        return max(hopes, key=rates.__getitem__)

    def rates(self) -> list[float]:
        """Expected tokens per second, by candidate."""
        return [
            (1 + min(depth, self._promise(index, depth) * self._yield(index)))
            / self._seconds[index]
            for index, depth in enumerate(self._depths)
        ]

    def observe(
        self,
        candidate: int,
        steps: int,
        rows: int,
        ranks: Sequence[int],
        children: Sequence[int],
        grafted: int = 0,
        whole: bool = True,
    ) -> None:
        """Learns from a round.

        Args:
            candidate: the one that drafted.
            steps: draft steps that it took.
            rows: rows that were verified.
            ranks: of each accepted node among its siblings, from shallow to deep.
            children: nodes offered after the root and each accepted node; one more than `ranks`.
            grafted: how many accepted nodes, the last ones, an n-gram gave: they say nothing of
                the draft.
            whole: whether the tree could be as deep as the rule has it. One that was kept short
                near the end of the text says nothing of the rule.
        """
        depth = self._depths[candidate]
        if depth == 0:
            return
        if whole:
            seconds = self._costs.round(candidate, steps, rows)
            self._rounds[candidate] += 1
            share = 1 / min(self._rounds[candidate], MEMORY)
            self._seconds[candidate] += share * (seconds - self._seconds[candidate])
            if self._plain is not None:
                pays = (1 + len(ranks)) * self._seconds[self._plain] > seconds
                self._pause = 1 if pays else min(2 * self._pause, MAX_PAUSE)
            keep = 1 - 1 / YIELD_MEMORY
            self._accepted[candidate] = keep * self._accepted[candidate] + len(ranks)
            self._promised[candidate] *= keep
            self._promised[candidate] += self._promise(candidate, depth)
        self._count(ranks[: len(ranks) - grafted], children[: len(ranks) + (grafted == 0)])
        self._estimate()

    def _count(self, ranks: Sequence[int], children: Sequence[int]) -> None:
        keep = 1 - 1 / MEMORY
        for level, (hits, trials) in enumerate(zip(self._hits, self._trials, strict=True)):
            offered = children[level] if level < len(children) else 0
            for rank in range(len(trials)):
                trials[rank] = keep * trials[rank] + (rank < offered)
                hits[rank] *= keep
            if level < len(ranks) and ranks[level] < len(hits):
                hits[ranks[level]] += 1

    def _estimate(self) -> None:
        """Works out, for each breadth, the expected number of accepted tokens by depth."""
        pooled = []
        for rank, prior in enumerate(self._prior):
            hits, trials = (sum(level[rank] for level in by) for by in (self._hits, self._trials))
            pooled.append((PRIOR_TRIALS * prior + hits) / (PRIOR_TRIALS + trials))
        self._promises = {breadth: [0.0] for breadth in self._breadths}
        reached = dict.fromkeys(self._promises, 1.0)
        for level in zip(self._hits, self._trials, strict=True):
            chances = [
                (PRIOR_TRIALS * prior + hit) / (PRIOR_TRIALS + trial)
                for prior, hit, trial in zip(pooled, *level, strict=True)
            ]
            for breadth, promises in self._promises.items():
                reached[breadth] *= min(1.0, sum(chances[:breadth]))
                promises.append(promises[-1] + reached[breadth])

    def _promise(self, candidate: int, depth: int) -> float:
        return self._promises[self._breadths[candidate]][depth]

    def _yield(self, candidate: int) -> float:
        return (PRIOR_ACCEPTED + self._accepted[candidate]) / (
            PRIOR_ACCEPTED + self._promised[candidate]
        )
