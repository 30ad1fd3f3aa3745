"""The embedded pair: its corpus, its training, its hub format."""

import json
from pathlib import Path

import pytest
import torch
from micro_pair import micro, train  # noqa: F401 - micro is a fixture
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from dynatree.embedded.corpus import corpus_digest, python_docs
from dynatree.embedded.muon import Muon, orthogonalised
from dynatree.embedded.train import calibrate
from dynatree.errors import PairError


def files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file() and path.name != "training.json"
    }


def test_corpus_has_the_length_asked_for_and_a_digest():
    documents = python_docs(5000)
    assert sum(map(len, documents)) == 5000
    assert corpus_digest(documents) == corpus_digest(python_docs(5000))
    assert corpus_digest(documents) != corpus_digest(python_docs(5001))


def test_a_corpus_longer_than_python_ships_is_refused():
    with pytest.raises(PairError, match=r"corpus_characters: 1000000000 asked for"):
        python_docs(10**9)


def test_training_is_deterministic_for_a_seed(micro, tmp_path):  # noqa: F811
    train(tmp_path / "same")
    train(tmp_path / "other", seed=1)
    assert files(tmp_path / "same") == files(micro)
    assert files(tmp_path / "other") != files(micro)


def test_hub_format_with_safetensors_only(micro):  # noqa: F811
    for role in ("target", "draft"):
        names = {path.name for path in (micro / role).iterdir()}
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
        assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]


def test_training_record(micro):  # noqa: F811
    facts = json.loads((micro / "training.json").read_text())
    assert facts["corpus"]["digest"] == corpus_digest(python_docs(4000))
    assert 0 <= facts["agreement"]["top1"] <= facts["agreement"]["top2"] <= 1
    assert 0.25 <= facts["draft_temperature"] <= 4
    configuration = json.loads((micro / "draft/config.json").read_text())
    assert configuration["calibration_temperature"] == facts["draft_temperature"]
    assert facts["recipe"]["seed"] == 0
    assert set(facts["seconds"]) == {"tokenizer", "target", "rollouts", "draft"}


def test_training_lowers_the_loss(micro, tmp_path):  # noqa: F811
    trained = json.loads((micro / "training.json").read_text())
    barely = train(tmp_path, target_steps=1, draft_steps=1)
    assert trained["target_loss"] < barely["target_loss"]


@pytest.mark.parametrize(("doubt", "found"), [(0.5, 0.5), (1.0, 1.0), (3.0, 3.0), (100.0, 4.0)])
def test_calibration_finds_the_temperature_that_probabilities_were_spoilt_with(doubt, found):
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    draft = GPTNeoXForCausalLM(config).eval()
    sequences = torch.randint(20, (40, 100))
    with torch.no_grad():
        draft.get_output_embeddings().weight.mul_(60)
        # The target chooses as often as the draft's own probabilities say: they are right.
        before = draft(sequences).logits
        chosen = torch.distributions.Categorical(logits=before).sample()
        draft.get_output_embeddings().weight.mul_(doubt)
    temperature = calibrate(draft, sequences, torch.nn.functional.one_hot(chosen, 20).float())
    assert temperature == pytest.approx(found, rel=0.1)
    assert draft.config.calibration_temperature == temperature
    with torch.no_grad():
        after = draft(sequences).logits
    torch.testing.assert_close(after, before * doubt / temperature, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", [(24, 96), (96, 24), (32, 32)])
def test_muon_steps_are_orthogonal_and_in_float32(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    update = orthogonalised(matrix)
    assert update.dtype == torch.float32
    low, high = torch.linalg.svdvals(update).aminmax()
    assert low > 0.5
    assert high < 1.3
    weight = torch.nn.Parameter(torch.zeros(shape))
    weight.grad = matrix.clone()
    Muon([weight], lr=0.1, weight_decay=0.0).step()
    # The first step's momentum has the gradient's own direction.
    expected = -0.1 * max(1.0, shape[0] / shape[1]) ** 0.5 * update
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-3, atol=1e-3)
