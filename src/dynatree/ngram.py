"""What followed the last tokens when they occurred before, by tensor operations of fixed shape."""

import torch
from torch import Tensor
from torch.nn.functional import pad

SHORTEST, LONGEST = 2, 4
"""Fewest tokens that count as a match, and most that are compared."""

CONFIDENCE = 0.8
"""Assumed probability that a token of a continuation is right, given those before it: it ranks
grafted nodes among drafted ones where a budget decides."""


def continuation(history: Tensor, position: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The tokens that followed the longest earlier occurrence of the last ones, the latest of them.

    Prompt lookup (Saxena, 2023), with one difference: an occurrence that overlaps the end says that
    the text repeats itself with the distance of the two as its period, and is continued so.

    Args:
        history: int64 [n], the committed tokens, then anything.
        position: int64 [1], index of the last committed token.
        count: tokens to give.

    Returns:
        [count] int64, the continuation, and [1] bool, whether there is one: at least `SHORTEST`
        of the last tokens occur before. If not, the tokens mean nothing.
    """
    end = position + 1
    # Row i holds the tokens before index i; where there are none, what no token is.
    before = pad(history, (LONGEST, 0), value=-1).unfold(0, LONGEST, 1)
    equal = before == before.index_select(0, end)
    starts = torch.arange(len(before), device=history.device)
    matched = equal.flip(1).long().cumprod(1).sum(1)
    # Of equally long matches the latest.
    rank = (matched * len(before) + starts).masked_fill(starts >= end, -1)
    best = rank.argmax(dim=0, keepdim=True)
    steps = torch.arange(count, device=history.device) % (end - best)
    return history.index_select(0, best + steps), matched.index_select(0, best) >= SHORTEST
