"""Each strategy's tree, token for token, against a slow grower in plain Python."""

import math
from dataclasses import asdict
from functools import cache
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import (
    CONTEXT,
    STRATEGIES,
    VOCAB,
    Calls,
    build,
    draft_of,
    expected,
    oracle,
    prompt,
    target_of,
)
from pydantic import ValidationError

import dynatree
from dynatree import ngram
from dynatree.drafting import Drafter
from dynatree.report import Round
from dynatree.results import RoundRecord, RunRecord, records_digest, totals
from dynatree.runtime import Runtime

CPU = torch.device("cpu")
FAMILY, LENGTH, NEW = "llama", 17, 24
# The controller runs the rules of others.
GROWN = [name for name in STRATEGIES if name not in ("ar", "linear", "auto")]


# The reference. It knows the documentation of the strategies and nothing of the drafter.


def step_log_probs(model, text, paths):
    """The draft's log-probabilities after each of `paths`, all of one length, as lists."""
    with torch.inference_mode():
        logits = model(torch.tensor([[*text, *path] for path in paths])).logits[:, -1]
    return logits.double().log_softmax(-1).tolist()


def breadth(strategy, confidence, error):
    if isinstance(strategy, dynatree.Tree):
        return strategy.branch_factor
    if isinstance(strategy, dynatree.BestFirst):
        return strategy.branch
    tau_high = min(max(strategy.tau_high - strategy.tau_gain * error, strategy.tau_low), 1.0)
    if confidence >= tau_high:
        return strategy.b_min
    return strategy.b_max if confidence < strategy.tau_low else strategy.b_mid


def to_expand(strategy, level, depth, error):
    """The paths of `level` (a mapping to log-probabilities) that get children."""
    if isinstance(strategy, dynatree.DynamicTree):
        d_base = strategy.d_base
        if d_base < strategy.d_max:
            d_base = min(max(round(d_base + strategy.depth_gain * error), 1), strategy.d_max)
        return [
            path
            for path, log_prob in level.items()
            if math.exp(log_prob) >= strategy.rho_stop
            and (depth < d_base or math.exp(log_prob) > strategy.rho_deep)
        ]
    if isinstance(strategy, dynatree.BestFirst):
        best = sorted(level, key=level.get, reverse=True)[: strategy.width]
        gain = sum(math.exp(level[path]) for path in best)
        return [path for path in level if path in best] if gain >= strategy.step_cost else []
    return list(level)


def reference(model, text, strategy, depth, error):
    """The tree after `text`: its nodes by path, grafted ones, and what each draft forward reads."""
    nodes, level, sizes = {}, {(): 0.0}, []
    for d in range(1, depth + 1):
        expanded = to_expand(strategy, level, d - 1, error) if d > 1 else [()]
        if not expanded:
            break
        sizes.append(len(expanded))
        children = {}
        for path, steps in zip(expanded, step_log_probs(model, text, expanded), strict=True):
            ranked = sorted(range(VOCAB), key=steps.__getitem__, reverse=True)
            for token in ranked[: breadth(strategy, math.exp(steps[ranked[0]]), error)]:
                log_prob = level[path] + steps[token]
                if log_prob >= strategy.min_log_prob:
                    children[(*path, token)] = log_prob
        known = sorted([0.0, *nodes.values(), *children.values()], reverse=True)
        cut = known[: 1 + strategy.node_budget][-1]
        level = {path: log_prob for path, log_prob in children.items() if log_prob >= cut}
        nodes |= level
        if not level:
            break
    grafted = set()
    if strategy.ngram_tokens:
        chain = continuation(text, min(strategy.max_depth, depth))
        for length in range(1, len(chain) + 1):
            path, log_prob = tuple(chain[:length]), length * math.log(ngram.CONFIDENCE)
            if path not in nodes:
                grafted.add(path)
            nodes[path] = max(nodes.get(path, -math.inf), log_prob)
    best = sorted(nodes, key=nodes.get, reverse=True)[: strategy.node_budget]
    return {path: nodes[path] for path in best}, grafted & set(best), sizes


def continuation(text, count):
    """What followed the latest of the longest earlier occurrences of the last tokens of `text`."""
    for n in range(ngram.LONGEST, ngram.SHORTEST - 1, -1):
        for start in range(len(text) - 1, n - 1, -1):
            if text[start - n : start] == text[len(text) - n :]:
                period = text[start:]
                return [period[step % len(period)] for step in range(count)]
    return []


# What the drafter did.


class Trees:
    """Records each tree while entered: the text before it, its nodes by path, its forwards."""

    def __init__(self):
        self.texts, self.nodes, self.forwards, self.limits = [], [], [], []

    def __enter__(self):
        self._patch = pytest.MonkeyPatch()
        grow, trees = Drafter.grow, self

        def recording(self, history, position, max_depth, visible):
            tree = grow(self, history, position, max_depth, visible)
            trees.texts.append(history[: int(position) + 1].tolist())
            living = [n for n in range(1, tree.size) if tree.log_probs[n] > -math.inf]
            trees.nodes.append(
                {
                    tuple(tree.tokens[tree.ancestors[n]].tolist()[1:]): float(tree.log_probs[n])
                    for n in living
                }
            )
            # Siblings hold different tokens, and a node's place in its path is its depth.
            assert len(trees.nodes[-1]) == len(living)
            assert all(int(tree.depths[n]) == int(tree.ancestors[n].sum()) - 1 for n in living)
            trees.forwards.append(self.forwards)
            trees.limits.append(max_depth)
            return tree

        self._patch.setattr(Drafter, "grow", recording)
        return self

    def __exit__(self, *exception):
        self._patch.undo()


def decoder_of(strategy, draft="noisy", static=False, target=None):
    runtime = Runtime("eager", CPU, static=static)
    target = target or target_of(FAMILY)
    return dynatree.Decoder(target, draft_of(FAMILY, draft), strategy, CONTEXT, runtime)


def error_of(strategy, rounds):
    """Mean acceptance of the last rounds less the target; before the first it was on target."""
    if not isinstance(strategy, dynatree.DynamicTree) or not strategy.history:
        return 0.0
    seen = [strategy.history_target] * strategy.history_rounds
    seen += [
        entry.accepted / entry.depth if entry.depth else strategy.history_target for entry in rounds
    ]
    last = seen[-strategy.history_rounds :]
    return sum(last) / len(last) - strategy.history_target


def assert_as_reference(strategy, trees, stats, draft, static):
    for index in range(len(stats.rounds)):
        if index == len(trees.nodes):
            # Nothing is drafted for the last token.
            assert not static
            assert stats.rounds[index].nodes == 0
            break
        nodes, grafted, sizes = reference(
            draft_of(FAMILY, draft),
            trees.texts[index],
            strategy,
            trees.limits[index],
            error_of(strategy, stats.rounds[:index]),
        )
        assert trees.nodes[index].keys() == nodes.keys()
        for path, log_prob in nodes.items():
            assert trees.nodes[index][path] == pytest.approx(log_prob, abs=3e-4)
        assert stats.rounds[index].ngram_nodes == len(grafted)
        if not static:
            assert trees.forwards[index] == len(sizes)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("draft", ["noisy", "equal"])
@pytest.mark.parametrize("name", GROWN)
def test_trees_are_those_of_the_reference(name, draft, static):
    """With and without static shapes, in every round, so after every kind of acceptance."""
    strategy = STRATEGIES[name]
    decoder = decoder_of(strategy, draft, static)
    for seed in (0, 1):
        stats = dynatree.Stats()
        with Trees() as trees:
            for _ in decoder.stream(prompt(LENGTH, seed), NEW, stats=stats):
                pass
        assert len(stats.rounds) > 2
        assert_as_reference(strategy, trees, stats, draft, static)


def rule_left_out(monkeypatch, strategy, rule):
    monkeypatch.setattr(type(strategy), rule, lambda self, *args: None)


def nothing_learnt(monkeypatch, strategy, rule):
    monkeypatch.setattr(Drafter, rule, lambda self, *args: None)


@pytest.mark.parametrize(
    ("name", "mutate", "rule"),
    [
        ("dynamic_breadth", rule_left_out, "keeps"),
        ("dynamic_depth", rule_left_out, "expands"),
        ("best_first_small", rule_left_out, "expands"),
        ("history", nothing_learnt, "learn"),
        ("ngram", nothing_learnt, "_graft"),
    ],
)
def test_a_mechanism_left_out_is_noticed(name, mutate, rule, monkeypatch):
    mutate(monkeypatch, STRATEGIES[name], rule)
    with pytest.raises(AssertionError):
        test_trees_are_those_of_the_reference(name, "noisy", False)


# Mechanisms, one by one.


def grown(strategy, draft="noisy", seed=0, decoder=None):
    decoder = decoder or decoder_of(strategy, draft)
    with Trees() as trees:
        generation = decoder.decode(prompt(LENGTH, seed), NEW)
    assert generation.tokens == expected(FAMILY, LENGTH, NEW, seed)
    return trees, generation.stats


@pytest.mark.parametrize("threshold", [0.0, 0.05])
def test_equal_bounds_are_the_fixed_tree(threshold):
    options = {"prune_threshold": threshold, "node_budget": 40}
    fixed = dynatree.DynamicTree(
        d_base=5, d_max=5, b_min=2, b_mid=2, b_max=2, rho_stop=0.0, **options
    )
    plain = dynatree.Tree(depth=5, branch_factor=2, **options)
    assert grown(fixed)[0].nodes == grown(plain)[0].nodes
    assert fixed.widths == plain.widths


@pytest.mark.parametrize("name", ["dynamic", "dynamic_depth", "best_first", "best_first_small"])
def test_the_draft_reads_the_expanded_nodes_and_no_level_more(name):
    strategy, model = STRATEGIES[name], draft_of(FAMILY, "noisy")
    with Calls(model) as calls:
        trees, stats = grown(strategy)
    wanted = [LENGTH]
    for index, text in enumerate(trees.texts):
        error = error_of(strategy, stats.rounds[:index])
        sizes = reference(model, text, strategy, trees.limits[index], error)[2]
        wanted += [2, *sizes[1:]]
    assert calls.sizes == wanted
    levels = [max(map(len, nodes), default=0) for nodes in trees.nodes]
    # Nodes that are not expanded are verified all the same, below the last level that was read.
    early = [forwards < limit for forwards, limit in zip(trees.forwards, trees.limits, strict=True)]
    assert sum(early) > 2
    assert all(one <= other for one, other in zip(levels, trees.forwards, strict=True))


def states_of(decoder, seed, new=NEW):
    """The drafter's state before each tree."""
    states, drafter = [], decoder._drafter
    grow = drafter.grow
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            drafter, "grow", lambda *args: states.append(drafter._state.tolist()) or grow(*args)
        )
        decoder.decode(prompt(LENGTH, seed), new)
    return states


@pytest.mark.parametrize("static", [False, True])
def test_history_moves_every_round_and_starts_afresh(static):
    strategy = dynatree.DynamicTree(history_rounds=3)
    decoder = decoder_of(strategy, static=static)
    first = states_of(decoder, 0)
    assert first[0] == [0.5, 0.5, 0.5]
    for before, after in pairwise(first):
        assert after[:-1] == before[1:]
        assert 0.0 <= after[-1] <= 1.0
    assert len({state[-1] for state in first}) > 2
    second = states_of(decoder, 1)
    assert second[0] == [0.5, 0.5, 0.5]
    assert second == states_of(decoder_of(strategy, static=static), 1)


@pytest.mark.parametrize("acceptance", [0.0, 0.25, 0.5, 1.0])
def test_history_is_bounded(acceptance):
    """Whatever the gain, a depth within 1 .. d_max and a threshold within tau_low .. 1."""
    strategy = dynatree.DynamicTree(depth_gain=1e6, tau_gain=1e6, rho_stop=0.0, rho_deep=0.99)
    state = torch.full((strategy.history_rounds,), acceptance)
    likely = torch.log(torch.tensor([0.5]))
    deepest = sum(bool(strategy.expands(likely, depth, state)) for depth in range(1, 12))
    assert deepest == {0.0: 0, 0.25: 0, 0.5: 4, 1.0: 7}[acceptance]
    ranks = torch.arange(3)
    kept = [
        int(strategy.keeps(torch.log(torch.tensor([[c, 0.0, 0.0]])), ranks, state).sum())
        for c in (0.39, 0.41, 0.95, 1.0)
    ]
    assert kept == {1.0: [3, 1, 1, 1], 0.5: [3, 2, 1, 1]}.get(acceptance, [3, 2, 2, 1])


@pytest.mark.parametrize("name", STRATEGIES)
def test_bounds_hold(name):
    """`widths`, `max_expanded` and `max_nodes`, on a draft that spreads its probability."""
    strategy = STRATEGIES[name]
    if strategy.max_depth == 0:
        return
    with Trees() as trees, Calls(draft_of(FAMILY, "noisy")) as calls:
        decoder_of(strategy).decode(prompt(LENGTH), 40)
    assert all(len(nodes) <= strategy.max_nodes for nodes in trees.nodes)
    widest = max(strategy.widths[:-1], default=1)
    assert max(calls.sizes[1:]) <= max(widest, 2, 1 + strategy.ngram_tokens)
    if strategy.ngram_tokens == 0:
        for nodes in trees.nodes:
            for depth, width in enumerate(strategy.widths, start=1):
                assert sum(len(path) == depth for path in nodes) <= width


@pytest.mark.parametrize("target", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("gain", [0.0, 1.0, 2.9, 4.0])
def test_expansion_is_bounded_for_every_history(target, gain):
    strategy = dynatree.DynamicTree(
        d_base=3, rho_stop=0.05, rho_deep=0.3, history_target=target, depth_gain=gain
    )
    state = torch.ones(strategy.history_rounds)
    for depth in range(1, strategy.d_max):
        count = 20 if bool(strategy.expands(torch.log(torch.tensor([0.051])), depth, state)) else 3
        assert strategy.max_expanded(depth) >= count


@pytest.mark.parametrize("budget", [1, 3, 10, 40])
def test_best_first_keeps_the_global_best(budget):
    """Of all paths of the vocabulary down to the depth, each scored by a forward of its own."""
    strategy = dynatree.BestFirst(
        max_depth=2, node_budget=budget, width=VOCAB, branch=VOCAB, prune_threshold=0, step_cost=0
    )
    trees, _ = grown(strategy)
    for text, nodes, limit in list(zip(trees.texts, trees.nodes, trees.limits, strict=True))[:6]:
        model = draft_of(FAMILY, "noisy")
        (first,) = step_log_probs(model, text, [()])
        every = {(token,): value for token, value in enumerate(first)}
        if limit > 1:
            level = list(every)
            for path, steps in zip(level, step_log_probs(model, text, level), strict=True):
                every |= {(*path, token): every[path] + step for token, step in enumerate(steps)}
        best = sorted(every, key=every.get, reverse=True)[:budget]
        assert nodes.keys() == set(best)


def test_best_first_drafts_less_the_more_a_step_costs():
    counts = []
    for cost in (0.0, 0.3, 0.6, 0.95):
        _, stats = grown(dynatree.BestFirst(step_cost=cost), seed=1)
        counts.append(stats.draft_forwards / len(stats.rounds))
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1]


# n-grams.


@given(
    text=st.lists(st.integers(0, 2), min_size=1, max_size=30),
    rest=st.lists(st.integers(0, 2), max_size=5),
    count=st.integers(1, 8),
)
def test_continuation(text, rest, count):
    wanted = continuation(text, count)
    tokens, found = ngram.continuation(
        torch.tensor(text + rest), torch.tensor([len(text) - 1]), count
    )
    assert found.tolist() == [bool(wanted)]
    assert not wanted or tokens.tolist() == wanted


@cache
def repetitive():
    """A target that mostly looks at the last token, so that its text soon repeats itself."""
    model = build(FAMILY, layers=2, seed=5)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight *= 0.01
            layer.mlp.down_proj.weight *= 0.01
    return model


@pytest.mark.parametrize("static", [False, True])
def test_accepted_branches_save_draft_forwards(static):
    """On a text that repeats itself, with a draft that knows nothing; each source is counted."""
    ids, new, stats = prompt(LENGTH), 80, {}
    wanted = oracle(repetitive(), ids, new)
    for option in (False, True):
        decoder = decoder_of(dynatree.BestFirst(ngram=option), "random", static, repetitive())
        generation = decoder.decode(ids, new)
        assert generation.tokens == wanted
        stats[option] = generation.stats
    assert not any(entry.ngram_nodes for entry in stats[False].rounds)
    rounds = stats[True].rounds
    assert all(entry.ngram_accepted <= entry.ngram_nodes <= entry.nodes for entry in rounds)
    assert all(entry.ngram_accepted <= entry.accepted for entry in rounds)
    assert sum(entry.ngram_accepted for entry in rounds) > 20
    assert 2 * stats[True].draft_forwards < stats[False].draft_forwards


@pytest.mark.parametrize("static", [False, True])
def test_the_draft_reads_what_an_n_gram_gave_it(static, monkeypatch):
    """Its trees after accepted branches are those of a fresh model; unread tokens would show."""
    strategy = dynatree.BestFirst(ngram=True)

    def compared():
        stats = dynatree.Stats()
        decoder = decoder_of(strategy, "random", static, repetitive())
        with Trees() as trees:
            for _ in decoder.stream(prompt(LENGTH), 80, stats=stats):
                pass
        assert max(entry.ngram_accepted for entry in stats.rounds) > 2
        assert_as_reference(strategy, trees, stats, "random", static)

    compared()
    init = Drafter.__init__

    def reads_two(self, *args):
        init(self, *args)
        self._recent = self._recent[-2:]

    monkeypatch.setattr(Drafter, "__init__", reads_two)
    with pytest.raises(AssertionError):
        compared()


def test_the_end_cuts_the_tokens_of_n_grams_first():
    entry = Round(nodes=9, depth=6, accepted=5, ngram_nodes=4, ngram_accepted=3)
    assert [entry.cut(count).ngram_accepted for count in (6, 5, 4, 3, 2, 1)] == [3, 3, 2, 1, 0, 0]
    assert [entry.cut(count).accepted for count in (6, 5, 4, 1)] == [5, 5, 4, 1]


def test_results_attribute_tokens_to_their_source():
    rounds = [
        RoundRecord(**asdict(Round(5, 4, 3, ngram_nodes=4, ngram_accepted=2))),
        RoundRecord(**asdict(Round(5, 4, 1))),
    ]
    # A round without n-grams is stored as before there were any.
    assert rounds[1].model_dump() == {"nodes": 5, "depth": 4, "accepted": 1}
    record = RunRecord(
        prompt=0,
        run=0,
        method="strategy",
        first=True,
        tokens=7,
        seconds=1.0,
        first_token_seconds=0.1,
        phases={},
        target_forwards=3,
        draft_forwards=3,
        rounds=rounds,
    )
    total = totals([record])
    assert (total.ngram_nodes, total.ngram_accepted) == (4, 2)
    assert RunRecord.model_validate_json(record.model_dump_json()) == record
    assert records_digest([record]) != records_digest(
        [record.model_copy(update={"rounds": rounds[::-1]})]
    )
    with pytest.raises(ValidationError, match="ngram_accepted 2 <= ngram_nodes 1"):
        RoundRecord(nodes=5, depth=4, accepted=3, ngram_nodes=1, ngram_accepted=2)


# Validation.


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"d_base": 9}, "d_base must be at most d_max, got d_base 9 and d_max 8; lower d_base or"),
        ({"b_min": 3}, "b_min must be at most b_mid"),
        ({"b_mid": 4}, "b_mid must be at most b_max"),
        ({"tau_low": 0.95}, "tau_low must be at most tau_high, got tau_low 0.95 and tau_high 0.9"),
        ({"rho_stop": 0.4}, "rho_stop must be at most rho_deep"),
        ({"rho_deep": 1.0}, "rho_deep"),
        ({"tau_high": 1.5}, "tau_high"),
        ({"tau_high": float("nan")}, "tau_high"),
        ({"b_min": 0}, "b_min"),
        ({"history_rounds": 0}, "history_rounds"),
        ({"history_target": 1.1}, "history_target"),
        ({"depth_gain": -1.0}, "depth_gain"),
        ({"prune_threshold": 1.0}, "would prune every node"),
    ],
)
def test_dynamic_tree_refuses(values, message):
    with pytest.raises(ValidationError, match=message):
        dynatree.DynamicTree(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"step_cost": 1.0}, "got 1.0: a level adds at most one accepted token"),
        ({"step_cost": -0.1}, "step_cost"),
        ({"width": 0}, "width"),
        ({"branch": 0}, "branch"),
        ({"max_depth": 0}, "max_depth"),
        ({"node_budget": 0}, "node_budget"),
        ({"ngram": 1}, "ngram"),
    ],
)
def test_best_first_refuses(values, message):
    with pytest.raises(ValidationError, match=message):
        dynatree.BestFirst(**values)


def test_descriptions_say_what_is_switched_on():
    published = dynatree.DynamicTree().describe()
    assert published == (
        "depth 5 to 8, breadth 1, 2, 3, confidence 0.9, 0.4, expanded from 0.1, deep 0.3, history, "
        "threshold 0.05, budget 256"
    )
    fixed = dynatree.DynamicTree(
        d_max=5, b_min=2, b_max=2, rho_stop=0.0, history=False, prune_threshold=0
    )
    assert fixed.describe() == "depth 5, branch 2, no pruning, budget 256"
    assert "n-gram" in dynatree.BestFirst(ngram=True).describe()
    assert "n-gram" not in dynatree.BestFirst().describe()
