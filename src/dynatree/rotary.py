"""Rotary angles looked up by position, where a model would work them out in every forward.

A small draft spends much of an eager forward on them. The values are the model's own.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

_FIXED = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary embedding whose angle at a position is the same in every sequence."""

_STEP = 512
"""Positions that are worked out at once."""


class RotaryTable(nn.Module):
    """What a rotary embedding returned for each position; mixed into its class by `tabulate`."""

    _table: tuple[Tensor, ...]

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
        """What the embedding itself returns; of `x`, the dtype and the device count."""
        # Compiled, the angles cost nothing, and the length of a table would be taken as known.
        if torch.compiler.is_compiling() or position_ids.dim() != 2 or position_ids.shape[0] != 1:
            angles: tuple[Tensor, ...] = super().forward(x, position_ids)
            return angles
        table, positions = self._table, position_ids[0]
        if not table or table[0].dtype != x.dtype:
            table = self._made(x, _STEP)
        try:
            return _looked_up(table, positions)
        except IndexError:
            # Not looked for before: that would take as long as looking up.
            return _looked_up(self._made(x, int(positions.max()) + 1), positions)

    def _made(self, x: Tensor, length: int) -> tuple[Tensor, ...]:
        # Tensors of inference mode could not be used outside it.
        with torch.inference_mode(False), torch.no_grad():
            positions = torch.arange(-(-length // _STEP) * _STEP, device=x.device)
            made = super().forward(x.new_empty(0), positions[None])
            # Returned as well: another thread may have a shorter one at the same time.
            self._table = table = tuple(each[0].contiguous() for each in made)
        return table


def _looked_up(table: tuple[Tensor, ...], positions: Tensor) -> tuple[Tensor, ...]:
    return tuple(each.index_select(0, positions)[None] for each in table)


def can_be_tabulated(module: nn.Module) -> bool:
    """Whether `module` is a rotary embedding, of cosines and sines, whose angles depend on the
    position alone."""
    if getattr(module, "rope_type", None) not in _FIXED:
        return False
    if list(inspect.signature(module.forward).parameters) != ["x", "position_ids"]:
        return False
    buffers = list(module.buffers())
    if not buffers:
        return False
    device = buffers[0].device
    try:
        made: Any = module(torch.empty(0, device=device), torch.arange(2, device=device)[None])
    except Exception:  # one that takes other positions, such as those of an image
        return False
    return isinstance(made, tuple) and [each.shape[:2] for each in made] == [(1, 2)] * 2


def tabulate(module: nn.Module) -> None:
    """Lets `module`, which can be tabulated, look angles up; it stays what it is otherwise."""
    kind = type(module)
    module.__class__ = type(f"Tabulated{kind.__name__}", (RotaryTable, kind), {"_table": ()})
