"""The Triton kernels against PyTorch, and decoding through them: compiled on CUDA, and on a CPU by
Triton's interpreter, which runs the same source program by program."""

import copy
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from micro_pair import micro, study  # noqa: F401 - a fixture
from models import CONTEXT, STRATEGIES, build, draft_of, oracle, prompt, target_of
from torch.nn import functional as F

import dynatree
from dynatree import fused, gpu
from dynatree.accept import accept_greedy
from dynatree.errors import DecodeError
from dynatree.runner import ModelRunner
from dynatree.runtime import Runtime
from dynatree.sampling import Sampling
from dynatree.selection import most_probable
from dynatree.tree import DraftTree

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

import tiles

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if CUDA else torch.device("cpu")
ROWS = (1, 2, 5, 16, 17, 64)
WIDE = dynatree.Tree(depth=4, branch_factor=3, prune_threshold=0.004)
"""Levels of up to 81 nodes, of which few live."""
GEOMETRIES = {"narrow": (32, 64, 4, 2), "wide": (160, 640, 2, 20), "draft": (128, 512, 2, 16)}
"""Width, width of the MLP, heads and rotary dimensions."""


@pytest.fixture(scope="module")
def kernels():
    pytest.importorskip("triton", reason="needs Triton: pip install triton")
    if not CUDA:
        from triton.runtime import interpreter

        patch = interpreter._patch_lang_tensor

        def patched(tensor, scope):
            patch(tensor, scope)
            # Of an array with one element NumPy 2.4 makes no number.
            scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

        interpreter._patch_lang_tensor = patched
    from dynatree import cuda_kernels

    with pytest.MonkeyPatch.context() as monkeypatch:
        if not CUDA:
            monkeypatch.setattr(gpu, "kernels", lambda device: cuda_kernels)
            monkeypatch.setattr("dynatree.runner.packed", lambda model: model)
        yield cuda_kernels
    gpu.workspace.cache_clear()


@pytest.fixture
def workspace(kernels):
    workspace = kernels.Workspace(DEVICE)
    yield workspace
    # Whoever comes last leaves it as it was found.
    assert not workspace.finished.any()


@pytest.fixture(params=["float32", pytest.param("bfloat16", marks=pytest.mark.gpu)])
def dtype(request):
    """The interpreter multiplies bfloat16 as if it were integers."""
    return getattr(torch, request.param)


def close(found, wanted):
    """Equal but for the rounding of a few sums."""
    error = (found.double() - wanted.double()).norm() / wanted.double().norm()
    assert error < (2e-6 if found.dtype == torch.float32 else 1.5e-2)


def random(*shape, dtype=torch.float32, scale=1.0):
    return (scale * torch.randn(*shape)).to(DEVICE, dtype)


def linear(inputs, outputs, dtype):
    made = torch.nn.Linear(inputs, outputs, device=DEVICE, dtype=dtype)
    torch.nn.init.normal_(made.weight, std=inputs**-0.5)
    torch.nn.init.normal_(made.bias, std=0.1)
    return made.requires_grad_(False)


def layer_norm(width, dtype):
    made = torch.nn.LayerNorm(width, device=DEVICE, dtype=dtype)
    torch.nn.init.normal_(made.weight, mean=1.0, std=0.1)
    torch.nn.init.normal_(made.bias, std=0.1)
    return made.requires_grad_(False)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_what_enters_and_leaves_a_layer(kernels, workspace, dtype, geometry, rows):
    width, inner, _, _ = GEOMETRIES[geometry]
    torch.manual_seed(rows)
    norms = [layer_norm(width, dtype), layer_norm(width, dtype)]
    enters = [linear(width, 3 * width, dtype), linear(width, inner, dtype)]
    leaves = [linear(width, width, dtype), linear(inner, width, dtype)]
    hidden, attended = random(rows, width, dtype=dtype), random(rows, width, dtype=dtype)
    states, active = kernels.enter(hidden, norms, enters)
    close(states, enters[0](norms[0](hidden)))
    close(active, F.gelu(enters[1](norms[1](hidden))))
    found = kernels.leave(hidden, attended, active, leaves, workspace)
    close(found, leaves[1](active) + leaves[0](attended) + hidden)
    (found,) = kernels.norm(hidden, norms[:1])
    close(found, norms[0](hidden))


def rotated(states, cosines, sines):
    turned, rest = states[..., : cosines.shape[-1]], states[..., cosines.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    return torch.cat((turned * cosines + torch.cat((-second, first), -1) * sines, rest), -1)


@pytest.mark.parametrize("shown", ["prefix", "scattered"])
@pytest.mark.parametrize("rows", [*ROWS, 100])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_attention(kernels, workspace, dtype, geometry, rows, shown):
    """New tokens in any slots and at any positions, a prefix that all are shown or none at all."""
    width, _, heads, rotary = GEOMETRIES[geometry]
    size, visible, begin = width // heads, 512, 230
    torch.manual_seed(rows)
    states = random(rows, 3 * width, dtype=dtype)
    keys, values = (random(1, heads, visible + 8, size, dtype=dtype) for _ in range(2))
    angles = random(600, rotary)
    tables = angles.cos().to(dtype), angles.sin().to(dtype)
    positions = torch.randint(600, (rows,), device=DEVICE)
    slots = begin + torch.randperm(2 * rows, device=DEVICE)[:rows]
    mask = torch.rand(rows, visible, device=DEVICE) < 0.3
    mask[:, : begin if shown == "prefix" else 1] = True
    query, key, value = states.view(rows, heads, 3 * size).transpose(0, 1).chunk(3, dim=-1)
    at = tables[0][positions], tables[1][positions]
    wanted_keys = keys.index_copy(2, slots, rotated(key, *at)[None])
    wanted_values = values.index_copy(2, slots, value[None])
    wanted = F.scaled_dot_product_attention(
        rotated(query, *at)[None],
        wanted_keys[:, :, :visible],
        wanted_values[:, :, :visible],
        attn_mask=mask[None, None],
    )
    around = kernels.surroundings(mask, slots, positions, tables)
    # Which may not be what the kernel follows.
    kernels.select_rows(states, slots.new_zeros(1))
    kernels.select_rows(states, slots.new_zeros(1))
    found = kernels.attend(states, slots, around, keys, values, workspace)
    close(found, wanted[0].transpose(0, 1).reshape(rows, width))
    close(keys, wanted_keys)
    assert torch.equal(values, wanted_values)


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_surroundings(kernels, rows):
    torch.manual_seed(rows)
    mask = torch.rand(rows, 1300, device=DEVICE) < 0.5
    mask[:, :7] = True
    slots = torch.randperm(1300, device=DEVICE)[:rows]
    # Padding may stand beyond the tables.
    positions = torch.randint(30, (rows,), device=DEVICE)
    tables = random(20, 6), random(20, 6)
    found = kernels.surroundings(mask, slots, positions, tables)
    old = mask.index_fill(1, slots, False)
    assert torch.equal(found.old.bool(), old)
    assert torch.equal(found.new.bool(), mask[:, slots])
    for angles, table in zip((found.cosines, found.sines), tables, strict=True):
        assert torch.equal(angles, table[positions.clamp(max=19)])
    assert found.common.tolist() == [(~row).nonzero()[0].item() for row in old]
    assert found.used.tolist() == [row.nonzero()[-1].item() + 1 for row in old]


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("vocabulary", [40, 4096, 5000])
def test_best_tokens(kernels, workspace, dtype, vocabulary, count):
    """Of equal logits, of which 16 bits make many, the smaller token comes first."""
    torch.manual_seed(count)
    logits = random(5, vocabulary, dtype=dtype, scale=3.0)
    logits[1] = logits[1].round()
    order = logits.sort(dim=-1, descending=True, stable=True)
    values, tokens = kernels.best(logits, count, workspace, log_probs=False)
    assert torch.equal(tokens, order.indices[:, :count])
    assert torch.equal(values, order.values[:, :count].float())
    values, again = kernels.best(logits, count, workspace, log_probs=True)
    assert torch.equal(again, tokens)
    wanted = logits.log_softmax(dim=-1, dtype=torch.float32).gather(-1, tokens)
    torch.testing.assert_close(values, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("log_probs", [False, True])
def test_what_is_not_a_number_stays_so(kernels, workspace, log_probs):
    logits = random(3, 5000)
    logits[1, 4321] = torch.nan
    values, tokens = kernels.best(logits, 2, workspace, log_probs)
    assert values.isnan().tolist() == [[False] * 2, [True] * 2, [False] * 2]
    assert tokens.max() < 5000


def test_infinite_logits(kernels, workspace):
    """Impossible tokens are named once each; the largest may be infinite, and is no NaN."""
    logits = torch.full((3, 5000), -torch.inf, device=DEVICE)
    logits[0, 4500], logits[1, 7] = 1.0, torch.inf
    values, tokens = kernels.best(logits, 3, workspace, log_probs=False)
    assert tokens.tolist() == [[4500, 0, 1], [7, 0, 1], [0, 1, 2]]
    assert torch.equal(values, logits.gather(-1, tokens))
    values, again = kernels.best(logits[:1], 3, workspace, log_probs=True)
    assert torch.equal(again, tokens[:1])
    assert values.tolist() == [[0.0, -torch.inf, -torch.inf]]


def test_more_work_than_can_be_counted_is_an_error(kernels, workspace):
    assert len(workspace.counters(4097)) >= 4097
    with pytest.raises(DecodeError, match="lower node_budget"):
        workspace.counters(1 << 20)


def test_selections_and_moves(kernels):
    table = random(40, 2100)
    rows = torch.randint(40, (9,), device=DEVICE)
    assert torch.equal(kernels.select_rows(table, rows), table[rows])
    booleans = (table > 0)[:, 3:]
    columns = torch.randint(2000, (1500,), device=DEVICE)
    assert torch.equal(kernels.select_columns(booleans, columns), booleans[:, columns])
    storage = random(3, 2, 1, 4, 40, 20)
    sources = torch.tensor([5, 7, 6, 12, 12], device=DEVICE)
    destinations = torch.tensor([5, 6, 7, 8, 9], device=DEVICE)
    wanted = storage.index_copy(-2, destinations, storage.index_select(-2, sources))
    kernels.move_slots(storage, sources, destinations)
    assert torch.equal(storage, wanted)


@pytest.mark.parametrize("position", [1, 300])
def test_a_tree_begins(kernels, position):
    """What lies where, as PyTorch has it."""
    tree, visible = DraftTree(300, DEVICE), 512
    history = torch.randint(99, (600,), device=DEVICE)
    here = torch.tensor([position], device=DEVICE)
    offsets = torch.tensor([-1, 0], device=DEVICE)
    depths = torch.arange(4, device=DEVICE)[:, None].repeat(1, 5)
    nodes = len(tree.tokens)
    found = kernels.begin(history, here, offsets, depths, tree.root, nodes, visible)
    counted = torch.arange(1, visible + 1, device=DEVICE)
    assert torch.equal(found.columns, tree.columns(counted, here))
    assert torch.equal(found.slots, tree.indices + here)
    assert torch.equal(found.positions, depths + here)
    assert torch.equal(found.recent, here + offsets)
    assert torch.equal(found.tokens, history[found.recent])
    assert torch.equal(found.mask, counted - 1 <= found.recent[:, None])
    assert tree.tokens[0] == history[position]


@pytest.mark.parametrize(("children", "depth"), [(1, 5), (2, 4), (3, 3)])
@pytest.mark.parametrize("least", [-float("inf"), -1.6])
@pytest.mark.parametrize("budget", [3, 7, 99])
def test_trees(kernels, children, depth, least, budget, monkeypatch):
    """Levels that are written in place, and the most probable nodes, as PyTorch has them."""
    most = sum(children**level for level in range(depth + 1))
    kept_most = min(most, budget + 1)
    torch.manual_seed(most)
    grown = [DraftTree(most, DEVICE) for _ in range(2)]
    kept = [DraftTree(kept_most, DEVICE) for _ in range(2)]
    living = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    for reuse in range(3):
        root = torch.tensor([reuse], device=DEVICE)
        for tree in grown:
            tree.plant(root)
        levels = [tree.level for tree in grown]
        width = 1
        for level in range(depth):
            # Coarse, so that some are equal.
            values = -torch.randint(1, 9, (width, children), device=DEVICE) / 8
            values = values.sort(descending=True).values
            if reuse == 2 and level == 1:
                values[-1, -1] = torch.nan
            tokens = torch.randint(99, (width, children), device=DEVICE)
            dead = levels[0].log_probs == -torch.inf
            log_probs = (values + levels[0].log_probs[:, None]).view(-1)
            log_probs = log_probs.masked_fill(log_probs < least, -torch.inf)
            # Of dead nodes nothing is computed.
            values[dead], tokens[dead] = torch.nan, -(10**9)
            number = int((log_probs != -torch.inf).sum())
            # Of few nodes some have no place, of many the last places are those of dead ones.
            size = min(width * children, budget, number + 1 + reuse)
            best = log_probs.sort(descending=True, stable=True).indices[:size]
            lives = torch.zeros_like(log_probs, dtype=torch.bool).index_fill(0, best, True)
            lives &= log_probs != -torch.inf
            log_probs, number = log_probs.masked_fill(~lives, -torch.inf), int(lives.sum())
            parents = torch.arange(width, device=DEVICE).repeat_interleave(children)
            order = (~lives).to(torch.uint8).sort(stable=True).indices[:size]
            known = tokens.view(-1).masked_fill(~lives, 0)
            start, count = levels[1].start, grown[1].size
            kernels.grow(
                values, tokens, levels[1].log_probs, start, count, least, size, grown[1].tensors,
                living,
            )  # fmt: skip
            levels[0] = grown[0].extend(parents[order], known[order], log_probs[order])
            levels[1] = grown[1].placed(size)
            assert living.item() == number
            width = size
        for tree in grown:
            tree.join()
        with monkeypatch.context() as patch:
            patch.setattr(gpu, "kernels", lambda device: None)
            nodes = kept[0].take(grown[0], kept_most)
        assert torch.equal(kept[1].take(grown[1], kept_most), nodes)
        for one, other in ((grown[0], grown[1]), (kept[0], kept[1])):
            for wanted, found in zip(one.tensors, other.tensors, strict=True):
                if reuse == 2 and one is kept[0]:
                    # A tree with what is not a number is refused; where it came from means nothing.
                    continue
                torch.testing.assert_close(
                    found[: one.size], wanted[: one.size], rtol=0, atol=0, equal_nan=True
                )
        if reuse < 2:
            assert torch.equal(kept[1].tensors[4], kept[0].tensors[4])
        else:
            found, wanted = (trees[1].log_probs.isnan().any() for trees in (kept, grown))
            assert found == wanted


def test_what_the_host_is_told(kernels):
    log_probs = torch.tensor([0.0, -1.0, -torch.inf, -2.0, -torch.inf], device=DEVICE)
    depths = torch.tensor([0, 1, 5, 2, 7], device=DEVICE)
    flag, nodes, depth = torch.full((3, 1), 9, device=DEVICE)
    kernels.survey(log_probs, depths, flag, nodes, depth)
    assert (flag.item(), nodes.item(), depth.item()) == (0, 2, 2)
    for values, broken in ((log_probs, 0), (log_probs * torch.nan, 1)):
        kernels.survey(values, depths, flag, nodes, depth)
        assert flag.item() == broken
        flag.fill_(9)
        kernels.any_nan(values, flag)
        assert flag.item() == broken


@pytest.mark.parametrize("rows", [2, 7, 16])
@pytest.mark.parametrize("longest", [3, 9])
def test_what_is_accepted_and_committed(kernels, rows, longest, monkeypatch):
    """In random trees with padding, as PyTorch has it."""
    torch.manual_seed(rows)
    position, ends = 20, set()
    for living in range(1, rows + 1):
        tree = DraftTree(16, DEVICE)
        tree.plant(torch.tensor([3], device=DEVICE))
        for node in range(1, living):
            parent = int(torch.randint(node, ()))
            # Siblings hold different tokens.
            tree.tokens[node] = (tree.parents[1:node] == parent).sum()
            tree.parents[node] = parent
            tree.ancestors[node] = tree.ancestors[parent]
            tree.ancestors[node, node] = True
        choices = torch.randint(2, (rows,), device=DEVICE)
        with monkeypatch.context() as patch:
            patch.setattr(gpu, "kernels", lambda device: None)
            wanted = accept_greedy(tree, choices, longest, static=True)
        found = accept_greedy(tree, choices, longest, static=True)
        count = min(int(wanted.count), longest)
        ends.add(count)
        assert int(found.count) == count
        assert torch.equal(found.path[:count], wanted.path[:count])
        assert torch.equal(found.tokens[:count], wanted.tokens[:count])
        origins = torch.randperm(17, device=DEVICE)
        history = torch.zeros(64, dtype=torch.long, device=DEVICE)
        here = choices.new_full((1,), position)
        noted = history.new_zeros(12), history.new_zeros(1)
        sources, drafted, destinations = kernels.commit(
            found.path, found.tokens, found.count, origins, history, here, noted
        )
        assert torch.equal(sources, found.path + position)
        assert torch.equal(drafted, origins[found.path] + position)
        assert torch.equal(destinations, tree.indices[: len(found.path)] + position)
        assert torch.equal(history[position + 1 :][:count], found.tokens[:count])
        assert torch.equal(noted[0][:count], found.tokens[:count])
        assert noted[1].item() == count
        assert here.item() == position + count
    assert len(ends) > 1


# Whole models.


class Direct(Runtime):
    """The static round with the fused forward, run and not captured."""

    def __init__(self):
        super().__init__("eager", DEVICE, static=True)

    def callable(self, model):
        assert fused.serves(model)
        return fused.Forward(model)


def direct(runner):
    """On a CPU a runner gives PyTorch's attention numbers for a mask."""
    runner._additive = False
    return runner


def decoder_of(strategy, max_length=CONTEXT + 1):
    models = (target_of("gpt_neox"), draft_of("gpt_neox", "noisy"))
    models = (copy.deepcopy(model).to(DEVICE) for model in models)
    decoder = dynatree.Decoder(*models, strategy, max_length, Direct())
    for _, runner in decoder._runners():
        direct(runner)
    return decoder


@pytest.mark.parametrize("rows", [1, 3, 40, 70])
def test_the_forward(kernels, rows):
    model = build("gpt_neox", layers=2, seed=5).to(DEVICE)
    runners = (
        direct(ModelRunner(model, 264, Direct())),
        ModelRunner(model, 264, Runtime("eager", DEVICE)),
    )
    tokens, slots = prompt(rows, 1).to(DEVICE), 33 + torch.arange(rows, device=DEVICE)
    mask = torch.rand(rows, 256, device=DEVICE) < 0.5
    mask[:, 0] = True
    logits = []
    with torch.inference_mode():
        for runner in runners:
            runner.prefill(prompt(33).to(DEVICE))
            logits.append(runner.forward(tokens, slots - rows // 4, slots, mask))
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("living", [0, 1, 16, 17, 40])
@pytest.mark.parametrize("width", [32, 96])
def test_tokens_that_only_fill_a_shape_are_left_out(kernels, width, living):
    """What is wanted is as if nothing else was there, and of the rest nothing is stored."""
    heads = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": 2}
    model = build("gpt_neox", layers=2, seed=5, **heads).to(DEVICE)
    rows, begin = 40, 33
    tokens, slots = prompt(rows, 1).to(DEVICE), begin + torch.arange(rows, device=DEVICE)
    mask = torch.rand(rows, 256, device=DEVICE) < 0.5
    # Others are seen by nobody, as dead nodes are no ancestors.
    mask[:, 0], mask[:living, begin + living : begin + rows] = True, False
    runners = [direct(ModelRunner(model, 264, Direct())) for _ in range(2)]
    with torch.inference_mode():
        for runner in runners:
            runner.prefill(prompt(begin).to(DEVICE))
        before = runners[0].cache.storage.clone()
        counted = torch.tensor([living], dtype=torch.int32, device=DEVICE)
        found = runners[0].forward(tokens, slots, slots, mask, counted)
        wanted = runners[1].forward(tokens, slots, slots, mask)
        log_probs, best = most_probable(found, 2, counted)
        wanted_log_probs, wanted_best = most_probable(wanted, 2)
    torch.testing.assert_close(found[:living], wanted[:living], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(log_probs[:living], wanted_log_probs[:living], rtol=1e-4, atol=1e-4)
    assert torch.equal(best[:living], wanted_best[:living])
    storage, end = runners[0].cache.storage, begin + living
    torch.testing.assert_close(
        storage[..., begin:end, :], runners[1].cache.storage[..., begin:end, :]
    )
    assert torch.equal(storage[..., end:, :], before[..., end:, :])
    assert not gpu.workspace(DEVICE).finished.any()


@pytest.mark.parametrize(
    "strategy",
    [
        dynatree.Autoregressive(),
        dynatree.Linear(num_draft_tokens=2),
        WIDE,
        dynatree.Tree(depth=2, branch_factor=2, prune_threshold=0.05, node_budget=6),
        STRATEGIES["small_budget"],
        STRATEGIES["ngram_small"],
    ],
    ids=lambda strategy: strategy.describe(),
)
def test_decoding_is_exact(kernels, strategy):
    """All strategies, and through graphs, are in `test_gpu.py`."""
    decoder = decoder_of(strategy)
    for length, new in ((17, 6), (CONTEXT + 1 - 3, 3)):
        ids = prompt(length).to(DEVICE)
        assert decoder.decode(ids, new).tokens == oracle(decoder._models[0], ids, new)


def test_a_sample_is_that_of_exact_shapes(kernels):
    """Which walks the tree with PyTorch's operators, and the same noise."""
    strategy = dynatree.Tree(depth=2, branch_factor=2, prune_threshold=0.05, node_budget=4)
    how = Sampling.checked(temperature=0.9, top_p=1.0, top_k=0, seed=3, mode="coupled")
    outputs = []
    for runtime in (Direct(), Runtime("eager", DEVICE, static=False)):
        models = (target_of("gpt_neox"), draft_of("gpt_neox", "noisy"))
        models = (copy.deepcopy(model).to(DEVICE) for model in models)
        decoder = dynatree.Decoder(*models, strategy, 30, runtime, how)
        if isinstance(runtime, Direct):
            for _, runner in decoder._runners():
                direct(runner)
        outputs.append(decoder.decode(prompt(9).to(DEVICE), 8).tokens)
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize(
    ("strategy", "wide"),
    [
        (WIDE, True),
        (WIDE.model_copy(update={"node_budget": 20, "prune_threshold": 0.001}), True),
        (dynatree.Tree(depth=5, prune_threshold=0.0, node_budget=9), False),
        (dynatree.Tree(depth=7, prune_threshold=0.02, node_budget=16), False),
    ],
    ids=lambda value: getattr(value, "prune_threshold", value),
)
def test_a_tree_in_place_is_the_one_that_exact_shapes_give(kernels, strategy, wide, monkeypatch):
    """A wide level is read as far as its nodes live."""
    decoder, ids = decoder_of(strategy, 60), prompt(9).to(DEVICE)
    models = [copy.deepcopy(model) for model in decoder._models]
    exact = dynatree.Decoder(*models, strategy, 60, Runtime("eager", DEVICE, static=False))
    counts, call = [], fused.Forward.__call__

    def counting(self, living=None, **inputs):
        if living is not None:
            counts.append((inputs["input_ids"].shape[1], living.item()))
        return call(self, living=living, **inputs)

    monkeypatch.setattr(fused.Forward, "__call__", counting)
    with torch.inference_mode():
        for each in (decoder, exact):
            each._prefill(ids)
            each._grow_phase(0, strategy.max_depth, each.runtime.visible(60))
    found, wanted = decoder._tree, exact._tree
    size = wanted.size
    for name in ("tokens", "parents", "depths"):
        assert torch.equal(getattr(found, name)[:size], getattr(wanted, name)[:size])
    assert (found.log_probs[size:] == -torch.inf).all()
    assert torch.equal(found.ancestors[:size, :size], wanted.ancestors[:size, :size])
    assert bool(counts) == wide
    for rows, living in counts:
        assert rows > kernels.TILE_ROWS
        assert 0 < living <= rows


def test_a_tree_grows_in_place_where_nothing_is_to_be_chosen(kernels, monkeypatch):
    """All trees do whose nodes are all expanded."""
    calls = []
    grow = kernels.grow
    monkeypatch.setattr(kernels, "grow", lambda *args: calls.append(1) or grow(*args))
    for strategy, levels in (
        (dynatree.Tree(depth=3, branch_factor=2, prune_threshold=0.2, node_budget=14), 3),
        (dynatree.Tree(depth=3, branch_factor=2, prune_threshold=0.0, node_budget=3), 3),
        (dynatree.Linear(num_draft_tokens=4), 4),
        (dynatree.BestFirst(), 0),
    ):
        calls.clear()
        decoder = decoder_of(strategy, max_length=40)
        with torch.inference_mode():
            decoder._prefill(prompt(5).to(DEVICE))
            decoder._grow_phase(0, strategy.max_depth, 256)
        assert len(calls) == levels


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": "relu"},
        {"use_parallel_residual": False},
        {"attention_bias": False},
        {"intermediate_size": 80},
        {"attention": "eager"},
    ],
)
def test_models_that_it_cannot_compute_are_left_to_transformers(kernels, change):
    assert fused.serves(build("gpt_neox").to(DEVICE))
    assert not fused.serves(build("gpt_neox", **change).to(DEVICE))
    assert not fused.serves(build("llama").to(DEVICE))


class Adapted(torch.nn.Linear):
    """What adapters put in the place of a layer."""


def adapt(model):
    model.gpt_neox.layers[0].mlp.dense_h_to_4h.__class__ = Adapted


def hook(model):
    model.gpt_neox.layers[0].attention.register_forward_hook(lambda *given: None)


@pytest.mark.parametrize(
    "change",
    [adapt, hook, lambda model: model.double(), lambda model: model.lm_head.bfloat16()],
    ids=["adapter", "hook", "float64", "two dtypes"],
)
def test_models_that_were_changed_are_left_to_transformers(kernels, change):
    model = build("gpt_neox").to(DEVICE)
    change(model)
    assert not fused.serves(model)


@pytest.mark.skipif(CUDA, reason="the other tests compile them")
@pytest.mark.parametrize(("capability", "shared"), [(90, 232_448), (80, 166_912)])
def test_every_launch_compiles_for_a_gpu(capability, shared, tmp_path):
    """With the shared memory that a program can have on an H100 or H200, and on an A100."""
    pytest.importorskip("triton", reason="needs Triton: pip install triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("compiled_kernels.py"), str(capability)],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    launches = [json.loads(line) for line in done.stdout.splitlines()]
    kernels = Path(gpu.__file__).with_name("triton_kernels.py").read_text(encoding="utf-8")
    # What begins with an underscore is called by others.
    assert {name for name, _ in launches} == set(re.findall(r"^def ([a-z]\w*)", kernels, re.M))
    assert max(needed for _, needed in launches) <= shared


# The benchmark that chose their constants.


@pytest.fixture
def run_tiles(micro, tmp_path, monkeypatch):  # noqa: F811
    """Calls the command with options, in a folder of its own, without warm-up."""
    config = study(micro, ["The with statement"], {"dynatree": {"strategy": "tree"}}, warmup=0)
    config["pairs"]["micro"]["device"] = DEVICE.type
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["bench/tiles.py", *options])
        tiles.reporting(tiles.main)

    return run


def test_every_choice_of_tiles_is_timed_and_computes_the_same(
    kernels, run_tiles, tmp_path, monkeypatch
):
    used = []

    class Launch:
        """Notes what `attend` is launched with."""

        def __getitem__(self, grid):
            def launch(*args, **options):
                used.append((*args[-10:-6], options["num_warps"], options["maxnreg"]))
                return attend[grid](*args, **options)

            return launch

    attend = kernels.programs.attend
    monkeypatch.setattr(kernels.programs, "attend", Launch())
    monkeypatch.setattr(kernels, "_PROGRAMS", 1)
    monkeypatch.setattr(tiles, "Runtime", lambda *args, **options: Direct())
    monkeypatch.setattr(tiles, "ModelRunner", lambda *args: direct(ModelRunner(*args)))
    options = ["--out", "out", "--runs", "1", "--repeats", "1", "--context", "20"]
    options += ["--rows", "2", "--constants", "_early", "_ATTEND"]
    before = {name: getattr(kernels, name) for name in ("_early", "_ATTEND")}
    run_tiles(*options)
    assert before == {name: getattr(kernels, name) for name in before}
    (written,) = (tmp_path / "out").glob("tiles-micro-*.json")
    forwards = json.loads(written.read_text())["forwards"]
    early = {"early never", "early always"} if gpu.capability(DEVICE) >= (9, 0) else set()
    assert forwards.keys() == {"target 2", "draft 2"}
    others = [each for each in tiles.CHOICES if each.constant == "_ATTEND" and 2 in each.rows]
    for choices in forwards.values():
        assert choices.keys() == {tiles.PRESENT} | early | {choice.name for choice in others}
        for facts in choices.values():
            assert facts["difference"] < 1e-5
            assert facts["ms"] == pytest.approx(1e3 * np.median(facts["seconds"]))
            assert len(facts["seconds"]) == 1
    present = before["_ATTEND"][16]
    assert set(used) == {present, *(type(present)(*choice.value) for choice in others)}
    table = written.with_suffix(".md").read_text()
    for name, choices in forwards.items():
        rows = [line for line in table.splitlines() if line.startswith(f"| {name} |")]
        ratios = [float(row.split("|")[4]) for row in rows]
        assert len(rows) == len(choices)
        assert ratios == sorted(ratios)
        assert f"| {name} | {tiles.PRESENT} |" in table


def test_tiles_are_chosen_on_a_gpu(run_tiles, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "kernels", lambda device: None)
    with pytest.raises(SystemExit):
        run_tiles("--device", "cpu", "--rows", "1")
    assert "need an NVIDIA GPU of compute capability 8.0 or later, got cpu" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--runtime", "compiled"], "--runtime: only in CUDA graphs .* got 'compiled'"),
        ([], "--pair: the kernels do not serve the target \\(a LlamaForCausalLM"),
    ],
)
def test_tiles_of_what_the_kernels_do_not_serve_are_refused(
    kernels, run_tiles, monkeypatch, capsys, options, message
):
    if not options:
        found = tiles.load

        def load(*arguments):
            setting = found(*arguments)
            llama = target_of("llama").to(DEVICE)
            return replace(setting, pair=replace(setting.pair, target=llama))

        monkeypatch.setattr(tiles, "load", load)
    with pytest.raises(SystemExit):
        run_tiles("--rows", "1", *options)
    assert re.search(message, capsys.readouterr().err)


def test_every_constant_that_tiles_replaces_is_there(kernels):
    for choice in tiles.CHOICES:
        for rows in choice.rows:
            value = tiles.chosen(choice, kernels, rows)
            assert type(value) is type(getattr(kernels, choice.constant)) or callable(value)
            assert value != getattr(kernels, choice.constant), f"{choice.name} is no other"
