"""The figure of an experiment; which one it is its `figure` says, see `experiments.FigureKind`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dynatree.ablation import Estimate
from dynatree.drawing import (
    FOOTER,
    HEADER,
    INK,
    LEGEND,
    ROW,
    TIMES,
    doubling,
    draw_series,
    new_figure,
    styled,
    throughput_bars,
)
from dynatree.errors import ResultError
from dynatree.experiments import (
    Experiment,
    FigureKind,
    PointFacts,
    axis_words,
    place_words,
    value_words,
)
from dynatree.points import Cell, Point, Series

SPEEDUP: Final = f"speedup over AR ({TIMES})"

ACROSS: Final = 2
"""Panels beside each other in a figure of one parameter at a time."""


def draw(experiment: Experiment) -> Figure:
    """The figure of `experiment`.

    Raises:
        ResultError: two of its points lie at the same place of a heatmap.
    """
    return _BUILDERS[experiment.figure](experiment)


@styled
def bars(experiment: Experiment) -> Figure:
    """Throughput and speedup of the rows at each place of the grid, a panel for each place."""
    return throughput_bars(
        [(place, [(point.label, point) for point in points]) for place, points in experiment.places]
    )


def grid_of_speedups(experiment: Experiment) -> Figure:
    """The speedup over the first two fields; a third field, or the row, has a panel per value."""
    row, column = experiment.axes[:2]
    panels: dict[str, list[Cell]] = {}
    several = len(experiment.rows) > 1
    for point in experiment.shown:
        rest = {axis: value for axis, value in point.values.items() if axis not in (row, column)}
        title = point.label if several else place_words(rest)
        panels.setdefault(title, []).append(
            Cell(float(point.values[column]), float(point.values[row]), point.speedup)
        )
    return heatmap(panels, axis_words(column), axis_words(row), SPEEDUP)


@styled
def lengths(experiment: Experiment) -> Figure:
    """Throughput and speedup against the one field that varies, a curve for each row.

    Autoregressive decoding has a curve of throughput as well, measured in the jobs of the first
    row, unless it is a row itself.
    """
    rates = [
        Series(label, [_at(experiment, point, point.throughput) for point in points])
        for label, points in experiment.rows
    ]
    first = experiment.rows[0][1]
    if all(point.strategy != "autoregressive" for point in experiment.shown):
        plain = [_at(experiment, point, point.autoregressive_throughput) for point in first]
        rates.append(Series("autoregressive", plain))
    speedups = [
        Series(label, [_at(experiment, point, point.speedup) for point in points])
        for label, points in experiment.rows
    ]
    figure = new_figure(3.4 + LEGEND * ((len(rates) + 1) // 2))
    above, below = figure.subplots(2, sharex=True)
    for axes, series, label in ((above, rates, "tokens/s"), (below, speedups, SPEEDUP)):
        draw_series(axes, series, dodge=False, legend=False, bands=True)
        axes.set_ylim(bottom=0)
        axes.set_ylabel(label)
    _even_at_one(below)
    _numbers(below, experiment)
    figure.legend(*above.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


@styled
def budgets(experiment: Experiment) -> Figure:
    """The speedup against the node budget as measured, and as the cost model predicts it."""
    series = []
    for label, points in experiment.rows:
        measured = [_at(experiment, point, point.speedup) for point in points]
        series.append(Series(f"{label}, measured", measured))
        predicted = [
            _at(experiment, point, Estimate(value=point.predicted.speedup, interval=None))
            for point in points
            if point.predicted
        ]
        if predicted:
            series.append(Series(f"{label}, predicted", predicted, predicted=True))
    figure = new_figure(2.4 + LEGEND * ((len(series) + 1) // 2))
    axes = figure.subplots()
    draw_series(axes, series, dodge=False, legend=False)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(SPEEDUP)
    _even_at_one(axes)
    _numbers(axes, experiment)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


@styled
def one_at_a_time(experiment: Experiment) -> Figure:
    """The speedup against one field at a time, a panel for each, with the same scale."""
    down = -(-len(experiment.axes) // ACROSS)
    several = len(experiment.rows) > 1
    figure = new_figure(1.35 * down + (LEGEND if several else 0.0))
    panels = figure.subplots(down, ACROSS, sharey=True, squeeze=False)
    for axes, axis in zip(panels.flat, experiment.axes, strict=False):
        values = sorted({point.values[axis] for point in experiment.shown if axis in point.values})
        series = [
            Series(
                label,
                sorted(
                    (
                        Point(values.index(point.values[axis]), point.speedup)
                        for point in points
                        if axis in point.values
                    ),
                    key=lambda point: point.x,
                ),
            )
            for label, points in experiment.rows
        ]
        draw_series(axes, series, dodge=several, legend=False)
        axes.set_xticks(range(len(values)), [value_words(value) for value in values])
        axes.margins(x=0.15)
        axes.set_xlabel(axis_words(axis))
    for axes in panels.flat[len(experiment.axes) :]:
        axes.set_visible(False)
    # Lines and no bars: the scale need not begin at 0, where no difference would be seen.
    for axes in panels[:, 0]:
        axes.yaxis.set_major_locator(MaxNLocator(4))
    figure.supylabel(SPEEDUP, fontsize=8)
    if several:
        handles = panels[0, 0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=2)
    return figure


@styled
def heatmap(panels: Mapping[str, Sequence[Cell]], xlabel: str, ylabel: str, value: str) -> Figure:
    """Values on a grid, each written into its cell above its interval; a gap was not measured.

    Args:
        panels: under their titles, one below the other, with the same rows, columns and colours.

    Raises:
        ResultError: there is no cell, or two for one place.
    """
    cells = [cell for found in panels.values() for cell in found]
    for found in panels.values():
        places = {(cell.column, cell.row) for cell in found}
        if not places or len(places) < len(found):
            raise ResultError(f"a heatmap needs one value for each place, got {len(found)} values")
    if not cells:
        raise ResultError("a heatmap needs one value for each place, got 0 values")
    columns = sorted({cell.column for cell in cells})
    rows = sorted({cell.row for cell in cells})
    low = min(cell.value.value for cell in cells)
    high = max(cell.value.value for cell in cells)
    titled = 0.2 if any(panels) else 0.0
    height = len(panels) * ((ROW + 0.1) * len(rows) + titled + 0.05)
    figure = new_figure(height + FOOTER + (HEADER if len(panels) == 1 else 0.1))
    drawn = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for axes, (title, found) in zip(drawn, panels.items(), strict=True):
        grid = np.full((len(rows), len(columns)), np.nan)
        for cell in found:
            at = (columns.index(cell.column), rows.index(cell.row))
            grid[at[1], at[0]] = cell.value.value
            # The upper half of the colours is bright.
            bright = cell.value.value > (low + high) / 2
            _write(axes, cell.value, at, INK if bright else "white")
        axes.set_facecolor("#EEEEEE")
        image = axes.imshow(
            grid, cmap="cividis", aspect="auto", origin="lower", vmin=low, vmax=high
        )
        axes.set_xticks(range(len(columns)), [f"{column:g}" for column in columns])
        axes.set_yticks(range(len(rows)), [f"{row:g}" for row in rows])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_ylabel(ylabel)
        axes.set_title(title, loc="left", fontweight="bold")
    drawn[-1].set_xlabel(xlabel)
    figure.colorbar(image, ax=list(drawn), label=value).outline.set_visible(False)
    return figure


def _write(axes: Axes, value: Estimate, at: tuple[int, int], color: str) -> None:
    """The value in its cell, and its interval below it in small print."""
    lines = [f"{value.value:.2f}"]
    if value.interval is not None:
        lines.append(f"[{value.interval.low:.2f}, {value.interval.high:.2f}]")
    offsets = (4, -5) if len(lines) == 2 else (0,)
    for line, offset, size in zip(lines, offsets, (8, 6), strict=False):
        axes.annotate(
            line, at, xytext=(0, offset), textcoords="offset points",
            ha="center", va="center", color=color, fontsize=size,
        )  # fmt: skip


def _at(experiment: Experiment, point: PointFacts, value: Estimate) -> Point:
    return Point(float(point.values[experiment.axes[0]]), value)


def _even_at_one(axes: Axes) -> None:
    """A line where nothing is won."""
    axes.axhline(1.0, color=INK, linewidth=0.6, linestyle=":", zorder=0)


def _numbers(axes: Axes, experiment: Experiment) -> None:
    """The x axis of the one field that varies; numbers that double have even steps."""
    axis = experiment.axes[0]
    values = sorted({float(point.values[axis]) for point in experiment.shown})
    axes.set_xlabel(axis_words(axis))
    if values[0] > 0 and values[-1] >= 4 * values[0]:
        doubling(axes, values)
    else:
        axes.set_xticks(values, [f"{value:g}" for value in values])


_BUILDERS: dict[FigureKind, Callable[[Experiment], Figure]] = {
    "bars": bars,
    "heatmap": grid_of_speedups,
    "curves": lengths,
    "multiples": one_at_a_time,
    "budget": budgets,
}
