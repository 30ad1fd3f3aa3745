"""The soak: what is drawn, what a divergence leaves, and slopes that are known."""

import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import yaml
from micro_pair import micro, study  # noqa: F401 - a fixture
from pydantic import TypeAdapter

from dynatree.errors import ConfigError, LosslessError
from dynatree.strategies import Strategy

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

import harness
import soak


class Clock:
    """A second passes at each look."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 1.0
        return self.now


@pytest.fixture
def run(micro, tmp_path, monkeypatch, capsys):  # noqa: F811
    config = study(
        micro,
        ["The with statement", "Return a list"],
        {"dynatree": {"strategy": "tree", "depth": 3, "prune_threshold": 0}},
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    measure = soak.measure

    def by_looks(setting, minutes, seed):
        return measure(setting, minutes, seed, Clock())

    monkeypatch.setattr(soak, "measure", by_looks)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["bench/soak.py", *arguments])
        soak.main()
        return capsys.readouterr().out

    return call


def test_a_run_records_its_cases_its_samples_and_its_slopes(run, tmp_path):
    out = run("--minutes", "2", "--tokens", "12", "--out", "here")
    record = json.loads((tmp_path / "here/soak-micro-cpu-auto.json").read_text())
    # Two looks at the clock for each case.
    assert record["cases"] == 60 == sum(record["cases_by_strategy"].values())
    assert len(record["cases_by_strategy"]) == len(soak.STRATEGIES)
    assert record["divergences"] == []
    assert record["tokens"] > 60
    samples = record["samples"]
    assert len(samples["seconds"]) == len(samples["memory_bytes"]) == 12
    assert samples["seconds"] == sorted(samples["seconds"])
    assert min(samples["memory_bytes"]) > 1e6
    for name in ("memory_mb_per_hour", "speed_percent_per_hour"):
        found = record[name]
        assert found["interval"]["low"] <= found["value"] <= found["interval"]["high"]
    table = (tmp_path / "here/soak-micro-cpu-auto.md").read_text()
    assert table in out
    assert "| 60 | " in table
    assert "seed 0, up to 12 new tokens per case" in table
    assert record["provenance"]["command"][0] == "bench/soak.py"


def test_a_divergence_is_recorded_with_all_that_repeats_it_and_fails(run, tmp_path, monkeypatch):
    oracle = soak.oracle
    calls = []

    def wrong(target, prompt, max_new_tokens, end_tokens):
        calls.append(prompt.tolist())
        tokens, logits = oracle(target, prompt, max_new_tokens, end_tokens)
        return ([*tokens[:-1], tokens[-1] + 1], logits) if len(calls) == 8 else (tokens, logits)

    monkeypatch.setattr(soak, "oracle", wrong)
    with pytest.raises(LosslessError, match=r"1 outputs differ .* that of case 7 at token"):
        run("--minutes", "1", "--out", "here")
    (found,) = json.loads((tmp_path / "here/soak-micro-cpu-auto.json").read_text())["divergences"]
    assert found["case"] == 7
    assert found["prompt"] == calls[7]
    # Without the fault the case gives no divergence: it holds all that decides its output.
    monkeypatch.setattr(soak, "oracle", oracle)
    arguments = harness.argument_parser("").parse_args([])
    setting = harness.load(arguments, harness.SYSTEM)
    strategy = TypeAdapter(Strategy).validate_python(found["strategy"])
    case = soak.Case(strategy, found["prompt"], found["max_new_tokens"], found["end_tokens"])
    tokens, departure = soak.decoded(setting, case)
    assert departure is None
    assert len(tokens) == found["token"] + 1


def test_cases_follow_from_the_seed_and_fit_the_models():
    setting = SimpleNamespace(
        context=20,
        spec=SimpleNamespace(measure=SimpleNamespace(max_new_tokens=50)),
        pair=SimpleNamespace(
            tokenizer=SimpleNamespace(eos_token_id=0),
            target=SimpleNamespace(
                config=SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=9))
            ),
        ),
    )

    def cases(seed):
        draw = random.Random(seed)
        return [soak.drawn(draw, [3, 4, 5] * 30, setting) for _ in range(300)]

    assert cases(1) == cases(1) != cases(2)
    for case in cases(1):
        assert len(case.prompt) + case.max_new_tokens <= 20
        assert case.max_new_tokens >= 1
        assert all(0 <= token < 9 for token in case.prompt)
        assert case.end_tokens[0] == 0
    drawn = cases(1)
    assert {type(case.strategy) for case in drawn} == {
        soak.Autoregressive, soak.Linear, soak.Tree, soak.DynamicTree, soak.BestFirst, soak.Auto,
    }  # fmt: skip
    assert {len(case.end_tokens) for case in drawn} == {1, 2}
    assert any(set(case.prompt) - {3, 4, 5} for case in drawn)


def test_memory_that_nobody_holds_is_not_counted():
    """The last of many pieces is held, so that the allocator's own threshold gives nothing back."""
    process = psutil.Process()
    soak.give_back()
    before = process.memory_info().rss
    pieces = [bytes(10_000) for _ in range(20_000)]
    held = process.memory_info().rss - before
    assert held > 150e6
    del pieces[:-1]
    soak.give_back()
    assert process.memory_info().rss - before < 0.2 * held


def test_slopes_are_per_hour_and_leave_out_the_warm_up():
    generator = np.random.default_rng(0)
    noise = generator.normal(0, 0.5, 200)
    samples = [
        # In the warm-up memory rises fast; afterwards by 6 MB an hour, and speed falls by 2 %.
        soak.Sample(
            seconds=18.0 * index,
            memory_bytes=int(1e6 * (400 + (index if index < 40 else 40 + 0.03 * (index - 40)))),
            tokens_per_second=200 * (1 - 0.02 * index / 200) + noise[index],
        )
        for index in range(200)
    ]
    found = soak.slopes(samples, after=18.0 * 40)
    assert found["memory_mb_per_hour"]["value"] == pytest.approx(6.0, abs=0.01)
    speed = found["speed_percent_per_hour"]
    assert speed["interval"]["low"] < -2.0 < speed["interval"]["high"] < 0
    flat = soak.slope(np.arange(50.0), np.full(50, 7.0))
    assert flat == {"value": 0.0, "interval": {"low": 0.0, "high": 0.0}}
    with pytest.raises(ConfigError, match=r"--minutes: only 2 samples after the warm-up"):
        soak.slopes(samples, after=18.0 * 198)
