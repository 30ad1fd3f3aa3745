"""How trees are grown: forwards, KV reuse, pruning and budget, against plain forwards."""

import math

import pytest
import torch
from models import CONTEXT, FAMILIES, Calls, draft_of, prompt, target_of

import dynatree
from dynatree.drafting import Drafter
from dynatree.packing import packed
from dynatree.tree import DraftTree

PROMPT = 17
NEW = 24


def decode(family, strategy, draft="noisy", new=NEW):
    """Generation, the committed text before each round, and the nodes that each round drafted.

    A node is its path: the tokens from level 1 down to it, with its cumulative log-probability.
    """
    texts, trees = [], []
    text = prompt(PROMPT).tolist()
    grow = Drafter.grow

    def recording(self, *args):
        tree = grow(self, *args)
        assert tree.tokens[0] == text[-1]
        texts.append(list(text))
        trees.append(
            {
                tuple(tree.tokens[tree.ancestors[node]].tolist()[1:]): float(tree.log_probs[node])
                for node in range(1, tree.size)
            }
        )
        assert len(trees[-1]) == tree.size - 1
        return tree

    stats = dynatree.Stats()
    decoder = dynatree.Decoder(target_of(family), draft_of(family, draft), strategy, PROMPT + new)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Drafter, "grow", recording)
        for chunk in decoder.stream(prompt(PROMPT), new, stats=stats):
            text += chunk
    return stats, texts, trees


def brute_force(model, text, depth, branch):
    """Every path of the unpruned tree with its log-probability, each by a forward of its own."""
    paths, level = {}, {(): 0.0}
    for _ in range(depth):
        children = {}
        for path, log_prob in level.items():
            with torch.inference_mode():
                logits = model(torch.tensor([[*text, *path]])).logits[0, -1]
            top = logits.double().log_softmax(-1).topk(branch)
            for step, token in zip(top.values.tolist(), top.indices.tolist(), strict=True):
                children[(*path, token)] = log_prob + step
        paths |= children
        level = children
    return paths


def assert_same_nodes(nodes, reference):
    assert nodes.keys() == reference.keys()
    for path, log_prob in nodes.items():
        assert log_prob == pytest.approx(reference[path], abs=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("draft", ["noisy", "equal", "random"])
def test_persistent_cache_drafts_what_a_fresh_model_would(family, draft):
    """In every round: so branches never alias, and the KV entries kept are the right ones."""
    strategy = dynatree.Tree(depth=3, branch_factor=3, prune_threshold=0.0)
    stats, texts, trees = decode(family, strategy, draft, new=16)
    model = draft_of(family, draft)
    assert len(trees) >= len(stats.rounds) - 1 > 2
    for text, nodes in zip(texts, trees, strict=True):
        depth = max(map(len, nodes))
        # Several roots: branching starts at the first drafted token.
        assert sum(len(path) == 1 for path in nodes) == 3
        assert_same_nodes(nodes, brute_force(model, text, depth, 3))


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2"])
@pytest.mark.parametrize("budget", [1, 2, 5, 7, 20])
def test_budget_keeps_the_most_probable_nodes(family, budget):
    strategy = dynatree.Tree(depth=3, branch_factor=3, prune_threshold=0.0, node_budget=budget)
    _, texts, trees = decode(family, strategy)
    for text, nodes in zip(texts[:6], trees, strict=False):
        depth = min(3, PROMPT + NEW - len(text) - 1)
        full = brute_force(draft_of(family, "noisy"), text, depth, 3)
        best = sorted(full, key=full.get, reverse=True)[:budget]
        assert_same_nodes(nodes, {path: full[path] for path in best})
        assert all(path[:-1] in nodes for path in nodes if len(path) > 1)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("threshold", [0.02, 0.1, 0.4])
def test_pruning_drops_exactly_what_is_below_the_threshold(family, threshold):
    strategy = dynatree.Tree(depth=3, branch_factor=4, prune_threshold=threshold)
    _, texts, trees = decode(family, strategy)
    dropped = 0
    for text, nodes in zip(texts[:6], trees, strict=False):
        depth = min(3, PROMPT + NEW - len(text) - 1)
        full = brute_force(draft_of(family, "noisy"), text, depth, 4)
        likely = {path: value for path, value in full.items() if value >= math.log(threshold)}
        dropped += len(full) - len(likely)
        assert_same_nodes(nodes, likely)
    assert dropped > 0


def test_pruning_and_budget_apply_when_a_child_is_added(monkeypatch):
    """What a final selection would drop is never stored and never read by the draft."""
    added = []

    def recorded(add):
        def recording(self, *given):
            level = add(self, *given)
            added.append(level.log_probs.tolist())
            return level

        return recording

    # With the kernel, and without.
    for name in ("placed", "extend"):
        monkeypatch.setattr(DraftTree, name, recorded(getattr(DraftTree, name)))
    decode("llama", dynatree.Tree(depth=5, branch_factor=4, prune_threshold=0.03))
    assert sum(map(len, added)) > 50
    assert all(log_prob >= math.log(0.03) for level in added for log_prob in level)

    added.clear()
    strategy = dynatree.Tree(depth=5, branch_factor=4, prune_threshold=0.0, node_budget=6)
    with Calls(draft_of("llama", "noisy")) as calls:
        decode("llama", strategy)
    assert max(map(len, added)) <= 6
    assert max(calls.sizes[1:]) <= 6


@pytest.mark.parametrize("draft", ["noisy", "equal", "random"])
def test_one_draft_forward_per_level_and_one_target_forward_per_round(draft):
    strategy = dynatree.Tree(depth=4, branch_factor=2, prune_threshold=0.0)
    # "equal" drafts with the target's weights in a model of its own, to count the two apart.
    target, model = target_of("gpt_neox"), draft_of("gpt_neox", draft)
    with Calls(model) as drafted:
        stats, texts, trees = decode("gpt_neox", strategy, draft)
    if model is target:
        assert len(drafted.sizes) == stats.draft_forwards + stats.target_forwards
    else:
        assert len(drafted.sizes) == stats.draft_forwards
        assert drafted.sizes[0] == PROMPT
        rest = iter(drafted.sizes[1:])
        for nodes in trees:
            # The root, and the token before it, which an accepted leaf has not been read as.
            assert next(rest) == 2
            assert [next(rest) for _ in range(max(map(len, nodes)) - 1)] == [
                2**depth for depth in range(1, max(map(len, nodes)))
            ]
        assert next(rest, None) is None
    assert stats.draft_forwards == 1 + sum(entry.depth for entry in stats.rounds)
    assert stats.target_forwards == 1 + len(stats.rounds)
    assert stats.drafted_nodes == sum(map(len, trees))
    assert len(texts[0]) == PROMPT + 1


@pytest.mark.parametrize(
    "strategy", [dynatree.Linear(), dynatree.Tree(), dynatree.Autoregressive()]
)
def test_target_reads_every_token_once_and_each_node_once(strategy):
    with Calls(target_of("llama")) as calls:
        stats, _, _ = decode("llama", strategy)
    assert calls.sizes == [PROMPT, *(1 + entry.nodes for entry in stats.rounds)]
    assert stats.target_forwards == len(calls.sizes)


def test_draft_reads_each_committed_token_once():
    """Its forwards are the prompt, then accepted leaves, roots and nodes; never the text again."""
    with Calls(draft_of("gpt2", "noisy")) as calls:
        stats, _, trees = decode("gpt2", dynatree.Tree(), new=60)
    assert stats.draft_forwards == len(calls.sizes)
    widest = max(
        sum(len(path) == depth for path in nodes) for nodes in trees for depth in range(1, 8)
    )
    assert max(calls.sizes[1:]) <= max(2, widest)


def test_drafting_stops_at_an_empty_level():
    strategy = dynatree.Tree(depth=7, branch_factor=2, prune_threshold=0.3)
    with Calls(draft_of("llama", "noisy")) as calls:
        _, texts, trees = decode("llama", strategy)
    levels = [max(map(len, nodes), default=0) for nodes in trees]
    limits = [min(7, PROMPT + NEW - len(text) - 1) for text in texts]
    # One forward for the root, and one for each level that has nodes, unless it is the last.
    forwards = [min(level + 1, limit) for level, limit in zip(levels, limits, strict=True)]
    assert len(calls.sizes) == 1 + sum(forwards)
    assert sum(level + 1 < limit for level, limit in zip(levels, limits, strict=True)) > 2


def test_a_threshold_that_no_child_reaches_leaves_plain_decoding():
    strategy = dynatree.Tree(prune_threshold=0.9999)
    stats, _, trees = decode("qwen2", strategy, "random")
    assert not any(trees)
    assert len(stats.rounds) == NEW - 1
    assert stats.draft_forwards == 1 + len(trees)


def test_shared_decoder_drafts_within_the_context():
    """Slots beyond the context are used by wide trees; positions beyond it never are."""
    new = 12
    strategy = dynatree.Tree(depth=7, branch_factor=2, prune_threshold=0.0)
    positions = []

    def record(module, args, kwargs):
        positions.append(int(kwargs["position_ids"].max()))

    draft = draft_of("gpt2", "noisy")
    hooks = [
        packed(model).register_forward_pre_hook(record, with_kwargs=True)
        for model in (target_of("gpt2"), draft)
    ]
    decoder = dynatree.Decoder(target_of("gpt2"), draft, strategy, CONTEXT + 1)
    decoder.decode(prompt(CONTEXT + 1 - new), new)
    for hook in hooks:
        hook.remove()
    assert max(positions) == CONTEXT - 1
