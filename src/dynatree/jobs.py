"""What the jobs of the pipeline begin with: their options, their device, their threads.

Imports no torch before it has its device: what loads torch also looks for GPUs.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

from dynatree.devices import Busy, Lease, cores, require_agreement, taken
from dynatree.progress import without_bars


def job_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that all jobs have: `--out`, `--threads` and `--busy`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", required=True, type=Path, help="what is written")
    parser.add_argument("--threads", type=int, default=len(cores()))
    parser.add_argument("--busy", choices=get_args(Busy), default="wait")
    return parser


@contextmanager
def running(device: str, threads: int | None, what: str, busy: Busy = "wait") -> Iterator[Lease]:
    """Has the device to itself until the end of the block, with so many threads; None: all cores.

    Args:
        device, what, busy: see `taken`.

    Raises:
        DeviceError: see `taken` and `require_agreement`.
    """
    with taken(device, threads or len(cores()), what, busy) as lease:
        import torch

        require_agreement(device, lease)
        if threads is not None:
            torch.set_num_threads(threads)
        without_bars()
        yield lease
