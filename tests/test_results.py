"""A result file is complete and unedited, or it is refused."""

import json

import pytest
import synthetic

from dynatree.errors import ResultError
from dynatree.results import RunResult, read_result, write_result


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
    assert RunResult.model_validate_json(before) == result
