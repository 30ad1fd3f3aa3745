"""Muon in float32, for training on any CPU.

`torch.optim.Muon` orthogonalises in bfloat16, whatever the weights are. A CPU without bfloat16
instructions emulates that product, about a hundred times slower than in float32.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic Newton-Schulz iteration: the steepest at zero that stays bounded."""


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, for the weight matrices of hidden layers (Jordan et al., 2024).

    Takes Nesterov momentum 0.95 and decoupled weight decay; a step is scaled by
    sqrt(max(1, rows / columns)), as in `torch.optim.Muon`.
    """

    def __init__(self, weights: Iterable[Tensor], lr: float, weight_decay: float) -> None:
        super().__init__(weights, {"lr": lr, "weight_decay": weight_decay, "momentum": 0.95})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One update of every weight that has a gradient; `closure` is not called."""
        for group in self.param_groups:
            rate, momentum = group["lr"], group["momentum"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["mean"] = torch.zeros_like(weight.grad)
                mean = state["mean"].lerp_(weight.grad, 1 - momentum)
                update = orthogonalised(weight.grad.lerp(mean, momentum))
                weight.mul_(1 - rate * group["weight_decay"])
                scale = math.sqrt(max(1.0, weight.shape[0] / weight.shape[1]))
                weight.add_(update, alpha=-rate * scale)


def orthogonalised(matrix: Tensor, steps: int = 5) -> Tensor:
    """[m, n] with singular values near 1 instead of `matrix`'s own (0.7 to 1.2), same vectors."""
    first, third, fifth = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    result = matrix.mT if tall else matrix
    result = result / result.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = result @ result.mT
        result = torch.addmm(
            result, torch.addmm(gram, gram, gram, beta=third, alpha=fifth), result, beta=first
        )
    return result.mT if tall else result
