"""What a job shows of itself: lines in a log, a live line in a terminal, nothing while it times."""

import io
import os
import pty
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from dynatree.progress import LINES, Progress, certifying, duration, measuring, recording, training
from dynatree.recipes import Recipe
from dynatree.specs import Measure

SRC = Path(__file__).parent.parent / "src"


class Clock:
    """Seconds that pass only when they are told to."""

    now = 100.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def log():
    return io.StringIO()


def test_a_long_job_prints_few_lines_with_what_is_left(clock, log):
    with Progress("tree", "generations", log, clock=clock) as shown:
        for done in range(1, 1001):
            clock.now += 0.5
            shown.step(done, 1000, 120.04, "run 1 of 5")
        shown.say("2.50 tokens per round")
    lines = log.getvalue().splitlines()
    assert len(lines) == LINES + 1
    assert lines[0] == "tree: run 1 of 5, 100 of 1000 generations, 120.0 tokens/s, 7:30 left"
    assert lines[-2] == "tree: run 1 of 5, 1000 of 1000 generations, 120.0 tokens/s, 0:00 left"
    assert lines[-1] == "tree: 2.50 tokens per round"
    assert all(line.isprintable() for line in lines)


def test_the_first_step_is_no_measure_of_the_others(clock, log):
    shown = Progress("tree", "generations", log, clock=clock)
    clock.now += 60
    shown.step(1, 4)
    clock.now += 2
    shown.step(2, 4)
    assert log.getvalue().splitlines() == [
        "tree: 1 of 4 generations",
        "tree: 2 of 4 generations, 0:04 left",
    ]


def test_a_part_with_steps_of_its_own_begins_anew(clock, log):
    shown = Progress("pair", "steps", log, clock=clock)
    for part, planned, seconds in (("target", 4, 1.0), ("draft", 2, 10.0)):
        for done in range(1, planned + 1):
            clock.now += seconds
            shown.step(done, planned, part=part)
    assert log.getvalue().splitlines()[3:] == [
        "pair: target, 4 of 4 steps, 0:00 left",
        "pair: draft, 1 of 2 steps",
        "pair: draft, 2 of 2 steps, 0:00 left",
    ]


def test_a_terminal_has_one_line_that_goes_away_and_no_others(clock):
    terminal = Terminal()
    threads = threading.active_count()
    with Progress("tree", "generations", terminal, clock=clock) as shown:
        # Nothing draws while a region is timed.
        assert threading.active_count() == threads
        for done in range(1, 101):
            clock.now += 0.01
            shown.step(done, 100)
        before = terminal.getvalue()
        shown.say("stays")
    text = terminal.getvalue()
    # One second: drawn five times and at the end, not at each of 100 steps.
    assert 5 <= before.count("generations") <= 7
    assert "100 of 100 generations" in before
    assert text.count("\n") <= 2
    assert re.search(r"tree: stays\n", text)
    assert text.rindex("\x1b[2K") > text.rindex("generations")


JOB = """
from dynatree.progress import Progress
with Progress("tree", "steps") as shown:
    for done in range(1, 41):
        shown.step(done, 40)
    shown.say("finished")
"""


def test_behind_tee_the_terminal_is_drawn_to_and_the_log_stays_plain(tmp_path):
    """As the rules do it: descriptor 3 is the terminal, standard output goes through tee."""
    master, slave = pty.openpty()
    job = tmp_path / "job.py"
    job.write_text(JOB)
    log = tmp_path / "log"
    done = subprocess.run(
        ["bash", "-c", f"exec 3>&1; {sys.executable} {job} 2>&1 | tee {log} > /dev/null"],
        stdout=slave,
        env=os.environ | {"PYTHONPATH": str(SRC), "TERM": "xterm", "COLUMNS": "80"},
        timeout=300,
        check=True,
    )
    os.close(slave)
    drawn = b""
    try:
        while chunk := os.read(master, 65536):
            drawn += chunk
    except OSError:  # the end, as Linux has it
        pass
    os.close(master)
    assert done.returncode == 0
    assert b"40 of 40 steps" in drawn
    assert b"\x1b[2K" in drawn
    lines = log.read_text().splitlines()
    assert len(lines) == LINES + 1
    assert lines[-1] == "tree: finished"
    assert all(line.isprintable() for line in lines)


def test_without_a_terminal_nothing_is_drawn(clock, log):
    shown = Progress("tree", "steps", log, clock=clock)
    shown.step(1, 2)
    assert log.getvalue() == "tree: 1 of 2 steps\n"


def test_an_interrupted_job_leaves_a_clean_terminal(clock):
    terminal = Terminal()

    def job():
        with Progress("tree", "steps", terminal, clock=clock) as shown:
            shown.step(1, 2)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job()
    # The cursor, hidden while the line is live, is shown again.
    assert terminal.getvalue().rindex("\x1b[?25h") > terminal.getvalue().rindex("1 of 2 steps")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (754, "12:34"), (3723, "1:02:03")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_a_measurement_names_its_run_and_its_warm_up(clock, log):
    shown = Progress("tree", "generations", log, clock=clock)
    step = measuring(shown, Measure(workload="w", runs=2, warmup=1))
    # Two prompts and two methods in each pass.
    for done in range(1, 13):
        step(done, 12, 50.0)
    runs = [line.split(": ")[1].split(",")[0] for line in log.getvalue().splitlines()]
    assert list(dict.fromkeys(runs)) == ["warm-up", "run 1 of 2", "run 2 of 2"]
    assert "run 1 of 2, 8 of 12 generations, 50.0 tokens/s" in log.getvalue()


def test_a_certificate_counts_configurations_and_tokens(clock, log):
    shown = Progress("certificate", "configurations", log, clock=clock)
    step = certifying(shown, SimpleNamespace(strategies={"a": 0, "b": 0}))
    for name in "ab":
        clock.now += 4
        outputs = [SimpleNamespace(tokens=10), SimpleNamespace(tokens=30)]
        step(SimpleNamespace(name=name, verdict="equal", greedy=SimpleNamespace(outputs=outputs)))
    assert log.getvalue().splitlines() == [
        "certificate: a: equal",
        "certificate: 1 of 2 configurations, 10.0 tokens/s",
        "certificate: b: equal",
        "certificate: 2 of 2 configurations, 10.0 tokens/s, 0:00 left",
    ]


def test_recorded_trees_count_prompts(clock, log):
    shown = Progress("tree", "prompts", log, clock=clock)
    step = recording(shown, SimpleNamespace(prompts=["a", "b"]))
    clock.now += 2
    step(7, 20)
    assert log.getvalue() == "tree: 20 tokens in 7 rounds, 1 of 2 prompts, 10.0 tokens/s\n"


def test_training_counts_the_tokens_of_both_models(clock, log):
    recipe = Recipe.model_validate(
        {
            "target": {"layers": 1, "width": 8, "heads": 1},
            "draft": {"layers": 1, "width": 8, "heads": 1},
            "batch": 2,
            "sequence": 10,
            "target_steps": 5,
            "draft_batch": 3,
            "rollout_prompt": 4,
            "rollout_tokens": 7,
            "rollouts": 8,
            "draft_steps": 4,
        }
    )
    shown = Progress("pair", "steps", log, clock=clock)
    step = training(shown, recipe)
    clock.now += 10
    step("target", 5, 5, 2.5)
    step("draft", 1, 4, 1.25)
    assert log.getvalue().splitlines() == [
        "pair: target, loss 2.500, 5 of 5 steps, 10.0 tokens/s",
        "pair: draft, loss 1.250, 1 of 4 steps, 13.0 tokens/s",
    ]
