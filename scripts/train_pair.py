"""Trains an embedded pair from its recipe; a front end to `dynatree.embedded.train`."""

import argparse
from pathlib import Path
from typing import get_args

from dynatree.devices import Busy, cores, taken
from dynatree.errors import reporting
from dynatree.files import require_writable
from dynatree.progress import Progress, training, without_bars
from dynatree.recipes import parse_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", required=True, help="the recipe as JSON")
    parser.add_argument("--out", required=True, type=Path, help="folder for target/ and draft/")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=len(cores()))
    parser.add_argument("--busy", choices=get_args(Busy), default="wait")
    arguments = parser.parse_args()
    recipe = parse_recipe(arguments.recipe)
    require_writable(arguments.out / "training.json")
    what = f"train {arguments.out.name}"
    with taken(arguments.device, arguments.threads, what, arguments.busy):
        # Only now: what loads models also looks for GPUs.
        import torch

        from dynatree.embedded.train import train_pair
        from dynatree.pairs import resolve_device

        torch.set_num_threads(arguments.threads)
        without_bars()
        device = resolve_device(arguments.device)
        with Progress(arguments.out.name, "steps") as shown:
            train_pair(recipe, arguments.out, device, shown.say, training(shown, recipe))


if __name__ == "__main__":
    reporting(main)
