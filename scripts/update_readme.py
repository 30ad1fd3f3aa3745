"""Renews the README's table of results; a front end to `dynatree.readme`."""

import argparse
from pathlib import Path

from dynatree.errors import reporting
from dynatree.files import write_text
from dynatree.readme import update


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--readme", required=True, type=Path)
    parser.add_argument("--reference", required=True, type=Path)
    arguments = parser.parse_args()
    write_text(arguments.readme, update(arguments.readme, arguments.reference))


if __name__ == "__main__":
    reporting(main)
