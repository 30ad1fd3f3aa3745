"""Paired measurement of one configuration against autoregressive decoding.

Both methods decode the same prompts in the same process, in alternating order (A B, B A, ...), so
that a speedup is a ratio of neighbours in time and survives drift and different machines. Wall
time is taken around the whole generation, prefill of both models included, with the device idle
on both sides, and tokens are those really generated.
"""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from dynatree.clock import Timespan, seconds_since
from dynatree.decode import Decoder, Generation
from dynatree.errors import LosslessError
from dynatree.pairs import Pair
from dynatree.provenance import peak_memory_bytes, provenance
from dynatree.results import (
    Divergence,
    Method,
    Output,
    RoundRecord,
    RunRecord,
    RunResult,
    RuntimeFacts,
    records_digest,
    repeated_8grams,
    totals,
)
from dynatree.schema import digest
from dynatree.sources import source_digest
from dynatree.specs import RunSpec
from dynatree.strategies import Autoregressive
from dynatree.workloads import encode_prompts

Outcome = TypeVar("Outcome")
Progress = Callable[[int, int, float], None]
"""Called after each generation with: done, planned, tokens per second of the strategy so far."""


def measure(spec: RunSpec, pair: Pair, progress: Progress = lambda *_: None) -> RunResult:
    """Measures one configuration.

    Args:
        spec: what to measure.
        pair: the loaded models of `spec.models`.
        progress: told after every generation.

    Raises:
        ClockError: a clock went backwards.
        LosslessError: in float32 an output differs from autoregressive decoding.
        DecodeError: a prompt that does not fit, or logits that hold a NaN.
        WorkloadError: the prompts cannot be had.
    """
    span = Timespan()
    settings = spec.measure
    prompts = encode_prompts(spec, pair)
    longest = max(len(prompt) for prompt in prompts) + settings.max_new_tokens
    decoders: dict[Method, Decoder] = {
        "autoregressive": Decoder(
            pair.target, None, Autoregressive(), longest, spec.models.runtime
        ),
        "strategy": Decoder(pair.target, pair.draft, spec.strategy, longest, spec.models.runtime),
    }
    for decoder in decoders.values():
        decoder.prepare()
    eos = pair.tokenizer.eos_token_id
    # What is loaded by now stays: taken out of the collector's sight, it does not have to be
    # walked before every generation.
    gc.freeze()
    planned = len(prompts) * (settings.warmup + settings.runs) * len(decoders)
    records: list[RunRecord] = []
    outputs: dict[int, dict[Method, list[int]]] = {}
    done, tokens, seconds = 0, 0, 0.0
    for run, index, order in schedule(settings.warmup, settings.runs, len(prompts)):
        for method in order:
            decode = partial(decoders[method].decode, prompts[index], settings.max_new_tokens, eos)
            generation, elapsed = timed(decode, pair.target.device)
            # Greedy decoding repeats itself, so the first run's output stands for all.
            first = outputs.setdefault(index, {}).setdefault(method, generation.tokens)
            if generation.tokens != first and spec.models.dtype == "float32":
                raise LosslessError(
                    f"prompt {index}: {method} gave two different outputs in float32"
                )
            if run >= 0:
                records.append(_record(index, run, method, order, generation, elapsed))
            done += 1
            if method == "strategy":
                tokens, seconds = tokens + len(generation.tokens), seconds + elapsed
            progress(done, planned, tokens / seconds if seconds else 0.0)
    # Before outputs are compared, which may take a forward over a whole sequence.
    peak = peak_memory_bytes(pair.target.device)
    compared = [
        compare(pair, index, prompts[index], both["autoregressive"], both["strategy"])
        for index, both in sorted(outputs.items())
    ]
    unequal = next((output for output in compared if output.divergence is not None), None)
    if spec.models.dtype == "float32" and unequal is not None and unequal.divergence is not None:
        raise LosslessError(
            f"prompt {unequal.prompt}: the output differs from autoregressive decoding at token "
            f"{unequal.divergence.index} (the target's top-2 logit gap there is "
            f"{unequal.divergence.gap:.3g}); in float32 this is a bug, and no result was written"
        )
    return RunResult(
        spec=spec,
        spec_digest=spec.digest,
        source_digest=source_digest(__file__),
        prompts_digest=digest([prompt.tolist() for prompt in prompts]),
        pair_digest=pair.digest,
        runtimes={
            method: RuntimeFacts(mode=decoder.runtime.mode, **asdict(decoder.runtime.preparation))
            for method, decoder in decoders.items()
        },
        records=records,
        records_digest=records_digest(records),
        outputs=compared,
        totals=totals([record for record in records if record.method == "strategy"]),
        peak_memory_bytes=peak,
        provenance={"models": pair.facts, **provenance(pair.target.device, settings.seed)},
        started=span.started,
        finished=span.now,
    )


def schedule(
    warmup: int, runs: int, prompts: int
) -> Iterator[tuple[int, int, tuple[Method, Method]]]:
    """Yields run (negative in the warm-up), prompt, and which method goes first and second.

    The order alternates along the prompts and from run to run, so that over two runs every
    prompt is decoded in both orders.
    """
    for run in range(-warmup, runs):
        for prompt in range(prompts):
            if (run + prompt) % 2 == 0:
                yield run, prompt, ("autoregressive", "strategy")
            else:
                yield run, prompt, ("strategy", "autoregressive")


def compare(
    pair: Pair, index: int, prompt: Tensor, reference: list[int], tokens: list[int]
) -> Output:
    """Compares an output with autoregressive decoding; finds the first divergence and its gap."""
    divergence = None
    if tokens != reference:
        position = first_difference(reference, tokens)
        before = torch.tensor(reference[:position], dtype=torch.long, device=prompt.device)
        with torch.inference_mode():
            text = torch.cat((prompt, before))[None]
            logits = pair.target(text, logits_to_keep=1).logits[0, -1].float()
        top = logits.topk(2).values
        divergence = Divergence(index=position, gap=float(top[0] - top[1]))
    return Output(
        prompt=index,
        prompt_tokens=len(prompt),
        tokens=tokens,
        repeated_8grams=repeated_8grams(tokens),
        equal=divergence is None,
        divergence=divergence,
    )


def first_difference(one: Sequence[int], other: Sequence[int]) -> int:
    """Where two unequal texts part; the length of the shorter one if the other goes on from it."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def timed(call: Callable[[], Outcome], device: torch.device) -> tuple[Outcome, float]:
    """What `call` returns, and its wall time in seconds with `device` idle on both sides."""
    # A collection in the middle of a call would be charged to whichever method ran then.
    gc.collect()
    gc.disable()
    try:
        _wait(device)
        begin = time.perf_counter()
        outcome = call()
        _wait(device)
        return outcome, seconds_since(begin)
    finally:
        gc.enable()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _record(
    prompt: int,
    run: int,
    method: Method,
    order: tuple[Method, Method],
    generation: Generation,
    seconds: float,
) -> RunRecord:
    stats = generation.stats
    return RunRecord(
        prompt=prompt,
        run=run,
        method=method,
        first=order[0] == method,
        tokens=len(generation.tokens),
        seconds=seconds,
        first_token_seconds=stats.first_token_seconds,
        phases=stats.seconds,
        target_forwards=stats.target_forwards,
        draft_forwards=stats.draft_forwards,
        rounds=[RoundRecord(**asdict(entry)) for entry in stats.rounds],
    )
