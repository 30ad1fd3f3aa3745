"""Measures one configuration and writes its result; a front end to `dynatree.measure`."""

from dynatree.devices import flagged
from dynatree.errors import reporting
from dynatree.failures import recording
from dynatree.files import require_writable
from dynatree.jobs import job_parser, running
from dynatree.progress import Progress, measuring
from dynatree.results import write_result
from dynatree.specs import parse_spec


def main() -> None:
    parser = job_parser(__doc__)
    parser.add_argument("--spec", required=True, help="the run specification as JSON")
    arguments = parser.parse_args()
    spec = parse_spec(arguments.spec)
    require_writable(arguments.out)
    what = f"measure {spec.name}"
    with (
        recording(arguments.out, spec.digest),
        running(spec.models.device, arguments.threads, what, arguments.busy) as lease,
    ):
        # Only now: what loads models also looks for GPUs.
        from dynatree.measure import measure
        from dynatree.memory import fitting
        from dynatree.pairs import load_models
        from dynatree.strategies import Autoregressive

        decoders = (Autoregressive(), spec.strategy)
        with (
            fitting(what, spec.pair, spec.models, decoders, spec.measure.max_new_tokens),
            Progress(spec.name, "generations") as shown,
        ):
            pair = load_models(spec.pair, spec.models)
            result = measure(spec, pair, measuring(shown, spec.measure))
            shown.say(f"{result.totals.tokens_per_round:.2f} tokens per round")
        facts = flagged(result.provenance, lease.shared_with())
        write_result(arguments.out, result.model_copy(update={"provenance": facts}))


if __name__ == "__main__":
    reporting(main)
