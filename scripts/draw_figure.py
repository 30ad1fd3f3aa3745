"""Draws the ablation figure; a front end to `dynatree.figures`."""

import argparse
from pathlib import Path

from dynatree.ablation import read_ablation
from dynatree.errors import reporting
from dynatree.figures import draw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ablation", required=True, type=Path)
    parser.add_argument("--pdf", required=True, type=Path)
    parser.add_argument("--png", required=True, type=Path)
    arguments = parser.parse_args()
    draw(read_ablation(arguments.ablation), arguments.pdf, arguments.png)
    print(f"wrote {arguments.pdf} and {arguments.png}")


if __name__ == "__main__":
    reporting(main)
