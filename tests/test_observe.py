"""Watched rounds are those that were decoded, and the record of them is checked when read."""

import math

import pytest
import torch
import trees
from micro_pair import micro, study  # noqa: F401 a fixture
from models import STRATEGIES, draft_of, expected, prompt, target_of
from pydantic import ValidationError

import dynatree
from dynatree.errors import DecodeError, ResultError
from dynatree.observe import Recorder, record_trees
from dynatree.runtime import Runtime
from dynatree.tree_record import (
    PRUNED,
    RecordedPrompt,
    RecordedRound,
    occurring,
    read_record,
    read_records,
    write_record,
)

PROMPT, NEW = 17, 30


def watched(strategy, family="llama", eos=None):
    """The generation, and the recorder that watched it."""
    target, recorder = target_of(family), Recorder()
    runtime = Runtime("eager", target.device, static=False)
    decoder = dynatree.Decoder(target, draft_of(family, "noisy"), strategy, PROMPT + NEW, runtime)
    decoder.watch(recorder)
    return decoder.decode(prompt(PROMPT), NEW, eos), recorder


@pytest.mark.parametrize("name", STRATEGIES)
def test_recorded_rounds_are_those_of_the_statistics(name):
    """For every strategy: the controller's own measuring leaves no trace either."""
    strategy = STRATEGIES[name]
    generation, recorder = watched(strategy)
    assert generation.tokens == expected("llama", PROMPT, NEW)
    assert len(recorder.rounds) == len(generation.stats.rounds) > 2
    given, at = generation.tokens, 1
    for (rule, nodes), entry in zip(recorder.rounds, generation.stats.rounds, strict=True):
        assert nodes[0].token == given[at - 1]
        committed = given[at : at + entry.accepted + 1]
        checked = RecordedRound(
            rule=None if rule is None else strategy.rules.index(rule),
            nodes=nodes,
            committed=[{"token": token, "text": ""} for token in committed],
        )
        at += len(committed)
        verified = [node for node in nodes[1:] if node.fate not in PRUNED]
        assert len(verified) == entry.nodes
        assert len(checked.path) - 1 == entry.accepted
        assert sum(node.draft is None for node in verified) == entry.ngram_nodes
        assert len({(node.parent, node.token) for node in nodes[1:]}) == len(nodes) - 1
    assert at == NEW


def paths(nodes):
    """The tokens from the root down to each node."""
    found = {0: ()}
    for index, node in enumerate(nodes[1:], start=1):
        found[index] = (*found[node.parent], node.token)
    return found


@pytest.mark.parametrize(
    ("strategy", "fates"),
    [
        (dynatree.Tree(depth=3, branch_factor=3, prune_threshold=0.1), {"threshold"}),
        (
            dynatree.Tree(depth=3, branch_factor=3, prune_threshold=0.0, node_budget=5),
            {"budget"},
        ),
        (
            dynatree.Tree(depth=3, branch_factor=3, prune_threshold=0.04, node_budget=4),
            {"threshold", "budget"},
        ),
        (
            dynatree.DynamicTree(
                d_base=3,
                d_max=3,
                history=False,
                tau_low=0.1,
                tau_high=0.3,
                prune_threshold=0.15,
            ),
            {"threshold", "breadth"},
        ),
    ],
)
def test_every_candidate_is_there_with_the_reason_that_it_was_dropped_for(strategy, fates):
    target, draft = target_of("llama"), draft_of("llama", "noisy")
    generation, recorder = watched(strategy)
    text = [*prompt(PROMPT).tolist(), generation.tokens[0]]
    seen = set()
    for (_, nodes), entry in zip(recorder.rounds, generation.stats.rounds, strict=True):
        verified = [node for node in nodes[1:] if node.fate not in PRUNED]
        children = {}
        for index, path in paths(nodes).items():
            node = nodes[index]
            ids = torch.tensor([[*text, *path]])
            if node.fate not in PRUNED:
                with torch.inference_mode():
                    assert node.choice == int(target(ids).logits[0, -1].argmax())
            if index:
                children.setdefault(node.parent, []).append(node)
        for parent, offered in children.items():
            path = paths(nodes)[parent]
            with torch.inference_mode():
                logits = draft(torch.tensor([[*text, *path]])).logits[0, -1]
            top = logits.double().log_softmax(-1).topk(strategy.max_children)
            best = dict(zip(top.indices.tolist(), top.values.tolist(), strict=True))
            assert {node.token for node in offered} == best.keys()
            for node in offered:
                reference = nodes[parent].log_prob + best[node.token]
                assert node.log_prob == pytest.approx(reference, abs=2e-4)
        for node in nodes[1:]:
            seen.add(node.fate)
            if node.fate == "threshold":
                assert node.log_prob < strategy.min_log_prob
            elif node.fate == "budget":
                assert len(verified) == strategy.max_nodes
                assert node.log_prob <= min(other.log_prob for other in verified)
            elif node.fate != "breadth":
                assert node.log_prob >= strategy.min_log_prob
        text += generation.tokens[len(text) - PROMPT :][: entry.accepted + 1]
    assert seen - {"accepted", "refused"} == fates


def test_n_grams_are_told_from_the_draft_and_from_what_they_raise():
    _, recorder = watched(STRATEGIES["ngram"], "gpt2")
    nodes = [node for _, tree in recorder.rounds for node in tree[1:]]
    assert any(node.draft is None for node in nodes)
    raised = [node for node in nodes if node.draft is not None and node.draft < node.log_prob]
    # Powers of the confidence that a continuation has.
    for node in raised:
        steps = node.log_prob / math.log(0.8)
        assert steps == pytest.approx(round(steps), abs=1e-4)


@pytest.mark.parametrize("runtime", [("compiled", False), ("eager", True)])
def test_what_has_no_moment_to_watch_is_refused(runtime):
    mode, static = runtime
    target = target_of("llama")
    decoder = dynatree.Decoder(
        target, None, dynatree.Autoregressive(), 40, Runtime(mode, target.device, static)
    )
    with pytest.raises(DecodeError, match=r"Runtime\('eager', device, static=False\)"):
        decoder.watch(Recorder())


@pytest.fixture
def recorded(micro):  # noqa: F811
    """A spec of two prompts with the micro pair, the pair, and the record."""
    configs = {"t": {"strategy": "tree", "depth": 3, "branch_factor": 3, "prune_threshold": 0.001}}
    trees_of = {"configs": ["t"], "prompts": 2, "max_new_tokens": 12}
    data = {**study(micro, ["The with", "Return a", "unused"], configs), "trees": trees_of}
    config = dynatree.config.parse_config(data)
    pair = dynatree.load_pair(config)
    return config.trees_spec("t"), pair, record_trees(config.trees_spec("t"), pair)


def test_a_record_holds_the_output_and_survives_its_file(recorded, tmp_path):
    spec, pair, record = recorded
    assert len(record.prompts) == 2
    for text, decoded in zip(spec.prompts, record.prompts, strict=True):
        ids = pair.tokenizer(text, return_tensors="pt").input_ids[0]
        generation = dynatree.generate(
            pair.target, pair.draft, ids, spec.strategy, 12, pair.tokenizer.eos_token_id
        )
        assert [entry.token for entry in decoded.committed] == generation.tokens
        whole = pair.tokenizer.decode([*ids.tolist(), *generation.tokens])
        given = text + "".join(entry.text for entry in decoded.committed)
        assert given.rstrip("\ufffd") == whole.rstrip("\ufffd")
    assert record.vocabulary.keys() == occurring(record.prompts)
    path = tmp_path / "micro" / "t.json"
    write_record(path, record)
    assert read_record(path) == record
    assert read_records([spec], tmp_path, record.source_digest) == [record]
    with pytest.raises(ResultError, match="recorded by other code; remove it"):
        read_records([spec], tmp_path, "0" * 64)
    other = spec.model_copy(update={"max_new_tokens": 13})
    with pytest.raises(ResultError, match="recorded with another configuration"):
        read_records([other], tmp_path, record.source_digest)
    with pytest.raises(ResultError, match=r"under trees\.configs"):
        read_records([], tmp_path, record.source_digest)


def test_an_end_in_the_middle_of_a_path_ends_the_record(micro, recorded):  # noqa: F811
    spec, pair, record = recorded
    tokens = [entry.token for entry in record.prompts[0].committed]
    end = tokens[5]
    pair.tokenizer.eos_token_id = end
    shorter = record_trees(spec, pair)
    assert [entry.token for entry in shorter.prompts[0].committed] == tokens[
        : 1 + tokens.index(end)
    ]


BROKEN = {
    "a child before its parent": (4, {"parent": 5}, "must follow its parent"),
    "a refused node that the target chooses": (1, {"fate": "refused"}, "accepted iff"),
    "an accepted node that it does not": (2, {"fate": "accepted"}, "accepted iff"),
    "a pruned node that was read": (4, {"choice": 1}, "reads what was not pruned"),
    "a verified node that was not": (2, {"choice": None}, "reads what was not pruned"),
    "a verified child of a pruned node": (2, {"fate": "budget", "choice": None}, "its parent is"),
    "a second root": (1, {"fate": "root"}, "is no root"),
    "an unlikely root": (0, {"log_prob": -1.0, "draft": -1.0}, "node 0 must be the root"),
    "a lowered node": (1, {"log_prob": -0.75}, "must be at most"),
    "another committed token": (3, {"choice": 4}, "does not begin the accepted"),
}


@pytest.mark.parametrize(("index", "change", "reason"), BROKEN.values(), ids=BROKEN)
def test_a_round_that_cannot_have_been_is_refused(index, change, reason):
    whole = trees.rounds()[0]
    RecordedRound.model_validate(whole)
    whole["nodes"][index] |= change
    with pytest.raises(ValidationError, match=reason):
        RecordedRound.model_validate(whole)


def test_rounds_that_do_not_follow_each_other_and_unknown_tokens_are_refused():
    first = {"token": 0, "text": ""}
    with pytest.raises(ValidationError, match="round 0 must begin with"):
        RecordedPrompt.model_validate({"text": "", "first": first, "rounds": trees.rounds()[::-1]})
    with pytest.raises(ValidationError, match="lacks the text of token 5"):
        trees.record(vocabulary=dict.fromkeys(range(5), ""))
    with pytest.raises(ValidationError, match="the file was edited"):
        trees.record(spec_digest="0")
    with pytest.raises(ValidationError, match="expected 2 decoded prompts, got 0"):
        trees.record(prompts=[])
