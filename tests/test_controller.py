"""The controller on synthetic costs, and decoding with choices that no measured time decides."""

import random
from itertools import count, pairwise

import pytest
import torch
from models import CONTEXT, build, draft_of, expected, oracle, prompt, target_of
from test_gpu import Replayed

import dynatree
from dynatree.accept import ranks_and_children
from dynatree.clock import median_seconds
from dynatree.controller import MAX_PAUSE, Controller, CostModel, measured_once
from dynatree.drafting import Drafter
from dynatree.specs import parse_spec
from dynatree.tree import DraftTree

CANDIDATES = dynatree.Auto().candidates
ROWS = (1, 2, 4, 8, 16, 32, 64)
PLAIN = CANDIDATES.index(dynatree.Autoregressive())
CHAINS = [index for index, each in enumerate(CANDIDATES) if isinstance(each, dynatree.Linear)]


def costs(step, row):
    """A verification costs 1 and `row` more for each row after the first."""
    steps = [0.0 if each.max_depth == 0 else step for each in CANDIDATES]
    return CostModel.fitted(steps, ROWS, [1 + row * (rows - 1) for rows in ROWS])


class Simulated:
    """Rounds on a text whose next token is the draft's first choice with probability `first`, and
    its second with probability `second`."""

    def __init__(self, model, first, second=0.0):
        self.controller = Controller(model, CANDIDATES)
        self.model, self.first, self.second = model, first, second
        self.random = random.Random(0)
        self.tokens = self.seconds = 0.0

    def round(self):
        chosen = self.controller.choose()
        self.play(chosen)
        return chosen

    def play(self, chosen):
        depth, branch = CANDIDATES[chosen].max_depth, CANDIDATES[chosen].max_children
        ranks = []
        while len(ranks) < depth:
            draw = self.random.random()
            if draw < self.first:
                ranks.append(0)
            elif branch > 1 and draw < self.first + self.second:
                ranks.append(1)
            else:
                break
        children = [branch] * (len(ranks) + 1)
        if len(ranks) == depth and depth > 0:
            children[-1] = 0
        rows = 1 + depth * min(branch, 2)
        self.controller.observe(chosen, depth, rows, ranks, children)
        self.tokens += 1 + len(ranks)
        self.seconds += self.model.round(chosen, depth, rows)

    def last(self, rounds=300, of=200):
        """How often each candidate was chosen in the last `of` rounds."""
        chosen = [self.round() for _ in range(rounds)][-of:]
        return [chosen.count(index) for index in range(len(CANDIDATES))]


def fixed_rate(index, model, first, second=0.0, rounds=3000):
    simulated = Simulated(model, first, second)
    for _ in range(rounds):
        simulated.play(index)
    return simulated.tokens / simulated.seconds


def test_cost_model_interpolates_and_never_falls():
    model = CostModel.fitted((0.0, 0.5), (1, 2, 8, 16), (1.0, 1.3, 1.2, 2.0))
    assert [model.verification(rows) for rows in (1, 2, 5, 8)] == [1.0, 1.3, 1.3, 1.3]
    assert model.verification(12) == pytest.approx(1.65)
    assert model.verification(40) == 2.0
    times = [model.verification(rows) for rows in range(1, 20)]
    assert times == sorted(times)
    assert model.round(1, 4, 16) == 4.0
    assert model.round(0, 0, 1) == 1.0


def test_costs_are_measured_once_per_pair_and_key():
    target, draft, other = build("llama"), build("llama"), build("llama")
    calls = []

    def measure():
        calls.append(1)
        return costs(0.1, 0.1)

    for models, key in (
        ((target, draft), "eager"),
        ((target, draft), "eager"),
        ((target, other), "eager"),
        ((target, draft), "compiled"),
        ((target, draft), "compiled"),
    ):
        measured_once(*models, key, measure)
    assert len(calls) == 3


def test_decoders_share_what_was_measured(monkeypatch):
    target, draft = build("llama", layers=2), build("llama")
    measured = []
    measure = dynatree.Decoder._measure
    monkeypatch.setattr(
        dynatree.Decoder, "_measure", lambda self: measured.append(measure(self)) or measured[-1]
    )
    for length in (40, 60):
        dynatree.Decoder(target, draft, dynatree.Auto(), length).prepare()
    assert len(measured) == 1
    (model,) = measured
    assert [step > 0 for step in model.steps] == [each.max_depth > 0 for each in CANDIDATES]
    assert model.rows[0] == 1
    assert list(model.verify) == sorted(model.verify)


def test_median_of_calls_that_take_turns():
    ticks = count()
    order = []
    seconds = median_seconds(
        [lambda: order.append("a"), lambda: order.append("b")],
        lambda: order.append("reset"),
        lambda: next(ticks),
    )
    assert order[:4] == ["reset", "a", "reset", "b"]
    assert len(seconds) == 2


def test_expensive_draft_rests():
    # Even the longest chain, all of it right, gives 9 tokens in the time of 9.
    simulated = Simulated(costs(step=1.0, row=0.01), first=0.9)
    assert simulated.last()[PLAIN] == 200


def test_poor_draft_rests_and_is_tried_after_growing_pauses():
    simulated = Simulated(costs(step=0.3, row=0.02), first=0.0)
    chosen = [simulated.round() for _ in range(400)]
    tries = [index for index, each in enumerate(chosen) if each != PLAIN]
    pauses = [later - earlier - 1 for earlier, later in pairwise(tries)]
    assert MAX_PAUSE in pauses
    assert max(pauses) == MAX_PAUSE
    doubling = [pause for pause in pauses if pause > 0]
    assert doubling == sorted(doubling)
    assert {later / earlier for earlier, later in pairwise(doubling)} <= {
        1.0,
        2.0,
    }
    assert simulated.tokens / simulated.seconds > 0.93


def test_draft_that_becomes_good_is_found_again():
    simulated = Simulated(costs(step=0.2, row=0.02), first=0.0)
    simulated.last()
    simulated.first = 0.95
    assert simulated.last(400, 100)[PLAIN] == 0
    simulated.first = 0.0
    assert simulated.last(400, 100)[PLAIN] >= 90


def test_sure_and_cheap_draft_is_followed_far():
    used = Simulated(costs(step=0.05, row=0.1), first=0.97).last()
    assert used[CHAINS[-1]] + used[CHAINS[-2]] > 150


def test_second_choices_are_drafted_where_rows_are_cheap():
    used = Simulated(costs(step=0.1, row=0.001), first=0.5, second=0.4).last()
    assert sum(used[index] for index in CHAINS) + used[PLAIN] < 20


def test_chains_are_drafted_where_rows_are_expensive():
    used = Simulated(costs(step=0.02, row=0.15), first=0.8, second=0.1).last()
    assert sum(used[index] for index in CHAINS) > 150


@pytest.mark.parametrize("first", [0.05, 0.3, 0.6, 0.8, 0.95])
@pytest.mark.parametrize(("step", "row"), [(0.05, 0.005), (0.15, 0.05), (0.4, 0.02), (0.9, 0.2)])
def test_close_to_the_best_fixed_candidate(step, row, first):
    """In the long run, of which what it cost to find out is part."""
    model, second = costs(step, row), (1 - first) / 3
    best = max(fixed_rate(index, model, first, second) for index in range(len(CANDIDATES)))
    simulated = Simulated(model, first, second)
    for _ in range(3000):
        simulated.round()
    assert simulated.tokens / simulated.seconds > 0.92 * best


def test_ranks_and_children_of_a_path():
    tree = DraftTree(7, torch.device("cpu"))
    tree.plant(torch.tensor([9]))
    tree.extend(torch.tensor([0, 0]), torch.tensor([1, 2]), torch.zeros(2))
    tree.extend(torch.tensor([0, 1, 1]), torch.tensor([3, 4, 5]), torch.zeros(3))
    tree.join()
    # Root, its second child, the second child of that; the last row is padding.
    ranks, children = ranks_and_children(tree, torch.tensor([0, 2, 5]), 7)
    assert ranks.tolist() == [0, 1, 1]
    assert children.tolist() == [2, 2, 0]


def cycle(monkeypatch, plain=3):
    """Chooses each candidate in turn, and nothing for `plain` rounds after each; returns what the
    controller was told."""
    turns = count()
    told = []
    drafting = [index for index in range(len(CANDIDATES)) if index != PLAIN]

    def choose(self):
        turn, idle = divmod(next(turns), plain + 1)
        return PLAIN if idle else drafting[turn % len(drafting)]

    observe = Controller.observe
    monkeypatch.setattr(Controller, "choose", choose)
    monkeypatch.setattr(dynatree.Decoder, "_costs", lambda self: costs(0.1, 0.1))
    monkeypatch.setattr(
        Controller,
        "observe",
        lambda self, *args: told.append(args) or observe(self, *args),
    )
    return told


@pytest.mark.parametrize("plain", [0, 1, 20])
@pytest.mark.parametrize("draft", ["noisy", "equal"])
@pytest.mark.parametrize("kind", ["dynamic", "replayed"])
def test_lossless_whatever_is_chosen(kind, draft, plain, monkeypatch):
    told = cycle(monkeypatch, plain)
    runtime = Replayed() if kind == "replayed" else "eager"
    decoder = dynatree.Decoder(
        target_of("llama"), draft_of("llama", draft), dynatree.Auto(), CONTEXT + 1, runtime
    )
    for length in (1, 17, 40):
        assert decoder.decode(prompt(length), 80).tokens == expected("llama", length, 80)
    used = {args[0] for args in told}
    assert len(used) >= (2 if plain == 20 else 7)
    for candidate, _, _, ranks, children, *_ in told:
        assert len(children) == len(ranks) + 1
        assert all(rank < offered for rank, offered in zip(ranks, children, strict=False))
        assert len(ranks) <= CANDIDATES[candidate].max_depth
    if draft == "equal":
        # The draft is the target, so that what it misses shows: everything is accepted.
        chains = [args for args in told if args[0] in CHAINS]
        assert all(len(args[3]) == args[1] for args in chains)


@pytest.mark.parametrize("kind", ["dynamic", "replayed"])
def test_a_draft_that_does_not_catch_up_is_noticed(kind, monkeypatch):
    monkeypatch.setattr(Drafter, "catch_up", lambda *args: None)
    with pytest.raises(AssertionError):
        test_lossless_whatever_is_chosen(kind, "equal", 20, monkeypatch)


def test_configuration_and_its_errors():
    auto = dynatree.Auto(candidates=[{"strategy": "linear", "num_draft_tokens": 3}])
    assert auto.rules == (dynatree.Linear(num_draft_tokens=3),)
    assert dynatree.Auto.model_validate(auto.model_dump(mode="json")) == auto
    assert dynatree.Auto.model_validate_json(auto.model_dump_json()) == auto
    assert "4 linear" in dynatree.Auto().describe()
    with pytest.raises(ValueError, match="none of the candidates drafts"):
        dynatree.Auto(candidates=(dynatree.Autoregressive(),))
    with pytest.raises(ValueError, match="dynamic_tree"):
        dynatree.Auto(candidates=[{"strategy": "dynamic_tree"}])
    spec = dynatree.load_config("config.yaml").spec("auto")
    assert parse_spec(spec.canonical()) == spec


def test_single_candidate_needs_no_measurement():
    chain = dynatree.Auto(candidates=(dynatree.Linear(num_draft_tokens=3),))
    decoder = dynatree.Decoder(target_of("llama"), draft_of("llama", "noisy"), chain, 60)
    assert decoder.decode(prompt(5), 30).tokens == oracle(target_of("llama"), prompt(5), 30)
    assert decoder._controller is None
