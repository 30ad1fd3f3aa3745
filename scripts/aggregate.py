"""Aggregates the results of a study; a front end to `dynatree.aggregate`."""

import argparse
import json
from pathlib import Path

from dynatree.ablation import write_ablation
from dynatree.aggregate import aggregate, to_csv
from dynatree.config import parse_config
from dynatree.errors import reporting
from dynatree.files import write_text
from dynatree.packed import unpack


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="the configuration as JSON, or packed")
    parser.add_argument("--source-digest", required=True, help="digest of the measuring code")
    parser.add_argument("--certificate", required=True, type=Path)
    parser.add_argument("--certifying-digest", required=True, help="digest of the certifying code")
    parser.add_argument("--results", required=True, type=Path)
    parser.add_argument(
        "--missing", choices=("refuse", "mark"), default="refuse", help="what has no result"
    )
    parser.add_argument("--json", required=True, type=Path)
    parser.add_argument("--csv", required=True, type=Path)
    arguments = parser.parse_args()
    config = parse_config(json.loads(unpack(arguments.config)))
    certificate = (arguments.certificate, arguments.certifying_digest)
    mark = arguments.missing == "mark"
    ablation = aggregate(config, arguments.results, arguments.source_digest, certificate, mark)
    write_text(arguments.csv, to_csv(ablation))
    write_ablation(arguments.json, ablation)
    print(f"{len(ablation.configurations)} configurations aggregated into {arguments.json}")


if __name__ == "__main__":
    reporting(main)
