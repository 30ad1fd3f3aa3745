"""What happens in rounds, counted once more by hand."""

from pathlib import Path

import pytest
import synthetic

from dynatree.breakdown import acceptance, round_time
from dynatree.results import read_result

REFERENCE = Path(__file__).parent.parent / "docs/reference/runs/embedded"


def measured(*rounds, runs=1):
    study = synthetic.config(prompts=len(rounds), runs=runs)
    return synthetic.result(study.spec("tree"), rounds=list(rounds))


def test_a_round_takes_what_its_phases_take():
    # Each generation spends 1 s on drafting and 2 s on verifying, in 4 and in 12 rounds.
    time = round_time(measured([(3, 2, 1)] * 4, [(3, 2, 0)] * 12))
    assert time.milliseconds == pytest.approx({"draft": 125.0, "verify": 250.0, "other": 0.0})
    assert time.total.value == pytest.approx(375.0)
    # The prompts alone give 750 and 250 ms.
    assert (time.total.interval.low, time.total.interval.high) == pytest.approx((250.0, 750.0))
    assert time.tokens == pytest.approx(20 / 16)


def test_without_rounds_there_is_no_time_of_one():
    assert round_time(measured([], [])) is None


def test_acceptance_counts_the_rounds_that_offer_and_accept():
    first, second = [(4, 2, 1)] * 10, [(4, 2, 2)] * 5 + [(4, 1, 0)] * 5
    at = {point.x: point.y for point in acceptance(measured(first, second))}
    assert at[1].value == pytest.approx(15 / 20)
    assert at[2].value == pytest.approx(5 / 15)
    assert at[1].interval.low == pytest.approx(5 / 10)
    assert at[1].interval.high == pytest.approx(1.0)


def test_depths_that_are_seldom_offered_are_left_out():
    shallow, deep = [(4, 1, 1)] * 20, [(4, 2, 1)] * 20
    assert [point.x for point in acceptance(measured(shallow, shallow, shallow, deep))] == [1]
    assert [point.x for point in acceptance(measured(shallow, shallow, deep, deep))] == [1, 2]
    seldom = [(4, 2, 1)] * 4 + [(4, 1, 1)] * 16
    assert [point.x for point in acceptance(measured(seldom, seldom))] == [1]
    # Runs repeat the same rounds.
    assert [point.x for point in acceptance(measured(seldom, seldom, runs=3))] == [1]


def test_a_share_of_all_or_none_has_no_interval():
    all_of_them, none = acceptance(measured([(4, 2, 1)] * 10, [(4, 2, 1)] * 10))
    assert (all_of_them.y.value, all_of_them.y.interval) == (1.0, None)
    assert (none.y.value, none.y.interval) == (0.0, None)


def test_nothing_drafted_has_no_acceptance():
    assert acceptance(read_result(REFERENCE / "ar.json")) == []


def test_shares_of_a_real_result_are_those_of_its_totals():
    result = read_result(REFERENCE / "dynatree.json")
    totals = {
        entry.depth: entry.accepted / entry.offered for entry in result.totals.acceptance_by_depth
    }
    points = acceptance(result)
    assert len(points) >= 6
    for point in points:
        assert point.y.value == pytest.approx(totals[point.x])
