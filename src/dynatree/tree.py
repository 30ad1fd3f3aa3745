"""A draft tree as flat tensors. It knows tokens and paths, and nothing of models or caches."""

import torch
from torch import Tensor


class DraftTree:
    """One round's draft tree, grown level by level into preallocated tensors.

    Node 0 is the root: the last committed token, which no model has to agree with any more.
    Nodes are in breadth-first order, so a parent always has a smaller index than its children
    and every level is a contiguous slice. With n nodes (`len(tree)`):

    Attributes:
        tokens: [n] int64, the token of each node.
        parents: [n] int64, the index of each node's parent; the root is its own parent.
        depths: [n] int64, edges from the root; position of a node = root position + depth.
        log_probs: [n] float32, cumulative draft log-probability of the path from the root.
        ancestors: [n, n] bool, row i marks the path from the root to node i, both included.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self._tokens = torch.zeros(capacity, dtype=torch.long, device=device)
        self._parents = torch.zeros(capacity, dtype=torch.long, device=device)
        self._depths = torch.zeros(capacity, dtype=torch.long, device=device)
        self._log_probs = torch.zeros(capacity, dtype=torch.float32, device=device)
        self._ancestors = torch.zeros(capacity, capacity, dtype=torch.bool, device=device)
        self._eye = torch.eye(capacity, dtype=torch.bool, device=device)
        self._size = 0

    def __len__(self) -> int:
        return self._size

    @property
    def tokens(self) -> Tensor:
        return self._tokens[: self._size]

    @property
    def parents(self) -> Tensor:
        return self._parents[: self._size]

    @property
    def depths(self) -> Tensor:
        return self._depths[: self._size]

    @property
    def log_probs(self) -> Tensor:
        return self._log_probs[: self._size]

    @property
    def ancestors(self) -> Tensor:
        return self._ancestors[: self._size, : self._size]

    def plant(self, token: int) -> None:
        """Empties the tree and makes `token` its root."""
        self._tokens[0] = token
        self._ancestors[0, 0] = True
        self._size = 1

    def extend(self, parents: Tensor, tokens: Tensor, log_probs: Tensor) -> None:
        """Appends one level: [m] parent indices, tokens and cumulative log-probabilities."""
        start, stop = self._size, self._size + len(parents)
        self._tokens[start:stop] = tokens
        self._parents[start:stop] = parents
        self._depths[start:stop] = self._depths[parents] + 1
        self._log_probs[start:stop] = log_probs
        rows = self._ancestors[start:stop]
        # Cleared up to `stop` only: that is all that any reader of a tree of this size sees.
        rows[:, :stop] = self._eye[start:stop, :stop]
        rows[:, :start] = self._ancestors[parents, :start]
        self._size = stop

    def select(self, keep: Tensor) -> None:
        """Keeps the nodes at the ascending indices `keep` [k], which must hold their ancestors."""
        size = len(keep)
        renumbered = torch.empty_like(self.parents)
        renumbered[keep] = torch.arange(size, device=keep.device)
        self._tokens[:size] = self._tokens[keep]
        self._parents[:size] = renumbered[self._parents[keep]]
        self._depths[:size] = self._depths[keep]
        self._log_probs[:size] = self._log_probs[keep]
        self._ancestors[:size, :size] = self._ancestors[keep][:, keep]
        self._size = size

    def attention_mask(self, start: int, prefix: int) -> Tensor:
        """Who the nodes from index `start` on may attend to.

        Args:
            start: first node of the query.
            prefix: committed slots before the root; every node sees all of them.

        Returns:
            [n - start, prefix + n] bool: prefix and ancestors (the node itself included).
        """
        size = self._size
        mask = torch.ones(size - start, prefix + size, dtype=torch.bool, device=self._tokens.device)
        mask[:, prefix:] = self._ancestors[start:size, :size]
        return mask


def most_probable(log_probs: Tensor, count: int) -> Tensor:
    """Ascending indices [count] of the most probable nodes.

    A child is never more probable than its parent, and on a tie the stable order prefers the
    smaller index, hence the parent: so the selection always holds the ancestors of its nodes.
    """
    order = torch.sort(log_probs, descending=True, stable=True).indices
    return order[:count].sort().values
