"""The static-shape round on CUDA through graphs and, so that every test runs, on a CPU without.

A graph replays what was recorded of a phase: its kernels, on the same tensors, with every Python
number as it was then. The kind `replayed` does that on a CPU, operation by operation, so what the
host decides wrongly, or what a phase leaves in no tensor of its own, is wrong there too.
"""

import copy
import gc
import math
import weakref
from contextlib import contextmanager
from functools import cache, partial

import pytest
import torch
from models import CONTEXT, FAMILIES, STRATEGIES, build, draft_of, oracle, prompt, target_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dynatree
from dynatree.cache import SlotCache
from dynatree.controller import CostModel
from dynatree.drafting import Drafter
from dynatree.errors import DecodeError
from dynatree.measure import _record
from dynatree.report import Report
from dynatree.runtime import SLOT_BUCKETS, Runtime, forward
from dynatree.tree import DraftTree, Rows

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
BUCKET = SLOT_BUCKETS[True]
LONG = 4 * BUCKET

REPLAYED, CUDAGRAPH, EAGER, COMPILED = (
    pytest.param(kind, marks=[] if kind == "replayed" else pytest.mark.gpu)
    for kind in ("replayed", "cudagraph", "eager", "compiled")
)
GRAPHS = (REPLAYED, CUDAGRAPH)
ALL = (REPLAYED, CUDAGRAPH, EAGER, COMPILED)


class Recording(TorchDispatchMode):
    """Operations as a CUDA graph holds them: new values flow only through recorded tensors."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        # What is kept here keeps its id, too.
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self):
        made = {}

        def current(value):
            if isinstance(value, torch.Tensor):
                return made.get(id(value), value)
            if isinstance(value, list | tuple):
                return [current(item) for item in value]
            return value

        for func, args, kwargs, result in self.calls:
            output = func(*map(current, args), **{key: current(kwargs[key]) for key in kwargs})
            for old, new in zip(_listed(result), _listed(output), strict=True):
                made[id(old)] = new


def _listed(result):
    return result if isinstance(result, list | tuple) else [result]


class Replayed(Runtime):
    """The runtime `cudagraph` where there is no CUDA: all of it but the graphs themselves."""

    def __init__(self, device=CPU, record=Recording):
        super().__init__("eager", device, static=True)
        self.mode = "cudagraph"
        self.record = record

    def callable(self, model):
        # Compiled forwards have tests of their own.
        return partial(forward, model)

    def _capture(self, phase, reset):
        with self.record() as recording:
            phase()
        return recording


@pytest.fixture(autouse=True)
def _as_on_cuda(monkeypatch):
    """Models are not packed there, and nothing that they hold grows."""
    monkeypatch.setattr("dynatree.runner.packed", lambda model: model)


class OnDeviceOnly(TorchDispatchMode):
    """Fails where an operation mixes devices, or takes its operand from Python's numbers."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        # CUDA takes a number where a kernel can have it as an argument.
        away = [tensor for tensor in tensors if tensor.device.type != "meta" and tensor.ndim > 0]
        if away or func is torch.ops.aten.lift_fresh.default:
            raise RuntimeError(f"{func} takes a tensor of the host")
        return func(*args, **(kwargs or {}))


def device_of(kind):
    return CPU if kind == "replayed" else CUDA


def runtime_of(kind):
    return Replayed() if kind == "replayed" else Runtime(kind, CUDA)


@cache
def models_of(device, family, draft="noisy", context=CONTEXT):
    """Target and draft on `device`; a longer context needs rotary positions, which hold no weights.

    Kept for the session, so that each is compiled once.
    """
    models = []
    for model in (target_of(family), draft_of(family, draft)):
        model = copy.deepcopy(model).to(device)
        if context > CONTEXT:
            assert model.config.max_position_embeddings == CONTEXT
            model.config.max_position_embeddings = context
        models.append(model)
    return models


@cache
def expected(device, family, length, new, seed=0, context=CONTEXT):
    """What `generate` makes of `prompt(length, seed)` on the same device; a tuple: it is shared."""
    target, _ = models_of(device, family, "noisy", context)
    return tuple(oracle(target, prompt(length, seed).to(device), new))


def decoder_of(kind, models, strategy, max_length, runtime=None):
    """A prepared decoder that fails where it runs what was not captured, if it captures."""
    decoder = dynatree.Decoder(*models, strategy, max_length, runtime or runtime_of(kind))
    decoder.prepare()
    runtime = decoder.runtime
    if runtime.mode == "cudagraph":
        run = runtime.run

        def only_replay(key, phase):
            assert key in runtime._graphs, f"{key} is not among {list(runtime._graphs)}"
            run(key, phase)

        runtime.run = only_replay
    return decoder


def _cases():
    """Kind, family, strategy and draft: all of them on CUDA, and on a CPU some of each."""
    for family in FAMILIES:
        for strategy in STRATEGIES:
            yield "cudagraph", family, strategy, "noisy"
            if family == "gpt_neox" or strategy == "default":
                for kind in ("replayed", "eager", "compiled"):
                    yield kind, family, strategy, "noisy"
        for kind in ("replayed", "cudagraph"):
            yield kind, family, "linear", "equal"
            yield kind, family, "default", "equal"


def test_a_runtime_is_of_one_decoder():
    target, draft = models_of(CPU, "gpt_neox")
    runtime = Replayed()
    first = dynatree.Decoder(target, draft, STRATEGIES["default"], 60, runtime)
    first.prepare()
    with pytest.raises(DecodeError, match="the graphs of another decoder; make a Runtime"):
        dynatree.Decoder(target, draft, STRATEGIES["default"], 60, runtime).prepare()
    assert first.decode(prompt(11), 20).tokens == oracle(target, prompt(11), 20)


@pytest.mark.parametrize(
    ("kind", "family", "strategy", "draft"),
    [
        pytest.param(*case, marks=[] if case[0] == "replayed" else pytest.mark.gpu)
        for case in _cases()
    ],
)
def test_every_family_and_strategy(kind, family, strategy, draft):
    """Prompts up to the full context, every number of new tokens at the end, EOS at every place."""
    device, new = device_of(kind), 14
    models = models_of(device, family, draft)
    decoder = decoder_of(kind, models, STRATEGIES[strategy], CONTEXT + 1)
    for length in (1, 2, 17, CONTEXT + 1 - new):
        output = decoder.decode(prompt(length), new).tokens
        assert output == list(expected(device, family, length, new))
    full = list(expected(device, family, 17, new))
    for count in (1, 2, 3):
        assert decoder.decode(prompt(17), count).tokens == full[:count]
    for eos in (full[0], full[3], full[new - 1]):
        output = decoder.decode(prompt(17), new, eos).tokens
        assert output == full[: full.index(eos) + 1]


@pytest.mark.parametrize("kind", GRAPHS)
def test_eager_attention(kind):
    """The implementation that adds its mask to the scores."""
    target = build("gpt_neox", layers=2, seed=5, attention="eager").to(device_of(kind))
    draft = models_of(device_of(kind), "gpt_neox")[1]
    decoder = decoder_of(kind, (target, draft), STRATEGIES["default"], CONTEXT + 1)
    ids = prompt(17).to(target.device)
    assert decoder.decode(ids, 30).tokens == oracle(target, ids, 30)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 9, 16, 17])
@pytest.mark.parametrize("kind", GRAPHS)
def test_node_counts_at_the_edges_of_buckets(kind, rows):
    """Chains, stars and selections, each of which verifies exactly `rows` nodes, the root too."""
    device, nodes = device_of(kind), rows - 1
    models = models_of(device, "gpt_neox")
    strategies = [dynatree.Autoregressive()]
    if nodes > 0:
        strategies = [
            dynatree.Linear(num_draft_tokens=nodes),
            dynatree.Tree(depth=1, branch_factor=nodes, prune_threshold=0.0, node_budget=nodes),
            dynatree.Tree(depth=4, branch_factor=4, prune_threshold=0.0, node_budget=nodes),
        ]
    for strategy in strategies:
        decoder = decoder_of(kind, models, strategy, CONTEXT)
        generation = decoder.decode(prompt(17), 14)
        assert generation.tokens == list(expected(device, "gpt_neox", 17, 14))
        assert {entry.nodes for entry in generation.stats.rounds} == {nodes}


@pytest.mark.parametrize("strategy", ["ar", "linear", "default", "small_budget"])
@pytest.mark.parametrize("kind", GRAPHS)
def test_lengths_at_the_edges_of_kv_buckets(kind, strategy):
    """Sequences that begin and end around every edge, with room behind them and without."""
    device, new = device_of(kind), 8
    models = models_of(device, "gpt_neox", "noisy", LONG)
    strategy = STRATEGIES[strategy]
    roomy = decoder_of(kind, models, strategy, 2 * BUCKET + 32)
    for edge in (BUCKET, 2 * BUCKET):
        for length in (edge - 12, edge - 9, edge - 8, edge - 7, edge - 2, edge - 1, edge, edge + 1):
            output = roomy.decode(prompt(length), new).tokens
            assert output == list(expected(device, "gpt_neox", length, new, context=LONG))
    for length in (BUCKET - 9, BUCKET - 8, BUCKET - 7):
        tight = decoder_of(kind, models, strategy, length + new)
        output = tight.decode(prompt(length), new).tokens
        assert output == list(expected(device, "gpt_neox", length, new, context=LONG))


@pytest.mark.parametrize("strategy", ["ar", "default"])
@pytest.mark.parametrize("kind", ALL)
def test_growth_across_kv_buckets_and_a_shorter_sequence_after(kind, strategy, monkeypatch):
    device, length, new = device_of(kind), BUCKET - 16, BUCKET + 40
    models = models_of(device, "gpt_neox", "noisy", LONG)
    decoder = decoder_of(kind, models, STRATEGIES[strategy], length + new)
    keys = []
    run = decoder.runtime.run
    monkeypatch.setattr(
        decoder.runtime, "run", lambda key, phase: keys.append(key) or run(key, phase)
    )
    output = decoder.decode(prompt(length), new).tokens
    assert output == list(expected(device, "gpt_neox", length, new, context=LONG))
    seen = {key[-1] for key in keys if key[0] == "verify"}
    assert seen == {BUCKET, 2 * BUCKET, 3 * BUCKET}
    # The slots behind it still hold what the long sequence left there.
    output = decoder.decode(prompt(5), 20).tokens
    assert output == list(expected(device, "gpt_neox", 5, 20, context=LONG))


@pytest.mark.parametrize("kind", ALL)
def test_two_pairs_in_one_process(kind):
    """Streams of two pairs, and of one pair twice, take turns round by round."""
    device, new = device_of(kind), 40
    streams = []
    for family, strategy, seed in (
        ("gpt_neox", "default", 0),
        ("llama", "default", 1),
        ("gpt_neox", "linear", 2),
        ("llama", "ar", 3),
    ):
        decoder = decoder_of(kind, models_of(device, family), STRATEGIES[strategy], CONTEXT)
        stream = decoder.stream(prompt(17, seed), new)
        streams.append((stream, [], list(expected(device, family, 17, new, seed))))
    going = True
    while going:
        chunks = [next(stream, []) for stream, _, _ in streams]
        for (_, output, _), chunk in zip(streams, chunks, strict=True):
            output += chunk
        going = any(chunks)
    for _, output, wanted in streams:
        assert output == wanted


def _allocated(device):
    """Bytes in use and bytes held, without the workspaces that libraries keep for a stream."""
    gc.collect()
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    # Graphs that are alive may use these, and none is.
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)


@pytest.mark.parametrize("kind", ALL)
def test_memory_is_returned(kind):
    device = device_of(kind)
    models = models_of(device, "gpt_neox")

    def use():
        before = _allocated(device)
        decoder = decoder_of(kind, models, STRATEGIES["default"], CONTEXT)
        decoder.decode(prompt(17), 20)
        caches = (decoder._target.cache, decoder._drafter.runner.cache)
        if device.type == "cuda":
            held = sum(item.storage.nbytes for item in caches)
            assert torch.cuda.memory_allocated(device) >= before[0] + held
        return [weakref.ref(item) for item in (decoder, decoder.runtime, *caches)]

    # The first one compiles, and what that leaves behind belongs to the models.
    use()
    start = _allocated(device)
    alive = use()
    assert _allocated(device) == start
    assert [item() for item in alive] == [None] * len(alive)


@contextmanager
def reads_counted(device, monkeypatch):
    """Fails where the host reads the device outside of `Report.read`; yields one entry per read."""
    reads = []
    read = Report.read
    host = {name: getattr(torch.Tensor, name) for name in ("tolist", "numpy", "item", "__bool__")}

    def forbid(on):
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error" if on else "default")
            return
        for name, allowed in host.items():
            monkeypatch.setattr(torch.Tensor, name, _refuse if on else allowed)

    def counted(self):
        forbid(False)
        reads.append(self)
        result = read(self)
        forbid(True)
        return result

    monkeypatch.setattr(Report, "read", counted)
    forbid(True)
    try:
        yield reads
    finally:
        forbid(False)


def _refuse(tensor, *args):
    raise AssertionError("the host reads a tensor that is not the report")


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", ALL)
def test_the_host_reads_once_per_round(kind, strategy, monkeypatch):
    device = device_of(kind)
    decoder = decoder_of(kind, models_of(device, "gpt_neox"), STRATEGIES[strategy], CONTEXT)
    stats = dynatree.Stats()
    stream = decoder.stream(prompt(17), 40, stats=stats)
    output = next(stream)
    with reads_counted(device, monkeypatch) as reads:
        for chunk in stream:
            output += chunk
    assert output == list(expected(device, "gpt_neox", 17, 40))
    # The first tree has a read of its own: it is not grown behind a verification.
    assert len(stats.rounds) <= len(reads) <= len(stats.rounds) + 1


@pytest.mark.parametrize("kind", GRAPHS)
def test_without_a_draft_the_next_round_begins_before_the_last_is_read(kind, monkeypatch):
    """The device never waits for the host, and no round is begun that cannot be needed."""
    device = device_of(kind)
    decoder = decoder_of(kind, models_of(device, "gpt_neox"), STRATEGIES["ar"], CONTEXT)
    events = []
    run, read = decoder.runtime.run, Report.read
    monkeypatch.setattr(
        decoder.runtime, "run", lambda key, phase: events.append(key[0]) or run(key, phase)
    )
    monkeypatch.setattr(Report, "read", lambda self: events.append("read") or read(self))
    full = list(expected(device, "gpt_neox", 17, 4))
    generation = decoder.decode(prompt(17), 4)
    assert generation.tokens == full
    round_ = ["verify", "commit"]
    assert events == ["read", *round_, *round_, "read", *round_, "read", "read"]
    # What was begun when the end was found is forgotten.
    assert decoder.decode(prompt(17), 4, full[1]).tokens == full[: 1 + full.index(full[1])]
    assert decoder.decode(prompt(17), 4).tokens == full


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", GRAPHS)
def test_the_device_is_at_work_while_the_consumer_has_the_tokens(kind, strategy, monkeypatch):
    """Of each round but the last, the next one is begun before its tokens are yielded."""
    device = device_of(kind)
    decoder = decoder_of(kind, models_of(device, "gpt_neox"), STRATEGIES[strategy], CONTEXT)
    decoder.prepare()
    begun = 0
    run = decoder.runtime.run

    def counted(key, phase):
        nonlocal begun
        begun += key[0] == "verify"
        run(key, phase)

    monkeypatch.setattr(decoder.runtime, "run", counted)
    stats = dynatree.Stats()
    chunks = []
    for chunk in decoder.stream(prompt(17), 30, stats=stats):
        chunks.append(chunk)
        assert len(stats.rounds) == len(chunks) - 1
        # The prefill's token is yielded at once: it is what the user waits for.
        if chunks[1:] and sum(map(len, chunks)) < 30:
            assert begun > len(stats.rounds)
        else:
            assert begun == len(stats.rounds)
    assert len(chunks) > 2
    assert sum(chunks, []) == list(expected(device, "gpt_neox", 17, 30))  # noqa: RUF017


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", GRAPHS)
def test_a_generation_that_met_its_end_makes_a_valid_record(kind, strategy):
    """What was begun in advance belongs to no round, and is not in the record."""
    device = device_of(kind)
    decoder = decoder_of(kind, models_of(device, "gpt_neox"), STRATEGIES[strategy], CONTEXT)
    full = list(expected(device, "gpt_neox", 17, 40))
    for eos in {full[0], full[1], full[20], full[-1]}:
        generation = decoder.decode(prompt(17), 40, eos)
        assert generation.tokens == full[: 1 + full.index(eos)]
        record = _record(0, 0, "strategy", ("strategy", "autoregressive"), generation, seconds=1.0)
        assert record.tokens == 1 + sum(committed for _, committed in record.spans)


@pytest.mark.parametrize("draft", ["equal", "noisy"])
@pytest.mark.parametrize(
    "strategy", [dynatree.Linear(num_draft_tokens=8), dynatree.Tree(depth=7, branch_factor=2)]
)
def test_what_cannot_be_committed_is_no_offer(strategy, draft):
    """With static shapes the last trees are too deep; acceptance is that of exact shapes."""
    models = models_of(CPU, "gpt_neox", draft)
    decoders = [
        dynatree.Decoder(*models, strategy, CONTEXT + 1, Runtime("eager", CPU, static=static))
        for static in (False, True)
    ]
    for new in range(1, 30):
        exact, static = (decoder.decode(prompt(17), new).stats.rounds for decoder in decoders)
        offers = [[(entry.depth, entry.accepted) for entry in found] for found in (exact, static)]
        assert offers[0] == offers[1]


@pytest.mark.parametrize(("before", "after"), [(100, 400), (400, 100)])
@pytest.mark.parametrize("mode", ["compiled", "cudagraph"])
def test_only_graphs_hold_the_bytes_of_graphs(mode, before, after, monkeypatch):
    """Whatever else the allocator gained or gave back meanwhile."""
    runtime = Replayed() if mode == "cudagraph" else Runtime("compiled", CPU)
    monkeypatch.setattr(runtime, "_reserved", iter([before, after]).__next__)
    runtime.prepare({("phase",): lambda: None}, lambda: None)
    held = max(0, after - before) if mode == "cudagraph" else 0
    assert runtime.preparation.graph_bytes == held
    assert runtime.preparation.graphs == (mode == "cudagraph")


@pytest.mark.parametrize("kind", GRAPHS)
def test_preparation_is_reported(kind):
    models = models_of(device_of(kind), "gpt_neox")
    decoder = decoder_of(kind, models, STRATEGIES["default"], CONTEXT)
    facts = decoder.runtime.preparation
    assert facts.seconds > 0
    # One for growing, and one each for verification and commitment per number of rows.
    assert facts.graphs >= 3
    assert facts.graph_bytes >= 0
    decoder.prepare()
    assert decoder.runtime.preparation is facts


@pytest.mark.gpu
def test_auto_is_cudagraph_on_cuda():
    assert Runtime("auto", CUDA).mode == "cudagraph"


# Sixteen bits.


def audit(target, reference, prompt_ids, tokens):
    """How far the tokens are from the argmax, and how far 16 bits put the logits of this text off.

    Args:
        reference: `target` in float32.

    Returns:
        The largest gap between the largest logit and that of the token taken, by `reference`, and
        the largest error of any logit of `target`.
    """
    ids = torch.cat((prompt_ids, torch.tensor(tokens, device=prompt_ids.device)))[None]
    with torch.inference_mode():
        exact, rounded = (
            model(ids, use_cache=False).logits[0, len(prompt_ids) - 1 : -1].float()
            for model in (reference, target)
        )
    taken = exact.gather(1, ids[0, len(prompt_ids) :, None])[:, 0]
    gap = (exact.max(dim=-1).values - taken).max().item()
    error = (rounded - exact).abs().max().item()
    # bfloat16 has 8 significant bits. A logit is half a unit in the last place off from its own
    # rounding, and a few units from that of the hidden states it is made of: more is a bug.
    unit = 2.0 ** (math.floor(math.log2(exact.abs().max().item())) - 7)
    assert 0 < error <= 16 * unit
    return gap, error


@cache
def rounded_models(device, family):
    """A pair in bfloat16 whose logits are mostly much further apart than its rounding, and the
    target in float32."""
    target = build(family, layers=2, seed=5, initializer_range=0.2)
    draft = copy.deepcopy(target)
    torch.manual_seed(2)
    with torch.no_grad():
        for weight in draft.parameters():
            weight += 0.02 * torch.randn_like(weight)
    target, draft = target.bfloat16(), draft.bfloat16()
    return [model.to(device) for model in (target, draft, copy.deepcopy(target).float())]


def bfloat16_gaps(kind, family, strategies, seeds):
    """The ratio of gap to error of each output that is not the oracle's, and of all others."""
    target, draft, reference = rounded_models(device_of(kind), family)
    decoders = [
        decoder_of(kind, (target, draft), STRATEGIES[strategy], CONTEXT) for strategy in strategies
    ]
    divergent, equal = [], []
    for seed in range(seeds):
        for length in (1, 17, 60):
            ids = prompt(length, seed).to(target.device)
            wanted = oracle(target, ids, 32)
            for output in (wanted, *(decoder.decode(ids, 32).tokens for decoder in decoders)):
                gap, error = audit(target, reference, ids, output)
                (equal if output == wanted else divergent).append(gap / error)
    return divergent, equal


@pytest.mark.parametrize(
    ("kind", "family", "seeds"),
    [
        ("replayed", "gpt_neox", 1),
        ("replayed", "llama", 1),
        pytest.param("cudagraph", "gpt_neox", 8, marks=pytest.mark.gpu),
        pytest.param("cudagraph", "llama", 8, marks=pytest.mark.gpu),
    ],
)
def test_bfloat16_takes_another_token_only_at_a_near_tie(kind, family, seeds):
    """Forwards of other shapes round differently, and may order two logits differently that lie at
    most twice the error of 16 bits apart. Every token of every output is held to that, of ours as
    of the oracle's; where two outputs part, one of the two tokens is not the argmax in float32."""
    divergent, equal = bfloat16_gaps(kind, family, ("linear", "default", "small_budget"), seeds)
    print(f"{len(divergent)} of {len(divergent + equal)} outputs differ; largest gap by error:")
    print(f"{max(divergent, default=0.0):.2f} of these, {max(equal):.2f} of the others")
    assert max(divergent + equal) <= 2


def test_a_bfloat16_output_that_is_wrong_fails_the_audit(monkeypatch):
    monkeypatch.setattr(SlotCache, "gather", lambda self, *args: None)
    divergent, _ = bfloat16_gaps("replayed", "gpt_neox", ("default",), 1)
    assert max(divergent) > 8


# What keeps the above from passing for no reason.


def every_phase_on_meta(family, strategy, runtime, sampling=None):
    """Runs all phases for all buckets on a device that has no values to read."""
    with torch.device("meta"):
        target, draft = build(family, layers=2), build(family)
    decoder = dynatree.Decoder(target, draft, strategy, CONTEXT + 1, runtime, sampling)
    with pytest.MonkeyPatch.context() as patch:
        # No memory, nothing to share.
        patch.setattr("dynatree.cache.from_dlpack", lambda part: part)
        # And no time that passes.
        patch.setattr(dynatree.Decoder, "_costs", lambda self: CostModel((1.0,) * 9, (1,), (1.0,)))
        decoder.prepare()
    return runtime.preparation.graphs


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_phase_reads_the_device_or_mixes_devices(family, strategy):
    runtime = Replayed(torch.device("meta"), OnDeviceOnly)
    assert every_phase_on_meta(family, STRATEGIES[strategy], runtime) > 1


def shapes_that_follow_the_draft(monkeypatch, runtime):
    runtime.static = False


def position_read_by_the_host(monkeypatch, runtime):
    columns = DraftTree.columns
    monkeypatch.setattr(
        DraftTree, "columns", lambda self, counted, at: columns(self, counted, at + int(at) * 0)
    )


def index_made_on_the_host(monkeypatch, runtime):
    columns = DraftTree.columns
    monkeypatch.setattr(
        DraftTree,
        "columns",
        lambda self, counted, at: columns(self, counted, at)[torch.arange(len(counted))],
    )


@pytest.mark.parametrize(
    "mutate", [shapes_that_follow_the_draft, position_read_by_the_host, index_made_on_the_host]
)
def test_a_phase_that_reads_the_device_is_noticed(mutate, monkeypatch):
    runtime = Replayed(torch.device("meta"), OnDeviceOnly)
    mutate(monkeypatch, runtime)
    with pytest.raises((RuntimeError, NotImplementedError)):
        every_phase_on_meta("gpt_neox", STRATEGIES["default"], runtime)


def position_frozen(monkeypatch):
    columns = DraftTree.columns
    monkeypatch.setattr(
        DraftTree,
        "columns",
        lambda self, visible, at: columns(self, visible, torch.tensor([int(at)])),
    )


def tree_in_tensors_of_one_graph(monkeypatch):
    grow = Drafter.grow

    def broken(self, *args):
        tree = grow(self, *args)
        rows = Rows(tree, tree.size)
        rows.tokens = rows.tokens.clone()
        tree._rows[tree.size] = rows
        return tree

    monkeypatch.setattr(Drafter, "grow", broken)


@pytest.mark.parametrize("mutate", [position_frozen, tree_in_tensors_of_one_graph])
def test_what_a_graph_would_freeze_is_noticed(mutate, monkeypatch):
    """Such a round is right when its code runs every time, and wrong when it is replayed."""
    models, wanted = models_of(CPU, "gpt_neox"), list(expected(CPU, "gpt_neox", 17, 30))
    mutate(monkeypatch)

    def output(runtime):
        decoder = decoder_of("replayed", models, STRATEGIES["unpruned"], CONTEXT, runtime)
        return decoder.decode(prompt(17), 30).tokens

    assert output(Runtime("eager", CPU, static=True)) == wanted
    assert output(Replayed()) != wanted
