"""Runtimes, their shapes, and packed linear layers."""

import contextlib
import copy
import gc
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from models import (
    KERNEL_MARKS,
    STRATEGIES,
    build,
    draft_of,
    expected,
    needs_kernel,
    oracle,
    prompt,
    target_of,
)
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import dynatree
from dynatree import attention, gpu, kernel
from dynatree.errors import DecodeError
from dynatree.packing import _PACKED, PackedLinear, packed
from dynatree.rotary import RotaryTable, can_be_tabulated
from dynatree.runner import ModelRunner
from dynatree.runtime import Runtime

CPU = torch.device("cpu")


def test_auto_is_eager_on_a_cpu():
    runtime = Runtime("auto", CPU)
    assert (runtime.mode, runtime.static) == ("eager", False)


def test_cuda_graphs_need_cuda():
    with pytest.raises(DecodeError, match="runtime: 'cudagraph' needs a CUDA device"):
        dynatree.generate(
            target_of("llama"), None, prompt(3), dynatree.Autoregressive(), 3, runtime="cudagraph"
        )


def test_static_shapes_are_buckets():
    runtime = Runtime("eager", CPU, static=True)
    assert [runtime.rows(count) for count in (1, 2, 3, 4, 5, 8, 9, 255, 256)] == [
        1, 2, 4, 4, 8, 8, 16, 256, 256
    ]  # fmt: skip
    assert [runtime.visible(slots) for slots in (1, 256, 257, 512, 513)] == [
        256, 256, 512, 512, 768
    ]  # fmt: skip
    exact = Runtime("eager", CPU)
    assert [exact.rows(count) for count in (1, 3, 255)] == [1, 3, 255]
    assert all(exact.visible(slots) - slots in range(64) for slots in range(1, 300))


@pytest.mark.parametrize("count", [1, 100, 256])
def test_no_forward_sees_as_many_slots_as_there_are(count):
    for runtime in (Runtime("eager", CPU), Runtime("eager", CPU, static=True)):
        assert runtime.capacity(count) > runtime.visible(count) >= count


def test_static_widths_hold_whatever_the_draft_says():
    tree = dynatree.Tree(depth=7, branch_factor=2, prune_threshold=0.05)
    assert tree.widths == [2, 4, 8, 16, 20, 20, 20]
    # All levels but the last one's are small enough: it is not read, so it is not selected from.
    whole = dynatree.Tree(depth=7, branch_factor=2, prune_threshold=0.01, node_budget=254)
    assert whole.widths == [2, 4, 8, 16, 32, 64, 128]
    assert whole.model_copy(update={"node_budget": 253}).widths == [2, 4, 8, 16, 32, 64, 100]
    assert dynatree.Tree(depth=3, branch_factor=9, prune_threshold=0.1).widths == [9, 10, 10]
    assert dynatree.Tree(depth=4, branch_factor=3, prune_threshold=0, node_budget=7).widths == [
        3, 7, 7, 7
    ]  # fmt: skip
    assert dynatree.Linear(num_draft_tokens=4).widths == [1, 1, 1, 1]
    assert dynatree.Autoregressive().widths == []


@pytest.mark.compiler
def test_compiled_on_a_cpu():
    """Once, over what can differ: one token and several, packed layers, both models."""
    target, draft = target_of("gpt_neox"), draft_of("gpt_neox", "noisy")
    compiles = []
    for name in ("ar", "linear", "default"):
        decoder = dynatree.Decoder(target, draft, STRATEGIES[name], 60, runtime="compiled")
        decoder.prepare()
        assert decoder.runtime.preparation.seconds > 0
        for length, new in ((17, 30), (5, 23)):
            assert decoder.decode(prompt(length), new).tokens == expected("gpt_neox", length, new)
        compiles.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    # Shapes are left open: one graph for one token and one for several, for each model.
    assert compiles[-1] - compiles[0] <= 3


@pytest.mark.compiler
def test_a_compiled_forward_takes_any_number_of_tokens():
    """Also where the first number equals another size, of the heads or of the visible slots."""
    model = build("gpt_neox", layers=1, num_attention_heads=2)
    eager, compiled = (
        ModelRunner(model, 200, Runtime(mode, CPU)) for mode in ("eager", "compiled")
    )
    with torch.inference_mode():
        for runner in (eager, compiled):
            runner.prefill(prompt(9))
        for rows, visible in ((2, 64), (4, 64), (64, 128), (3, 128), (1, 64)):
            slots = torch.arange(9, 9 + rows)
            inputs = prompt(rows), slots, slots, torch.arange(visible) <= slots[:, None]
            torch.testing.assert_close(compiled.forward(*inputs), eager.forward(*inputs))


def linears(model, kind):
    return [module for module in model.modules() if type(module) is kind]


def rotaries(model):
    return [module for module in model.modules() if hasattr(module, "rope_type")]


@needs_kernel
def test_packed_layers_share_all_other_tensors_and_leave_the_model_alone():
    model = build("gpt_neox", layers=2)
    before = copy.deepcopy(model.state_dict())
    twin = packed(model)
    assert not linears(model, PackedLinear)
    assert len(linears(twin, PackedLinear)) == len(linears(model, nn.Linear)) > 4
    assert not linears(twin, nn.Linear)
    shared = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    own = {
        tensor.data_ptr() for each in linears(twin, PackedLinear) for tensor in each.parameters()
    }
    assert {tensor.data_ptr() for tensor in twin.parameters()} - own <= shared
    assert not own & shared
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)


@needs_kernel
@pytest.mark.parametrize("family", ["gpt_neox", "llama", "qwen2"])
def test_packed_layers_compute_the_same(family):
    model = build(family, layers=2)
    ids = prompt(9)[None]
    with torch.inference_mode():
        reference = model(ids).logits
        torch.testing.assert_close(packed(model)(ids).logits, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt_neox", "llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kernel_there", [pytest.param(True, marks=KERNEL_MARKS), False])
def test_decoding_is_lossless_with_the_kernel_and_without(
    family, strategy, kernel_there, monkeypatch
):
    if not kernel_there:
        monkeypatch.setattr(kernel, "available", lambda: False)
    target = build(family, layers=2, seed=3)
    generation = dynatree.generate(
        target, draft_of(family, "noisy"), prompt(11), STRATEGIES[strategy], 24
    )
    assert (target in _PACKED) == (kernel_there and bool(linears(target, nn.Linear)))
    assert generation.tokens == oracle(target, prompt(11), 24)


@needs_kernel
@pytest.mark.parametrize("changed", ["lm_head.weight", "model.layers.0.self_attn.q_proj.bias"])
def test_packing_is_done_once_and_again_after_a_change(changed):
    model = build("qwen2", layers=1)
    twin = packed(model)
    assert packed(model) is twin
    with torch.no_grad():
        model.get_parameter(changed).normal_()
    assert packed(model) is not twin
    ids = prompt(9)[None]
    with torch.inference_mode():
        expected = model(ids).logits
        torch.testing.assert_close(packed(model)(ids).logits, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(twin(ids).logits, expected, rtol=1e-2, atol=1e-2)


@needs_kernel
@pytest.mark.parametrize("family", ["gpt_neox", "llama", "qwen2"])
def test_rotary_angles_are_those_of_the_model(family):
    model = build(family, layers=2)
    (table,), (rotary,) = rotaries(packed(model)), rotaries(model)
    assert isinstance(table, RotaryTable)
    assert not isinstance(rotary, RotaryTable)
    # What a model may read of it is there.
    assert isinstance(table, type(rotary))
    assert table.config == rotary.config
    states = torch.zeros(1, 1, 32)
    # Beyond what is tabulated at first, and back.
    for positions in ([0, 1, 2], [7, 5, 5], [511, 512], [3], [4000, 0, 1500]):
        ids = torch.tensor([positions])
        with torch.inference_mode():
            given = table(states, position_ids=ids)
            expected = rotary(states, ids)
        assert len(table._table[0]) % 512 == 0
        assert len(given) == len(expected) == 2
        for one, other in zip(given, expected, strict=True):
            assert (one.shape, one.dtype) == (other.shape, other.dtype)
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    doubled = table(states.double(), torch.tensor([[3]]))[0]
    assert doubled.dtype == torch.float64
    # What inference mode made can be used where gradients are wanted.
    assert not any(each.is_inference() for each in table._table)
    # Positions of a batch are not looked up.
    ids = torch.tensor([[0, 1], [5, 2]])
    torch.testing.assert_close(table(states, ids), rotary(states, ids), rtol=0, atol=0)


@needs_kernel
def test_changed_rotary_frequencies_are_noticed():
    model = build("gpt_neox", layers=1)
    ids = prompt(9)[None]
    twin = packed(model)
    with torch.inference_mode():
        twin(ids)
    model.gpt_neox.rotary_emb.inv_freq.mul_(3.0)
    assert packed(model) is not twin
    with torch.inference_mode():
        expected = model(ids).logits
        torch.testing.assert_close(packed(model)(ids).logits, expected, rtol=1e-4, atol=1e-4)


@needs_kernel
@pytest.mark.parametrize("rope_type", ["dynamic", "linear", "yarn", "llama3"])
def test_angles_that_depend_on_the_length_are_not_tabulated(rope_type):
    parameters = {
        "rope_type": rope_type,
        "rope_theta": 10_000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    model = build("llama", layers=2, rope_parameters=parameters, max_position_embeddings=64)
    (rotary,) = rotaries(packed(model))
    assert isinstance(rotary, RotaryTable) == (rope_type != "dynamic")
    if rope_type != "dynamic":
        tokens = dynatree.generate(model, model, prompt(11), STRATEGIES["default"], 24).tokens
        assert tokens == oracle(model, prompt(11), 24)


def test_other_rotary_embeddings_are_left_alone():
    rotary = build("llama").model.rotary_emb

    class ByLayer(type(rotary)):
        def forward(self, x, position_ids, layer_type):
            raise NotImplementedError

    class Complex(type(rotary)):
        def forward(self, x, position_ids):
            return torch.polar(*super().forward(x, position_ids))

    class OfImages(type(rotary)):
        def forward(self, x, position_ids):
            return super().forward(x, position_ids[:, 0, :, 0])

    config = build("llama").config
    assert can_be_tabulated(rotary)
    for kind in (ByLayer, Complex, OfImages):
        assert not can_be_tabulated(kind(config))
    assert not can_be_tabulated(nn.Linear(2, 2))
    per_layer = type(rotary)(config)
    per_layer.rope_type = {"full_attention": "default"}
    assert not can_be_tabulated(per_layer)


@needs_kernel
def test_weights_that_are_written_through_data_are_noticed():
    """As adapters are merged."""
    model = build("llama", layers=2)
    assert dynatree.generate(model, None, prompt(9), STRATEGIES["ar"], 12).tokens == oracle(
        model, prompt(9), 12
    )
    weight = model.model.layers[0].mlp.down_proj.weight
    version = weight._version
    weight.data += torch.randn_like(weight)
    assert weight._version == version
    assert dynatree.generate(model, None, prompt(9), STRATEGIES["ar"], 12).tokens == oracle(
        model, prompt(9), 12
    )


@needs_kernel
@pytest.mark.parametrize("place", ["mlp.down_proj", "mlp"])
@pytest.mark.parametrize("before", [True, False])
def test_forward_hooks_count(place, before):
    model = build("llama", layers=2)
    plain = oracle(model, prompt(9), 12)
    if not before:
        assert dynatree.generate(model, None, prompt(9), STRATEGIES["ar"], 12).tokens == plain
    layer = model.model.layers[0].get_submodule(place)
    hook = layer.register_forward_hook(lambda module, given, output: output * -3.0)
    hooked = dynatree.generate(model, None, prompt(9), STRATEGIES["ar"], 12).tokens
    assert hooked == oracle(model, prompt(9), 12) != plain
    hook.remove()
    assert dynatree.generate(model, None, prompt(9), STRATEGIES["ar"], 12).tokens == plain


@needs_kernel
def test_a_model_may_be_loaded_in_inference_mode(tmp_path):
    build("llama", layers=2).save_pretrained(tmp_path)
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
        made = build("llama", layers=2)
        for each in (model, made):
            assert any(buffer.is_inference() for buffer in each.buffers())
            tokens = dynatree.generate(each, each, prompt(9), STRATEGIES["default"], 12).tokens
            assert tokens == oracle(each, prompt(9), 12)


@needs_kernel
def test_a_model_may_read_its_rotary_embedding():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    try:
        config = AutoConfig.for_model(
            "granite_swa", vocab_size=40, num_key_value_heads=2, num_hidden_layers=1,
            layer_types=["full_attention"], bos_token_id=None, eos_token_id=None,
            pad_token_id=None, **sizes,
        )  # fmt: skip
    except ValueError:
        pytest.skip("this Transformers has no such model")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    assert isinstance(rotaries(packed(model))[0], RotaryTable)
    tokens = dynatree.generate(model, model, prompt(9), STRATEGIES["default"], 9).tokens
    assert tokens == oracle(model, prompt(9), 9)


@needs_kernel
def test_a_float32_layer_in_a_model_of_16_bits():
    model = build("llama", layers=2).to(torch.bfloat16)
    # As Transformers keeps the gates of a mixture.
    model.lm_head = Float32Head(model.lm_head)
    assert packed(model) is not model
    tokens = dynatree.generate(model, model, prompt(9), STRATEGIES["ar"], 9).tokens
    assert tokens == oracle(model, prompt(9), 9)


class Float32Head(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.head = head.float()

    def forward(self, states):
        return self.head(states.float()).to(states.dtype)


@pytest.mark.parametrize("kernel_there", [pytest.param(True, marks=KERNEL_MARKS), False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_does_not_matter(dtype, kernel_there, monkeypatch):
    if not kernel_there:
        monkeypatch.setattr(kernel, "available", lambda: False)
    target, draft = target_of("llama"), draft_of("llama", "noisy")
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        for name in ("default", "history", "ngram"):
            tokens = dynatree.generate(target, draft, prompt(11), STRATEGIES[name], 20).tokens
            assert tokens == expected("llama", 11, 24)[:20]
    finally:
        torch.set_default_dtype(default)


@needs_kernel
def test_threads_leave_onednn_as_it_was():
    models = [build("gpt_neox", layers=2, seed=seed) for seed in range(3)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(len(models)) as pool:
            tokens = pool.map(
                lambda model: [
                    dynatree.generate(model, None, prompt(9), STRATEGIES["ar"], 20).tokens
                    for _ in range(5)
                ],
                models,
            )
            given = list(tokens)
    finally:
        sys.setswitchinterval(interval)
    assert torch.backends.mkldnn.enabled
    assert given == [[oracle(model, prompt(9), 20)] * 5 for model in models]


@needs_kernel
@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_left_out_where_it_does_nothing(training):
    model = build("gpt_neox", layers=1).train(training)
    assert len(linears(model, nn.Dropout)) > 0
    assert (len(linears(packed(model), nn.Dropout)) > 0) == training


@needs_kernel
@pytest.mark.parametrize("family", ["gpt_neox", "llama", "gpt2", "qwen2"])
def test_attention_is_ours_where_it_was_sdpa(family):
    model, plain = build(family, layers=2), build(family, layers=2, attention="eager")
    assert packed(model).config._attn_implementation == attention.NAME
    assert packed(plain).config._attn_implementation == "eager"
    assert model.config._attn_implementation == "sdpa"
    ids, mask = prompt(6)[None], torch.ones(6, 6, dtype=torch.bool).tril()
    # Siblings.
    mask[4, 3] = mask[5, 3] = False
    with torch.inference_mode():
        expected, given = (
            each(ids, attention_mask=mask[None, None]).logits for each in (model, packed(model))
        )
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-4)


@needs_kernel
def test_attention_of_a_model_that_does_not_exchange_it_stays(monkeypatch):
    model = build("gpt_neox")
    monkeypatch.setattr(type(model), "_supports_attention_backend", False)
    assert packed(model).config._attn_implementation == "sdpa"


@needs_kernel
@pytest.mark.parametrize(
    "case", ["bool", "no mask", "numbers", "dropout", "position_bias", "softcap"]
)
def test_attention_that_ours_does_not_do_is_left_to_sdpa(case, monkeypatch):
    query, key, value = torch.randn(3, 1, 2, 4, 8)
    mask = None if case == "no mask" else torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    if case == "numbers":
        mask = torch.where(mask, 0.0, -1e9)
    options = {
        "dropout": {"dropout": 1.0},
        "softcap": {"softcap": 30.0},
        "position_bias": {"position_bias": torch.full((1, 2, 4, 4), 2.0).tril()},
    }.get(case, {})
    module = build("gpt_neox").gpt_neox.layers[0].attention
    calls = []
    monkeypatch.setattr(kernel, "attend", lambda *given: calls.append(given))
    if case == "softcap":
        with pytest.raises(ValueError, match="softcap"):
            attention.attend(module, query, key, value, mask, **options)
    else:
        output, _ = attention.attend(module, query, key, value, mask, **options)
        assert (output is None) == (case == "bool")
        assert case != "dropout" or not output.any()
    assert len(calls) == (case == "bool")


@needs_kernel
def test_packed_weights_go_with_their_model():
    model = build("llama")
    twin = weakref.ref(packed(model))
    assert twin() is not None
    del model
    gc.collect()
    assert twin() is None


@needs_kernel
def test_nothing_is_packed_where_memory_is_short(monkeypatch):
    model = build("llama")
    free = sum(each.weight.nbytes for each in linears(model, nn.Linear)) - 1
    monkeypatch.setattr(
        "psutil.virtual_memory", lambda: SimpleNamespace(available=free, total=2**34)
    )
    with pytest.warns(kernel.KernelWarning, match="no memory for rearranged weights of Llama"):
        assert packed(model) is model
    monkeypatch.setattr(
        "psutil.virtual_memory", lambda: SimpleNamespace(available=free + 1, total=2**34)
    )
    assert packed(model) is not model


def test_nothing_is_packed_where_nothing_is_gained():
    model = build("llama").to(torch.bfloat16)
    assert packed(model) is model
    no_linear_layers = build("gpt2")
    no_linear_layers.set_submodule("lm_head", nn.Identity())
    assert packed(no_linear_layers) is no_linear_layers


@pytest.mark.parametrize("outcome", ["returns", "raises"])
def test_onednn_is_as_it_was_after_an_eager_forward(outcome):
    model = build("gpt_neox", layers=1)
    seen = []

    def look(*_):
        seen.append(torch.backends.mkldnn.enabled)
        if outcome == "raises":
            raise KeyboardInterrupt

    runner = ModelRunner(model, 64, Runtime("eager", CPU))
    with torch.inference_mode():
        runner.prefill(prompt(9))
        runner._model.gpt_neox.embed_in.register_forward_hook(look)
        slots = torch.arange(9, 11)
        inputs = prompt(2), slots, slots, torch.arange(64) <= slots[:, None]
        with contextlib.suppress(KeyboardInterrupt):
            runner.forward(*inputs)
    assert seen == [False]
    assert torch.backends.mkldnn.enabled


def test_a_missing_triton_is_said_and_decoding_goes_on(monkeypatch):
    monkeypatch.setattr(gpu, "capability", lambda device: (9, 0))
    monkeypatch.setitem(sys.modules, "dynatree.cuda_kernels", None)
    monkeypatch.delattr(dynatree, "cuda_kernels", raising=False)
    with pytest.warns(kernel.KernelWarning, match="GPU kernels could not be imported"):
        assert gpu.kernels.__wrapped__(torch.device("cuda", 0)) is None
