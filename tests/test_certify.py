"""The certificate passes what is lossless, and each broken engine fails it, in 16 bits as well."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from models import draft_of, expected, prompt, target_of
from mutations import MUTATIONS
from pydantic import ValidationError

from dynatree.certificate import (
    SAFETY,
    Certificate,
    Departure,
    explained,
    read_certificate,
    write_certificate,
)
from dynatree.certify import Case, certify, control, departures, oracle
from dynatree.errors import LosslessError, ResultError
from dynatree.pairs import Pair
from dynatree.sampling import Sampler
from dynatree.specs import CertificateSpec

STRATEGIES = {
    "ar": {"strategy": "autoregressive"},
    "tree": {
        "strategy": "tree",
        "depth": 3,
        "branch_factor": 3,
        "prune_threshold": 0.0,
        "node_budget": 256,
    },
}
LENGTH, NEW, PROMPTS = 17, 20, 3


def spec(dtype="float32", names=("ar", "tree"), prompts=PROMPTS):
    return CertificateSpec.model_validate(
        {
            "pair": "micro",
            "models": {
                "target": {"path": "target"},
                "draft": {"path": "draft"},
                "dtype": dtype,
                "device": "cpu",
            },
            "strategies": {name: STRATEGIES[name] for name in names},
            # Each stands for the random prompt of that seed; see `tokenizer`.
            "prompts": [str(seed) for seed in range(prompts)],
            "max_new_tokens": NEW,
        }
    )


def tokenizer(text, verbose):
    return SimpleNamespace(input_ids=prompt(LENGTH, int(text)).tolist())


tokenizer.eos_token_id = None


def pair_of(family, dtype="float32"):
    models = [target_of(family), draft_of(family, "noisy")]
    if dtype != "float32":
        models = [copy.deepcopy(model).to(getattr(torch, dtype)) for model in models]
    return Pair(*models, tokenizer, digest="weights", facts={})


def verdicts(certificate):
    return {check.name: check.verdict for check in certificate.configurations}


def check_of(certificate, name):
    return next(check for check in certificate.configurations if check.name == name)


# The oracle.


@pytest.mark.parametrize("family", ["gpt_neox", "qwen2"])
def test_the_oracle_is_plain_greedy_whatever_the_model_says(family):
    target = copy.copy(target_of(family))
    target.generation_config = copy.deepcopy(target.generation_config)
    target.generation_config.repetition_penalty = 3.0
    target.generation_config.eos_token_id = expected(family, LENGTH, NEW)[2]
    kept = target.generation_config
    tokens, logits = oracle(target, prompt(LENGTH), NEW, [])
    assert tokens == expected(family, LENGTH, NEW)
    assert logits.dtype == torch.float32
    assert logits.argmax(-1).tolist() == tokens
    assert target.generation_config is kept


def test_the_oracle_ends_where_it_is_told():
    full = expected("gpt2", LENGTH, NEW)
    tokens, logits = oracle(target_of("gpt2"), prompt(LENGTH), NEW, [full[7]])
    assert tokens == full[: full.index(full[7]) + 1]
    assert len(logits) == len(tokens)


# float32.


@pytest.mark.parametrize("family", ["gpt_neox", "llama", "gpt2", "qwen2"])
def test_a_sound_engine_passes_in_float32(family):
    told = []
    certificate = certify(spec(), pair_of(family), lambda check: told.append(check.name))
    assert certificate.passed
    assert verdicts(certificate) == {"ar": "equal", "tree": "equal"}
    assert told == ["ar", "tree"]
    certificate.require()
    for check in certificate.configurations:
        # Every prompt twice, the second time with an end inside the text.
        assert [output.prompt for output in check.greedy.outputs] == [0, 0, 1, 1, 2, 2]
        assert [len(output.end_tokens) for output in check.greedy.outputs] == [0, 1] * PROMPTS
        assert all(output.tokens == NEW for output in check.greedy.outputs[::2])
        assert any(output.tokens < NEW for output in check.greedy.outputs[1::2])
        assert check.greedy.limit is None
        assert check.sampled.outputs == 2 * PROMPTS
        assert check.sampled.departures == []
        assert check.greedy.controls == []


@pytest.mark.parametrize("mutate", MUTATIONS.values(), ids=MUTATIONS)
@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_every_broken_engine_fails_in_float32(mutate, family, monkeypatch, tmp_path):
    mutate(monkeypatch)
    certificate = certify(spec(names=["tree"]), pair_of(family))
    assert not certificate.passed
    assert verdicts(certificate) == {"tree": "failed"}
    with pytest.raises(LosslessError, match=r"(?s)not lossless:.*  tree: prompt \d"):
        certificate.require()
    # It is written all the same, with what is wrong.
    write_certificate(tmp_path / "certificate.json", certificate)
    kept = json.loads((tmp_path / "certificate.json").read_text())
    assert kept["passed"] is False
    assert kept["configurations"][0]["reasons"]


def test_what_fails_is_that_configuration_alone(monkeypatch):
    MUTATIONS["positions"](monkeypatch)
    assert verdicts(certify(spec(), pair_of("gpt_neox"))) == {"ar": "equal", "tree": "failed"}


# 16 bits.


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("gpt_neox", "bfloat16"),
        ("llama", "bfloat16"),
        ("gpt2", "float16"),
        ("qwen2", "float16"),
    ],
)
def test_a_sound_engine_passes_in_16_bits_with_its_control(family, dtype):
    certificate = certify(spec(dtype), pair_of(family, dtype))
    assert certificate.passed, certificate.configurations
    for check in certificate.configurations:
        assert [control.prompt for control in check.greedy.controls] == list(range(PROMPTS))
        noise = max(control.noise for control in check.greedy.controls)
        assert check.greedy.limit == SAFETY * noise
        assert 0 < noise < 0.5
    rows = {c.name: {k.rows for k in c.greedy.controls} for c in certificate.configurations}
    assert rows == {"ar": {2}, "tree": {1 + 3 + 9 + 27}}


@pytest.mark.parametrize("mutate", MUTATIONS.values(), ids=MUTATIONS)
def test_every_broken_engine_fails_in_bfloat16(mutate, monkeypatch):
    mutate(monkeypatch)
    certificate = certify(spec("bfloat16", names=["tree"]), pair_of("gpt_neox", "bfloat16"))
    assert verdicts(certificate) == {"tree": "failed"}


def test_the_control_measures_nothing_but_the_shape():
    """Padding rows leave the first row's result as it is, up to rounding of the dtype."""
    ids = prompt(LENGTH)
    noise = {}
    for dtype in ("float32", "bfloat16"):
        target = pair_of("llama", dtype).target
        case = Case(0, ids, [], *oracle(target, ids, NEW, []), [])
        found = control(target, case, [41, 1, 7])
        assert found.rows == 41
        noise[dtype] = found.noise
    assert noise["float32"] < 1e-4 < noise["bfloat16"]


def test_a_control_of_other_tokens_would_be_noticed():
    """The control's figure is no constant: a wrong position in it shows at once."""
    target, ids = target_of("gpt_neox"), prompt(LENGTH)
    tokens, logits = oracle(target, ids, NEW, [])
    case = Case(0, ids, [], [*tokens[:5], (tokens[5] + 1) % 40, *tokens[6:]], logits, [])
    found = control(target, case, [3])
    assert found.noise > 0.1
    assert found.departure is not None
    assert found.departure.index == 5


# Departures.


def case_and_output():
    target, ids = target_of("gpt_neox"), prompt(LENGTH)
    return target, Case(0, ids, [], *oracle(target, ids, NEW, []), [])


def second_best(case, index):
    return case.logits[index].topk(2).indices[1].item()


def went_on(target, case, index, token):
    """The oracle's output with `token` at `index`, and what the oracle would add to that."""
    begun = [*case.tokens[:index], token]
    ids = torch.cat((case.prompt, torch.tensor(begun)))
    return begun + oracle(target, ids, NEW - len(begun), case.end_tokens)[0]


def test_a_near_tie_is_explained_and_the_rest_is_checked_against_what_follows_it():
    target, case = case_and_output()
    tokens = went_on(target, case, 4, second_best(case, 4))
    (found,) = departures(target, case, tokens, NEW, limit=100.0)
    assert found.index == 4
    assert found.shortfall == pytest.approx(found.gap)
    # What is wrong behind it is found as well.
    tokens[9] = (tokens[9] + 1) % 40
    both = departures(target, case, tokens, NEW, limit=100.0)
    assert [departure.index for departure in both[:2]] == [4, 9]
    # Beyond the limit nothing more is looked for.
    assert departures(target, case, tokens, NEW, limit=found.shortfall / 2) == [found]
    assert departures(target, case, tokens, NEW, limit=None) == [found]


def test_a_token_far_from_a_tie_of_two_others_is_not_explained_by_it():
    target, case = case_and_output()
    third = case.logits[4].topk(3)
    tokens = went_on(target, case, 4, third.indices[2].item())
    found = departures(target, case, tokens, NEW, limit=None)[0]
    assert found.shortfall == pytest.approx(float(third.values[0] - third.values[2]))
    assert found.shortfall > found.gap


def test_an_output_of_another_length_is_never_explained():
    target, case = case_and_output()
    (short,) = departures(target, case, case.tokens[:-2], NEW, limit=100.0)
    assert (short.index, short.shortfall) == (NEW - 2, None)
    (long,) = departures(target, case, [*case.tokens, 1], NEW, limit=100.0)
    assert (long.index, long.gap, long.shortfall) == (NEW, None, None)
    # After an end token that only a near tie has put there, nothing may follow either.
    end = second_best(case, 4)
    ended = Case(0, case.prompt, [end], case.tokens, case.logits, [])
    begun = [*case.tokens[:4], end]
    assert [d.index for d in departures(target, ended, begun, NEW, limit=100.0)] == [4]
    late = departures(target, ended, [*begun, 1], NEW, limit=100.0)
    assert [d.index for d in late] == [4, 5]
    assert late[1].shortfall is None


@pytest.mark.parametrize(
    ("shortfall", "limit", "answer"),
    [
        (0.0, 0.0, True),
        (0.2, 0.2, True),
        (0.21, 0.2, False),
        (0.0, None, False),
        (None, 9.0, False),
    ],
)
def test_what_is_explained(shortfall, limit, answer):
    assert explained(Departure(index=0, gap=0.0, shortfall=shortfall), limit) is answer


# The file.


@pytest.fixture(scope="module")
def certificate():
    return certify(spec("bfloat16"), pair_of("gpt_neox", "bfloat16"))


def test_a_written_certificate_reads_back(certificate, tmp_path):
    write_certificate(tmp_path / "c.json", certificate)
    assert read_certificate(tmp_path / "c.json") == certificate
    with pytest.raises(ResultError, match="missing; run: snakemake"):
        read_certificate(tmp_path / "other.json")


def fails(data):
    output = data["configurations"][1]["greedy"]["outputs"][0]
    output["departures"] = [{"index": 3, "gap": 1.0, "shortfall": 9.0}]


EDITS = {
    "passed": lambda data: data.update(passed=False),
    "a departure": fails,
    "a limit": lambda data: data["configurations"][1]["greedy"].update(limit=1.0),
    "an output left out": lambda data: data["configurations"][1]["greedy"].update(outputs=[]),
    "a control left out": lambda data: data["configurations"][1]["greedy"]["controls"].pop(),
    "no control": lambda data: data["configurations"][1]["greedy"].update(controls=[], limit=None),
    "a configuration left out": lambda data: data["configurations"].pop(),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_an_edited_certificate_is_refused(certificate, edit):
    data = certificate.model_dump(mode="json")
    Certificate.model_validate_json(json.dumps(data))
    edit(data)
    with pytest.raises(ValidationError):
        Certificate.model_validate_json(json.dumps(data))


def test_noise_of_another_position_fails_the_sampling_check(monkeypatch):
    choose = Sampler.choose

    def broken(self, logits, position, depths, origins):
        return choose(self, logits, position, torch.zeros_like(depths), origins)

    monkeypatch.setattr(Sampler, "choose", broken)
    certificate = certify(spec(), pair_of("llama"))
    assert verdicts(certificate) == {"ar": "equal", "tree": "failed"}
    check = check_of(certificate, "tree")
    assert check.greedy.verdict() == "equal"
    assert "sampled with seed 0" in check.reasons[0]


def test_sampling_is_not_compared_in_16_bits():
    certificate = certify(spec("bfloat16"), pair_of("llama", "bfloat16"))
    assert [check.sampled for check in certificate.configurations] == [None, None]
