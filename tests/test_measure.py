"""Paired measurement: alternation, honest counts, and the losslessness check of every job."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from micro_pair import micro  # noqa: F401 - a fixture

import dynatree.measure
from dynatree import Autoregressive, Linear, Tree
from dynatree.accept import accept_greedy
from dynatree.errors import DecodeError, LosslessError
from dynatree.measure import compare, measure, schedule
from dynatree.pairs import load_models
from dynatree.provenance import device_facts
from dynatree.specs import RunSpec


@pytest.fixture(scope="module")
def spec(micro):  # noqa: F811
    return RunSpec.model_validate(
        {
            "name": "tree",
            "pair": "micro",
            "models": {
                "target": {"path": str(micro / "target")},
                "draft": {"path": str(micro / "draft")},
                "device": "cpu",
            },
            "strategy": Tree(depth=3, prune_threshold=0).model_dump(),
            "measure": {"workload": "w", "runs": 2, "warmup": 1, "max_new_tokens": 9},
            "prompts": ["The with statement", "A list", "Raise"],
        }
    )


@pytest.fixture(scope="module")
def pair(spec):
    return load_models(spec.pair, spec.models)


def test_order_alternates_and_every_prompt_is_decoded_in_both_orders():
    entries = list(schedule(1, 2, 3))
    assert [run for run, _, _ in entries] == [-1] * 3 + [0] * 3 + [1] * 3
    for prompt in range(3):
        firsts = [order[0] for run, index, order in entries if index == prompt and run >= 0]
        assert sorted(firsts) == ["autoregressive", "strategy"]
    timed = [order[0] for run, _, order in entries if run == 0]
    assert timed[0] != timed[1]


def test_the_comparison_is_no_part_of_the_peak_and_makes_no_logits_but_the_last(
    spec, pair, monkeypatch
):
    events = []
    peak = dynatree.measure.peak_memory_bytes
    monkeypatch.setattr(
        dynatree.measure, "peak_memory_bytes", lambda device: events.append("peak") or peak(device)
    )
    monkeypatch.setattr(
        dynatree.measure, "compare", lambda *args: events.append("compare") or compare(*args)
    )
    measure(spec, pair)
    assert events == ["peak", "compare", "compare", "compare"]
    shapes = []
    hook = pair.target.get_output_embeddings().register_forward_hook(
        lambda module, inputs, output: shapes.append(output.shape[:-1])
    )
    found = compare(pair, 0, torch.arange(5), [7, 8, 9], [7, 8, 10])
    hook.remove()
    assert found.divergence.index == 2
    assert shapes == [(1, 1)]


def test_a_result_holds_every_fact(spec, pair):
    seen = []
    result = measure(spec, pair, lambda *step: seen.append(step))
    assert len(seen) == 3 * 3 * 2
    assert seen[-1][:2] == (18, 18)
    assert len(result.records) == 3 * 2 * 2
    assert all(output.equal for output in result.outputs)
    for record in result.records:
        output = result.outputs[record.prompt]
        assert record.tokens == len(output.tokens) <= 9
        assert 0 < record.first_token_seconds < record.seconds
        assert sum(record.phases.values()) <= record.seconds
        assert (record.draft_forwards > 0) == (record.method == "strategy")
    facts = result.provenance
    assert facts["device"]["threads"] == torch.get_num_threads()
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["models"]["draft"]["identity"] in result.pair_digest
    assert result.peak_memory_bytes > 1e6
    assert result.started < result.finished


def test_what_nvml_does_not_know_hides_no_other_fact(monkeypatch):
    def no(*_):
        raise RuntimeError("Not Supported")

    known = {
        "nvmlInit": None,
        "nvmlSystemGetDriverVersion": "550.54",
        "nvmlDeviceGetHandleByUUID": 0,
        "nvmlDeviceGetClockInfo": 1980,
        "nvmlDeviceGetTemperature": 41,
    }
    constants = dict.fromkeys(("NVML_CLOCK_SM", "NVML_CLOCK_MEM", "NVML_TEMPERATURE_GPU"), 0)
    answers = {name: lambda *_, value=value: value for name, value in known.items()}
    driver = SimpleNamespace(**constants, **answers, nvmlDeviceGetPowerUsage=no)
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    gpu = SimpleNamespace(name="G", total_memory=1, uuid="aaaa")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    monkeypatch.setattr("dynatree.provenance.gpu.kernels", lambda _: None)
    facts = device_facts(torch.device("cuda"))
    assert (facts["driver"], facts["uuid"], facts["clock_mhz"]) == ("550.54", "aaaa", 1980)
    assert facts["temperature_c"] == 41
    assert "power_w" not in facts
    assert facts["nvml"] == "not readable: power_w (Not Supported)"
    driver.nvmlDeviceGetHandleByUUID = no
    facts = device_facts(torch.device("cuda"))
    assert (facts["driver"], facts["uuid"]) == ("550.54", "aaaa")
    assert "clock_mhz (Not Supported), memory_clock_mhz (Not Supported)" in facts["nvml"]
    driver.nvmlInit = no
    assert device_facts(torch.device("cuda"))["nvml"] == "not readable: Not Supported"


def test_generated_and_not_requested_tokens_are_counted(spec, pair):
    """An end-of-sequence token in the middle: the prototype counted what was asked for."""
    reference = measure(spec, pair).outputs[0].tokens
    eos = reference[4]
    expected = reference.index(eos) + 1
    assert expected < 9
    stopping = load_models(spec.pair, spec.models)
    stopping.tokenizer.eos_token = stopping.tokenizer.convert_ids_to_tokens(eos)
    result = measure(spec, stopping)
    assert {r.tokens for r in result.records if r.prompt == 0} == {expected}


@pytest.mark.parametrize("strategy", [Autoregressive(), Linear(num_draft_tokens=4)])
def test_every_strategy_goes_through_the_same_measurement(spec, pair, strategy):
    result = measure(spec.model_copy(update={"strategy": strategy}), pair)
    assert all(output.equal for output in result.outputs)
    rounds = result.of("strategy")[0].rounds
    assert max(entry.depth for entry in rounds) == strategy.max_depth


def test_a_divergence_in_float32_fails_the_job(spec, pair, monkeypatch):
    def accept_off_by_one(tree, choices, longest, static):
        accepted = accept_greedy(tree, choices, longest, static)
        if len(choices) == 1:
            return accepted
        return replace(accepted, tokens=(accepted.tokens + 1) % 300)

    monkeypatch.setattr("dynatree.decode.accept_greedy", accept_off_by_one)
    with pytest.raises(LosslessError, match=r"prompt \d: the output differs .* at token \d"):
        measure(spec, pair)


def test_compare_finds_the_first_divergence_and_its_gap(pair):
    prompt = torch.tensor([5, 6, 7])
    with torch.inference_mode():
        top = pair.target(torch.tensor([[5, 6, 7, 8]])).logits[0, -1].topk(2).values
    output = compare(pair, 0, prompt, [8, 9, 10], [8, 11, 10])
    assert output.divergence.index == 1
    assert output.divergence.gap == pytest.approx(float(top[0] - top[1]), abs=1e-5)
    assert compare(pair, 0, prompt, [8, 9], [8]).divergence.index == 1
    assert compare(pair, 0, prompt, [8, 9], [8, 9]).equal


def test_a_prompt_beyond_the_context_is_an_error(spec, pair):
    longer = spec.model_copy(update={"prompts": ["word " * 100]})
    with pytest.raises(DecodeError, match=r"need a context of"):
        measure(longer, pair)
