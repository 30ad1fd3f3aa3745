"""What all benchmarks share: options, loading, interleaved timing, ratios and the record.

Every method handles the same cases in the same process, in changing order, so that a ratio is one
of neighbours in time; see `dynatree.measure` for what is timed and `dynatree.estimates` for the
intervals.
"""

import argparse
import gc
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from dynatree.ablation import Estimate
from dynatree.config import load_config, parse_config
from dynatree.errors import LosslessError
from dynatree.estimates import Floats, estimate, geometric_mean, paired_ratios
from dynatree.facts import sealed
from dynatree.files import write_text
from dynatree.measure import first_difference, timed
from dynatree.pairs import Pair, load_models
from dynatree.provenance import provenance
from dynatree.sources import PACKAGE, source_digest
from dynatree.specs import RunSpec
from dynatree.workloads import encode_prompts

SYSTEM = "dynatree"
"""The configuration that is the full system."""

Case = TypeVar("Case")
Outcome = TypeVar("Outcome")


@dataclass(frozen=True)
class Setting:
    """What a benchmark runs on: the loaded pair, the prompts [L] on its device, the options.

    Attributes:
        spec: the configuration's own description of a run, with the command line's values.
        out: folder of the record.
    """

    spec: RunSpec
    pair: Pair
    prompts: list[Tensor]
    out: Path
    started: datetime

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        device: torch.device = self.pair.target.device
        return device

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, prompt and new ones."""
        return max(map(len, self.prompts)) + self.spec.measure.max_new_tokens

    @property
    def context(self) -> int | None:
        """Tokens that both models can hold; None when no configuration names a limit."""
        configs = [m.config.get_text_config() for m in (self.pair.target, self.pair.draft)]
        limits = [getattr(config, "max_position_embeddings", None) for config in configs]
        return min((limit for limit in limits if limit is not None), default=None)

    @property
    def exact(self) -> bool:
        """Whether equal outputs can be demanded: rounding decides near ties in 16 bits."""
        return self.spec.models.dtype == "float32"


@dataclass(frozen=True)
class Timings(Generic[Outcome]):
    """The timed calls of one method: seconds and outcomes, by case and then by run."""

    seconds: list[list[float]]
    outcomes: list[list[Outcome]]


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has; what is not given is as the configuration says."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", type=Path, default=Path("config.yaml"))
    parser.add_argument("--pair", help="a pair of the configuration")
    parser.add_argument("--device", help="auto, cpu or cuda")
    parser.add_argument("--runtime", help="of our decoder: auto, eager, compiled or cudagraph")
    parser.add_argument("--threads", type=positive, help="CPU threads; default: all cores")
    parser.add_argument("--runs", type=positive, help="timed passes over the prompts")
    parser.add_argument("--tokens", type=positive, help="new tokens per prompt")
    parser.add_argument("--prompts", type=positive, help="use only the first ones")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder")
    return parser


def positive(text: str) -> int:
    """A count on the command line, at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def load(arguments: argparse.Namespace, name: str) -> Setting:
    """Loads the pair and the prompts that the command line asks for.

    Args:
        arguments: of `argument_parser`.
        name: the configuration whose strategy `Setting.spec` holds.

    Raises:
        DynaTreeError: the configuration and the options cannot be run together.
    """
    started = datetime.now(UTC)
    data: dict[str, Any] = load_config(arguments.config).model_dump()
    data["pair"] = arguments.pair or data["pair"]
    models = data["pairs"].get(data["pair"])
    if models is not None:
        models |= _given(device=arguments.device, runtime=arguments.runtime)
        models["measure"] |= _given(runs=arguments.runs, max_new_tokens=arguments.tokens)
    spec = parse_config(data, "command line").spec(name)
    if arguments.prompts is not None:
        spec = spec.first(arguments.prompts)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    pair = load_models(spec.pair, spec.models)
    if pair.target.device.type == "cuda":
        # What is launched, captured and timed is on the current device.
        torch.cuda.set_device(pair.target.device)
    return Setting(spec, pair, encode_prompts(spec, pair), arguments.out, started)


def random_tokens(setting: Setting, count: int) -> Tensor:
    """int64 [count] on the device, any tokens of the vocabulary; the same for one seed."""
    generator = torch.Generator().manual_seed(setting.spec.measure.seed)
    vocabulary = setting.pair.target.config.get_text_config().vocab_size
    return torch.randint(vocabulary, (count,), generator=generator).to(setting.device)


def interleaved(
    methods: Mapping[str, Callable[[Case], Outcome]],
    cases: Sequence[Case],
    device: torch.device,
    runs: int,
    warmup: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Timings[Outcome]]:
    """Times every method on every case, `runs` times after `warmup` untimed passes.

    Args:
        progress: told after every pass.
    """
    timings: dict[str, Timings[Outcome]] = {
        name: Timings([[] for _ in cases], [[] for _ in cases]) for name in methods
    }
    # What is loaded by now stays until the end: out of the collector's sight, it does not have to
    # be walked before every call.
    gc.freeze()
    try:
        for run in range(-warmup, runs):
            for index, case in enumerate(cases):
                for name in order(list(methods), run, index):
                    outcome, seconds = timed(partial(methods[name], case), device)
                    if run >= 0:
                        timings[name].seconds[index].append(seconds)
                        timings[name].outcomes[index].append(outcome)
            progress(f"pass {run + 1} of {runs}" if run >= 0 else "warm-up pass")
    finally:
        gc.unfreeze()
    return timings


def order(names: list[str], run: int, case: int) -> list[str]:
    """The order of the methods for one case in one run.

    Every second run is the one before backwards, so that over two runs each of any two methods
    goes before the other, and the beginning moves on by one from case to case and every two runs.
    """
    shift = (case + run // 2) % len(names)
    rotated = names[shift:] + names[:shift]
    return rotated[::-1] if run % 2 else rotated


def throughput(timings: Timings[list[int]]) -> float:
    """New tokens per second: of each pass over the prompts in total, the median over passes."""
    tokens = np.array([[len(output) for output in runs] for runs in timings.outcomes])
    return float(np.median(tokens.sum(axis=0) / np.array(timings.seconds).sum(axis=0)))


def ratio(numerator: Timings[list[int]], denominator: Timings[list[int]]) -> Estimate:
    """How many times the tokens per second, paired by prompt and run; as `aggregate` does it."""
    paired = paired_ratios(_rates(numerator), _rates(denominator))
    return estimate(paired[:, None], geometric_mean)


def differences(
    timings: Mapping[str, Timings[list[int]]], reference: Sequence[list[int]], exact: bool
) -> dict[str, dict[int, int]]:
    """Where outputs differ from the reference: by method, prompt to first differing token.

    Raises:
        LosslessError: `exact` is asked for, and some output differs.
    """
    found: dict[str, dict[int, int]] = {
        name: {
            prompt: min(first_difference(output, reference[prompt]) for output in unequal)
            for prompt, outputs in enumerate(times.outcomes)
            if (unequal := [output for output in outputs if output != reference[prompt]])
        }
        for name, times in timings.items()
    }
    lines = [
        f"  {name}: prompt {prompt} at token {token}"
        for name, prompts in found.items()
        for prompt, token in prompts.items()
    ]
    if exact and lines:
        raise LosslessError(
            "these outputs differ from the target's own greedy output; in float32 that is a bug, "
            "and nothing was written:\n" + "\n".join(lines)
        )
    return found


def write(
    benchmark: str,
    setting: Setting,
    measured: Mapping[str, Any],
    table: str,
    scope: str | None = None,
    amount: str | None = None,
) -> None:
    """Writes the record of a benchmark and, beside it, its table; prints the table.

    Args:
        scope: what was run, for the caption; default: the prompts, all of them.
        amount: how much of it; default: so many timed runs and new tokens.
    """
    spec = setting.spec
    origin = provenance(setting.device, spec.measure.seed)
    record = {
        "benchmark": benchmark,
        "started": setting.started.isoformat(),
        "finished": datetime.now(UTC).isoformat(),
        "setting": {
            **spec.model_dump(mode="json", include={"pair", "models", "measure", "prompts"}),
            "pair_digest": setting.pair.digest,
            "prompt_tokens": [len(prompt) for prompt in setting.prompts],
        },
        # Of the engine, as results of runs hold it: a commit says nothing of a changed checkout.
        "source_digest": source_digest(PACKAGE / "measure.py"),
        **measured,
        "provenance": {"models": setting.pair.facts, **origin},
    }
    where = f"{origin['device']['name']}, {origin['device']['threads']} threads"
    versions = ", ".join(f"{name} {origin['versions'][name]}" for name in ("torch", "transformers"))
    scope = scope or f"{len(setting.prompts)} prompts"
    measure = spec.measure
    amount = amount or f"{measure.runs} timed runs, {measure.max_new_tokens} new tokens"
    caption = (
        f"Pair `{spec.pair}` in {spec.models.dtype}, runtime {spec.models.runtime}, on {where}; "
        f"{scope}, {amount}; {versions}."
    )
    text = f"{table}\n{caption}\n"
    name = f"{benchmark}-{spec.pair}-{setting.device.type}-{spec.models.runtime}"
    path = setting.out / name
    write_text(path.with_suffix(".json"), sealed(_json(record)))
    write_text(path.with_suffix(".md"), text)
    print(f"{text}\nwritten to {path}.json and .md")


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def shown(value: float, interval: Mapping[str, float] | None) -> str:
    """A value of a record and its interval, for a table."""
    if interval is None:
        return f"{value:.2f}"
    return f"{value:.2f} [{interval['low']:.2f}, {interval['high']:.2f}]"


def _given(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _rates(timings: Timings[list[int]]) -> Floats:
    """Tokens per second [prompts, runs]."""
    tokens = [[len(output) for output in runs] for runs in timings.outcomes]
    return np.asarray(np.array(tokens) / np.array(timings.seconds))


def _json(data: Any, depth: int = 0) -> str:
    """Indented JSON in which a list of plain values keeps to one line: records hold long ones."""
    inner = "\n" + " " * (depth + 1)
    outer = "\n" + " " * depth
    if isinstance(data, dict) and data:
        items = [f"{json.dumps(key)}: {_json(value, depth + 1)}" for key, value in data.items()]
        return "{" + inner + ("," + inner).join(items) + outer + "}"
    if isinstance(data, list) and any(isinstance(value, dict | list) for value in data):
        items = [_json(value, depth + 1) for value in data]
        return "[" + inner + ("," + inner).join(items) + outer + "]"
    return json.dumps(data, allow_nan=False)


@contextmanager
def replaced(owner: object, name: str, value: object) -> Iterator[None]:
    """Gives an object another attribute for a while, and leaves none behind that it had not."""
    had = name in vars(owner)
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if had:
            setattr(owner, name, before)
        else:
            delattr(owner, name)
