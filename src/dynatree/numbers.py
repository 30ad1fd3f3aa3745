"""The numbers, sentences and further tables of the paper, as LaTeX macros and floats.

`main.tex` types no figure. It uses macros of three kinds, which templates make of the measured
facts: `\\num...` for what a configuration measured, under the configuration's own name; `\\role...`
for the same of the configuration that plays a part in the paper, whatever it is called; and
`\\say...` for sentences, whose direction follows the measured interval.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dynatree.ablation import BACKWARD, ConfigurationFacts
from dynatree.errors import ResultError
from dynatree.evidence import Evidence
from dynatree.render import Page, commit, fill
from dynatree.trace import Source, counted, distinct, traced

DIGITS = ("Zero", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine")


def text(evidence: Evidence, template: Path) -> Page:
    """One of `dynatree.config.TEXTS`; raises as `fill`."""
    return fill(template, _names(evidence))


def macro_name(name: str) -> str:
    """`name` in letters alone, as LaTeX wants it: `linear_k6` becomes `LinearKSix`."""
    words = "".join(
        f" {DIGITS[int(character)]} " if character in "0123456789" else character
        for character in name.replace("_", " ").replace("-", " ")
    ).split()
    return "".join(word[0].upper() + word[1:] for word in words)


def _names(evidence: Evidence) -> dict[str, object]:
    first = next(iter(evidence.sections.values()))
    configurations = [
        facts for ablation in evidence.sections.values() for facts in ablation.configurations
    ]
    measured = list({str(facts.name): facts for facts in configurations}.values())
    outputs = counted(measured, *(facts.name for facts in measured)) * first.setting.prompts
    return {
        "sections": evidence.sections,
        "experiments": list(evidence.experiments),
        "setting": first.setting,
        "backward": BACKWARD,
        "named": _named(measured),
        "roles": _roles(evidence),
        "shown": list(evidence.configurations.values()),
        "runs": evidence.runs,
        "commits": distinct(commit(facts) for facts in measured),
        "threads": distinct(facts.threads for facts in measured),
        "outputs": outputs,
        "unequal": sum(facts.unequal_prompts for facts in measured),
        "repeated": max(facts.repeated_8grams_max for facts in measured),
        "certified": [facts.lossless for facts in measured],
        "facts_of_runs": lambda *keys: _facts_of_runs(evidence, *keys),
        "seconds": _measuring_seconds(evidence),
    }


def _named(measured: list[ConfigurationFacts]) -> dict[str, ConfigurationFacts]:
    """The configurations by the name that their macros begin with."""
    named: dict[str, ConfigurationFacts] = {}
    for facts in measured:
        other = named.setdefault(macro_name(facts.name), facts)
        if other is not facts:
            raise ResultError(
                f"configurations {other.name!r} and {facts.name!r} would have macros of the same "
                "name; rename one in config.yaml"
            )
    return named


def _roles(evidence: Evidence) -> dict[str, ConfigurationFacts]:
    """The parts that configurations play: `Full`, the system that the paper presents, is what the
    backward table takes components from, or else the last row of the first table; `Fastest` has
    the largest speedup of all rows.

    Raises:
        ResultError: the full system is missing, or rows were measured on different devices.
    """
    sections = evidence.sections.values()
    tables = {table.name: (table, part) for part in sections for table in part.tables}
    backward = BACKWARD in tables
    table, part = tables[BACKWARD] if backward else next(iter(tables.values()))
    full = part.facts(table.rows[0 if backward else -1].configuration)
    for row in table.missing_below(0 if backward else len(table.rows)):
        raise ResultError(
            f"table {table.name}: {row.label!r}, the full system that the paper's numbers speak "
            f"of, is missing ({row.reason}); measure it, or render the sections alone"
        )
    if any(facts.device for facts in evidence.configurations.values()):
        raise ResultError(
            "the results are of different devices, and the paper's numbers speak of one; measure "
            "all on one, or render the sections alone"
        )
    fastest = max(evidence.configurations.values(), key=lambda facts: facts.speedup.value)
    return {"Full": full, "Fastest": fastest}


def _facts_of_runs(evidence: Evidence, *keys: str) -> list[Any]:
    """The different values that the provenance of the runs has at `keys`, sorted."""
    found = []
    for result in evidence.runs.values():
        here: Any = result.provenance
        for key in keys:
            here = here.get(key) if isinstance(here, Mapping) else None
        if here is not None:
            found.append(here)
    return distinct(found)


def _measuring_seconds(evidence: Evidence) -> float:
    """What all measuring jobs took together."""
    seconds = sum(
        (result.finished - result.started).total_seconds() for result in evidence.runs.values()
    )
    places = [
        Source(file, f"$.{name}")
        for file in evidence.run_files.values()
        for name in ("started", "finished")
    ]
    return traced(float(seconds), places)
