"""Drafting strategies: what to draft, as validated data.

Every strategy is a rule for growing one draft tree per round, so there is one decode loop.
Autoregressive decoding is the tree of depth 0, linear speculative decoding (Leviathan et al.,
2023, arXiv:2211.17192; Chen et al., 2023, arXiv:2302.01318) is the tree with one branch, and
multi-path trees follow SpecInfer (Miao et al., 2024, arXiv:2305.09781). `DynamicTree` shapes the
tree by the draft's confidence and by what was accepted lately, `BestFirst` by what a node is worth.

This module imports no torch: the Snakefile validates configurations with it. The rules that depend
on what the draft says take and return tensors all the same, by their methods alone. They may not
read one: on a GPU they are part of a captured graph.
"""

import math
from collections import Counter
from itertools import zip_longest
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

if TYPE_CHECKING:
    from torch import Tensor

MAX_NODES = 4096
"""Upper limit of a node budget; a larger tree costs more mask than any model could win back."""


class StrategyBase(BaseModel):
    """A growth rule. Subclasses fix the shape; the drafter reads nothing but this interface."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    if TYPE_CHECKING:
        # Every subclass says it, as a property or as a field, which may not shadow a property.
        @property
        def max_depth(self) -> int:
            """Deepest level of the draft tree; the root, already committed, has depth 0."""

    @property
    def max_children(self) -> int:
        """Children drafted per expanded node, before pruning."""
        return 1

    @property
    def min_log_prob(self) -> float:
        """A node whose cumulative draft log-probability is below this is dropped."""
        return -math.inf

    @property
    def max_nodes(self) -> int:
        """Most draft nodes (the root not counted) that one verification may hold."""
        return self.max_depth

    @property
    def ngram_tokens(self) -> int:
        """Longest continuation of an earlier n-gram that is grafted into the tree."""
        return 0

    @property
    def initial_state(self) -> tuple[float, ...]:
        """What the rules below know of a sequence before its first round; empty if nothing."""
        return ()

    @property
    def varies(self) -> bool:
        """Whether the number of nodes depends on what the draft says."""
        return self.min_log_prob > -math.inf

    @property
    def rules(self) -> "tuple[StrategyBase, ...]":
        """The rules that rounds are grown by: this one, unless it chooses among others."""
        return (self,)

    def max_expanded(self, depth: int) -> int:
        """Most nodes of level `depth` (1, 2, ...) that are expanded, whatever the draft says."""
        return MAX_NODES

    def keeps(self, log_probs: "Tensor", ranks: "Tensor", state: "Tensor") -> "Tensor | None":
        """Which candidate children stay.

        Args:
            log_probs: float32 [w, k], the k candidates of each of w expanded nodes, given the
                node, the most probable first.
            ranks: int64 [k], 0, 1, 2, ...
            state: float32, as long as `initial_state`.

        Returns:
            bool [w, k], or None for all.
        """
        return None

    def expands(self, log_probs: "Tensor", depth: int, state: "Tensor") -> "Tensor | None":
        """Which nodes of a level get children; a node that does not is verified as a leaf.

        Where no node does, drafting ends. Of more than `max_expanded`, the most probable do.

        Args:
            log_probs: float32 [w], cumulative, of the nodes of level `depth`; minus infinity where
                a node is only there to fill a static shape.

        Returns:
            bool [w], or None for all.
        """
        return None

    def adapted(self, state: "Tensor", accepted: "Tensor", offered: "Tensor") -> "Tensor":
        """The state after a round that accepted `accepted` [1] tokens of `offered` [1] levels."""
        return state

    @property
    def widths(self) -> list[int]:
        """Most nodes that each level can hold, whatever the draft says: static shapes."""
        likely = _most_reaching(math.exp(self.min_log_prob))
        widths: list[int] = []
        expanded = 1
        for depth in range(1, self.max_depth + 1):
            every = expanded * self.max_children
            width = min(every, self.max_nodes, likely)
            # Of a whole tree that fits the budget nothing has to be selected, and no draft reads
            # the last level.
            whole = every == self.max_children**depth and sum(widths) + every <= self.max_nodes
            if whole and depth == self.max_depth:
                width = every
            widths.append(width)
            expanded = min(width, self.max_expanded(depth))
        return widths

    @property
    def max_drafted(self) -> int:
        """Most nodes that a round can add before the budget selects: bounds the KV slots."""
        return sum(self.widths) + self.ngram_tokens

    def describe(self) -> str:
        """The configuration in words, as the tables print it."""
        raise TypeError(f"{type(self).__name__} does not describe itself")


def _most_reaching(probability: float) -> int:
    """Most nodes of one level that reach `probability`: those of a level add up to at most 1."""
    # The small term keeps 1 / 0.1 from falling under 10 by rounding.
    return math.floor(1 / probability + 1e-6) if probability > 1 / MAX_NODES else MAX_NODES


class Budgeted(StrategyBase):
    """What multi-path trees share: a threshold on the cumulative probability, and a budget.

    A node is dropped when its cumulative draft probability (the product of the draft's
    probabilities along the path) is below `prune_threshold`. When more than `node_budget` nodes
    would result, the most probable ones stay, as in EAGLE-2 (Li et al., 2024, arXiv:2406.16858,
    section 4.2).
    """

    prune_threshold: Annotated[float, Field(ge=0.0)] = 0.05
    node_budget: Annotated[int, Field(ge=1, le=MAX_NODES)] = 256

    @field_validator("prune_threshold")
    @classmethod
    def _threshold_keeps_something(cls, value: float) -> float:
        if not value < 1.0:
            raise ValueError(
                f"must lie in [0, 1), got {value}: a node is dropped when its cumulative draft "
                "probability falls below the threshold, and every probability is below 1, so "
                f"{value} would prune every node. For no pruning write prune_threshold: 0"
            )
        return value

    @property
    def min_log_prob(self) -> float:
        return math.log(self.prune_threshold) if self.prune_threshold > 0 else -math.inf

    @property
    def max_nodes(self) -> int:
        return self.node_budget

    def _pruning(self) -> str:
        pruning = (
            f"threshold {self.prune_threshold:g}" if self.prune_threshold > 0 else "no pruning"
        )
        return f"{pruning}, budget {self.node_budget}"


class Autoregressive(StrategyBase):
    """One target forward per token: the baseline every speedup is measured against."""

    strategy: Literal["autoregressive"] = "autoregressive"

    @property
    def max_depth(self) -> int:
        return 0

    def describe(self) -> str:
        return "target only"


class Linear(StrategyBase):
    """A chain of the draft's greedy tokens (Leviathan et al., 2023, Algorithm 1, greedy case)."""

    strategy: Literal["linear"] = "linear"
    num_draft_tokens: Annotated[int, Field(ge=1, le=MAX_NODES)] = 6

    @property
    def max_depth(self) -> int:
        return self.num_draft_tokens

    def describe(self) -> str:
        return f"K = {self.num_draft_tokens}"


class Tree(Budgeted):
    """A multi-path draft tree, pruned by cumulative probability under a node budget.

    Level d + 1 holds the `branch_factor` most probable continuations of every node of level d,
    starting at the root, less those that `Budgeted` drops.
    """

    strategy: Literal["tree"] = "tree"
    depth: Annotated[int, Field(ge=1, le=64)] = 7
    branch_factor: Annotated[int, Field(ge=1, le=64)] = 2

    @property
    def max_depth(self) -> int:
        return self.depth

    @property
    def max_children(self) -> int:
        return self.branch_factor

    def describe(self) -> str:
        return f"depth {self.depth}, branch {self.branch_factor}, {self._pruning()}"


class DynamicTree(Budgeted):
    """DynaTree's adaptive tree: breadth and depth follow the draft, both follow the history.

    With c(u) the draft's largest probability after node u, d(u) the depth and p(u) the cumulative
    probability of u:

    *Dynamic breadth*: u has the b(u) most probable continuations as children, with b(u) = `b_min`
    if c(u) >= `tau_high`, `b_max` if c(u) < `tau_low`, and `b_mid` in between.

    *Dynamic depth*: u is expanded iff d(u) < `d_max` and p(u) >= `rho_stop` and (d(u) < `d_base`
    or p(u) > `rho_deep`). Drafting ends at the first level none of whose nodes is.

    *History adaptation*: let e be the mean acceptance of the last `history_rounds` rounds less
    `history_target`, where the acceptance of a round is the number of accepted draft tokens by
    the depth of the tree. The next round uses, by proportional control,

        d_base' = round(d_base + depth_gain * e), within 1 .. d_max, and
        tau_high' = tau_high - tau_gain * e, within tau_low .. 1:

    a draft that is right more often than the target drafts deeper and branches less. Every
    sequence starts with acceptances on target, so with the configured values, and each round
    replaces one of them. A round that offered nothing counts as on target.

    Equal bounds switch a mechanism off: `b_min` = `b_mid` = `b_max` is a fixed breadth, `d_base` =
    `d_max` a fixed depth (with `rho_stop` 0, of every node), and neither is then moved by history.

    The depths, breadths, taus and the budget are the published settings. The rest is chosen to
    fit them: at `rho_stop` 0.1, twice the threshold, at most one child can have more than half of
    what its parent has and a node below gives little but leaves to drop; a further draft step
    costs some 0.1 to 0.2 of a token's time, so `rho_deep` 0.3 is where it pays for a single path.
    """

    strategy: Literal["dynamic_tree"] = "dynamic_tree"
    d_base: Annotated[int, Field(ge=1, le=64)] = 5
    d_max: Annotated[int, Field(ge=1, le=64)] = 8
    b_min: Annotated[int, Field(ge=1, le=64)] = 1
    b_mid: Annotated[int, Field(ge=1, le=64)] = 2
    b_max: Annotated[int, Field(ge=1, le=64)] = 3
    tau_high: Annotated[float, Field(ge=0.0, le=1.0)] = 0.9
    tau_low: Annotated[float, Field(ge=0.0, le=1.0)] = 0.4
    rho_stop: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    rho_deep: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.3
    history: bool = True
    history_rounds: Annotated[int, Field(ge=1, le=1024)] = 8
    history_target: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    depth_gain: Annotated[float, Field(ge=0.0)] = 4.0
    tau_gain: Annotated[float, Field(ge=0.0)] = 0.2

    @model_validator(mode="after")
    def _bounds_are_ordered(self) -> Self:
        for low, high in (
            ("d_base", "d_max"),
            ("b_min", "b_mid"),
            ("b_mid", "b_max"),
            ("tau_low", "tau_high"),
            ("rho_stop", "rho_deep"),
        ):
            least, most = getattr(self, low), getattr(self, high)
            if least > most:
                raise ValueError(
                    f"{low} must be at most {high}, got {low} {least} and {high} {most}; lower "
                    f"{low} or raise {high}"
                )
        return self

    @property
    def max_depth(self) -> int:
        return self.d_max

    @property
    def max_children(self) -> int:
        return self.b_max

    @property
    def initial_state(self) -> tuple[float, ...]:
        """The acceptance of each of the last rounds, the oldest first."""
        return (self.history_target,) * self.history_rounds if self.history else ()

    @property
    def varies(self) -> bool:
        return True

    def max_expanded(self, depth: int) -> int:
        # The deepest base that history can reach; the small term is for single precision.
        rise = self.depth_gain * (1 - self.history_target) if self.history else 0.0
        deepest = self.d_base + math.floor(rise + 0.501)
        return _most_reaching(self.rho_deep if deepest <= depth < self.d_max else self.rho_stop)

    def keeps(self, log_probs: "Tensor", ranks: "Tensor", state: "Tensor") -> "Tensor | None":
        if self.b_min == self.b_max:
            return None
        confidence = log_probs[:, :1].exp()
        tau_high: float | Tensor = self.tau_high
        if self.history:
            tau_high = (self.tau_high - self.tau_gain * self._error(state)).clamp(self.tau_low, 1.0)
        fewer = (self.b_mid - self.b_min) * (confidence >= tau_high)
        more = (self.b_max - self.b_mid) * (confidence < self.tau_low)
        return ranks < self.b_mid - fewer + more

    def expands(self, log_probs: "Tensor", depth: int, state: "Tensor") -> "Tensor | None":
        fixed = self.d_base == self.d_max
        if fixed and self.rho_stop == 0:
            return None
        probabilities = log_probs.exp()
        likely = probabilities >= self.rho_stop
        if fixed or (not self.history and depth < self.d_base):
            return likely
        likely_deep = probabilities > self.rho_deep
        if self.history:
            d_base = self.d_base + self.depth_gain * self._error(state)
            likely_deep = likely_deep | (d_base.round().clamp(1, self.d_max) > depth)
        return likely & likely_deep

    def adapted(self, state: "Tensor", accepted: "Tensor", offered: "Tensor") -> "Tensor":
        state = state.roll(-1)
        state[-1:] = (accepted + (offered == 0) * self.history_target) / offered.clamp(min=1)
        return state

    def _error(self, state: "Tensor") -> "Tensor":
        return state.mean() - self.history_target

    def describe(self) -> str:
        deep = self.d_base < self.d_max
        parts = [f"depth {self.d_base} to {self.d_max}" if deep else f"depth {self.d_max}"]
        if self.b_min < self.b_max:
            parts.append(f"breadth {self.b_min}, {self.b_mid}, {self.b_max}")
            parts.append(f"confidence {self.tau_high:g}, {self.tau_low:g}")
        else:
            parts.append(f"branch {self.b_mid}")
        if deep:
            parts.append(f"expanded from {self.rho_stop:g}, deep {self.rho_deep:g}")
        elif self.rho_stop > 0:
            parts.append(f"expanded from {self.rho_stop:g}")
        if self.history:
            parts.append("history")
        return ", ".join([*parts, self._pruning()])


class BestFirst(Budgeted):
    """The `node_budget` most probable nodes, found level by level, with any draft model.

    EAGLE-2's expansion and reranking (Li et al., 2024, arXiv:2406.16858, sections 4.1 and 4.2)
    and OPT-Tree's stopping (Wang et al., 2024, arXiv:2406.17276): the cumulative probability p(u)
    estimates that u is accepted, so the sum of p over the tree is the number of draft tokens that
    a round is expected to accept, and the best tree of N nodes is that of the N largest p. Each
    level expands its `width` most probable nodes into `branch` candidates each. Drafting one more
    level ends when what it can add falls under what it costs: its nodes' probabilities sum to at
    most that of the nodes to expand, and when this sum is less than `step_cost`, the draft step
    is saved.

    `step_cost` is the time of one draft step in accepted tokens. A draft step was measured at 0.1
    to 0.2 of the time of a token, hence 0.15. `prune_threshold` is, in the same unit, the cost of
    verifying one more node: a node is worth it iff its p is at least that. 0 leaves the budget
    alone to decide.

    With `ngram`, the continuation of the latest earlier occurrence of the last tokens in prompt
    and output (prompt lookup, Saxena, 2023; see `dynatree.ngram`), up to `max_depth` tokens, joins
    the tree under the same budget, at no draft step.
    """

    strategy: Literal["best_first"] = "best_first"
    max_depth: Annotated[int, Field(ge=1, le=64)] = 8
    node_budget: Annotated[int, Field(ge=1, le=MAX_NODES)] = 32
    width: Annotated[int, Field(ge=1, le=MAX_NODES)] = 8
    branch: Annotated[int, Field(ge=1, le=64)] = 4
    step_cost: Annotated[float, Field(ge=0.0)] = 0.15
    prune_threshold: Annotated[float, Field(ge=0.0)] = 0.02
    ngram: bool = False

    @field_validator("step_cost")
    @classmethod
    def _some_step_pays(cls, value: float) -> float:
        if not value < 1.0:
            raise ValueError(
                f"must lie in [0, 1), got {value}: a level adds at most one accepted token, so no "
                "draft step would ever pay. To draft nothing use strategy: autoregressive"
            )
        return value

    @property
    def max_children(self) -> int:
        return self.branch

    @property
    def ngram_tokens(self) -> int:
        return self.max_depth if self.ngram else 0

    @property
    def varies(self) -> bool:
        return True

    def max_expanded(self, depth: int) -> int:
        return self.width

    def expands(self, log_probs: "Tensor", depth: int, state: "Tensor") -> "Tensor | None":
        if self.step_cost == 0:
            return None
        probabilities = log_probs.exp()
        best = probabilities.topk(min(self.width, len(probabilities))).values
        return (best.sum() >= self.step_cost).expand_as(probabilities)

    def describe(self) -> str:
        ngram = ", n-gram" if self.ngram else ""
        return (
            f"depth up to {self.max_depth}, width {self.width}, branch {self.branch}, "
            f"step cost {self.step_cost:g}{ngram}, {self._pruning()}"
        )


Candidate = Annotated[Autoregressive | Linear | Tree | BestFirst, Field(discriminator="strategy")]
"""What `Auto` may choose. `DynamicTree` has a history of its own, which other rounds would blur."""


class Auto(StrategyBase):
    """Each round the candidate that is expected to give most tokens per second; see `Controller`.

    Costs are measured on the models at hand, acceptance is learnt from the rounds. With
    `Autoregressive` among the candidates, a draft that does not pay is let rest. What is chosen
    depends on times, so rounds differ from run to run, and tokens do not.
    """

    strategy: Literal["auto"] = "auto"
    # Not strict: a list in YAML, a tuple here, so that the strategy stays hashable.
    candidates: Annotated[tuple[Candidate, ...], Field(min_length=1, strict=False)] = (
        Autoregressive(),
        *(Linear(num_draft_tokens=tokens) for tokens in (2, 4, 6, 8)),
        *(
            # With the root 64 rows, which is what static shapes are padded to.
            Tree(depth=8, branch_factor=2, prune_threshold=threshold, node_budget=63)
            for threshold in (0.02, 0.1)
        ),
        BestFirst(),
        BestFirst(ngram=True),
    )

    @field_validator("candidates")
    @classmethod
    def _some_candidate_drafts(cls, value: tuple[StrategyBase, ...]) -> tuple[StrategyBase, ...]:
        if all(candidate.max_depth == 0 for candidate in value):
            raise ValueError(
                "none of the candidates drafts; add one that does, or use strategy: autoregressive"
            )
        return value

    @property
    def rules(self) -> tuple[StrategyBase, ...]:
        return self.candidates

    @property
    def max_depth(self) -> int:
        return max(candidate.max_depth for candidate in self.candidates)

    @property
    def max_children(self) -> int:
        return max(candidate.max_children for candidate in self.candidates)

    @property
    def max_nodes(self) -> int:
        return max(candidate.max_nodes for candidate in self.candidates)

    @property
    def ngram_tokens(self) -> int:
        return max(candidate.ngram_tokens for candidate in self.candidates)

    @property
    def varies(self) -> bool:
        return True

    @property
    def widths(self) -> list[int]:
        levels = [candidate.widths for candidate in self.candidates]
        return [max(widths) for widths in zip_longest(*levels, fillvalue=0)]

    @property
    def max_drafted(self) -> int:
        return max(candidate.max_drafted for candidate in self.candidates)

    def describe(self) -> str:
        kinds = Counter(candidate.strategy for candidate in self.candidates)
        listed = ", ".join(f"{count} {kind.replace('_', '-')}" for kind, count in kinds.items())
        return f"per round the best of {listed}"


Strategy = Annotated[
    Autoregressive | Linear | Tree | DynamicTree | BestFirst | Auto,
    Field(discriminator="strategy"),
]
"""Any strategy; the `strategy` key says which."""
