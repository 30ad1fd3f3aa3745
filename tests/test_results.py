"""A result file is complete and unedited, or it is refused."""

import json

import pytest
import synthetic
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from dynatree.errors import ResultError
from dynatree.results import (
    DepthCount,
    RoundRecord,
    RunRecord,
    read_result,
    repeated_8grams,
    totals,
    write_result,
)


@pytest.fixture
def result():
    config = synthetic.config()
    return synthetic.result(config.spec(config.measured[-1]))


def test_round_trip(tmp_path, result):
    path = tmp_path / "run.json"
    write_result(path, result)
    assert read_result(path) == result
    assert list(tmp_path.iterdir()) == [path]


def test_truncation_anywhere_is_refused(tmp_path, result):
    path = tmp_path / "run.json"
    write_result(path, result)
    whole = path.read_bytes()
    for size in range(0, len(whole) - 2, len(whole) // 40):
        path.write_bytes(whole[:size])
        with pytest.raises(ResultError, match=r"run\.json: not a valid result"):
            read_result(path)


def _more_tokens(data):
    data["records"][1]["tokens"] += 7


def _faster(data):
    next(r for r in data["records"] if r["method"] == "strategy")["phases"]["draft"] = 0.0


def _unequal(data):
    data["outputs"][0]["equal"] = False


def _less_repetitive(data):
    data["outputs"][0]["repeated_8grams"] = 0.0


def _accepted_more_than_offered(data):
    data["totals"]["acceptance_by_depth"][0]["accepted"] += 1


def _missing_record(data):
    data["records"].pop()


def _repeated_record(data):
    data["records"].append(data["records"][0])


def _other_spec(data):
    data["spec"]["measure"]["max_new_tokens"] += 1


def _old_schema(data):
    data["schema_version"] = 0


def _infinite(data):
    data["records"][0]["seconds"] = float("inf")


def _negative(data):
    data["records"][0]["seconds"] = -1.0


def _unknown_key(data):
    data["tokens_per_second"] = 1e6


@pytest.mark.parametrize(
    "edit",
    [
        _more_tokens,
        _faster,
        _unequal,
        _less_repetitive,
        _accepted_more_than_offered,
        _missing_record,
        _repeated_record,
        _other_spec,
        _old_schema,
        _infinite,
        _negative,
        _unknown_key,
    ],
)
def test_an_edited_file_is_refused_with_what_to_run(tmp_path, result, edit):
    data = json.loads(result.model_dump_json())
    edit(data)
    path = tmp_path / "run.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ResultError, match=r"run\.json: not a valid result.*snakemake"):
        read_result(path)


def test_missing_file_names_the_command(tmp_path):
    with pytest.raises(ResultError, match=r"run\.json: missing; run: snakemake"):
        read_result(tmp_path / "run.json")


def test_totals_are_the_sums_of_the_records(result):
    records = result.of("strategy")
    rounds = [entry for record in records for entry in record.rounds]
    assert result.totals.tokens == sum(record.tokens for record in records)
    assert result.totals.rounds == len(rounds)
    committed = sum(record.tokens - 1 for record in records)
    assert result.totals.tokens_per_round == pytest.approx(committed / len(rounds))
    for count in result.totals.acceptance_by_depth:
        assert 0 <= count.accepted <= count.offered <= len(rounds)
        assert count.accepted == sum(entry.accepted >= count.depth for entry in rounds)


def test_a_failed_write_leaves_the_old_file(tmp_path, result, monkeypatch):
    path = tmp_path / "run.json"
    write_result(path, result)
    before = path.read_bytes()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_result(path, result.model_copy(update={"pair_digest": "other"}))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    assert read_result(path) == result


counts = st.integers(0, 6)


@st.composite
def records(draw):
    """A generation of rounds that each accept part of what was offered, the last perhaps cut."""
    rounds = []
    for _ in range(draw(st.integers(1, 40))):
        nodes = draw(counts)
        depth = draw(st.integers(0, nodes))
        accepted = draw(st.integers(0, depth))
        rounds.append(RoundRecord(nodes=nodes, depth=depth, accepted=accepted))
    # The bonus token of a last round that drafted the end of the sequence is missing.
    cut = draw(st.booleans()) and rounds[-1].accepted > 0
    return RunRecord(
        prompt=0,
        run=0,
        method="strategy",
        first=True,
        tokens=1 + sum(entry.accepted + 1 for entry in rounds) - cut,
        seconds=1.0,
        first_token_seconds=0.1,
        phases={},
        target_forwards=len(rounds) + 1,
        draft_forwards=1,
        rounds=rounds,
    )


@given(counts, counts, counts)
def test_no_round_accepts_more_than_its_deepest_path(nodes, depth, accepted):
    if accepted <= depth <= nodes:
        RoundRecord(nodes=nodes, depth=depth, accepted=accepted)
    else:
        with pytest.raises(ValidationError, match="must hold"):
            RoundRecord(nodes=nodes, depth=depth, accepted=accepted)


@given(counts, counts)
def test_no_depth_accepts_more_than_it_offered(offered, accepted):
    if accepted <= offered:
        DepthCount(depth=1, offered=offered, accepted=accepted)
    else:
        with pytest.raises(ValidationError, match=r"above 100 %"):
            DepthCount(depth=1, offered=offered, accepted=accepted)


@given(st.lists(records(), min_size=1, max_size=4))
def test_acceptance_by_depth_adds_up_to_that_of_the_deepest_paths(generations):
    summed = totals(generations)
    rounds = [entry for record in generations for entry in record.rounds]
    assert sum(c.offered for c in summed.acceptance_by_depth) == sum(r.depth for r in rounds)
    assert sum(c.accepted for c in summed.acceptance_by_depth) == sum(r.accepted for r in rounds)
    for count in summed.acceptance_by_depth:
        assert count.accepted <= count.offered


@given(records())
def test_rounds_follow_each_other_through_the_output(record):
    position = 1
    for start, committed in record.spans:
        assert start == position
        assert committed >= 1
        position += committed
    assert position == record.tokens


def test_a_last_round_that_commits_nothing_is_refused():
    whole = synthetic.record(synthetic.config().spec("tree"), 0, 0, "strategy", 1.0, [(0, 0, 0)])
    with pytest.raises(ValidationError, match="committed nothing"):
        RunRecord.model_validate(whole.model_dump() | {"tokens": 1})


@pytest.mark.parametrize(
    ("tokens", "share"),
    [
        ([], 0.0),
        ([1] * 7, 0.0),
        ([1] * 8, 0.0),
        # Two windows, the second equal to the first.
        ([1] * 9, 1 / 2),
        (list(range(20)), 0.0),
        # 7 tokens recurring are none; 8 are one of 16 - 7 windows.
        ([*range(7), 99, *range(7)], 0.0),
        ([*range(8), *range(8)], 1 / 9),
        # A loop of 3 tokens repeats all of its 23 windows but 3.
        ([1, 2, 3] * 10, 20 / 23),
    ],
)
def test_repeated_8grams_by_hand(tokens, share):
    assert repeated_8grams(tokens) == share


@given(st.lists(st.integers(0, 1), max_size=60))
def test_repeated_8grams_counts_the_windows_seen_before(tokens):
    text = "".join(map(str, tokens))
    windows = range(len(text) - 7)
    # The earlier occurrence may overlap, but must begin earlier.
    before = [text.find(text[at : at + 8]) < at for at in windows]
    assert repeated_8grams(tokens) == (sum(before) / len(before) if before else 0.0)
