"""Records the draft trees of one configuration; a front end to `dynatree.observe`."""

from dynatree.errors import reporting
from dynatree.files import require_writable
from dynatree.jobs import job_parser, running
from dynatree.progress import Progress, recording
from dynatree.specs import parse_trees_spec
from dynatree.tree_record import write_record


def main() -> None:
    parser = job_parser(__doc__)
    parser.add_argument("--spec", required=True, help="what to record, as JSON")
    arguments = parser.parse_args()
    spec = parse_trees_spec(arguments.spec)
    require_writable(arguments.out)
    what = f"record the trees of {spec.name}"
    with running(spec.models.device, arguments.threads, what, arguments.busy):
        # Only now: what loads models also looks for GPUs.
        from dynatree.memory import fitting
        from dynatree.observe import record_trees
        from dynatree.pairs import load_models

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
