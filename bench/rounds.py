"""Where a round's time goes, against the size of the tree and the length of the context.

The phases of a round and the forwards in them are timed inside ordinary generations. On a CPU the
host runs all of it, and the overhead is what lies outside the models' forwards. On CUDA the times
are of the device's own clock, and the overhead is what lies between one phase and the next.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from harness import (
    SYSTEM,
    Setting,
    Timings,
    argument_parser,
    differences,
    interleaved,
    load,
    markdown,
    positive,
    replaced,
    write,
)
from torch import Tensor

from dynatree.clock import PhaseClock
from dynatree.decode import Decoder, Stats
from dynatree.errors import ConfigError, reporting
from dynatree.strategies import Autoregressive, Linear, StrategyBase, Tree

CONTEXTS = (128, 256, 448, 1000, 2000)
BUDGETS = (16, 64, 256)
NEW_TOKENS = 48
"""Short of the workload's own, so that the context stays near the length that is asked for."""

PARTS = {
    "cpu": {
        "draft_forwards": "draft forwards",
        "verify_forward": "verify forward",
        "grow": "grow",
        "verify": "mask and argmax",
        "commit": "select and gather",
        "host": "other host",
    },
    "cuda": {
        "grow": "draft",
        "verify": "verify",
        "commit": "select and gather",
        "host": "host",
    },
}
"""What the time of a round is split into, by kind of device, and what the table calls it."""

OVERHEAD = {"cpu": ("grow", "verify", "commit", "host"), "cuda": ("host",)}
"""The parts that are host overhead. On CUDA the others are the device's time, gaps included."""


@dataclass(frozen=True)
class Sample:
    """One generation after its prefill.

    Attributes:
        parts: seconds by part; they add up to the time of all rounds.
        nodes: draft nodes verified, in all rounds.
    """

    tokens: list[int]
    rounds: int
    nodes: int
    parts: dict[str, float]

    @property
    def seconds(self) -> float:
        """Of all rounds."""
        return sum(self.parts.values())


def observe(decoder: Decoder, new_tokens: int, prompt: Tensor) -> Sample:
    """Decodes `new_tokens` (at least 2) tokens and splits the time of the rounds.

    The end of sequence does not end it, so that all generations are equally long.
    """
    kind = decoder.runtime.device.type
    clock = PhaseClock(decoder.runtime.device)
    stats = Stats()
    with watched(decoder, clock):
        chunks = decoder.stream(prompt, new_tokens, stats=stats)
        # The first token comes out of the prefill, and has been read: the device is idle.
        tokens = next(chunks)
        clock.start()
        for chunk in chunks:
            tokens = tokens + chunk
        clock.mark("host")
    found = clock.seconds()
    parts = {part: found.pop(part, 0.0) for part in PARTS[kind]}
    assert not found, f"unknown phases {', '.join(found)}"
    return Sample(tokens, len(stats.rounds), stats.drafted_nodes, parts)


@contextmanager
def watched(decoder: Decoder, clock: PhaseClock) -> Iterator[None]:
    """Marks on `clock` where phases, and on a CPU forwards, begin and end."""
    runtime = decoder.runtime
    run = runtime.run
    phase = "host"

    def marked(key: tuple[object, ...], body: Callable[[], None]) -> None:
        nonlocal phase
        clock.mark("host")
        # To catch up with rounds that had no draft is drafting, too.
        phase = "grow" if key[0] == "catch_up" else str(key[0])
        run(key, body)
        clock.mark(phase)
        phase = "host"

    def timed(call: Callable[..., Any], part: str) -> Callable[..., Any]:
        def forward(**inputs: Any) -> Any:
            clock.mark(phase)
            output = call(**inputs)
            clock.mark(part)
            return output

        return forward

    with ExitStack() as stack:
        stack.enter_context(replaced(runtime, "run", marked))
        if runtime.device.type == "cpu":
            # Elsewhere a call returns before the device has done the work, and a replayed graph
            # makes none. What the runner calls has no public name.
            runners = {"verify_forward": decoder._target}
            if decoder._drafter is not None:
                runners["draft_forwards"] = decoder._drafter.runner
            for part, runner in runners.items():
                stack.enter_context(replaced(runner, "_call", timed(runner._call, part)))
        yield


def summary(samples: Sequence[Sequence[Sample]], kind: str) -> dict[str, Any]:
    """What the samples, by prompt and run, say of a round, with all of their times.

    Of the runs of each prompt, the one with the median time stands for all, so that its parts add
    up; of an even number, the faster of the middle two.
    """
    chosen = [
        sorted(runs, key=lambda sample: sample.seconds)[(len(runs) - 1) // 2] for runs in samples
    ]
    rounds = sum(sample.rounds for sample in chosen)
    seconds = sum(sample.seconds for sample in chosen)
    parts = {part: sum(sample.parts[part] for sample in chosen) for part in PARTS[kind]}
    overhead = sum(parts[part] for part in OVERHEAD[kind])
    return {
        "nodes_per_round": sum(sample.nodes for sample in chosen) / rounds,
        # The first token of each comes from the prefill.
        "tokens_per_round": sum(len(sample.tokens) - 1 for sample in chosen) / rounds,
        "ms_per_round": 1e3 * seconds / rounds,
        "parts": {
            part: {"ms": 1e3 * spent / rounds, "percent": 100 * spent / seconds}
            for part, spent in parts.items()
        },
        "overhead_ms": 1e3 * overhead / rounds,
        "overhead_percent": 100 * overhead / seconds,
        "rounds": [[sample.rounds for sample in runs] for runs in samples],
        "nodes": [[sample.nodes for sample in runs] for runs in samples],
        "seconds": {
            part: [[sample.parts[part] for sample in runs] for runs in samples]
            for part in PARTS[kind]
        },
    }


def strategies(system: StrategyBase, budgets: Sequence[int]) -> dict[str, StrategyBase]:
    """What is measured, from no draft to the largest tree."""
    return {
        "ar": Autoregressive(),
        "linear_k4": Linear(num_draft_tokens=4),
        SYSTEM: system,
        **{f"tree_{budget}": Tree(prune_threshold=0.0, node_budget=budget) for budget in budgets},
    }


def fitting(setting: Setting, contexts: Sequence[int], option: str = "--contexts") -> list[int]:
    """The contexts, given by `option`, that leave room for the new tokens.

    Raises:
        ConfigError: none does, or the only new token is that of the prefill.
    """
    new, limit = setting.spec.measure.max_new_tokens, setting.context
    if new < 2:
        raise ConfigError(f"--tokens {new}: the first comes from the prefill; give at least 2")
    fit = [context for context in contexts if limit is None or context + new <= limit]
    if not fit:
        raise ConfigError(
            f"{option}: the models hold {limit} tokens, {new} of them new ones; give at most "
            f"{(limit or 0) - new}, or fewer --tokens"
        )
    return fit


def text(prompts: Sequence[Tensor], length: int) -> list[Tensor]:
    """The text of all prompts, repeated and cut to `length`, beginning with each of them once."""
    everything = torch.cat(list(prompts))
    starts = [sum(map(len, prompts[:index])) for index in range(len(prompts))]
    times = -(-length // len(everything))
    return [everything.roll(-start).repeat(times)[:length] for start in starts]


def measure(setting: Setting, contexts: Sequence[int], budgets: Sequence[int]) -> dict[str, Any]:
    """Measures every strategy at every context; returns what goes into the record.

    Raises:
        LosslessError: in float32 two strategies give different outputs.
    """
    spec, pair, kind = setting.spec, setting.pair, setting.device.type
    new = spec.measure.max_new_tokens
    chosen = strategies(spec.strategy, budgets)
    decoders = {
        name: Decoder(
            pair.target, pair.draft, strategy, max(contexts) + new, runtime=spec.models.runtime
        )
        for name, strategy in chosen.items()
    }
    for decoder in decoders.values():
        decoder.prepare()
    cases = [prompt for context in contexts for prompt in text(setting.prompts, context)]
    timings = interleaved(
        {name: partial(observe, decoder, new) for name, decoder in decoders.items()},
        cases,
        setting.device,
        runs=spec.measure.runs,
        warmup=spec.measure.warmup,
        progress=lambda state: print(f"measuring: {state}", flush=True),
    )
    outputs = {
        name: Timings(
            times.seconds, [[sample.tokens for sample in runs] for runs in times.outcomes]
        )
        for name, times in timings.items()
    }
    reference = [runs[0] for runs in outputs["ar"].outcomes]
    unequal = differences(outputs, reference, setting.exact)
    count = len(setting.prompts)
    return {
        "contexts": list(contexts),
        "prompt_text": "the workload's prompts joined, repeated and cut to the context's length",
        "parts": PARTS[kind],
        "overhead": list(OVERHEAD[kind]),
        "strategies": {
            name: {
                "label": strategy.describe(),
                "unequal_to_ar": len(unequal[name]),
                "contexts": {
                    str(context): summary(
                        timings[name].outcomes[index * count : (index + 1) * count], kind
                    )
                    for index, context in enumerate(contexts)
                },
            }
            for name, strategy in chosen.items()
        },
    }


def table(measured: Mapping[str, Any]) -> str:
    """A row per context and strategy, in Markdown."""
    names = measured["parts"]
    rows = []
    for context in map(str, measured["contexts"]):
        for name, facts in measured["strategies"].items():
            found = facts["contexts"][context]
            parts = (found["parts"][part] for part in names)
            rows.append(
                [
                    context,
                    f"`{name}`",
                    f"{found['nodes_per_round']:.1f}",
                    f"{found['tokens_per_round']:.2f}",
                    f"{found['ms_per_round']:.3f}",
                    *(f"{part['ms']:.3f} ({part['percent']:.1f} %)" for part in parts),
                    f"{found['overhead_percent']:.1f} %",
                ]
            )
    heads = ("context", "strategy", "nodes", "tokens", "round, ms", *names.values(), "overhead")
    counted = ", ".join(names[part] for part in measured["overhead"])
    return markdown(heads, rows) + (
        f"\nNodes, tokens and times are per round. Overhead is the time of a round spent in: "
        f"{counted}.\n"
    )


def main() -> None:
    """Entry point of the command."""
    parser = argument_parser(__doc__)
    parser.set_defaults(tokens=NEW_TOKENS)
    parser.add_argument("--contexts", type=positive, nargs="+", default=CONTEXTS, help="tokens")
    parser.add_argument("--budgets", type=positive, nargs="+", default=BUDGETS, help="of trees")
    arguments = parser.parse_args()
    setting = load(arguments, SYSTEM)
    measured = measure(setting, fitting(setting, arguments.contexts), arguments.budgets)
    scope = f"texts per context: {len(setting.prompts)}"
    write("rounds", setting, measured, table(measured), scope)


if __name__ == "__main__":
    reporting(main)
