"""Time per phase of decoding, on the host for CPU and on the device's own clock for CUDA.

Durations are differences of the monotonic clock, which no correction of the time of day moves.
"""

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from statistics import median
from typing import Any

import torch

from dynatree.errors import ClockError

REPETITIONS = 5
"""Timed runs of a call whose median is its time."""


def seconds_since(begin: float) -> float:
    """Seconds since `time.perf_counter()` was `begin`, more than 0.

    Raises:
        ClockError: the clock has not gone forward.
    """
    return _forward(time.perf_counter() - begin)


def _forward(seconds: float) -> float:
    if not seconds > 0:
        raise ClockError(
            f"the monotonic clock moved by {seconds:g} seconds where it must go forward; what was "
            "timed is void and nothing was written. Check the clock source "
            "(/sys/devices/system/clocksource/clocksource0/current_clocksource; on a virtual "
            "machine, its host's), then run the same command again"
        )
    return seconds


class Timespan:
    """When a job began and ended: the time of day at the beginning, and from there on monotonic."""

    def __init__(self) -> None:
        self.started = datetime.now(UTC)
        self._begin = time.perf_counter()

    @property
    def now(self) -> datetime:
        """After `started`, even if the time of day was set back since; raises as
        `seconds_since`."""
        return self.started + timedelta(seconds=seconds_since(self._begin))


class PhaseClock:
    """Splits the time since `start` into named phases.

    On CUDA the marks are events on the current stream: they cost no synchronisation, and the
    time between them is the device's. `seconds` then waits for the last one.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._now: Callable[[], Any] = _event if self._cuda else time.perf_counter
        self._marks: list[tuple[str, Any]] = []

    def start(self) -> None:
        """Forgets all marks and begins the first phase."""
        self._marks = [("", self._now())]

    def mark(self, phase: str) -> None:
        """Ends a phase: the time since the last mark belongs to `phase`."""
        self._marks.append((phase, self._now()))

    def seconds(self) -> dict[str, float]:
        """Seconds per phase since `start`."""
        totals: dict[str, float] = {}
        if self._cuda:
            self._marks[-1][1].synchronize()
        for (_, begin), (phase, end) in zip(self._marks, self._marks[1:], strict=False):
            span = begin.elapsed_time(end) / 1e3 if self._cuda else end - begin
            if span < 0:
                _forward(span)
            totals[phase] = totals.get(phase, 0.0) + span
        return totals


def _event() -> torch.cuda.Event:
    """Recorded now, on the current stream."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def median_seconds(
    calls: Sequence[Callable[[], object]],
    reset: Callable[[], object],
    wait: Callable[[], object],
) -> list[float]:
    """Median seconds of each call.

    The calls take turns, so that what disturbs the machine for a while disturbs all of them.

    Args:
        reset: called before each call, untimed.
        wait: returns when the device is idle.
    """
    seconds: list[list[float]] = [[] for _ in calls]
    # The first pass warms up.
    for repetition in range(REPETITIONS + 1):
        for call, times in zip(calls, seconds, strict=True):
            reset()
            wait()
            begin = time.perf_counter()
            call()
            wait()
            if repetition > 0:
                times.append(time.perf_counter() - begin)
    return [median(times) for times in seconds]
