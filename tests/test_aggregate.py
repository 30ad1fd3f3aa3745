"""Statistics against numbers worked out by hand, and refusal of results that are not current."""

import io
import json
import math

import pandas as pd
import pytest
import synthetic
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dynatree.ablation import Ablation, MissingRow, read_ablation, write_ablation
from dynatree.aggregate import aggregate, to_csv
from dynatree.aggregate_experiment import aggregate_experiment
from dynatree.certificate import write_certificate
from dynatree.errors import LosslessError, ResultError
from dynatree.failures import recording
from dynatree.results import records_digest, totals
from dynatree.run_facts import POSITIONS


def facts(ablation, name):
    return ablation.facts(name)


def row(ablation, table, name):
    rows = next(entry.rows for entry in ablation.tables if entry.name == table)
    return next(entry for entry in rows if entry.configuration == name)


def test_throughput_is_the_median_over_generations(tmp_path):
    ablation = synthetic.ablation(tmp_path, speedups={"linear": [1.0, 2.0, 3.0, 4.0]})
    # Runs 0, 1 and 2 are at 100, 50 and 33.3 tokens/s times the prompt's speedup: sorted,
    # 33.3 50 66.7 100 100 100 | 133.3 150 200 200 300 400.
    assert facts(ablation, "linear").throughput.value == pytest.approx((100 + 400 / 3) / 2)
    assert facts(ablation, "linear").autoregressive_throughput.value == pytest.approx(50.0)


def test_speedup_is_paired_by_run_then_averaged_geometrically_over_prompts(tmp_path):
    # Medians over runs: 2, 8; geometric mean 4. Unpaired or arithmetic means give other numbers.
    study = synthetic.config(prompts=2)
    ablation = synthetic.ablation(tmp_path, study, {"linear": [[1.0, 2.0, 9.0], [8.0, 8.0, 1.0]]})
    speedup = facts(ablation, "linear").speedup
    assert speedup.value == pytest.approx(4.0)
    # Of two prompts a quarter of all resamples hold only the first, a quarter only the second.
    assert speedup.interval.low == pytest.approx(2.0)
    assert speedup.interval.high == pytest.approx(8.0)


def test_changes_are_ratios_of_speedups_against_the_right_row(tmp_path):
    ablation = synthetic.ablation(
        tmp_path, speedups={"linear": [2.0, 2.0, 4.0, 4.0], "tree": [3.0, 3.0, 6.0, 6.0]}
    )
    tree = row(ablation, "forward", "tree")
    # Each prompt gains exactly half, although prompts differ: pairing leaves no uncertainty.
    assert tree.versus_previous.value == pytest.approx(0.5)
    assert tree.versus_previous.interval.low == pytest.approx(0.5)
    assert tree.versus_previous.interval.high == pytest.approx(0.5)
    assert tree.versus_first.value == pytest.approx(math.sqrt(18) - 1)
    plain = row(ablation, "backward", "ar")
    assert plain.versus_first.value == pytest.approx(1 / math.sqrt(18) - 1)
    assert row(ablation, "forward", "ar").versus_previous is None
    assert row(ablation, "forward", "ar").versus_first is None


def test_interval_resamples_prompts_and_not_generations(tmp_path):
    # One prompt is slow in all of its 50 runs. Were generations resampled, the interval of the
    # median of 4 prompts x 50 runs would be narrow; over 4 prompts it must span them.
    study = synthetic.config(prompts=4, runs=50)
    rates = [[(1 + run) * speed for run in range(50)] for speed in (1.0, 2.0, 3.0, 4.0)]
    interval = facts(
        synthetic.ablation(tmp_path, study, {"tree": rates}), "tree"
    ).throughput.interval
    assert interval.low <= 150.0
    assert interval.high >= 350.0


def test_bootstrap_agrees_with_scipy(tmp_path):
    from scipy.stats import bootstrap, gmean

    speedups = [1.0, 1.3, 1.7, 2.9, 1.1, 2.2, 1.9, 1.5]
    study = synthetic.config(prompts=len(speedups))
    interval = facts(
        synthetic.ablation(tmp_path, study, {"tree": speedups}), "tree"
    ).speedup.interval
    other = bootstrap((speedups,), gmean, method="percentile", n_resamples=9999, random_state=1)
    assert interval.low == pytest.approx(other.confidence_interval.low, rel=0.02)
    assert interval.high == pytest.approx(other.confidence_interval.high, rel=0.02)


def test_a_single_prompt_has_no_interval(tmp_path):
    ablation = synthetic.ablation(tmp_path, synthetic.config(prompts=1), {"tree": [2.0]})
    assert facts(ablation, "tree").speedup.value == pytest.approx(2.0)
    assert facts(ablation, "tree").speedup.interval is None
    assert facts(ablation, "tree").throughput.interval is None
    assert row(ablation, "forward", "tree").versus_previous.interval is None


def test_facts_of_rounds_and_phases(tmp_path):
    ablation = synthetic.ablation(tmp_path)
    tree, plain = facts(ablation, "tree"), facts(ablation, "ar")
    assert tree.tokens_per_round == pytest.approx(2.0)
    assert tree.nodes_per_round == pytest.approx(5.0)
    assert tree.acceptance == pytest.approx(0.25)
    # 4 prompts, 3 runs, 6 rounds; each accepts at depth 1 and offers down to depth 4.
    assert [(d.depth, d.offered, d.accepted) for d in tree.acceptance_by_depth] == [
        (1, 72, 72),
        (2, 72, 0),
        (3, 72, 0),
        (4, 72, 0),
    ]
    assert tree.phase_share == {"prefill": 0.25, "draft": 0.25, "verify": 0.5, "other": 0.0}
    assert plain.acceptance is None
    assert plain.tokens_per_round == pytest.approx(1.0)
    assert tree.tokens_per_generation == 13


def test_latency_is_of_the_first_token_and_of_each_further_one(tmp_path):
    latency = facts(synthetic.ablation(tmp_path, speedups={"tree": 2.0}), "tree").latency
    assert latency.first_token.value == pytest.approx(0.01)
    assert latency.first_token_change.value == pytest.approx(0.0)
    # Twelve tokens follow; the second of three runs is at half the rate of the first.
    assert latency.autoregressive_per_token.value == pytest.approx((13 / 50 - 0.01) / 12)
    assert latency.per_token.value == pytest.approx((13 / 100 - 0.01) / 12)


def test_a_single_token_has_no_time_per_further_token(tmp_path):
    study = synthetic.config()
    outputs = [synthetic.output(prompt, (1,)) for prompt in range(4)]
    records = [
        synthetic.record(study.spec("tree"), entry.prompt, entry.run, entry.method, 50.0, [])
        for entry in synthetic.result(study.spec("tree")).records
    ]
    changes = {
        "records": records,
        "records_digest": records_digest(records),
        "totals": totals([entry for entry in records if entry.method == "strategy"]),
        "outputs": outputs,
    }
    tree = facts(synthetic.ablation(tmp_path, study, changes={"tree": changes}), "tree")
    assert tree.latency.per_token is None
    assert tree.accepted_length is None


def by_position(measured):
    return [
        (part.start, part.stop, part.rounds, part.tokens) for part in measured.rounds_by_position
    ]


def test_tokens_per_round_are_told_apart_by_where_a_round_begins(tmp_path):
    study = synthetic.config(prompts=2, runs=2)
    # Rounds begin after 1, 4, ..., 97 new tokens, then after 100; the next crosses to 101 + 8.
    # In the second prompt one begins after 99 and counts there, although it ends at 107.
    one = [(5, 4, 2)] * 33 + [(9, 8, 7)] * 50 + [(5, 4, 0)] * 10
    other = [(5, 4, 0)] * 98 + [(9, 8, 7)]
    assert 1 + 33 * 3 == 100
    ablation = synthetic.ablation(tmp_path, study, changes={"tree": {"rounds": [one, other]}})
    measured = facts(ablation, "tree")
    assert by_position(measured) == [
        (0, 100, 2 * (33 + 98 + 1), 2 * (99 + 98 + 8)),
        (100, 500, 2 * 50, 2 * 400),
        (500, None, 2 * 10, 2 * 10),
    ]
    assert measured.rounds == 2 * (93 + 99)
    # Only the first prompt has later rounds: 410 tokens in 60 rounds against 99 in 33.
    assert measured.later_rounds.value == pytest.approx(410 / 60 / 3 - 1)
    assert measured.later_rounds.interval is None
    plain = facts(ablation, "ar")
    assert plain.rounds_by_position[1].tokens_per_round is None
    assert plain.later_rounds is None


def test_later_rounds_are_paired_by_prompt(tmp_path):
    study = synthetic.config(prompts=2, runs=1)
    # Twice as many tokens per round later in one prompt, half as many in the other.
    rounds = [[(4, 4, 1)] * 50 + [(4, 4, 3)] * 9, [(4, 4, 3)] * 25 + [(4, 4, 1)] * 9]
    change = facts(
        synthetic.ablation(tmp_path, study, changes={"tree": {"rounds": rounds}}), "tree"
    ).later_rounds
    assert change.value == pytest.approx(0.0)
    assert (change.interval.low, change.interval.high) == pytest.approx((-0.5, 1.0))


def test_repetition_is_of_each_output(tmp_path):
    study = synthetic.config(prompts=2)
    outputs = [synthetic.output(0, range(30)), synthetic.output(1, [1, 2, 3] * 10)]
    tree = facts(
        synthetic.ablation(tmp_path, study, changes={"tree": {"outputs": outputs}}), "tree"
    )
    assert tree.repeated_8grams_mean == pytest.approx(10 / 23)
    assert tree.repeated_8grams_max == pytest.approx(20 / 23)


offers = st.integers(0, 8).flatmap(
    lambda nodes: st.integers(0, nodes).flatmap(
        lambda depth: st.tuples(st.just(nodes), st.just(depth), st.integers(0, depth))
    )
)


@settings(max_examples=25, deadline=None)
@given(rounds=st.lists(st.lists(offers, min_size=1, max_size=150), min_size=2, max_size=2))
def test_acceptance_and_positions_of_any_rounds(tmp_path_factory, rounds):
    study = synthetic.config(prompts=2, runs=1, tables={"forward": ["ar", "tree"]})
    ablation = synthetic.ablation(
        tmp_path_factory.mktemp("runs"), study, changes={"tree": {"rounds": rounds}}
    )
    tree = facts(ablation, "tree")
    every = [entry for prompt in rounds for entry in prompt]
    offered, accepted = sum(depth for _, depth, _ in every), sum(count for *_, count in every)
    assert tree.acceptance == (pytest.approx(accepted / offered) if offered else None)
    assert all(entry.accepted <= entry.offered for entry in tree.acceptance_by_depth)
    # Walked through token by token.
    expected = dict.fromkeys(POSITIONS, (0, 0))
    for prompt in rounds:
        position = 1
        for *_, count in prompt:
            start = max(start for start in POSITIONS if start <= position)
            expected[start] = (expected[start][0] + 1, expected[start][1] + count + 1)
            position += count + 1
    assert [(start, *sums) for start, sums in expected.items()] == [
        (start, rounds, tokens) for start, _, rounds, tokens in by_position(tree)
    ]


def _above_one(data):
    data["acceptance_by_depth"][0]["accepted"] = data["acceptance_by_depth"][0]["offered"] + 1


def _other_acceptance(data):
    data["acceptance"] = 0.9


def _fewer_rounds(data):
    data["rounds_by_position"][0]["rounds"] -= 1


def _gap(data):
    data["rounds_by_position"][1]["start"] += 1


@pytest.mark.parametrize("edit", [_above_one, _other_acceptance, _fewer_rounds, _gap])
def test_an_aggregation_whose_parts_disagree_is_refused(tmp_path, edit):
    path = tmp_path / "ablation.json"
    write_ablation(path, synthetic.ablation(tmp_path))
    data = json.loads(path.read_text())
    edit(data["configurations"][-1])
    path.write_text(json.dumps(data))
    with pytest.raises(ResultError, match="not a valid aggregation"):
        read_ablation(path)


SWEPT = {
    "sweeps": {"tuned": {"best_of": ["linear2", "linear"], "labels": {"forward": "tuned"}}},
    "tables": {"forward": ["ar", "tuned", "tree"], "backward": ["tree", "tuned"]},
}


@pytest.mark.parametrize(
    ("two", "six", "winner", "words"),
    [
        (2.0, 1.5, "linear2", "K = 2"),
        (1.5, 2.0, "linear", "K = 6"),
        # Of equal ones, the first listed.
        (2.0, 2.0, "linear2", "K = 2"),
    ],
)
def test_a_sweep_shows_its_fastest_and_reports_all(tmp_path, two, six, winner, words):
    study = synthetic.config(**SWEPT)
    speedups = {"linear2": two, "linear": six, "tree": 3.0}
    ablation = synthetic.ablation(tmp_path, study, speedups)
    (sweep,) = ablation.sweeps
    assert (sweep.name, sweep.best_of, sweep.winner) == ("tuned", ["linear2", "linear"], winner)
    assert [entry.name for entry in ablation.candidates("tuned")] == ["linear2", "linear"]
    assert facts(ablation, "linear2").speedup.value == pytest.approx(two)
    assert facts(ablation, "linear").speedup.value == pytest.approx(six)
    shown = row(ablation, "forward", winner)
    assert (shown.sweep, shown.label) == ("tuned", f"tuned ({words})")
    # A sweep without a label in a table goes by its name there.
    assert row(ablation, "backward", winner).label == f"tuned ({words})"
    assert shown.versus_previous.value == pytest.approx(1.0)
    assert row(ablation, "forward", "tree").versus_previous.value == pytest.approx(0.5)
    assert row(ablation, "forward", "tree").sweep is None
    assert [entry.name for entry in ablation.shown] == ["ar", winner, "tree"]
    frame = pd.read_csv(io.StringIO(to_csv(ablation))).set_index("configuration")
    assert list(frame.index) == ["ar", "linear2", "linear", "tree"]
    assert frame.index[frame["best_of"] == "tuned"].tolist() == [winner]


def test_a_candidate_that_was_not_measured_is_asked_for(tmp_path):
    synthetic.write(synthetic.config(), tmp_path)
    with pytest.raises(ResultError, match=r"linear2\.json: missing; run: snakemake"):
        aggregate(synthetic.config(**SWEPT), tmp_path, synthetic.SOURCE)


def test_a_winner_that_is_not_the_fastest_is_refused(tmp_path):
    ablation = synthetic.ablation(tmp_path, synthetic.config(**SWEPT), {"linear": 2.0})
    data = ablation.model_dump()
    data["sweeps"][0]["winner"] = "linear2"
    with pytest.raises(ValidationError, match="'linear2' is not its fastest"):
        Ablation.model_validate(data)
    data = ablation.model_dump()
    data["tables"][0]["rows"][1]["configuration"] = "linear2"
    with pytest.raises(ValidationError, match="'linear2' is not the winner of 'tuned'"):
        Ablation.model_validate(data)


def test_unequal_outputs_are_counted_with_their_largest_gap(tmp_path):
    study = synthetic.config(dtype="bfloat16")
    equal = synthetic.result(study.spec("tree")).outputs
    outputs = [synthetic.unequal(0, 0.25), equal[1], synthetic.unequal(2, 0.5), equal[3]]
    ablation = synthetic.ablation(tmp_path, study, changes={"tree": {"outputs": outputs}})
    assert facts(ablation, "tree").unequal_prompts == 2
    assert facts(ablation, "tree").largest_gap == 0.5
    assert facts(ablation, "linear").largest_gap is None


# The certificate.


def test_the_certificate_says_how_each_row_is_lossless(tmp_path):
    study = synthetic.config(dtype="bfloat16")
    certified = synthetic.certificate(study, {"tree": [synthetic.departure(0.15)]})
    ablation = synthetic.ablation(tmp_path, study, certified=certified)
    found = {facts.name: facts.lossless for facts in ablation.configurations}
    assert found == {"ar": "equal", "linear": "equal", "tree": "noise"}
    assert facts(synthetic.ablation(tmp_path, study), "tree").lossless is None


def test_a_certificate_that_holds_more_is_good_for_a_part(tmp_path):
    study = synthetic.config(tables={"forward": ["ar", "tree"]})
    certified = synthetic.certificate(study, names=["tree", "linear2", "ar"])
    ablation = synthetic.ablation(tmp_path, study, certified=certified)
    assert [facts.lossless for facts in ablation.configurations] == ["equal", "equal"]


@pytest.mark.parametrize(
    ("dtype", "shortfall", "reason"),
    [("float32", 0.0, "differs from generate"), ("bfloat16", 0.25, "0.25 below the best logit")],
)
def test_a_failed_certificate_stops_the_table(tmp_path, dtype, shortfall, reason):
    study = synthetic.config(dtype=dtype)
    certified = synthetic.certificate(study, {"tree": [synthetic.departure(shortfall)]})
    assert not certified.passed
    with pytest.raises(LosslessError, match=rf"not lossless:\n  tree: .*{reason}"):
        synthetic.ablation(tmp_path, study, certified=certified)


OTHERS = {
    "other code": (
        lambda study: synthetic.certificate(study, source_digest="7" * 64),
        "other code",
    ),
    "other weights": (
        lambda study: synthetic.certificate(study, pair_digest="d" * 64),
        "other model weights",
    ),
    "other prompts": (
        lambda study: synthetic.certificate(synthetic.config(prompts=3)),
        "prompts: measured 3 entries, configured 4",
    ),
    "a changed strategy": (
        lambda study: synthetic.certificate(synthetic.config(overrides={"tree": {"depth": 5}})),
        r"strategies\.tree\.depth: measured 5, configured 4",
    ),
    "a missing configuration": (
        lambda study: synthetic.certificate(study, names=["ar", "linear"]),
        r"strategies\.tree: measured None",
    ),
    "another device": (
        lambda study: synthetic.certificate(study, **provenance(name="Other CPU")),
        "made on 'Other CPU', but ar was measured on 'Test CPU'",
    ),
}


@pytest.mark.parametrize(("made", "reason"), OTHERS.values(), ids=OTHERS)
def test_a_certificate_of_something_else_is_refused(tmp_path, made, reason):
    study = synthetic.config()
    with pytest.raises(ResultError, match=reason) as error:
        synthetic.ablation(tmp_path, study, certified=made(study))
    path = tmp_path / "certificate.json"
    assert str(error.value).startswith(f"{path}: ")
    assert str(error.value).endswith(f"run: snakemake {path}")


def test_overrides_name_the_old_value(tmp_path):
    study = synthetic.config(overrides={"tree": {"prune_threshold": 0.02, "depth": 4}})
    tree = facts(synthetic.ablation(tmp_path, study), "tree")
    # The depth given again with its own value changes nothing.
    assert [(o.key, o.value, o.instead_of) for o in tree.overrides] == [
        ("prune_threshold", 0.02, 0.05)
    ]
    assert "threshold 0.02" in tree.description


def test_swapped_values_are_noticed_with_both_fields(tmp_path):
    synthetic.write(synthetic.config(), tmp_path)
    swapped = synthetic.config(overrides={"tree": {"depth": 8, "branch_factor": 4}})
    with pytest.raises(ResultError) as error:
        aggregate(swapped, tmp_path, synthetic.SOURCE)
    path = tmp_path / "micro/tree.json"
    assert f"{path}: measured with another configuration" in str(error.value)
    assert "strategy.depth: measured 4, configured 8" in str(error.value)
    assert "strategy.branch_factor: measured 8, configured 4" in str(error.value)
    assert f"run: snakemake {path}" in str(error.value)


def test_another_workload_is_noticed(tmp_path):
    synthetic.write(synthetic.config(prompts=4), tmp_path)
    with pytest.raises(ResultError, match="prompts: measured 4 entries, configured 5"):
        aggregate(synthetic.config(prompts=5), tmp_path, synthetic.SOURCE)


def test_other_code_is_refused(tmp_path):
    synthetic.write(synthetic.config(), tmp_path)
    with pytest.raises(
        ResultError, match=r"ar\.json: measured by other code.*snakemake .*ar\.json"
    ):
        aggregate(synthetic.config(), tmp_path, "6" * 64)


def missing(path):
    path.unlink()


def truncated(path):
    path.write_bytes(path.read_bytes()[:-200])


def edited(path):
    data = json.loads(path.read_text())
    data["totals"]["tokens"] += 1
    path.write_text(json.dumps(data))


def respecified(path):
    data = json.loads(path.read_text())
    data["spec"]["measure"]["seed"] = 7
    path.write_text(json.dumps(data))


def without_device_name(path):
    data = json.loads(path.read_text())
    del data["provenance"]["device"]["name"]
    path.write_text(json.dumps(data))


@pytest.mark.parametrize("damage", [missing, truncated, edited, respecified, without_device_name])
def test_damage_is_refused_with_file_and_command(tmp_path, damage):
    synthetic.write(synthetic.config(), tmp_path)
    path = tmp_path / "micro/linear.json"
    damage(path)
    with pytest.raises(ResultError) as error:
        aggregate(synthetic.config(), tmp_path, synthetic.SOURCE)
    assert str(error.value).startswith(f"{path}: ")
    assert str(error.value).endswith(f"run: snakemake {path}")


def test_other_weights_are_refused_and_the_older_result_is_named(tmp_path):
    study = synthetic.config()
    older = {"pair_digest": "d" * 64, "started": "2025-01-01T00:00:00Z"}
    synthetic.write(study, tmp_path, changes={"linear": older})
    with pytest.raises(ResultError, match=r"linear\.json: measured with other model weights"):
        aggregate(study, tmp_path, synthetic.SOURCE)


def provenance(**device):
    return {
        "provenance": {
            "device": {"type": "cpu", "name": "Test CPU", "threads": 2, **device},
            "git": {"commit": None, "dirty": None},
        }
    }


def test_another_device_is_refused(tmp_path):
    study = synthetic.config()
    synthetic.write(study, tmp_path, changes={"tree": provenance(name="Other CPU")})
    with pytest.raises(ResultError, match=r"tree\.json: measured on 'Other CPU'.*'Test CPU'"):
        aggregate(study, tmp_path, synthetic.SOURCE)


def test_other_thread_counts_are_allowed_and_noted(tmp_path):
    assert synthetic.ablation(tmp_path).notes == []
    ablation = synthetic.ablation(tmp_path, changes={"tree": provenance(threads=8)})
    assert len(ablation.notes) == 1
    assert "ar 2, linear 2, tree 8" in ablation.notes[0]


def test_written_ablation_reads_back_and_is_byte_identical(tmp_path):
    speedups = {"tree": [1.0, 1.5, 2.0, 2.5]}
    texts = []
    for name in ("a", "b"):
        write_ablation(tmp_path / f"{name}.json", synthetic.ablation(tmp_path, speedups=speedups))
        texts.append((tmp_path / f"{name}.json").read_bytes())
    assert texts[0] == texts[1]
    assert read_ablation(tmp_path / "a.json") == synthetic.ablation(tmp_path, speedups=speedups)


def test_damaged_ablation_is_refused(tmp_path):
    path = tmp_path / "ablation.json"
    with pytest.raises(ResultError, match="missing; run: snakemake"):
        read_ablation(path)
    write_ablation(path, synthetic.ablation(tmp_path))
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ResultError, match="not a valid aggregation"):
        read_ablation(path)


def test_csv_has_a_flat_line_for_each_configuration(tmp_path):
    path = tmp_path / "ablation.csv"
    path.write_text(to_csv(synthetic.ablation(tmp_path, speedups={"tree": 3.0})))
    frame = pd.read_csv(path).set_index("configuration")
    assert list(frame.index) == ["ar", "linear", "tree"]
    assert frame.loc["tree", "speedup"] == pytest.approx(3.0)
    assert frame.loc["tree", "forward_versus_previous"] == pytest.approx(2.0)
    assert frame.loc["ar", "backward_versus_first_high"] == pytest.approx(-2 / 3)
    assert pd.isna(frame.loc["linear", "backward_versus_first"])
    assert frame.loc["tree", "rounds"] == frame.loc["tree", "rounds_0_to_100"] == 72
    assert frame.loc["tree", "tokens_per_round_0_to_100"] == pytest.approx(2.0)
    assert pd.isna(frame.loc["tree", "tokens_per_round_from_500"])
    assert frame.loc["tree", ["acceptance_depth_1", "acceptance_depth_4"]].tolist() == [1.0, 0.0]
    # Of 6 windows of 13 equal tokens, 5 were there before.
    assert frame.loc["tree", "repeated_8grams_max"] == pytest.approx(5 / 6)


@settings(max_examples=15, deadline=None)
@given(speedups=st.lists(st.floats(0.1, 10.0), min_size=2, max_size=6), factor=st.floats(0.5, 2.0))
def test_scaling_every_prompt_changes_the_row_by_exactly_that(tmp_path_factory, speedups, factor):
    study = synthetic.config(prompts=len(speedups), runs=1)
    ablation = synthetic.ablation(
        tmp_path_factory.mktemp("runs"),
        study,
        {"linear": speedups, "tree": [factor * speedup for speedup in speedups]},
    )
    change = row(ablation, "forward", "tree").versus_previous
    assert change.value == pytest.approx(factor - 1, abs=1e-9)
    assert change.interval.low == pytest.approx(factor - 1, abs=1e-9)
    speedup = facts(ablation, "linear").speedup
    assert min(speedups) * 0.999 <= speedup.interval.low <= speedup.interval.high
    assert speedup.interval.high <= max(speedups) * 1.001


# Results of different devices.

GROUPED = {"devices": {"mixed": "group"}}


def on(**names):
    """Changes that put results, by configuration, on devices."""
    return {name: provenance(name=device) for name, device in names.items()}


def test_results_of_different_devices_are_refused_unless_told_to_group_them(tmp_path):
    with pytest.raises(ResultError, match=r"run: snakemake .*, or set devices\.mixed: group"):
        synthetic.ablation(tmp_path, changes=on(tree="Other CPU"))


def test_rows_are_grouped_by_device_and_none_is_compared_across_them(tmp_path):
    tables = {"forward": ["ar", "linear", "linear2", "tree"], "backward": ["tree", "ar", "linear2"]}
    study = synthetic.config(tables=tables, **GROUPED)
    speedups = {"linear": 2.0, "linear2": 3.0, "tree": 4.0}
    ablation = synthetic.ablation(
        tmp_path, study, speedups, on(linear="Other CPU", tree="Other CPU")
    )
    forward, backward = ablation.tables
    assert [entry.configuration for entry in forward.rows] == ["ar", "linear2", "linear", "tree"]
    changes = [entry.versus_previous and entry.versus_previous.value for entry in forward.rows]
    assert changes == [None, pytest.approx(2.0), None, pytest.approx(1.0)]
    assert [entry.configuration for entry in backward.rows] == ["ar", "linear2", "tree"]
    changes = [entry.versus_first and entry.versus_first.value for entry in backward.rows]
    assert changes == [None, pytest.approx(2.0), None]
    assert ablation.setting.device == "Test CPU and Other CPU"
    (note,) = ablation.notes
    assert "different devices (Test CPU: ar, linear2; Other CPU: linear, tree)" in note
    frame = pd.read_csv(io.StringIO(to_csv(ablation))).set_index("configuration")
    assert frame["device"].to_dict() == {
        "ar": "Test CPU",
        "linear2": "Test CPU",
        "linear": "Other CPU",
        "tree": "Other CPU",
    }
    path = tmp_path / "ablation.json"
    write_ablation(path, ablation)
    assert read_ablation(path) == ablation


def test_a_certificate_says_nothing_of_another_device(tmp_path):
    study = synthetic.config(**GROUPED)
    certified = synthetic.certificate(study, **provenance(name="Other CPU"))
    ablation = synthetic.ablation(
        tmp_path, study, changes=on(tree="Other CPU", linear="Other CPU"), certified=certified
    )
    found = {entry.name: entry.lossless for entry in ablation.configurations}
    assert found == {"ar": None, "linear": "equal", "tree": "equal"}
    assert "The certificate was made on another device than ar" in ablation.notes[-1]
    with pytest.raises(ResultError, match="made on 'Other CPU', but ar was measured on 'Test CPU'"):
        synthetic.ablation(tmp_path, study, certified=certified)


def test_one_device_is_not_said_of_each_row(tmp_path):
    data = synthetic.ablation(tmp_path, synthetic.config(**GROUPED)).model_dump()
    assert all("device" not in entry for entry in data["configurations"])
    assert all("missing" not in table for table in data["tables"])


def test_the_fastest_of_a_sweep_is_not_chosen_across_devices(tmp_path):
    study = synthetic.config(**SWEPT, **GROUPED)
    with pytest.raises(ResultError, match=r"sweeps\.tuned: .*Test CPU, Other CPU.*on one"):
        synthetic.ablation(tmp_path, study, changes=on(linear="Other CPU"))
    study = synthetic.config(
        sweeps=SWEPT["sweeps"],
        experiments={"e": {"configs": ["tuned"], "grid": {"runs": 3}}},
        **GROUPED,
    )
    study.points("e")
    synthetic.write(synthetic.config(**SWEPT), tmp_path, changes=on(linear="Other CPU"))
    with pytest.raises(ResultError, match=r"e: tuned: .*on different devices"):
        aggregate_experiment(study, "e", tmp_path, synthetic.SOURCE)


def test_a_change_across_devices_is_refused_in_a_file(tmp_path):
    changes = on(linear="Other CPU")
    data = synthetic.ablation(tmp_path, synthetic.config(**GROUPED), None, changes).model_dump()
    rows = data["tables"][0]["rows"]
    assert [entry["configuration"] for entry in rows] == ["ar", "tree", "linear"]
    rows[2]["versus_previous"] = rows[1]["versus_previous"]
    with pytest.raises(ValidationError, match=r"row 2 .*measured on the same device, and nowhere"):
        Ablation.model_validate(data)


def test_a_result_beside_other_users_of_the_gpu_is_flagged(tmp_path):
    changes = {"tree": provenance(shared_with=["process 7"])}
    (note,) = synthetic.ablation(tmp_path, changes=changes).notes
    assert note.startswith("Other programs used the GPU while tree was measured")


# Missing results, marked.


def marked(folder, study, certificate=None):
    return aggregate(study, folder, synthetic.SOURCE, certificate, mark_missing=True)


def fail_for(path, spec, reason):
    path.unlink()
    with pytest.raises(RuntimeError), recording(path, spec.digest):
        raise RuntimeError(reason)


def test_a_missing_row_stays_in_its_place_with_its_reason(tmp_path):
    study = synthetic.config(labels={"linear": "Linear"})
    synthetic.write(study, tmp_path, {"tree": 2.0})
    fail_for(tmp_path / "micro/linear.json", study.spec("linear"), "needs 9 GiB, 1 GiB is free")
    ablation = marked(tmp_path, study)
    forward, backward = ablation.tables
    assert [entry.configuration for entry in forward.rows] == ["ar", "tree"]
    assert forward.missing == [
        MissingRow(below=1, label="Linear", reason="needs 9 GiB, 1 GiB is free")
    ]
    # Nothing is known of the row above; of the first row all.
    assert forward.rows[1].versus_previous is None
    assert forward.rows[1].versus_first.value == pytest.approx(1.0)
    assert backward.missing == []
    assert [facts.name for facts in ablation.configurations] == ["ar", "tree"]
    path = tmp_path / "ablation.json"
    write_ablation(path, ablation)
    assert read_ablation(path) == ablation


def test_without_the_first_row_nothing_is_compared_with_it(tmp_path):
    study = synthetic.config(tables={"backward": ["tree", "linear", "ar"]})
    synthetic.write(study, tmp_path)
    (tmp_path / "micro/tree.json").unlink()
    (table,) = marked(tmp_path, study).tables
    assert table.missing == [MissingRow(below=0, label="tree", reason="not measured")]
    assert [entry.versus_first for entry in table.rows] == [None, None]
    assert table.rows[1].versus_previous is not None


def test_a_result_of_something_else_is_missing_and_never_shown(tmp_path):
    synthetic.write(synthetic.config(), tmp_path, {"tree": 9.0})
    study = synthetic.config(overrides={"tree": {"depth": 5}})
    ablation = marked(tmp_path, study)
    (row,) = ablation.tables[0].missing
    assert row.reason == (
        "measured with another configuration (strategy.depth: measured 4, configured 5)"
    )
    assert [facts.name for facts in ablation.configurations] == ["ar", "linear"]
    with pytest.raises(ResultError, match="there is no result to show:\n  ar: measured by other"):
        aggregate(study, tmp_path, "7" * 64, mark_missing=True)


def test_the_reason_of_an_older_failure_is_not_given(tmp_path):
    study = synthetic.config()
    synthetic.write(study, tmp_path)
    other = synthetic.config(overrides={"tree": {"depth": 5}})
    fail_for(tmp_path / "micro/tree.json", other.spec("tree"), "an old reason")
    assert marked(tmp_path, study).tables[0].missing[0].reason == "not measured"


def test_a_sweep_without_a_candidate_is_missing(tmp_path):
    study = synthetic.config(**SWEPT)
    synthetic.write(study, tmp_path)
    (tmp_path / "micro/linear2.json").unlink()
    ablation = marked(tmp_path, study)
    assert ablation.sweeps == []
    assert ablation.tables[0].missing == [
        MissingRow(below=1, label="tuned", reason="linear2: not measured")
    ]


def test_a_table_without_any_row_is_said_to_be_missing(tmp_path):
    study = synthetic.config(tables={"forward": ["ar", "tree"], "other": ["linear"]})
    synthetic.write(study, tmp_path)
    (tmp_path / "micro/linear.json").unlink()
    ablation = marked(tmp_path, study)
    assert [table.name for table in ablation.tables] == ["forward"]
    (note,) = ablation.notes
    assert note == "Table other is missing, because all of its rows are (not measured)."


def test_a_certificate_may_be_missing_or_cover_what_is_there_but_not_fail(tmp_path):
    study = synthetic.config()
    synthetic.write(study, tmp_path)
    (tmp_path / "micro/linear.json").unlink()
    path = tmp_path / "certificate.json"
    (note,) = marked(tmp_path, study, (path, synthetic.CERTIFYING)).notes
    assert note == "Losslessness was not certified: missing."
    write_certificate(path, synthetic.certificate(study, names=["ar", "tree"]))
    ablation = marked(tmp_path, study, (path, synthetic.CERTIFYING))
    assert [facts.lossless for facts in ablation.configurations] == ["equal", "equal"]
    assert ablation.notes == []
    failed = synthetic.certificate(study, {"tree": [synthetic.departure(0.0)]})
    write_certificate(path, failed)
    with pytest.raises(LosslessError, match="not lossless"):
        marked(tmp_path, study, (path, synthetic.CERTIFYING))


def test_with_nothing_missing_marking_changes_nothing(tmp_path):
    plain = synthetic.ablation(tmp_path)
    assert marked(tmp_path, synthetic.config()) == plain
