"""Rotary angles looked up by position, where a model would work them out in every forward.

That takes a small draft a seventh of an eager forward. The values are the model's own.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

_FIXED = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary embedding whose angle at a position is the same in every sequence."""

_FIRST = 512
"""Positions that are worked out at once, at least."""


class RotaryTable(nn.Module):
    """A rotary embedding of Transformers, with what it returned for each position."""

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary
        self._table: tuple[Tensor, ...] = ()

    def forward(self, states: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
        """What the embedding itself returns for `position_ids` [1, n]; of `states`, the dtype and
        the device count."""
        # Compiled, the angles cost nothing, and the length of a table would be taken as known.
        if torch.compiler.is_compiling():
            found: tuple[Tensor, ...] = self.rotary(states, position_ids)
            return found
        table, positions = self._table, position_ids[0]
        if not table or table[0].dtype != states.dtype:
            table = self._extended(states, _FIRST)
        try:
            return tuple(each.index_select(0, positions)[None] for each in table)
        except IndexError:
            # Not looked for before: that would take as long as looking up.
            table = self._extended(states, 2 * int(positions.max()))
            return tuple(each.index_select(0, positions)[None] for each in table)

    def _extended(self, states: Tensor, length: int) -> tuple[Tensor, ...]:
        # Tensors of inference mode could not be used outside it.
        with torch.inference_mode(False), torch.no_grad():
            positions = torch.arange(length, device=states.device)
            made = self.rotary(states.new_empty(0), positions[None])
            self._table = tuple(each[0].contiguous() for each in made)
        return self._table


def tabulated(module: nn.Module) -> bool:
    """Whether a `RotaryTable` can stand for `module`: a rotary embedding of cosines and sines
    whose angles depend on the position alone."""
    if getattr(module, "rope_type", None) not in _FIXED:
        return False
    if list(inspect.signature(module.forward).parameters) != ["x", "position_ids"]:
        return False
    buffers = list(module.buffers())
    if not buffers:
        return False
    device = buffers[0].device
    made: Any = module(torch.empty(0, device=device), torch.arange(2, device=device)[None])
    return isinstance(made, tuple) and [each.shape[:2] for each in made] == [(1, 2)] * 2
