"""What all figures are drawn with: the style, the files, and the parts that they share.

Uncertainty is drawn from end to end of a 95 % interval, since a median need not lie in its
bootstrap interval.
"""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, ParamSpec

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from dynatree.ablation import ConfigurationFacts, Estimate
from dynatree.files import replacing
from dynatree.points import Series

# Colours of Okabe and Ito (2008): told apart with any colour blindness. Where two of them meet in
# one figure they differ in brightness, hatching or marker as well, for a black and white print.
DYNATREE, BASELINE, INK = "#0072B2", "#999999", "#222222"
LOSS, NOISE = "#D55E00", "#BBBBBB"
CURVES = (
    ("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"),
    ("#222222", "P"), ("#56B4E9", "X"),
)  # fmt: skip

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


def styled(build: Callable[Parameters, Figure]) -> Callable[Parameters, Figure]:
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


def draw_series(
    axes: Axes,
    series: Sequence[Series],
    dodge: bool = True,
    legend: bool = True,
    bands: bool = False,
) -> None:
    """Curves with their intervals: whiskers, or `bands` from point to point.

    A measured point without interval is hollow.

    Args:
        dodge: whether the curves stand side by side within a step of x, so that whiskers do not
            cover each other.
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
            label=wrapped(entry.label),
        )
        known = [(at, point.y.interval) for at, point in zip(x, entry.points, strict=True)]
        if bands:
            axes.fill_between(
                [at for at, interval in known if interval is not None],
                [interval.low for _, interval in known if interval is not None],
                [interval.high for _, interval in known if interval is not None],
                color=color,
                alpha=0.16,
                linewidth=0,
            )
        for at, point in zip(x, entry.points, strict=True):
            if point.y.interval is not None:
                if bands:
                    continue
                ends = [point.y.interval.low, point.y.interval.high]
                axes.plot([at, at], ends, color=color, linewidth=0.8, alpha=0.7)
            elif not entry.predicted:
                # Hollow, so that a missing interval is not taken for a narrow one.
                axes.plot([at], [point.y.value], marker, color=color, markersize=3.5, mfc="white")
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=7, handlelength=1.6)


def doubling(axes: Axes, ticks: Sequence[float]) -> None:
    """An x axis on which a doubling is a step, with `ticks` alone."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()


def new_figure(height: float) -> Figure:
    """An empty figure of `WIDTH`, `height` inches high."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def row_panels(rows: Sequence[int], legend: bool = False) -> tuple[Figure, Sequence[Axes]]:
    """A figure with a panel for each entry of `rows`, as high as so many rows need."""
    heights = [count * ROW + HEADER for count in rows]
    figure = new_figure(sum(heights) + FOOTER + (LEGEND if legend else 0.0))
    panels = figure.subplots(len(rows), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    return figure, list(panels)


def name_rows(axes: Axes, title: str, labels: Sequence[str]) -> None:
    """Names the rows of a panel from top to bottom."""
    axes.set_yticks(range(len(labels)), [wrapped(label) for label in labels])
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, loc="left", fontweight="bold")


def wrapped(label: str) -> str:
    """`label` in lines that a panel has room for."""
    # "K = 8" stays on one line: no line is broken at a space that is none.
    joined = label.replace(" = ", "\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}")
    return textwrap.fill(joined, LABEL_CHARACTERS)


def whisker(axes: Axes, value: Estimate, position: int) -> None:
    """The interval of a row's value, if there is one."""
    if value.interval is not None:
        ends = [value.interval.low, value.interval.high]
        axes.plot(ends, [position] * 2, color=INK, linewidth=1)
        axes.plot(ends, [position] * 2, "|", color=INK, markersize=5)


def beside(axes: Axes, x: float, position: int, text: str) -> None:
    """A text to the right of `x` in a row."""
    axes.annotate(text, (x, position), xytext=(4, 0), textcoords="offset points", va="center")


def legend_below(figure: Figure, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """A legend of patches below all panels, each with its look."""
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


def percent_change(change: float) -> str:
    """A relative change with a sign, unless it rounds to nothing."""
    percent = round(100 * change)
    return f"{percent:+d} %".replace("-", "\N{MINUS SIGN}") if percent else "0 %"


def upper(value: Estimate) -> float:
    """Where a bar or its interval ends."""
    return max(value.value, value.interval.high) if value.interval else value.value


def throughput_bars(
    panels: Sequence[tuple[str, Sequence[tuple[str, ConfigurationFacts]]]],
) -> Figure:
    """Throughput of each row with its interval, the speedup beside it.

    Args:
        panels: title, and rows with their labels.
    """
    figure, drawn = row_panels([len(rows) for _, rows in panels])
    reach = 0.0
    for axes, (title, rows) in zip(drawn, panels, strict=True):
        for position, (_, facts) in enumerate(rows):
            color = BASELINE if facts.strategy == "autoregressive" else DYNATREE
            axes.barh(position, facts.throughput.value, height=0.62, color=color)
            whisker(axes, facts.throughput, position)
            end = upper(facts.throughput)
            beside(axes, end, position, f"{facts.speedup.value:.2f}{TIMES}")
            reach = max(reach, end)
        name_rows(axes, title, [label for label, _ in rows])
    # Shared axis: annotations do not count for its limits, and the longest bar needs room for one.
    begin_at_zero(drawn[-1], 1.18 * reach)
    drawn[-1].set_xlabel("throughput (tokens/s)")
    return figure


def begin_at_zero(axes: Axes, end: float) -> None:
    """An x axis from 0 to `end`, without a tick whose label would reach over the edge."""
    axes.set_xlim(0, end)
    axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= 0.96 * end])
