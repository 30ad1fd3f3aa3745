"""A draft tree as flat tensors. It knows tokens and paths, and nothing of models or caches."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dynatree import gpu
from dynatree.selection import columns_of

_MOST_PLACES = 1024
"""Places of levels that a tree remembers, some kilobytes each."""


class Level(NamedTuple):
    """Nodes of one depth, while a tree grows.

    Attributes:
        start: index of the first of them.
        tokens: [m] int64.
        log_probs: [m] float32, cumulative.
        parents: [m] int64, indices in the level above, or of a level that was `placed` in the tree.
        attends: [m, capacity + 2] bool, who the nodes may attend to; see `DraftTree.columns`.
    """

    start: int
    tokens: Tensor
    log_probs: Tensor
    parents: Tensor
    attends: Tensor

    def attention_mask(self, columns: Tensor, chosen: Tensor | None) -> Tensor:
        """As `DraftTree.attention_mask`, for the `chosen` [n] nodes of the level, or all of it."""
        attends = self.attends if chosen is None else self.attends.index_select(0, chosen)
        return columns_of(attends, columns)


class DraftTree:
    """One round's draft tree in preallocated tensors, whose shapes never depend on their values.

    Node 0 is the root: the last committed token, which no model has to agree with any more.
    A parent always has a smaller index than its children. Drafted nodes are in breadth-first order,
    so every level is a contiguous slice, and grafted ones (see `graft`) come after them. A node
    whose log-probability is minus infinity is dead: it keeps its place, so that shapes stay fixed,
    until a selection leaves it out. All tensors have `capacity + 1` rows; those from `size` on, the
    last one in particular, pad selections: they are dead, and nobody's ancestors.

    Attributes:
        capacity: most nodes that the tree holds, the root included.
        size: rows in use.
        shown: what `columns` returned for the tree that is held, where it can be used again.
        deepest: largest depth, as far as the host knows it; None after a graft or a selection.
        tokens: int64, the token of each node.
        parents: int64, the index of each node's parent; the root is its own parent.
        depths: int64, edges from the root; position of a node = root position + depth.
        log_probs: float32, cumulative draft log-probability of the path from the root.
        indices: int64, 0, 1, 2, ...
        ancestors: bool [capacity + 1, capacity + 1], row i marks the path from the root to node
            i, both included.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        rows = capacity + 1
        self.capacity = capacity
        self.size = 1
        self.deepest: int | None = 0
        self.shown: Tensor | None = None
        self.tokens = torch.zeros(rows, dtype=torch.long, device=device)
        self.parents = torch.zeros(rows, dtype=torch.long, device=device)
        self.depths = torch.zeros(rows, dtype=torch.long, device=device)
        self.log_probs = torch.full((rows,), -math.inf, dtype=torch.float32, device=device)
        self.log_probs[0] = 0.0
        self.indices = torch.arange(rows, device=device)
        # Column 0 stands for every committed token, column 1 + j for node j: a mask is a choice
        # of columns. The last node is nobody's ancestor, so its column hides what lies beyond.
        self._attends = torch.zeros(rows, rows + 1, dtype=torch.bool, device=device)
        self._attends[:, 0] = True
        self.ancestors = self._attends[:, 1:]
        # A living node is its own ancestor.
        self.ancestors[0, 0] = True
        self._rows: dict[int, Rows] = {}
        self._numbers = self.indices.unbind()
        root = self.first(1)
        self._root = Level(0, root.tokens, root.log_probs, root.parents, root.attends)
        self._levels: list[Level] = []
        # Where levels were placed before, as views that need not be made again.
        self._places: dict[tuple[int, int], Level] = {}
        # Whether the levels are views of the tensors, and nothing is left for `join` to do.
        self._placed = False

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Tokens, parents, depths, log-probabilities and who attends to whom, as `placed` needs
        them: a node's row of the last is its parent's, and itself at column 1 + its index."""
        return self.tokens, self.parents, self.depths, self.log_probs, self._attends

    def first(self, count: int) -> "Rows":
        """The first `count` rows."""
        # Of a few hundred small operations per round, every third would be a slice.
        rows = self._rows.get(count)
        if rows is None:
            rows = self._rows[count] = Rows(self, count)
        return rows

    def plant(self, token: Tensor) -> None:
        """Empties the tree and makes `token` [1] its root."""
        self.root.copy_(token)
        self.clear()

    @property
    def root(self) -> Tensor:
        """[1] int64, the root's token."""
        return self._root.tokens

    def clear(self) -> None:
        """Leaves the root alone."""
        self.size, self.deepest = 1, 0
        self._levels.clear()
        self._placed = False

    def placed(self, count: int) -> Level:
        """Takes the next `count` rows of `tensors`, which were written there, for the next level.

        All levels of a tree come in this way, or by `extend`.
        """
        key = self.size, count
        placed = self._places.get(key)
        if placed is None:
            if len(self._places) == _MOST_PLACES:
                self._places.clear()
            rows = slice(self.size, self.size + count)
            placed = self._places[key] = Level(
                self.size,
                self.tokens[rows],
                self.log_probs[rows],
                self.parents[rows],
                self._attends[rows],
            )
        self._levels.append(placed)
        self.size, self._placed = self.size + count, True
        return placed

    def extend(self, parents: Tensor, tokens: Tensor, log_probs: Tensor) -> Level:
        """Appends a level; the tree's own tensors have it after `join`.

        Args:
            parents: [m] int64, indices in the level above, which for the first is the root alone.
            tokens, log_probs: int64 and float32 [m], the latter cumulative.
        """
        attends = self.level.attends.index_select(0, parents)
        attends.diagonal(1 + self.size).fill_(True)
        level = Level(self.size, tokens, log_probs, parents, attends)
        self._levels.append(level)
        self.size += len(parents)
        return level

    @property
    def level(self) -> Level:
        """The last level."""
        return self._levels[-1] if self._levels else self._root

    @property
    def last(self) -> Tensor:
        """[m] int64, the nodes of the last level."""
        return self.indices[self.level.start : self.size]

    def known(self, log_probs: Tensor) -> Tensor:
        """Log-probabilities of all nodes so far, and after them `log_probs` [m]."""
        levels = (level.log_probs for level in self._levels)
        return torch.cat((self._root.log_probs, *levels, log_probs))

    def join(self) -> None:
        """Writes all levels since `plant` to the tensors."""
        levels = self._levels
        self.deepest = len(levels)
        if levels and not self._placed:
            rows, numbers = self.first(self.size), self._numbers
            sizes = [len(level.tokens) for level in levels]
            torch.cat([level.tokens for level in levels], out=rows.drafted_tokens)
            torch.cat([level.log_probs for level in levels], out=rows.drafted_log_probs)
            torch.cat([level.attends for level in levels], out=rows.drafted_attends)
            above = [0, *(level.start for level in levels)]
            starts = [
                numbers[start].expand(size) for start, size in zip(above, sizes, strict=False)
            ]
            depths = [numbers[depth].expand(size) for depth, size in enumerate(sizes, start=1)]
            torch.cat(depths, out=rows.drafted_depths)
            torch.cat(starts, out=rows.drafted_parents)
            rows.drafted_parents.add_(torch.cat([level.parents for level in levels]))

    def along(self, tokens: Tensor) -> Tensor:
        """Which nodes lie on the path that spells `tokens` [m]; no node is deeper than m.

        Returns:
            [size] bool; the root is one of them.
        """
        size = self.size
        spelt = torch.cat((self.tokens[:1], tokens))
        differs = spelt.index_select(0, self.depths[:size]) != self.tokens[:size]
        living = self.log_probs[:size] != -math.inf
        return living & ~(self.ancestors[:size, :size] & differs).any(dim=-1)

    def graft(self, tokens: Tensor, log_probs: Tensor, along: Tensor, first: int) -> None:
        """Adds the path that spells `tokens` from the root, as far as the tree lacks it.

        Nodes that it has become as probable as the path, if they were less. Rows of the levels
        `first` to m are appended, so the order is no longer breadth-first, and those of levels that
        the tree has already are dead.

        Args:
            tokens: [m] int64.
            log_probs: [m] float32, cumulative, falling; minus infinity grafts nothing.
            along: [size] bool, what `along` says of `tokens`.
            first: 1, or the level of the first lacking node where the host knows it.
        """
        size, steps = self.size, self.indices[1 : len(tokens) + 1]
        # The path that is there is of one node per level, and its last node is the deepest.
        held = along.sum(dim=0, keepdim=True)
        deepest = (along * self.indices[:size]).max(dim=0, keepdim=True).values
        known = torch.cat((self.log_probs[:1], log_probs)).index_select(0, self.depths[:size])
        known = torch.maximum(known, self.log_probs[:size])
        self.log_probs[:size] = torch.where(along, known, self.log_probs[:size])

        steps = steps[first - 1 :]
        level = slice(size, size + len(steps))
        self.tokens[level] = tokens[first - 1 :]
        self.depths[level] = steps
        self.parents[level] = torch.where(steps > held, steps + (size - first - 1), deepest)
        self.log_probs[level] = log_probs[first - 1 :].masked_fill(steps < held, -math.inf)
        self.ancestors[level] = self.ancestors.index_select(0, deepest)
        self.ancestors[level, level] = (steps[:, None] >= steps) & (steps >= held)
        self.size, self.deepest = level.stop, None

    def take(self, grown: "DraftTree", count: int) -> Tensor:
        """Becomes the `count` most probable living nodes of `grown`, in their order.

        A child is never more probable than its parent, and on a tie the stable order prefers the
        smaller index, hence the parent: so the selection holds the ancestors of its nodes.

        Returns:
            [min(count, grown.size)] the nodes' indices in `grown`; where there are fewer living
            ones, the rest is `grown.capacity`, and dead here too.
        """
        kernels = gpu.kernels(self.tokens.device)
        if kernels is not None and grown.size <= kernels.MOST_NODES:
            size = min(count, grown.size)
            found: Tensor = kernels.compact(grown.tensors, grown.size, size, self.tensors)
            self.size, self.deepest = size, None
            return found
        log_probs, nodes = grown.log_probs[: grown.size], grown.indices[: grown.size]
        if count < grown.size:
            nodes = log_probs.sort(descending=True, stable=True).indices[:count]
            log_probs = log_probs[nodes]
        nodes = torch.where(log_probs == -math.inf, grown.capacity, nodes).sort().values
        size = len(nodes)
        renumbered = torch.empty_like(grown.parents)
        renumbered[nodes] = self.indices[:size]
        self.tokens[:size] = grown.tokens[nodes]
        self.parents[:size] = renumbered[grown.parents[nodes]]
        self.depths[:size] = grown.depths[nodes]
        self.log_probs[:size] = grown.log_probs[nodes]
        # All rows: the last selection may have been larger, and its rows would pad this one.
        self.ancestors[:] = False
        self.ancestors[:size, :size] = grown.ancestors[nodes][:, nodes]
        self.size, self.deepest = size, None
        return nodes

    def columns(self, counted: Tensor, position: Tensor) -> Tensor:
        """Which column of `attention_mask`'s table each visible slot stands for.

        Args:
            counted: [visible] int64, 1, 2, 3, ...: the slots, made once for all rounds.
            position: [1] int64, the root's slot; node j lies j slots further.

        Returns:
            [visible] int64.
        """
        return (counted - position).clamp_(0, self.capacity + 1)

    def attention_mask(self, count: int, columns: Tensor) -> Tensor:
        """Who the first `count` nodes may attend to.

        Returns:
            [count, visible] bool: committed tokens and ancestors (the node itself too).
        """
        return columns_of(self.first(count).attends, columns)


class Rows:
    """The first rows of a tree's tensors, as views that are made once.

    Attributes:
        tokens, parents, depths, log_probs, indices: [count] of the tree's.
        attends: [count, capacity + 2] bool, who each node may attend to; see `DraftTree.columns`.
        living: [count] bool.
        drafted_tokens, drafted_parents, drafted_depths, drafted_log_probs, drafted_attends: of
            those the rows but the root's, [count - 1].
        drafted_ancestors: [count, count - 1] bool, which nodes but the root are on each path.
    """

    def __init__(self, tree: DraftTree, count: int) -> None:
        self.tokens, self.parents = tree.tokens[:count], tree.parents[:count]
        self.depths, self.log_probs = tree.depths[:count], tree.log_probs[:count]
        self.indices, self.attends = tree.indices[:count], tree._attends[:count]
        self.living = tree.ancestors[:count, :count].diagonal()
        self.drafted_tokens, self.drafted_parents = self.tokens[1:], self.parents[1:]
        self.drafted_depths, self.drafted_log_probs = self.depths[1:], self.log_probs[1:]
        self.drafted_attends = self.attends[1:]
        self.drafted_ancestors = tree.ancestors[:count, 1:count]
