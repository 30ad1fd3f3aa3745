"""Draws the figure of an experiment; a front end to `dynatree.experiment_figures`."""

import argparse
from pathlib import Path

from dynatree.drawing import save
from dynatree.errors import reporting
from dynatree.experiment_figures import draw
from dynatree.experiments import read_experiment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experiment", required=True, type=Path)
    parser.add_argument("--pdf", required=True, type=Path)
    parser.add_argument("--png", required=True, type=Path)
    arguments = parser.parse_args()
    save(draw(read_experiment(arguments.experiment)), arguments.pdf, arguments.png)
    print(f"wrote {arguments.pdf} and {arguments.png}")


if __name__ == "__main__":
    reporting(main)
