"""The figures of a section: rows, what they add, rounds, acceptance; and that of a bench record."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

from dynatree.ablation import BACKWARD, Ablation, Estimate, Table
from dynatree.drawing import (
    CURVES,
    DYNATREE,
    FOOTER,
    INK,
    LOSS,
    NOISE,
    TIMES,
    begin_at_zero,
    beside,
    doubling,
    draw_series,
    legend_below,
    name_rows,
    new_figure,
    percent_change,
    row_panels,
    styled,
    throughput_bars,
    upper,
    whisker,
)
from dynatree.errors import ResultError
from dynatree.points import Point, RoundTime, Series
from dynatree.roofline import Roofline

PHASES = {"draft": "#56B4E9", "verify": "#0072B2", "other": "#999999"}
"""Phases of a round in the order in which they are stacked, and their colours."""


@styled
def bars(ablation: Ablation) -> Figure:
    """Throughput of each row with its interval, the speedup beside it; one panel per table."""
    return throughput_bars(
        [
            (table.name, [(row.label, ablation.facts(row.configuration)) for row in table.rows])
            for table in ablation.tables
        ]
    )


@styled
def waterfall(ablation: Ablation) -> Figure:
    """What each row contributes to the speedup; one panel for each table whose rows add something.

    A row's bar begins where the row above ends, its interval is that of the change between the two.

    Raises:
        ResultError: every table takes something away.
    """
    tables = [table for table in ablation.tables if table.name != BACKWARD]
    if not tables:
        raise ResultError(
            f"a waterfall needs a table whose rows add components; {BACKWARD!r} takes them away"
        )
    figure, panels = row_panels([len(table.rows) + 1 for table in tables], legend=True)
    ends = [
        _contributions(axes, table, ablation) for axes, table in zip(panels, tables, strict=True)
    ]
    for axes in panels:
        axes.axvline(1.0, color=INK, linewidth=0.6, linestyle=":", zorder=0)
    begin_at_zero(panels[-1], 1.24 * max(ends))
    panels[-1].set_xlabel(f"speedup over autoregressive decoding ({TIMES})")
    legend_below(
        figure,
        {
            "gain": {"facecolor": DYNATREE},
            "loss": {"facecolor": LOSS, "hatch": "////"},
            "within noise": {"facecolor": NOISE},
            "first and last row": {"facecolor": INK},
        },
    )
    return figure


def _contributions(axes: Axes, table: Table, ablation: Ablation) -> float:
    """Draws the panel of one table; returns how far to the right it reaches."""
    reach, at = 0.0, 0.0
    looks: dict[str, dict[str, Any]] = {
        "gain": {"color": DYNATREE},
        "loss": {"facecolor": LOSS, "hatch": "////", "edgecolor": "white", "linewidth": 0},
    }
    last = len(table.rows)
    for position, row in enumerate(table.rows):
        speedup = ablation.facts(row.configuration).speedup
        if row.versus_previous is None:
            _total(axes, position, speedup)
            end = upper(speedup)
        else:
            change = row.versus_previous
            low, high = sorted((at, speedup.value))
            look = looks.get(change.against(0.0), {"color": NOISE})
            axes.barh(position, high - low, left=low, height=0.62, **look)
            shifted = _scaled(change, at)
            whisker(axes, shifted, position)
            end = max(high, upper(shifted))
            beside(axes, end, position, percent_change(change.value))
        at = speedup.value
        # Where this row ends the next begins.
        axes.plot([at, at], [position, position + 1], color=INK, linewidth=0.5, zorder=0)
        reach = max(reach, end)
    _total(axes, last, ablation.facts(table.rows[-1].configuration).speedup)
    name_rows(axes, table.name, [*(row.label for row in table.rows), "together"])
    return reach


def _total(axes: Axes, position: int, speedup: Estimate) -> None:
    axes.barh(position, speedup.value, height=0.62, color=INK)
    # White inside of the dark bar, dark outside of it.
    if speedup.interval is not None:
        inside = min(speedup.value, speedup.interval.high)
        ends = [speedup.interval.low, inside]
        axes.plot(ends, [position] * 2, color="white", linewidth=1)
        axes.plot([ends[0]], [position], "|", color="white", markersize=5)
        if speedup.interval.high > inside:
            axes.plot([inside, speedup.interval.high], [position] * 2, color=INK, linewidth=1)
            axes.plot([speedup.interval.high], [position], "|", color=INK, markersize=5)
    beside(axes, upper(speedup), position, f"{speedup.value:.2f}{TIMES}")


@styled
def round_times(ablation: Ablation, times: Mapping[str, RoundTime]) -> Figure:
    """Milliseconds of a round by phase, and the tokens it commits; one panel per table.

    Args:
        times: by configuration; one that needed no round has none.
    """
    shown = [[row for row in table.rows if row.configuration in times] for table in ablation.tables]
    tables = [(table, rows) for table, rows in zip(ablation.tables, shown, strict=True) if rows]
    if not tables:
        raise ResultError("no configuration has a round; raise measure.max_new_tokens")
    figure, panels = row_panels([len(rows) for _, rows in tables], legend=True)
    reach = 0.0
    for axes, (table, rows) in zip(panels, tables, strict=True):
        for position, row in enumerate(rows):
            time, left = times[row.configuration], 0.0
            for phase, color in PHASES.items():
                width = time.milliseconds[phase]
                axes.barh(position, width, left=left, height=0.62, color=color)
                left += width
            whisker(axes, time.total, position)
            beside(axes, max(left, upper(time.total)), position, f"{time.tokens:.2f} tokens")
            reach = max(reach, left, upper(time.total))
        name_rows(axes, table.name, [row.label for row in rows])
    begin_at_zero(panels[-1], 1.42 * reach)
    panels[-1].set_xlabel("milliseconds per round")
    legend_below(figure, {phase: {"facecolor": color} for phase, color in PHASES.items()})
    return figure


@styled
def acceptance(ablation: Ablation, shares: Mapping[str, Sequence[Point]]) -> Figure:
    """Share of offered draft tokens that were accepted, by depth; one panel per table.

    Args:
        shares: by configuration; of one that drafts nothing there are none.

    Raises:
        ResultError: no configuration drafts.
    """
    tables = [
        (table.name, drafting)
        for table in ablation.tables
        if (drafting := [row for row in table.rows if shares.get(row.configuration)])
    ]
    if not tables:
        raise ResultError("no configuration of these tables drafts, so none has an acceptance")
    figure = new_figure(FOOTER + len(tables) * 1.5)
    panels = figure.subplots(len(tables), sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, (name, rows) in zip(panels, tables, strict=True):
        series = [Series(row.label, shares[row.configuration]) for row in rows]
        draw_series(axes, series)
        axes.set_title(name, loc="left", fontweight="bold")
        axes.set_ylim(0, 1.03)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_ylabel("accepted")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[-1].set_xlabel("depth in the draft tree")
    return figure


@styled
def roofline(record: Roofline) -> Figure:
    """Tokens per second that forwards verify and rounds commit, below what memory would allow."""
    figure = new_figure(2.4)
    axes = figure.subplots()
    limits, measured = record.limits(), record.measured()
    axes.plot(
        [point.x for point in limits],
        [point.y.value for point in limits],
        color=INK,
        linewidth=1.2,
        label="limit: memory bandwidth",
    )
    draw_series(axes, [Series("verified by a forward", measured)], dodge=False, legend=False)
    # A generation verifies its draft nodes and the token before them.
    for (color, marker), (name, rounds) in zip(
        CURVES[1:], record.generations.items(), strict=False
    ):
        axes.plot(
            [1 + rounds.nodes_per_round],
            [1000 * rounds.tokens_per_round / rounds.ms_per_round],
            marker=marker,
            markersize=6,
            linestyle="none",
            color=color,
            label=f"generated by {name}",
        )
    axes.set_yscale("log")
    doubling(axes, [point.x for point in limits])
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.grid(axis="y", linewidth=0.3, color=NOISE)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("tokens per forward of the target")
    axes.set_ylabel("tokens/s")
    axes.legend(
        loc="upper left", fontsize=7, frameon=True, framealpha=1, edgecolor="none", borderpad=0.2
    )
    return figure


def _scaled(change: Estimate, start: float) -> Estimate:
    """Where a row ends that changes `start` by `change`."""
    return change.model_copy(
        update={
            "value": start * (1 + change.value),
            "interval": change.interval
            and change.interval.model_copy(
                update={
                    "low": start * (1 + change.interval.low),
                    "high": start * (1 + change.interval.high),
                }
            ),
        }
    )
