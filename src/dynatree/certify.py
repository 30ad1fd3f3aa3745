"""The losslessness certificate: every configuration against plain `model.generate`.

The oracle and the control are Transformers' own code; they share nothing with the engine but the
weights, and for samples the noise of `dynatree.sampling`, which has tests of its own.
`dynatree.certificate` states the criterion. A check is a function `check_<what>` whose
outcome is a field of `ConfigurationCheck`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
)

from dynatree.certificate import (
    Certificate,
    ConfigurationCheck,
    Control,
    Departure,
    GreedyCheck,
    OutputCheck,
    SampledCheck,
    SampledDeparture,
    explained,
    noise_limit,
)
from dynatree.clock import Timespan
from dynatree.decode import Decoder
from dynatree.measure import first_difference
from dynatree.pairs import Pair
from dynatree.provenance import provenance
from dynatree.sampling import Sampler, Sampling
from dynatree.sources import source_digest
from dynatree.specs import CertificateSpec
from dynatree.strategies import StrategyBase
from dynatree.workloads import encode_prompts

RIVALS = 9
"""How many of the tokens after the best one count as its rivals when noise is measured."""

SAMPLING = Sampling(temperature=0.8, top_p=0.95)
"""How sampled outputs are compared: coupled, so that a seed says which text it must be."""

Progress = Callable[[ConfigurationCheck], None]
"""Called after each configuration."""


@dataclass(frozen=True)
class Case:
    """One sequence to decode, and the oracle's continuation.

    Attributes:
        index: of the prompt.
        prompt: [L] int64.
        end_tokens: those that end the sequence.
        tokens: the oracle's n new tokens.
        logits: [n, vocabulary] float32, from which it chose them.
        sampled: its tokens with the noise of coupled sampling, in float32; the seed is `index`.
    """

    index: int
    prompt: Tensor
    end_tokens: list[int]
    tokens: list[int]
    logits: Tensor
    sampled: list[int]


def certify(spec: CertificateSpec, pair: Pair, progress: Progress = lambda _: None) -> Certificate:
    """Compares every configuration of `spec` with the oracle; never raises because one differs.

    Args:
        spec: what to compare.
        pair: the loaded models of `spec.models`.
        progress: told after every configuration.

    Raises:
        DecodeError: a prompt that does not fit, or logits that hold a NaN.
        WorkloadError: the prompts cannot be had.
    """
    span = Timespan()
    exact = spec.models.dtype == "float32"
    cases = _cases(spec, pair, exact)
    checks = []
    for name, strategy in spec.strategies.items():
        greedy = check_greedy(spec, pair, strategy, cases)
        sampled = check_sampled(spec, pair, strategy, cases) if exact else None
        check = ConfigurationCheck.of(name, greedy, sampled)
        checks.append(check)
        progress(check)
    return Certificate(
        passed=all(check.verdict != "failed" for check in checks),
        spec=spec,
        source_digest=source_digest(__file__),
        pair_digest=pair.digest,
        configurations=checks,
        provenance={"models": pair.facts, **provenance(pair.target.device, seed=0)},
        started=span.started,
        finished=span.now,
    )


def check_greedy(
    spec: CertificateSpec, pair: Pair, strategy: StrategyBase, cases: Sequence[Case]
) -> GreedyCheck:
    """Decodes every case greedily with `strategy` and compares it with the oracle."""
    longest = max(len(case.prompt) for case in cases) + spec.max_new_tokens
    decoder = Decoder(pair.target, pair.draft, strategy, longest, spec.models.runtime)
    decoded: list[list[int]] = []
    controls: list[Control] = []
    for case in cases:
        generation = decoder.decode(case.prompt, spec.max_new_tokens, case.end_tokens)
        decoded.append(generation.tokens)
        if spec.models.dtype != "float32" and case.index == len(controls):
            rows = [1 + entry.nodes for entry in generation.stats.rounds]
            controls.append(control(pair.target, case, rows))
    limit = noise_limit(controls)
    return GreedyCheck(
        outputs=[
            OutputCheck(
                prompt=case.index,
                end_tokens=case.end_tokens,
                tokens=len(tokens),
                departures=departures(pair.target, case, tokens, spec.max_new_tokens, limit),
            )
            for case, tokens in zip(cases, decoded, strict=True)
        ],
        controls=controls,
        limit=limit,
    )


def check_sampled(
    spec: CertificateSpec, pair: Pair, strategy: StrategyBase, cases: Sequence[Case]
) -> SampledCheck:
    """Samples every case with `strategy`, coupled, and compares it with the oracle's sample."""
    longest = max(len(case.prompt) for case in cases) + spec.max_new_tokens
    decoder = Decoder(pair.target, pair.draft, strategy, longest, spec.models.runtime, SAMPLING)
    found = []
    for case in cases:
        tokens = decoder.decode(
            case.prompt, spec.max_new_tokens, case.end_tokens, seed=case.index
        ).tokens
        if tokens != case.sampled:
            at = first_difference(tokens, case.sampled)
            found.append(SampledDeparture(prompt=case.index, index=at))
    return SampledCheck(
        temperature=SAMPLING.temperature,
        top_p=SAMPLING.top_p,
        outputs=len(cases),
        departures=found,
    )


class _WithNoise(LogitsProcessor):
    """Leaves of the scores what coupled sampling chooses, so that greedy `generate` samples."""

    def __init__(self, seed: int, vocab_size: int, device: torch.device) -> None:
        self._sampler = Sampler(SAMPLING, vocab_size, 1, 1, 1, device)
        self._sampler.begin(seed)
        self._depth = torch.zeros(1, dtype=torch.long, device=device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        position = self._depth + input_ids.shape[1] - 1
        _, choice = self._sampler.choose(scores, position, self._depth, None)
        return torch.full_like(scores, -torch.inf).scatter(1, choice[:, None], 0.0)


def departures(
    target: PreTrainedModel,
    case: Case,
    tokens: list[int],
    max_new_tokens: int,
    limit: float | None,
) -> list[Departure]:
    """Where `tokens` leave the oracle, which is asked anew after each departure.

    So all of an output is checked and not only what precedes the first near tie. The first
    departure that `limit` does not explain is the last one looked for.
    """
    found: list[Departure] = []
    start, expected, logits = 0, case.tokens, case.logits
    while tokens[start:] != expected:
        rest = tokens[start:]
        shorter = min(len(rest), len(expected))
        at = first_difference(rest, expected)
        found.append(_departure(start + at, logits[at:], rest[at:] if at < shorter else []))
        if not explained(found[-1], limit):
            break
        start += at + 1
        if start == max_new_tokens or rest[at] in case.end_tokens:
            expected, logits = [], logits[:0]
        else:
            prompt = torch.cat((case.prompt, case.prompt.new_tensor(tokens[:start])))
            expected, logits = oracle(target, prompt, max_new_tokens - start, case.end_tokens)
    return found


def oracle(
    target: PreTrainedModel,
    prompt: Tensor,
    max_new_tokens: int,
    end_tokens: Sequence[int],
    processors: Sequence[LogitsProcessor] = (),
) -> tuple[list[int], Tensor]:
    """What plain greedy `generate` goes on with, after `processors` have seen the logits.

    Returns:
        The n new tokens, and the logits [n, vocabulary] in float32 from which it chose them.
    """
    kept = target.generation_config
    # What a call leaves unset is filled in from the model's own configuration: penalties, say.
    target.generation_config = GenerationConfig()
    try:
        output = target.generate(
            prompt[None],
            attention_mask=torch.ones_like(prompt)[None],
            generation_config=GenerationConfig(
                do_sample=False,
                max_new_tokens=max_new_tokens,
                eos_token_id=list(end_tokens) or None,
                pad_token_id=0,
                return_dict_in_generate=True,
                output_logits=True,
            ),
            logits_processor=LogitsProcessorList(processors),
        )
    finally:
        target.generation_config = kept
    tokens: list[int] = output.sequences[0, len(prompt) :].tolist()
    return tokens, torch.cat(output.logits)


@torch.inference_mode()
def control(target: PreTrainedModel, case: Case, rows: Sequence[int]) -> Control:
    """Decodes the oracle's tokens with the target alone, through forwards of `rows` rows in turn.

    Each row of a forward is the same token at the same place, and sees the committed tokens and
    itself; the first is kept. There are always two rows at least, so that autoregressive decoding,
    which a compiled forward may round differently too, has a control that measures something.
    """
    cache = DynamicCache(config=target.config.get_text_config())
    lowest = torch.finfo(target.dtype).min
    output = target(case.prompt[None], past_key_values=cache, use_cache=True, logits_to_keep=1)
    logits = [output.logits[0, 0]]
    sizes = [max(2, count) for count in rows] or [2]
    for token, count in zip(case.tokens[:-1], cycle(sizes), strict=False):
        position = cache.get_seq_length()
        own = torch.eye(count, dtype=torch.bool, device=target.device)
        seen = torch.cat((own.new_ones(count, position), own), dim=-1)
        output = target(
            case.prompt.new_full((1, count), token),
            position_ids=case.prompt.new_full((1, count), position),
            # Added to the scores, as every attention implementation takes it.
            attention_mask=torch.zeros_like(seen, dtype=target.dtype).masked_fill(~seen, lowest)[
                None, None
            ],
            past_key_values=cache,
            use_cache=True,
        )
        logits.append(output.logits[0, 0])
        cache.crop(1 - count)
    shaped = torch.stack(logits).float()
    rivals = case.logits.topk(min(1 + RIVALS, case.logits.shape[-1])).indices
    change = (shaped - case.logits).gather(-1, rivals)
    noise = (change[:, :1] - change).abs().max()
    # Where a batch happens to change nothing, the logits are still rounded.
    rounding = torch.finfo(target.dtype).eps * case.logits.amax(dim=-1).abs().max()
    choices = shaped.argmax(dim=-1).tolist()
    other = next((i for i, token in enumerate(case.tokens) if choices[i] != token), None)
    return Control(
        prompt=case.index,
        rows=max(sizes),
        noise=float(torch.maximum(noise, rounding)),
        departure=None
        if other is None
        else _departure(other, case.logits[other:], choices[other:]),
    )


def _cases(spec: CertificateSpec, pair: Pair, exact: bool) -> list[Case]:
    """Each prompt as it is, and once more with an end in the middle of its continuation."""
    cases = []
    eos = pair.tokenizer.eos_token_id
    for index, prompt in enumerate(encode_prompts(spec, pair)):
        end_tokens = [] if eos is None else [int(eos)]
        for _ in range(2):
            tokens, logits = oracle(pair.target, prompt, spec.max_new_tokens, end_tokens)
            sampled: list[int] = []
            if exact:
                noise = _WithNoise(index, logits.shape[-1], prompt.device)
                sampled, _ = oracle(pair.target, prompt, spec.max_new_tokens, end_tokens, [noise])
            cases.append(Case(index, prompt, end_tokens, tokens, logits, sampled))
            end_tokens = [*end_tokens, tokens[len(tokens) // 2]]
    return cases


def _departure(index: int, logits: Tensor, tokens: list[int]) -> Departure:
    """The departure at `index`, where the oracle's `logits` and the output's `tokens` begin.

    There are no logits past the oracle's end, and no tokens where nothing stands against a token.
    """
    if len(logits) == 0:
        return Departure(index=index, gap=None, shortfall=None)
    top = logits[0].topk(2).values
    return Departure(
        index=index,
        gap=float(top[0] - top[1]),
        shortfall=float(top[0] - logits[0, tokens[0]]) if tokens else None,
    )
