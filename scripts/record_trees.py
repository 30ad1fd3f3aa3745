"""Records the draft trees of one configuration; a front end to `dynatree.observe`."""

import argparse
from pathlib import Path

import torch

from dynatree.errors import reporting
from dynatree.observe import record_trees
from dynatree.pairs import load_models
from dynatree.progress import Progress, recording, without_bars
from dynatree.specs import parse_trees_spec
from dynatree.tree_record import write_record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spec", required=True, help="what to record, as JSON")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    spec = parse_trees_spec(arguments.spec)
    without_bars()
    pair = load_models(spec.pair, spec.models)
    with Progress(spec.name, "prompts") as shown:
        record = record_trees(spec, pair, recording(shown, spec))
    write_record(arguments.out, record)
    print(f"trees written to {arguments.out}")


if __name__ == "__main__":
    reporting(main)
