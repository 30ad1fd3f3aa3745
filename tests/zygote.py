"""Measuring jobs that cost no import: a process that has loaded everything forks one per line.

It is given a spec, loads its pair, and reads requests as lines of JSON: the arguments of `job`. It
answers each with the job's exit status. When something befalls a job is told by the calls that it
has made, not by a time, so that a moment is the same on every machine.
"""

import json
import os
import resource
import runpy
import signal
import sys
import traceback
from pathlib import Path

import torch

from dynatree import measure, memory, pairs  # noqa: F401 (a job imports them once it has its device)
from dynatree.errors import reporting
from dynatree.sources import PACKAGE, source_digest
from dynatree.specs import parse_spec

SCRIPT = Path(__file__).parent.parent / "scripts/measure.py"


def befall(moment, number, counted):
    """Sends this process the signal `number` at the call `moment`; counts calls into `counted`.

    The moment is the number of a call, or a pair: the k-th call of a function of that name.
    """

    def profile(frame, event, argument):
        if event not in ("call", "c_call"):
            return
        name = frame.f_code.co_name if event == "call" else argument.__name__
        if name == "setprofile":
            # The job has ended, and this process is no longer it.
            return
        counted["calls"] += 1
        counted[name] = counted.get(name, 0) + 1
        if name == "write_result":
            counted["calls before writing"] = counted["calls"]
        if moment in (counted["calls"], [name, counted[name]]):
            sys.setprofile(None)
            os.kill(os.getpid(), number)

    sys.setprofile(profile)


def job(main, pair, spec, out, kill=None, file_size=None, unprivileged=False, count=None):
    """Becomes the job, and never returns.

    Args:
        pair: loaded already; None to load it as the job would.
        kill: moment and signal.
        file_size: largest file that it may write, in bytes.
        unprivileged: it runs as nobody.
        count: the file that is told how many calls the job made.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if pair is not None:
        pairs.load_models = lambda *_: pair
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    if unprivileged:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    sys.argv = [str(SCRIPT), "--spec", spec, "--out", out, "--threads", "1"]
    counted = {"calls": 0}
    status = 0
    try:
        if kill is not None or count is not None:
            befall(*(kill or (-1, 0)), counted)
        reporting(main)
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        traceback.print_exc()
        status = 99
    sys.setprofile(None)
    if count is not None:
        Path(count).write_text(json.dumps(counted))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def serve(text):
    torch.set_num_threads(1)
    main = runpy.run_path(str(SCRIPT))["main"]
    spec = parse_spec(text)
    pair = pairs.load_models(spec.pair, spec.models)
    # Most of a short job's calls would be its look at its own source.
    digest = source_digest(PACKAGE / "measure.py")
    measure.source_digest = lambda _: digest
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        log, load = Path(request.pop("log")), request.pop("load")
        child = os.fork()
        if child == 0:
            with log.open("w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            job(main, None if load else pair, **request)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1])
