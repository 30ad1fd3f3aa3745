"""Verification: the longest path of the draft tree that the target itself would take."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dynatree import gpu, kernel
from dynatree.tree import DraftTree, Rows


@dataclass(frozen=True)
class Accepted:
    """What one verification commits.

    Attributes:
        path: [m] int64, the root and the accepted nodes from shallow to deep, then any padding.
        tokens: [m] int64, the target's choice after each node of the path: the accepted tokens
            and the bonus token, then any padding.
        count: [1] int64, how many of `tokens` are committed: accepted nodes and the bonus token.
    """

    path: Tensor
    tokens: Tensor
    count: Tensor


def accept_greedy(tree: DraftTree, choices: Tensor, longest: int, static: bool) -> Accepted:
    """Walks the tree along the target's choices (SpecInfer, Algorithm 2, VerifyGreedy).

    They are its argmax, or what `Sampler.choose` made of its distributions: the walk is the same.

    A node is accepted when it and all its ancestors are what the target chooses after their
    parents. Siblings hold different tokens, so the accepted nodes form one path, and the order of
    the nodes is its order.

    Args:
        tree: n or more rows.
        choices: [n] int64, the target's choice after each of the first n rows.
        longest: nodes of the longest possible path, the root included; m is at most this.
        static: m depends on the shapes alone, and nothing is read by the host. Otherwise there is
            no padding.
    """
    count = choices.shape[0]
    if count == 1:
        return Accepted(torch.zeros_like(choices), choices, torch.ones_like(choices))
    kernels = gpu.kernels(choices.device) if static else None
    if kernels is not None:
        return Accepted(*kernels.walk(tree.tensors, choices, longest))
    rows = tree.first(count)
    if static:
        # A padding row is not even its own ancestor.
        accepted = _accepted(rows, choices) & rows.living
        path = torch.where(accepted, rows.indices, count - 1).sort().values[:longest]
        number = accepted.sum(dim=0, keepdim=True)
    else:
        if kernel.serves(choices.device):
            path = kernel.walk(rows.tokens, rows.parents, choices)
        else:
            path = _accepted(rows, choices).nonzero().view(-1)
        length = path.shape[0]
        number = tree.indices[length : length + 1]
    return Accepted(path, choices.index_select(0, path), number)


def _accepted(rows: Rows, choices: Tensor) -> Tensor:
    """[n] bool, which nodes are, like all their ancestors, what the target chooses."""
    refused = choices.index_select(0, rows.drafted_parents) != rows.drafted_tokens
    return (rows.drafted_ancestors & refused).any(dim=-1).logical_not_()


def ranks_and_children(tree: DraftTree, path: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Where each node of `path` [m] stands among its siblings, and how many children it has.

    Args:
        count: rows of the tree that were verified; padding rows are nobody's children.

    Returns:
        int64 [m] ranks, 0 for the first child and for the root, and int64 [m] children.
    """
    rows = tree.first(count)
    parents = torch.where(rows.living, rows.parents, -1)
    # A number written by index would come from the host, which a capture refuses.
    parents[:1].fill_(-1)
    siblings = parents.index_select(0, path)[:, None] == parents
    ranks = (siblings & (rows.indices < path[:, None])).sum(dim=-1)
    return ranks, (parents == path[:, None]).sum(dim=-1)
