"""What the host learns of a round: one small tensor, read once."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dynatree.errors import DecodeError
from dynatree.tree import DraftTree


@dataclass(frozen=True)
class Round:
    """What one round did.

    Attributes:
        nodes: draft nodes verified.
        depth: depth of the deepest.
        accepted: draft tokens committed.
        ngram_nodes: nodes that an n-gram gave and the draft model did not.
        ngram_accepted: tokens committed of these; they are the last ones of `accepted`.
    """

    nodes: int
    depth: int
    accepted: int
    ngram_nodes: int = 0
    ngram_accepted: int = 0

    def cut(self, tokens: int) -> "Round":
        """The round if no more than `tokens` of its tokens are wanted."""
        accepted = min(self.accepted, tokens)
        ngram = max(0, self.ngram_accepted - (self.accepted - accepted))
        return replace(self, accepted=accepted, ngram_accepted=ngram)


@dataclass(frozen=True)
class Reading:
    """A report as read by the host.

    Attributes:
        tokens: committed by the last verification (or the prefill), the bonus token included.
        nodes: draft nodes of the tree that waits for verification.
        depth: depth of its deepest node.
        ngram_nodes: grafted nodes of the tree that was verified.
        ngram_accepted: committed nodes of these.
        ranks: of each accepted node among its siblings, where `Report.ranked` was told.
        children: of the verified tree's root and of each accepted node, likewise.
    """

    tokens: list[int]
    nodes: int
    depth: int
    ngram_nodes: int
    ngram_accepted: int
    ranks: list[int]
    children: list[int]


class Report:
    """A tensor on the device that the phases of a round write their outcome to.

    Layout: tokens [longest], their count, NaN in the target's logits, NaN in the draft's, nodes
    and depth of the tree to verify next, grafted nodes and how many of them were accepted, ranks
    [longest] and numbers of children [longest] along the path.
    """

    def __init__(self, longest: int, device: torch.device) -> None:
        self._longest = longest
        self._values = torch.zeros(3 * longest + 7, dtype=torch.long, device=device)
        # Where a copy from a CUDA device lands without a detour.
        self._host = torch.zeros_like(self._values, device="cpu", pin_memory=device.type == "cuda")

    def committed(self, tokens: Tensor, count: Tensor) -> None:
        """Notes that the first `count` [1] of `tokens` [m] were committed."""
        self._values[: len(tokens)] = tokens
        self._values[self._longest : self._longest + 1] = count

    def grafted(self, nodes: Tensor, accepted: Tensor) -> None:
        """Notes that the verified tree had `nodes` [] grafted ones, `accepted` [] of them good."""
        self._values[self._longest + 5] = nodes
        self._values[self._longest + 6] = accepted

    def ranked(self, ranks: Tensor, children: Tensor) -> None:
        """Notes ranks [m] and children [m] of the path: the root, accepted nodes, padding."""
        start = self._longest + 7
        self._values[start : start + len(ranks)] = ranks
        start += self._longest
        self._values[start : start + len(children)] = children

    def chosen(self, best: Tensor) -> None:
        """Notes whether the target's largest logits `best` [n] hold a NaN."""
        self._values[self._longest + 1] = best.isnan().any()

    def grown(self, tree: DraftTree, trimmed: bool) -> None:
        """Notes the shape of the tree to verify, and whether the draft gave it a NaN.

        `trimmed` says that all nodes live, so that they need not be counted.
        """
        log_probs, at = tree.log_probs[: tree.size], self._longest + 2
        self._values[at] = log_probs.isnan().any()
        self._values[at + 1] = tree.size - 1 if trimmed else (log_probs != -math.inf).sum() - 1
        self._values[at + 2] = tree.depths[: tree.size].max()

    def read(self) -> Reading:
        """Waits for the device and reads the report.

        Raises:
            DecodeError: the logits of a model hold a NaN.
        """
        values = self._host.copy_(self._values).tolist()
        path = self._longest + 7
        count, *unsound, nodes, depth, ngram_nodes, ngram_accepted = values[self._longest : path]
        for role, found in zip(("target", "draft"), unsound, strict=True):
            if found:
                raise DecodeError(
                    f"the {role} model's logits hold a NaN; check its weights and dtype"
                )
        ranks, children = values[path : path + count], values[path + self._longest :]
        return Reading(
            values[:count], nodes, depth, ngram_nodes, ngram_accepted, ranks[1:], children[:count]
        )
