"""The cost model finds the prices that made a run's times, and never uses a point's own."""

import pytest
import synthetic

from dynatree.costs import RoundCosts, predictions, round_costs

STEP, ROW, FIXED, OTHER = 0.1, 0.02, 0.7, 0.15


def costs(nodes, steps=4, factor=1.0, rounds=10, tokens=40, prefill=1.0):
    """Ten rounds of so many nodes and draft steps, at exactly the prices above."""
    return RoundCosts(
        tokens=tokens,
        rounds=rounds,
        nodes=nodes * rounds,
        steps=steps * rounds,
        prefill=prefill,
        draft=factor * STEP * steps * rounds,
        verify=factor * (FIXED + ROW * (1 + nodes)) * rounds,
        other=factor * OTHER * rounds,
        single=FIXED + ROW,
    )


def test_where_the_model_holds_it_predicts_what_was_measured():
    found = predictions({str(nodes): costs(nodes, steps=nodes // 2) for nodes in (2, 8, 32, 64)})
    for nodes in (2, 8, 32, 64):
        cost = FIXED + ROW * (1 + nodes) + STEP * (nodes // 2) + OTHER
        prediction = found[str(nodes)]
        assert prediction.round_cost == pytest.approx(cost)
        assert prediction.measured_round_cost == pytest.approx(cost)
        assert prediction.speedup == pytest.approx(40 / (1.0 + 10 * cost))


def test_no_point_predicts_its_own_time():
    given = {"a": costs(2), "b": costs(8), "c": costs(32)}
    slow = predictions({**given, "b": costs(8, factor=3.0)})
    assert slow["b"].round_cost == pytest.approx(predictions(given)["b"].round_cost)
    assert slow["b"].measured_round_cost == pytest.approx(3 * given["b"].round_cost)
    assert slow["a"].round_cost > 1.1 * given["a"].round_cost


def test_acceptance_counts_and_two_points_are_too_few():
    given = {"a": costs(2), "b": costs(8), "c": costs(32)}
    better = predictions({**given, "b": costs(8, tokens=80)})
    assert better["b"].speedup == pytest.approx(2 * predictions(given)["b"].speedup)
    assert predictions({"a": costs(2), "b": costs(8)}) == {}


def test_costs_are_in_tokens_of_autoregressive_decoding():
    study = synthetic.config(prompts=2, runs=2)
    found = round_costs(synthetic.result(study.spec("tree"), 2.0))
    assert found is not None
    # 13 tokens in 0.13 and 0.26 s: 0.015 s each. Every generation verifies for 2 s in 6 rounds,
    # without a draft in 12; of 24 draft forwards one is the prefill.
    assert found.verify / found.rounds == pytest.approx(2 / 6 / 0.015)
    assert found.single == pytest.approx(2 / 12 / 0.015)
    assert (found.rounds, found.nodes, found.steps) == (24, 120, 4 * 23)
    assert found.rows == 6
    assert round_costs(synthetic.result(study.spec("ar"))) is None
