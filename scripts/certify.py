"""Makes the losslessness certificate; a front end to `dynatree.certify`."""

import argparse
from pathlib import Path

import torch

from dynatree.certificate import ConfigurationCheck, write_certificate
from dynatree.certify import certify
from dynatree.errors import reporting
from dynatree.packed import unpack
from dynatree.pairs import load_models
from dynatree.specs import parse_certificate_spec


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spec", required=True, help="the specification as JSON, or packed")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    spec = parse_certificate_spec(unpack(arguments.spec))

    def progress(check: ConfigurationCheck) -> None:
        print(f"{check.name}: {check.verdict}", flush=True)

    certificate = certify(spec, load_models(spec.pair, spec.models), progress)
    write_certificate(arguments.out, certificate)
    certificate.require()
    print(f"lossless; certificate written to {arguments.out}")


if __name__ == "__main__":
    reporting(main)
