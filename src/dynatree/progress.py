"""How far a job is: a live line in a terminal, a few plain lines in its log.

Nothing here runs by itself: no thread draws, and a job calls `Progress.step` between the regions
that it times.
"""

import os
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self, TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

if TYPE_CHECKING:
    from dynatree.certificate import ConfigurationCheck
    from dynatree.recipes import Recipe
    from dynatree.specs import CertificateSpec, Measure, TreesSpec

TERMINAL: Final = 3
"""The descriptor at which the rules leave the terminal: standard output goes to a log as well."""

LINES: Final = 10
"""Plain lines that one job prints at most, beside those of `say`."""

REDRAW: Final = 0.2
"""Seconds between two drawings of the live line, at least."""


class Progress:
    """Shows steps of a job, with their number, the speed so far and the time left.

    A live line is drawn where standard output, or else the descriptor `TERMINAL`, is a terminal.
    Plain lines are printed where standard output is none, so that a log holds no control
    characters. Use it as a context manager, so that the live line goes away at the end.

    Args:
        name: of the configuration, in front of every line.
        unit: what a step is, in plural.
        out: where plain lines go; default: standard output.
        terminal: where the live line goes; default: as said above.
        clock: seconds since any moment, never going back.
    """

    def __init__(
        self,
        name: str,
        unit: str,
        out: TextIO | None = None,
        terminal: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name = name
        self._unit = unit
        self._out = out or sys.stdout
        self._clock = clock
        self._started = clock()
        # Of the first step and of the last drawing. What comes before the first step is no
        # measure of the others: models are loaded, graphs captured.
        self._first: tuple[int, float] | None = None
        self._done = 0
        self._drawn = float("-inf")
        self._tenths = 0
        terminal = terminal or _terminal(self._out)
        self._live = None if terminal is None else _live(terminal)
        self._plain = not self._out.isatty()

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def step(
        self, done: int, planned: int, speed: float | None = None, part: str | None = None
    ) -> None:
        """Tells that `done` of `planned` steps are done.

        Args:
            speed: tokens per second so far.
            part: where in the job that is, such as the run.
        """
        now = self._clock()
        if self._first is None or done <= self._done:
            # The job, or a part of it with steps of its own, has begun.
            self._first, self._tenths = (done, now), 0
        self._done = done
        text = self._text(done, planned, speed, part, now)
        tenths = done * LINES // planned
        if self._plain and tenths > self._tenths:
            self._print(text)
        self._tenths = tenths
        if self._live is not None and (now - self._drawn >= REDRAW or done == planned):
            self._live.update(Text(text, no_wrap=True, overflow="ellipsis"), refresh=True)
            self._drawn = now

    def say(self, text: str) -> None:
        """Prints a line that is to stay."""
        self._print(f"{self._name}: {text}")

    def rate(self, tokens: int) -> float | None:
        """Tokens per second since the beginning, all work of the job included."""
        elapsed = self._clock() - self._started
        return tokens / elapsed if elapsed > 0 else None

    def _text(
        self, done: int, planned: int, speed: float | None, part: str | None, now: float
    ) -> str:
        parts = [] if part is None else [part]
        parts.append(f"{done} of {planned} {self._unit}")
        if speed is not None:
            parts.append(f"{speed:.1f} tokens/s")
        if self._first is not None and done > self._first[0]:
            before, began = self._first
            parts.append(f"{duration((now - began) / (done - before) * (planned - done))} left")
        return f"{self._name}: {', '.join(parts)}"

    def _print(self, text: str) -> None:
        if self._live is not None:
            # The line would be printed into the live one, which the next step draws again.
            self._live.update(Text(""), refresh=True)
            self._drawn = float("-inf")
        print(text, file=self._out, flush=True)


def without_bars() -> None:
    """Switches off the bars that libraries draw while they load models, where a log has them."""
    if not sys.stderr.isatty():
        from transformers.utils import logging

        # Those of the hub, too.
        logging.disable_progress_bar()


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, such as 0:07, 12:30 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def measuring(shown: Progress, settings: "Measure") -> Callable[[int, int, float], None]:
    """What `dynatree.measure` tells its progress to: the run, the generations, the speed."""

    def step(done: int, planned: int, speed: float) -> None:
        each = planned // (settings.warmup + settings.runs)
        run = (done - 1) // each + 1 - settings.warmup
        part = f"run {run} of {settings.runs}" if run > 0 else "warm-up"
        shown.step(done, planned, speed, part)

    return step


def certifying(shown: Progress, spec: "CertificateSpec") -> Callable[["ConfigurationCheck"], None]:
    """What `dynatree.certify` tells its progress to: verdicts, and tokens compared per second."""
    checks: list[ConfigurationCheck] = []

    def step(check: "ConfigurationCheck") -> None:
        checks.append(check)
        tokens = sum(output.tokens for done in checks for output in done.greedy.outputs)
        shown.say(f"{check.name}: {check.verdict}")
        shown.step(len(checks), len(spec.strategies), shown.rate(tokens))

    return step


def recording(shown: Progress, spec: "TreesSpec") -> Callable[[int, int], None]:
    """What `dynatree.observe` tells its progress to: prompts, rounds, tokens per second."""
    prompts: list[int] = []

    def step(rounds: int, tokens: int) -> None:
        prompts.append(tokens)
        part = f"{tokens} tokens in {rounds} rounds"
        shown.step(len(prompts), len(spec.prompts), shown.rate(sum(prompts)), part)

    return step


def training(shown: Progress, recipe: "Recipe") -> Callable[[str, int, int, float], None]:
    """What `dynatree.embedded.train` tells its progress to: steps, loss, tokens per second."""
    rollout = recipe.rollout_prompt + recipe.rollout_tokens - 1
    each = {"target": recipe.batch * recipe.sequence, "draft": recipe.draft_batch * rollout}

    def step(role: str, done: int, planned: int, loss: float) -> None:
        # The draft is trained when the target is.
        tokens = done * each[role] + (recipe.target_steps * each["target"] * (role == "draft"))
        shown.step(done, planned, shown.rate(tokens), f"{role}, loss {loss:.3f}")

    return step


def _terminal(out: TextIO) -> TextIO | None:
    if out.isatty():
        return out
    if os.isatty(TERMINAL):
        return open(TERMINAL, "w", encoding="utf-8", closefd=False)
    return None


def _live(terminal: TextIO) -> Live:
    return Live(
        Text(""),
        console=Console(file=terminal, force_terminal=True),
        # A thread that draws would be measured, too.
        auto_refresh=False,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )
