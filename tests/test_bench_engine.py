"""The benchmarks of the engine itself: what a forward must read, and where a round's time goes."""

import itertools
import json
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from micro_pair import RECIPE, micro, study  # noqa: F401 - a fixture
from models import build

import dynatree.decode
from dynatree.clock import PhaseClock
from dynatree.config import load_config
from dynatree.decode import Decoder, Stats
from dynatree.errors import ConfigError
from dynatree.pairs import load_models
from dynatree.runtime import Runtime
from dynatree.strategies import Auto, Autoregressive, Linear, Tree
from dynatree.workloads import encode_prompts

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

import harness
import roofline
import rounds

PROMPTS = ["The with statement", "Return a list", "Raise"]


class StaticRuntime(Runtime):
    """The shapes of a GPU, on a CPU."""

    def __init__(self, mode, device, static=True):
        super().__init__(mode, device, static)


class TickingClock(PhaseClock):
    """Every mark is one second after the last."""

    def __init__(self, device):
        super().__init__(device)
        self._now = itertools.count(0.0).__next__


@pytest.fixture
def folder(micro, tmp_path, monkeypatch):  # noqa: F811
    config = study(
        micro,
        PROMPTS,
        {"dynatree": {"strategy": "tree", "depth": 3, "prune_threshold": 0}},
        runs=3,
        warmup=1,
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def setting(folder):
    spec = load_config().spec("dynatree")
    pair = load_models(spec.pair, spec.models)
    return harness.Setting(spec, pair, encode_prompts(spec, pair), folder, datetime.now(UTC))


@pytest.fixture
def run(folder, monkeypatch, capsys):
    def call(module, *arguments):
        monkeypatch.setattr(sys, "argv", [f"bench/{module.__name__}.py", *arguments])
        module.main()
        (written,) = (folder / "out").glob(f"{module.__name__}-micro-cpu*.json")
        record = json.loads(written.read_text())
        table = written.with_suffix(".md").read_text()
        assert table in capsys.readouterr().out
        return record, table

    return call


def neox_bytes(role):
    """Of the weights without the input embedding, by hand: 4 bytes each."""
    width, layers = RECIPE[role]["width"], RECIPE[role]["layers"]
    layer = 12 * width**2 + 13 * width
    return 4 * (layers * layer + 2 * width + RECIPE["vocab_size"] * width)


def test_the_weights_to_read_leave_out_what_is_looked_up_and_count_what_is_tied_once():
    width, vocabulary, context = 32, 40, 128
    layer = 12 * width**2 + 13 * width
    tied = build("gpt2", layers=3)
    assert roofline.weight_bytes(tied) == 4 * (3 * layer + 2 * width + vocabulary * width)
    # Its embedding of positions is looked up as well.
    assert tied.num_parameters() * 4 - roofline.weight_bytes(tied) == 4 * context * width
    untied = build("llama", layers=3, tie_word_embeddings=False)
    rest = untied.num_parameters() * 4 - roofline.weight_bytes(untied)
    assert rest == 4 * vocabulary * width
    assert roofline.weight_bytes(untied.bfloat16()) * 2 == untied.num_parameters() * 4 - rest


@pytest.mark.parametrize("static", [False, True])
def test_roofline_follows_from_the_seconds_that_it_records(run, monkeypatch, static):
    if static:
        monkeypatch.setattr(dynatree.decode, "Runtime", StaticRuntime)
    record, table = run(
        roofline,
        *("--out", "out", "--runs", "3", "--repeats", "2", "--copy-mib", "2", "--tokens", "6"),
    )
    # The models hold 64 tokens; the deepest node to verify is 8 behind the root.
    assert record["context"] == RECIPE["context"] - 9
    assert record["weight_bytes"] == {role: neox_bytes(role) for role in ("target", "draft")}
    assert record["kv_bytes_per_token"] == {
        role: 4 * 2 * RECIPE[role]["layers"] * RECIPE[role]["width"] for role in ("target", "draft")
    }
    copy = record["copy"]
    assert copy["buffer_bytes"] == 2 * 2**20
    assert len(copy["seconds"]) == 3
    bandwidth = 2 * copy["buffer_bytes"] / (np.median(copy["seconds"]) / 2)
    assert copy["bytes_per_second"] == pytest.approx(bandwidth)
    expected = {"one token": ("target", 1)}
    expected |= {f"verify {nodes}": ("target", nodes) for nodes in (1, 2, 4, 8, 16, 32, 64)}
    expected |= {f"verify {nodes}": ("target", nodes) for nodes in (128, 256)}
    expected |= {f"draft {width}": ("draft", width) for width in (1, 4, 16)}
    steps = record["steps"]
    assert {name: (step["model"], step["nodes"]) for name, step in steps.items()} == expected
    for name, step in steps.items():
        role = step["model"]
        read = neox_bytes(role) + record["kv_bytes_per_token"][role] * record["context"]
        seconds = np.median(step["seconds"]) / 2
        assert len(step["seconds"]) == 3
        assert step["bytes"] == read
        assert step["floor_ms"] == pytest.approx(1e3 * read / bandwidth)
        assert step["ms"] == pytest.approx(1e3 * seconds)
        assert step["fraction"] == pytest.approx(read / bandwidth / seconds)
        assert f"| {name} | {read / 1e6:.1f} |" in table
    memory = record["memory"]
    assert set(memory) == {"weights", "caches"}
    # Target and draft; one cache for each decoder of each model that it has.
    assert memory["weights"] > sum(record["weight_bytes"].values())
    kv = record["kv_bytes_per_token"]
    assert memory["caches"] > (2 * kv["target"] + kv["draft"]) * record["context"]
    held = memory | {"peak_in_use": 2 * sum(memory.values()), "peak_held": 3 * sum(memory.values())}
    assert "2.000 times that in use, 3.000 times held" in roofline.table(record | {"memory": held})
    generations = record["generations"]
    assert set(generations) == {"ar", "dynatree"} == set(record["preparation"])
    for facts in generations.values():
        check_summary(facts, "cpu", prompts=1, runs=3)
        assert facts["overhead_percent"] == pytest.approx(
            100 * facts["overhead_ms"] / facts["ms_per_round"]
        )
    # The five rounds of 6 tokens read from 56 to 60 committed tokens and the one before.
    middle = steps["one token"]["bytes"] + 3 * record["kv_bytes_per_token"]["target"]
    assert generations["ar"]["rounds"] == [[5, 5, 5]]
    assert generations["ar"]["fraction"] == pytest.approx(
        1e3 * middle / bandwidth / generations["ar"]["ms_per_round"]
    )
    assert "fraction" not in generations["dynatree"]
    assert record["provenance"]["command"][0] == "bench/roofline.py"


def check_summary(facts, kind, prompts, runs):
    """Recomputes a summary from the samples that it holds."""
    names = list(rounds.PARTS[kind])
    assert list(facts["parts"]) == list(facts["seconds"]) == names
    seconds = np.array([facts["seconds"][name] for name in names])
    assert seconds.shape == (len(names), prompts, runs)
    totals = seconds.sum(axis=0)
    middle = np.argsort(totals, axis=1, kind="stable")[:, (runs - 1) // 2]
    each = np.arange(prompts)
    count = np.array(facts["rounds"])[each, middle].sum()
    spent = seconds[:, each, middle].sum(axis=1)
    assert facts["ms_per_round"] == pytest.approx(1e3 * totals[each, middle].sum() / count)
    for name, part in zip(names, spent, strict=True):
        assert facts["parts"][name]["ms"] == pytest.approx(1e3 * part / count)
        assert facts["parts"][name]["percent"] == pytest.approx(100 * part / spent.sum())
    assert sum(part["percent"] for part in facts["parts"].values()) == pytest.approx(100)
    overhead = sum(facts["parts"][name]["percent"] for name in rounds.OVERHEAD[kind])
    assert facts["overhead_percent"] == pytest.approx(overhead)
    nodes = np.array(facts["nodes"])[each, middle].sum()
    assert facts["nodes_per_round"] == pytest.approx(nodes / count)


@pytest.mark.parametrize("static", [False, True])
def test_rounds_follow_from_the_seconds_that_they_record(run, monkeypatch, static):
    if static:
        monkeypatch.setattr(dynatree.decode, "Runtime", StaticRuntime)
    record, table = run(
        rounds,
        *("--out", "out", "--tokens", "6", "--prompts", "2", "--budgets", "4"),
        *("--contexts", "20", "40", "60"),
    )
    # The models hold 64 tokens, and 60 leave no room for 6 new ones.
    assert record["contexts"] == [20, 40]
    assert list(record["strategies"]) == ["ar", "linear_k4", "dynatree", "tree_4"]
    for name, facts in record["strategies"].items():
        assert facts["unequal_to_ar"] == 0
        assert list(facts["contexts"]) == ["20", "40"]
        for context, found in facts["contexts"].items():
            check_summary(found, "cpu", prompts=2, runs=3)
            assert found["tokens_per_round"] >= 1
            assert f"| {context} | `{name}` | {found['nodes_per_round']:.1f} |" in table
    for found in record["strategies"]["ar"]["contexts"].values():
        assert found["rounds"] == [[5, 5, 5]] * 2
        assert found["nodes_per_round"] == 0
        assert found["tokens_per_round"] == 1
        assert found["parts"]["draft_forwards"] == {"ms": 0, "percent": 0}
    for found in record["strategies"]["tree_4"]["contexts"].values():
        assert 0 < found["nodes_per_round"] <= 4
    assert record["setting"]["measure"]["max_new_tokens"] == 6
    assert record["provenance"]["versions"]["torch"] == torch.__version__


def test_catching_up_after_rounds_without_a_draft_is_drafting(setting, monkeypatch):
    auto = Auto(candidates=[Autoregressive(), Linear(num_draft_tokens=3)])
    decoder = Decoder(setting.pair.target, setting.pair.draft, auto, 40)
    decoder.prepare()
    rules = itertools.cycle([0, 1])
    monkeypatch.setattr(decoder._controller, "choose", rules.__next__)
    keys = []
    run = decoder.runtime.run
    monkeypatch.setattr(
        decoder.runtime, "run", lambda key, phase: keys.append(key[0]) or run(key, phase)
    )
    sample = rounds.observe(decoder, 20, setting.prompts[0])
    assert "catch_up" in keys
    assert sample.parts["draft_forwards"] > 0


@pytest.mark.parametrize(
    "strategy",
    [Autoregressive(), Linear(num_draft_tokens=3), Tree(depth=3, prune_threshold=0.0)],
    ids=["ar", "linear", "tree"],
)
def test_every_part_is_charged_with_its_own_time(setting, monkeypatch, strategy):
    monkeypatch.setattr(rounds, "PhaseClock", TickingClock)
    decoder = Decoder(setting.pair.target, setting.pair.draft, strategy, 40)
    prompt, stats = setting.prompts[0], Stats()
    expected = [*itertools.chain(*decoder.stream(prompt, 9, stats=stats))]
    before = dict(vars(decoder.runtime)), dict(vars(decoder._target))
    sample = rounds.observe(decoder, 9, prompt)
    assert sample.tokens == expected
    assert (sample.rounds, sample.nodes) == (len(stats.rounds), stats.drafted_nodes)
    drafts = max(stats.draft_forwards - 1, 0)
    grown = sum(entry.depth > 0 for entry in stats.rounds)
    # One second between any two marks: one before and one after each forward and each phase.
    assert sample.parts == {
        "draft_forwards": drafts,
        "grow": drafts + grown,
        "verify_forward": sample.rounds,
        "verify": 2 * sample.rounds,
        "commit": sample.rounds,
        "host": 2 * sample.rounds + grown + 1,
    }
    assert sample.seconds == sum(sample.parts.values())
    assert (dict(vars(decoder.runtime)), dict(vars(decoder._target))) == before
    assert decoder.decode(prompt, 9).tokens == expected


def test_the_run_with_the_median_time_stands_for_a_prompt():
    def sample(seconds, count):
        parts = {"grow": seconds / 2, "verify": seconds / 4, "commit": 0.0, "host": seconds / 4}
        return rounds.Sample([7] * (2 * count + 1), count, 3 * count, parts)

    found = rounds.summary(
        [[sample(8.0, 2), sample(1.0, 2), sample(4.0, 2)], [sample(2.0, 1)] * 3], "cuda"
    )
    check_summary(found, "cuda", prompts=2, runs=3)
    # 4 seconds of the first prompt and 2 of the second, for 3 rounds.
    assert found["ms_per_round"] == pytest.approx(2000)
    assert found["tokens_per_round"] == 2
    assert found["nodes_per_round"] == 3
    # On CUDA, the gaps between the phases.
    assert found["overhead_ms"] == pytest.approx(500)
    assert found["overhead_percent"] == pytest.approx(25)


def test_the_texts_begin_with_each_prompt_and_have_the_length():
    prompts = [torch.tensor([1, 2, 3]), torch.tensor([4, 5])]
    assert [text.tolist() for text in rounds.text(prompts, 7)] == [
        [1, 2, 3, 4, 5, 1, 2],
        [4, 5, 1, 2, 3, 4, 5],
    ]
    assert [text.tolist() for text in rounds.text(prompts, 2)] == [[1, 2], [4, 5]]


def test_measuring_leaves_the_models_and_their_decoders_as_they_were(setting):
    target, draft = setting.pair.target, setting.pair.draft
    weights = {name: value.clone() for name, value in target.state_dict().items()}
    decoder = Decoder(target, draft, setting.spec.strategy, 40)
    before = [decoder.decode(prompt, 12).tokens for prompt in setting.prompts]
    roofline.measure(setting, context=30, copy_bytes=2**20, repeats=1)
    rounds.measure(setting, contexts=[20], budgets=[4])
    assert [decoder.decode(prompt, 12).tokens for prompt in setting.prompts] == before
    fresh = Decoder(target, draft, setting.spec.strategy, 40)
    assert [fresh.decode(prompt, 12).tokens for prompt in setting.prompts] == before
    assert all(torch.equal(value, weights[name]) for name, value in target.state_dict().items())


@pytest.mark.parametrize("static", [False, True])
def test_the_timed_steps_are_what_a_round_would_do(setting, monkeypatch, static):
    if static:
        monkeypatch.setattr(dynatree.decode, "Runtime", StaticRuntime)
    prompt = rounds.text(setting.prompts, 30)[0]
    target, draft = setting.pair.target, setting.pair.draft
    decoder = roofline.primed(setting, roofline.FULL, prompt)
    with torch.inference_mode():
        decoder._grow_phase(0, roofline.FULL.max_depth, decoder.runtime.visible(30 + 512))
        tree, grown = decoder._tree, decoder._drafter._grown
        first, position = target(prompt[None]).logits[0, -1].argmax(), decoder._position.item()
        assert (tree.tokens[0], position) == (first, 30)
        # Nothing was pruned: full levels, and as many nodes as the largest verification has.
        assert grown.depths[:31].tolist() == [d for d in range(5) for _ in range(2**d)]
        assert (tree.log_probs[:256] > -torch.inf).all()
        for nodes in roofline.NODES:
            decoder._choices.fill_(-1)
            roofline.verification(decoder, nodes, 30)[1]()
            assert decoder._position.item() == position
            for node in {0, nodes // 2, nodes - 1}:
                path = tree.tokens[:256][tree.ancestors[node, :256]]
                logits = target(torch.cat((prompt, path))[None]).logits[0, -1]
                choices = decoder._choices if static else decoder._chosen
                assert choices[node] == logits.argmax()
        for width in roofline.WIDTHS:
            level = slice(2 * width - 1, 4 * width - 1)
            expected = grown.tokens[level].tolist()
            grown._levels[width.bit_length() - 1].tokens.fill_(-1)
            roofline.draft_level(decoder, width, 30)[1]()
            grown.join()
            assert grown.tokens[level].tolist() == expected
        path = grown.tokens[: grown.capacity][grown.ancestors[20, : grown.capacity]]
        best = draft(torch.cat((prompt, path))[None]).logits[0, -1].topk(2).indices
        assert set(grown.tokens[41:43].tolist()) == set(best.tolist())


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (rounds, ("--contexts", "60"), "give at most 16"),
        (rounds, ("--tokens", "1"), "at least 2"),
        (roofline, ("--tokens", "1"), "at least 2"),
        (roofline, ("--tokens", "64"), "leaves no context"),
    ],
)
def test_what_cannot_be_measured_is_said(run, module, arguments, message):
    with pytest.raises(ConfigError, match=message):
        run(module, *arguments)
