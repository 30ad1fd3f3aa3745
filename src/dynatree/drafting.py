"""Growing one draft tree per round with the draft model, one batched forward per level."""

import math

import torch
from torch import Tensor

from dynatree.errors import DecodeError
from dynatree.runner import ModelRunner
from dynatree.strategies import StrategyBase
from dynatree.tree import DraftTree, most_probable


class Drafter:
    """Grows draft trees by a strategy's rule; the draft's KV cache persists between rounds."""

    def __init__(self, runner: ModelRunner, strategy: StrategyBase) -> None:
        self.runner = runner
        self.strategy = strategy
        # The draft reads nodes in the order they are grown; `_grown[i]` is where in that order
        # node i of the final tree stands, and nodes from `_read` on were never read (the leaves).
        self._grown: list[int] | None = None
        self._read = 0

    def grow(self, tree: DraftTree, pending: Tensor, max_depth: int) -> None:
        """Grows `tree` from its root.

        Args:
            tree: holds the root only.
            pending: [m] int64, committed tokens that the draft has not read; the last is the root.
            max_depth: levels to grow at most (at least 1), the strategy's own limit included.

        Raises:
            DecodeError: the draft's logits hold a NaN.
        """
        runner = self.runner
        logits = runner.append(pending)
        root_slot = runner.length - 1
        start = 0
        for depth in range(1, max_depth + 1):
            level = slice(start, len(tree))
            self._extend(tree, level, logits)
            start = level.stop
            if start == len(tree) or depth == max_depth:
                break
            logits = runner.forward(
                tree.tokens[start:],
                tree.depths[start:] + root_slot,
                root_slot + start,
                tree.attention_mask(start, root_slot),
            )
        self._read = start
        self._grown = None
        if len(tree) - 1 > self.strategy.max_nodes:
            nodes = most_probable(tree.log_probs, self.strategy.max_nodes + 1)
            tree.select(nodes)
            self._grown = nodes.tolist()

    def _extend(self, tree: DraftTree, level: slice, logits: Tensor) -> None:
        """Adds the children of the nodes of `level`, whose draft logits are [w, vocabulary]."""
        strategy = self.strategy
        children = min(strategy.max_children, logits.shape[-1])
        log_probs, tokens = torch.log_softmax(logits.float(), dim=-1).topk(children, dim=-1)
        log_probs = (tree.log_probs[level, None] + log_probs).flatten()
        if log_probs.isnan().any():
            raise DecodeError("the draft model's logits hold a NaN; check its weights and dtype")
        kept: Tensor | None = None
        if strategy.min_log_prob > -math.inf:
            kept = (log_probs >= strategy.min_log_prob).nonzero().flatten()
        grown = len(tree)
        if grown - 1 + (len(log_probs) if kept is None else len(kept)) > strategy.max_nodes:
            candidates = log_probs if kept is None else log_probs[kept]
            # The root has log-probability 0, so it is always among the selected.
            best = most_probable(torch.cat((tree.log_probs, candidates)), strategy.max_nodes + 1)
            best = best[best >= grown] - grown
            kept = best if kept is None else kept[best]
        if kept is None:
            kept = torch.arange(len(log_probs), device=log_probs.device)
        tree.extend(kept // children + level.start, tokens.flatten()[kept], log_probs[kept])

    def keep(self, path: list[int]) -> int:
        """Commits the draft's KV entries of the accepted nodes `path` (final tree indices).

        Returns:
            How many of them there are. A leaf was never read, so its token stays pending.
        """
        grown = path if self._grown is None else [self._grown[node] for node in path]
        root_slot = self.runner.length - 1
        slots = [root_slot + node for node in grown if node < self._read]
        self.runner.keep(slots)
        return len(slots)
