"""The C++ operators: their values, how they are compiled, and where they are not."""

import math
import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import needs_kernel
from torch.utils import cpp_extension

from dynatree import kernel
from dynatree.accept import accept_greedy
from dynatree.tree import DraftTree

EXACT = """
import torch
from dynatree import kernel
assert kernel.available()
generator = torch.Generator().manual_seed(0)
for outputs, inputs in ((1, 1), (16, 8), (33, 7), (100, 130), (40, 1024)):
    for rows in (1, 5, 6, 7, 13, 14, 15, 40):
        # Sums of small whole numbers are exact in any order.
        weight, bias, states = (
            torch.randint(-8, 9, size, generator=generator).float()
            for size in ((outputs, inputs), (outputs,), (1, rows, inputs))
        )
        product = kernel.multiply_rows(states, *kernel.panels(weight, bias), outputs)
        assert torch.equal(product, states @ weight.T + bias), (outputs, inputs, rows)
print(torch.backends.cpu.get_cpu_capability())
"""


@needs_kernel
@given(
    rows=st.integers(1, 70),
    inputs=st.integers(1, 200),
    outputs=st.integers(1, 200),
    biased=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_it_is_the_product(rows, inputs, outputs, biased, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
    bias = torch.randn(outputs, generator=generator, dtype=torch.float64) if biased else None
    states = torch.randn(2, rows, inputs, generator=generator, dtype=torch.float64)
    expected = torch.nn.functional.linear(states, weight, bias)
    packed = kernel.panels(weight.float(), None if bias is None else bias.float())
    product = kernel.multiply_rows(states.float(), *packed, outputs)
    assert product.shape == expected.shape
    torch.testing.assert_close(product.double(), expected, rtol=1e-4, atol=1e-4)


@needs_kernel
@pytest.mark.parametrize("inputs", [300, 1024])
def test_a_row_is_the_same_whatever_is_multiplied_with_it(inputs):
    weight, bias = kernel.panels(torch.randn(70, inputs), torch.randn(70))
    states = torch.randn(1, 50, inputs)
    whole = kernel.multiply_rows(states, weight, bias, 70)
    for first, count in ((0, 1), (3, 1), (0, 13), (5, 14), (20, 30), (49, 1)):
        part = states[:, first : first + count]
        product = kernel.multiply_rows(part, weight, bias, 70)
        assert torch.equal(product, whole[:, first : first + count])


@needs_kernel
def test_rows_may_lie_apart():
    weight, bias = kernel.panels(torch.randn(40, 12), None)
    states = torch.randn(1, 12, 9).transpose(1, 2)
    expected = kernel.multiply_rows(states.contiguous(), weight, bias, 40)
    assert torch.equal(kernel.multiply_rows(states, weight, bias, 40), expected)


@needs_kernel
@pytest.mark.parametrize("wrong", ["inputs", "outputs", "dtype", "too_few_outputs"])
def test_what_does_not_fit_is_refused(wrong):
    weight, bias = kernel.panels(torch.randn(40, 12), None)
    width = kernel.WIDTH[torch.backends.cpu.get_cpu_capability()]
    states = torch.randn(1, 3, 11 if wrong == "inputs" else 12)
    if wrong == "dtype":
        states = states.double()
    most = len(weight) * width
    outputs = {"outputs": most + 1, "too_few_outputs": most - width}.get(wrong, 40)
    with pytest.raises(RuntimeError, match="do not fit, or are not float32"):
        kernel.multiply_rows(states, weight, bias, outputs)


@needs_kernel
def test_processors_without_avx512_have_a_kernel_too():
    """In a process of its own: PyTorch settles what to use once."""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run(
        [sys.executable, "-c", EXACT], env=environment, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stdout) == (0, "AVX2\n"), done.stderr


def test_a_processor_without_vectors_has_none(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not kernel.available.__wrapped__()


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (RuntimeError("Error building extension\nmore"), r"\(Error building extension more\)"),
        (OSError(), r"\(OSError\)"),
    ],
)
def test_what_cannot_be_compiled_is_told_and_done_without(failure, said, monkeypatch):
    def fails(_):
        raise failure

    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(kernel, "_load", fails)
    with pytest.warns(kernel.KernelWarning, match=said):
        assert not kernel.available.__wrapped__()


def loaded_in(folder):
    """Compiles and uses the kernel in a new process; what it says if that fails."""
    # The environment is not activated: its commands are not on the path.
    outside = [part for part in os.environ["PATH"].split(os.pathsep) if ".venv" not in part]
    path = os.pathsep.join(outside)
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(folder), "PATH": path}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", EXACT],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.stderr if done.returncode else ""


@needs_kernel
def test_processes_that_come_together_and_one_that_was_killed_before(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    names = []
    monkeypatch.setattr(cpp_extension, "load", lambda name, *_, **__: names.append(name))
    kernel._load(torch.backends.cpu.get_cpu_capability())
    # What a process leaves that was killed while it compiled.
    folder = Path(cpp_extension._get_build_directory(names[0], verbose=False))
    (folder / "lock").touch()
    (folder / f"{names[0]}.so").write_bytes(b"half")
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(loaded_in, [tmp_path] * 2)) == ["", ""]


@needs_kernel
@given(
    kv_heads=st.integers(1, 3),
    shared=st.integers(1, 3),
    rows=st.integers(1, 20),
    slots=st.integers(1, 140),
    size=st.integers(1, 90),
    seed=st.integers(0, 2**16),
)
def test_it_is_attention(kv_heads, shared, rows, slots, size, seed):
    generator = torch.Generator().manual_seed(seed)
    heads, spare = kv_heads * shared, slots + 3
    # As a model makes them of one product, and as they lie in a cache.
    queries = torch.randn(1, rows, heads, size, generator=generator).transpose(1, 2)
    keys, values = torch.randn(2, 1, kv_heads, spare, size, generator=generator)[..., :slots, :]
    mask = torch.rand(1, 1, rows, slots, generator=generator) < 0.6
    mask[..., 0] = True
    expected = torch.nn.functional.scaled_dot_product_attention(
        queries.double(),
        keys.double().repeat_interleave(shared, dim=1),
        values.double().repeat_interleave(shared, dim=1),
        attn_mask=mask,
        scale=0.3,
    )
    attended = kernel.attend(queries, keys, values, mask, 0.3)
    torch.testing.assert_close(attended.double(), expected.transpose(1, 2), rtol=1e-4, atol=1e-5)


@needs_kernel
@pytest.mark.parametrize(("rows", "slots", "threads"), [(5, 40, 1), (6, 150, 9), (17, 70, 1)])
def test_a_row_attends_alike_whatever_is_beside_it_and_hidden_from_it(rows, slots, threads):
    queries, keys, values = torch.randn(1, 2, rows, 12), *torch.randn(2, 1, 2, slots, 12)
    mask = torch.rand(1, 1, rows, slots) < 0.5
    mask[..., 0] = True
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = kernel.attend(queries, keys, values, mask, 1.0)
    finally:
        torch.set_num_threads(before)
    for row in range(rows):
        seen = mask[0, 0, row]
        alone = kernel.attend(
            queries[:, :, row : row + 1],
            keys[:, :, seen],
            values[:, :, seen],
            mask[:, :, row : row + 1, seen],
            1.0,
        )
        assert torch.equal(alone[:, 0], whole[:, row])


@needs_kernel
def test_what_is_not_a_number_is_told_where_it_is_seen():
    queries, keys, values = torch.randn(1, 1, 2, 8), *torch.randn(2, 1, 1, 9, 8)
    keys[0, 0, 5, 3] = math.nan
    mask = torch.ones(1, 1, 2, 9, dtype=torch.bool)
    mask[0, 0, 0, 5] = False
    assert kernel.attend(queries, keys, values, ~mask & mask, 1.0).isnan().all()
    attended = kernel.attend(queries, keys, values, mask, 1.0)
    assert attended.isnan().any(dim=-1).view(-1).tolist() == [False, True]


@needs_kernel
@pytest.mark.parametrize("wrong", ["batch", "heads", "size", "mask", "mask_dtype", "dtype", "rows"])
def test_attention_that_does_not_fit_is_refused(wrong):
    shape = (2 if wrong == "batch" else 1, 3 if wrong == "heads" else 4, 5, 8)
    queries = torch.randn(shape, dtype=torch.float64 if wrong == "dtype" else torch.float32)
    keys, values = torch.randn(2, 1, 2, 9, 7 if wrong == "size" else 8)
    mask = torch.ones(1, 1, 5, 8 if wrong == "mask" else 9, dtype=torch.bool)
    if wrong == "mask_dtype":
        mask = mask.long()
    if wrong == "rows":
        queries, mask = queries[:, :, :0], mask[:, :, :0]
    with pytest.raises(RuntimeError, match=r"dynatree::attend: .* do not fit, or are not float32"):
        kernel.attend(queries, keys, values, mask, 1.0)


def grown(tree, logits, chosen, count, least, width, budget):
    """A level of `tree` by the kernel."""
    start = tree.level.start
    appended = kernel.grow_level(
        logits, chosen, start, tree.size, count, least, width, budget, tree.tensors
    )
    return tree.placed(appended) if appended else None


def tree_of(root=0, capacity=60):
    tree = DraftTree(capacity, torch.device("cpu"))
    tree.plant(torch.tensor([root]))
    return tree


@needs_kernel
@given(
    vocabulary=st.integers(2, 40),
    children=st.integers(1, 4),
    threshold=st.sampled_from([0.0, 0.01, 0.05, 0.3]),
    width=st.integers(1, 12),
    budget=st.integers(2, 40),
    some=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**16),
)
def test_levels_are_those_of_pytorch(
    vocabulary, children, threshold, width, budget, some, dtype, seed
):
    generator = torch.Generator().manual_seed(seed)
    count = min(children, vocabulary)
    least = math.log(threshold) if threshold else -math.inf
    tree, other = tree_of(), tree_of()
    chosen, above = None, other.first(1).log_probs
    for _ in range(4):
        # No two are equal, also in 16 bits: PyTorch may take either of those that are.
        rows = len(above)
        logits = torch.stack([torch.randperm(vocabulary, generator=generator) for _ in range(rows)])
        logits = (logits / 8 + torch.rand(rows, 1, generator=generator)).to(dtype)
        log_probs, tokens = torch.log_softmax(logits, -1, dtype=torch.float32).topk(count)
        log_probs = (log_probs + above[:, None]).view(-1)
        stays = log_probs >= least
        if other.size + len(log_probs) > budget:
            stays &= log_probs >= other.known(log_probs).topk(budget).values[-1]
        nodes = stays.nonzero().view(-1)[:width]
        level = grown(tree, logits, chosen, count, least, width, budget)
        assert (level is None) == (len(nodes) == 0)
        if level is None:
            break
        parents = nodes // count if chosen is None else chosen[nodes // count]
        other.extend(parents, tokens.view(-1)[nodes], log_probs[nodes])
        assert torch.equal(level.tokens, tokens.view(-1)[nodes])
        above = log_probs[nodes]
        chosen = torch.arange(0, len(above), 2) if some else None
        above = above if chosen is None else above[chosen]
    for each in (tree, other):
        each.join()
    rows, expected = tree.first(tree.size), other.first(other.size)
    assert tree.deepest == other.deepest
    for name in ("tokens", "parents", "depths", "log_probs", "attends"):
        assert torch.equal(getattr(rows, name), getattr(expected, name)), name


@needs_kernel
def test_what_is_not_a_number_is_a_likely_child():
    logits = torch.tensor([[0.0, math.nan, 9.0, 1.0]])
    for budget in (9, 2):
        level = grown(tree_of(), logits, None, 2, math.log(0.5), 9, budget)
        # One makes all probabilities of its row so.
        assert len({*level.tokens.tolist()}) == 2
        assert level.log_probs.isnan().all()


@needs_kernel
@pytest.mark.parametrize(
    ("rows", "chosen", "count", "capacity"),
    [(1, None, 0, 9), (1, None, 5, 9), (2, None, 1, 9), (1, [0, 0], 1, 9), (1, None, 3, 3)],
)
def test_levels_that_there_cannot_be_are_refused(rows, chosen, count, capacity):
    chosen = None if chosen is None else torch.tensor(chosen)
    with pytest.raises(RuntimeError, match="grow_level: logits"):
        grown(tree_of(capacity=capacity), torch.zeros(rows, 4), chosen, count, 0.0, 9, 9)


@needs_kernel
@pytest.mark.parametrize("chosen", [-1, 1])
def test_a_node_that_the_level_has_not_is_refused(chosen):
    with pytest.raises(RuntimeError, match=f"grow_level: no node {chosen} in the level"):
        grown(tree_of(), torch.zeros(1, 4), torch.tensor([chosen]), 2, 0.0, 9, 9)


@needs_kernel
@given(rows=st.integers(1, 40), vocabulary=st.integers(1, 4), seed=st.integers(0, 2**16))
def test_the_walk_is_that_of_static_shapes(rows, vocabulary, seed):
    generator = torch.Generator().manual_seed(seed)
    tree = tree_of()
    # Siblings hold different tokens.
    children = {}
    for node in range(1, rows):
        parent = int(torch.randint(node, (), generator=generator))
        token = len(children.setdefault(parent, []))
        children[parent].append(node)
        tree.tokens[node], tree.parents[node] = token, parent
        tree.ancestors[node] = tree.ancestors[parent]
        tree.ancestors[node, node] = True
    tree.size = rows
    choices = torch.randint(vocabulary, (rows,), generator=generator)
    expected = accept_greedy(tree, choices, rows, static=True)
    accepted = accept_greedy(tree, choices, rows, static=False)
    count = int(expected.count)
    assert int(accepted.count) == len(accepted.path) == len(accepted.tokens) == count
    assert torch.equal(accepted.path, expected.path[:count])
    assert torch.equal(accepted.tokens, expected.tokens[:count])
    assert torch.equal(kernel.walk(tree.tokens, tree.parents, choices), accepted.path)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slots_are_moved_as_if_at_once(dtype):
    storage = torch.randn(3, 2, 1, 2, 9, 5).to(dtype)
    sources, destinations = torch.tensor([4, 2, 8]), torch.tensor([2, 3, 4])
    expected = storage.index_copy(-2, destinations, storage.index_select(-2, sources))
    kernel.move_slots(storage, sources, destinations)
    assert torch.equal(storage, expected)


@needs_kernel
@pytest.mark.parametrize(("sources", "destinations"), [([9], [0]), ([0], [-1]), ([0, 1], [2])])
def test_slots_that_there_are_not_are_refused(sources, destinations):
    with pytest.raises(RuntimeError, match="move_slots: storage"):
        kernel.move_slots(torch.zeros(2, 9, 4), torch.tensor(sources), torch.tensor(destinations))


@needs_kernel
@pytest.mark.parametrize("wrong", ["short", "none", "dtype"])
def test_walks_that_do_not_fit_are_refused(wrong):
    tokens, choices = torch.zeros(2, 5, dtype=torch.long)
    choices = choices[:0] if wrong == "none" else choices
    choices = choices.int() if wrong == "dtype" else choices
    with pytest.raises(RuntimeError, match="dynatree::walk: tokens"):
        kernel.walk(tokens, tokens[:4] if wrong == "short" else tokens, choices)
