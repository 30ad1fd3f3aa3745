"""From the runs of an experiment to its points; notation as in `dynatree.run_facts`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from dynatree.ablation import (
    Estimate,
    Interval,
)
from dynatree.config import Config, Point
from dynatree.costs import predictions, round_costs
from dynatree.estimates import (
    Floats,
    independent_ratio,
)
from dynatree.experiments import Experiment, FigureKind, PointFacts, Prediction
from dynatree.intake import Origin, device_of, notes_of, pair_setting, read_runs, require_one_device
from dynatree.results import RunResult
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
    results, origins, _ = read_runs(config, runs, results_dir, source_digest)
    speedups = {run: prompt_speedups(result) for run, result in results.items()}
    fastest = set()
    for point in points:
        # Candidates of one row at the same place of the grid.
        rivals = {
            other.run: other
            for other in points
            if (other.row, other.values) == (point.row, point.values)
        }
        require_one_device(f"{name}: {point.row}", list(rivals), origins)
        fastest.add(rivals[fastest_of(list(rivals), speedups)].name)
    shown = [point for point in points if point.name in fastest]
    kind = config.experiments[name].kind
    references = {point.name: _reference(kind, point, shown, results, speedups) for point in points}
    predicted = _predictions(shown, results) if kind == "budget" else {}
    return Experiment(
        experiment=name,
        title=config.experiments[name].title or name.replace("_", " ").capitalize(),
        figure=kind,
        setting=pair_setting(config, origins),
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
                device_of(point.run, origins),
                _point_change(point, references[point.name], results, origins, speedups),
                predicted.get(point.name),
            )
            for point in points
        ],
        notes=notes_of(origins),
    )


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
            **setting_columns(facts, experiment.setting),
            **speed_columns(facts),
            "reference": facts.reference,
            **estimate_columns("change", facts.change),
            "predicted_speedup": facts.predicted and facts.predicted.speedup,
            **count_columns(facts, experiment.points),
        }
        for facts in experiment.points
    ]
    return pd.DataFrame(lines).to_csv(index=False, lineterminator="\n")


def _point(
    config: Config,
    experiment: str,
    point: Point,
    result: RunResult,
    origin: Origin,
    speedups: Floats,
    fastest: bool,
    device: str | None,
    compared: tuple[str, Estimate] | None,
    predicted: Prediction | None,
) -> PointFacts:
    overrides = [
        entry for entry in overrides_of(config, point.config) if entry.key not in point.values
    ]
    facts = facts_of(point.name, result, origin, speedups, overrides, None, device)
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
        return shown[names.index(fastest_of(names, speedups))]
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
    origins: Mapping[str, Origin],
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
        return reference.name, change_of(here, there)
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
