"""What a target forward of n rows costs, by runtime, and by whose product and attention it uses.

For CPUs: on CUDA nothing is packed, and `roofline.py` times the captured phases.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from harness import (
    SYSTEM,
    Setting,
    Timings,
    argument_parser,
    interleaved,
    load,
    markdown,
    replaced,
    write,
)

from dynatree import kernel
from dynatree.errors import reporting
from dynatree.runner import ModelRunner
from dynatree.runtime import Runtime
from dynatree.schema import RuntimeMode

ROWS = (1, 2, 4, 8, 16, 32)
MODES: tuple[RuntimeMode, ...] = ("eager", "compiled")
REPETITIONS = 10


def forward_of(setting: Setting, mode: RuntimeMode) -> Callable[[int], None]:
    """`REPETITIONS` forwards of n rows over the first prompt's KV entries, ready to be called."""
    prompt = setting.prompts[0]
    runtime = Runtime(mode, setting.device)
    slots = runtime.capacity(len(prompt) + max(ROWS))
    runner = ModelRunner(setting.pair.target, slots, runtime)
    visible = runtime.visible(len(prompt) + max(ROWS))

    @torch.inference_mode()
    def forward(rows: int) -> None:
        positions = torch.arange(len(prompt), len(prompt) + rows, device=setting.device)
        mask = torch.arange(visible, device=setting.device) <= positions[:, None]
        for _ in range(REPETITIONS):
            runner.forward(prompt[:1].expand(rows), positions, positions, mask)

    with torch.inference_mode():
        runner.prefill(prompt)
    for rows in ROWS:
        forward(rows)
    return forward


def measure(setting: Setting) -> dict[str, Any]:
    """Milliseconds per forward, by method and number of rows."""
    methods: dict[str, Callable[[int], None]] = {}
    for mode in MODES:
        with replaced(kernel, "available", lambda: False):
            methods[f"{mode}, PyTorch's"] = forward_of(setting, mode)
        if kernel.available():
            methods[f"{mode}, ours"] = forward_of(setting, mode)
    timings = interleaved(
        methods,
        ROWS,
        setting.device,
        setting.spec.measure.runs,
        setting.spec.measure.warmup,
        partial(print, flush=True),
    )
    return {
        "rows": list(ROWS),
        "repetitions": REPETITIONS,
        "seconds": {name: times.seconds for name, times in timings.items()},
        "milliseconds": {name: milliseconds(times) for name, times in timings.items()},
    }


def milliseconds(timings: Timings[None]) -> list[float]:
    """Of one forward, for each number of rows: the median over runs."""
    return [float(np.median(runs)) / REPETITIONS * 1e3 for runs in timings.seconds]


def main() -> None:
    """Entry point of the command."""
    setting = load(argument_parser(__doc__).parse_args(), SYSTEM)
    measured = measure(setting)
    header = ("milliseconds per forward of", *(f"{rows} rows" for rows in ROWS))
    rows = [
        [name, *(f"{value:.2f}" for value in values)]
        for name, values in measured["milliseconds"].items()
    ]
    write("forwards", setting, measured, markdown(header, rows), "the target's forward")


if __name__ == "__main__":
    reporting(main)
