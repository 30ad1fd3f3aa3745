"""The ablation figure: throughput of each row with its interval, and the speedup beside it."""

import textwrap
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dynatree.ablation import Ablation, ConfigurationFacts, Table
from dynatree.files import replacing

# Blue and grey of Okabe and Ito (2008) differ in brightness too, so they survive any colour
# blindness and a black and white print.
DYNATREE, BASELINE, INK = "#0072B2", "#999999", "#222222"

STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.linewidth": 0.6,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    # Type 42 embeds whole TrueType fonts; many publishers refuse Type 3.
    "pdf.fonttype": 42,
    # A label is text: a dollar sign in it starts no formula.
    "text.parse_math": False,
}

WIDTH = 4.0
"""Inches: the 8 pt text is 6.6 pt in a 3.3 inch column and 13 pt across 6.5 inches."""

ROW, HEADER, FOOTER = 0.27, 0.32, 0.38
"""Inches of height for a row, for a table's title, and for the axis below the last table."""

LABEL_CHARACTERS = 22


def draw(ablation: Ablation, pdf: Path, png: Path) -> None:
    """Draws one panel per table and writes it in both formats, each all or nothing."""
    with mpl.rc_context(STYLE):
        figure = build(ablation)
        # Neither file holds a date or a version, so that equal data gives equal bytes.
        with replacing(pdf) as temporary:
            figure.savefig(temporary, format="pdf", metadata={"CreationDate": None})
        with replacing(png) as temporary:
            figure.savefig(temporary, format="png", dpi=200, metadata={"Software": None})


def build(ablation: Ablation) -> Figure:
    """The figure, one panel per table, as yet in no file."""
    heights = [len(table.rows) * ROW + HEADER for table in ablation.tables]
    figure = Figure(figsize=(WIDTH, sum(heights) + FOOTER), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(
        len(ablation.tables), sharex=True, squeeze=False, height_ratios=heights
    )[:, 0]
    for axes, table in zip(panels, ablation.tables, strict=True):
        _panel(axes, table, ablation)
    # Shared axis: annotations do not count for its limits, and the longest bar needs room for one.
    panels[-1].set_xlim(0, 1.18 * max(_end(facts) for facts in ablation.configurations))
    panels[-1].set_xlabel("throughput (tokens/s)")
    return figure


def _panel(axes: Axes, table: Table, ablation: Ablation) -> None:
    measured = [ablation.facts(row.configuration) for row in table.rows]
    for position, facts in enumerate(measured):
        plain = facts.strategy == "autoregressive"
        interval = facts.throughput.interval
        color = BASELINE if plain else DYNATREE
        axes.barh(position, facts.throughput.value, height=0.62, color=color)
        if interval is not None:
            # Drawn from end to end, since a median need not lie in its bootstrap interval.
            axes.plot([interval.low, interval.high], [position] * 2, color=INK, linewidth=1)
            axes.plot([interval.low, interval.high], [position] * 2, "|", color=INK, markersize=5)
        axes.annotate(
            _speedup(facts),
            (_end(facts), position),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
        )
    axes.set_yticks(
        range(len(measured)), [textwrap.fill(row.label, LABEL_CHARACTERS) for row in table.rows]
    )
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(table.name, loc="left", fontweight="bold")


def _end(facts: ConfigurationFacts) -> float:
    """Where the bar or its interval ends, in tokens per second."""
    interval = facts.throughput.interval
    return max(facts.throughput.value, interval.high) if interval else facts.throughput.value


def _speedup(facts: ConfigurationFacts) -> str:
    return f"{facts.speedup.value:.2f}\N{MULTIPLICATION SIGN}"
