"""Growing one draft tree per round with the draft model, one batched forward per level."""

import math
import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dynatree import gpu, kernel
from dynatree.controller import MAX_PAUSE
from dynatree.ngram import CONFIDENCE, continuation
from dynatree.runner import ModelRunner
from dynatree.runtime import Runtime
from dynatree.sampling import Sampler
from dynatree.selection import most_probable
from dynatree.strategies import StrategyBase
from dynatree.tree import DraftTree, Level

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
        self._sampler = sampler
        self.forwards = 0
        self.observer: Observer | None = None
        self._trim = not runtime.static
        # Of a dozen small operations per level, and as many per tree, one per level remains.
        self._fuses = self._trim and sampler is None and kernel.serves(runner.device)
        # Nodes of the last level that live; where one is in place, they are its first.
        self._living = torch.ones(1, dtype=torch.int32, device=runner.device)
        self._visible = runtime.visible
        self._varies = strategy.varies
        self._rules = [_Rule(rule, runner) for rule in strategy.rules]
        self.follow(0)
        self._initial = torch.tensor(
            strategy.initial_state, dtype=torch.float32, device=runner.device
        )
        self._state = self._initial.clone()
        grown, kept = 1 + strategy.max_drafted, 1 + strategy.max_nodes
        # The same where shapes are static, if a program can look through as many nodes.
        self._kernels = gpu.kernels(runner.device) if runtime.static and sampler is None else None
        most = max(grown, *(len(rule.parents) for rule in self._rules))
        if self._kernels is not None and most > self._kernels.MOST_NODES:
            self._kernels = None
        self._grown = DraftTree(grown, runner.device)
        # Dead nodes and nodes over the budget are left out before the target reads the tree.
        self._selects = grown > kept or (runtime.static and strategy.varies)
        self._kept = DraftTree(min(grown, kept), runner.device)
        self._origins = torch.full_like(self._kept.tokens, self._grown.capacity)
        # Whether the tree to verify is the one that was grown, with no selection made.
        self._whole = not self._selects
        # Committed tokens that the draft may not have read: the root, before it an accepted leaf,
        # and before that what an n-gram gave. The offsets of their slots from the root's.
        unread = max(2, 1 + strategy.ngram_tokens)
        self._recent = torch.arange(1 - unread, 1, device=runner.device)
        # Those, and what rounds without a draft step left besides.
        self._unread = torch.arange(1 - unread - MAX_PAUSE, 1, device=runner.device)
        self._slots = torch.arange(runner.cache.capacity, device=runner.device)
        self._counted = self._slots + 1
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
        return self._grown.indices if self._whole else self._origins

    def prefill(self, prompt: Tensor) -> None:
        """Reads `prompt` [n]; what was learnt of another sequence is forgotten."""
        self.runner.prefill(prompt)
        self._state.copy_(self._initial)
        self._ngram_accepted.zero_()

    def follow(self, rule: int) -> None:
        """The next trees grow by the rule of this index among those of the strategy."""
        self._rule = self._rules[rule]

    def catch_up(self, history: Tensor, position: Tensor, visible: int, rounds: int) -> None:
        """Reads what `rounds` rounds without a draft step, `MAX_PAUSE` at most, left unread."""
        unread = self._unread
        if self._trim:
            unread = unread[-len(self._recent) - rounds :]
        self._read(history, position, visible, unread)

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
        # Not `len` of a tensor anywhere here, which takes four times as long.
        recent, first = self._recent, 0
        kernels = self._in_place()
        if kernels is not None and recent.shape[0] == 2:
            begun = kernels.begin(
                history, position, recent, self._rule.depths, tree.root, tree.capacity + 1, visible
            )
            tree.clear()
            columns, slots, positions = begun.columns, begun.slots, begun.positions.unbind()
            logits = runner.forward(begun.tokens, begun.recent, begun.recent, begun.mask)[-1:]
        else:
            columns = tree.columns(self._counted[:visible], position)
            slots = tree.indices + position
            positions = (self._rule.depths + position).unbind()
            if self._trim:
                # What the forwards may see: with exact shapes, no more than is in use.
                first = int(position)
                if recent.shape[0] > 2:
                    recent = recent[-2 - int(self._ngram_accepted) :]
            logits = self._read(history, position, self._seen(first + 1, visible), recent)
            tree.plant(history.index_select(0, position))
        # A captured phase leaves nothing for another to find but in the tensors that were there.
        tree.shown = columns if self._trim else None
        self.forwards = 1
        if self._sampler is not None:
            self._sampler.plant(position)
        chosen, log_probs, seen = None, tree.first(1).log_probs, columns
        for depth, width in enumerate(self._rule.widths[:max_depth], start=1):
            level = self._extend(chosen, log_probs, logits, width, depth)
            if level is None or depth == max_depth:
                break
            chosen, log_probs = self._expanded(level.log_probs, depth)
            count = log_probs.shape[0]
            if count == 0:
                break
            tokens, places = level.tokens, slots[level.start : tree.size]
            if chosen is not None:
                tokens, places = tokens.index_select(0, chosen), places.index_select(0, chosen)
            used = self._seen(first + tree.size, visible)
            if used != seen.shape[0]:
                seen = columns[:used]
            mask = level.attention_mask(seen, chosen)
            living = self._counted_of(count)
            logits = runner.forward(tokens, positions[depth][:count], places, mask, living)
            self.forwards += 1
        tree.join()
        if self._grafts:
            self._first_grafted.fill_(tree.size)
        ngram_tokens = self._rule.strategy.ngram_tokens
        if ngram_tokens > 0:
            self._graft(history[:visible], position, min(ngram_tokens, max_depth))
        selected = self._select()
        if self.observer is not None:
            self.observer.grown(self._rule.strategy, tree, self.origins[: selected.size])
        return selected

    def _seen(self, used: int, most: int) -> int:
        """KV slots to show a forward where `used` are in use, of `most` that there may be."""
        return self._visible(used) if self._trim else most

    def _read(self, history: Tensor, position: Tensor, visible: int, recent: Tensor) -> Tensor:
        """Reads the committed tokens that the draft has not read.

        Where their number is not known, as many are read as there can be: some are read again.

        Args:
            recent: [n] int64, the offsets of their slots from the root's, up to 0.

        Returns:
            Logits [1, vocabulary] after the last of them.
        """
        slots, several = recent + position, recent.shape[0] > 2
        if several:
            # Of a short text what follows is read instead, which no committed token attends to.
            slots = slots - slots[:1].clamp(max=0)
        tokens = history.index_select(0, slots)
        mask = self._slots[:visible] <= slots[:, None]
        logits = self.runner.forward(tokens, slots, slots, mask)
        if several:
            return logits.index_select(0, position - slots[:1])
        return logits[-1:]

    def _extend(
        self,
        chosen: Tensor | None,
        parent_log_probs: Tensor,
        logits: Tensor,
        width: int,
        depth: int,
    ) -> Level | None:
        """Adds level `depth`: children of the `chosen` [w] nodes of the last level, or of all.

        A NaN is neither below a threshold nor dead: it stays in the tree, and is found there.

        Args:
            parent_log_probs: [w] cumulative; that of a node that is not expanded is minus infinity.
            logits: [w, vocabulary].

        Returns:
            The level; None if no node stays.
        """
        tree, rule = self._grown, self._rule
        if self._fuses and rule.plain and self.observer is None:
            count = kernel.grow_level(
                logits,
                chosen,
                tree.level.start,
                tree.size,
                rule.children,
                rule.lowest,
                width,
                rule.most,
                tree.tensors,
            )
            return tree.placed(count) if count > 0 else None
        kernels = self._in_place()
        if kernels is not None:
            values, tokens = most_probable(logits, rule.children, self._counted_of(len(logits)))
            width = min(width, values.numel())
            kernels.grow(
                values,
                tokens,
                parent_log_probs,
                tree.level.start,
                tree.size,
                rule.lowest,
                width,
                tree.tensors,
                self._living,
            )
            return tree.placed(width)
        nodes, tokens, log_probs = self._staying(chosen, parent_log_probs, logits, width, depth)
        if len(nodes) == 0:
            return None
        parents = nodes
        if rule.children > 1:
            whole = len(nodes) == rule.children * len(logits)
            parents = rule.parents
            parents = parents[: len(nodes)] if whole else parents.index_select(0, nodes)
        if chosen is not None:
            parents = chosen.index_select(0, parents)
        return tree.extend(parents, tokens, log_probs)

    def _in_place(self) -> Any:
        """The kernels, where they write a level in its place: its living nodes first."""
        return self._kernels if self._rule.ordered and self.observer is None else None

    def _counted_of(self, rows: int) -> Tensor | None:
        """How many of a level's `rows` live, where that is known and spares the draft something."""
        kernels = self._in_place()
        if kernels is None or not self.runner.counts or rows <= kernels.TILE_ROWS:
            return None
        return self._living

    def _staying(
        self,
        chosen: Tensor | None,
        parent_log_probs: Tensor,
        logits: Tensor,
        width: int,
        depth: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The nodes of a level by any rule; arguments as `_extend`.

        Returns:
            int64 [m], which of the w * children continuations stay; int64 and float32 [m], their
            tokens and cumulative log-probabilities.
        """
        tree, rule, strategy = self._grown, self._rule, self._rule.strategy
        children = rule.children
        if self._sampler is None:
            log_probs, tokens = most_probable(logits, children)
        else:
            if self.runner.calibration != 1.0:
                # A target that samples accepts less than one that takes its first choice.
                logits = logits * self.runner.calibration
            log_probs = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
            tokens = self._sampler.draw(logits, children, self._expanding(chosen), depth)
            log_probs = log_probs.gather(-1, tokens)
        kept = strategy.keeps(log_probs, rule.ranks, self._state)
        log_probs = offered = log_probs + parent_log_probs[:, None]
        if kept is not None:
            log_probs = log_probs.masked_fill(~kept, -math.inf)
        log_probs, tokens = log_probs.view(-1), tokens.view(-1)
        dead = log_probs < rule.least
        if tree.size + len(log_probs) > rule.most:
            # What a final selection would drop is not grown any further.
            dead = dead | (log_probs < tree.known(log_probs).topk(rule.most).values[-1])
        if self._trim:
            nodes = dead.logical_not_().nonzero().view(-1)
            # What is not a number is not dead either, and there may be more of it than fits.
            if len(nodes) > width:
                nodes = nodes[:width]
        else:
            log_probs = log_probs.masked_fill(dead, -math.inf)
            nodes = tree.indices[: len(log_probs)]
            if len(nodes) > width:
                nodes = log_probs.topk(width).indices.sort().values
        if self.observer is not None:
            read = self._expanding(chosen)
            self.observer.offered(strategy, read, tokens, offered, kept, nodes)
        if len(nodes) < len(log_probs):
            tokens, log_probs = tokens.index_select(0, nodes), log_probs.index_select(0, nodes)
        return nodes, tokens, log_probs

    def _expanding(self, chosen: Tensor | None) -> Tensor:
        """The `chosen` nodes of the last level, or all of it, as indices in the tree."""
        nodes = self._grown.last
        return nodes if chosen is None else nodes.index_select(0, chosen)

    def _expanded(self, log_probs: Tensor, depth: int) -> tuple[Tensor | None, Tensor]:
        """Which nodes of level `depth` the draft reads; `log_probs` [n] are theirs, cumulative.

        Returns:
            [w] indices into the level, None for all of it, and their log-probabilities [w]: minus
            infinity where a node is read only to fill a static shape.
        """
        limit = self._rule.limits[depth - 1]
        rule = self._rule.strategy.expands(log_probs, depth, self._state)
        if rule is not None and self._trim:
            chosen = rule.nonzero().view(-1)
            if len(chosen) > limit:
                best = log_probs.index_select(0, chosen).topk(limit).indices
                chosen = chosen.index_select(0, best).sort().values
            return chosen, log_probs.index_select(0, chosen)
        if rule is not None:
            log_probs = log_probs.masked_fill(~rule, -math.inf)
        if log_probs.shape[0] <= limit:
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
        self._whole = not self._selects or (self._trim and grown.size <= self._rule.most)
        if self._whole:
            return grown
        nodes = self._kept.take(grown, self._rule.most)
        self._origins[: len(nodes)] = nodes
        return self._kept

    def grafted(self, path: Tensor, count: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """How many of the first `rows` nodes of the verified tree were grafted, and how many of
        those are among the first `count` [1] of `path` [m]; remembers that they were not read."""
        origins = self.origins[:rows]
        grafted = (origins >= self._first_grafted) & (origins < self._grown.capacity)
        walked = grafted.index_select(0, path) & (self._grown.indices[: len(path)] < count)
        self._ngram_accepted.copy_(walked.sum())
        return grafted.sum(), self._ngram_accepted

    def learn(self, count: Tensor, tree: DraftTree) -> None:
        """Tells the strategy that a round with the verified `tree` committed `count` [1] tokens."""
        if len(self._state) > 0:
            offered = tree.first(tree.size).depths.max(dim=0, keepdim=True).values
            self._state.copy_(self._rule.strategy.adapted(self._state, count - 1, offered))

    def is_chain(self, path: Tensor) -> bool:
        """Whether the nodes `path` [m] of the verified tree, and the grown one, are the first m."""
        last = path.shape[0] - 1
        return int(path[-1]) == last and (self._whole or int(self._origins[last]) == last)

    def origins_of(self, path: Tensor) -> Tensor:
        """The `origins` of the rows `path` [m] of the verified tree."""
        return path if self._whole else self._origins.index_select(0, path)


class _Rule:
    """What a strategy says of every tree, worked out once.

    Attributes:
        widths: most nodes that each level can hold.
        limits: most nodes of each level that are expanded.
        children: of a node, before pruning.
        ranks: int64 [children].
        parents: int64, which of a level's expanded nodes each candidate is a child of.
        depths: int64 [max_depth + 1, n], a row for each depth, as long as one can be expanded.
        lowest: the lowest log-probability that stays. Where nothing is pruned, any finite one:
            what the draft itself calls impossible is no node.
        least: [] float32, the same: a comparison with a number makes a tensor each time.
        plain: whether nothing but threshold and budget decides which children stay.
        ordered: whether, besides, all nodes of a level are expanded.
        most: nodes that one verification may hold, the root included.
    """

    def __init__(self, strategy: StrategyBase, runner: ModelRunner) -> None:
        self.strategy = strategy
        self.widths = strategy.widths
        self.limits = [strategy.max_expanded(depth + 1) for depth in range(strategy.max_depth)]
        self.children = min(strategy.max_children, runner.vocab_size)
        self.ranks = torch.arange(self.children, device=runner.device)
        expanded = max([1, *map(min, self.widths, self.limits)])
        self.parents = torch.arange(expanded, device=runner.device).repeat_interleave(self.children)
        depths = torch.arange(strategy.max_depth + 1, device=runner.device)
        self.depths = depths[:, None].repeat(1, expanded)
        self.lowest = max(strategy.min_log_prob, torch.finfo(torch.float32).min)
        self.least = torch.tensor(self.lowest, dtype=torch.float32, device=runner.device)
        self.plain = type(strategy).keeps is StrategyBase.keeps
        self.most = 1 + strategy.max_nodes
        self.ordered = self.plain and all(map(operator.le, self.widths[:-1], self.limits))
