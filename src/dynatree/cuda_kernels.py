"""Triton kernels for a few rows: a GPT-NeoX layer, tree attention, best tokens, draft trees.

With a few rows a forward takes the time in which its weights can be read, plus what every launch
takes to fill and to empty the device, some 3 us. So a layer is normalisation, what enters it (both
projections of it at once, with GELU; with the normalisation where it is narrow), attention (rotary
positions, storing in the KV cache, tree mask), and what leaves it (both projections back, and the
sum). Sums are in float32, and what Transformers rounds to the model's dtype is rounded here.

Work that is split between programs is put together by the last of them to finish, in a fixed order,
so that equal inputs give equal outputs bit for bit.

A level of a draft tree has as many rows as it may have nodes, and few of them live. Where `living`,
int32 [1], says how many of the first rows do, only these are computed, and what is returned for the
others is arbitrary: so a captured forward takes the time of the nodes that there are.
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

MOST_NODES = 2048
"""Nodes of a tree that one program can look through."""

TILE_ROWS = 16
"""Rows that cost as much as one, in several rows' kernels; of counted rows so many at a time."""

_NARROW = 512
"""Width up to which programs hold whole rows, and normalise them themselves."""

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


def _is_narrow(width: int) -> bool:
    """Whether a program can hold whole rows of that width."""
    return width <= _NARROW and width == _power(width)


def _tile(rows: int, counted: bool) -> int:
    """Rows of one product of several rows' kernels."""
    return TILE_ROWS if counted else max(TILE_ROWS, _power(rows))


def _or(living: Tensor | None, other: Tensor) -> Tensor:
    """A kernel that counts no living rows takes any tensor in their place."""
    return other if living is None else living


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


def _early(states: Tensor, small: bool = False) -> bool:
    """Whether a kernel is launched before the one before it has ended (programmatic dependent
    launch, on Hopper and later). It pays for one row, for a small kernel or model, and where much
    is to be fetched for many; for a few rows the room that waiting programs take costs more."""
    rows = len(states)
    return (rows == 1 or rows > 32 or small) and gpu.capability(states.device) >= (9, 0)


class _Product(NamedTuple):
    """How a product is divided among programs: outputs of one, inputs of a step, loads ahead."""

    outputs: int
    step: int
    stages: int
    warps: int


class _Attention(NamedTuple):
    """How attention is: rows and slots of a step, most steps of a program, loads ahead, and the
    registers that a thread may have, on which depends how many programs run at once."""

    rows: int
    slots: int
    steps: int
    stages: int
    warps: int
    registers: int | None = None


# The best of a few on an H200, in whole forwards of Pythia's geometry at 1000 tokens of context.
_ENTER_ONE, _LEAVE_ONE = _Product(2, 0, 1, 4), _Product(1, 512, 1, 4)
_ENTER_MANY, _LEAVE_MANY = _Product(64, 64, 4, 4), _Product(64, 64, 5, 4)
_ENTER_NARROW, _LEAVE_NARROW = _Product(32, 0, 1, 4), _Product(32, 0, 1, 4)
_ATTEND = {
    1: _Attention(16, 64, 1, 1, 4),
    16: _Attention(16, 64, 4, 3, 4),
    32: _Attention(16, 64, 4, 3, 4),
    MOST_ROWS: _Attention(16, 64, 8, 3, 4),
}
"""By the most rows that it is for."""

_PROGRAMS = 128
"""Programs that attention of several rows is divided among, rather than take more steps in each."""


def select_rows(table: Tensor, indices: Tensor) -> Tensor:
    """The rows `indices` [n] of `table` [m, width]."""
    rows, width = len(indices), table.shape[1]
    early = _early(indices, small=True)
    out = table.new_empty(rows, width)
    programs.select_rows[(rows, triton.cdiv(width, 1024))](
        table, indices, out, width, 1024, early, num_warps=4, launch_pdl=early
    )
    return out


def select_columns(table: Tensor, indices: Tensor) -> Tensor:
    """The columns `indices` [n] of `table` [m, width], of booleans."""
    rows, count = len(table), len(indices)
    early = _early(table, small=True)
    out = table.new_empty(rows, count)
    programs.select_columns[(rows, triton.cdiv(count, 1024))](
        table.view(torch.uint8), indices, out.view(torch.uint8), count, table.stride(0), 1024,
        early,
        num_warps=4, launch_pdl=early,
    )  # fmt: skip
    return out


class Beginning(NamedTuple):
    """Where the nodes of a tree will be, and what of the committed tokens is read first.

    Attributes:
        columns: int64 [visible], see `DraftTree.columns`.
        slots: int64 [nodes].
        positions: int64, by depth and node.
        recent: int64 [n], slots and positions of the tokens to read.
        tokens: int64 [n], these.
        mask: bool [n, visible], what they are shown.
    """

    columns: Tensor
    slots: Tensor
    positions: Tensor
    recent: Tensor
    tokens: Tensor
    mask: Tensor


def begin(
    history: Tensor,
    position: Tensor,
    offsets: Tensor,
    depths: Tensor,
    root: Tensor,
    nodes: int,
    visible: int,
) -> Beginning:
    """Begins a tree at `position`, int64 [1], of the `history`, and sets its `root`, int64 [1].

    Args:
        offsets: int64 [n], of the slots to read from the root's.
        depths: int64, by depth and node.
        nodes: rows of the tree's tensors.
    """
    count, device = len(offsets), history.device
    columns = torch.empty(visible, dtype=torch.long, device=device)
    slots = torch.empty(nodes, dtype=torch.long, device=device)
    recent, tokens = torch.empty(2, count, dtype=torch.long, device=device)
    mask = torch.empty(count, visible, dtype=torch.bool, device=device)
    found = Beginning(columns, slots, torch.empty_like(depths), recent, tokens, mask)
    programs.begin[(triton.cdiv(max(visible, nodes, depths.numel()), 256),)](
        history, position, offsets, depths, root, *found[:5], mask.view(torch.uint8),
        visible, nodes, depths.numel(), count, 256,
        num_warps=2,
    )  # fmt: skip
    return found


def grow(
    values: Tensor,
    best: Tensor,
    parent_log_probs: Tensor,
    first: int,
    size: int,
    least: float,
    width: int,
    tree: tuple[Tensor, ...],
    living: Tensor,
) -> None:
    """Appends a level to a tree: the continuations of the last one's nodes that live, in their
    order, and after them dead ones.

    Args:
        values, best: float32 and int64 [w, count], each node's own: log-probabilities and tokens.
        parent_log_probs: float32 [w], the nodes' cumulative log-probabilities; of dead ones, minus
            infinity, neither values nor tokens are looked at.
        first: index of the last level's first node.
        size: nodes of the tree.
        least: a node whose cumulative log-probability is below does not live.
        width: nodes of the new level, at most w * count; of more that would live, the most probable
            do.
        tree: the tensors of a `DraftTree`, see `DraftTree.tensors`.
        living: int32 [1], set to the number of nodes that live.
    """
    tokens, parents, depths, log_probs, attends = tree
    columns = attends.shape[1]
    total = values.numel()
    early = _early(values, small=True)
    programs.grow[(total,)](
        values, best, parent_log_probs, tokens, parents, depths, log_probs,
        attends.view(torch.uint8), living, first, size, least, columns, total, width,
        values.shape[1], _power(total), _power(columns), early,
        num_warps=4, launch_pdl=early,
    )  # fmt: skip


def compact(grown: tuple[Tensor, ...], size: int, most: int, kept: tuple[Tensor, ...]) -> Tensor:
    """Makes `kept` the `most` most probable living ones of the first nodes of `grown`, in order.

    Args:
        grown, kept: the tensors of two `DraftTree`, see `DraftTree.tensors`; a last row is dead.
        size: nodes of `grown`, at least `most` and up to `MOST_NODES`.

    Returns:
        int64 [most], the nodes' indices in `grown`; after the living ones that of its last row.
    """
    nodes = torch.empty(most, dtype=torch.long, device=grown[0].device)
    columns, kept_columns = grown[4].shape[1], kept[4].shape[1]
    programs.compact[(len(kept[0]),)](
        *grown[:4], grown[4].view(torch.uint8), *kept[:4], kept[4].view(torch.uint8), nodes,
        size, most, len(grown[0]) - 1, columns, kept_columns, _power(size), _power(kept_columns),
        num_warps=4,
    )  # fmt: skip
    return nodes


def any_nan(values: Tensor, flag: Tensor) -> None:
    """Sets `flag`, int64 [1], to 1 if `values`, float32 [n], hold a NaN, else to 0."""
    programs.any_nan[(1,)](values, flag, len(values), _power(len(values)), num_warps=1)


def survey(log_probs: Tensor, depths: Tensor, flag: Tensor, nodes: Tensor, depth: Tensor) -> None:
    """What there is to tell of a tree of n nodes.

    Args:
        log_probs, depths: float32 and int64 [n]; the former is minus infinity for dead nodes.
        flag, nodes, depth: int64 [1], set to whether one is a NaN, the living nodes but the first,
            and the largest depth of a living one.
    """
    count = len(log_probs)
    programs.survey[(1,)](log_probs, depths, flag, nodes, depth, count, _power(count), num_warps=4)


def walk(tree: tuple[Tensor, ...], choices: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """The path along the choices through the first n rows of a tree.

    Args:
        tree: the tensors of a `DraftTree`, see `DraftTree.tensors`.
        choices: int64 [n].
        most: nodes of the longest path.

    Returns:
        int64 [m] nodes and int64 [m] their choices, m the smaller of n and `most`; after the path
        the last row. int64 [1], the path's nodes.
    """
    tokens, parents, _, _, attends = tree
    rows = len(choices)
    most = min(rows, most)
    path, chosen = torch.empty(2, most, dtype=torch.long, device=choices.device)
    count = torch.empty(1, dtype=torch.long, device=choices.device)
    programs.walk[(1,)](
        tokens, parents, attends.view(torch.uint8), choices, path, chosen, count, rows, most,
        attends.shape[1], _power(rows),
        num_warps=1 if rows <= 64 else 4,
    )  # fmt: skip
    return path, chosen, count


def commit(
    path: Tensor,
    tokens: Tensor,
    count: Tensor,
    origins: Tensor,
    history: Tensor,
    position: Tensor,
    noted: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Commits the tokens of a path, and moves the `position`, int64 [1], of the root.

    Args:
        path, tokens, count: of `walk`.
        origins: int64, what each row of the tree was in the one that the draft grew.
        history: int64, the committed tokens by position.
        noted: int64 [at least m] and [1], set to tokens and count.

    Returns:
        int64 [m] each, the slots of the path's nodes in the target's cache and in the draft's, and
        those that they belong in.
    """
    most = len(path)
    sources, drafted, destinations = torch.empty(3, most, dtype=torch.long, device=path.device)
    programs.commit[(1,)](
        path, tokens, count, origins, history, position, *noted, sources, drafted, destinations,
        most, _power(most),
        num_warps=1,
    )  # fmt: skip
    return sources, drafted, destinations


def move_slots(storage: Tensor, sources: Tensor, destinations: Tensor) -> None:
    """Copies `storage` [..., slots, size] at the slots `sources` [k] to `destinations` [k]."""
    slots, size = storage.shape[-2:]
    stride = slots * size
    programs.move_slots[(storage.numel() // stride,)](
        storage, sources, destinations, len(sources), stride, size, _power(size),
        _power(len(sources)),
        num_warps=1,
    )  # fmt: skip


def norm(hidden: Tensor, norms: list[Any], living: Tensor | None = None) -> list[Tensor]:
    """`hidden` [n, width] normalised by each of one or two LayerNorm modules."""
    width = hidden.shape[1]
    early = _early(hidden, width <= _NARROW)
    outputs = [torch.empty_like(hidden) for _ in norms]
    first, last = norms[0], norms[-1]
    programs.norm[(len(hidden),)](
        hidden, first.weight, first.bias, last.weight, last.bias, outputs[0], outputs[-1],
        _or(living, hidden), first.eps, width, _power(width), len(norms) > 1, living is not None,
        early,
        num_warps=8, launch_pdl=early,
    )  # fmt: skip
    return outputs


def enter(
    hidden: Tensor, norms: list[Any], linears: list[Any], living: Tensor | None = None
) -> list[Tensor]:
    """A layer's projections [n, ...] of `hidden` [n, width]: of norm 1, and GELU of that of norm 2.

    Args:
        hidden: up to `MOST_ROWS` rows, or any number of which `living` counts.
        norms, linears: two LayerNorm and two Linear modules.
    """
    rows, width = hidden.shape
    early = _early(hidden, width <= _NARROW)
    outputs = [hidden.new_empty(rows, linear.weight.shape[0]) for linear in linears]
    totals = [output.shape[1] for output in outputs]
    weights = [tensor for linear in linears for tensor in (linear.weight, linear.bias)]
    counted = living is not None
    padded = _tile(rows, counted)
    if _is_narrow(width):
        how = _ENTER_NARROW
        count = _divisor(how.outputs, *totals)
        scales = [tensor for each in norms for tensor in (each.weight, each.bias)]
        programs.enter_narrow[(sum(totals) // count,)](
            hidden, *scales, *weights, *outputs, _or(living, hidden), rows, *totals, norms[0].eps,
            width, totals[0] // count, padded, count, _precision(hidden), counted, early,
            num_warps=how.warps if padded == TILE_ROWS else 8, launch_pdl=early,
        )  # fmt: skip
        return outputs
    normed = norm(hidden, norms, living)
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
        *normed, *weights, *outputs, _or(living, hidden), rows, *totals, width,
        totals[0] // count, padded, count, step, how.stages, _precision(hidden), counted, early,
        num_warps=how.warps, launch_pdl=early,
    )  # fmt: skip
    return outputs


def leave(
    hidden: Tensor,
    attended: Tensor,
    active: Tensor,
    linears: list[Any],
    workspace: Workspace,
    living: Tensor | None = None,
) -> Tensor:
    """`hidden` [n, width] + `attended` [n, width] by linear 1 + `active` [n, inner] by linear 2.

    Args:
        hidden: up to `MOST_ROWS` rows, or any number of which `living` counts.

    Raises:
        DecodeError: more pieces of work than `workspace` counts.
    """
    rows, width = hidden.shape
    early = _early(hidden, width <= _NARROW)
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
    counted = living is not None
    padded, splits = _tile(rows, counted), inner // width
    held = triton.cdiv(rows, padded) * padded
    parts = torch.empty((1 + splits) * held * width, dtype=torch.float32, device=hidden.device)
    how = _LEAVE_NARROW if _is_narrow(width) else _LEAVE_MANY
    count = _divisor(how.outputs, width)
    if _is_narrow(width):
        programs.leave_narrow[(width // count, 1 + splits)](
            hidden, attended, active, *weights, out, parts, workspace.counters(width // count),
            _or(living, hidden), rows, width, inner, splits, held, padded, count,
            _precision(hidden), counted, early,
            num_warps=how.warps, launch_pdl=early,
        )  # fmt: skip
        return out
    step = _divisor(how.step, width)
    programs.leave_many[(width // count, 1 + splits)](
        hidden, attended, active, *weights, out, parts, workspace.counters(width // count),
        _or(living, hidden), rows, width, inner, splits, held, padded, count, step, how.stages,
        _precision(hidden), counted, early,
        num_warps=how.warps, launch_pdl=early,
    )  # fmt: skip
    return out


class Surroundings(NamedTuple):
    """What n tokens that are about to be stored in a cache are shown, and where they stand.

    Attributes:
        old: uint8 [n, visible], of what was there before.
        new: uint8 [n, n], of one another.
        common: int32 [n], slots before the first that `old` hides.
        used: int32 [n], slots up to the last that it shows.
        cosines, sines: [n, rotary dimensions].
    """

    old: Tensor
    new: Tensor
    common: Tensor
    used: Tensor
    cosines: Tensor
    sines: Tensor


def surroundings(
    mask: Tensor,
    slots: Tensor,
    positions: Tensor,
    tables: tuple[Tensor, Tensor],
    living: Tensor | None = None,
) -> Surroundings:
    """What `attend` needs to know of n tokens in every layer.

    Args:
        mask: bool [n, visible], which slots each is shown.
        slots, positions: int64 [n]; positions beyond the tables are taken for their last.
        tables: cosines and sines [positions, rotary dimensions].
    """
    rows, visible = mask.shape
    rotary = tables[0].shape[1]
    old = torch.empty(rows, visible, dtype=torch.uint8, device=mask.device)
    new = torch.empty(rows, rows, dtype=torch.uint8, device=mask.device)
    common, used = torch.empty(2, rows, dtype=torch.int32, device=mask.device)
    found = Surroundings(old, new, common, used, *tables[0].new_empty(2, rows, rotary))
    early = _early(mask, small=True)
    programs.surroundings[(rows,)](
        mask.view(torch.uint8), slots, positions, *tables, *found, _or(living, slots), rows,
        visible, len(tables[0]) - 1, rotary, _power(rotary), _tile(rows, counted=False),
        living is not None, early,
        num_warps=4, launch_pdl=early,
    )  # fmt: skip
    return found


def attend(
    states: Tensor,
    slots: Tensor,
    around: Surroundings,
    keys: Tensor,
    values: Tensor,
    workspace: Workspace,
    living: Tensor | None = None,
) -> Tensor:
    """Attention of n new tokens, whose keys and values join the cache.

    Args:
        states: [n, 3 * width], for each head query, key and value, as GPT-NeoX projects them.
        slots: int64 [n].
        around: of `surroundings`; a token is shown at least one slot. Some of it is loaded before
            the kernel waits for the one before, so another lies between `surroundings` and this.
        keys, values: [1, heads, capacity, head size].

    Returns:
        [n, width].

    Raises:
        DecodeError: more pieces of work than `workspace` counts.
    """
    rows, visible = around.old.shape
    _, heads, _, size = keys.shape
    early = _early(states, heads * size <= _NARROW)
    rotary = around.cosines.shape[1]
    least = rows if living is None else TILE_ROWS
    how = next(how for most, how in _ATTEND.items() if least <= most or most == MOST_ROWS)
    chunks = triton.cdiv(visible, how.slots)
    steps = how.steps
    if rows > 1:
        tasks = heads * triton.cdiv(least, how.rows) * chunks
        while steps > 1 and tasks < steps * _PROGRAMS:
            steps //= 2
    blocks, splits = triton.cdiv(rows, how.rows), 1 + triton.cdiv(chunks, steps)
    padded = max(16, _power(size))
    out = states.new_empty(rows, heads * size)
    notes = heads * blocks * splits * how.rows
    parts = torch.empty(notes * (padded + 2), dtype=torch.float32, device=states.device)
    programs.attend[(heads, splits, blocks)](
        states, slots, *around, keys, values, out,
        parts[2 * notes :], parts, parts[notes:], workspace.counters(heads * blocks),
        _or(living, slots), rows, visible, keys.stride(1), size**-0.5,
        heads, size, padded, rotary, how.rows, how.slots, steps, how.stages,
        # Of several rows the splits are put together one by one, whatever their number.
        _power(splits) if rows == 1 else 1, rows == 1, blocks > 1,
        _precision(states), living is not None, early,
        num_warps=how.warps, maxnreg=how.registers, launch_pdl=early,
    )  # fmt: skip
    return out


def best(
    logits: Tensor,
    count: int,
    workspace: Workspace,
    log_probs: bool,
    living: Tensor | None = None,
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
    early = _early(logits, small=True)
    parts = triton.cdiv(vocabulary, _VOCABULARY)
    device = logits.device
    values = torch.empty(rows, count, dtype=torch.float32, device=device)
    tokens = torch.empty(rows, count, dtype=torch.long, device=device)
    part_values = torch.empty(rows * parts * (count + 1), dtype=torch.float32, device=device)
    part_tokens = torch.empty(rows * parts * count, dtype=torch.int32, device=device)
    programs.best[(rows, parts)](
        logits, values, tokens, part_values, part_tokens, part_values[rows * parts * count :],
        workspace.counters(rows), _or(living, logits), vocabulary, count, _VOCABULARY,
        _power(parts), _power(parts * count), log_probs, living is not None, early,
        num_warps=8, launch_pdl=early,
    )  # fmt: skip
    return values, tokens
