"""Measures one configuration and writes its result; a front end to `dynatree.measure`."""

import argparse
from pathlib import Path

import torch

from dynatree.errors import reporting
from dynatree.measure import measure
from dynatree.pairs import load_models
from dynatree.progress import Progress, measuring, without_bars
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
    without_bars()
    pair = load_models(spec.pair, spec.models)
    with Progress(spec.name, "generations") as shown:
        result = measure(spec, pair, measuring(shown, spec.measure))
        write_result(arguments.out, result)
        shown.say(f"{result.totals.tokens_per_round:.2f} tokens per round")


if __name__ == "__main__":
    reporting(main)
