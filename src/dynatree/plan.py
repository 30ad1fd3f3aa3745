"""What the pipeline would do now: which jobs are stale, why, and how long they took before.

The jobs and their reasons are those of Snakemake's own dry run. Where the parameters of a job have
changed, which are specifications in JSON, the fields that changed are named with both values.
"""

import ast
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from snakemake.api import SnakemakeApi
from snakemake.exceptions import format_exception_to_string
from snakemake.settings.types import (
    ConfigSettings,
    DAGSettings,
    OutputSettings,
    ResourceSettings,
)

from dynatree.differences import differences, shown
from dynatree.errors import DynaTreeError
from dynatree.schema import short

BEFORE = ("before", "now")
"""What the two sides of a changed field are called."""

_DIGEST = re.compile(r"[0-9a-f]{64}")


class PlanError(DynaTreeError):
    """Snakemake cannot say what is to be done; the message is its own."""


@dataclass(frozen=True)
class Job:
    """A job that would run.

    Attributes:
        rule: the rule that makes it.
        name: its wildcards, with slashes; empty if it has none.
        reasons: why it is stale, a line each.
        seconds: what it took before, or else the median of those jobs of its rule that the targets
            need as well; None if that is not known.
    """

    rule: str
    name: str
    reasons: tuple[str, ...]
    seconds: float | None


def planned(targets: Sequence[str] = (), folder: Path | None = None) -> list[Job]:
    """The jobs that `snakemake <targets>` would run, in an order in which they can run.

    Args:
        targets: files or rules; none for the default target.
        folder: of the Snakefile; default: the current one.

    Raises:
        PlanError: there is no such target, or the configuration is not valid.
    """
    quiet = OutputSettings(dryrun=True, log_level_override=logging.CRITICAL + 1)
    with SnakemakeApi(quiet) as api:
        linemaps: dict[str, dict[int, int]] = {}
        try:
            workflow = api.workflow(ResourceSettings(cores=1), ConfigSettings(), workdir=folder)
            run = workflow.dag(DAGSettings(targets=frozenset(targets), force_incomplete=True))
            run.execute_workflow(executor="dryrun")
            # The public interface prints reasons, and gives none as data.
            loaded = workflow._workflow
            linemaps = loaded.linemaps
            return _stale(loaded.dag, loaded.persistence)
        except Exception as error:  # Snakemake's exceptions have no common base
            text = format_exception_to_string(error, linemaps).strip()
            raise PlanError(f"snakemake cannot plan: {text}") from error


def _stale(dag: Any, persistence: Any) -> list[Job]:
    """The jobs of a dry run that would be executed; targets, which do nothing, are left out."""
    took: dict[str, list[float]] = {}
    for job in dag.jobs:
        if (seconds := _seconds(job, persistence)) is not None:
            took.setdefault(job.rule.name, []).append(seconds)
    waiting = set(dag.needrun_jobs(exclude_finished=False))
    found = []
    for level in dag.toposorted():
        stale = []
        for job in waiting & set(level):
            rule = job.rule.name
            if job.rule.norun:
                continue
            seconds = _seconds(job, persistence)
            if seconds is None and rule in took:
                seconds = median(took[rule])
            name = "/".join(job.wildcards_dict.values())
            stale.append(Job(rule, name, tuple(_reasons(job, dag, persistence, waiting)), seconds))
        found += sorted(stale, key=lambda job: (job.rule, job.name))
    return found


def _seconds(job: Any, persistence: Any) -> float | None:
    """How long the job took when its present outputs were made, as Snakemake recorded it."""
    # A failed job leaves a record as well, and no output.
    records = [persistence.metadata(path) for path in job.output if Path(path).exists()]
    spans = [
        record.endtime - record.starttime
        for record in records
        if record is not None and record.starttime is not None and record.endtime is not None
    ]
    return max(spans, default=None)


def _reasons(job: Any, dag: Any, persistence: Any, waiting: set[Any]) -> list[str]:
    reason = dag.reason(job)
    found = []
    if reason.forced:
        found.append("asked for")
    if reason.missing_output:
        found.append("its output is missing")
    if reason.incomplete_output:
        found.append("its last run was broken off")
    if files := sorted(map(str, reason.updated_input - reason.updated_input_run)):
        found.append(f"changed: {shown(files)}")
    if reason.code_changed:
        found.append("the command of its rule has changed")
    # Snakemake looks at parameters only where no input has changed.
    found += parameter_changes(
        persistence.params_changed(job),
        {name: persistence._serialize_param(value) for name, value in job.params.items()},
    )
    if reason.input_changed:
        found.append("its set of input files has changed")
    if reason.software_stack_changed:
        found.append("its software environment has changed")
    before = sorted({needed.rule.name for needed in dag.dependencies[job] if needed in waiting})
    if before:
        found.append(f"follows {', '.join(before)}")
    return found or [str(reason)]


def parameter_changes(change: Any, present: Mapping[str, str]) -> list[str]:
    """A line for each field that differs between the parameters before and now.

    Args:
        change: sets `only_old` and `only_new` of the `repr` of parameters; Snakemake records no
            names, so that values of one shape are taken for one parameter.
        present: the names of the parameters, and their `repr` now.
    """
    old = [ast.literal_eval(text) for text in sorted(change.only_old)]
    names = {text: name for name, text in present.items()}
    lines = []
    for text in sorted(change.only_new, key=lambda text: names.get(text, text)):
        name, now = names.get(text, "parameter"), _read(ast.literal_eval(text))
        match = next((value for value in old if _shape(_read(value)) == _shape(now)), None)
        if match is None:
            lines.append(f"{name}: now {short(now)}")
            continue
        old.remove(match)
        if _shape(now) == "digest":
            lines.append(f"{name}: other code")
        else:
            found = differences(_read(match), now, BEFORE, "" if isinstance(now, dict) else name)
            lines.append(shown(found) if found else f"{name}: in another order")
    return lines + [f"no longer a parameter: {short(value)}" for value in old]


def _read(value: Any) -> Any:
    """A parameter, or each member of a list, as the JSON that it holds."""
    if isinstance(value, list):
        return [_read(entry) for entry in value]
    try:
        return json.loads(value)
    except (TypeError, ValueError):
        return value


def _shape(value: Any) -> object:
    """Equal for two values of one parameter."""
    if isinstance(value, dict):
        return frozenset(value)
    if isinstance(value, str) and _DIGEST.fullmatch(value):
        return "digest"
    return type(value).__name__


def lines(jobs: Iterable[Job]) -> list[str]:
    """What a person reads: how much there is to do, then jobs with the same reasons together."""
    jobs = list(jobs)
    if not jobs:
        return ["Nothing is stale."]
    groups: dict[tuple[str, tuple[str, ...]], list[Job]] = {}
    for job in jobs:
        groups.setdefault((job.rule, job.reasons), []).append(job)
    text = [f"{_count(len(jobs), 'job')}{_estimate(jobs)}"]
    for (rule, reasons), members in groups.items():
        names = [job.name for job in members if job.name]
        of = f" {', '.join(names)}" if names else ""
        text.append(f"{rule}{of}{_estimate(members)}")
        text += [f"    {reason}" for reason in reasons]
    return text


def _estimate(jobs: Sequence[Job]) -> str:
    """How long the jobs take one after another, as far as that is known."""
    known = [job.seconds for job in jobs if job.seconds is not None]
    if not known:
        return ""
    minutes, seconds = divmod(round(sum(known)), 60)
    unknown = len(jobs) - len(known)
    more = f", and {unknown} that never ran here" if unknown else ""
    return f", about {f'{minutes} min ' if minutes else ''}{seconds} s as last time{more}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")
