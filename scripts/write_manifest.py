"""Checks the rendered paper and says where its values come from; a front end to
`dynatree.manifest`.
"""

import argparse
from pathlib import Path

from dynatree.errors import reporting
from dynatree.manifest import make_manifest, write_manifest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", required=True, type=Path)
    parser.add_argument("--runs", required=True, type=Path, help="folder of the run results")
    parser.add_argument("--sections", required=True, nargs="+")
    parser.add_argument("--experiments", default=[], nargs="*", help="those of the paper")
    parser.add_argument("--templates", required=True, type=Path)
    parser.add_argument("--paper", required=True, type=Path, help="folder of the rendered texts")
    parser.add_argument("--figures", required=True, type=Path, help="folder of the figures")
    parser.add_argument("--out", required=True, type=Path)
    arguments = parser.parse_args()
    manifest = make_manifest(
        arguments.results,
        arguments.sections,
        arguments.experiments,
        arguments.runs,
        arguments.templates,
        arguments.paper,
        arguments.figures,
    )
    write_manifest(arguments.out, manifest)
    values = sum(len(entry.shown) for entry in manifest.texts.values())
    print(f"{values} values of {len(manifest.texts)} texts traced in {arguments.out}")


if __name__ == "__main__":
    reporting(main)
