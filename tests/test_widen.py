"""Widened models: another geometry, the same function, and tests that would notice if not."""

import copy
import json
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from micro_pair import micro, train  # noqa: F401 - micro is a fixture
from models import VOCAB, build, oracle, prompt
from transformers import AutoModelForCausalLM, AutoTokenizer

from dynatree.config import parse_config
from dynatree.embedded.train import _new_model
from dynatree.embedded.widen import widen
from dynatree.errors import ConfigError
from dynatree.pairs import load_models
from dynatree.recipes import Recipe, Transformer
from dynatree.specs import Models

SHIPPED = Path(__file__).parent.parent / "config.yaml"
WIDE = Transformer(layers=5, width=128, heads=8)
WIDE_VOCAB, WIDE_CONTEXT = 57, 256
MICRO = {
    "target": {"layers": 3, "width": 64, "heads": 4},
    "draft": {"layers": 2, "width": 32, "heads": 4},
    "vocab_size": 320,
    "context": 128,
}


@cache
def small(dtype=torch.float64):
    """Two layers and two heads of 16, no weight left at the 0 or 1 that it starts from."""
    model = build("gpt_neox", layers=2, num_attention_heads=2, rotary_pct=0.5, rotary_emb_base=100)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.3 * torch.randn(weight.shape, generator=generator)
    return model.to(dtype)


def widened(model, geometry=WIDE, vocab_size=WIDE_VOCAB, context=WIDE_CONTEXT):
    return widen(model, geometry, vocab_size, context)


@torch.inference_mode()
def logits(model, ids):
    """[T, vocabulary] for the tokens `ids` [T]."""
    return model(ids[None], use_cache=False).logits[0]


def difference(model, wide, ids=None):
    """The largest difference of two models' logits, relative to the largest logit."""
    ids = prompt(50) if ids is None else ids
    ours = logits(model, ids)
    theirs = logits(wide, ids)[:, : model.config.vocab_size]
    return ((ours - theirs).abs().max() / ours.abs().max()).item()


# The same function.


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("times", "layers"), [(2, 2), (4, 5), (8, 3)])
def test_logits_are_those_of_the_small_model(dtype, tolerance, times, layers):
    geometry = Transformer(layers=layers, width=32 * times, heads=2 * times)
    model = small(dtype)
    wide = widened(model, geometry)
    assert wide.dtype == dtype
    assert not wide.training
    assert difference(model, wide) < tolerance


def test_bfloat16_weights_are_repeated_without_rounding():
    rounded = copy.deepcopy(small())
    with torch.no_grad():
        for weight in rounded.parameters():
            weight.copy_(weight.bfloat16())
    wide = widened(copy.deepcopy(rounded).bfloat16())
    assert wide.dtype == torch.bfloat16
    assert wide.gpt_neox.rotary_emb.inv_freq.dtype == torch.float32
    assert difference(rounded, wide.double()) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_greedy_outputs_are_identical(dtype):
    model, wide = small(dtype), widened(small(dtype))
    outputs = set()
    for seed in range(8):
        ids = prompt(3 + seed, seed)
        expected = oracle(model, ids, 40)
        assert oracle(wide, ids, 40) == expected
        outputs.add(tuple(expected))
    assert len(outputs) == 8


def test_decoding_with_a_cache_is_identical():
    model, wide = small(), widened(small())
    ids = prompt(30)
    whole = logits(model, ids)
    cache = None
    rows = []
    with torch.inference_mode():
        for chunk in ids[None].split([9, 1, 1, 5, 14], dim=1):
            step = wide(chunk, past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            rows.append(step.logits[0, :, :VOCAB])
    assert len(cache) == WIDE.layers
    assert (torch.cat(rows) - whole).abs().max() < 1e-12 * whole.abs().max()


def test_the_small_model_is_left_alone():
    model = copy.deepcopy(small())
    widened(model)
    for ours, theirs in zip(model.parameters(), small().parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert model.config.to_dict() == small().config.to_dict()


# The vocabulary.


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_added_rows_are_constant_and_far_below_every_trained_one(scale):
    model = copy.deepcopy(small(torch.float32))
    with torch.no_grad():
        model.lm_head.weight *= scale
    wide = widened(model)
    for seed in range(4):
        values = logits(wide, prompt(100, seed))
        added, trained = values[:, VOCAB:], values[:, :VOCAB]
        assert len(added.unique()) == 1
        assert added.max() <= trained.min() - 128
        assert values.topk(VOCAB, dim=-1).indices.max() < VOCAB
        assert values.softmax(dim=-1)[:, VOCAB:].count_nonzero() == 0
        assert torch.equal(values.softmax(dim=-1)[:, :VOCAB].argmax(-1), trained.argmax(-1))


def test_an_added_id_reads_as_a_trained_one():
    wide = widened(small())
    ids = prompt(10)
    added = ids.clone()
    added[4] = VOCAB + 7
    ids[4] = 7
    assert torch.equal(logits(wide, ids), logits(wide, added))


# Geometry and format.


def shipped():
    return parse_config(yaml.safe_load(SHIPPED.read_text())).pairs["pythia-shaped"]


@pytest.mark.parametrize(
    ("role", "parameters", "shape"),
    [
        ("target", 2_775_208_960, (32, 2560, 32, 10240)),
        ("draft", 70_426_624, (6, 512, 8, 2048)),
    ],
    ids=["Pythia-2.8B", "Pythia-70M"],
)
def test_the_shipped_pair_has_the_geometry_of_pythia(role, parameters, shape):
    recipe = shipped().recipe
    # The meta device computes nothing and checks every shape.
    with torch.device("meta"):
        trained = _new_model(getattr(recipe, role), recipe)
    wide = widen(
        trained, getattr(recipe.widen, role), recipe.widen.vocab_size, recipe.widen.context
    )
    assert wide.num_parameters() == parameters
    layers, width, heads, intermediate = shape
    expected = {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "intermediate_size": intermediate,
        "vocab_size": 50304,
        "max_position_embeddings": 2048,
        "use_parallel_residual": True,
        "tie_word_embeddings": False,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
    }
    assert {name: getattr(wide.config, name) for name in expected} == expected
    assert wide.config.rope_parameters == {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
    }


def test_the_shipped_pair_trains_as_the_embedded_one():
    """But for its geometry, and for the draft, which is larger and learns from more."""
    pairs = parse_config(yaml.safe_load(SHIPPED.read_text())).pairs
    own = {"target", "draft", "rollouts", "draft_steps"}
    ours = pairs["pythia-shaped"].recipe.model_dump(exclude={"widen", *own})
    assert ours == pairs["embedded"].recipe.model_dump(exclude=own)


def test_added_layers_add_nothing_and_are_not_empty():
    wide = widened(small())
    for layer in wide.gpt_neox.layers[2:]:
        for name, weight in layer.named_parameters():
            writes = name.startswith(("attention.dense.", "mlp.dense_4h_to_h."))
            assert (weight.count_nonzero() == 0) == writes


def test_a_widened_model_survives_saving(tmp_path):
    wide = widened(small(torch.float32))
    wide.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(
        tmp_path, use_safetensors=True, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values())
    assert type(loaded) is type(wide)
    for (name, ours), (_, theirs) in zip(
        wide.named_parameters(), loaded.named_parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    assert torch.equal(logits(wide, prompt(50)), logits(loaded, prompt(50)))


# What the comparison must notice: each of these is a mistake that widening could make.


def undivided(wide):
    for layer in wide.gpt_neox.layers:
        layer.attention.query_key_value.weight *= 4


def undivided_output(wide):
    wide.lm_head.weight[:VOCAB] *= 4


def features_apart(wide):
    """Each feature repeated in place, so that a copy of a head is no head."""
    order = torch.arange(3 * 128).view(4, 96).T.flatten()
    for layer in wide.gpt_neox.layers:
        layer.attention.query_key_value.weight.copy_(layer.attention.query_key_value.weight[order])


def query_key_value_apart(wide):
    """All queries, then all keys, then all values, as other architectures order them."""
    order = torch.arange(3 * 128).view(8, 3, 16).transpose(0, 1).flatten()
    for layer in wide.gpt_neox.layers:
        layer.attention.query_key_value.weight.copy_(layer.attention.query_key_value.weight[order])


def added_layer_writes(wide):
    layer = wide.gpt_neox.layers[-1]
    layer.mlp.dense_4h_to_h.weight.copy_(wide.gpt_neox.layers[0].mlp.dense_4h_to_h.weight)


def added_layer_has_a_bias(wide):
    layer = wide.gpt_neox.layers[-1]
    layer.attention.dense.bias.copy_(wide.gpt_neox.layers[0].attention.dense.bias)


def constant_feature_not_made_up_for(wide):
    wide.lm_head.weight[:, -1 - 32] /= 2


def constant_feature_read(wide):
    wide.lm_head.weight[:VOCAB, -1] = wide.lm_head.weight[:VOCAB, -2]


@pytest.mark.parametrize(
    "mistake",
    [
        undivided,
        undivided_output,
        features_apart,
        query_key_value_apart,
        added_layer_writes,
        added_layer_has_a_bias,
        constant_feature_not_made_up_for,
        constant_feature_read,
    ],
)
def test_a_mistake_changes_the_logits(mistake):
    wide = widened(small())
    with torch.no_grad():
        mistake(wide)
    assert difference(small(), wide) > 1e-3


# What cannot be widened.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": {"layers": 1, "width": 64, "heads": 4}}, r"widen\.target: layers 1 must be at"),
        ({"target": {"layers": 2, "width": 80, "heads": 4}}, r"width 80 must be 2, 4, 8 .* 32;"),
        ({"target": {"layers": 2, "width": 96, "heads": 6}}, r"width 96 must be 2, 4, 8"),
        ({"target": {"layers": 2, "width": 32, "heads": 2}}, r"width 32 must be 2, 4, 8"),
        ({"target": {"layers": 2, "width": 16, "heads": 1}}, r"width 16 must be 2, 4, 8"),
        ({"draft": {"layers": 1, "width": 32, "heads": 2}}, r"widen\.draft: heads 2 must be 4, 2"),
        ({"vocab_size": 299}, r"widen\.vocab_size: 299 must be at least the trained 300"),
        ({"context": 63}, r"widen\.context: 63 must be at least the trained 64"),
        ({"depth": 3}, r"widen\.depth: unknown key"),
        (
            {"draft": {"layers": 1, "width": 30, "heads": 4}},
            r"widen\.draft: width 30 must be heads",
        ),
    ],
)
def test_a_wrong_geometry_is_named_with_its_path(changes, message):
    data = yaml.safe_load((Path(__file__).parent / "micro.yaml").read_text())
    data["pairs"]["micro"]["recipe"]["widen"] = MICRO
    parse_config(copy.deepcopy(data))
    data["pairs"]["micro"]["recipe"]["widen"] = MICRO | changes
    with pytest.raises(ConfigError, match=r"pairs\.micro\.recipe.*" + message):
        parse_config(data)


def test_a_recipe_that_does_not_widen_says_nothing_of_it():
    recipe = parse_config(yaml.safe_load(SHIPPED.read_text())).pairs["embedded"].recipe
    assert "widen" not in recipe.model_dump(mode="json")
    assert Recipe.model_validate(recipe.model_dump()) == recipe


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"geometry": Transformer(layers=5, width=96, heads=6)}, "width 96 must be"),
        ({"vocab_size": VOCAB - 1}, f"vocab_size {VOCAB - 1} and .* the model's {VOCAB}"),
        ({"context": 8}, "context 8 must not"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        widened(small(), **arguments)


def test_another_architecture_is_refused():
    with pytest.raises(ValueError, match=r"only a gpt_neox model .* got llama"):
        widened(build("llama"))


def test_tied_embeddings_are_refused():
    with pytest.raises(ValueError, match="got gpt_neox with tie_word_embeddings True"):
        widened(build("gpt_neox", tie_word_embeddings=True))


# From the recipe to a loaded pair.


def test_a_recipe_saves_the_widened_pair_in_bfloat16(micro, tmp_path):  # noqa: F811
    facts = train(tmp_path, widen=MICRO)
    assert set(facts["seconds"]) == {"tokenizer", "target", "rollouts", "draft", "widen"}
    assert json.loads((tmp_path / "training.json").read_text())["recipe"]["widen"] == MICRO
    pair = load_models(
        "wide",
        Models.model_validate(
            {
                "target": {"path": str(tmp_path / "target")},
                "draft": {"path": str(tmp_path / "draft")},
                "device": "cpu",
            }
        ),
    )
    assert pair.draft.config.calibration_temperature == facts["draft_temperature"]
    for role, wide in (("target", pair.target), ("draft", pair.draft)):
        assert json.loads((tmp_path / role / "config.json").read_text())["dtype"] == "bfloat16"
        assert wide.config.vocab_size == 320
        assert wide.config.num_hidden_layers == MICRO[role]["layers"]
        trained = AutoModelForCausalLM.from_pretrained(micro / role, dtype=torch.float32)
        with torch.no_grad():
            for weight in trained.parameters():
                weight.copy_(weight.bfloat16())
        ids = pair.tokenizer("The with statement", return_tensors="pt").input_ids[0]
        assert difference(trained, wide, ids) < 1e-5
        assert oracle(wide, ids, 20) == oracle(trained, ids, 20)


def test_the_tokenizer_of_a_widened_pair(tmp_path):
    train(tmp_path, widen=MICRO)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "target")
    assert len(tokenizer) == 300
    assert tokenizer.model_max_length == MICRO["context"]
    known = tokenizer("The").input_ids
    assert tokenizer.decode([*known, 300, 319]) == "The"
