"""Aggregates the runs of an experiment; a front end to `dynatree.aggregate_experiment`."""

import argparse
import json
from pathlib import Path

from dynatree.aggregate_experiment import aggregate_experiment, experiment_csv
from dynatree.config import parse_config
from dynatree.errors import reporting
from dynatree.experiments import write_experiment
from dynatree.files import write_text
from dynatree.packed import unpack


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="the configuration as JSON, or packed")
    parser.add_argument("--experiment", required=True)
    parser.add_argument("--source-digest", required=True, help="digest of the measuring code")
    parser.add_argument("--results", required=True, type=Path)
    parser.add_argument("--json", required=True, type=Path)
    parser.add_argument("--csv", required=True, type=Path)
    arguments = parser.parse_args()
    experiment = aggregate_experiment(
        parse_config(json.loads(unpack(arguments.config))),
        arguments.experiment,
        arguments.results,
        arguments.source_digest,
    )
    write_text(arguments.csv, experiment_csv(experiment))
    write_experiment(arguments.json, experiment)
    print(f"{len(experiment.points)} points aggregated into {arguments.json}")


if __name__ == "__main__":
    reporting(main)
