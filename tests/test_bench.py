"""The benchmarks: interleaving, what is recorded, and that a wrong output fails the command."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from micro_pair import micro, study  # noqa: F401 - a fixture

from dynatree.errors import ConfigError, LosslessError
from dynatree.sources import PACKAGE, source_digest

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

import harness
import peers
import suite

CPU = torch.device("cpu")


def timings(seconds, outcomes):
    return harness.Timings(seconds, outcomes)


@pytest.mark.parametrize("count", [2, 3, 9])
def test_over_two_runs_each_of_two_methods_goes_first(count):
    names = [str(index) for index in range(count)]
    for case in range(4):
        one, other = harness.order(names, 0, case), harness.order(names, 1, case)
        assert sorted(one) == sorted(other) == names
        assert one == other[::-1]
    assert {harness.order(names, 0, case)[0] for case in range(count)} == set(names)


def test_every_method_sees_every_case_in_every_pass_and_warm_up_is_not_recorded():
    seen = []
    passes = []
    result = harness.interleaved(
        {name: lambda case, name=name: seen.append((name, case)) or case for name in "ab"},
        [10, 20, 30],
        CPU,
        runs=2,
        warmup=1,
        progress=passes.append,
    )
    assert sorted(seen) == sorted([(name, case) for name in "ab" for case in (10, 20, 30)] * 3)
    for times in result.values():
        assert times.outcomes == [[10, 10], [20, 20], [30, 30]]
        assert np.shape(times.seconds) == (3, 2)
    assert passes == ["warm-up pass", "pass 1 of 2", "pass 2 of 2"]


def test_throughput_is_of_passes_and_a_ratio_is_paired_by_prompt_and_run():
    one = timings([[1.0, 2.0, 4.0], [3.0, 2.0, 4.0]], [[[7] * 8] * 3, [[7] * 4] * 3])
    other = timings([[2.0, 2.0, 2.0], [3.0, 8.0, 4.0]], [[[7] * 8] * 3, [[7] * 2] * 3])
    # Passes of 12 tokens in 4, 4 and 8 seconds.
    assert harness.throughput(one) == pytest.approx(3.0)
    # Ratios of the first prompt 2, 1, 0.5 and of the second 2, 8, 2.
    found = harness.ratio(one, other)
    assert found.value == pytest.approx(2**0.5)
    assert found.interval.low == pytest.approx(1.0)
    assert found.interval.high == pytest.approx(2.0)


def test_a_wrong_output_fails_when_equality_is_demanded_and_is_counted_when_not():
    def good(prompt):
        return [prompt, 1, 2]

    calls = []

    def broken(prompt):
        # Wrong for one prompt in one run only.
        calls.append(prompt)
        return [5, 9, 2] if len(calls) == 4 else good(prompt)

    result = harness.interleaved({"good": good, "broken": broken}, [4, 5], CPU, runs=2)
    reference = [[4, 1, 2], [5, 1, 2]]
    with pytest.raises(LosslessError, match=r"broken: prompt 1 at token 1") as caught:
        harness.differences(result, reference, exact=True)
    assert "good" not in str(caught.value)
    found = harness.differences(result, reference, exact=False)
    assert found == {"good": {}, "broken": {1: 1}}
    shorter = {"short": timings([[1.0]], [[[4, 1]]])}
    assert harness.differences(shorter, reference, exact=False) == {"short": {0: 2}}


def test_replaced_leaves_the_object_as_it_was():
    layer = torch.nn.Linear(1, 1)
    before = dict(vars(layer))
    with (
        peers.replaced(layer, "forward", lambda states: states),
        peers.replaced(layer, "in_features", 7),
    ):
        assert layer(3) == 3
        assert layer.in_features == 7
    assert vars(layer) == before


@pytest.fixture
def run(micro, tmp_path, monkeypatch, capsys):  # noqa: F811
    config = study(
        micro,
        ["The with statement", "Return a list", "Raise"],
        {"dynatree": {"strategy": "tree", "depth": 3, "prune_threshold": 0}},
        runs=2,
        warmup=1,
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    # One candidate of each family would choose nothing; two keep the test short.
    monkeypatch.setattr(peers, "LINEAR_TOKENS", {"cpu": (2, 3)})
    for family in ("ASSISTANT_TOKENS", "LOOKUP_TOKENS"):
        monkeypatch.setattr(peers, family, (2, 3))
    monkeypatch.setattr(peers, "SYSTEM_PRUNING", {"cpu": ((0.1, 5),)})
    monkeypatch.setattr(peers, "CHOOSING_RUNS", 1)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["bench/peers.py", *arguments])
        peers.main()
        return capsys.readouterr().out

    return call


def test_peers_records_every_method_and_the_ratios_follow_from_the_seconds(run, tmp_path):
    out = run("--prompts", "2", "--tokens", "6", "--threads", "1", "--out", "here")
    record = json.loads((tmp_path / "here/peers-micro-cpu-auto.json").read_text())
    expected = {name for name in peers.METHODS if name != "generate_compiled"}
    assert set(record["methods"]) == expected
    assert all(len(tokens) == 6 for tokens in record["reference"])
    speeds = {}
    for name, facts in record["methods"].items():
        assert facts["unequal"] == []
        assert facts["tokens"] == [[6, 6], [6, 6]]
        rates = np.array(facts["tokens"]) / np.array(facts["seconds"])
        speeds[name] = rates
        total = np.sum(facts["tokens"], axis=0) / np.sum(facts["seconds"], axis=0)
        assert facts["tokens_per_second"] == pytest.approx(np.median(total))
    assert {(entry["of"], entry["to"]) for entry in record["ratios"]} == {
        (of, to) for of, to in peers.RATIOS if to != "generate_compiled"
    }
    for entry in record["ratios"]:
        paired = np.median(speeds[entry["of"]] / speeds[entry["to"]], axis=1)
        assert entry["value"] == pytest.approx(np.exp(np.log(paired).mean()))
        assert entry["interval"]["low"] <= entry["value"] <= entry["interval"]["high"]
    tuned = ("2", "3")
    for family, values in {
        "dynatree": ("0", "0.1 budget 5"),
        "linear": tuned,
        "assistant_tuned": tuned,
        "prompt_lookup": tuned,
    }.items():
        choice = record["choices"][family]
        tried = {name: facts["tokens_per_second"] for name, facts in choice["candidates"].items()}
        assert set(tried) == set(values)
        assert tried[choice["chosen"]] == max(tried.values())
        # The choice and the measurement share no timing.
        chosen = np.unique(choice["candidates"][choice["chosen"]]["seconds"])
        assert not np.isin(record["methods"][family]["seconds"], chosen).any()
    assert record["setting"]["measure"]["max_new_tokens"] == 6
    assert record["source_digest"] == source_digest(PACKAGE / "measure.py")
    assert record["provenance"]["versions"]["torch"] == torch.__version__
    assert record["provenance"]["device"]["threads"] == 1
    assert record["provenance"]["command"][0] == "bench/peers.py"
    assert record["provenance"]["models"]["draft"]["identity"] in record["setting"]["pair_digest"]
    table = (tmp_path / "here/peers-micro-cpu-auto.md").read_text()
    assert table in out
    assert "| `prompt_lookup` | prompt_lookup_num_tokens" in table
    assert "| 2 of 2 |" in table


def test_peers_at_a_context(run, tmp_path):
    """Its prompts are of that length, each beginning with another of the workload's."""
    out = run("--context", "12", "--tokens", "4", "--methods", "ar", "generate")
    record = json.loads((tmp_path / "bench/results/peers-micro-cpu-auto.json").read_text())
    assert record["setting"]["prompt_tokens"] == [12, 12, 12]
    assert record["methods"]["ar"]["unequal"] == []
    assert "; 3 prompts of 12 tokens, " in out


def test_peers_leaves_the_models_as_they_were(run, monkeypatch):
    loaded = []
    load = harness.load_models
    monkeypatch.setattr(
        harness, "load_models", lambda *given: loaded.append(load(*given)) or loaded[-1]
    )
    shipped = []

    def measure(setting, wanted):
        target, draft = setting.pair.target, setting.pair.draft
        shipped.append(draft.generation_config)
        assert target.generation_config.eos_token_id is None
        method = peers.assisted(setting, "", {"num_assistant_tokens": 2})
        assert method.decode(setting.prompts[0]) == peers.generate(setting, "", {}).decode(
            setting.prompts[0]
        )
        return {"methods": {}, "ratios": [], "choices": {}}

    monkeypatch.setattr(peers, "measure", measure)
    run()
    assert loaded[0].draft.generation_config is shipped[0]
    assert shipped[0].num_assistant_tokens is None
    assert loaded[0].target.generation_config.eos_token_id is not None


def test_peers_measures_only_what_is_asked_for(run, tmp_path):
    run("--tokens", "4", "--methods", "ar", "linear", "generate", "--out", "here")
    record = json.loads((tmp_path / "here/peers-micro-cpu-auto.json").read_text())
    assert set(record["methods"]) == {"ar", "linear", "generate"}
    assert set(record["choices"]) == {"linear"}
    assert {(entry["of"], entry["to"]) for entry in record["ratios"]} == {
        ("ar", "generate"),
        ("linear", "ar"),
    }


def test_a_suite_loads_once_and_goes_on_after_a_failure(run, tmp_path, monkeypatch, capsys):
    loaded = []
    load = suite.load_models
    monkeypatch.setattr(suite, "load_models", lambda *given: loaded.append(given) or load(*given))
    commands = ["rounds --tokens 4 --contexts 9999", "peers --tokens 4 --methods ar generate"]
    again = "peers --tokens 5 --methods ar generate --out there"
    monkeypatch.setattr(sys, "argv", ["bench/suite.py", "--out", "here", *commands, again])
    assert suite.main() == 1
    assert len(loaded) == 1
    outcomes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("== ")]
    assert [outcome.split(",")[0] for outcome in outcomes[1::2]] == [
        outcomes[1].split(",")[0],
        "== peers: ok",
        "== peers: ok",
    ]
    assert outcomes[1].startswith("== rounds: failed: --contexts")
    for folder, tokens in (("here", 4), ("there", 5)):
        record = json.loads((tmp_path / folder / "peers-micro-cpu-auto.json").read_text())
        assert record["setting"]["measure"]["max_new_tokens"] == tokens


def test_peers_fails_and_writes_nothing_when_a_method_is_wrong(run, monkeypatch, tmp_path):
    ours = peers.ours

    def broken(setting, strategy, label):
        method = ours(setting, strategy, label)
        return peers.Method(label, lambda prompt: [*method.decode(prompt)[:-1], 0])

    monkeypatch.setattr(peers, "ours", broken)
    with pytest.raises(LosslessError, match=r"dynatree 0: prompt 0 at token 7"):
        run()
    assert not (tmp_path / "bench").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--pair", "pythia"), "unknown pair 'pythia'"),
        (("--device", "tpu"), "device"),
        (("--runtime", "fast"), "runtime"),
    ],
)
def test_wrong_options_are_named(run, arguments, message):
    with pytest.raises(ConfigError, match=message):
        run(*arguments)
