"""Writes a part of the paper made from all sections; a front end to `dynatree.numbers`."""

import argparse
from pathlib import Path

from dynatree.errors import reporting
from dynatree.evidence import read_evidence
from dynatree.files import write_text
from dynatree.numbers import text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", required=True, type=Path)
    parser.add_argument("--runs", required=True, type=Path, help="folder of the run results")
    parser.add_argument("--sections", required=True, nargs="+")
    parser.add_argument("--experiments", default=[], nargs="*", help="those of the paper")
    parser.add_argument("--template", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    arguments = parser.parse_args()
    evidence = read_evidence(
        arguments.results, arguments.sections, arguments.experiments, arguments.runs
    )
    write_text(arguments.out, text(evidence, arguments.template).text)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    reporting(main)
