"""Small selections that a round makes many times: by Triton kernels where there are some."""

import torch
from torch import Tensor

from dynatree import gpu


def largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of each row of `logits` [n, vocabulary] and its token, both [n]; the former is
    not a number where the row holds a NaN."""
    kernels = gpu.kernels(logits.device)
    if kernels is not None and logits.dtype != torch.float64:
        best, tokens = kernels.best(logits, 1, gpu.workspace(logits.device), False)
        return best.view(-1), tokens.view(-1)
    best, tokens = logits.max(dim=-1)
    return best, tokens


def most_probable(
    logits: Tensor, count: int, living: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The `count` most probable tokens of each row of `logits` [n, vocabulary].

    Args:
        living: int32 [1], how many of the rows are wanted; None for all.

    Returns:
        float32 [n, count], their log-probabilities, falling; int64 [n, count].
    """
    kernels = gpu.kernels(logits.device)
    if kernels is not None and count <= kernels.MOST_BEST and logits.dtype != torch.float64:
        log_probs, tokens = kernels.best(logits, count, gpu.workspace(logits.device), True, living)
        return log_probs, tokens
    log_probs, tokens = torch.log_softmax(logits, dim=-1, dtype=torch.float32).topk(count, dim=-1)
    return log_probs, tokens


def columns_of(table: Tensor, columns: Tensor) -> Tensor:
    """The columns `columns` [n] of the booleans `table` [m, width]."""
    kernels = gpu.kernels(table.device)
    if kernels is not None:
        chosen: Tensor = kernels.select_columns(table, columns)
        return chosen
    return table.index_select(1, columns)
