"""Which division of the GPU kernels' work among programs is fastest, in whole forwards.

A kernel timed alone finds its weights in the L2 cache, and nothing before or after it that it could
run beside. So forwards of both models are timed, each choice as a CUDA graph of its own. What wins
belongs into `dynatree.cuda_kernels`, whose constants these choices replace one at a time.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
    replaced,
    write,
)
from roofline import CONTEXT, RUNS, repeated
from torch import Tensor
from transformers import PreTrainedModel

from dynatree import fused, gpu
from dynatree.errors import ConfigError, reporting
from dynatree.runner import ModelRunner
from dynatree.runtime import Runtime

ROWS = (1, 2, 8, 16, 32, 64)
REPEATS = 20
"""Forwards per timing, so that waiting for the device once does not count."""

PRESENT = "as it is"


@dataclass(frozen=True)
class Choice:
    """Another value of one constant of `dynatree.cuda_kernels`.

    Attributes:
        value: given in the constant's own type, or for a table by the rows that it is for.
        rows: the numbers of rows that it is another value for.
        least: the compute capability that it needs.
    """

    constant: str
    value: Any
    rows: Sequence[int] = ROWS
    least: tuple[int, int] = (0, 0)

    @property
    def name(self) -> str:
        """What the table calls it."""
        value = getattr(self.value, "__name__", self.value)
        values = value if isinstance(value, tuple) else (value,)
        return f"{self.constant.strip('_')} {', '.join(map(str, values))}"


def never(states: Tensor, small: bool = False) -> bool:
    """No kernel is launched before the one before it has ended."""
    return False


def always(states: Tensor, small: bool = False) -> bool:
    """Every kernel is."""
    return True


MANY = ROWS[1:]
CHOICES = (
    *(Choice("_early", rule, least=(9, 0)) for rule in (never, always)),
    *(Choice("_ENTER_ONE", of, (1,)) for of in ((1, 0, 1, 4), (4, 0, 1, 4), (4, 0, 1, 8))),
    *(Choice("_LEAVE_ONE", of, (1,)) for of in ((2, 512, 1, 4), (1, 512, 1, 2), (2, 512, 1, 8))),
    *(Choice("_ENTER_MANY", of, MANY) for of in ((32, 64, 4, 4), (64, 128, 3, 4), (64, 64, 6, 4))),
    *(Choice("_ENTER_NARROW", of, MANY) for of in ((16, 0, 1, 4), (32, 0, 1, 8))),
    *(Choice("_LEAVE_NARROW", of, MANY) for of in ((16, 0, 1, 4), (64, 0, 1, 4))),
    *(Choice("_PROGRAMS", of, MANY) for of in (64, 256)),
    *(Choice("_LEAVE_MANY", of, MANY) for of in ((32, 128, 3, 4), (64, 128, 3, 4), (64, 64, 4, 4))),
    *(Choice("_ATTEND", of, (1,)) for of in ((16, 32, 1, 1, 4), (16, 128, 1, 1, 4))),
    *(Choice("_ATTEND", of, MANY) for of in ((16, 64, 2, 3, 4), (16, 64, 8, 2, 4))),
    *(Choice("_ATTEND", of, MANY) for of in ((16, 64, 4, 2, 4, 128), (16, 64, 8, 2, 4, 128))),
    *(Choice("_ATTEND", of, (32, 64)) for of in ((32, 64, 4, 3, 4), (32, 64, 8, 3, 4))),
)


def chosen(choice: Choice, kernels: Any, rows: int) -> Any:
    """The value of the constant while the choice is in force."""
    present = getattr(kernels, choice.constant)
    if callable(present) or isinstance(present, int):
        return choice.value
    if isinstance(present, dict):
        key = next(most for most in present if rows <= most)
        return {**present, key: type(present[key])(*choice.value)}
    return type(present)(*choice.value)


def forwards(
    setting: Setting, model: PreTrainedModel, prompt: Tensor, rows: int, choices: Sequence[Choice]
) -> tuple[dict[str, Callable[[], None]], dict[str, float]]:
    """Forwards of `rows` tokens after `prompt` [L], by choice, captured where graphs are used.

    Returns:
        Calls, and by how much the logits differ from those of the present constants, relative.
    """
    device, context = setting.device, len(prompt)
    kernels = gpu.kernels(device)
    runtime = Runtime(setting.spec.models.runtime, device, static=True)
    runner = ModelRunner(model, runtime.capacity(context + rows), runtime)
    places = torch.arange(context, context + rows, device=device)
    mask = torch.arange(runtime.visible(context + rows), device=device) <= places[:, None]
    logits = torch.empty(rows, runner.vocab_size, dtype=model.dtype, device=device)

    def forward() -> None:
        logits.copy_(runner.forward(prompt[:1].expand(rows), places, places, mask))

    def under(choice: Choice) -> None:
        with replaced(kernels, choice.constant, chosen(choice, kernels, rows)):
            forward()

    phases: dict[str, Callable[[], None]] = {PRESENT: forward}
    phases |= {choice.name: partial(under, choice) for choice in choices}
    differences: dict[str, float] = {}
    with torch.inference_mode():
        runner.prefill(prompt)
        runtime.prepare({(name,): phase for name, phase in phases.items()}, lambda: None)
        calls: dict[str, Callable[[], None]] = {
            name: partial(runtime.run, (name,), phase) for name, phase in phases.items()
        }
        present: Tensor | None = None
        for name, call in calls.items():
            call()
            found = logits.double()
            present = found if present is None else present
            differences[name] = float((found - present).norm() / present.norm())
    return calls, differences


def measure(
    setting: Setting, context: int, rows: Sequence[int], repeats: int, constants: Sequence[str]
) -> dict[str, Any]:
    """Times the choices of the given constants; returns what goes into the record.

    Raises:
        ConfigError: the kernels do not serve the device, or not the models on it.
    """
    if gpu.kernels(setting.device) is None:
        raise ConfigError(
            f"--device: the kernels need an NVIDIA GPU of compute capability 8.0 or later, got "
            f"{setting.device}; there is nothing to choose elsewhere"
        )
    spec, pair = setting.spec, setting.pair
    models = {"target": pair.target, "draft": pair.draft}
    for role, model in models.items():
        if not fused.serves(model):
            raise ConfigError(
                f"--pair: the kernels do not serve the {role} (a {type(model).__name__} in "
                f"{model.dtype}); see dynatree.fused.serves"
            )
    if spec.models.runtime not in ("auto", "cudagraph"):
        raise ConfigError(
            f"--runtime: only in CUDA graphs are the models' forwards kernels, got "
            f"{spec.models.runtime!r}; leave it out"
        )
    prompt = random_tokens(setting, context)
    found: dict[str, Any] = {}
    for role, model in models.items():
        for count in rows:
            mine = [
                choice
                for choice in CHOICES
                if choice.constant in constants
                and count in choice.rows
                and choice.least <= gpu.capability(setting.device)
            ]
            calls, differences = forwards(setting, model, prompt, count, mine)
            timings = interleaved(
                {name: partial(repeated, call) for name, call in calls.items()},
                [repeats],
                setting.device,
                spec.measure.runs,
                spec.measure.warmup,
            )
            print(f"{role}, {count} rows: {len(calls)} choices", flush=True)
            found[f"{role} {count}"] = {
                name: {
                    "ms": 1e3 * float(np.median(times.seconds[0])) / repeats,
                    "difference": differences[name],
                    "seconds": times.seconds[0],
                }
                for name, times in timings.items()
            }
    return {"context": context, "repeats": repeats, "forwards": found}


def table(measured: Mapping[str, Any]) -> str:
    """A row per forward and choice, the fastest first, in Markdown."""
    rows = [
        [
            forward,
            name,
            f"{1e3 * facts['ms']:.1f}",
            f"{facts['ms'] / choices[PRESENT]['ms']:.3f}",
            f"{facts['difference']:.0e}",
        ]
        for forward, choices in measured["forwards"].items()
        for name, facts in sorted(choices.items(), key=lambda item: item[1]["ms"])
    ]
    return markdown(
        ("forward of rows", "choice", "us", f"of {PRESENT!r}", "logits differ by"), rows
    )


def main() -> None:
    """Entry point of the command."""
    parser = argument_parser(__doc__)
    parser.set_defaults(runs=RUNS)
    names = sorted({choice.constant for choice in CHOICES})
    parser.add_argument("--context", type=positive, default=CONTEXT, help="tokens in the cache")
    parser.add_argument("--rows", type=positive, nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--repeats", type=positive, default=REPEATS, help="forwards per timing")
    parser.add_argument("--constants", nargs="+", choices=names, default=names)
    arguments = parser.parse_args()
    setting = load(arguments, SYSTEM)
    context = arguments.context
    if setting.context is not None:
        context = min(context, setting.context - max(arguments.rows))
    if context < 1:
        raise ConfigError(
            f"--rows {max(arguments.rows)}: the models hold {setting.context} tokens, which leaves "
            "no context; give fewer"
        )
    measured = measure(setting, context, arguments.rows, arguments.repeats, arguments.constants)
    write("tiles", setting, measured, table(measured), f"context {context}")


if __name__ == "__main__":
    reporting(main)
