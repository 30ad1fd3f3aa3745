"""Triton kernels for a few rows: a GPT-NeoX layer, tree attention, best tokens, draft trees.

With a few rows a forward takes the time in which its weights can be read, plus what every launch
takes to fill and to empty the device, some 3 us. So a layer is normalisation, what enters it (both
projections of it at once, with GELU; with the normalisation where it is narrow), attention (rotary
positions, storing in the KV cache, tree mask), and what leaves it (both projections back, and the
sum). Sums are in float32, and what Transformers rounds to the model's dtype is rounded here.

Work that is split between programs is put together by the last of them to finish, in a fixed order,
so that equal inputs give equal outputs bit for bit.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from dynatree import gpu
from dynatree import triton_kernels as programs
from dynatree.errors import DecodeError

MOST_ROWS = 64
"""Rows that the products here are made for; a library is as fast for more."""

MOST_BEST = 8
"""Tokens of a row that `best` finds."""

_NARROW = 512
"""Width up to which every program normalises all rows itself."""

_VOCABULARY = 4096
"""Logits that one program of `best` reads."""


def _power(count: int) -> int:
    """The next power of two; 1 for less than 1."""
    return 1 << max(0, count - 1).bit_length()


def _divisor(most: int, *sizes: int) -> int:
    """The largest power of two up to `most` that divides all sizes."""
    return min(most, *(size & -size for size in sizes))


def _halves(width: int) -> tuple[int, int]:
    """The largest power of two in `width`, and one that holds the rest; kernels want such."""
    main = 1 << (width.bit_length() - 1)
    return main, max(16, _power(width - main))


def _precision(states: Tensor) -> str:
    return "ieee" if states.dtype == torch.float32 else "tf32"


class Workspace:
    """What the kernels leave notes in: zero between calls, which follow one another on a stream."""

    def __init__(self, device: torch.device) -> None:
        self.finished = torch.zeros(1 << 16, dtype=torch.int32, device=device)

    def counters(self, count: int) -> Tensor:
        """At least `count` of them.

        Raises:
            DecodeError: there are fewer.
        """
        if count > len(self.finished):
            raise DecodeError(
                f"the GPU kernels count {len(self.finished)} pieces of work, {count} are needed; "
                "lower node_budget"
            )
        return self.finished


def _early(states: Tensor) -> bool:
    """Whether a kernel is launched before the one before it has ended (programmatic dependent
    launch, on Hopper and later). It pays for one row, and where much is to be fetched for many;
    for a few rows the room that waiting programs take costs more."""
    rows = len(states)
    return (rows == 1 or rows > 32) and gpu.capability(states.device) >= (9, 0)


class _Product(NamedTuple):
    """How a product is divided among programs: outputs of one, inputs of a step, loads ahead."""

    outputs: int
    step: int
    stages: int
    warps: int


class _Attention(NamedTuple):
    """How attention is: rows and slots of a step, steps of a program."""

    rows: int
    slots: int
    steps: int
    warps: int


# The best of a few on an H200, in whole forwards of Pythia's geometry at 1000 tokens of context.
_ENTER_ONE, _LEAVE_ONE = _Product(2, 0, 1, 4), _Product(1, 512, 1, 4)
_ENTER_MANY, _LEAVE_MANY = _Product(64, 64, 4, 4), _Product(64, 128, 3, 4)
_ATTEND = {
    1: _Attention(16, 64, 1, 4),
    16: _Attention(16, 64, 4, 4),
    32: _Attention(32, 64, 4, 4),
    MOST_ROWS: _Attention(32, 64, 8, 4),
}
"""By the most rows that it is for."""


def select_rows(table: Tensor, indices: Tensor) -> Tensor:
    """The rows `indices` [n] of `table` [m, width]."""
    rows, width = len(indices), table.shape[1]
    early = _early(indices)
    out = table.new_empty(rows, width)
    programs.select_rows[(rows, triton.cdiv(width, 1024))](
        table, indices, out, width, 1024, early, num_warps=4, launch_pdl=early
    )
    return out


def select_columns(table: Tensor, indices: Tensor) -> Tensor:
    """The columns `indices` [n] of `table` [m, width], of booleans."""
    rows, count = len(table), len(indices)
    early = _early(table)
    out = table.new_empty(rows, count)
    programs.select_columns[(rows, triton.cdiv(count, 1024))](
        table.view(torch.uint8), indices, out.view(torch.uint8), count, table.stride(0), 1024,
        early,
        num_warps=4, launch_pdl=early,
    )  # fmt: skip
    return out


def grow(
    values: Tensor,
    best: Tensor,
    parent_log_probs: Tensor,
    first: int,
    size: int,
    least: float,
    tree: tuple[Tensor, ...],
) -> None:
    """Appends all continuations of a level's nodes to a tree; those below `least` are dead.

    Args:
        values, best: float32 and int64 [w, count], each node's own: log-probabilities and tokens.
        parent_log_probs: float32 [w], the nodes' cumulative log-probabilities.
        first: index of the level's first node.
        size: nodes of the tree.
        least: lowest cumulative log-probability.
        tree: the tensors of a `DraftTree`, see `DraftTree.tensors`.
    """
    tokens, parents, depths, log_probs, attends = tree
    columns = attends.shape[1]
    programs.grow[(values.numel(),)](
        values, best, parent_log_probs, tokens, parents, depths, log_probs,
        attends.view(torch.uint8), first, size, least, columns, values.shape[1], _power(columns),
        num_warps=4,
    )  # fmt: skip


def compact(grown: tuple[Tensor, ...], size: int, kept: tuple[Tensor, ...]) -> Tensor:
    """Makes `kept` the living ones of the first `size` nodes of `grown`, in their order.

    Args:
        grown, kept: the tensors of two `DraftTree`, see `DraftTree.tensors`; a last row is dead.

    Returns:
        int64 [size], the nodes' indices in `grown`; after the living ones that of its last row.
    """
    nodes = torch.empty(size, dtype=torch.long, device=grown[0].device)
    columns, kept_columns = grown[4].shape[1], kept[4].shape[1]
    programs.compact[(len(kept[0]),)](
        *grown[:4], grown[4].view(torch.uint8), *kept[:4], kept[4].view(torch.uint8), nodes,
        size, len(grown[0]) - 1, columns, kept_columns, _power(max(columns, kept_columns)),
        num_warps=4,
    )  # fmt: skip
    return nodes


def move_slots(storage: Tensor, sources: Tensor, destinations: Tensor) -> None:
    """Copies `storage` [..., slots, size] at the slots `sources` [k] to `destinations` [k]."""
    slots, size = storage.shape[-2:]
    stride = slots * size
    programs.move_slots[(storage.numel() // stride,)](
        storage, sources, destinations, len(sources), stride, size, _power(size),
        _power(len(sources)),
        num_warps=1,
    )  # fmt: skip


def norm(hidden: Tensor, norms: list[Any]) -> list[Tensor]:
    """`hidden` [n, width] normalised by each of one or two LayerNorm modules."""
    width = hidden.shape[1]
    early = _early(hidden)
    outputs = [torch.empty_like(hidden) for _ in norms]
    first, last = norms[0], norms[-1]
    programs.norm[(len(hidden),)](
        hidden, first.weight, first.bias, last.weight, last.bias, outputs[0], outputs[-1],
        first.eps, width, _power(width), len(norms) > 1, early,
        num_warps=8, launch_pdl=early,
    )  # fmt: skip
    return outputs


def enter(hidden: Tensor, norms: list[Any], linears: list[Any]) -> list[Tensor]:
    """A layer's projections [n, ...] of `hidden` [n, width]: of norm 1, and GELU of that of norm 2.

    Args:
        hidden: up to `MOST_ROWS` rows.
        norms, linears: two LayerNorm and two Linear modules.
    """
    rows, width = hidden.shape
    early = _early(hidden)
    outputs = [hidden.new_empty(rows, linear.weight.shape[0]) for linear in linears]
    totals = [output.shape[1] for output in outputs]
    weights = [tensor for linear in linears for tensor in (linear.weight, linear.bias)]
    padded = max(16, _power(rows))
    if width <= _NARROW and width == _power(width):
        count = _divisor(32, *totals)
        scales = [tensor for each in norms for tensor in (each.weight, each.bias)]
        programs.enter_narrow[(sum(totals) // count,)](
            hidden, *scales, *weights, *outputs, rows, *totals, norms[0].eps,
            width, totals[0] // count, padded, count, _precision(hidden), early,
            num_warps=4 if padded == 16 else 8, launch_pdl=early,
        )  # fmt: skip
        return outputs
    normed = norm(hidden, norms)
    if rows == 1:
        how = _ENTER_ONE
        count = _divisor(how.outputs, *totals)
        programs.enter_one[(sum(totals) // count,)](
            *normed, *weights, *outputs, width, *_halves(width), totals[0] // count, count, early,
            num_warps=how.warps, launch_pdl=early,
        )  # fmt: skip
        return outputs
    how = _ENTER_MANY
    count, step = _divisor(how.outputs, *totals), _divisor(how.step, width)
    programs.enter_many[(sum(totals) // count,)](
        *normed, *weights, *outputs, rows, *totals, width, totals[0] // count,
        padded, count, step, how.stages, _precision(hidden), early,
        num_warps=how.warps, launch_pdl=early,
    )  # fmt: skip
    return outputs


def leave(
    hidden: Tensor, attended: Tensor, active: Tensor, linears: list[Any], workspace: Workspace
) -> Tensor:
    """`hidden` [n, width] + `attended` [n, width] by linear 1 + `active` [n, inner] by linear 2.

    Args:
        hidden: up to `MOST_ROWS` rows.

    Raises:
        DecodeError: more pieces of work than `workspace` counts.
    """
    rows, width = hidden.shape
    early = _early(hidden)
    inner = active.shape[1]
    out = torch.empty_like(hidden)
    weights = [tensor for linear in linears for tensor in (linear.weight, linear.bias)]
    if rows == 1:
        how = _LEAVE_ONE
        count, step = _divisor(how.outputs, width), _divisor(how.step, width, inner)
        programs.leave_one[(width // count,)](
            hidden,
            attended,
            active,
            *weights,
            out,
            width,
            inner,
            _power(width // 64),
            count,
            step,
            early,
            num_warps=how.warps,
            launch_pdl=early,
        )
        return out
    how = _LEAVE_MANY
    count, step = _divisor(how.outputs, width), _divisor(how.step, width)
    padded, splits = max(16, _power(rows)), inner // width
    parts = torch.empty((1 + splits) * padded * width, dtype=torch.float32, device=hidden.device)
    programs.leave_many[(width // count, 1 + splits)](
        hidden, attended, active, *weights, out, parts, workspace.counters(width // count), rows,
        width, inner, splits, padded, count, step, how.stages, _precision(hidden), early,
        num_warps=how.warps, launch_pdl=early,
    )  # fmt: skip
    return out


class Masks(NamedTuple):
    """What n tokens that are about to be stored in a cache are shown.

    Attributes:
        old: uint8 [n, visible], of what was there before.
        new: uint8 [n, n], of one another.
        common: int32 [n], slots before the first that `old` hides.
        used: int32 [n], slots up to the last that it shows.
    """

    old: Tensor
    new: Tensor
    common: Tensor
    used: Tensor


def divide_mask(mask: Tensor, slots: Tensor) -> Masks:
    """What `mask`, bool [n, visible], shows n tokens that will be stored in `slots`, int64 [n]."""
    rows, visible = mask.shape
    old = torch.empty(rows, visible, dtype=torch.uint8, device=mask.device)
    new = torch.empty(rows, rows, dtype=torch.uint8, device=mask.device)
    common, used = torch.empty(2, rows, dtype=torch.int32, device=mask.device)
    early = _early(mask)
    programs.divide_mask[(rows,)](
        mask.view(torch.uint8), slots, old, new, common, used, rows, visible,
        max(16, _power(rows)), early,
        num_warps=4, launch_pdl=early,
    )  # fmt: skip
    return Masks(old, new, common, used)


def attend(
    states: Tensor,
    tables: tuple[Tensor, Tensor],
    positions: Tensor,
    slots: Tensor,
    masks: Masks,
    keys: Tensor,
    values: Tensor,
    workspace: Workspace,
) -> Tensor:
    """Attention of n new tokens, whose keys and values join the cache.

    Args:
        states: [n, 3 * width], for each head query, key and value, as GPT-NeoX projects them.
        tables: cosines and sines [positions, rotary dimensions].
        positions, slots: int64 [n].
        masks: of `divide_mask`; a token is shown at least one slot.
        keys, values: [1, heads, capacity, head size].

    Returns:
        [n, width].

    Raises:
        DecodeError: more pieces of work than `workspace` counts.
    """
    rows, visible = masks.old.shape
    early = _early(states)
    _, heads, _, size = keys.shape
    rotary = tables[0].shape[1]
    how = next(how for most, how in _ATTEND.items() if rows <= most or most == MOST_ROWS)
    blocks, splits = triton.cdiv(rows, how.rows), 1 + triton.cdiv(visible, how.slots * how.steps)
    padded = max(16, _power(size))
    out = states.new_empty(rows, heads * size)
    notes = heads * blocks * splits * how.rows
    parts = torch.empty(notes * (padded + 2), dtype=torch.float32, device=states.device)
    programs.attend[(heads, splits, blocks)](
        states, *tables, positions, slots, *masks, keys, values, out,
        parts[2 * notes :], parts, parts[notes:], workspace.counters(heads * blocks),
        rows, visible, keys.stride(1), size**-0.5,
        heads, size, padded, rotary, how.rows, how.slots, how.steps,
        # Of several rows the splits are put together one by one, whatever their number.
        _power(splits) if rows == 1 else 1, rows == 1,
        _precision(states), early,
        num_warps=how.warps, launch_pdl=early,
    )  # fmt: skip
    return out


def best(
    logits: Tensor, count: int, workspace: Workspace, log_probs: bool
) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row of `logits` [n, vocabulary], the smaller token on a tie.

    Args:
        count: up to `MOST_BEST`.
        log_probs: whether log-probabilities are wanted, and not the logits themselves.

    Returns:
        float32 [n, count], falling, and not a number where a row holds a NaN; int64 [n, count], the
        tokens.

    Raises:
        DecodeError: more pieces of work than `workspace` counts.
    """
    rows, vocabulary = logits.shape
    early = _early(logits)
    parts = triton.cdiv(vocabulary, _VOCABULARY)
    device = logits.device
    values = torch.empty(rows, count, dtype=torch.float32, device=device)
    tokens = torch.empty(rows, count, dtype=torch.long, device=device)
    part_values = torch.empty(rows * parts * (count + 1), dtype=torch.float32, device=device)
    part_tokens = torch.empty(rows * parts * count, dtype=torch.int32, device=device)
    programs.best[(rows, parts)](
        logits, values, tokens, part_values, part_tokens, part_values[rows * parts * count :],
        workspace.counters(rows), vocabulary, count, _VOCABULARY, _power(parts),
        _power(parts * count), log_probs, early,
        num_warps=8, launch_pdl=early,
    )  # fmt: skip
    return values, tokens
