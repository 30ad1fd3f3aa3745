"""Writes what the paper says of an experiment; a front end to `dynatree.render`."""

import argparse
from pathlib import Path

from dynatree.errors import reporting
from dynatree.experiments import read_experiment
from dynatree.files import write_text
from dynatree.render import render_experiment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experiment", required=True, type=Path)
    parser.add_argument("--template", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    arguments = parser.parse_args()
    experiment = read_experiment(arguments.experiment)
    file = arguments.experiment.as_posix()
    write_text(arguments.out, render_experiment(experiment, arguments.template, file).text)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    reporting(main)
