"""Draws the record of `bench/roofline.py`; a front end to `dynatree.figures`."""

import argparse
from pathlib import Path

from dynatree.drawing import save
from dynatree.errors import reporting
from dynatree.figures import roofline
from dynatree.roofline import read_roofline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", required=True, type=Path)
    parser.add_argument("--pdf", required=True, type=Path)
    parser.add_argument("--png", required=True, type=Path)
    arguments = parser.parse_args()
    save(roofline(read_roofline(arguments.record)), arguments.pdf, arguments.png)
    print(f"wrote {arguments.pdf} and {arguments.png}")


if __name__ == "__main__":
    reporting(main)
