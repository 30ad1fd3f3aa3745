"""How near one forward comes to the time in which its bytes can be read at all.

The floor is what must be read (the weights, and the KV entries of the context) over the measured
copy bandwidth of the device. What is timed is what the engine runs: the verification phase of its
rounds, and one level of drafting, each repeated at one position of a filled cache.
"""

import gc
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from harness import (
    SYSTEM,
    Setting,
    argument_parser,
    interleaved,
    load,
    markdown,
    positive,
    random_tokens,
    write,
)
from rounds import observe, summary
from torch import Tensor, nn
from transformers import PreTrainedModel

from dynatree.decode import Decoder
from dynatree.errors import ConfigError, reporting
from dynatree.pairs import Pair
from dynatree.runner import ModelRunner
from dynatree.strategies import Autoregressive, StrategyBase, Tree

CONTEXT = 1000
RUNS = 20
REPEATS = {"cpu": 3, "cuda": 20}
"""Calls per timing, so that on CUDA waiting for the device once does not count."""
COPY_MIB = {"cpu": 512, "cuda": 1024}
"""Far beyond the last-level cache."""

NODES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
WIDTHS = (1, 4, 16)

FULL = Tree(depth=8, branch_factor=2, prune_threshold=1e-300, node_budget=NODES[-1] - 1)
"""Grows every node it may. A threshold that no path falls under still costs what pruning does."""


@dataclass(frozen=True)
class Step:
    """A forward of `nodes` tokens to time.

    Attributes:
        role: of the model, target or draft.
        run: replays it where graphs are captured.
    """

    role: str
    nodes: int
    run: Callable[[], None]


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of the weights that every forward reads: of embeddings only a few rows are.

    A tied embedding counts once, as the output layer.
    """
    output = model.get_output_embeddings()
    looked_up = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        and (output is None or module.weight is not output.weight)
    }
    return sum(
        weight.numel() * weight.element_size()
        for weight in model.parameters()
        if id(weight) not in looked_up
    )


def kv_bytes(runner: ModelRunner) -> int:
    """Bytes of one token's keys and values in a cache that was used."""
    storage = runner.cache.storage
    assert storage is not None
    return storage.numel() * storage.element_size() // runner.cache.capacity


def primed(setting: Setting, strategy: StrategyBase, prompt: Tensor) -> Decoder:
    """A decoder that has read the prompt and waits for its first round, nothing captured yet."""
    pair = setting.pair
    decoder = Decoder(
        pair.target, pair.draft, strategy, len(prompt) + 1, runtime=setting.spec.models.runtime
    )
    # `stream` would do the same, and then prepare far more than is timed here.
    with torch.inference_mode():
        decoder._prefill(prompt)
    return decoder


def verification(decoder: Decoder, nodes: int, context: int) -> tuple[Any, Callable[[], None]]:
    """The phase that verifies `nodes` nodes, the root included; it leaves the position as it is."""
    visible = decoder.runtime.visible(context + nodes)
    return ("verify", nodes, visible), partial(decoder._verify_phase, nodes, visible)


def draft_level(decoder: Decoder, width: int, context: int) -> tuple[Any, Callable[[], None]]:
    """One level of `Drafter.grow`: the forward of a level's nodes, and the choice of the next."""
    drafter, position = decoder._drafter, decoder._position
    assert drafter is not None
    tree = drafter._grown
    # In a full binary tree the level d begins at node 2^d - 1, and has 2^d nodes.
    nodes, depth = slice(width - 1, 2 * width - 1), width.bit_length() - 1
    visible = decoder.runtime.visible(context + nodes.stop)
    columns = tree.columns(torch.arange(1, visible + 1, device=position.device), position)
    levels, deeper, size = tree._levels[:depth], tree._levels[depth + 1 :], tree.size
    above = levels[-1] if levels else tree._root

    def level() -> None:
        logits = drafter.runner.forward(
            above.tokens,
            (position + depth).repeat(width),
            tree.indices[nodes] + position,
            above.attention_mask(columns, None),
        )
        # The next level is grown again, in the place of the last time's.
        tree._levels[:], tree.size = levels, nodes.stop
        drafter._extend(None, above.log_probs, logits, 2 * width, depth + 1)
        tree._levels += deeper
        tree.size = size

    return ("draft", width, visible), level


def steps(setting: Setting, prompt: Tensor) -> tuple[dict[str, Step], dict[str, int]]:
    """All forwards to time, compiled and captured, and the KV bytes of a token by model."""
    context = len(prompt)
    alone = primed(setting, Autoregressive(), prompt)
    full = primed(setting, FULL, prompt)
    drafter = full._drafter
    assert drafter is not None
    with torch.inference_mode():
        # The nodes to verify.
        full._grow_phase(0, FULL.max_depth, full.runtime.visible(context + drafter.span))
    phases = {
        "one token": ("target", 1, alone, verification(alone, 1, context)),
        **{
            f"verify {count}": ("target", count, full, verification(full, count, context))
            for count in NODES
        },
        **{
            f"draft {width}": ("draft", width, full, draft_level(full, width, context))
            for width in WIDTHS
        },
    }
    found = {}
    for decoder in (alone, full):
        mine = dict(phase for _, _, owner, phase in phases.values() if owner is decoder)
        with torch.inference_mode():
            decoder.runtime.prepare(mine, partial(decoder._position.fill_, context))
    for name, (role, count, decoder, phase) in phases.items():
        found[name] = Step(role, count, partial(decoder.runtime.run, *phase))
    return found, {"target": kv_bytes(full._target), "draft": kv_bytes(drafter.runner)}


def copying(device: torch.device, size: int) -> Callable[[], None]:
    """A copy of `size` bytes from one buffer on the device to another."""
    # Not zeros, which some devices move faster.
    source = torch.empty(size // 4, device=device).uniform_()
    destination = torch.zeros_like(source)

    def copy() -> None:
        destination.copy_(source)

    return copy


def repeated(run: Callable[[], None], times: int) -> None:
    """Calls `run` several times."""
    with torch.inference_mode():
        for _ in range(times):
            run()


def memory(pair: Pair, decoders: Iterable[Decoder], device: torch.device) -> dict[str, int]:
    """Bytes of the weights and of the caches; on CUDA also the most ever in use, and held."""
    tensors = {
        tensor.data_ptr(): tensor
        for model in (pair.target, pair.draft)
        for tensor in (*model.parameters(), *model.buffers())
    }
    caches = [
        runner.cache.storage
        for decoder in decoders
        for _, runner in decoder._runners()
        if runner.cache.storage is not None
    ]
    found = {
        "weights": sum(tensor.nbytes for tensor in tensors.values()),
        "caches": sum(cache.nbytes for cache in caches),
    }
    if device.type == "cuda":
        found["peak_in_use"] = torch.cuda.max_memory_allocated(device)
        found["peak_held"] = torch.cuda.max_memory_reserved(device)
    return found


def measure(setting: Setting, context: int, copy_bytes: int, repeats: int) -> dict[str, Any]:
    """Times copies, forwards and whole generations; returns what goes into the record."""
    spec, pair, kind = setting.spec, setting.pair, setting.device.type
    runs, warmup = spec.measure.runs, spec.measure.warmup
    new = spec.measure.max_new_tokens
    prompt = random_tokens(setting, context)
    forwards, kv = steps(setting, prompt)
    calls = {"copy": copying(setting.device, copy_bytes)}
    calls |= {name: step.run for name, step in forwards.items()}
    timings = interleaved(
        {name: partial(repeated, run) for name, run in calls.items()},
        [repeats],
        setting.device,
        runs=runs,
        warmup=warmup,
        progress=lambda state: print(f"forwards: {state}", flush=True),
    )
    seconds = {name: times.seconds[0] for name, times in timings.items()}
    each = {name: float(np.median(of)) / repeats for name, of in seconds.items()}
    bandwidth = 2 * copy_bytes / each["copy"]
    weights = {"target": weight_bytes(pair.target), "draft": weight_bytes(pair.draft)}
    read = {role: weights[role] + kv[role] * context for role in weights}
    facts = {
        name: {
            "model": step.role,
            "nodes": step.nodes,
            "bytes": read[step.role],
            "floor_ms": 1e3 * read[step.role] / bandwidth,
            "ms": 1e3 * each[name],
            "fraction": read[step.role] / bandwidth / each[name],
            "seconds": seconds[name],
        }
        for name, step in forwards.items()
    }
    # What follows is as in use, without what was only timed.
    del forwards, calls, timings
    gc.collect()
    if kind == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    strategies = {"ar": Autoregressive(), SYSTEM: spec.strategy}
    decoders = {
        name: Decoder(pair.target, pair.draft, strategy, context + new, runtime=spec.models.runtime)
        for name, strategy in strategies.items()
    }
    for decoder in decoders.values():
        decoder.prepare()
    generations = interleaved(
        {name: partial(observe, decoder, new) for name, decoder in decoders.items()},
        [prompt],
        setting.device,
        runs=runs,
        warmup=warmup,
        progress=lambda state: print(f"generations: {state}", flush=True),
    )
    rounds = {name: summary(times.outcomes, kind) for name, times in generations.items()}
    # The context grows as it is generated: the floor is that of the middle.
    middle = read["target"] + kv["target"] * new / 2
    rounds["ar"]["fraction"] = middle / bandwidth / (rounds["ar"]["ms_per_round"] / 1e3)
    return {
        "context": context,
        "prompt_text": "random tokens",
        "repeats": repeats,
        "weight_bytes": weights,
        "kv_bytes_per_token": kv,
        "copy": {
            "buffer_bytes": copy_bytes,
            "bytes_per_second": bandwidth,
            "seconds": seconds["copy"],
        },
        "steps": facts,
        "generations": rounds,
        "preparation": {
            name: asdict(decoder.runtime.preparation) for name, decoder in decoders.items()
        },
        "memory": memory(pair, decoders.values(), setting.device),
    }


def table(measured: Mapping[str, Any]) -> str:
    """The forwards and the generations of a record, in Markdown."""
    one = measured["steps"]["one token"]["ms"]
    forwards = [
        [
            name,
            f"{facts['bytes'] / 1e6:.1f}",
            f"{facts['floor_ms']:.3f}",
            f"{facts['ms']:.3f}",
            f"{100 * facts['fraction']:.0f} %",
            f"{facts['ms'] / one:.2f}" if facts["model"] == "target" else "",
        ]
        for name, facts in measured["steps"].items()
    ]
    generations = [
        [
            f"`{name}`",
            f"{facts['ms_per_round']:.3f}",
            f"{1e3 * facts['tokens_per_round'] / facts['ms_per_round']:.1f}",
            f"{100 * facts['fraction']:.0f} %" if "fraction" in facts else "",
            f"{facts['overhead_ms']:.3f} ({facts['overhead_percent']:.1f} %)",
        ]
        for name, facts in measured["generations"].items()
    ]
    copy = measured["copy"]
    found = measured["memory"]
    used = ""
    if "peak_held" in found:
        needed = found["weights"] + found["caches"]
        used = (
            f"\nMemory of the generations: {needed / 1e9:.2f} GB of weights and caches; at most "
            f"{found['peak_in_use'] / needed:.3f} times that in use, "
            f"{found['peak_held'] / needed:.3f} times held.\n"
        )
    return "\n".join(
        (
            markdown(
                ("forward", "MB to read", "floor, ms", "measured, ms", "achieved", "of one token"),
                forwards,
            ),
            markdown(
                ("rounds of", "ms per round", "tokens/s", "achieved", "host, ms per round"),
                generations,
            ),
            f"Copies of {copy['buffer_bytes'] / 2**20:.0f} MiB: "
            f"{copy['bytes_per_second'] / 1e9:.1f} GB/s, read and written. Weights kept in a "
            f"cache between forwards can pass the floor.\n{used}",
        )
    )


def room(setting: Setting, context: int) -> int:
    """The context to measure at: as asked for, or what the models hold besides the new tokens.

    Raises:
        ConfigError: that is nothing, or the only new token is that of the prefill.
    """
    new = setting.spec.measure.max_new_tokens
    if new < 2:
        raise ConfigError(f"--tokens {new}: the first comes from the prefill; give at least 2")
    if setting.context is None:
        return context
    # The deepest node stands that far behind the root.
    left = setting.context - max(new, FULL.max_depth + 1)
    if left < 1:
        raise ConfigError(
            f"--tokens {new}: the models hold {setting.context} tokens, which leaves no context; "
            "give fewer"
        )
    return min(context, left)


def main() -> None:
    """Entry point of the command."""
    parser = argument_parser(__doc__)
    parser.set_defaults(runs=RUNS)
    parser.add_argument("--context", type=positive, default=CONTEXT, help="tokens in the cache")
    parser.add_argument("--repeats", type=positive, help="calls per timing of a forward")
    parser.add_argument("--copy-mib", type=positive, help="size of the buffers that are copied")
    arguments = parser.parse_args()
    setting = load(arguments, SYSTEM)
    kind = setting.device.type
    context = room(setting, arguments.context)
    measured = measure(
        setting,
        context,
        (arguments.copy_mib or COPY_MIB[kind]) * 2**20,
        arguments.repeats or REPEATS[kind],
    )
    write("roofline", setting, measured, table(measured), f"context {context}")


if __name__ == "__main__":
    reporting(main)
