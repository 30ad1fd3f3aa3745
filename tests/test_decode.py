"""The decoder's contract: what it counts, what it refuses, and what it reuses."""

import pytest
import torch
from models import (
    CONTEXT,
    STRATEGIES,
    VOCAB,
    Calls,
    build,
    draft_of,
    expected,
    prompt,
    target_of,
)

import dynatree
from dynatree.controller import CostModel
from dynatree.errors import DecodeError

TREE = dynatree.Tree(depth=4, branch_factor=3, prune_threshold=0.0)


def decoder_of(family="llama", strategy=TREE, draft="noisy", max_length=CONTEXT):
    return dynatree.Decoder(target_of(family), draft_of(family, draft), strategy, max_length)


@pytest.mark.parametrize("draft", ["noisy", "equal", "random"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_only_generated_tokens_count(strategy, draft):
    generation = decoder_of(strategy=STRATEGIES[strategy], draft=draft).decode(prompt(5), 23)
    stats = generation.stats
    # The first token comes from the prefill, then each round commits its path and a bonus token.
    assert len(generation.tokens) == 23 == 1 + sum(stats.accepted) + len(stats.rounds)
    assert stats.drafted_nodes == sum(entry.nodes for entry in stats.rounds)


@pytest.mark.parametrize("new", range(1, 12))
def test_no_round_drafts_deeper_than_can_be_committed(new):
    generation = decoder_of(draft="equal").decode(prompt(5), new)
    committed = 1
    for entry in generation.stats.rounds:
        # A perfect draft: every level that was drafted is committed, with the bonus token.
        assert entry.accepted == entry.depth == min(4, new - committed - 1)
        committed += entry.accepted + 1
    assert committed == new


def test_accepted_counts_end_at_eos():
    full = expected("llama", 5, 26)
    decoder = decoder_of(draft="equal")
    for index, eos in enumerate(full):
        if full.index(eos) == index:
            stats = decoder.decode(prompt(5), 26, eos).stats
            # After the prefill's token, each round of a perfect draft commits 4 and a bonus token.
            assert sum(stats.accepted) == index - index // 5


def test_seconds_by_phase():
    stats = decoder_of().decode(prompt(5), 23).stats
    assert set(stats.seconds) == {"prefill", "draft", "verify", "other"}
    assert min(stats.seconds.values()) > 0
    assert stats.first_token_seconds == stats.seconds["prefill"]


def test_consumer_time_is_not_counted(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    stats = dynatree.Stats()
    for _ in decoder_of().stream(prompt(5), 23, stats=stats):
        now[0] += 100.0
    assert sum(stats.seconds.values()) == 0.0


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(0, dtype=torch.long), "prompt is empty"),
        (torch.zeros(1, 0, dtype=torch.long), "prompt is empty"),
        (torch.zeros(2, 3, dtype=torch.long), r"one sequence.*\(2, 3\)"),
        (torch.zeros(3), "int64.*float32"),
        (torch.zeros(3, dtype=torch.int32), "int64.*int32"),
        (torch.tensor([1, VOCAB]), f"token {VOCAB} is outside the vocabulary"),
        (torch.tensor([1, -1]), "token -1 is outside the vocabulary"),
    ],
)
def test_refused_prompts(ids, message):
    for strategy in (TREE, dynatree.Autoregressive()):
        with pytest.raises(DecodeError, match=message):
            dynatree.generate(target_of("llama"), draft_of("llama", "noisy"), ids, strategy, 5)


@pytest.mark.parametrize("new", [0, -3])
def test_refused_lengths(new):
    with pytest.raises(DecodeError, match=f"max_new_tokens must be at least 1, got {new}"):
        dynatree.generate(target_of("llama"), draft_of("llama", "noisy"), prompt(5), TREE, new)


def test_context_overflow_names_the_model():
    target, short = target_of("llama"), build("llama", max_position_embeddings=16)
    with pytest.raises(DecodeError, match=f"the target has {CONTEXT}"):
        dynatree.generate(target, None, prompt(100), dynatree.Autoregressive(), 30)
    with pytest.raises(DecodeError, match="context of 17, the draft has 16"):
        dynatree.generate(target, short, prompt(10), TREE, 8)
    assert dynatree.generate(target, short, prompt(10), TREE, 7).tokens == expected("llama", 10, 7)


def test_prompt_beyond_max_length():
    with pytest.raises(DecodeError, match="5 prompt and 8 new tokens exceed max_length 12"):
        decoder_of(max_length=12).decode(prompt(5), 8)


def test_models_that_do_not_fit_together():
    target = target_of("llama")
    with pytest.raises(DecodeError, match=rf"draft's vocabulary \(41\).*\({VOCAB}\)"):
        dynatree.generate(target, build("llama", vocab_size=41), prompt(5), TREE, 5)
    with pytest.raises(DecodeError, match="Tree needs a draft model"):
        dynatree.generate(target, None, prompt(5), TREE, 5)


def test_models_of_two_families_fit_together():
    generation = dynatree.generate(
        target_of("llama"), draft_of("gpt2", "random"), prompt(5), TREE, 13
    )
    assert generation.tokens == expected("llama", 5, 13)


def poisoned():
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    return model


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nan_logits_of_the_target(strategy):
    with pytest.raises(DecodeError, match="target model's logits hold a NaN"):
        dynatree.generate(
            poisoned(), draft_of("llama", "noisy"), prompt(5), STRATEGIES[strategy], 5
        )


@pytest.mark.parametrize(
    "strategy",
    [
        *(STRATEGIES[name] for name in STRATEGIES if name != "ar"),
        dynatree.Tree(depth=1, branch_factor=3, prune_threshold=0.0, node_budget=2),
        dynatree.Tree(depth=1, branch_factor=3, prune_threshold=0.1, node_budget=1),
        dynatree.Tree(depth=3, branch_factor=4, prune_threshold=0.0, node_budget=3),
    ],
    ids=lambda strategy: strategy.describe(),
)
def test_nan_logits_of_the_draft(strategy, monkeypatch):
    # What is measured of a busy machine can say that no draft pays, and then none is read.
    free = CostModel((0.0,) * len(strategy.rules), (1,), (1.0,))
    monkeypatch.setattr(dynatree.Decoder, "_costs", lambda self: free)
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    for draft in (poisoned(), model):
        with pytest.raises(DecodeError, match="draft model's logits hold a NaN"):
            dynatree.generate(target_of("llama"), draft, prompt(5), strategy, 9)


def test_attention_that_takes_no_tree_mask():
    model = build("llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(DecodeError, match="'flash_attention_2' takes no tree mask"):
        dynatree.generate(model, None, prompt(5), dynatree.Autoregressive(), 5)


def test_sliding_layers():
    model = build("qwen2", layers=2, use_sliding_window=True, sliding_window=8, max_window_layers=1)
    with pytest.raises(DecodeError, match="sliding_attention"):
        dynatree.generate(model, None, prompt(5), dynatree.Autoregressive(), 5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_reused_decoder_is_as_good_as_new(strategy):
    decoder = decoder_of(strategy=STRATEGIES[strategy])
    for length, new in ((40, 20), (3, 30), (90, 10), (3, 30)):
        generation = decoder.decode(prompt(length), new)
        fresh = decoder_of(strategy=STRATEGIES[strategy]).decode(prompt(length), new)
        assert generation.tokens == fresh.tokens == expected("llama", length, new)
        # The controller keeps what it has learnt, and its choices depend on times.
        if strategy != "auto":
            assert generation.stats.rounds == fresh.stats.rounds
            assert generation.stats.draft_forwards == fresh.stats.draft_forwards


@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_an_abandoned_stream_leaves_the_decoder_usable(chunks):
    decoder = decoder_of()
    stats = dynatree.Stats()
    stream = decoder.stream(prompt(9, seed=1), 30, stats=stats)
    for _ in range(chunks):
        next(stream)
    stream.close()
    assert stats.target_forwards == chunks
    assert decoder.decode(prompt(5), 23).tokens == expected("llama", 5, 23)


def test_stream_runs_the_consumer_in_its_own_grad_mode():
    for _ in decoder_of().stream(prompt(5), 9):
        assert not torch.is_inference_mode_enabled()


def test_stream_yields_the_tokens_of_each_round():
    stats = dynatree.Stats()
    chunks = list(decoder_of().stream(prompt(5), 23, stats=stats))
    assert [len(chunk) - 1 for chunk in chunks] == [0, *stats.accepted]
    assert sum(chunks, []) == expected("llama", 5, 23)  # noqa: RUF017


def test_caches_are_allocated_once():
    decoder = decoder_of()
    caches = [decoder._target.cache, decoder._drafter.runner.cache]
    addresses = set()
    for length, new in ((5, 23), (90, 10), (1, 40)):
        for _ in decoder.stream(prompt(length), new):
            addresses.add(tuple(cache.storage.data_ptr() for cache in caches))
            for cache in caches:
                assert cache.storage.shape[-2] >= CONTEXT + TREE.max_drafted
                assert cache.layers[0].keys.data_ptr() == cache.storage.data_ptr()
    assert len(addresses) == 1


def test_autoregressive_needs_no_draft():
    with Calls(draft_of("llama", "noisy")) as calls:
        for draft in (None, draft_of("llama", "noisy")):
            generation = dynatree.generate(
                target_of("llama"), draft, prompt(5), dynatree.Autoregressive(), 7
            )
            assert generation.tokens == expected("llama", 5, 7)
            assert generation.stats.target_forwards == 7
            assert generation.stats.draft_forwards == 0
    assert calls.sizes == []


def test_an_older_stream_on_the_same_decoder_is_refused():
    target = target_of("gpt_neox")
    decoder = dynatree.Decoder(target, None, dynatree.Autoregressive(), 20)
    prompt = torch.tensor([1, 2, 3])
    older = decoder.stream(prompt, 8)
    next(older)
    newer = decoder.stream(prompt, 8)
    next(newer)
    with pytest.raises(DecodeError, match="another sequence"):
        next(older)
    assert len(list(newer)) == 7


@pytest.mark.parametrize("ids", [[1, 2], torch.tensor(3), torch.tensor([1.0])])
def test_input_ids_of_another_kind(ids):
    with pytest.raises(DecodeError, match="input_ids must be"):
        dynatree.generate(target_of("gpt_neox"), None, ids, dynatree.Autoregressive(), 3)
