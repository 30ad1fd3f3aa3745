"""From the results of a study to the rows of its tables; notation as in `dynatree.run_facts`."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from dynatree.ablation import (
    Ablation,
    Estimate,
    MissingRow,
    Row,
    Setting,
    Sweep,
    Table,
)
from dynatree.certificate import Lossless
from dynatree.config import Config
from dynatree.errors import ResultError
from dynatree.estimates import (
    Floats,
)
from dynatree.intake import (
    Origin,
    device_of,
    devices_of,
    notes_of,
    pair_setting,
    read_certified,
    read_runs,
    require_one_device,
    without_cure,
)
from dynatree.run_facts import (
    change_of,
    count_columns,
    estimate_columns,
    facts_of,
    fastest_of,
    overrides_of,
    prompt_speedups,
    setting_columns,
    speed_columns,
)


def aggregate(
    config: Config,
    results_dir: Path,
    source_digest: str,
    certificate: tuple[Path, str] | None = None,
    mark_missing: bool = False,
) -> Ablation:
    """Aggregates the result of every configuration that some table needs.

    Args:
        config: the study; says which results are current.
        results_dir: holds `<pair>/<name>.json`.
        source_digest: digest of the code that measures (hex); other code's results are refused.
        certificate: the file of the losslessness certificate, and the digest of the code that
            makes it; without one, no row is said to be lossless.
        mark_missing: a row is marked where its result, or one that a sweep needs, is missing or
            not current, and so is a certificate, instead of an error.

    Raises:
        ResultError: a result or the certificate is missing, damaged, of another specification or
            other code, or they come from different weights, or from different devices that the
            configuration does not group; or nothing is left to show.
        LosslessError: the certificate says that a configuration is not lossless.
    """
    results, origins, reasons = read_runs(
        config, config.measured, results_dir, source_digest, mark_missing
    )
    if not results:
        listed = "".join(f"\n  {name}: {reason}" for name, reason in reasons.items())
        raise ResultError(f"{results_dir}: there is no result to show:{listed}")
    weights = next(iter(results.values())).pair_digest
    notes = notes_of(origins)
    certified: dict[str, Lossless] = {}
    if certificate:
        try:
            certified = read_certified(config, origins, *certificate, weights)
        except ResultError as error:
            if not mark_missing:
                raise
            notes.append(f"Losslessness was not certified: {without_cure(error)}.")
        else:
            elsewhere = [name for name in origins if name not in certified]
            if elsewhere:
                notes.append(
                    "The certificate was made on another device than "
                    f"{', '.join(elsewhere)}, which it says nothing of."
                )
    speedups = {name: prompt_speedups(result) for name, result in results.items()}
    used = dict.fromkeys(row for rows in config.tables.values() for row in rows)
    absent = _absent(config, used, reasons)
    winners = {row: _winner(config, row, speedups, origins) for row in used if row not in absent}
    shown = [table for table, rows in config.tables.items() if any(row in winners for row in rows)]
    notes += [
        f"Table {table} is missing, because all of its rows are ({absent[rows[0]]})."
        for table, rows in config.tables.items()
        if table not in shown
    ]
    return Ablation(
        setting=Setting(
            **pair_setting(config, origins).model_dump(),
            prompts=len(next(iter(results.values())).spec.prompts),
            runs=config.measurement.runs,
            max_new_tokens=config.measurement.max_new_tokens,
        ),
        configurations=[
            facts_of(
                name,
                result,
                origins[name],
                speedups[name],
                overrides_of(config, name),
                certified.get(name),
                device_of(name, origins),
            )
            for name, result in results.items()
        ],
        sweeps=[
            Sweep(name=row, best_of=config.candidates(row), winner=winners[row])
            for row in winners
            if row in config.sweeps
        ],
        tables=[_table(config, table, winners, absent, speedups, origins) for table in shown],
        notes=notes,
    )


def to_csv(ablation: Ablation) -> str:
    """One line per configuration, intervals as `_low` and `_high`, changes by table."""
    lines = []
    for facts in ablation.configurations:
        changes: dict[str, Any] = {}
        for table in ablation.tables:
            row = next((row for row in table.rows if row.configuration == facts.name), None)
            for versus in ("versus_previous", "versus_first"):
                changes |= estimate_columns(f"{table.name}_{versus}", getattr(row, versus, None))
        best_of = "; ".join(sweep.name for sweep in ablation.sweeps if sweep.winner == facts.name)
        lines.append(
            {
                "configuration": facts.name,
                **setting_columns(facts, ablation.setting),
                "best_of": best_of,
                **speed_columns(facts),
                **changes,
                **count_columns(facts, ablation.configurations),
            }
        )
    return pd.DataFrame(lines).to_csv(index=False, lineterminator="\n")


def _winner(
    config: Config, row: str, speedups: dict[str, Floats], origins: Mapping[str, Origin]
) -> str:
    candidates = config.candidates(row)
    require_one_device(f"sweeps.{row}", candidates, origins)
    return fastest_of(candidates, speedups)


def _absent(config: Config, rows: Iterable[str], reasons: Mapping[str, str]) -> dict[str, str]:
    """Why rows cannot be shown: of a sweep every candidate is needed to know the fastest."""
    absent = {}
    for row in rows:
        missing = [name for name in config.candidates(row) if name in reasons]
        if missing:
            named = f"{missing[0]}: " if row in config.sweeps else ""
            absent[row] = f"{named}{reasons[missing[0]]}"
    return absent


def _table(
    config: Config,
    table: str,
    winners: Mapping[str, str],
    absent: Mapping[str, str],
    speedups: Mapping[str, Floats],
    origins: Mapping[str, Origin],
) -> Table:
    """A table with its rows grouped by device; a missing row stays in its place."""
    devices = devices_of(origins)
    groups: dict[int, list[str]] = {}
    group = 0
    for row in config.tables[table]:
        if row in winners:
            group = devices.index(origins[winners[row]].device.name)
        groups.setdefault(group, []).append(row)
    rows: list[Row] = []
    missing: list[MissingRow] = []
    for row in (row for _, group_rows in sorted(groups.items()) for row in group_rows):
        label = config.label(row, table)
        if row in absent:
            missing.append(MissingRow(below=len(rows), label=label, reason=absent[row]))
            continue
        name, swept = winners[row], row in config.sweeps
        gaps = {entry.below for entry in missing}
        above = rows[-1].configuration if rows and len(rows) not in gaps else None
        top = rows[0].configuration if rows and 0 not in gaps else None
        rows.append(
            Row(
                configuration=name,
                sweep=row if swept else None,
                label=f"{label} ({config.strategy(name).describe()})" if swept else label,
                versus_previous=_compared(name, above, speedups, origins),
                versus_first=_compared(name, top, speedups, origins),
            )
        )
    return Table(name=table, rows=rows, missing=missing)


def _compared(
    name: str,
    other: str | None,
    speedups: Mapping[str, Floats],
    origins: Mapping[str, Origin],
) -> Estimate | None:
    """The change from `other` to `name`; None without another, or if its device is another."""
    if other is None or origins[name].device.name != origins[other].device.name:
        return None
    return change_of(speedups[name], speedups[other])
