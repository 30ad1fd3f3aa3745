"""Several benchmarks in one process: the models are loaded once, and compiled kernels are shared.

Each argument is a benchmark with its own options, "roofline --tokens 128"; the common options go
before. One that fails does not stop the next.
"""

import argparse
import gc
import importlib
import shlex
import sys
import time
import traceback
from functools import cache

import harness
import torch
from harness import replaced

from dynatree.errors import DynaTreeError
from dynatree.pairs import load_models


def main() -> int:
    """Entry point of the command; the exit status is how many of the benchmarks failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="config.yaml")
    parser.add_argument("--pair")
    parser.add_argument("--device")
    parser.add_argument("--out", default="bench/results")
    parser.add_argument("benchmark", nargs="+", help='such as "peers --runs 2"')
    arguments = parser.parse_args()
    common = [
        f"--{name}={value}"
        for name in ("config", "pair", "device", "out")
        if (value := getattr(arguments, name)) is not None
    ]
    # Nobody changes what it returns.
    with replaced(harness, "load_models", cache(load_models)):
        return sum(not run(command, common) for command in arguments.benchmark)


def run(command: str, common: list[str]) -> bool:
    """Runs one benchmark with its own options and the common ones; says whether it went well."""
    name, *options = shlex.split(command)
    begin = time.monotonic()
    sys.argv = [f"bench/{name}.py", *common, *options]
    print(f"== {name}", flush=True)
    try:
        importlib.import_module(name).main()
        outcome = "ok"
    except DynaTreeError as error:
        outcome = f"failed: {error}"
    except Exception:
        traceback.print_exc()
        outcome = "failed"
    print(f"== {name}: {outcome}, {time.monotonic() - begin:.0f} s", flush=True)
    # The models stay, and the decoders go.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return outcome == "ok"


if __name__ == "__main__":
    sys.exit(main())
