"""Growing one draft tree per round with the draft model, one batched forward per level."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dynatree.controller import MAX_PAUSE
from dynatree.ngram import CONFIDENCE, continuation
from dynatree.runner import ModelRunner
from dynatree.runtime import Runtime
from dynatree.sampling import Sampler
from dynatree.strategies import StrategyBase
from dynatree.tree import DraftTree

if TYPE_CHECKING:
    from dynatree.observe import Observer


class Drafter:
    """Grows draft trees by a strategy's rule; the draft's KV cache persists between rounds.

    Attributes:
        forwards: draft forwards of the last tree.
        observer: told of every tree, if there is one; see `Decoder.watch`.
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
        self.observer: Observer | None = None
        self._trim = not runtime.static
        self._varies = strategy.varies
        # Widths and limits are worked out once. The threshold is a tensor: a comparison with a
        # number makes one each time.
        self._rules = [
            (
                rule,
                rule.widths,
                [rule.max_expanded(depth + 1) for depth in range(rule.max_depth)],
                torch.arange(min(rule.max_children, runner.vocab_size), device=runner.device),
                torch.tensor(rule.min_log_prob, device=runner.device),
            )
            for rule in strategy.rules
        ]
        self.follow(0)
        self._initial = torch.tensor(strategy.initial_state, device=runner.device)
        self._state = self._initial.clone()
        grown, kept = 1 + strategy.max_drafted, 1 + strategy.max_nodes
        self._grown = DraftTree(grown, runner.device)
        # Dead nodes and nodes over the budget are left out before the target reads the tree.
        self._selects = grown > kept or (runtime.static and strategy.varies)
        self._kept = DraftTree(min(grown, kept), runner.device)
        self._origins = torch.full_like(self._kept.tokens, self._grown.capacity)
        # Committed tokens that the draft may not have read: the root, before it an accepted leaf,
        # and before that what an n-gram gave. The offsets of their slots from the root's.
        unread = max(2, 1 + strategy.ngram_tokens)
        self._recent = torch.arange(1 - unread, 1, device=runner.device)
        # Those, and what rounds without a draft step left besides.
        self._missed = torch.arange(1 - unread - MAX_PAUSE, 1, device=runner.device)
        self._slots = torch.arange(runner.cache.capacity, device=runner.device)
        self._counted = self._slots + 1
        # Where tokens are gathered. Forwards are compiled for tokens in tensors made outside of
        # inference mode, and would be compiled once more for others.
        most = max(grown, len(self._missed))
        self._tokens = torch.zeros(most, dtype=torch.long, device=runner.device)
        self._grafts = strategy.ngram_tokens > 0
        self._first_grafted = torch.full((), grown, device=runner.device)
        self._ngram_accepted = torch.zeros((), dtype=torch.long, device=runner.device)

    @property
    def varies(self) -> bool:
        """Whether the size of the tree to verify depends on what the draft says."""
        return self._trim or self._varies

    @property
    def span(self) -> int:
        """Slots after the root's that a tree may use."""
        return self._grown.capacity

    @property
    def origins(self) -> Tensor:
        """int64, the index that each row of the tree to verify had in the tree that was grown."""
        return self._origins

    def prefill(self, prompt: Tensor) -> None:
        """Reads `prompt` [n]; what was learnt of another sequence is forgotten."""
        self.runner.prefill(prompt)
        self._state.copy_(self._initial)
        self._ngram_accepted.zero_()

    def follow(self, rule: int) -> None:
        """The next trees grow by the rule of this index among those of the strategy."""
        self.strategy, self._widths, self._limits, self._ranks, self._least = self._rules[rule]

    def catch_up(self, history: Tensor, position: Tensor, visible: int, rounds: int) -> None:
        """Reads what `rounds` rounds without a draft step, `MAX_PAUSE` at most, left unread."""
        missed = self._missed
        if self._trim:
            missed = missed[-len(self._recent) - rounds :]
        self._read(history, position, visible, missed)

    def grow(self, history: Tensor, position: Tensor, max_depth: int, visible: int) -> DraftTree:
        """Grows a tree from the last committed token.

        Args:
            history: int64, the committed tokens by position; the last of them is the root.
            position: [1] int64, the root's position, and its slot.
            max_depth: levels to grow at most; with static shapes, 0 gives the root alone.
            visible: KV slots that hold all committed tokens and the tree.

        Returns:
            The tree for the target to verify; on a device where host reads are free, all of its
            nodes live.
        """
        runner, tree = self.runner, self._grown
        if max_depth == 0:
            # Captured phases find every tree in the same tensors.
            self._kept.plant(history.index_select(0, position))
            if self._sampler is not None:
                self._sampler.plant(position)
            return self._kept
        columns = tree.columns(self._counted[:visible], position)
        slots = tree.indices + position
        recent = self._recent
        if self._trim and len(recent) > 2:
            recent = recent[-2 - int(self._ngram_accepted) :]
        logits = self._read(history, position, visible, recent)
        self.forwards = 1
        tree.plant(history.index_select(0, position))
        if self._sampler is not None:
            self._sampler.plant(position)
        level, chosen, log_probs = slice(0, 1), None, tree.log_probs[:1]
        for depth, width in enumerate(self._widths[:max_depth], start=1):
            start = tree.size
            tokens, log_probs = self._extend(level, chosen, log_probs, logits, width, depth)
            level = slice(start, tree.size)
            if start == tree.size or depth == max_depth:
                break
            chosen, log_probs = self._expanded(log_probs, depth)
            if len(log_probs) == 0:
                break
            depths, places = tree.depths[level], slots[level]
            mask = tree.attention_mask(level.start, level.stop, columns)
            if chosen is not None:
                tokens = self._gathered(tokens, chosen)
                depths, places, mask = (
                    values.index_select(0, chosen) for values in (depths, places, mask)
                )
            logits = runner.forward(tokens, depths + position, places, mask)
            self.forwards += 1
        if self._grafts:
            self._first_grafted.fill_(tree.size)
        if self.strategy.ngram_tokens > 0:
            self._graft(history[:visible], position, min(self.strategy.ngram_tokens, max_depth))
        selected = self._select()
        if self.observer is not None:
            self.observer.grown(self.strategy, tree, self._origins[: selected.size])
        return selected

    def _read(self, history: Tensor, position: Tensor, visible: int, recent: Tensor) -> Tensor:
        """Reads the committed tokens that the draft has not read.

        Where their number is not known, as many are read as there can be: some are read again.

        Args:
            recent: [n] int64, the offsets of their slots from the root's, up to 0.

        Returns:
            Logits [1, vocabulary] after the last of them.
        """
        slots = recent + position
        if len(recent) > 2:
            # Of a short text what follows is read instead, which no committed token attends to.
            slots = slots - slots[:1].clamp(max=0)
        tokens = self._gathered(history, slots)
        mask = self._slots[:visible] <= slots[:, None]
        logits = self.runner.forward(tokens, slots, slots, mask)
        if len(recent) > 2:
            return logits.index_select(0, position - slots[:1])
        return logits[-1:]

    def _gathered(self, tokens: Tensor, indices: Tensor) -> Tensor:
        return torch.index_select(tokens, 0, indices, out=self._tokens[: len(indices)])

    def _extend(
        self,
        level: slice,
        chosen: Tensor | None,
        parent_log_probs: Tensor,
        logits: Tensor,
        width: int,
        depth: int,
    ) -> tuple[Tensor, Tensor]:
        """Adds level `depth`: children of the `chosen` [w] nodes of `level`, or of all of them.

        A NaN is neither below a threshold nor dead: it stays in the tree, and is found there.

        Args:
            parent_log_probs: [w] cumulative; that of a node that is not expanded is minus infinity.
            logits: [w, vocabulary].

        Returns:
            The level's tokens and cumulative log-probabilities.
        """
        tree, strategy = self._grown, self.strategy
        children = len(self._ranks)
        log_probs = torch.log_softmax(logits.float(), dim=-1)
        if self._sampler is None:
            log_probs, tokens = log_probs.topk(children, dim=-1)
        else:
            nodes = tree.indices[level]
            nodes = nodes if chosen is None else nodes.index_select(0, chosen)
            tokens = self._sampler.draw(logits, children, nodes, depth)
            log_probs = log_probs.gather(-1, tokens)
        kept = strategy.keeps(log_probs, self._ranks, self._state)
        log_probs = offered = log_probs + parent_log_probs[:, None]
        if kept is not None:
            log_probs = log_probs.masked_fill(~kept, -math.inf)
        log_probs, tokens = log_probs.view(-1), tokens.view(-1)
        dead: Tensor | None = None
        if strategy.min_log_prob > -math.inf:
            dead = log_probs < self._least
        elif kept is not None:
            dead = log_probs == -math.inf
        if tree.size + len(log_probs) > 1 + strategy.max_nodes:
            # What a final selection would drop is not grown any further.
            known = torch.cat((tree.log_probs[: tree.size], log_probs))
            over = log_probs < known.topk(1 + strategy.max_nodes).values[-1]
            dead = over if dead is None else dead | over
        if dead is None:
            nodes = tree.indices[: len(log_probs)]
        elif self._trim:
            nodes = dead.logical_not_().nonzero().view(-1)
            # What is not a number is not dead either, and there may be more of it than fits.
            if len(nodes) > width:
                nodes = nodes[:width]
        else:
            log_probs = log_probs.masked_fill(dead, -math.inf)
            nodes = log_probs.topk(min(width, len(log_probs))).indices.sort().values
        if self.observer is not None:
            read = tree.indices[level] if chosen is None else chosen + level.start
            self.observer.offered(strategy, read, tokens, offered, kept, nodes)
        parents = nodes if children == 1 else nodes.div(children, rounding_mode="floor")
        if chosen is not None:
            parents = chosen.index_select(0, parents)
        return tree.extend(
            parents + level.start, tokens, log_probs, depth, None if dead is None else nodes
        )

    def _expanded(self, log_probs: Tensor, depth: int) -> tuple[Tensor | None, Tensor]:
        """Which nodes of level `depth` the draft reads; `log_probs` [n] are theirs, cumulative.

        Returns:
            [w] indices into the level, None for all of it, and their log-probabilities [w]: minus
            infinity where a node is read only to fill a static shape.
        """
        limit = self._limits[depth - 1]
        rule = self.strategy.expands(log_probs, depth, self._state)
        if rule is not None and self._trim:
            chosen = rule.nonzero().view(-1)
            if len(chosen) > limit:
                best = log_probs.index_select(0, chosen).topk(limit).indices
                chosen = chosen.index_select(0, best).sort().values
            return chosen, log_probs.index_select(0, chosen)
        if rule is not None:
            log_probs = log_probs.masked_fill(~rule, -math.inf)
        if len(log_probs) <= limit:
            return None, log_probs
        chosen = log_probs.topk(limit).indices.sort().values
        return chosen, log_probs.index_select(0, chosen)

    def _graft(self, history: Tensor, position: Tensor, count: int) -> None:
        """Adds what followed an earlier occurrence of the last tokens, up to `count` of them."""
        tree = self._grown
        tokens, found = continuation(history, position, count)
        if self._trim and not found:
            return
        log_probs = tree.indices[1 : count + 1] * math.log(CONFIDENCE)
        along = tree.along(tokens)
        first = int(along.sum()) if self._trim else 1
        tree.graft(tokens, log_probs.masked_fill(~found, -math.inf), along, first)

    def _select(self) -> DraftTree:
        grown = self._grown
        if not self._selects or (self._trim and grown.size <= 1 + self.strategy.max_nodes):
            self._origins[: grown.size] = grown.indices[: grown.size]
            return grown
        nodes = self._kept.take(grown, 1 + self.strategy.max_nodes)
        self._origins[: len(nodes)] = nodes
        return self._kept

    def grafted(self, path: Tensor, count: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """How many of the first `rows` nodes of the verified tree were grafted, and how many of
        those are among the first `count` [1] of `path` [m]; remembers that they were not read."""
        origins = self._origins[:rows]
        grafted = (origins >= self._first_grafted) & (origins < self._grown.capacity)
        walked = grafted.index_select(0, path) & (self._grown.indices[: len(path)] < count)
        self._ngram_accepted.copy_(walked.sum())
        return grafted.sum(), self._ngram_accepted

    def learn(self, accepted: Tensor, tree: DraftTree) -> None:
        """Tells the strategy that `accepted` [1] nodes of the verified `tree` were accepted."""
        if len(self._state) > 0:
            offered = tree.depths[: tree.size].max(dim=0, keepdim=True).values
            self._state.copy_(self.strategy.adapted(self._state, accepted, offered))

    def is_chain(self, path: Tensor) -> bool:
        """Whether the nodes `path` [m] of the verified tree, and the grown one, are the first m."""
        return int(path[-1]) == int(self._origins[path[-1]]) == len(path) - 1

    def keep(self, path: Tensor, position: Tensor, destinations: Tensor) -> None:
        """Moves the KV entries of the nodes `path` [m] of the verified tree to `destinations`."""
        self.runner.cache.gather(position + self._origins[path], destinations)
