"""The tree tensors against naive Python over the same parents."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynatree.tree import DraftTree

CPU = torch.device("cpu")


@st.composite
def levels(draw):
    """A tree as levels of (parent, token, log-probability) lists; ties are frequent."""
    result, nodes, previous = [], [0.0], [0]
    for _ in range(draw(st.integers(0, 4))):
        parents = sorted(draw(st.lists(st.sampled_from(previous), min_size=1, max_size=5)))
        steps = draw(st.lists(st.sampled_from([0.0, -0.5, -2.0]), min_size=5, max_size=5))
        level = [
            (parent, draw(st.integers(0, 9)), nodes[parent] + step)
            for parent, step in zip(parents, steps, strict=False)
        ]
        previous = list(range(len(nodes), len(nodes) + len(level)))
        nodes += [log_prob for _, _, log_prob in level]
        result.append(level)
    return result


def grow(tree, grown):
    tree.plant(torch.tensor([7]))
    above = 0
    for level in grown:
        parents, tokens, log_probs = zip(*level, strict=True)
        start = tree.size
        tree.extend(torch.tensor(parents) - above, torch.tensor(tokens), torch.tensor(log_probs))
        above = start
    tree.join()
    return tree


def path_of(parents, node):
    """The nodes from `node` up to the root, both included."""
    path = [node]
    while node != 0:
        node = parents[node]
        path.append(node)
    return path


def check(tree, parents, tokens, log_probs):
    paths = [path_of(parents, node) for node in range(len(parents))]
    size = len(parents)
    assert tree.size == size
    assert tree.parents[:size].tolist() == parents
    assert tree.tokens[:size].tolist() == tokens
    assert tree.log_probs[:size].tolist() == log_probs
    assert tree.depths[:size].tolist() == [len(path) - 1 for path in paths]
    # To the end of the buffers: what an earlier, larger tree left there must not show.
    assert tree.ancestors[:size].tolist() == [
        [other in path for other in range(tree.capacity + 1)] for path in paths
    ]


def flat(grown):
    nodes = [(0, 7, 0.0), *(node for level in grown for node in level)]
    return [list(column) for column in zip(*nodes, strict=True)]


@settings(max_examples=60, derandomize=True, deadline=None)
@given(first=levels(), second=levels())
def test_tree_is_its_parents_also_when_planted_again(first, second):
    tree = DraftTree(32, CPU)
    for grown in (first, second):
        check(grow(tree, grown), *flat(grown))


@settings(max_examples=60, derandomize=True, deadline=None)
@given(first=levels(), grown=levels(), prefix=st.integers(0, 5), data=st.data())
def test_attention_mask_shows_prefix_and_ancestors_only(first, grown, prefix, data):
    tree = DraftTree(32, CPU)
    grow(grow(tree, first), grown)
    count = data.draw(st.integers(1, tree.size))
    visible = data.draw(st.integers(prefix + count, prefix + 60))
    parents = flat(grown)[0]
    mask = tree.attention_mask(
        count, tree.columns(torch.arange(1, visible + 1), torch.tensor([prefix]))
    )
    assert mask.tolist() == [
        [slot < prefix or slot - prefix in path_of(parents, node) for slot in range(visible)]
        for node in range(count)
    ]


@settings(max_examples=60, derandomize=True, deadline=None)
@given(grown=levels(), prefix=st.integers(0, 5), data=st.data())
def test_a_level_that_grows_has_the_mask_of_the_finished_tree(grown, prefix, data):
    columns = DraftTree(32, CPU).columns(torch.arange(1, prefix + 40), torch.tensor([prefix]))
    tree = DraftTree(32, CPU)
    tree.plant(torch.tensor([7]))
    above, masks = 0, []
    for nodes in grown:
        parents, tokens, log_probs = map(torch.tensor, zip(*nodes, strict=True))
        start = tree.size
        level = tree.extend(parents - above, tokens, log_probs)
        assert tree.last.tolist() == list(range(start, tree.size))
        chosen = sorted(data.draw(st.sets(st.sampled_from(range(len(nodes))), min_size=1)))
        whole = level.attention_mask(columns, None)
        assert level.attention_mask(columns, torch.tensor(chosen)).equal(whole[chosen])
        masks.append((start, tree.size, whole))
        above = start
    tree.join()
    assert tree.deepest == len(grown)
    for start, stop, mask in masks:
        assert mask.equal(tree.attention_mask(tree.size, columns)[start:stop])


@settings(max_examples=80, derandomize=True, deadline=None)
@given(first=levels(), grown=levels(), count=st.integers(1, 21), dying=st.sets(st.integers(1, 20)))
def test_taken_are_the_most_probable_living_nodes_and_their_ancestors(first, grown, count, dying):
    parents, tokens, log_probs = flat(grown)
    size = len(parents)
    for node in range(size):
        if node in dying or (node and log_probs[parents[node]] == -math.inf):
            log_probs[node] = -math.inf
    source = grow(DraftTree(32, CPU), grown)
    source.log_probs[:size] = torch.tensor(log_probs)
    tree = DraftTree(32, CPU)
    for levels_before in (first, grown):
        tree.take(grow(DraftTree(32, CPU), levels_before), 32)
    taken = tree.take(source, count).tolist()

    living = [node for node in range(size) if log_probs[node] > -math.inf]
    kept = [node for node in taken if node < source.capacity]
    assert kept == sorted(set(kept))
    assert len(kept) == min(count, len(living))
    assert (
        sorted(log_probs[node] for node in kept)
        == sorted(log_probs[node] for node in living)[len(living) - len(kept) :]
    )
    assert all(parents[node] in kept for node in kept)
    # Fixed shapes: what is missing is padding, dead and nobody's ancestor.
    assert taken == kept + [source.capacity] * (min(count, size) - len(kept))
    padding = tree.size - len(kept)
    assert tree.log_probs[len(kept) : tree.size].tolist() == [-math.inf] * padding
    assert not tree.ancestors[len(kept) : tree.size].any()
    assert not tree.ancestors[: tree.size, len(kept) :].any()
    tree.size -= padding
    check(
        tree,
        [kept.index(parents[node]) for node in kept],
        [tokens[node] for node in kept],
        [log_probs[node] for node in kept],
    )
