"""Makes the losslessness certificate; a front end to `dynatree.certify`."""

from dynatree.certificate import write_certificate
from dynatree.errors import reporting
from dynatree.files import require_writable
from dynatree.jobs import job_parser, running
from dynatree.packed import unpack
from dynatree.progress import Progress, certifying
from dynatree.specs import parse_certificate_spec


def main() -> None:
    parser = job_parser(__doc__)
    parser.add_argument("--spec", required=True, help="the specification as JSON, or packed")
    arguments = parser.parse_args()
    spec = parse_certificate_spec(unpack(arguments.spec))
    require_writable(arguments.out)
    with running(spec.models.device, arguments.threads, "certify", arguments.busy):
        # Only now: what loads models also looks for GPUs.
        from dynatree.certify import certify
        from dynatree.memory import fitting
        from dynatree.pairs import load_models

        # One configuration after the other.
        largest = max(spec.strategies.values(), key=lambda strategy: strategy.max_drafted)
        with (
            fitting("certify", spec.pair, spec.models, [largest], spec.max_new_tokens),
            Progress("certificate", "configurations") as shown,
        ):
            pair = load_models(spec.pair, spec.models)
            certificate = certify(spec, pair, certifying(shown, spec))
        write_certificate(arguments.out, certificate)
    certificate.require()
    print(f"lossless; certificate written to {arguments.out}")


if __name__ == "__main__":
    reporting(main)
