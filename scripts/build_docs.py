"""Builds the pages about the modules; a front end to `dynatree.api_page`."""

import argparse
from pathlib import Path

from dynatree.api_page import build
from dynatree.errors import reporting


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True, type=Path, help="folder for index.html")
    arguments = parser.parse_args()
    build(arguments.out)
    print(f"written to {arguments.out / 'index.html'}")


if __name__ == "__main__":
    reporting(main)
