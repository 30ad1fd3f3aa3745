"""Our decoder against the decoding modes of Transformers: same models, prompts, lengths and EOS.

Where a method has a number to choose, a first pass over the prompts chooses it, of theirs as of
ours, and the main part measures the chosen ones anew, so that no ratio profits from the choice.
Every output is compared with that of plain `model.generate`.
"""

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from harness import (
    SYSTEM,
    Setting,
    argument_parser,
    differences,
    interleaved,
    load,
    markdown,
    positive,
    ratio,
    replaced,
    shown,
    throughput,
    write,
)
from rounds import fitting, text
from torch import Tensor
from transformers import GenerationConfig, StaticCache
from transformers.utils import is_sklearn_available

from dynatree.decode import Decoder
from dynatree.errors import reporting
from dynatree.strategies import Autoregressive, Linear, StrategyBase, Tree

SYSTEM_PRUNING: dict[str, tuple[tuple[float, int], ...]] = {
    "cpu": (),
    "cuda": ((0.001, 31), (0.0, 31), (0.001, 63), (0.0, 63)),
}
"""Thresholds and node budgets that are tried beside the configured ones where these were not chosen
on such a device: what the best is depends on what a node costs."""

LINEAR_TOKENS = {"cpu": (2, 3, 4, 6, 8), "cuda": (4, 6, 8, 10)}
ASSISTANT_TOKENS = (2, 3, 4, 6, 8)
LOOKUP_TOKENS = (2, 4, 8, 16)

CHOOSING_RUNS = 2
"""Timed passes of a choice; the better it is, the stronger are the methods compared with."""

METHODS = (
    "ar",
    "linear",
    SYSTEM,
    "generate",
    "generate_compiled",
    "assistant",
    "assistant_tuned",
    "prompt_lookup",
)
"""In the order of the table; `generate_compiled` is there only where it can be had."""

RATIOS = (
    ("ar", "generate"),
    ("ar", "generate_compiled"),
    ("linear", "ar"),
    (SYSTEM, "generate"),
    (SYSTEM, "generate_compiled"),
    (SYSTEM, "assistant"),
    (SYSTEM, "assistant_tuned"),
    (SYSTEM, "prompt_lookup"),
    (SYSTEM, "ar"),
    (SYSTEM, "linear"),
)


@dataclass(frozen=True)
class Method:
    """One way to decode.

    Attributes:
        label: what it is, in words.
        decode: from a prompt [L] to its new tokens.
    """

    label: str
    decode: Callable[[Tensor], list[int]]


def ours(setting: Setting, strategy: StrategyBase, label: str) -> Method:
    """Our decoder, compiled and captured before any timing."""
    spec, pair = setting.spec, setting.pair
    decoder = Decoder(
        pair.target, pair.draft, strategy, setting.longest, runtime=spec.models.runtime
    )
    decoder.prepare()

    def decode(prompt: Tensor) -> list[int]:
        return decoder.decode(
            prompt, spec.measure.max_new_tokens, pair.tokenizer.eos_token_id
        ).tokens

    return Method(label, decode)


def generate(setting: Setting, label: str, options: Mapping[str, Any], **inputs: Any) -> Method:
    """`model.generate`, greedy; `options` go into its configuration, `inputs` into the call."""
    eos = setting.pair.tokenizer.eos_token_id
    # The whole configuration and the attention mask are given, so that nothing has to be guessed
    # and `generate` has nothing to warn about.
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=setting.spec.measure.max_new_tokens,
        eos_token_id=eos,
        pad_token_id=0 if eos is None else eos,
        **options,
    )
    target = setting.pair.target

    def decode(prompt: Tensor) -> list[int]:
        ids = prompt[None]
        output = target.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=config, **inputs
        )
        tokens: list[int] = output[0, len(prompt) :].tolist()
        return tokens

    return Method(label, decode)


def assisted(setting: Setting, label: str, options: Mapping[str, Any]) -> Method:
    """`generate` with the draft as `assistant_model`, whose configuration holds the options."""
    draft = setting.pair.draft
    # One configuration for all calls, as a user has it: some schedules go on from the last call.
    config = copy.deepcopy(draft.generation_config)
    config.update(**options)
    plain = generate(setting, label, {}, assistant_model=draft)

    def decode(prompt: Tensor) -> list[int]:
        with replaced(draft, "generation_config", config):
            return plain.decode(prompt)

    return Method(label, decode)


def compiled_peers(setting: Setting) -> dict[str, Method]:
    """Plain generation with a compiled forward: on CUDA, and on a CPU when ours is compiled too."""
    target, longest = setting.pair.target, setting.longest
    static = {"cache_implementation": "static", "max_cache_len": longest}
    if setting.device.type == "cuda":
        # Transformers compiles by itself on CUDA when the cache is static.
        cache = StaticCache(config=target.config.get_text_config(), max_cache_len=longest)
        kept = generate(setting, "compiled, static cache kept", {}, past_key_values=cache)

        def decode(prompt: Tensor) -> list[int]:
            cache.reset()
            return kept.decode(prompt)

        return {
            "static": generate(setting, "compiled, new static cache per call", static),
            "kept": Method(kept.label, decode),
        }
    if setting.spec.models.runtime != "compiled":
        return {}
    forward = torch.compile(target.forward, dynamic=True)
    plain = generate(setting, "compiled, static cache", static)

    def decode_compiled(prompt: Tensor) -> list[int]:
        with replaced(target, "forward", forward):
            return plain.decode(prompt)

    return {"static": Method(plain.label, decode_compiled)}


def systems(setting: Setting) -> dict[str, Method]:
    """The full system with each way to prune."""
    configured = setting.spec.strategy
    strategies = {"configured": configured}
    if isinstance(configured, Tree):
        strategies = {f"{configured.prune_threshold:g}": configured}
        for threshold, budget in SYSTEM_PRUNING[setting.device.type]:
            update = {"prune_threshold": threshold, "node_budget": budget}
            strategies[f"{threshold:g} budget {budget}"] = configured.model_copy(update=update)
    return {
        value: ours(setting, strategy, f"ours, {strategy.describe()}")
        for value, strategy in strategies.items()
    }


def candidates(setting: Setting, wanted: Collection[str]) -> dict[str, dict[str, Method]]:
    """The `wanted` methods that are chosen among: by family, then by the value of the choice."""
    families: dict[str, Callable[[], dict[str, Method]]] = {
        SYSTEM: lambda: systems(setting),
        "linear": lambda: {
            str(count): ours(setting, Linear(num_draft_tokens=count), f"ours, linear, K = {count}")
            for count in LINEAR_TOKENS[setting.device.type]
        },
        "assistant_tuned": lambda: {
            str(count): assisted(
                setting,
                f"num_assistant_tokens {count}, constant, no confidence threshold",
                {
                    "num_assistant_tokens": count,
                    "num_assistant_tokens_schedule": "constant",
                    "assistant_confidence_threshold": 0.0,
                },
            )
            for count in ASSISTANT_TOKENS
        },
        "prompt_lookup": lambda: {
            str(count): generate(
                setting, f"prompt_lookup_num_tokens {count}", {"prompt_lookup_num_tokens": count}
            )
            for count in LOOKUP_TOKENS
        },
        "generate_compiled": lambda: compiled_peers(setting),
    }
    made = {family: make() for family, make in families.items() if family in wanted}
    return {family: methods for family, methods in made.items() if methods}


def choose(
    setting: Setting, family: str, choices: Mapping[str, Method], reference: list[list[int]]
) -> tuple[str, dict[str, Any]]:
    """Times the candidates of a family; returns the value of the fastest, and a record of all."""
    decodes = {value: method.decode for value, method in choices.items()}
    # One generation each to compile and to warm up: the choice needs less than the main part.
    interleaved(decodes, setting.prompts[:1], setting.device, runs=1)
    timings = interleaved(
        decodes,
        setting.prompts,
        setting.device,
        runs=CHOOSING_RUNS,
        progress=lambda state: print(f"choosing {family}: {state}", flush=True),
    )
    differences(
        {f"{family} {value}": times for value, times in timings.items()}, reference, setting.exact
    )
    rates = {value: throughput(times) for value, times in timings.items()}
    chosen = max(rates, key=lambda value: rates[value])
    record = {
        "chosen": chosen,
        "candidates": {
            value: {
                "label": choices[value].label,
                "tokens_per_second": rates[value],
                "seconds": times.seconds,
            }
            for value, times in timings.items()
        },
    }
    return chosen, record


def measure(setting: Setting, wanted: Collection[str]) -> dict[str, Any]:
    """Chooses, measures and compares the `wanted` methods; returns what goes into the record.

    Raises:
        LosslessError: in float32 the output of some method differs from plain generation.
    """
    plain = generate(setting, "plain greedy", {})
    reference = [plain.decode(prompt) for prompt in setting.prompts]
    methods = {
        "ar": ours(setting, Autoregressive(), "ours, autoregressive"),
        "generate": plain,
        "assistant": assisted(setting, "the draft as assistant_model, its defaults", {}),
    }
    methods = {name: method for name, method in methods.items() if name in wanted}
    choices: dict[str, Any] = {}
    for family, among in candidates(setting, wanted).items():
        if len(among) == 1:
            methods[family] = next(iter(among.values()))
            continue
        chosen, choices[family] = choose(setting, family, among, reference)
        methods[family] = among[chosen]
    timings = interleaved(
        {name: methods[name].decode for name in METHODS if name in methods},
        setting.prompts,
        setting.device,
        runs=setting.spec.measure.runs,
        warmup=setting.spec.measure.warmup,
        progress=lambda state: print(f"measuring: {state}", flush=True),
    )
    unequal = differences(timings, reference, setting.exact)
    return {
        "methods": {
            name: {
                "label": methods[name].label,
                "tokens_per_second": throughput(times),
                "unequal": [
                    {"prompt": prompt, "token": token} for prompt, token in unequal[name].items()
                ],
                "seconds": times.seconds,
                "tokens": [[len(output) for output in outputs] for outputs in times.outcomes],
            }
            for name, times in timings.items()
        },
        "ratios": [
            {"of": of, "to": to, **ratio(timings[of], timings[to]).model_dump()}
            for of, to in RATIOS
            if of in timings and to in timings
        ],
        "choices": choices,
        "reference": reference,
        # Where scikit-learn is installed, the assistant's default threshold adapts as it goes.
        "scikit_learn": is_sklearn_available(),
    }


def table(measured: Mapping[str, Any]) -> str:
    """The methods and the ratios of a record, in Markdown."""
    methods = []
    for name, facts in measured["methods"].items():
        label = facts["label"]
        if name in measured["choices"]:
            label += f" (best of {', '.join(measured['choices'][name]['candidates'])})"
        prompts = len(facts["seconds"])
        equal = f"{prompts - len(facts['unequal'])} of {prompts}"
        methods.append([f"`{name}`", label, f"{facts['tokens_per_second']:.1f}", equal])
    ratios = [
        [f"`{entry['of']}` / `{entry['to']}`", shown(entry["value"], entry["interval"])]
        for entry in measured["ratios"]
    ]
    return "\n".join(
        (
            markdown(("method", "what", "tokens/s", "outputs equal to `generate`"), methods),
            markdown(("ratio of tokens/s", "paired, with 95 % interval over prompts"), ratios),
        )
    )


def main() -> None:
    """Entry point of the command."""
    parser = argument_parser(__doc__)
    parser.add_argument("--context", type=positive, help="prompts of that many tokens, of all text")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="METHOD")
    arguments = parser.parse_args()
    setting = load(arguments, SYSTEM)
    scope = None
    if arguments.context is not None:
        (context,) = fitting(setting, [arguments.context], "--context")
        setting = replace(setting, prompts=text(setting.prompts, context))
        scope = f"{len(setting.prompts)} prompts of {context} tokens"
    # What the target's own configuration asks for (a repetition penalty, say) would fill in what
    # a call leaves open, and `generate` would no longer be the plain greedy decoding of the model.
    with replaced(setting.pair.target, "generation_config", GenerationConfig()):
        measured = measure(setting, arguments.methods)
    write("peers", setting, measured, table(measured), scope)


if __name__ == "__main__":
    reporting(main)
