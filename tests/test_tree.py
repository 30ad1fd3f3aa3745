"""The tree tensors against naive Python over the same parents."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynatree.tree import DraftTree, most_probable

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
    tree.plant(7)
    for level in grown:
        parents, tokens, log_probs = zip(*level, strict=True)
        tree.extend(torch.tensor(parents), torch.tensor(tokens), torch.tensor(log_probs))
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
    assert len(tree) == len(parents)
    assert tree.parents.tolist() == parents
    assert tree.tokens.tolist() == tokens
    assert tree.log_probs.tolist() == log_probs
    assert tree.depths.tolist() == [len(path) - 1 for path in paths]
    assert tree.ancestors.tolist() == [
        [other in path for other in range(len(parents))] for path in paths
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
@given(grown=levels(), prefix=st.integers(0, 5), data=st.data())
def test_attention_mask_shows_prefix_and_ancestors_only(grown, prefix, data):
    tree = grow(DraftTree(32, CPU), grown)
    start = data.draw(st.integers(0, len(tree) - 1))
    parents = flat(grown)[0]
    assert tree.attention_mask(start, prefix).tolist() == [
        [True] * prefix + [other in path_of(parents, node) for other in range(len(tree))]
        for node in range(start, len(tree))
    ]


@settings(max_examples=60, derandomize=True, deadline=None)
@given(first=levels(), grown=levels(), count=st.integers(1, 21))
def test_most_probable_nodes_are_closed_and_select_keeps_them(first, grown, count):
    parents, tokens, log_probs = flat(grown)
    keep = most_probable(torch.tensor(log_probs), count).tolist()
    count = min(count, len(parents))
    assert len(keep) == count
    assert keep == sorted(set(keep))
    assert sorted(log_probs[node] for node in keep) == sorted(log_probs)[-count:]
    assert all(parents[node] in keep for node in keep)

    tree = DraftTree(32, CPU)
    grow(grow(tree, first), grown).select(torch.tensor(keep))
    check(
        tree,
        [keep.index(parents[node]) for node in keep],
        [tokens[node] for node in keep],
        [log_probs[node] for node in keep],
    )
    # A selected tree can grow on.
    tree.extend(torch.tensor([count - 1]), torch.tensor([3]), torch.tensor([-9.0]))
    assert tree.ancestors[-1].tolist() == [*tree.ancestors[count - 1, :count].tolist(), True]
