"""Greedy verification: the longest path of the draft tree that the target itself would take."""

from dataclasses import dataclass

from torch import Tensor

from dynatree.errors import DecodeError
from dynatree.tree import DraftTree


@dataclass(frozen=True)
class Accepted:
    """What one verification commits.

    Attributes:
        path: indices of the accepted nodes, root excluded, from shallow to deep.
        tokens: their tokens, then the bonus token: the target's choice after the last of them.
    """

    path: list[int]
    tokens: list[int]


def accept_greedy(tree: DraftTree, logits: Tensor) -> Accepted:
    """Walks the tree along the target's argmax (SpecInfer, Algorithm 2, VerifyGreedy).

    A node is accepted when it and all its ancestors are what the target chooses after their
    parents. Siblings hold different tokens, so the accepted nodes form one path.

    Args:
        tree: n nodes.
        logits: [n, vocabulary], the target's logits after each node.

    Raises:
        DecodeError: the logits hold a NaN.
    """
    best, choices = logits.max(dim=-1)
    if best.isnan().any():
        raise DecodeError("the target model's logits hold a NaN; check its weights and dtype")
    if len(tree) == 1:
        return Accepted([], [int(choices[0])])
    refused = choices[tree.parents] != tree.tokens
    refused[0] = False
    path = (~(tree.ancestors & refused).any(dim=-1)).nonzero().flatten()
    # The accepted node's token is its parent's choice, so the choices along the path are the
    # accepted tokens shifted by one, and the last one is the bonus token.
    return Accepted(path[1:].tolist(), choices[path].tolist())
