"""Time per phase of decoding, on the host for CPU and on the device's own clock for CUDA."""

import time
from typing import Any

import torch


class PhaseClock:
    """Splits the time since `start` into named phases.

    On CUDA the marks are events on the current stream: they cost no synchronisation, and the
    time between them is the device's. `seconds` then waits for the last one.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

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
            totals[phase] = totals.get(phase, 0.0) + span
        return totals
