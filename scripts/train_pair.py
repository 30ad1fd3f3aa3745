"""Trains an embedded pair from its recipe; a front end to `dynatree.embedded.train`."""

import argparse
from pathlib import Path

import torch

from dynatree.embedded.train import train_pair
from dynatree.errors import reporting
from dynatree.pairs import resolve_device
from dynatree.progress import Progress, training, without_bars
from dynatree.recipes import parse_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", required=True, help="the recipe as JSON")
    parser.add_argument("--out", required=True, type=Path, help="folder for target/ and draft/")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    recipe = parse_recipe(arguments.recipe)
    without_bars()
    device = resolve_device(arguments.device)
    with Progress(arguments.out.name, "steps") as shown:
        train_pair(recipe, arguments.out, device, shown.say, training(shown, recipe))


if __name__ == "__main__":
    reporting(main)
