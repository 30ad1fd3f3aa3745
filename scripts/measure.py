"""Measures one configuration and writes its result; a front end to `dynatree.measure`."""

import argparse
from pathlib import Path

import torch

from dynatree.errors import reporting
from dynatree.files import require_writable
from dynatree.measure import measure
from dynatree.pairs import load_models
from dynatree.results import write_result
from dynatree.specs import parse_spec


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spec", required=True, help="the run specification as JSON")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    spec = parse_spec(arguments.spec)
    require_writable(arguments.out)
    passes = spec.measure.warmup + spec.measure.runs

    def progress(done: int, planned: int, speed: float) -> None:
        if done * passes % planned == 0:
            print(f"{spec.name}: {done} of {planned} generations, {speed:.1f} tokens/s", flush=True)

    result = measure(spec, load_models(spec.pair, spec.models), progress)
    write_result(arguments.out, result)
    print(f"{spec.name}: {result.totals.tokens_per_round:.2f} tokens per round", flush=True)


if __name__ == "__main__":
    reporting(main)
