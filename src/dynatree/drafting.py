"""Growing one draft tree per round with the draft model, one batched forward per level."""

import math

import torch
from torch import Tensor

from dynatree.runner import ModelRunner
from dynatree.runtime import Runtime
from dynatree.sampling import Sampler
from dynatree.strategies import StrategyBase
from dynatree.tree import DraftTree


class Drafter:
    """Grows draft trees by a strategy's rule; the draft's KV cache persists between rounds.

    Attributes:
        forwards: draft forwards of the last tree.
    """

    def __init__(
        self,
        runner: ModelRunner,
        strategy: StrategyBase,
        runtime: Runtime,
        sampler: Sampler | None = None,
    ) -> None:
        self.runner = runner
        self.strategy = strategy
        self._sampler = sampler
        self.forwards = 0
        self._trim = not runtime.static
        self._widths = strategy.widths
        grown, kept = 1 + strategy.max_drafted, 1 + strategy.max_nodes
        self._grown = DraftTree(grown, runner.device)
        # Dead nodes and nodes over the budget are left out before the target reads the tree.
        self._selects = grown > kept or (runtime.static and strategy.min_log_prob > -math.inf)
        self._kept = DraftTree(min(grown, kept), runner.device)
        self._origins = torch.full_like(self._kept.tokens, self._grown.capacity)
        self._recent = torch.tensor([-1, 0], device=runner.device)

    @property
    def varies(self) -> bool:
        """Whether the size of the tree to verify depends on what the draft says."""
        return self._trim or self.strategy.min_log_prob > -math.inf

    @property
    def span(self) -> int:
        """Slots after the root's that a tree may use."""
        return self._grown.capacity

    @property
    def origins(self) -> Tensor:
        """int64, the index that each row of the tree to verify had in the tree that was grown."""
        return self._origins

    def grow(self, recent: Tensor, position: Tensor, max_depth: int, visible: int) -> DraftTree:
        """Grows a tree from the last committed token.

        Args:
            recent: [2] int64, the last two committed tokens; the second is the root. The first
                is read again, at no cost, because a drafted leaf that was accepted never was.
            position: [1] int64, the root's position, and its slot.
            max_depth: levels to grow at most (at least 1).
            visible: KV slots that hold all committed tokens and the tree.

        Returns:
            The tree for the target to verify; on a device where host reads are free, all of its
            nodes live.
        """
        runner, tree = self.runner, self._grown
        columns = tree.columns(visible, position)
        slots = tree.indices + position
        recent_slots = position + self._recent
        logits = runner.forward(
            recent, recent_slots, recent_slots, columns <= self._recent[:, None] + 1
        )[1:]
        self.forwards = 1
        tree.plant(recent[1:])
        if self._sampler is not None:
            self._sampler.plant(position)
        start = 0
        for depth, width in enumerate(self._widths[:max_depth], start=1):
            stop = tree.size
            self._extend(tree, slice(start, stop), logits, width, depth)
            start, stop = stop, tree.size
            if start == stop or depth == max_depth:
                break
            logits = runner.forward(
                tree.tokens[start:stop],
                tree.depths[start:stop] + position,
                slots[start:stop],
                tree.attention_mask(start, stop, columns),
            )
            self.forwards += 1
        return self._select()

    def _extend(
        self, tree: DraftTree, level: slice, logits: Tensor, width: int, depth: int
    ) -> None:
        """Adds level `depth`: children of the nodes of `level`, whose logits are [w, vocabulary].

        A NaN is neither below a threshold nor dead: it stays in the tree, and is found there.
        """
        strategy = self.strategy
        children = min(strategy.max_children, logits.shape[-1])
        log_probs = torch.log_softmax(logits.float(), dim=-1)
        if self._sampler is None:
            log_probs, tokens = log_probs.topk(children, dim=-1)
        else:
            tokens = self._sampler.draw(logits, children, tree.indices[level], depth)
            log_probs = log_probs.gather(-1, tokens)
        log_probs = (log_probs + tree.log_probs[level, None]).view(-1)
        tokens = tokens.view(-1)
        dead: Tensor | None = None
        if strategy.min_log_prob > -math.inf:
            dead = log_probs < strategy.min_log_prob
        if tree.size + len(log_probs) > 1 + strategy.max_nodes:
            # What a final selection would drop is not grown any further.
            known = torch.cat((tree.log_probs[: tree.size], log_probs))
            over = log_probs < known.topk(1 + strategy.max_nodes).values[-1]
            dead = over if dead is None else dead | over
        if dead is None:
            nodes = tree.indices[: len(log_probs)]
        elif self._trim:
            nodes = dead.logical_not().nonzero().view(-1)[:width]
        else:
            log_probs = log_probs.masked_fill(dead, -math.inf)
            nodes = log_probs.topk(min(width, len(log_probs))).indices.sort().values
        if dead is not None:
            log_probs, tokens = log_probs.index_select(0, nodes), tokens.index_select(0, nodes)
        parents = nodes if children == 1 else nodes.div(children, rounding_mode="floor")
        tree.extend(parents + level.start, tokens, log_probs, depth)

    def _select(self) -> DraftTree:
        grown = self._grown
        if not self._selects or (self._trim and grown.size <= 1 + self.strategy.max_nodes):
            self._origins[: grown.size] = grown.indices[: grown.size]
            return grown
        nodes = self._kept.take(grown, 1 + self.strategy.max_nodes)
        self._origins[: len(nodes)] = nodes
        return self._kept

    def keep(self, path: Tensor, position: Tensor, destinations: Tensor) -> None:
        """Moves the KV entries of the nodes `path` [m] of the verified tree to `destinations`."""
        self.runner.cache.gather(position + self._origins[path], destinations)
