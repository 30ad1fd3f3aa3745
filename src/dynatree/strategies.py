"""Drafting strategies: what to draft, as validated data.

Every strategy is a rule for growing one draft tree per round, so there is one decode loop.
Autoregressive decoding is the tree of depth 0, linear speculative decoding (Leviathan et al.,
2023, arXiv:2211.17192; Chen et al., 2023, arXiv:2302.01318) is the tree with one branch, and
multi-path trees follow SpecInfer (Miao et al., 2024, arXiv:2305.09781).

This module imports no torch: the Snakefile validates configurations with it.
"""

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

MAX_NODES = 4096
"""Upper limit of a node budget; a larger tree costs more mask than any model could win back."""


class StrategyBase(BaseModel):
    """A growth rule. Subclasses fix the shape; the drafter reads nothing but this interface."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    @property
    def max_depth(self) -> int:
        """Deepest level of the draft tree; the root, which is already committed, has depth 0."""
        raise TypeError(f"{type(self).__name__} does not say its depth")

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
    def widths(self) -> list[int]:
        """Most nodes that each level can hold, whatever the draft says: static shapes.

        The probabilities of a level add up to at most 1, so at most 1 / threshold of its nodes
        reach the threshold.
        """
        # The small term keeps 1 / 0.1 from falling under 10 by rounding.
        likely = math.floor(math.exp(min(-self.min_log_prob, 20.0)) + 1e-6)
        widths, width = [], 1
        for _ in range(self.max_depth):
            width = min(width * self.max_children, self.max_nodes, likely)
            widths.append(width)
        return widths

    @property
    def max_drafted(self) -> int:
        """Most nodes that a round can add before the budget selects: bounds the KV slots."""
        return sum(self.widths)

    def describe(self) -> str:
        """The configuration in words, as the tables print it."""
        raise TypeError(f"{type(self).__name__} does not describe itself")


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


class Tree(StrategyBase):
    """A multi-path draft tree, pruned by cumulative probability under a node budget.

    Level d + 1 holds the `branch_factor` most probable continuations of every node of level d,
    starting at the root, less those whose cumulative draft probability (the product of the
    draft's probabilities along the path) is below `prune_threshold`. When more than
    `node_budget` nodes would result, the most probable ones stay, as in EAGLE-2 (Li et al.,
    2024, arXiv:2406.16858, section 4.2).
    """

    strategy: Literal["tree"] = "tree"
    depth: Annotated[int, Field(ge=1, le=64)] = 7
    branch_factor: Annotated[int, Field(ge=1, le=64)] = 2
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
    def max_depth(self) -> int:
        return self.depth

    @property
    def max_children(self) -> int:
        return self.branch_factor

    @property
    def min_log_prob(self) -> float:
        return math.log(self.prune_threshold) if self.prune_threshold > 0 else -math.inf

    @property
    def max_nodes(self) -> int:
        return self.node_budget

    def describe(self) -> str:
        pruning = (
            f"threshold {self.prune_threshold:g}" if self.prune_threshold > 0 else "no pruning"
        )
        return (
            f"depth {self.depth}, branch {self.branch_factor}, {pruning}, budget {self.node_budget}"
        )


Strategy = Annotated[Autoregressive | Linear | Tree, Field(discriminator="strategy")]
"""Any strategy; the `strategy` key says which."""
