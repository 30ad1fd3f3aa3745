"""Errors that a user can act on. The message names the thing, the bad value and the fix."""

import signal
import sys
from collections.abc import Callable


class DynaTreeError(Exception):
    """Base of every error that DynaTree raises on purpose; the CLI prints it without traceback."""


class ConfigError(DynaTreeError, ValueError):
    """`config.yaml` says something that cannot be run."""


class PairError(DynaTreeError):
    """A target or draft model cannot be had, or the two do not fit together."""


class WorkloadError(DynaTreeError):
    """The text of a workload cannot be had, or holds too little."""


class FileError(DynaTreeError, OSError):
    """A file cannot be written: no space, no permission, or no folder."""


class ClockError(DynaTreeError):
    """A clock that must only go forward did not, so what it timed is void."""


class DecodeError(DynaTreeError, ValueError):
    """A prompt, a length or a model output that decoding cannot go on with."""


class ResultError(DynaTreeError):
    """A result file is missing, damaged, or belongs to another configuration."""


class LosslessError(DynaTreeError):
    """A strategy's output differs from the target's own and rounding does not explain it: a bug."""


def reporting(main: Callable[[], None]) -> None:
    """Runs a script's `main`; what the user can act on is shown without a traceback.

    Exits with 1 after a `DynaTreeError` and, as shells expect, with 130 after Ctrl-C and with 143
    after SIGTERM, which schedulers send. Both unwind, so that no temporary file is left.
    """
    stops: list[int] = []

    def stop(number: int, _: object) -> None:
        stops.append(number)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        main()
    except BaseException as error:
        # Asked first, because a library may have made another error of the interrupt.
        if stops:
            print(
                f"stopped by {signal.Signals(stops[0]).name}; files are written whole or not at "
                "all, so run the same command again",
                file=sys.stderr,
            )
            sys.exit(128 + stops[0])
        if not isinstance(error, DynaTreeError):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
