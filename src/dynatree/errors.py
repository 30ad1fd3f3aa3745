"""Errors that a user can act on. The message names the thing, the bad value and the fix."""

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


class DecodeError(DynaTreeError, ValueError):
    """A prompt, a length or a model output that decoding cannot go on with."""


class ResultError(DynaTreeError):
    """A result file is missing, damaged, or belongs to another configuration."""


class LosslessError(DynaTreeError):
    """A strategy's output differs from the target's own and rounding does not explain it: a bug."""


def reporting(main: Callable[[], None]) -> None:
    """Runs a script's `main`; what the user can act on is shown without a traceback.

    Exits with 1 after a `DynaTreeError` and with 130, as shells expect, after Ctrl-C.
    """
    try:
        main()
    except DynaTreeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        sys.exit(130)
