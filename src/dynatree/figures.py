"""The figures of the paper, as vector PDF and as PNG.

Each function makes a figure, `save` writes it. Uncertainty is drawn as a bar from end to end of a
95 % interval, since a median need not lie in its bootstrap interval.
"""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, ParamSpec

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

from dynatree.ablation import BACKWARD, Ablation, ConfigurationFacts, Estimate, Table
from dynatree.errors import ResultError
from dynatree.files import replacing
from dynatree.points import Cell, Point, RoundTime, Series
from dynatree.roofline import Roofline

# Colours of Okabe and Ito (2008): told apart with any colour blindness. Where two of them meet in
# one figure they differ in brightness, hatching or marker as well, for a black and white print.
DYNATREE, BASELINE, INK = "#0072B2", "#999999", "#222222"
LOSS, NOISE = "#D55E00", "#BBBBBB"
CURVES = (
    ("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"),
    ("#222222", "P"), ("#56B4E9", "X"),
)  # fmt: skip

PHASES = {"draft": "#56B4E9", "verify": "#0072B2", "other": "#999999"}
"""Phases of a round in the order in which they are stacked, and their colours."""

STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.linewidth": 0.6,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "hatch.linewidth": 0.5,
    # Type 42 embeds whole TrueType fonts; many publishers refuse Type 3.
    "pdf.fonttype": 42,
    # A label is text: a dollar sign in it starts no formula.
    "text.parse_math": False,
}

WIDTH = 4.0
"""Inches: the 8 pt text is 6.6 pt in a 3.3 inch column and 13 pt across 6.5 inches."""

ROW, HEADER, FOOTER, LEGEND = 0.27, 0.32, 0.38, 0.25
"""Inches of height for a row, a table's title, the axis below the last table, and a legend."""

LABEL_CHARACTERS = 22
TIMES: Final = "\N{MULTIPLICATION SIGN}"

Parameters = ParamSpec("Parameters")


def _styled(build: Callable[Parameters, Figure]) -> Callable[Parameters, Figure]:
    """`build`, with `STYLE` in force: much of it is read when a figure is made."""

    @wraps(build)
    def styled(*arguments: Parameters.args, **options: Parameters.kwargs) -> Figure:
        with mpl.rc_context(STYLE):
            return build(*arguments, **options)

    return styled


def save(figure: Figure, pdf: Path, png: Path) -> None:
    """Writes a figure in both formats, each all or nothing."""
    with mpl.rc_context(STYLE):
        # Neither file holds a date or a version, so that equal data gives equal bytes.
        with replacing(pdf) as temporary:
            figure.savefig(temporary, format="pdf", metadata={"CreationDate": None})
        with replacing(png) as temporary:
            figure.savefig(temporary, format="png", dpi=200, metadata={"Software": None})


@_styled
def bars(ablation: Ablation) -> Figure:
    """Throughput of each row with its interval, the speedup beside it; one panel per table."""
    figure, panels = _rows(ablation.tables, [len(table.rows) for table in ablation.tables])
    for axes, table in zip(panels, ablation.tables, strict=True):
        measured = [ablation.facts(row.configuration) for row in table.rows]
        for position, facts in enumerate(measured):
            plain = facts.strategy == "autoregressive"
            axes.barh(
                position,
                facts.throughput.value,
                height=0.62,
                color=BASELINE if plain else DYNATREE,
            )
            _whisker(axes, facts.throughput, position)
            _beside(axes, _end(facts), position, f"{facts.speedup.value:.2f}{TIMES}")
        _name_rows(axes, table.name, [row.label for row in table.rows])
    # Shared axis: annotations do not count for its limits, and the longest bar needs room for one.
    panels[-1].set_xlim(0, 1.18 * max(_end(facts) for facts in ablation.configurations))
    panels[-1].set_xlabel("throughput (tokens/s)")
    return figure


@_styled
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
    figure, panels = _rows(tables, [len(table.rows) + 1 for table in tables], legend=True)
    ends = [
        _contributions(axes, table, ablation) for axes, table in zip(panels, tables, strict=True)
    ]
    for axes in panels:
        axes.axvline(1.0, color=INK, linewidth=0.6, linestyle=":", zorder=0)
    panels[-1].set_xlim(0, 1.24 * max(ends))
    panels[-1].set_xlabel(f"speedup over autoregressive decoding ({TIMES})")
    _legend(
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
            end = _upper(speedup)
        else:
            change = row.versus_previous
            low, high = sorted((at, speedup.value))
            look = looks.get(change.against(0.0), {"color": NOISE})
            axes.barh(position, high - low, left=low, height=0.62, **look)
            shifted = _scaled(change, at)
            _whisker(axes, shifted, position)
            end = max(high, _upper(shifted))
            _beside(axes, end, position, _percent(change.value))
        at = speedup.value
        # Where this row ends the next begins.
        axes.plot([at, at], [position, position + 1], color=INK, linewidth=0.5, zorder=0)
        reach = max(reach, end)
    _total(axes, last, ablation.facts(table.rows[-1].configuration).speedup)
    _name_rows(axes, table.name, [*(row.label for row in table.rows), "together"])
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
    _beside(axes, _upper(speedup), position, f"{speedup.value:.2f}{TIMES}")


@_styled
def round_times(ablation: Ablation, times: Mapping[str, RoundTime]) -> Figure:
    """Milliseconds of a round by phase, and the tokens it commits; one panel per table.

    Args:
        times: by configuration; one that needed no round has none.
    """
    shown = [[row for row in table.rows if row.configuration in times] for table in ablation.tables]
    tables = [(table, rows) for table, rows in zip(ablation.tables, shown, strict=True) if rows]
    if not tables:
        raise ResultError("no configuration has a round; raise measure.max_new_tokens")
    figure, panels = _rows(
        [table for table, _ in tables], [len(rows) for _, rows in tables], legend=True
    )
    reach = 0.0
    for axes, (table, rows) in zip(panels, tables, strict=True):
        for position, row in enumerate(rows):
            time, left = times[row.configuration], 0.0
            for phase, color in PHASES.items():
                width = time.milliseconds[phase]
                axes.barh(position, width, left=left, height=0.62, color=color)
                left += width
            _whisker(axes, time.total, position)
            _beside(axes, max(left, _upper(time.total)), position, f"{time.tokens:.2f} tokens")
            reach = max(reach, left, _upper(time.total))
        _name_rows(axes, table.name, [row.label for row in rows])
    panels[-1].set_xlim(0, 1.42 * reach)
    panels[-1].set_xlabel("milliseconds per round")
    _legend(figure, {phase: {"facecolor": color} for phase, color in PHASES.items()})
    return figure


@_styled
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
    figure = _figure(FOOTER + len(tables) * 1.5)
    panels = figure.subplots(len(tables), sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, (name, rows) in zip(panels, tables, strict=True):
        series = [Series(row.label, shares[row.configuration]) for row in rows]
        _draw_series(axes, series)
        axes.set_title(name, loc="left", fontweight="bold")
        axes.set_ylim(0, 1.03)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_ylabel("accepted")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[-1].set_xlabel("depth in the draft tree")
    return figure


@_styled
def curves(series: Sequence[Series], xlabel: str, ylabel: str, logarithmic: bool = False) -> Figure:
    """Values against a number: throughput against length, speed against node budget.

    Args:
        logarithmic: whether x doubles rather than counts; its ticks are then the points' own.
    """
    figure = _figure(2.1)
    axes = figure.subplots()
    _draw_series(axes, series, dodge=not logarithmic)
    if logarithmic:
        _powers(axes, sorted({point.x for entry in series for point in entry.points}))
    axes.set_ylim(bottom=0)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    return figure


@_styled
def heatmap(cells: Sequence[Cell], xlabel: str, ylabel: str, value: str) -> Figure:
    """Values on a grid, each written into its cell above its interval; a gap was not measured.

    Raises:
        ResultError: there is no cell, or two for one place.
    """
    places = {(cell.column, cell.row): cell.value for cell in cells}
    if not places or len(places) < len(cells):
        raise ResultError(f"a heatmap needs one value for each place, got {len(cells)} values")
    columns = sorted({column for column, _ in places})
    rows = sorted({row for _, row in places})
    grid = np.full((len(rows), len(columns)), np.nan)
    for (column, row), found in places.items():
        grid[rows.index(row), columns.index(column)] = found.value
    figure = _figure(0.75 + 0.36 * len(rows))
    axes = figure.subplots()
    axes.set_facecolor("#EEEEEE")
    image = axes.imshow(grid, cmap="cividis", aspect="auto", origin="lower")
    low, high = float(np.nanmin(grid)), float(np.nanmax(grid))
    for (column, row), found in places.items():
        # The upper half of the colours is bright.
        color = INK if found.value > (low + high) / 2 else "white"
        at = (columns.index(column), rows.index(row))
        lines = [f"{found.value:.2f}"]
        if found.interval is not None:
            lines.append(f"[{found.interval.low:.2f}, {found.interval.high:.2f}]")
        offsets = (4, -5) if len(lines) == 2 else (0,)
        for line, offset, size in zip(lines, offsets, (8, 6), strict=False):
            axes.annotate(
                line, at, xytext=(0, offset), textcoords="offset points",
                ha="center", va="center", color=color, fontsize=size,
            )  # fmt: skip
    axes.set_xticks(range(len(columns)), [f"{column:g}" for column in columns])
    axes.set_yticks(range(len(rows)), [f"{row:g}" for row in rows])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    figure.colorbar(image, ax=axes, label=value).outline.set_visible(False)
    return figure


@_styled
def roofline(record: Roofline) -> Figure:
    """Tokens per second that forwards verify and rounds commit, below what memory would allow."""
    figure = _figure(2.4)
    axes = figure.subplots()
    limits, measured = record.limits(), record.measured()
    axes.plot(
        [point.x for point in limits],
        [point.y.value for point in limits],
        color=INK,
        linewidth=1.2,
        label="limit: memory bandwidth",
    )
    _draw_series(axes, [Series("verified by a forward", measured)], dodge=False, legend=False)
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
    _powers(axes, [point.x for point in limits])
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


def _draw_series(
    axes: Axes, series: Sequence[Series], dodge: bool = True, legend: bool = True
) -> None:
    """Curves with their intervals, side by side within a step of x where `dodge`.

    A measured point without interval is hollow.
    """
    ordered = sorted({point.x for entry in series for point in entry.points})
    step = min((b - a for a, b in pairwise(ordered)), default=1.0)
    for index, entry in enumerate(series):
        color, marker = CURVES[index % len(CURVES)]
        shift = step * 0.07 * (index - (len(series) - 1) / 2) if dodge else 0.0
        x = [point.x + shift for point in entry.points]
        axes.plot(
            x,
            [point.y.value for point in entry.points],
            color=color,
            linewidth=1,
            linestyle="--" if entry.predicted else "-",
            marker=None if entry.predicted else marker,
            markersize=3.5,
            label=_wrapped(entry.label),
        )
        for at, point in zip(x, entry.points, strict=True):
            if point.y.interval is not None:
                ends = [point.y.interval.low, point.y.interval.high]
                axes.plot([at, at], ends, color=color, linewidth=0.8, alpha=0.7)
            elif not entry.predicted:
                # Hollow, so that a missing interval is not taken for a narrow one.
                axes.plot([at], [point.y.value], marker, color=color, markersize=3.5, mfc="white")
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=7, handlelength=1.6)


def _powers(axes: Axes, ticks: Sequence[float]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()


def _figure(height: float) -> Figure:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _rows(
    tables: Sequence[Table], rows: Sequence[int], legend: bool = False
) -> tuple[Figure, Sequence[Axes]]:
    """A figure with a panel for each table, as high as its rows need."""
    heights = [count * ROW + HEADER for count in rows]
    figure = _figure(sum(heights) + FOOTER + (LEGEND if legend else 0.0))
    panels = figure.subplots(len(tables), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    return figure, list(panels)


def _name_rows(axes: Axes, title: str, labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), [_wrapped(label) for label in labels])
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, loc="left", fontweight="bold")


def _wrapped(label: str) -> str:
    # "K = 8" stays on one line: no line is broken at a space that is none.
    joined = label.replace(" = ", "\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}")
    return textwrap.fill(joined, LABEL_CHARACTERS)


def _whisker(axes: Axes, value: Estimate, position: int) -> None:
    if value.interval is not None:
        ends = [value.interval.low, value.interval.high]
        axes.plot(ends, [position] * 2, color=INK, linewidth=1)
        axes.plot(ends, [position] * 2, "|", color=INK, markersize=5)


def _beside(axes: Axes, x: float, position: int, text: str) -> None:
    axes.annotate(text, (x, position), xytext=(4, 0), textcoords="offset points", va="center")


def _legend(figure: Figure, entries: Mapping[str, Mapping[str, Any]]) -> None:
    figure.legend(
        handles=[
            Patch(label=label, edgecolor="white", linewidth=0, **look)
            for label, look in entries.items()
        ],
        loc="outside lower center",
        ncols=len(entries),
        fontsize=7,
        handlelength=1.2,
        columnspacing=1.2,
    )


def _percent(change: float) -> str:
    """A relative change with a sign, unless it rounds to nothing."""
    percent = round(100 * change)
    return f"{percent:+d} %".replace("-", "\N{MINUS SIGN}") if percent else "0 %"


def _upper(value: Estimate) -> float:
    return max(value.value, value.interval.high) if value.interval else value.value


def _end(facts: ConfigurationFacts) -> float:
    """Where the bar or its interval ends, in tokens per second."""
    return _upper(facts.throughput)


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
