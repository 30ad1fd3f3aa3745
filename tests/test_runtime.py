"""Runtimes, their shapes, and packed linear layers."""

import contextlib
import copy
import gc
import math
from collections import defaultdict
from functools import partial

import pytest
import torch
from models import STRATEGIES, VOCAB, build, draft_of, expected, oracle, prompt, target_of
from torch import nn

import dynatree
from dynatree.errors import DecodeError
from dynatree.packing import LAYOUTS, MANY, PackedLinear, _fastest, _seconds, packed
from dynatree.runner import ModelRunner
from dynatree.runtime import Runtime

CPU = torch.device("cpu")


@pytest.fixture
def small_weights_too(monkeypatch):
    """Packs all layers, whether they gain or not."""
    monkeypatch.setattr("dynatree.packing.MIN_WEIGHTS", 1)
    first, *_, last = LAYOUTS
    monkeypatch.setattr(
        "dynatree.packing._fastest", lambda linears, compiled: defaultdict(lambda: (first, last))
    )


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
    assert dynatree.Tree(depth=3, branch_factor=9, prune_threshold=0.1).widths == [9, 10, 10]
    assert dynatree.Tree(depth=4, branch_factor=3, prune_threshold=0, node_budget=7).widths == [
        3, 7, 7, 7
    ]  # fmt: skip
    assert dynatree.Linear(num_draft_tokens=4).widths == [1, 1, 1, 1]
    assert dynatree.Autoregressive().widths == []


@pytest.mark.compiler
def test_compiled_on_a_cpu(small_weights_too):
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


def test_packed_layers_share_all_tensors_and_leave_the_model_alone(small_weights_too):
    model = build("gpt_neox", layers=2)
    before = copy.deepcopy(model.state_dict())
    twin = packed(model)
    assert not linears(model, PackedLinear)
    assert len(linears(twin, PackedLinear)) == len(linears(model, nn.Linear)) > 4
    assert not linears(twin, nn.Linear)
    shared = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    assert {tensor.data_ptr() for tensor in twin.parameters()} <= shared
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)


def test_packed_layers_compute_the_same(small_weights_too):
    model = build("llama", layers=2)
    ids = prompt(9)[None]
    with torch.inference_mode():
        reference = model(ids).logits
        torch.testing.assert_close(packed(model)(ids).logits, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt_neox", "llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_packed_models_decode_losslessly(family, strategy, small_weights_too):
    target = build(family, layers=2, seed=3)
    generation = dynatree.generate(
        target, draft_of(family, "noisy"), prompt(11), STRATEGIES[strategy], 24
    )
    assert generation.tokens == oracle(target, prompt(11), 24)


def test_packing_is_done_once_and_again_after_a_change(small_weights_too):
    model = build("llama")
    twin = packed(model)
    assert packed(model) is twin
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[VOCAB - 2] = 1.0
    assert packed(model) is not twin
    ids = prompt(9)[None]
    with torch.inference_mode():
        torch.testing.assert_close(packed(model)(ids).logits, model(ids).logits)


def test_packed_weights_go_with_their_model(small_weights_too):
    model = build("llama")
    handles = [module.handle for module in linears(packed(model), PackedLinear)]
    from dynatree.packing import _BY_HANDLE, _PACKED

    assert all(handle in _BY_HANDLE for handle in handles)
    known = len(_PACKED)
    del model
    gc.collect()
    assert len(_PACKED) == known - 1


def without_time(monkeypatch, seconds):
    """`seconds(layout, shape, rows)` instead of the time that layers of a shape take."""
    timed = []

    def measured(sample, layers, rows):
        shapes = [linear.weight.shape for linear in sample]
        timed.append((len(sample), rows))
        assert {name: len(each) for name, each in layers.items()} == dict.fromkeys(
            LAYOUTS, len(sample)
        )
        return {
            (layout, shape): seconds(layout, tuple(shape), rows)
            for layout in (None, *layers)
            for shape in shapes
        }

    monkeypatch.setattr("dynatree.packing.MIN_WEIGHTS", 1)
    monkeypatch.setattr("dynatree.packing.CALL_SECONDS", {False: 0.0, True: 0.0})
    monkeypatch.setattr("dynatree.packing._seconds", measured)
    return timed


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("gaining", [set(), {(32, 32)}, {(32, 64), (VOCAB, 32)}])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layers_are_packed_where_their_shape_gains(gaining, layout, compiled, monkeypatch):
    def seconds(name, shape, rows):
        return 0.5 if name == layout and shape in gaining else 1.0

    timed = without_time(monkeypatch, seconds)
    model = build("llama", layers=2)
    twin = packed(model, compiled)
    assert timed == [(len(linears(model, nn.Linear)), rows) for rows in (1, 4, 12)]
    expected = [tuple(linear.weight.shape) in gaining for linear in linears(model, nn.Linear)]
    modules = [module for module in twin.modules() if type(module) in (nn.Linear, PackedLinear)]
    assert [type(module) is PackedLinear for module in modules] == expected
    assert {module.layouts for module in linears(twin, PackedLinear)} <= {(layout, layout)}
    assert (twin is model) == (not gaining)
    assert packed(model, compiled) is twin
    assert len(timed) == 3


@pytest.mark.parametrize(
    ("times", "eager", "compiled"),
    [
        ({1: 0.9, 4: 0.9, 12: 0.9}, ("mkl", "mkl"), ("mkl", "mkl")),
        # A loss for one row count is not made up for by gains for others.
        ({1: 1.1, 4: 0.1, 12: 0.1}, (None, "mkl"), (None, None)),
        ({1: 0.9, 4: 0.9, 12: 1.1}, ("mkl", None), (None, None)),
        # Less than a twentieth.
        ({1: 0.96, 4: 0.96, 12: 0.96}, (None, None), (None, None)),
        ({1: 0.99, 4: 0.99, 12: 0.8}, (None, "mkl"), ("mkl", "mkl")),
    ],
)
def test_few_rows_and_many_have_what_is_fastest_for_them(times, eager, compiled, monkeypatch):
    if "mkl" not in LAYOUTS:
        pytest.skip("needs MKL")
    without_time(monkeypatch, lambda name, _, rows: times[rows] if name == "mkl" else 1.0)
    model = build("llama")
    for layouts, twin in ((eager, packed(model)), (compiled, packed(model, True))):
        expected = {(None, None): nn.Linear}.get(layouts, PackedLinear)
        assert type(twin.lm_head) is expected
        assert getattr(twin.lm_head, "layouts", (None, None)) == layouts


def test_a_layer_multiplies_few_rows_and_many_by_their_layouts(monkeypatch):
    first, *_, last = LAYOUTS
    used = []
    for name, pack in LAYOUTS.items():

        def tell(linear, name=name, pack=pack):
            multiply = pack(linear)
            return lambda states: (used.append((name, states.shape[-2])), multiply(states))[1]

        monkeypatch.setitem(LAYOUTS, name, tell)
    for few, many in ((first, last), (last, first), (None, last), (first, None)):
        layer = PackedLinear(nn.Linear(32, 16), few, many)
        used.clear()
        with torch.inference_mode():
            for rows in range(1, 20):
                layer(torch.zeros(1, rows, 32))
        expected = [(few, rows) for rows in range(1, MANY)]
        expected += [(many, rows) for rows in range(MANY, 20)]
        assert used == [(name, rows) for name, rows in expected if name]


def test_the_cost_of_a_call_counts(monkeypatch):
    without_time(monkeypatch, lambda name, shape, rows: 0.5 if name else 1.0)
    monkeypatch.setattr("dynatree.packing.CALL_SECONDS", {False: 0.05, True: 0.05})
    twin = packed(build("llama"))
    assert linears(twin, PackedLinear)
    monkeypatch.setattr("dynatree.packing.CALL_SECONDS", {False: 0.5, True: 0.5})
    model = build("llama")
    assert packed(model) is model


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_packed_layer_serves_any_number_of_rows(layout):
    """Also more and fewer than the layout was made with."""
    for features in ((8, 24), (256, 96), (33, 7)):
        linear = nn.Linear(*features)
        layer = PackedLinear(linear, layout, layout)
        for rows in (*range(1, 40), 64, 255):
            states = torch.randn(1, rows, features[0])
            with torch.inference_mode():
                torch.testing.assert_close(layer(states), linear(states), rtol=1e-5, atol=1e-5)


def test_a_layout_that_computes_something_else_is_not_taken():
    linear = nn.Linear(32, 16)
    layers = {"right": [linear], "wrong": [lambda states: linear(states) + 0.1]}
    seconds = _seconds([linear], layers, 4)
    assert math.isfinite(seconds["right", linear.weight.shape])
    assert math.isinf(seconds["wrong", linear.weight.shape])


def test_layouts_are_really_timed(monkeypatch):
    def slow(linear):
        return lambda states: [linear(states) for _ in range(50)][-1]

    def quick(linear):
        return partial(nn.functional.linear, weight=linear.weight, bias=linear.bias)

    linear = nn.Linear(8, 8)
    monkeypatch.setattr("dynatree.packing.CALL_SECONDS", {False: 0.0, True: 0.0})
    monkeypatch.setattr("dynatree.packing.LAYOUTS", {"slow": slow})
    assert _fastest([linear], False) == {linear.weight.shape: (None, None)}
    monkeypatch.setattr("dynatree.packing._plain", slow)
    monkeypatch.setattr("dynatree.packing.LAYOUTS", {"slow": slow, "quick": quick})
    for compiled in (False, True):
        assert _fastest([linear], compiled) == {linear.weight.shape: ("quick", "quick")}


def test_a_sample_has_every_shape(monkeypatch):
    monkeypatch.setattr("dynatree.packing.SAMPLE_WEIGHTS", 100)
    timed = without_time(monkeypatch, lambda *_: 1.0)
    fastest = _fastest([*(nn.Linear(8, 8) for _ in range(5)), nn.Linear(8, 4)], False)
    assert list(fastest) == [torch.Size((8, 8)), torch.Size((4, 8))]
    assert timed == [(3, 1), (3, 4), (3, 12)]


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
        model.gpt_neox.embed_in.register_forward_hook(look)
        slots = torch.arange(9, 11)
        inputs = prompt(2), slots, slots, torch.arange(64) <= slots[:, None]
        with contextlib.suppress(KeyboardInterrupt):
            runner.forward(*inputs)
    assert seen == [False]
    assert torch.backends.mkldnn.enabled


@pytest.mark.parametrize("change", ["small", "bfloat16"])
def test_nothing_is_packed_where_nothing_is_gained(change, monkeypatch):
    model = build("llama")
    if change == "bfloat16":
        monkeypatch.setattr("dynatree.packing.MIN_WEIGHTS", 1)
        model = model.to(torch.bfloat16)
    assert packed(model) is model
