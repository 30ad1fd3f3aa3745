"""What the host learns of a round: one small tensor, read once."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dynatree import gpu
from dynatree.errors import DecodeError
from dynatree.tree import DraftTree


@dataclass(frozen=True)
class Round:
    """What one round did.

    Attributes:
        nodes: draft nodes verified.
        depth: depth of the deepest that there was room to commit.
        accepted: draft tokens committed.
        ngram_nodes: nodes that an n-gram gave and the draft model did not.
        ngram_accepted: tokens committed of these; they are the last ones of `accepted`.
    """

    nodes: int
    depth: int
    accepted: int
    ngram_nodes: int = 0
    ngram_accepted: int = 0

    def within(self, remaining: int) -> "Round":
        """The round as one that had `remaining` tokens to commit at most: of these the last is the
        bonus token, so what was drafted below the others was no offer. The nodes stay: they were
        verified."""
        cut = self.cut(remaining - 1)
        return cut if cut.depth < remaining else replace(cut, depth=remaining - 1)

    def cut(self, tokens: int) -> "Round":
        """The round if no more than `tokens` of its accepted tokens are wanted."""
        surplus = self.accepted - tokens
        if surplus <= 0:
            return self
        ngram = max(0, self.ngram_accepted - surplus)
        return replace(self, accepted=tokens, ngram_accepted=ngram)


class Reading(NamedTuple):
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
    """What the phases of a round tell the host, which reads it once per round.

    Where a read waits for all work in flight, everything is written to one tensor on the device
    whose shape never changes, and is read in one piece. Where reads are free, nothing is copied:
    tensors are kept as they come, and read one by one.
    """

    def __init__(self, longest: int, device: torch.device, gathered: bool) -> None:
        """For paths of up to `longest` nodes; `gathered` says that there is to be one tensor."""
        self._gathered = gathered
        # What is gathered of numbers is whether one is a NaN.
        self._is_nan: Callable[[Any], bool] = bool if gathered else math.isnan
        self._noted: dict[str, Tensor | int] = {}
        lengths = {
            "tokens": longest,
            "count": 1,
            "target": 1,
            "draft": 1,
            "nodes": 1,
            "depth": 1,
            "ngram_nodes": 1,
            "ngram_accepted": 1,
            "ranks": longest,
            "children": longest,
        }
        self._spans: dict[str, slice] = {}
        size = 0
        for name, length in lengths.items():
            self._spans[name] = slice(size, size + length)
            size += length
        self._values = torch.zeros(size, dtype=torch.long, device=device)
        # Where a copy from a CUDA device lands without a detour.
        cuda = device.type == "cuda"
        self._host = torch.zeros_like(self._values, device="cpu", pin_memory=cuda)
        self._copied = torch.cuda.Event() if cuda else None
        self._sent = False
        self._kernels = gpu.kernels(device) if gathered else None

    def _note(self, name: str, values: Tensor | int) -> None:
        """Notes `values` [] or [m], m at most what there is room for."""
        if not self._gathered:
            self._noted[name] = values
        elif isinstance(values, int):
            self.span(name).fill_(values)
        else:
            self.span(name)[: values.numel()] = values

    def span(self, name: str) -> Tensor:
        """Where to write what is gathered under `name`."""
        return self._values[self._spans[name]]

    def committed(self, tokens: Tensor, count: Tensor | int) -> None:
        """Notes that the first `count` (as [1], or a number) of `tokens` [m] were committed."""
        self._note("tokens", tokens)
        self._note("count", count)

    def grafted(self, nodes: Tensor, accepted: Tensor) -> None:
        """Notes that the verified tree had `nodes` [] grafted ones, `accepted` [] of them good."""
        self._note("ngram_nodes", nodes)
        self._note("ngram_accepted", accepted)

    def ranked(self, ranks: Tensor, children: Tensor) -> None:
        """Notes ranks [m] and children [m] of the path: the root, accepted nodes, padding."""
        self._note("ranks", ranks)
        self._note("children", children)

    def chosen(self, best: Tensor) -> None:
        """Notes whether the target's largest logits `best` [n] hold a NaN."""
        if self._kernels is not None:
            self._kernels.any_nan(best, self.span("target"))
            return
        self._note("target", best.isnan().any() if self._gathered else best)

    def grown(self, tree: DraftTree) -> None:
        """Notes the shape of the tree to verify, and whether the draft gave it a NaN."""
        rows = tree.first(tree.size)
        log_probs = rows.log_probs
        if self._kernels is not None:
            told = (self.span(name) for name in ("draft", "nodes", "depth"))
            self._kernels.survey(log_probs, rows.depths, *told)
            return
        self._note("draft", log_probs.isnan().any() if self._gathered else log_probs)
        living = (rows.drafted_log_probs != -math.inf).sum() if self._gathered else tree.size - 1
        self._note("nodes", living)
        self._note("depth", rows.depths.max() if tree.deepest is None else tree.deepest)

    def reset(self) -> None:
        """Forgets what was sent and not read."""
        self._sent = False

    def send(self) -> None:
        """Begins to copy what was noted: the next `read` is of that, not of what follows."""
        self._host.copy_(self._values, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        self._sent = True

    def read(self) -> Reading:
        """Waits for the device and reads what was noted, or sent before; what never was is 0.

        Raises:
            DecodeError: the logits of a model hold a NaN.
        """
        if self._gathered:
            if not self._sent:
                self.send()
            self._sent = False
            if self._copied is not None:
                self._copied.synchronize()
            values = self._host.tolist()
            found = {name: values[span] for name, span in self._spans.items()}
        else:
            found = {
                name: [noted] if isinstance(noted, int) else noted.view(-1).tolist()
                for name, noted in self._noted.items()
            }
            self._noted.clear()
        for role in ("target", "draft"):
            if any(map(self._is_nan, found.get(role, ()))):
                raise DecodeError(
                    f"the {role} model's logits hold a NaN; check its weights and dtype"
                )
        (count,) = found.get("count", (0,))
        ranks, children = found.get("ranks", []), found.get("children", [])
        return Reading(
            tokens=found.get("tokens", [])[:count],
            ranks=ranks[1:count],
            children=children[:count],
            **{
                name: found.get(name, (0,))[0]
                for name in ("nodes", "depth", "ngram_nodes", "ngram_accepted")
            },
        )
