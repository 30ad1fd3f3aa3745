"""Writes a section of the paper; a front end to `dynatree.render`."""

import argparse
from pathlib import Path

from dynatree.ablation import read_ablation
from dynatree.errors import reporting
from dynatree.files import write_text
from dynatree.render import render


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ablation", required=True, type=Path)
    parser.add_argument("--template", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    arguments = parser.parse_args()
    ablation = read_ablation(arguments.ablation)
    file = arguments.ablation.as_posix()
    write_text(arguments.out, render(ablation, arguments.template, file).text)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    reporting(main)
