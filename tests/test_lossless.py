"""Greedy output equals Transformers' own, for every family, strategy, draft, length and EOS."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import (
    CONTEXT,
    DRAFTS,
    FAMILIES,
    KERNEL_MARKS,
    STRATEGIES,
    VOCAB,
    build,
    draft_of,
    expected,
    oracle,
    prompt,
    target_of,
)
from mutations import MUTATIONS
from torch import nn

import dynatree
from dynatree import kernel
from dynatree.cache import SlotCache
from dynatree.errors import DecodeError
from dynatree.runtime import Runtime

WIDE = dynatree.Tree(depth=3, branch_factor=3, prune_threshold=0.0, node_budget=256)


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_strategy_and_draft(family, strategy, draft):
    new = 14
    target, drafter = target_of(family), draft_of(family, draft)
    decoder = dynatree.Decoder(target, drafter, STRATEGIES[strategy], CONTEXT + 1)
    # The last prompt fills the context: its length + new - 1 is the number of positions.
    for length in (1, 2, 17, CONTEXT + 1 - new):
        generation = decoder.decode(prompt(length), new)
        assert generation.tokens == expected(family, length, new)


class Certain(nn.Module):
    """An output layer that gives one token all of the probability, as a table of rules would."""

    def __init__(self, head, shift):
        super().__init__()
        self.head = head
        self.shift = shift

    def forward(self, states):
        logits = self.head(states)
        sure = (logits.argmax(dim=-1, keepdim=True) + self.shift) % logits.shape[-1]
        return torch.full_like(logits, -torch.inf).scatter(-1, sure, 0.0)


@pytest.mark.parametrize("kernel_there", [pytest.param(True, marks=KERNEL_MARKS), False])
@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_draft_that_calls_tokens_impossible(strategy, shift, static, kernel_there, monkeypatch):
    """Of what it offers nothing else may be verified, whatever threshold and budget would keep."""
    if not kernel_there:
        monkeypatch.setattr(kernel, "available", lambda: False)
    draft = build("llama", layers=2, seed=5)
    draft.lm_head = Certain(draft.lm_head, shift)
    runtime = Runtime("eager", torch.device("cpu"), static)
    decoder = dynatree.Decoder(target_of("llama"), draft, STRATEGIES[strategy], 40, runtime)
    for seed in range(3):
        generation = decoder.decode(prompt(9, seed), 24)
        assert generation.tokens == expected("llama", 9, 24, seed)
        if not static and STRATEGIES[strategy].ngram_tokens == 0:
            assert all(entry.nodes == entry.depth for entry in generation.stats.rounds)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("count", [1, 2, 3, 13])
def test_number_of_new_tokens(strategy, count):
    for draft in ("equal", "noisy"):
        generation = dynatree.generate(
            target_of("llama"), draft_of("llama", draft), prompt(5), STRATEGIES[strategy], count
        )
        assert generation.tokens == expected("llama", 5, count)


@pytest.mark.parametrize("draft", ["equal", "noisy"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("family", ["gpt_neox", "qwen2"])
def test_eos_at_every_place(family, strategy, draft):
    new, hits = 17, 0
    decoder = dynatree.Decoder(
        target_of(family), draft_of(family, draft), STRATEGIES[strategy], 3 + new
    )
    for seed in range(3):
        full = expected(family, 3, new, seed)
        for index, eos in enumerate(full):
            if full.index(eos) == index:
                generation = decoder.decode(prompt(3, seed), new, eos)
                assert generation.tokens == full[: index + 1]
                assert sum(generation.stats.accepted) <= index
                hits += 1
    assert hits > 16


def test_eos_as_the_oracle_sees_it_and_as_a_list():
    target, draft = target_of("gpt2"), draft_of("gpt2", "noisy")
    full = expected("gpt2", 3, 17)
    for eos in (full[6], [full[9], full[4]], [VOCAB - 1], []):
        generation = dynatree.generate(target, draft, prompt(3), WIDE, 17, eos)
        assert generation.tokens == oracle(target, prompt(3), 17, eos or None)


def test_partial_and_sibling_acceptance_occur(monkeypatch):
    """The cases above hold what is hard: paths cut in the middle, and gathers with gaps."""
    gathers = []
    gather = SlotCache.gather
    monkeypatch.setattr(
        SlotCache,
        "gather",
        lambda self, sources, destinations: (
            gathers.append((sources - destinations[0]).tolist())
            or gather(self, sources, destinations)
        ),
    )
    for family in FAMILIES:
        gathers.clear()
        generation = dynatree.generate(
            target_of(family), draft_of(family, "noisy"), prompt(17), WIDE, 30
        )
        assert any(0 < entry.accepted < entry.depth for entry in generation.stats.rounds)
        assert any(entry.accepted == entry.depth > 0 for entry in generation.stats.rounds)
        assert any(sources[1] > 1 for sources in gathers if len(sources) > 1)


@settings(max_examples=25, derandomize=True, deadline=None)
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    ids=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=24),
    new=st.integers(1, 20),
    depth=st.integers(1, 6),
    branch=st.integers(1, 4),
    threshold=st.sampled_from([0.0, 0.01, 0.2]),
    budget=st.integers(1, 30),
    draft=st.sampled_from(DRAFTS),
    eos=st.lists(st.integers(0, VOCAB - 1), max_size=2),
)
def test_any_tree(family, ids, new, depth, branch, threshold, budget, draft, eos):
    strategy = dynatree.Tree(
        depth=depth, branch_factor=branch, prune_threshold=threshold, node_budget=budget
    )
    ids = torch.tensor(ids)
    generation = dynatree.generate(
        target_of(family), draft_of(family, draft), ids[None], strategy, new, eos
    )
    assert generation.tokens == oracle(target_of(family), ids, new, eos or None)
    assert all(entry.nodes <= budget for entry in generation.stats.rounds)


@pytest.mark.parametrize("family", FAMILIES)
def test_eager_attention(family):
    target = build(family, layers=2, seed=5, attention="eager")
    generation = dynatree.generate(target, draft_of(family, "noisy"), prompt(17), WIDE, 14)
    assert generation.tokens == oracle(target, prompt(17), 14)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_custom_generate(strategy):
    target, ids = target_of("gpt_neox"), prompt(17)[None]
    output = target.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        custom_generate=dynatree.custom_generate,
        assistant_model=draft_of("gpt_neox", "noisy"),
        strategy=STRATEGIES[strategy],
        do_sample=False,
        max_new_tokens=13,
        eos_token_id=None,
    )
    assert output.tolist() == [ids[0].tolist() + expected("gpt_neox", 17, 13)]


def test_custom_generate_ends_at_eos():
    target, ids = target_of("gpt_neox"), prompt(17)[None]
    full = expected("gpt_neox", 17, 13)
    output = target.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        custom_generate=dynatree.custom_generate,
        assistant_model=draft_of("gpt_neox", "noisy"),
        strategy=WIDE,
        do_sample=False,
        max_new_tokens=13,
        eos_token_id=[full[5], full[7]],
        pad_token_id=0,
    )
    assert output[0, 17:].tolist() == oracle(target, prompt(17), 13, [full[5], full[7]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"do_sample": False, "num_beams": 2}, "num_beams=1"),
        ({"do_sample": False, "repetition_penalty": 1.5}, "RepetitionPenalty"),
        ({"do_sample": False, "max_time": 60.0}, "MaxTimeCriteria"),
        ({"do_sample": False, "return_dict_in_generate": True}, "return_dict_in_generate"),
        ({"attention_mask": torch.tensor([[0, 1, 1]])}, "hides tokens"),
    ],
)
def test_custom_generate_refuses_what_it_does_not_do(options, message):
    with pytest.raises(DecodeError, match=message):
        target_of("gpt_neox").generate(
            prompt(3)[None],
            custom_generate=dynatree.custom_generate,
            assistant_model=draft_of("gpt_neox", "noisy"),
            strategy=WIDE,
            max_new_tokens=5,
            **{"attention_mask": torch.ones(1, 3, dtype=torch.long), **options},
        )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mutate", MUTATIONS.values(), ids=MUTATIONS)
def test_a_broken_engine_is_noticed(mutate, family, monkeypatch):
    """Losslessness is only worth as much as the mistakes it catches: one at a time."""
    target, draft = target_of(family), draft_of(family, "noisy")
    eos = expected(family, 17, 30)[5]
    cases = [(0, eos), *((seed, None) for seed in range(3))]
    reference = [oracle(target, prompt(17, seed), 30, end) for seed, end in cases]

    def output():
        return [
            dynatree.generate(target, draft, prompt(17, seed), WIDE, 30, end).tokens
            for seed, end in cases
        ]

    assert output() == reference
    mutate(monkeypatch)
    assert output() != reference
