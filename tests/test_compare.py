"""Two results differ beyond noise when they do, and seldom when they do not."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import synthetic

from dynatree.ablation import Estimate, Interval, write_ablation
from dynatree.cli import app
from dynatree.compare import compare_files, compare_runs, unpaired_ratio
from dynatree.errors import ResultError
from dynatree.estimates import crossed_ratio
from dynatree.facts import SEAL, sealed
from dynatree.results import records_digest, write_result

REFERENCE = Path(__file__).parent.parent / "docs/reference"
QUANTITIES = ("tokens/s", "autoregressive tokens/s", "speedup over autoregressive")


def noisy(seed, speedup=2.0, machine=1.0, prompts=8, runs=3, **changes):
    """A result with 5 % noise in every generation and 3 % in every pass over the prompts."""
    generator = np.random.default_rng(seed)
    study = synthetic.config(prompts=prompts, runs=runs)
    spec = study.spec("tree")
    passes = np.exp(generator.normal(0, 0.03, runs))
    records = [
        synthetic.record(
            spec, prompt, run, method,
            100 * machine * passes[run] * factor * float(np.exp(generator.normal(0, 0.05))),
        )
        for prompt in range(prompts)
        for run in range(runs)
        for method, factor in (("autoregressive", 1.0), ("strategy", speedup))
    ]  # fmt: skip
    totals = synthetic.totals([entry for entry in records if entry.method == "strategy"])
    digest = records_digest(records)
    return synthetic.result(
        spec, **{"records": records, "records_digest": digest, "totals": totals, **changes}
    )


def verdicts(comparison):
    return {entry.name: entry.ratio.against(1.0) for entry in comparison.quantities}


def test_a_file_compared_with_itself_differs_in_nothing():
    path = REFERENCE / "runs/embedded/dynatree.json"
    comparison = compare_files(path, path)
    assert verdicts(comparison) == dict.fromkeys(QUANTITIES, "noise")
    assert [entry.ratio.value for entry in comparison.quantities] == pytest.approx([1.0] * 3)
    assert comparison.equal_outputs == (8, 8)
    assert comparison.differing == []
    assert "0 of 3 quantities differ beyond noise" in comparison.lines()


def test_a_real_difference_is_found_where_it_is():
    faster = compare_runs(noisy(0), noisy(1, speedup=2.6))
    assert verdicts(faster) == {
        "tokens/s": "gain",
        "autoregressive tokens/s": "noise",
        "speedup over autoregressive": "gain",
    }
    assert faster.quantities[0].ratio.value == pytest.approx(1.3, rel=0.08)
    slower = compare_runs(noisy(1, speedup=2.6), noisy(0))
    assert slower.quantities[0].ratio.against(1.0) == "loss"
    assert "B is slower, 0.7" in slower.quantities[0].verdict()


def test_a_faster_machine_is_told_from_a_better_strategy():
    comparison = compare_runs(noisy(0), noisy(1, machine=1.5))
    assert verdicts(comparison) == {
        "tokens/s": "gain",
        "autoregressive tokens/s": "gain",
        "speedup over autoregressive": "noise",
    }
    assert any("autoregressive decoding differs too" in line for line in comparison.lines())


def rate_of_differences(ratio, prompts, runs, drift, trials=200):
    """How often two simulated jobs differ beyond noise when B is `ratio` times as fast."""
    generator = np.random.default_rng(7)
    found = 0
    for _ in range(trials):
        prompt = np.exp(generator.normal(0, 0.2, (prompts, 1)))
        one, other = (
            prompt * np.exp(generator.normal(0, drift, (1, runs)))
            * np.exp(generator.normal(0, 0.05, (prompts, runs)))
            for _ in range(2)
        )  # fmt: skip
        found += crossed_ratio(other * ratio, one)[1].against(1.0) in ("gain", "loss")
    return found / trials


@pytest.fixture
def fewer_resamples(monkeypatch):
    monkeypatch.setattr("dynatree.estimates.RESAMPLES", 1000)


@pytest.mark.parametrize("drift", [0.0, 0.03])
@pytest.mark.parametrize(("prompts", "runs"), [(4, 3), (8, 3), (8, 5)])
def test_equal_jobs_seldom_differ_even_when_the_machine_drifts(
    fewer_resamples, prompts, runs, drift
):
    assert rate_of_differences(1.0, prompts, runs, drift) <= 0.06


@pytest.mark.parametrize(("ratio", "least"), [(1.3, 0.99), (1.15, 0.85)])
def test_a_difference_is_found_through_the_noise(fewer_resamples, ratio, least):
    assert rate_of_differences(ratio, 8, 3, 0.03) >= least


def test_runs_of_different_number_and_unequal_outputs(tmp_path):
    one, other = noisy(0, runs=3), noisy(1, runs=5)
    tokens = [synthetic.output(0, tokens=range(13)), *other.outputs[1:]]
    comparison = compare_runs(one, other.model_copy(update={"outputs": tokens}))
    assert comparison.equal_outputs == (7, 8)
    assert "spec.measure.runs: A 3, B 5" in comparison.differing


def test_one_prompt_has_no_verdict_and_one_run_is_remarked():
    comparison = compare_runs(noisy(0, prompts=1, runs=1), noisy(1, prompts=1, runs=1))
    assert set(verdicts(comparison).values()) == {"unknown"}
    assert any("with one timed run" in line for line in comparison.lines())


def test_provenance_that_differs_is_named():
    git = {"commit": "d" * 40, "dirty": True}
    device = {"type": "cuda", "name": "Test GPU", "threads": 2}
    other = noisy(1, provenance={"device": device, "git": git}, source_digest="7" * 64)
    differing = compare_runs(noisy(0), other).differing
    assert "provenance.device.name: A 'Test CPU', B 'Test GPU'" in differing
    assert f"provenance.git.commit: A {'c' * 40!r}, B {'d' * 40!r}" in differing
    assert any(line.startswith("source_digest: A") for line in differing)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pair_digest": "0" * 64}, "pair_digest: A 'aaa"),
        ({"prompts_digest": "0" * 64}, "prompts_digest: A 'bbb"),
    ],
)
def test_other_weights_and_other_tokens_cannot_be_compared(change, message):
    with pytest.raises(ResultError, match="cannot be compared") as error:
        compare_runs(noisy(0), noisy(1, **change))
    assert message in str(error.value)


def test_other_specifications_cannot_be_compared():
    study = synthetic.config(prompts=4)
    one, other = (synthetic.result(study.spec(name)) for name in ("linear", "linear2"))
    with pytest.raises(ResultError, match=r"strategy\.num_draft_tokens: A 6, B 2"):
        compare_runs(one, other)
    fewer = synthetic.result(synthetic.config(prompts=3).spec("linear"))
    with pytest.raises(ResultError, match="prompts: A 4 entries, B 3"):
        compare_runs(one, fewer)


def test_the_interval_of_an_unpaired_ratio():
    def around(value, factor):
        interval = Interval(low=value / factor, high=value * factor)
        return Estimate(value=value, interval=interval)

    ratio = unpaired_ratio(around(260.0, 1.1), around(200.0, 1.1))
    assert ratio.value == pytest.approx(1.3)
    # Two equal and independent errors add up to the root of two times one.
    assert ratio.interval.high == pytest.approx(1.3 * 1.1 ** (2**0.5))
    assert ratio.interval.low == pytest.approx(1.3 / 1.1 ** (2**0.5))
    assert unpaired_ratio(Estimate(value=1.0, interval=None), ratio).interval is None


def test_aggregations_are_compared_by_configuration(tmp_path):
    for name, speedup in (("a", 2.0), ("b", 2.6)):
        speedups = {"tree": [speedup * factor for factor in (0.98, 1.0, 1.01, 1.02)]}
        write_ablation(
            tmp_path / f"{name}.json", synthetic.ablation(tmp_path / name, speedups=speedups)
        )
    comparison = compare_files(tmp_path / "a.json", tmp_path / "b.json")
    found = verdicts(comparison)
    assert found["tree, speedup over autoregressive"] == "gain"
    assert found["linear, speedup over autoregressive"] == "noise"
    assert comparison.equal_outputs is None


def test_aggregations_of_other_settings_or_strategies(tmp_path):
    kept = json.loads((REFERENCE / "ablation.json").read_text())
    kept["setting"]["max_new_tokens"] = 65
    del kept[SEAL]
    (tmp_path / "longer.json").write_text(sealed(json.dumps(kept)))
    with pytest.raises(ResultError, match=r"setting\.max_new_tokens: A 64, B 65"):
        compare_files(REFERENCE / "ablation.json", tmp_path / "longer.json")
    # The two sections share one configuration.
    lines = compare_files(REFERENCE / "ablation.json", REFERENCE / "families.json").lines()
    assert any("tree_unpruned left out: only in A" in line for line in lines)
    assert any(line.startswith("dynatree, tokens/s: ") for line in lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "no such file"), ("{", "cannot be read as JSON"), ("{}", "neither a run result")],
)
def test_files_of_another_kind_are_refused(tmp_path, text, message):
    path = tmp_path / "other.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ResultError, match=message):
        compare_files(path, path)
    with pytest.raises(ResultError, match="files of one kind"):
        compare_files(REFERENCE / "runs/embedded/ar.json", REFERENCE / "ablation.json")


def test_the_command_prints_verdicts_and_fails_with_the_difference(tmp_path, monkeypatch, capsys):
    def call(*files):
        monkeypatch.setattr(sys, "argv", ["dynatree", "compare", *map(str, files)])
        try:
            app()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    write_result(tmp_path / "a.json", noisy(0))
    write_result(tmp_path / "b.json", noisy(1, speedup=2.6))
    code, out, _ = call(tmp_path / "a.json", tmp_path / "b.json")
    assert code == 0
    assert "tokens/s: A 199.5, B 263.1: B is faster by 1." in out
    assert "2 of 3 quantities differ beyond noise" in out
    runs = REFERENCE / "runs/embedded"
    code, _, err = call(runs / "linear_k2.json", runs / "linear_k3.json")
    assert code == 1
    assert "strategy.num_draft_tokens: A 2, B 3" in err


def test_comparing_needs_no_torch():
    code = "import sys, dynatree.compare; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
