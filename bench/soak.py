"""Whether long decoding stays right, and flat in memory and speed.

One process decodes one random case after another: a strategy, a prompt, a length and the tokens
that end it, all drawn from one seed, each with a decoder of its own. Every output is compared with
the oracle, plain `model.generate`. Every few cases a probe, which is always the same generation, is
timed, and the memory of the process is read, less what its allocator holds back for later.
"""

import ctypes
import gc
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import psutil
import torch
from harness import SYSTEM, Setting, argument_parser, load, markdown, shown, write
from scipy import stats
from torch import Tensor

from dynatree.certify import oracle
from dynatree.decode import Decoder
from dynatree.errors import ConfigError, LosslessError, reporting
from dynatree.estimates import Floats
from dynatree.measure import first_difference, timed
from dynatree.progress import Progress
from dynatree.strategies import (
    Auto,
    Autoregressive,
    BestFirst,
    DynamicTree,
    Linear,
    StrategyBase,
    Tree,
)

MINUTES = 30.0
PROBE_EVERY = 5
"""Cases between two probes."""

WARM_UP = 0.2
"""Share of the time whose samples say nothing of a slope: allocators and caches still fill."""

LONGEST_PROMPT = 64
MEGABYTE = 1e6


@dataclass(frozen=True)
class Case:
    """One generation.

    Attributes:
        prompt: tokens.
        end_tokens: those that end it, beside `max_new_tokens`.
    """

    strategy: StrategyBase
    prompt: list[int]
    max_new_tokens: int
    end_tokens: list[int]


@dataclass(frozen=True)
class Sample:
    """What one probe found, `seconds` after the beginning."""

    seconds: float
    memory_bytes: int
    tokens_per_second: float


def _linear(draw: random.Random) -> StrategyBase:
    return Linear(num_draft_tokens=draw.randint(1, 8))


def _tree(draw: random.Random) -> StrategyBase:
    return Tree(
        depth=draw.randint(1, 8),
        branch_factor=draw.randint(1, 4),
        prune_threshold=draw.choice((0.0, 0.01, 0.05, 0.2)),
        node_budget=draw.choice((1, 5, 16, 64, 256)),
    )


def _dynamic(draw: random.Random) -> StrategyBase:
    b_min, b_mid, b_max = sorted(draw.randint(1, 4) for _ in range(3))
    d_base, d_max = sorted(draw.randint(1, 8) for _ in range(2))
    tau_low, tau_high = sorted(draw.random() for _ in range(2))
    rho_stop, rho_deep = sorted(draw.random() for _ in range(2))
    return DynamicTree(
        b_min=b_min,
        b_mid=b_mid,
        b_max=b_max,
        d_base=d_base,
        d_max=d_max,
        tau_low=tau_low,
        tau_high=tau_high,
        rho_stop=rho_stop,
        rho_deep=rho_deep,
        history=draw.random() < 0.5,
        node_budget=draw.choice((5, 64, 256)),
    )


def _best_first(draw: random.Random) -> StrategyBase:
    return BestFirst(
        max_depth=draw.randint(1, 8),
        width=draw.randint(1, 8),
        branch=draw.randint(1, 4),
        step_cost=draw.choice((0.0, 0.15, 0.5)),
        ngram=draw.random() < 0.5,
        node_budget=draw.choice((4, 32, 64)),
    )


STRATEGIES: tuple[Callable[[random.Random], StrategyBase], ...] = (
    lambda _: Autoregressive(),
    _linear,
    _tree,
    _dynamic,
    _best_first,
    lambda _: Auto(),
)


def drawn(draw: random.Random, text: Sequence[int], setting: Setting) -> Case:
    """A random case: its prompt is a piece of `text`, or of random tokens."""
    limit = setting.context or LONGEST_PROMPT + setting.spec.measure.max_new_tokens
    length = draw.randint(1, min(LONGEST_PROMPT, len(text), limit - 1))
    start = draw.randint(0, len(text) - length)
    prompt = list(text[start : start + length])
    if draw.random() < 0.5:
        vocab_size = setting.pair.target.config.get_text_config().vocab_size
        prompt = [draw.randrange(vocab_size) for _ in prompt]
    eos = setting.pair.tokenizer.eos_token_id
    end_tokens = [] if eos is None else [int(eos)]
    if draw.random() < 0.25:
        end_tokens.append(draw.choice(text))
    return Case(
        draw.choice(STRATEGIES)(draw),
        prompt,
        draw.randint(1, min(setting.spec.measure.max_new_tokens, limit - length)),
        end_tokens,
    )


def decoded(setting: Setting, case: Case) -> tuple[list[int], int | None]:
    """The new tokens of a case, and where they leave the oracle's; None if they do not."""
    pair = setting.pair
    prompt = torch.tensor(case.prompt, device=setting.device)
    expected, _ = oracle(pair.target, prompt, case.max_new_tokens, case.end_tokens)
    decoder = Decoder(
        pair.target,
        pair.draft,
        case.strategy,
        len(prompt) + case.max_new_tokens,
        setting.spec.models.runtime,
    )
    tokens = decoder.decode(prompt, case.max_new_tokens, case.end_tokens).tokens
    return tokens, None if tokens == expected else first_difference(tokens, expected)


def probe(setting: Setting) -> Callable[[float], Sample]:
    """A generation that is always the same, ready to be timed at a moment in seconds."""
    prompt: Tensor = setting.prompts[0]
    length, runtime = setting.spec.measure.max_new_tokens, setting.spec.models.runtime
    pair, strategy = setting.pair, setting.spec.strategy
    decoder = Decoder(pair.target, pair.draft, strategy, len(prompt) + length, runtime)
    process = psutil.Process()

    def sample(now: float) -> Sample:
        generation, seconds = timed(partial(decoder.decode, prompt, length), setting.device)
        give_back()
        return Sample(now, process.memory_info().rss, len(generation.tokens) / seconds)

    return sample


def give_back() -> None:
    """Returns memory that nobody holds to the system, so that what stays resident is in use.

    Otherwise the allocator keeps what it got for the largest case so far, and each that is a
    little larger looks like a leak.
    """
    gc.collect()
    # Of glibc; elsewhere memory is read as it is.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def measure(
    setting: Setting,
    minutes: float,
    seed: int,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Any]:
    """Decodes for `minutes`; returns what goes into the record.

    Raises:
        ConfigError: the time was too short for a slope.
    """
    draw = random.Random(seed)
    text = torch.cat(setting.prompts).tolist()
    sample = probe(setting)
    planned = max(1, round(60 * minutes))
    began, told, tokens = clock(), 0, 0
    samples: list[Sample] = []
    kinds: Counter[str] = Counter()
    divergences: list[dict[str, Any]] = []
    with Progress("soak", "seconds") as progress:
        for index in count():
            elapsed = clock() - began
            if elapsed >= 60 * minutes:
                break
            if index % PROBE_EVERY == 0:
                samples.append(sample(elapsed))
            case = drawn(draw, text, setting)
            output, departure = decoded(setting, case)
            kinds[case.strategy.model_dump()["strategy"]] += 1
            tokens += len(output)
            if departure is not None:
                facts = asdict(case) | {"strategy": case.strategy.model_dump(mode="json")}
                divergences.append({"case": index, "token": departure, **facts})
            second = min(int(clock() - began), planned)
            if second > told:
                told = second
                part = f"{index + 1} cases, {len(divergences)} diverged"
                progress.step(second, planned, progress.rate(tokens), part)
    seconds = clock() - began
    return {
        "minutes": minutes,
        "seed": seed,
        "seconds": seconds,
        "cases": kinds.total(),
        "cases_by_strategy": dict(sorted(kinds.items())),
        "tokens": tokens,
        "divergences": divergences,
        "warm_up_seconds": WARM_UP * seconds,
        **slopes(samples, WARM_UP * seconds),
        "samples": {
            name: [getattr(entry, name) for entry in samples]
            for name in ("seconds", "memory_bytes", "tokens_per_second")
        },
    }


def slopes(samples: Sequence[Sample], after: float) -> dict[str, Any]:
    """How memory and speed change per hour, from the samples `after` so many seconds.

    Raises:
        ConfigError: there are fewer than three.
    """
    late = [entry for entry in samples if entry.seconds >= after]
    if len(late) < 3:
        raise ConfigError(
            f"--minutes: only {len(late)} samples after the warm-up, and a slope needs 3; give more"
        )
    hours = np.array([entry.seconds for entry in late]) / 3600
    memory = np.array([entry.memory_bytes for entry in late]) / MEGABYTE
    speed = np.array([entry.tokens_per_second for entry in late])
    return {
        "memory_mb": float(np.median(memory)),
        "memory_mb_per_hour": slope(hours, memory),
        "tokens_per_second": float(np.median(speed)),
        "speed_percent_per_hour": slope(hours, 100 * speed / np.median(speed)),
    }


def slope(hours: Floats, values: Floats) -> dict[str, Any]:
    """Change per hour, with a 95 % interval: the median of the slopes of all pairs of samples.

    One sample that something else on the machine slowed down moves it little (Theil, 1950; Sen,
    1968).
    """
    found = stats.theilslopes(values, hours, alpha=0.95)
    interval = {"low": float(found.low_slope), "high": float(found.high_slope)}
    return {"value": float(found.slope), "interval": interval}


def table(measured: dict[str, Any]) -> str:
    """One row in Markdown."""
    memory, speed = measured["memory_mb_per_hour"], measured["speed_percent_per_hour"]
    header = (
        "minutes",
        "cases",
        "tokens compared",
        "outputs that differ from `generate`",
        "memory, MB",
        "memory, MB per hour",
        "speed, % per hour",
    )
    row = [
        f"{measured['seconds'] / 60:.1f}",
        str(measured["cases"]),
        str(measured["tokens"]),
        str(len(measured["divergences"])),
        f"{measured['memory_mb']:.0f}",
        shown(memory["value"], memory["interval"]),
        shown(speed["value"], speed["interval"]),
    ]
    return markdown(header, [row])


def main() -> None:
    """Entry point of the command."""
    parser = argument_parser(__doc__)
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    setting = load(arguments, SYSTEM)
    measured = measure(setting, arguments.minutes, arguments.seed)
    amount = f"up to {setting.spec.measure.max_new_tokens} new tokens per case"
    write("soak", setting, measured, table(measured), f"seed {arguments.seed}", amount)
    # The record is written first: it holds what is needed to look for the fault.
    if setting.exact and measured["divergences"]:
        first = measured["divergences"][0]
        raise LosslessError(
            f"{len(measured['divergences'])} outputs differ from the target's own greedy output, "
            f"the first that of case {first['case']} at token {first['token']}; in float32 that is "
            "a bug, and the record has the cases"
        )


if __name__ == "__main__":
    reporting(main)
