"""Measures one configuration and writes its result; a front end to `dynatree.measure`."""

import argparse
from pathlib import Path
from typing import get_args

from dynatree.devices import Busy, cores, flagged, taken
from dynatree.errors import reporting
from dynatree.failures import recording
from dynatree.files import require_writable
from dynatree.results import write_result
from dynatree.specs import parse_spec


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spec", required=True, help="the run specification as JSON")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--threads", type=int, default=len(cores()))
    parser.add_argument("--busy", choices=get_args(Busy), default="wait")
    arguments = parser.parse_args()
    spec = parse_spec(arguments.spec)
    require_writable(arguments.out)
    passes = spec.measure.warmup + spec.measure.runs

    def progress(done: int, planned: int, speed: float) -> None:
        if done * passes % planned == 0:
            print(f"{spec.name}: {done} of {planned} generations, {speed:.1f} tokens/s", flush=True)

    what = f"measure {spec.name}"
    with (
        recording(arguments.out, spec.digest),
        taken(spec.models.device, arguments.threads, what, arguments.busy) as lease,
    ):
        # Only now: what loads models also looks for GPUs.
        import torch

        from dynatree.measure import measure
        from dynatree.memory import fitting
        from dynatree.pairs import load_models
        from dynatree.strategies import Autoregressive

        torch.set_num_threads(arguments.threads)
        decoders = (Autoregressive(), spec.strategy)
        with fitting(what, spec.pair, spec.models, decoders, spec.measure.max_new_tokens):
            result = measure(spec, load_models(spec.pair, spec.models), progress)
        facts = flagged(result.provenance, lease.shared_with())
        write_result(arguments.out, result.model_copy(update={"provenance": facts}))
    print(f"{spec.name}: {result.totals.tokens_per_round:.2f} tokens per round", flush=True)


if __name__ == "__main__":
    reporting(main)
