"""Makes the losslessness certificate; a front end to `dynatree.certify`."""

import argparse
from pathlib import Path

import torch

from dynatree.certificate import write_certificate
from dynatree.certify import certify
from dynatree.errors import reporting
from dynatree.pairs import load_models
from dynatree.progress import Progress, certifying, without_bars
from dynatree.specs import parse_certificate_spec


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spec", required=True, help="the certificate's specification as JSON")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    spec = parse_certificate_spec(arguments.spec)
    without_bars()
    pair = load_models(spec.pair, spec.models)
    with Progress("certificate", "configurations") as shown:
        certificate = certify(spec, pair, certifying(shown, spec))
    write_certificate(arguments.out, certificate)
    certificate.require()
    print(f"lossless; certificate written to {arguments.out}")


if __name__ == "__main__":
    reporting(main)
