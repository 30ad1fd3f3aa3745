"""Records the draft trees of one configuration; a front end to `dynatree.observe`."""

import argparse
from pathlib import Path
from typing import get_args

from dynatree.devices import Busy, cores, taken
from dynatree.errors import reporting
from dynatree.files import require_writable
from dynatree.progress import Progress, recording, without_bars
from dynatree.specs import parse_trees_spec
from dynatree.tree_record import write_record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spec", required=True, help="what to record, as JSON")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--threads", type=int, default=len(cores()))
    parser.add_argument("--busy", choices=get_args(Busy), default="wait")
    arguments = parser.parse_args()
    spec = parse_trees_spec(arguments.spec)
    require_writable(arguments.out)
    what = f"record the trees of {spec.name}"
    with taken(spec.models.device, arguments.threads, what, arguments.busy):
        # Only now: what loads models also looks for GPUs.
        import torch

        from dynatree.memory import fitting
        from dynatree.observe import record_trees
        from dynatree.pairs import load_models

        torch.set_num_threads(arguments.threads)
        without_bars()
        with (
            fitting(what, spec.pair, spec.models, [spec.strategy], spec.max_new_tokens),
            Progress(spec.name, "prompts") as shown,
        ):
            pair = load_models(spec.pair, spec.models)
            record = record_trees(spec, pair, recording(shown, spec))
        write_record(arguments.out, record)
    print(f"trees written to {arguments.out}")


if __name__ == "__main__":
    reporting(main)
