"""Sampling: coupled runs equal the sampled target token for token, rejection has its distribution.

What is random is a function of the seed, so every test here is deterministic.
"""

import copy
import math
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from models import (
    CONTEXT,
    DRAFTS,
    FAMILIES,
    STRATEGIES,
    VOCAB,
    build,
    draft_of,
    expected,
    prompt,
    target_of,
)
from scipy.stats import chi2
from test_gpu import OnDeviceOnly, Replayed, every_phase_on_meta, reads_counted
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import dynatree
import dynatree.sampling as sampling_module
from dynatree.cache import SlotCache
from dynatree.errors import DecodeError
from dynatree.runtime import Runtime
from dynatree.sampling import Noise, Sampler, Sampling, accept_drawn, warp

CPU = torch.device("cpu")
WARPS = {
    "plain": {"temperature": 1.0},
    "cold": {"temperature": 0.4},
    "hot": {"temperature": 1.7, "top_k": 12},
    "nucleus": {"temperature": 1.0, "top_p": 0.8},
    "all": {"temperature": 0.8, "top_k": 10, "top_p": 0.9},
}


# The noise.


def reference_bits(seed, position, purpose, lane, index):
    """What `Noise` hashes to, in Python's numbers."""

    def finalised(value):
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) % 2**64
        return value ^ (value >> 31)

    golden = 0x9E3779B97F4A7C15
    counter = (position << 24) + (lane << 2) + purpose
    key = finalised((finalised((seed + golden) % 2**64) + counter * golden) % 2**64)
    bits = ((key % 2**32) + index * ((key >> 32) | 1)) % 2**32
    bits = ((bits ^ (bits >> 16)) * 0x7FEB352D) % 2**32
    bits = ((bits ^ (bits >> 15)) * 0x846CA68B) % 2**32
    return (bits ^ (bits >> 16)) % 2**31


@pytest.mark.parametrize("seed", [0, 1, 2**40 + 7, 2**64 - 1])
def test_noise_is_its_hash_whatever_the_shape(seed):
    noise = Noise(70, CPU)
    noise.seed(seed)
    positions = torch.tensor([0, 1, 5, 2047, 10**6])
    lanes = torch.tensor([0, 3, 1, 4095, 2])
    table = noise.uniform(positions, 2, 70, lanes)
    for row, (position, lane) in enumerate(zip(positions.tolist(), lanes.tolist(), strict=True)):
        wanted = [(reference_bits(seed, position, 2, lane, i) + 0.5) / 2**31 for i in range(70)]
        assert table[row].tolist() == pytest.approx(wanted, rel=1e-6)
        alone = noise.uniform(torch.tensor([position]), 2, 33, lane)
        assert torch.equal(alone[0], table[row, :33])


def fit(counts, wanted, groups=1):
    """The p-value of a chi-square test of counts whose sums in `groups` groups are given.

    Cells where little is expected are pooled, and impossible ones have to be empty.
    """
    counts, wanted = counts.double().flatten(), wanted.double().flatten()
    if counts[wanted <= 0].sum() > 0:
        return 0.0
    often = wanted >= 5
    rest = [values[~often].sum()[None] for values in (counts, wanted)]
    cells = int(often.sum()) + int(rest[1] > 0)
    counts = torch.cat((counts[often], rest[0]))
    wanted = torch.cat((wanted[often], rest[1]))
    statistic = ((counts - wanted) ** 2 / wanted.clamp(min=1e-9)).sum().item()
    return float(chi2.sf(statistic, cells - groups))


def evenness(*samples, bins=32):
    """The p-value of samples, or of pairs or triples of them, being uniform in the unit cube."""
    cell = sum((sample * bins).long() * bins**axis for axis, sample in enumerate(samples))
    counts = torch.bincount(cell.flatten(), minlength=bins ** len(samples))
    return fit(counts, torch.full(counts.shape, counts.sum() / len(counts)))


LIKELY, UNLIKELY = 1e-3, 1e-9
"""p-values that every right sampler exceeds here, and that no wrong one does."""


def test_noise_is_uniform_and_independent():
    noise, size = Noise(1000, CPU), 300
    positions = torch.arange(size)
    table = noise.uniform(positions, 0, 1000)
    noise.seed(1)
    seeds = noise.uniform(positions, 0, 1000)
    noise.seed(0)
    pairs = [
        (table[:, 1:], table[:, :-1]),
        (table[1:], table[:-1]),
        (table[1:, 1:], table[:-1, :-1]),
        (table[64:], table[:-64]),
        (table, seeds),
        (table, noise.uniform(positions, 1, 1000)),
        (table, noise.uniform(positions, 0, 1000, 1)),
        (noise.uniform(positions, 1, 1000, 1), noise.uniform(positions, 1, 1000, 2)),
    ]
    assert 0 < table.min() < 1e-5
    assert 1 - 1e-5 < table.max() < 1
    assert evenness(table, bins=4096) > LIKELY
    for pair in pairs:
        assert evenness(*pair) > LIKELY
    assert evenness(table[2:], table[1:-1], table[:-2], bins=16) > LIKELY
    # By position too, for one index: what a token has at hand over a text.
    assert evenness(noise.uniform(torch.arange(100_000), 0, 1), bins=512) > LIKELY
    # One in fifty variables that is another one again.
    again = torch.where(table.roll(1, 1) < 0.02, table, seeds)
    assert evenness(table, again) < UNLIKELY


def test_gumbel_moments():
    sample = Noise(1000, CPU).gumbel(torch.arange(1000), 0, 1000).double()
    assert sample.isfinite().all()
    error = 1 / math.sqrt(sample.numel())
    assert abs(sample.mean() - 0.5772156649) < 4 * error * math.pi / math.sqrt(6)
    assert abs(sample.var() / (math.pi**2 / 6) - 1) < 4 * error * math.sqrt(4.4)
    assert sample.max() > 12


# The distribution.


@pytest.mark.parametrize("warping", WARPS)
def test_warp_is_that_of_transformers(warping):
    values = WARPS[warping]
    logits = 3 * torch.randn(50, 200, generator=torch.Generator().manual_seed(0))
    scores = TemperatureLogitsWarper(values["temperature"])(None, logits)
    if "top_k" in values:
        scores = TopKLogitsWarper(values["top_k"])(None, scores)
    if "top_p" in values:
        scores = TopPLogitsWarper(values["top_p"])(None, scores)
    ours = warp(logits, Sampling(**values))
    assert ours.dtype == torch.float32
    assert torch.equal(ours == -math.inf, scores == -math.inf)
    assert torch.allclose(ours.exp(), scores.softmax(-1), atol=1e-6)
    rounded = logits.bfloat16()
    assert torch.equal(warp(rounded, Sampling(**values)), warp(rounded.float(), Sampling(**values)))


def test_warp_keeps_a_nan_and_one_token_at_least():
    logits = torch.randn(3, 9)
    logits[1, 4] = float("nan")
    for values in ({"top_k": 1}, {"top_k": 3, "top_p": 0.1}, {"top_p": 1e-6}, {"top_k": 99}):
        log_probs = warp(logits, Sampling(temperature=0.5, **values))
        assert log_probs.isnan().any(1).tolist() == [False, True, False]
        assert log_probs[1].isnan().all()
        assert torch.allclose(log_probs[::2].exp().sum(1), torch.ones(2))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.5}, r"temperature: .*greater than or equal to 0, got -0.5"),
        ({"temperature": math.nan}, "temperature: .*finite number, got nan"),
        ({"temperature": 1.0, "top_p": 0.0}, r"top_p: .*greater than 0, got 0.0"),
        ({"top_p": 1.5}, "top_p: .*less than or equal to 1, got 1.5"),
        ({"top_k": -1, "seed": -3}, "top_k: .*got -1; seed: .*got -3"),
        ({"top_k": 2.5}, "top_k: .*integer, got 2.5"),
        ({"sampling": "typical"}, "mode: .*'coupled' or 'rejection', got 'typical'"),
    ],
)
def test_refused_values(values, message):
    target = target_of("llama")
    with pytest.raises(DecodeError, match=message):
        dynatree.generate(target, None, prompt(5), dynatree.Autoregressive(), 3, **values)


# Coupled.


class AddNoise:
    """As a processor of Transformers: the argmax of its scores is the sample of that position."""

    def __init__(self, seed):
        self.noise = Noise(VOCAB, CPU)
        self.noise.seed(seed)

    def __call__(self, input_ids, scores):
        position = torch.tensor([input_ids.shape[1]])
        return scores.log_softmax(-1) + self.noise.gumbel(position, 0, VOCAB)


@cache
def sampled(family, warping, seed, length, new):
    """The target's own `generate`, greedy on noisy scores; a tuple: it is shared."""
    values, ids = WARPS[warping], prompt(length)[None]
    processors = [TemperatureLogitsWarper(values["temperature"])]
    if "top_k" in values:
        processors.append(TopKLogitsWarper(values["top_k"]))
    if "top_p" in values:
        processors.append(TopPLogitsWarper(values["top_p"]))
    output = target_of(family).generate(
        ids,
        attention_mask=torch.ones_like(ids),
        logits_processor=LogitsProcessorList([*processors, AddNoise(seed)]),
        do_sample=False,
        max_new_tokens=new,
        eos_token_id=None,
        pad_token_id=0,
    )
    return tuple(output[0, length:].tolist())


@pytest.mark.parametrize(
    ("family", "warping"),
    [*(("llama", warping) for warping in WARPS), *((family, "all") for family in FAMILIES)],
)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_coupled_is_the_sampled_target(family, strategy, warping):
    how = Sampling(**WARPS[warping])
    decoder = dynatree.Decoder(
        target_of(family), draft_of(family, "noisy"), STRATEGIES[strategy], CONTEXT, sampling=how
    )
    for seed, length in ((0, 17), (1, 1), (2, 17)):
        output = decoder.decode(prompt(length), 14, seed=seed).tokens
        assert output == list(sampled(family, warping, seed, length, 14))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_coupled_with_any_draft_and_end(strategy):
    full = list(sampled("gpt_neox", "plain", 7, 3, 17))
    for draft in DRAFTS:
        models = target_of("gpt_neox"), draft_of("gpt_neox", draft)
        for new in (1, 2):
            generation = dynatree.generate(
                *models, prompt(3), STRATEGIES[strategy], new, temperature=1.0, seed=7
            )
            assert generation.tokens == full[:new]
        for eos in full[::5]:
            generation = dynatree.generate(
                *models, prompt(3), STRATEGIES[strategy], 17, eos, temperature=1.0, seed=7
            )
            assert generation.tokens == full[: full.index(eos) + 1]


@pytest.mark.parametrize("mode", ["coupled", "rejection"])
def test_a_sample_is_drawn_from_what_a_calibrated_draft_had_learnt(mode):
    """Its rounds are those of the draft before calibration, and greedy rounds are not."""
    target, draft = target_of("gpt_neox"), draft_of("gpt_neox", "noisy")
    calibrated = copy.deepcopy(draft)
    with torch.no_grad():
        calibrated.get_output_embeddings().weight.div_(0.25)
    calibrated.config.calibration_temperature = 0.25
    strategy = dynatree.Tree(depth=3, branch_factor=2, prune_threshold=0.1)

    def rounds(draft, temperature):
        how = {"temperature": temperature, "seed": 3, "sampling": mode}
        return dynatree.generate(target, draft, prompt(5), strategy, 20, **how).stats.rounds

    assert rounds(calibrated, 1.0) == rounds(draft, 1.0)
    assert rounds(calibrated, 0.0) != rounds(draft, 0.0)


def test_seeds_differ_and_temperature_zero_is_greedy():
    assert len({sampled("llama", "plain", seed, 17, 14) for seed in range(20)}) == 20
    target, draft = target_of("llama"), draft_of("llama", "noisy")
    for mode in ("coupled", "rejection"):
        how = Sampling(temperature=0.0, top_k=2, seed=5, mode=mode)
        decoder = dynatree.Decoder(target, draft, dynatree.Tree(), CONTEXT, sampling=how)
        assert decoder._sampler is None
        assert decoder.decode(prompt(17), 14).tokens == expected("llama", 17, 14)


def test_common_noise_makes_the_models_agree(monkeypatch):
    """The draft's order of candidates matters for speed alone, and does matter."""
    strategy = dynatree.Linear(num_draft_tokens=4)

    def decode(seed):
        return dynatree.generate(
            target_of("llama"),
            draft_of("llama", "noisy"),
            prompt(17),
            strategy,
            40,
            temperature=2.0,
            seed=seed,
        )

    before = [decode(seed) for seed in range(4)]
    monkeypatch.setattr(
        Sampler,
        "draw",
        lambda self, logits, children, nodes, depth: logits.topk(children, dim=-1).indices,
    )
    after = [decode(seed) for seed in range(4)]
    assert [one.tokens for one in before] == [one.tokens for one in after]
    rounds = [sum(len(one.stats.rounds) for one in runs) for runs in (before, after)]
    assert rounds[0] < 0.9 * rounds[1]


@pytest.mark.parametrize("mode", ["coupled", "rejection"])
def test_custom_generate_samples(mode):
    target, ids = target_of("gpt_neox"), prompt(17)
    draft, strategy = draft_of("gpt_neox", "noisy"), dynatree.Tree()

    def call(**options):
        return target.generate(
            ids[None],
            attention_mask=torch.ones(1, 17, dtype=torch.long),
            custom_generate=dynatree.custom_generate,
            assistant_model=draft,
            strategy=strategy,
            sampling=mode,
            do_sample=True,
            max_new_tokens=13,
            eos_token_id=None,
            **options,
        )[0, 17:].tolist()

    for values in ({}, WARPS["hot"], WARPS["all"]):
        # Transformers fills in its own default of top_k.
        values = {"top_k": 0, **values}
        ours = {"temperature": 1.0, "seed": 3, "sampling": mode, **values}
        wanted = dynatree.generate(target, draft, ids, strategy, 13, **ours).tokens
        assert call(seed=3, **values) == wanted
    torch.manual_seed(1)
    first, second = call(), call()
    torch.manual_seed(1)
    assert call() == first != second


@pytest.mark.parametrize("option", [{"min_p": 0.1}, {"repetition_penalty": 1.5}])
def test_custom_generate_refuses_other_processors(option):
    with pytest.raises(DecodeError, match=r"other than temperature.*(MinP|Repetition)"):
        target_of("gpt_neox").generate(
            prompt(3)[None],
            custom_generate=dynatree.custom_generate,
            assistant_model=draft_of("gpt_neox", "noisy"),
            strategy=dynatree.Tree(),
            do_sample=True,
            max_new_tokens=5,
            **option,
        )


@pytest.mark.parametrize("mode", ["coupled", "rejection"])
def test_nan_logits_are_noticed(mode):
    def poisoned():
        model = build("llama")
        with torch.no_grad():
            model.lm_head.weight[3] = float("nan")
        return model

    sound, options = draft_of("llama", "noisy"), {"temperature": 1.0, "top_k": 5, "sampling": mode}
    for strategy in (dynatree.Linear(), dynatree.Tree()):
        with pytest.raises(DecodeError, match="target model's logits hold a NaN"):
            dynatree.generate(poisoned(), sound, prompt(5), strategy, 5, **options)
        with pytest.raises(DecodeError, match="draft model's logits hold a NaN"):
            dynatree.generate(target_of("llama"), poisoned(), prompt(5), strategy, 9, **options)


# Static shapes.


@pytest.mark.parametrize("strategy", ["ar", "linear", "default", "small_budget"])
def test_coupled_in_static_shapes(strategy):
    models = target_of("gpt_neox"), draft_of("gpt_neox", "noisy")
    how = Sampling(**WARPS["all"])
    decoder = dynatree.Decoder(*models, STRATEGIES[strategy], CONTEXT, Replayed(), how)
    for seed in range(2):
        output = decoder.decode(prompt(17), 14, seed=seed).tokens
        assert output == list(sampled("gpt_neox", "all", seed, 17, 14))


@pytest.mark.parametrize("strategy", ["ar", "linear", "default", "small_budget"])
def test_rejection_in_static_shapes(strategy):
    """What was recorded draws what its code draws; where no node is dropped, as other shapes do.

    But these draft no deeper than can be committed, so the last rounds are others.
    """
    models = target_of("gpt_neox"), draft_of("gpt_neox", "noisy")
    how = Sampling(temperature=1.0, mode="rejection")
    runtimes = [Replayed(), Runtime("eager", CPU, static=True)]
    if strategy in ("ar", "linear"):
        runtimes.append(Runtime("eager", CPU))
    outputs = []
    for runtime in runtimes:
        decoder = dynatree.Decoder(*models, STRATEGIES[strategy], CONTEXT, runtime, how)
        outputs.append([decoder.decode(prompt(17), 20, seed=seed).tokens for seed in range(2)])
    outputs = [[tokens[:12] for tokens in output] for output in outputs]
    assert all(output == outputs[0] for output in outputs)


@pytest.mark.parametrize("mode", ["coupled", "rejection"])
@pytest.mark.parametrize("strategy", ["ar", "default"])
def test_no_phase_reads_the_device(strategy, mode, monkeypatch):
    how = Sampling(temperature=0.7, top_k=9, top_p=0.9, mode=mode)
    runtime = Replayed(torch.device("meta"), OnDeviceOnly)
    assert every_phase_on_meta("gpt_neox", STRATEGIES[strategy], runtime, how) > 1
    models = target_of("gpt_neox"), draft_of("gpt_neox", "noisy")
    decoder = dynatree.Decoder(*models, STRATEGIES[strategy], CONTEXT, Replayed(), how)
    stream = decoder.stream(prompt(17), 20)
    next(stream)
    with reads_counted(CPU, monkeypatch) as reads:
        for _ in stream:
            pass
    assert reads


# The target's distribution, exactly enumerated. First of one token, many positions at once.

SIZE = 30_000


def tables(vocab, seed, scale=1.5):
    """Logits [vocab, vocab] of a target and of a draft that agrees in part, by the last token."""
    generator = torch.Generator().manual_seed(seed)
    target = scale * torch.randn(vocab, vocab, generator=generator)
    return target, 0.5 * target + 1.5 * torch.randn(vocab, vocab, generator=generator)


def one_token(how, children, vocab=6):
    """The p-value of `SIZE` tokens after one row, each at a position of its own."""
    target, draft = (table[:1] for table in tables(vocab, 3))
    sampler = Sampler(how, vocab, SIZE, SIZE, children, CPU)
    sampler.begin(None)
    position, rows = torch.zeros(1, dtype=torch.long), torch.arange(SIZE)
    sampler.plant(position)
    sampler.draw(draft.expand(SIZE, -1), children, rows, 1)
    _, tokens = sampler.choose(target.expand(SIZE, -1), position, rows, rows)
    wanted = warp(target, how).exp()[0] * SIZE
    return fit(torch.bincount(tokens, minlength=vocab), wanted)


@pytest.mark.parametrize("warping", WARPS)
@pytest.mark.parametrize(
    ("mode", "children"), [("coupled", 1), ("rejection", 1), ("rejection", 3), ("rejection", 6)]
)
def test_one_token_has_the_distribution_of_the_target(mode, children, warping):
    values = {**WARPS[warping], "mode": mode}
    if "top_k" in values:
        values["top_k"] = 4
    assert one_token(Sampling(**values), children) > LIKELY


def test_draws_are_without_replacement():
    how = Sampling(temperature=1.0, mode="rejection")
    logits = tables(4, 0)[1][:1]
    sampler = Sampler(how, 4, 1, SIZE, 2, CPU)
    sampler.plant(torch.zeros(1, dtype=torch.long))
    drawn = sampler.draw(logits.expand(SIZE, -1), 2, torch.arange(SIZE), 1)
    q = logits[0].softmax(0)
    pairs = q[:, None] * q / (1 - q[:, None])
    pairs.fill_diagonal_(0)
    counts = torch.bincount(drawn[:, 0] * 4 + drawn[:, 1], minlength=16)
    assert fit(counts, pairs * SIZE) > LIKELY


def first_always_taken(monkeypatch):
    monkeypatch.setattr(
        sampling_module,
        "accept_drawn",
        lambda probs, draft, drawn, coins, noise: torch.where(
            drawn[:, 0] < 0, (probs.log() + noise).argmax(-1), drawn[:, 0]
        ),
    )


def residual_not_updated(monkeypatch):
    def broken(probs, draft, drawn, coins, noise):
        taken = accept_drawn(probs, draft, drawn[:, :1], coins[:, :1], noise)
        fresh = (probs.log() + noise).argmax(-1)
        return torch.where(taken == drawn[:, 0], taken, fresh)

    monkeypatch.setattr(sampling_module, "accept_drawn", broken)


def draft_keeps_what_was_rejected(monkeypatch):
    """Siblings drawn without replacement, tried as if with it."""

    def broken(probs, draft, drawn, coins, noise):
        choices = torch.full_like(drawn[:, 0], -1)
        for index in range(drawn.shape[1]):
            column = slice(index, index + 1)
            tried = accept_drawn(probs, draft, drawn[:, column], coins[:, column], noise)
            taken = (choices < 0) & (tried == drawn[:, index])
            choices = torch.where(taken, drawn[:, index], choices)
            residual = (probs - draft).clamp(min=0)
            probs = residual / residual.sum(-1, keepdim=True)
        return torch.where(choices < 0, (probs.log() + noise).argmax(-1), choices)

    monkeypatch.setattr(sampling_module, "accept_drawn", broken)


def candidates_not_sampled(monkeypatch):
    gumbel = Noise.gumbel
    monkeypatch.setattr(
        Noise,
        "gumbel",
        lambda self, positions, purpose, *args: (
            gumbel(self, positions, purpose, *args) * (purpose != sampling_module._DRAW)
        ),
    )


def draft_of_another_temperature(monkeypatch):
    draw = Sampler.draw
    monkeypatch.setattr(
        Sampler,
        "draw",
        lambda self, logits, children, nodes, depth: (
            draw(self, logits, children, nodes, depth),
            self._draft.sqrt_().div_(self._draft.sum(-1, keepdim=True).clamp(min=1e-9)),
        )[0],
    )


def coins_of_the_draws(monkeypatch):
    monkeypatch.setattr(sampling_module, "_DRAW", sampling_module._COIN)
    gumbel = Noise.gumbel
    monkeypatch.setattr(
        Noise,
        "gumbel",
        lambda self, positions, purpose, count, lanes=0: (
            gumbel(self, positions + lanes + 1, purpose, count)
            if purpose == sampling_module._COIN
            else gumbel(self, positions, purpose, count, lanes)
        ),
    )


BROKEN = [
    first_always_taken,
    residual_not_updated,
    draft_keeps_what_was_rejected,
    candidates_not_sampled,
    draft_of_another_temperature,
    coins_of_the_draws,
]


@pytest.mark.parametrize("mutate", BROKEN)
def test_a_broken_verifier_is_noticed(mutate, monkeypatch):
    how = Sampling(temperature=1.0, mode="rejection")
    assert one_token(how, 3) > LIKELY
    mutate(monkeypatch)
    assert one_token(how, 3) < UNLIKELY


# Then of three tokens, by whole rounds of the decoder on models that are tables.


class TableRunner:
    """A `ModelRunner` whose logits depend on the last token alone."""

    def __init__(self, model, capacity, runtime):
        self.table, self.device, self.dtype = model.table, CPU, torch.float32
        self.context, self.vocab_size, self.calibration = None, len(model.table), 1.0
        self.cache = SlotCache(1, capacity)

    def prefill(self, tokens):
        return self.table[tokens[-1:]]

    def forward(self, tokens, positions, slots, mask, living=None):
        return self.table[tokens]


TREES = {
    "linear": dynatree.Linear(num_draft_tokens=2),
    "tree": dynatree.Tree(depth=2, branch_factor=2, prune_threshold=0.0),
    "pruned": dynatree.Tree(depth=3, branch_factor=3, prune_threshold=0.15),
    "budget": dynatree.Tree(depth=3, branch_factor=3, prune_threshold=0.0, node_budget=3),
}
TEXT = 300


def three_tokens(strategy, how, monkeypatch, texts=8, static=False):
    """The p-value of tokens and of their triples, given the one before; mean tokens per round."""
    monkeypatch.setattr("dynatree.decode.ModelRunner", TableRunner)
    vocab = 4
    target, draft = tables(vocab, 8)
    models = [SimpleNamespace(table=table, device=CPU) for table in (target, draft)]
    runtime = Runtime("eager", CPU, static=static)
    decoder = dynatree.Decoder(*models, strategy, TEXT + 1, runtime, how)
    counts, steps, rounds = torch.zeros(vocab**4), torch.zeros(vocab**2), 0
    for seed in range(texts):
        generation = decoder.decode(torch.tensor([seed % vocab]), TEXT, seed=seed)
        rounds += len(generation.stats.rounds)
        text = torch.tensor([seed % vocab, *generation.tokens])
        steps += torch.bincount(text[:-1] * vocab + text[1:], minlength=vocab**2)
        blocks = text[:-1].view(-1, 3)
        after = text[3::3]
        cells = ((blocks[:, 0] * vocab + blocks[:, 1]) * vocab + blocks[:, 2]) * vocab + after
        counts += torch.bincount(cells, minlength=vocab**4)
    counts = counts.view((vocab,) * 4)
    p = warp(target, how).exp()
    exact = p[:, :, None, None] * p[None, :, :, None] * p[None, None]
    wanted = exact * counts.sum((1, 2, 3))[:, None, None, None]
    joint = fit(counts, wanted, groups=vocab)
    # Fewer cells: less that could be seen, and it is seen sooner.
    steps = steps.view(vocab, vocab)
    single = fit(steps, p * steps.sum(1, keepdim=True), groups=vocab)
    return min(1.0, 2 * min(joint, single)), texts * TEXT / rounds


@pytest.mark.parametrize(
    ("strategy", "mode", "static"),
    [
        *((strategy, "rejection", False) for strategy in TREES),
        ("budget", "rejection", True),
        ("budget", "coupled", False),
    ],
)
def test_three_tokens_have_the_distribution_of_the_target(strategy, mode, static, monkeypatch):
    how = Sampling(temperature=1.2, mode=mode)
    p_value, per_round = three_tokens(TREES[strategy], how, monkeypatch, static=static)
    assert p_value > LIKELY
    assert per_round > 1.3


def test_three_tokens_of_autoregressive_sampling(monkeypatch):
    how = Sampling(temperature=1.2, top_k=3)
    assert three_tokens(dynatree.Autoregressive(), how, monkeypatch)[0] > LIKELY


def only_children_in_the_tree_are_tried(monkeypatch):
    """To have pruned by value, and to verify as if what is left were all that was drawn."""
    choose = dynatree.Decoder._choose

    def broken(self, logits, tree):
        if tree is not self._root:
            origins = self._drafter.origins
            for row in range(len(logits)):
                children = tree.tokens[1 : tree.size][tree.parents[1 : tree.size] == row]
                drawn = self._sampler._drawn[origins[row]]
                kept = drawn[torch.isin(drawn, children)]
                drawn.fill_(-1)
                drawn[: len(kept)] = kept
        return choose(self, logits, tree)

    monkeypatch.setattr(dynatree.Decoder, "_choose", broken)


@pytest.mark.parametrize(
    ("strategy", "mutate"),
    [
        ("linear", first_always_taken),
        ("tree", residual_not_updated),
        ("pruned", only_children_in_the_tree_are_tried),
        ("budget", only_children_in_the_tree_are_tried),
    ],
)
def test_three_tokens_of_a_broken_verifier_are_noticed(strategy, mutate, monkeypatch):
    mutate(monkeypatch)
    how = Sampling(temperature=1.2, mode="rejection")
    assert three_tokens(TREES[strategy], how, monkeypatch)[0] < UNLIKELY
