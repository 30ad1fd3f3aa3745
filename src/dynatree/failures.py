"""Why a measurement left no result: a record beside where the result would be.

A table that marks a missing row takes the reason from it. It is removed by the next success; of
a job that was killed there is none.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dynatree.errors import ResultError
from dynatree.facts import Fact, read_facts, write_facts


class Failure(Fact):
    """One failed measurement.

    Attributes:
        spec_digest: of what was to be measured (hex).
        reason: the message of the error.
    """

    spec_digest: str
    reason: str


def failure_path(result: Path) -> Path:
    """Where the failure of the job that writes `result` is recorded; no configuration's name has a
    dot, so it is no other's result.
    """
    return result.with_suffix(".failed.json")


@contextmanager
def recording(result: Path, spec_digest: str) -> Iterator[None]:
    """Records what is raised in the block, unless the user stopped it, and lets it go on."""
    path = failure_path(result)
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        # A disk that is full must not hide what went wrong.
        with suppress(OSError):
            write_facts(path, Failure(spec_digest=spec_digest, reason=reason))
        raise
    path.unlink(missing_ok=True)


def failure_reason(result: Path, spec_digest: str) -> str | None:
    """Why what `spec_digest` names could not be measured; None when that is not recorded."""
    try:
        failure = read_facts(failure_path(result), Failure, "record of a failure")
    except ResultError:
        return None
    return failure.reason if failure.spec_digest == spec_digest else None
