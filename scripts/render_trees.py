"""Makes the page of draft trees; a front end to `dynatree.tree_page`."""

import argparse
from pathlib import Path

from dynatree.errors import reporting
from dynatree.files import write_text
from dynatree.specs import parse_trees_spec
from dynatree.tree_page import render_page
from dynatree.tree_record import read_records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--specs", nargs="*", type=parse_trees_spec, help="what to show, as JSON")
    parser.add_argument("--source-digest", required=True, help="digest of the recording code")
    parser.add_argument("--records", required=True, type=Path, help="folder of the records")
    parser.add_argument("--template", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    arguments = parser.parse_args()
    records = read_records(arguments.specs, arguments.records, arguments.source_digest)
    write_text(arguments.out, render_page(records, arguments.template))
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    reporting(main)
