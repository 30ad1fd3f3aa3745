"""From result files to the numbers of the paper; refuses what was not measured as configured.

Notation: a generation's throughput is its new tokens divided by its wall time in seconds.

- Throughput of a configuration: median over its timed generations.
- Speedup of a generation: its throughput divided by that of the autoregressive generation of the
  same job, prompt and run, its neighbour in time. A prompt's speedup is the median over its runs,
  a configuration's the geometric mean over prompts, the one mean of ratios that does not depend
  on which method is the reference (Fleming and Wallace, 1986, CACM 29(3)).
- Change against another row: ratio of the two speedups of a prompt, geometric mean over prompts,
  minus 1. Each row's speedup is paired within its own job, so drift between jobs cancels.
- Row of a sweep: the candidate with the largest speedup, see `dynatree.ablation.Sweep` for what
  that choice does to the numbers. The candidates are all measured and all reported.
- Change of a point of an experiment against another: as between rows where both have the same
  prompts, otherwise the same ratio with the prompts of each resampled independently.
- Acceptance: accepted draft tokens per draft token on the deepest path offered, so never above 1,
  whatever the width of the tree; by depth, rounds that accepted there per round that offered there.
- Tokens per round by position: greedy text that starts to loop inflates acceptance, so rounds are
  also counted by how many new tokens stood before them, beside a measure of the repetition.
- Latency: time to first token (TTFT) is the prefill of target and draft; time per output token
  (TPOT) is the remaining time divided by the remaining tokens; medians over generations.
- Intervals: see `dynatree.estimates`.
"""

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd
from pydantic import BaseModel, PositiveInt, ValidationError

from dynatree.ablation import (
    Ablation,
    ConfigurationFacts,
    DepthAcceptance,
    Estimate,
    Interval,
    Latency,
    MissingRow,
    Override,
    PairSetting,
    PositionRounds,
    Row,
    Setting,
    Sweep,
    Table,
)
from dynatree.certificate import Lossless, read_certificate
from dynatree.config import Config, Point
from dynatree.costs import predictions, round_costs
from dynatree.differences import differences, shown
from dynatree.errors import ResultError
from dynatree.estimates import (
    Floats,
    estimate,
    geometric_mean,
    independent_ratio,
    median,
    paired_ratios,
)
from dynatree.experiments import Experiment, FigureKind, PointFacts, Prediction
from dynatree.facts import first_problem
from dynatree.failures import failure_reason
from dynatree.files import short_digest
from dynatree.recipes import Transformer
from dynatree.results import Method, RunResult, read_result
from dynatree.specs import Models, ModelSource, RunSpec, Spec

POSITIONS: Final = (0, 100, 500)
"""New tokens after which the ranges of output positions begin; each ends where the next begins."""


class _Device(BaseModel):
    type: str
    name: str
    threads: PositiveInt
    shared_with: list[str] = []


class _Git(BaseModel):
    commit: str | None
    dirty: bool | None


class _Provenance(BaseModel):
    """The part of a result's provenance that the paper states."""

    device: _Device
    git: _Git


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
    results, origins, reasons = _read(
        config, config.measured, results_dir, source_digest, mark_missing
    )
    if not results:
        listed = "".join(f"\n  {name}: {reason}" for name, reason in reasons.items())
        raise ResultError(f"{results_dir}: there is no result to show:{listed}")
    weights = next(iter(results.values())).pair_digest
    notes = _notes(origins)
    certified: dict[str, Lossless] = {}
    if certificate:
        try:
            certified = _certified(config, list(results), *certificate, weights)
        except ResultError as error:
            if not mark_missing:
                raise
            notes.append(f"Losslessness was not certified: {_without_cure(error)}.")
    speedups = {name: _prompt_speedups(result) for name, result in results.items()}
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
            **_setting(config, origins).model_dump(),
            prompts=len(next(iter(results.values())).spec.prompts),
            runs=config.measurement.runs,
            max_new_tokens=config.measurement.max_new_tokens,
        ),
        configurations=[
            _facts(
                name,
                result,
                origins[name],
                speedups[name],
                _overrides(config, name),
                certified.get(name),
                _device_of(name, origins),
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


def aggregate_experiment(
    config: Config, name: str, results_dir: Path, source_digest: str
) -> Experiment:
    """Aggregates the runs of all points of the experiment called `name`.

    The points are not certified: their jobs compare what they measure with autoregressive
    decoding, as every job does.

    Args:
        config: the study; says which results are current.
        results_dir: holds `<pair>/<run>.json`.
        source_digest: digest of the code that measures (hex); other code's results are refused.

    Raises:
        ConfigError: there is no such experiment.
        ResultError: a result is missing, damaged, of another specification or other code, or they
            come from different weights or devices.
    """
    points = config.points(name)
    runs = list(dict.fromkeys(point.run for point in points))
    results, origins, _ = _read(config, runs, results_dir, source_digest)
    speedups = {run: _prompt_speedups(result) for run, result in results.items()}
    fastest = set()
    for point in points:
        # Candidates of one row at the same place of the grid.
        rivals = {
            other.run: other
            for other in points
            if (other.row, other.values) == (point.row, point.values)
        }
        _one_device(f"{name}: {point.row}", list(rivals), origins)
        fastest.add(rivals[_fastest(list(rivals), speedups)].name)
    shown = [point for point in points if point.name in fastest]
    kind = config.experiments[name].kind
    references = {point.name: _reference(kind, point, shown, results, speedups) for point in points}
    predicted = _predictions(shown, results) if kind == "budget" else {}
    return Experiment(
        experiment=name,
        title=config.experiments[name].title or name.replace("_", " ").capitalize(),
        figure=kind,
        setting=_setting(config, origins),
        axes=list(dict.fromkeys(key for point in points for key in point.values)),
        points=[
            _point(
                config,
                name,
                point,
                results[point.run],
                origins[point.run],
                speedups[point.run],
                point.name in fastest,
                _device_of(point.run, origins),
                _point_change(point, references[point.name], results, origins, speedups),
                predicted.get(point.name),
            )
            for point in points
        ],
        notes=_notes(origins),
    )


def to_csv(ablation: Ablation) -> str:
    """One line per configuration, intervals as `_low` and `_high`, changes by table."""
    lines = []
    for facts in ablation.configurations:
        changes: dict[str, Any] = {}
        for table in ablation.tables:
            row = next((row for row in table.rows if row.configuration == facts.name), None)
            for versus in ("versus_previous", "versus_first"):
                changes |= _flat(f"{table.name}_{versus}", getattr(row, versus, None))
        best_of = "; ".join(sweep.name for sweep in ablation.sweeps if sweep.winner == facts.name)
        lines.append(
            {
                "configuration": facts.name,
                **_described(facts, ablation.setting),
                "best_of": best_of,
                **_speeds(facts),
                **changes,
                **_counts(facts, ablation.configurations),
            }
        )
    return pd.DataFrame(lines).to_csv(index=False, lineterminator="\n")


def experiment_csv(experiment: Experiment) -> str:
    """One line per point: where in the grid it lies, then what `to_csv` says of it."""
    lines = [
        {
            "point": facts.name,
            **facts.model_dump(
                include={
                    "run",
                    "row",
                    "configuration",
                    "label",
                    "shown",
                    "workload",
                    "prompts",
                    "prompts_digest",
                    "prompt_tokens_mean",
                    "max_new_tokens",
                    "runs",
                }
            ),
            **{f"grid_{axis}": facts.values.get(axis) for axis in experiment.axes},
            **_described(facts, experiment.setting),
            **_speeds(facts),
            "reference": facts.reference,
            **_flat("change", facts.change),
            "predicted_speedup": facts.predicted and facts.predicted.speedup,
            **_counts(facts, experiment.points),
        }
        for facts in experiment.points
    ]
    return pd.DataFrame(lines).to_csv(index=False, lineterminator="\n")


def _described(facts: ConfigurationFacts, setting: PairSetting) -> dict[str, Any]:
    return {
        "pair": setting.pair,
        "device": facts.device or setting.device,
        "description": facts.description,
        "overrides": "; ".join(f"{entry.key}={entry.value}" for entry in facts.overrides),
    }


def _speeds(facts: ConfigurationFacts) -> dict[str, Any]:
    return {
        **_flat("throughput_tokens_per_second", facts.throughput),
        **_flat("autoregressive_tokens_per_second", facts.autoregressive_throughput),
        **_flat("speedup", facts.speedup),
    }


def _counts(facts: ConfigurationFacts, lines: Sequence[ConfigurationFacts]) -> dict[str, Any]:
    """Columns of `facts`, the same for all `lines` of a file."""
    line = facts.model_dump(
        include={
            "tokens_per_generation",
            "rounds",
            "tokens_per_round",
            "nodes_per_round",
            "acceptance",
            "repeated_8grams_mean",
            "repeated_8grams_max",
            "peak_memory_bytes",
            "unequal_prompts",
            "lossless",
            "threads",
            "commit",
            "dirty",
        }
    )
    line["accepted_length"] = facts.accepted_length
    line |= _flat("first_token_seconds", facts.latency.first_token)
    line |= _flat("first_token_change", facts.latency.first_token_change)
    line |= _flat("seconds_per_token", facts.latency.per_token)
    for part in facts.rounds_by_position:
        where = f"{part.start}_to_{part.stop}" if part.stop else f"from_{part.start}"
        line[f"rounds_{where}"] = part.rounds
        line[f"tokens_per_round_{where}"] = part.tokens_per_round
    line |= _flat("later_rounds", facts.later_rounds)
    by_depth = {entry.depth: entry for entry in facts.acceptance_by_depth}
    deepest = max(len(facts.acceptance_by_depth) for facts in lines)
    for depth in range(1, deepest + 1):
        entry = by_depth.get(depth)
        line[f"acceptance_depth_{depth}"] = entry.accepted / entry.offered if entry else None
    return line | {f"{phase}_share": share for phase, share in facts.phase_share.items()}


def _read(
    config: Config,
    names: Sequence[str],
    results_dir: Path,
    source_digest: str,
    mark_missing: bool = False,
) -> tuple[dict[str, RunResult], dict[str, _Provenance], dict[str, str]]:
    """The current results of the runs `names`, where they come from, and why others are missing.

    Raises:
        ResultError: one is missing or not current, unless `mark_missing`; or see `aggregate`.
    """
    paths = {name: results_dir / config.pair / f"{name}.json" for name in names}
    results: dict[str, RunResult] = {}
    origins: dict[str, _Provenance] = {}
    reasons: dict[str, str] = {}
    for name, path in paths.items():
        spec = config.spec(name)
        try:
            result = _current(path, spec, source_digest)
            origins[name] = _origin(path, result)
        except ResultError as error:
            if not mark_missing:
                raise
            unknown = _without_cure(error) if path.exists() else "not measured"
            reasons[name] = failure_reason(path, spec.digest) or unknown
        else:
            results[name] = result
    if results:
        _same_weights(results, paths)
    if config.devices.mixed == "refuse":
        _same_device(origins, paths)
    return results, origins, reasons


def _without_cure(error: ResultError) -> str:
    """What is wrong, without what to do: a reader of the table can do nothing about it."""
    text = str(error).partition("; remove it")[0].partition("; run: ")[0]
    return text.partition(": ")[2] or text


def _devices(origins: Mapping[str, _Provenance]) -> list[str]:
    """The devices that results come from, in order of first use."""
    return list(dict.fromkeys(origin.device.name for origin in origins.values()))


def _device_of(name: str, origins: Mapping[str, _Provenance]) -> str | None:
    """What run `name` was measured on, where that is not the same for all runs."""
    return origins[name].device.name if len(_devices(origins)) > 1 else None


def _setting(config: Config, origins: Mapping[str, _Provenance]) -> PairSetting:
    device = next(iter(origins.values())).device
    return PairSetting(
        pair=config.pair,
        note=config.pair_spec.note,
        target=_model(config.pair_spec, "target"),
        draft=_model(config.pair_spec, "draft"),
        dtype=config.pair_spec.dtype,
        device_type=device.type,
        device=" and ".join(_devices(origins)),
    )


def _point(
    config: Config,
    experiment: str,
    point: Point,
    result: RunResult,
    origin: _Provenance,
    speedups: Floats,
    fastest: bool,
    device: str | None,
    compared: tuple[str, Estimate] | None,
    predicted: Prediction | None,
) -> PointFacts:
    overrides = [
        entry for entry in _overrides(config, point.config) if entry.key not in point.values
    ]
    facts = _facts(point.name, result, origin, speedups, overrides, None, device)
    label = config.label(point.row, experiment)
    return PointFacts(
        **dict(facts),
        run=point.run,
        spec_digest=result.spec_digest,
        row=point.row,
        configuration=point.config,
        label=f"{label} ({facts.description})" if point.row in config.sweeps else label,
        shown=fastest,
        values=point.values,
        workload=result.spec.measure.workload,
        prompts=len(result.spec.prompts),
        prompts_digest=result.prompts_digest,
        prompt_tokens_mean=float(np.mean([output.prompt_tokens for output in result.outputs])),
        max_new_tokens=result.spec.measure.max_new_tokens,
        runs=result.spec.measure.runs,
        reference=compared[0] if compared else None,
        change=compared[1] if compared else None,
        predicted=predicted,
    )


def _reference(
    kind: FigureKind,
    point: Point,
    shown: Sequence[Point],
    results: Mapping[str, RunResult],
    speedups: Mapping[str, Floats],
) -> Point:
    """The point that `point` is compared with, as `FigureKind` says; it may be itself."""
    if kind == "heatmap":
        names = [other.run for other in shown]
        return shown[names.index(_fastest(names, speedups))]
    if kind == "bars":
        here = [other for other in shown if other.values == point.values]
        drafting = [other for other in here if results[other.run].spec.strategy.max_depth > 0]
        return (drafting or here)[0]
    row = [other for other in shown if other.row == point.row]
    if kind != "multiples":
        return row[0]
    runs = [other.run for other in row]
    shared = [other for other in row if runs.count(other.run) > 1]
    return (shared or [other for other in row if set(other.values) == set(point.values)])[0]


def _point_change(
    point: Point,
    reference: Point,
    results: Mapping[str, RunResult],
    origins: Mapping[str, _Provenance],
    speedups: Mapping[str, Floats],
) -> tuple[str, Estimate] | None:
    """The name of the reference and the change of the speedup; None where both are one run, or
    were measured on different devices."""
    if point.run == reference.run:
        return None
    if origins[point.run].device.name != origins[reference.run].device.name:
        return None
    here, there = speedups[point.run], speedups[reference.run]
    if results[point.run].spec.prompts == results[reference.run].spec.prompts:
        return reference.name, _change(here, there)
    ratio = independent_ratio(here, there)
    return reference.name, Estimate(
        value=ratio.value - 1,
        interval=ratio.interval
        and Interval(low=ratio.interval.low - 1, high=ratio.interval.high - 1),
    )


def _predictions(shown: Sequence[Point], results: Mapping[str, RunResult]) -> dict[str, Prediction]:
    """What the cost model predicts for each point, by name."""
    found: dict[str, Prediction] = {}
    for row in dict.fromkeys(point.row for point in shown):
        costs = {
            point.name: cost
            for point in shown
            if point.row == row and (cost := round_costs(results[point.run])) is not None
        }
        found |= predictions(costs)
    return found


def _current(path: Path, spec: RunSpec, source_digest: str) -> RunResult:
    result = read_result(path)
    _same_spec(path, result.spec, spec)
    _same_code(path, result.source_digest, source_digest)
    return result


def _certified(
    config: Config, names: Sequence[str], path: Path, source_digest: str, pair_digest: str
) -> dict[str, Lossless]:
    """What a certificate of this study, code and weights found of the configurations `names`."""
    certificate = read_certificate(path)
    made = certificate.spec.only(names)
    _same_spec(path, made, config.certificate_spec(names))
    _same_code(path, certificate.source_digest, source_digest)
    if certificate.pair_digest != pair_digest:
        raise ResultError(
            f"{path}: measured with other model weights (pair digest "
            f"{certificate.pair_digest[:12]}) than the results ({pair_digest[:12]}); remove it and "
            f"run: snakemake {path}"
        )
    certificate.require()
    return {
        check.name: check.verdict
        for check in certificate.configurations
        if check.verdict != "failed"
    }


def _same_spec(path: Path, measured: Spec, configured: Spec) -> None:
    if measured.digest == configured.digest:
        return
    found = differences(measured.model_dump(mode="json"), configured.model_dump(mode="json"))
    raise ResultError(
        f"{path}: measured with another configuration ({shown(found)}); remove it and run: "
        f"snakemake {path}"
    )


def _same_code(path: Path, measured: str, current: str) -> None:
    if measured != current:
        raise ResultError(
            f"{path}: measured by other code (source digest {measured[:12]}, now "
            f"{current[:12]}); remove it and run: snakemake {path}"
        )


def _origin(path: Path, result: RunResult) -> _Provenance:
    try:
        return _Provenance.model_validate(result.provenance)
    except ValidationError as error:
        problem = first_problem(error, "provenance")
        raise ResultError(f"{path}: {problem}; remove it and run: snakemake {path}") from None


def _same_weights(results: dict[str, RunResult], paths: dict[str, Path]) -> None:
    # The newest result has the weights of today; any that differs from it is the stale one.
    newest = max(results, key=lambda name: results[name].started)
    for name, result in results.items():
        if result.pair_digest != results[newest].pair_digest:
            raise ResultError(
                f"{paths[name]}: measured with other model weights (pair digest "
                f"{short_digest(result.pair_digest)}) than the newer {paths[newest]} "
                f"({short_digest(results[newest].pair_digest)}); remove it and run: snakemake "
                f"{paths[name]}"
            )


def _same_device(origins: dict[str, _Provenance], paths: dict[str, Path]) -> None:
    for one, other in combinations(origins, 2):
        if origins[one].device.name != origins[other].device.name:
            raise ResultError(
                f"{paths[other]}: measured on {origins[other].device.name!r}, but {paths[one]} on "
                f"{origins[one].device.name!r}; remove the one that is not of this machine and "
                f"run: snakemake {paths[one]} {paths[other]}, or set devices.mixed: group"
            )


def throughputs(result: RunResult, method: Method) -> Floats:
    """Tokens per second [prompts, runs]."""
    rates = np.empty((len(result.spec.prompts), result.spec.measure.runs))
    for record in result.of(method):
        rates[record.prompt, record.run] = record.tokens / record.seconds
    return rates


def _prompt_speedups(result: RunResult) -> Floats:
    """Speedup of each prompt [prompts]: the median over its runs of the paired ratio."""
    return paired_ratios(throughputs(result, "strategy"), throughputs(result, "autoregressive"))


def _relative_change(samples: Floats) -> Floats:
    return geometric_mean(samples) - 1.0


def _change(speedups: Floats, reference: Floats) -> Estimate:
    return estimate((speedups / reference)[:, None], _relative_change)


def _fastest(candidates: Sequence[str], speedups: Mapping[str, Floats]) -> str:
    """The candidate with the largest speedup; of equal ones, the first listed."""
    return max(candidates, key=lambda name: float(geometric_mean(speedups[name][:, None])))


def _one_device(what: str, candidates: Sequence[str], origins: Mapping[str, _Provenance]) -> None:
    """Refuses to choose the fastest among speedups of different devices."""
    devices = _devices({name: origins[name] for name in candidates})
    if len(devices) > 1:
        raise ResultError(
            f"{what}: its candidates were measured on different devices ({', '.join(devices)}), "
            f"of which the fastest means nothing; measure {', '.join(candidates)} on one"
        )


def _winner(
    config: Config, row: str, speedups: dict[str, Floats], origins: Mapping[str, _Provenance]
) -> str:
    candidates = config.candidates(row)
    _one_device(f"sweeps.{row}", candidates, origins)
    return _fastest(candidates, speedups)


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
    origins: Mapping[str, _Provenance],
) -> Table:
    """A table with its rows grouped by device; a missing row stays in its place."""
    devices = _devices(origins)
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
    origins: Mapping[str, _Provenance],
) -> Estimate | None:
    """The change from `other` to `name`; None without another, or if its device is another."""
    if other is None or origins[name].device.name != origins[other].device.name:
        return None
    return _change(speedups[name], speedups[other])


def _position_counts(result: RunResult) -> npt.NDArray[np.int64]:
    """Rounds, and tokens that they commit, by range of `POSITIONS` [prompts, ranges, 2]."""
    counts = np.zeros((len(result.spec.prompts), len(POSITIONS), 2), dtype=np.int64)
    for record in result.of("strategy"):
        for start, committed in record.spans:
            counts[record.prompt, bisect_right(POSITIONS, start) - 1] += (1, committed)
    return counts


def _later_change(counts: npt.NDArray[np.int64]) -> Estimate | None:
    """Change of the tokens per round after the first range, over prompts that have rounds in it
    and after it; `counts` [prompts, ranges, 2] as above.
    """
    parts = np.stack((counts[:, 0], counts[:, 1:].sum(axis=1)), axis=1)
    reaching = parts[(parts[:, :, 0] > 0).all(axis=1)]
    if not len(reaching):
        return None
    rates = reaching[:, :, 1] / reaching[:, :, 0]
    return _change(rates[:, 1], rates[:, 0])


def _latency(result: RunResult) -> Latency:
    shape = (len(result.spec.prompts), result.spec.measure.runs)
    first: dict[Method, Floats] = {}
    later: dict[Method, Floats] = {}
    for method in ("autoregressive", "strategy"):
        first[method], later[method] = np.empty(shape), np.full(shape, np.nan)
        for record in result.of(method):
            at = record.prompt, record.run
            first[method][at] = record.first_token_seconds
            if record.tokens > 1:
                rest = record.seconds - record.first_token_seconds
                later[method][at] = rest / (record.tokens - 1)
    changes = paired_ratios(first["strategy"], first["autoregressive"])
    # A prompt whose output ends with its first token says nothing of further ones.
    going_on = ~np.isnan(later["strategy"] + later["autoregressive"]).any(axis=1)

    def per_token(method: Method) -> Estimate | None:
        return estimate(later[method][going_on], median) if going_on.any() else None

    return Latency(
        first_token=estimate(first["strategy"], median),
        autoregressive_first_token=estimate(first["autoregressive"], median),
        first_token_change=estimate(changes[:, None], _relative_change),
        per_token=per_token("strategy"),
        autoregressive_per_token=per_token("autoregressive"),
    )


def _overrides(config: Config, name: str) -> list[Override]:
    """The values that the pair changes in configuration `name`."""
    base = config.configs[name].run.model_dump()
    return [
        Override(key=key, value=value, instead_of=base.get(key))
        for key, value in config.overrides(name).items()
        if value != base.get(key)
    ]


def _facts(
    name: str,
    result: RunResult,
    origin: _Provenance,
    speedups: Floats,
    overrides: list[Override],
    lossless: Lossless | None,
    device: str | None,
) -> ConfigurationFacts:
    records = result.of("strategy")
    rounds = [entry for record in records for entry in record.rounds]
    offered = sum(entry.depth for entry in rounds)
    positions = _position_counts(result)
    repeated = [output.repeated_8grams for output in result.outputs]
    seconds = sum(result.totals.seconds_by_phase.values())
    strategy = result.spec.strategy
    return ConfigurationFacts(
        name=name,
        strategy=str(strategy.model_dump()["strategy"]),
        description=strategy.describe(),
        overrides=overrides,
        throughput=estimate(throughputs(result, "strategy"), median),
        autoregressive_throughput=estimate(throughputs(result, "autoregressive"), median),
        speedup=estimate(speedups[:, None], geometric_mean),
        tokens_per_generation=result.totals.tokens / len(records),
        rounds=len(rounds),
        tokens_per_round=result.totals.tokens_per_round,
        rounds_by_position=[
            PositionRounds(start=start, stop=stop, rounds=count, tokens=tokens)
            for start, stop, (count, tokens) in zip(
                POSITIONS, [*POSITIONS[1:], None], positions.sum(axis=0).tolist(), strict=True
            )
        ],
        later_rounds=_later_change(positions),
        nodes_per_round=result.totals.drafted_nodes / len(rounds) if rounds else 0.0,
        acceptance=sum(entry.accepted for entry in rounds) / offered if offered else None,
        acceptance_by_depth=[
            DepthAcceptance(depth=count.depth, offered=count.offered, accepted=count.accepted)
            for count in result.totals.acceptance_by_depth
        ],
        repeated_8grams_mean=float(np.mean(repeated)),
        repeated_8grams_max=max(repeated),
        phase_share={
            phase: spent / seconds
            for phase, spent in result.totals.seconds_by_phase.items()
            if seconds
        },
        latency=_latency(result),
        peak_memory_bytes=result.peak_memory_bytes,
        unequal_prompts=sum(not output.equal for output in result.outputs),
        largest_gap=max(
            (output.divergence.gap for output in result.outputs if output.divergence), default=None
        ),
        lossless=lossless,
        threads=origin.device.threads,
        commit=origin.git.commit,
        dirty=origin.git.dirty,
        device=device,
    )


def _notes(origins: dict[str, _Provenance]) -> list[str]:
    notes = []
    threads = {name: origin.device.threads for name, origin in origins.items()}
    if len(set(threads.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in threads.items())
        notes.append(
            f"The rows were measured with different numbers of threads ({listed}): each speedup is "
            "paired within its own row and remains valid, throughputs do not compare between rows, "
            "and changes between rows include the effect of the threads."
        )
    devices = _devices(origins)
    if len(devices) > 1:
        groups: dict[str, list[str]] = {device: [] for device in devices}
        for name, origin in origins.items():
            groups[origin.device.name].append(name)
        listed = "; ".join(f"{device}: {', '.join(names)}" for device, names in groups.items())
        notes.append(
            f"The rows were measured on different devices ({listed}): each speedup is "
            "paired within its own row and remains valid, and rows of different devices are not "
            "compared."
        )
    flagged = [name for name, origin in origins.items() if origin.device.shared_with]
    if flagged:
        notes.append(
            f"Other programs used the GPU while {', '.join(flagged)} was measured: these "
            "throughputs and speedups may be disturbed."
        )
    return notes


def _model(models: Models, role: str) -> str:
    """Where a model of the pair comes from, in words."""
    source = getattr(models, role) if models.recipe is None else getattr(models.recipe, role)
    if isinstance(source, Transformer):
        return f"{source.layers}-layer GPT-NeoX of width {source.width}"
    assert isinstance(source, ModelSource)
    return str(source.path or f"{source.hub} ({source.revision})")


def _flat(name: str, estimate: Estimate | None) -> dict[str, float | None]:
    interval = estimate.interval if estimate else None
    return {
        name: estimate.value if estimate else None,
        f"{name}_low": interval.low if interval else None,
        f"{name}_high": interval.high if interval else None,
    }
