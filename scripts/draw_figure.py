"""Draws a figure of a section; a front end to `dynatree.figures`."""

import argparse
from pathlib import Path

from matplotlib.figure import Figure

from dynatree import breakdown, drawing, figures
from dynatree.ablation import Ablation, read_ablation
from dynatree.errors import reporting
from dynatree.results import RunResult, read_result

KINDS = ("bars", "waterfall", "rounds", "acceptance")


def build(kind: str, ablation: Ablation, runs: Path) -> Figure:
    """The figure of that kind; the last two kinds read the results that the tables show."""
    if kind == "bars":
        return figures.bars(ablation)
    if kind == "waterfall":
        return figures.waterfall(ablation)
    results: dict[str, RunResult] = {
        facts.name: read_result(runs / ablation.setting.pair / f"{facts.name}.json")
        for facts in ablation.shown
    }
    if kind == "rounds":
        times = {name: breakdown.round_time(result) for name, result in results.items()}
        return figures.round_times(ablation, {name: time for name, time in times.items() if time})
    shares = {name: breakdown.acceptance(result) for name, result in results.items()}
    return figures.acceptance(ablation, shares)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", required=True, choices=KINDS)
    parser.add_argument("--ablation", required=True, type=Path)
    parser.add_argument("--results", required=True, type=Path, help="folder of the run results")
    parser.add_argument("--pdf", required=True, type=Path)
    parser.add_argument("--png", required=True, type=Path)
    arguments = parser.parse_args()
    figure = build(arguments.kind, read_ablation(arguments.ablation), arguments.results)
    drawing.save(figure, arguments.pdf, arguments.png)
    print(f"wrote {arguments.pdf} and {arguments.png}")


if __name__ == "__main__":
    reporting(main)
