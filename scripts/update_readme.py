"""Renews the README's tables of results; a front end to `dynatree.readme`."""

import argparse
from pathlib import Path

from dynatree.errors import reporting
from dynatree.files import write_text
from dynatree.readme import update, with_benchmarks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--readme", required=True, type=Path)
    parser.add_argument("--reference", required=True, type=Path)
    parser.add_argument("--benchmarks", required=True, type=Path)
    parser.add_argument("--pages", type=Path, nargs="*", default=[], help="with benchmarks alone")
    arguments = parser.parse_args()
    text = update(arguments.readme, arguments.reference, arguments.benchmarks)
    write_text(arguments.readme, text)
    for page in arguments.pages:
        text = with_benchmarks(page.read_text(encoding="utf-8"), arguments.benchmarks)
        write_text(page, text)


if __name__ == "__main__":
    reporting(main)
