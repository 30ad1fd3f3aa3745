"""Loading pairs: hub format on disk, and a clear error for everything that can be wrong."""

import json
import shutil

import pytest
import torch
from micro_pair import micro, train  # noqa: F401 - micro is a fixture

from dynatree.errors import PairError
from dynatree.pairs import load_models, resolve_device
from dynatree.specs import Models


def models(folder, **changes):
    return Models.model_validate(
        {
            "target": {"path": str(folder / "target")},
            "draft": {"path": str(folder / "draft")},
            "device": "cpu",
            **changes,
        }
    )


@pytest.fixture
def copied(micro, tmp_path):  # noqa: F811
    shutil.copytree(micro, tmp_path / "pair")
    return tmp_path / "pair"


def test_a_local_pair_loads_in_eval_mode(micro):  # noqa: F811
    pair = load_models("local", models(micro))
    assert not pair.target.training
    assert not pair.draft.training
    assert pair.tokenizer("text").input_ids
    assert pair.facts["target"]["parameters"] > pair.facts["draft"]["parameters"]


def test_dtype_is_applied(micro):  # noqa: F811
    pair = load_models("local", models(micro, dtype="bfloat16"))
    assert pair.target.dtype == pair.draft.dtype == torch.bfloat16


def test_the_digest_follows_the_weights(micro, copied):  # noqa: F811
    assert load_models("a", models(copied)).digest == load_models("b", models(micro)).digest
    train(copied, seed=3)
    assert load_models("a", models(copied)).digest != load_models("b", models(micro)).digest


def test_missing_directory(tmp_path):
    with pytest.raises(PairError, match=r"pairs\.p\.target\.path: no directory '.*nowhere/target'"):
        load_models("p", models(tmp_path / "nowhere"))


def test_directory_without_weights(copied):
    (copied / "draft" / "model.safetensors").unlink()
    with pytest.raises(PairError, match=r"pairs\.p\.draft: .*cannot be loaded: .*model\.saf"):
        load_models("p", models(copied))


def test_pickled_weights_are_never_read(copied):
    weights = copied / "draft" / "model.safetensors"
    torch.save({}, copied / "draft" / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(PairError, match=r"pairs\.p\.draft"):
        load_models("p", models(copied))


def test_truncated_weights(copied):
    weights = copied / "target" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(PairError, match=r"pairs\.p\.target: .*(damaged|cannot be loaded)"):
        load_models("p", models(copied))


def test_code_in_a_repository_is_never_run(copied):
    config = copied / "target" / "config.json"
    data = json.loads(config.read_text())
    data["auto_map"] = {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}
    data["model_type"] = "evil"
    config.write_text(json.dumps(data))
    (copied / "target" / "evil.py").write_text("raise SystemExit('code was run')")
    with pytest.raises(PairError, match=r"pairs\.p\.target"):
        load_models("p", models(copied))


def test_unreachable_hub(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    spec = Models.model_validate(
        {"target": {"hub": "dynatree-test/none"}, "draft": {"hub": "dynatree-test/none"}}
    )
    with pytest.raises(PairError, match=r"pairs\.p\.target: 'dynatree-test/none' cannot be loaded"):
        load_models("p", spec)


def test_vocabularies_of_different_size(micro, tmp_path):  # noqa: F811
    train(tmp_path / "other", vocab_size=310)
    mixed = models(micro, draft={"path": str(tmp_path / "other" / "draft")})
    with pytest.raises(PairError, match=r"vocabulary has 300 entries, the draft's 310"):
        load_models("p", mixed)


def test_tokenizers_that_differ(copied):
    path = copied / "draft" / "tokenizer.json"
    data = json.loads(path.read_text())
    vocabulary = data["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(data))
    with pytest.raises(PairError, match=r"tokenizers differ, for instance at 'a'"):
        load_models("p", models(copied))


def test_an_untrained_recipe_names_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from micro_pair import RECIPE

    with pytest.raises(PairError, match=r"run: snakemake results/pairs/p/training\.json"):
        load_models("p", Models.model_validate({"recipe": RECIPE}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_asked_for_and_absent():
    assert resolve_device("auto") == torch.device("cpu")
    with pytest.raises(PairError, match="'cuda:1' asked for"):
        resolve_device("cuda:1")
