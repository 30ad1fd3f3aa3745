"""What the paper shows of an experiment: figures, sentences and tables say what was measured."""

import re
import subprocess
from pathlib import Path

import pytest
import synthetic
from test_experiments import TUNED, measured, one, runs, study

from dynatree.ablation import write_ablation
from dynatree.aggregate import aggregate
from dynatree.drawing import save
from dynatree.errors import ConfigError, ResultError
from dynatree.evidence import read_evidence
from dynatree.experiment_figures import draw
from dynatree.experiments import write_experiment
from dynatree.figures import bars
from dynatree.files import write_text
from dynatree.manifest import describe, make_manifest, pages, write_manifest
from dynatree.render import render_experiment
from dynatree.trace import lookup

ROOT = Path(__file__).parent.parent
TEMPLATES = ROOT / "paper/templates"
HOSTILE = r"A & B 50% a_b #1 ~ $x$ \ { } ^ \input{/etc/passwd}"
NOISE = [0.8, 0.9, 1.1, 1.3]
KINDS = {
    "bars": (["ar", "tuned", "tree"], {"max_new_tokens": [13], "workload": ["words"]}),
    "heatmap": (
        ["tree"],
        {"depth": [2, 4], "branch_factor": [2, 3], "prune_threshold": [0.1, 0.2]},
    ),
    "curves": (["tree", "linear"], {"max_new_tokens": [13, 26, 52]}),
    "multiples": (["tree"], [{"depth": [3, 4]}, {"branch_factor": [4, 8]}]),
    "budget": (["tree"], {"node_budget": [2, 4, 8, 256]}),
}


def grid(folder, kind, speedups=None, **options):
    configs, values = KINDS[kind]
    config = one(configs, values, sweeps=TUNED, **options)
    assert config.experiments["grid"].kind == kind
    return measured(config, folder, {} if speedups is None else speedups)


def rendered(experiment):
    return render_experiment(experiment, TEMPLATES / "experiment.tex.j2", "results/grid.json")


def said(experiment):
    """The sentences before the first float, their lines joined."""
    return " ".join(rendered(experiment).text.partition(r"\begin{figure}")[0].split())


def plotted(axes):
    """The curves: x and y of each line with more than two points, or with a marker."""
    return [
        (list(line.get_xdata()), [float(value) for value in line.get_ydata()])
        for line in axes.lines
        if line.get_marker() in ("o", "s", "^") or line.get_linestyle() == "--"
    ]


# Which figure a grid has.


@pytest.mark.parametrize(
    ("configs", "values", "kind"),
    [
        (["tree"], {}, "bars"),
        (["ar", "tree"], {"workload": ["words", "manual"]}, "bars"),
        (["tree"], {"depth": [2, 3], "branch_factor": [2, 3]}, "heatmap"),
        (["tree"], {"depth": [2, 3], "max_new_tokens": 9}, "curves"),
        (["tree"], {"node_budget": [2, 3]}, "curves"),
        (["tree"], {"node_budget": [2, 3, 4]}, "budget"),
        (["tree"], [{"depth": [2]}, {"branch_factor": [2]}], "multiples"),
        (["tree"], [{"depth": [2]}, {"workload": ["words"]}], "bars"),
    ],
)  # fmt: skip
def test_the_figure_follows_from_the_grid(configs, values, kind):
    assert one(configs, values).experiments["grid"].kind == kind


def test_a_figure_that_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match=r"experiments\.x: figure: 'heatmap' does not go with"):
        study({"x": {"configs": ["tree"], "grid": {"depth": [2, 3]}, "figure": "heatmap"}})
    fitting = study({"x": {"configs": ["tree"], "grid": {"depth": [2, 3]}, "figure": "multiples"}})
    assert fitting.experiments["x"].kind == "multiples"


# Figures hold the numbers of their inputs.


def test_bars_hold_throughput_and_speedup(tmp_path):
    experiment = grid(tmp_path, "bars", dict.fromkeys(runs_of("bars"), 2.0))
    (axes,) = draw(experiment).axes
    assert [bar.get_width() for bar in axes.patches] == [
        point.throughput.value for point in experiment.shown
    ]
    assert axes.get_title(loc="left") == "13 new tokens, words"


def runs_of(kind):
    configs, values = KINDS[kind]
    return runs(one(configs, values, sweeps=TUNED))


def test_a_heatmap_has_a_panel_for_each_value_of_the_third_field(tmp_path):
    names = list(runs_of("heatmap"))
    experiment = grid(tmp_path, "heatmap", {name: 1 + at / 8 for at, name in enumerate(names)})
    first, second, _ = draw(experiment).axes
    assert [axes.get_title(loc="left") for axes in (first, second)] == [
        "prune threshold 0.1",
        "prune threshold 0.2",
    ]
    # Rows are depths from below, columns branch factors.
    for axes, values in ((first, [1, 1.25, 1.5, 1.75]), (second, [1.125, 1.375, 1.625, 1.875])):
        assert axes.images[0].get_array().ravel().tolist() == pytest.approx(values)


def test_curves_hold_values_and_bands_hold_intervals(tmp_path):
    speedups = {"grid-tree-tokens26": [1.9, 2.0, 2.1, 2.2]}
    experiment = grid(tmp_path, "curves", speedups)
    above, below = draw(experiment).axes
    tree = experiment.rows[0][1]
    assert plotted(below)[0] == ([13, 26, 52], [point.speedup.value for point in tree])
    rates = [point.autoregressive_throughput.value for point in tree]
    assert plotted(above)[2] == ([13, 26, 52], rates)
    band = below.collections[0].get_paths()[0].vertices[:, 1]
    assert tree[1].speedup.interval.low == pytest.approx(band[(band > 1.5)].min())
    assert tree[1].speedup.interval.high == pytest.approx(band.max())


def test_small_multiples_have_a_panel_for_each_field(tmp_path):
    experiment = grid(tmp_path, "multiples", {"grid-depth3": 1.5, "grid-branch4": 0.7})
    depth, branch = draw(experiment).axes
    assert plotted(depth) == [([0, 1], pytest.approx([1.5, 1.0]))]
    assert plotted(branch) == [([0, 1], pytest.approx([0.7, 1.0]))]
    assert [tick.get_text() for tick in branch.get_xticklabels()] == ["4", "8"]
    assert (depth.get_xlabel(), branch.get_xlabel()) == ("depth", "branch factor")


def test_the_budget_figure_has_measurement_and_prediction(tmp_path):
    experiment = grid(tmp_path, "budget", {"grid-budget8": 2.0})
    (axes,) = draw(experiment).axes
    measured_at, predicted_at = plotted(axes)
    points = experiment.points
    assert measured_at == ([2, 4, 8, 256], [point.speedup.value for point in points])
    assert predicted_at[1] == [point.predicted.speedup for point in points]


@pytest.mark.parametrize("kind", KINDS)
def test_equal_data_gives_equal_bytes(tmp_path, kind):
    experiment = grid(tmp_path, kind)
    files = []
    for attempt in "ab":
        pdf, png = tmp_path / f"{attempt}.pdf", tmp_path / f"{attempt}.png"
        save(draw(experiment), pdf, png)
        files.append((pdf.read_bytes(), png.read_bytes()))
    assert files[0] == files[1]


# What is compared with what.


def test_references_follow_the_kind(tmp_path):
    experiment = grid(tmp_path / "a", "bars")
    assert {point.reference for point in experiment.points if point.row == "tree"} == {
        "grid-linear-tokens13-words"
    }
    best = grid(tmp_path / "b", "heatmap", {"grid-depth4-branch3-threshold0.2": 2.0})
    assert {point.reference for point in best.points} == {
        "grid-depth4-branch3-threshold0.2",
        None,
    }
    alone = grid(tmp_path / "c", "multiples", {"grid-depth3": 1.5})
    # The configuration as it is stands in both panels.
    assert [point.reference for point in alone.points] == ["grid-depth4", None, "grid-depth4", None]
    assert alone.point("grid-depth3").change.value == pytest.approx(0.5)


def test_other_prompts_are_compared_without_pairing(tmp_path):
    config = one(["tree"], {"workload": "manual", "prompt_tokens": [8, 16]})
    speedups = {"grid-prompt8": [1.0, 2.0, 3.0], "grid-prompt16": [2.0, 4.0, 6.0]}
    change = measured(config, tmp_path, speedups).points[1].change
    assert change.value == pytest.approx(1.0)
    # Paired, every prompt would double and the interval have no width.
    assert change.interval.low < 0.2 < 1.8 < change.interval.high


# Sentences follow the sign and its interval.


@pytest.mark.parametrize(
    ("speedups", "words", "against"),
    [
        (
            [1.4, 1.5, 1.5, 1.6],
            "is faster than autoregressive decoding, by a factor",
            "is .* faster",
        ),
        ([0.5, 0.5, 0.6, 0.6], "is slower than autoregressive decoding, at 0.55", "is .* slower"),
        (NOISE, "does not differ from autoregressive decoding beyond noise", "shows no difference"),
    ],
)
def test_a_row_is_faster_or_slower_or_neither(tmp_path, speedups, words, against):
    point = "grid-tree-tokens13-words"
    text = said(grid(tmp_path, "bars", {point: speedups}))
    assert f"``tree'' {words}" in text
    # Against the tuned baseline, whose speedup is 1.
    assert re.search(rf"``tree''[^;]*, and {against}[^;]* ``Tuned", text)


def test_a_change_with_length_is_larger_or_smaller_or_neither(tmp_path):
    last = "grid-tree-tokens52"
    for name, speedups, words in (
        ("a", [1.4, 1.5, 1.5, 1.6], "larger by 49.8"),
        ("b", [0.5, 0.5, 0.6, 0.6], "smaller by 45.2"),
        ("c", NOISE, "no difference beyond noise"),
    ):
        text = said(grid(tmp_path / name, "curves", {last: speedups}))
        assert "At 52 new tokens its speedup is" in text
        assert words in text


def test_the_fastest_point_is_named_and_the_slower_are_counted(tmp_path):
    speedups = {"grid-depth2-branch3-threshold0.1": [2.0, 2.1, 2.2, 2.3]}
    text = said(grid(tmp_path, "heatmap", speedups))
    assert "2.15 $[2.05, 2.25]$, is that of depth 2, branch factor 3, prune threshold 0.1" in text
    assert "Of the 7 other points, 7 are slower than the fastest beyond noise, and 0 show" in text


def test_each_parameter_is_compared_with_its_own_setting(tmp_path):
    text = said(grid(tmp_path, "multiples", {"grid-depth3": [1.4, 1.5, 1.5, 1.6]}))
    assert re.search(r"``tree'' at depth 3 is 49\.8[^a-z]* faster than itself at 4\.", text)
    assert "U+E" not in text
    assert "``tree'' at branch factor 4 shows no difference beyond noise" in text


def test_the_cost_model_is_judged_by_its_misses(tmp_path):
    experiment = grid(tmp_path, "budget", {"grid-budget8": 2.0})
    misses = [abs(point.predicted.speedup / point.speedup.value - 1) for point in experiment.points]
    text = said(experiment)
    assert rf"by {100 * sum(misses) / 4:.1f}\,\% on average" in text
    assert rf"by {100 * max(misses):.1f}\,\% at most" in text
    assert "The largest measured speedup, 2.00" in text


def test_a_single_prompt_has_no_direction(tmp_path):
    for kind in KINDS:
        text = said(grid(tmp_path / kind, kind, prompts=1))
        assert not re.search(r"faster than [^t]|slower than [^t]|larger by|smaller by", text)
        assert r"\measured{" not in rendered(grid(tmp_path / kind, kind, prompts=1)).text


# Every number has its place.


def paper(folder, kind):
    """A paper of one section and one experiment, rendered in `folder`."""
    configs, values = KINDS[kind]
    config = one(configs, values, sweeps=TUNED)
    experiment = measured(config, folder / "runs", {})
    synthetic.write(config, folder / "runs")
    write_ablation(folder / "ablation.json", aggregate(config, folder / "runs", synthetic.SOURCE))
    write_experiment(folder / "experiments/grid.json", experiment)
    evidence = read_evidence(folder, ["ablation"], ["grid"], folder / "runs")
    for name, page in pages(evidence, TEMPLATES).items():
        write_text(folder / name, page.text)
    for name, figure in (
        ("ablation", bars(evidence.sections["ablation"])),
        ("experiments/grid", draw(evidence.experiments["grid"])),
    ):
        save(figure, folder / f"figures/{name}.pdf", folder / f"figures/{name}.png")
    return evidence


def manifest_of(folder):
    return make_manifest(
        folder, ["ablation"], ["grid"], folder / "runs", TEMPLATES, folder, folder / "figures"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_manifest_covers_every_number_and_figure(tmp_path, kind):
    evidence = paper(tmp_path, kind)
    manifest = manifest_of(tmp_path)
    write_manifest(tmp_path / "manifest.json", manifest)
    grid_file = (tmp_path / "experiments/grid.json").as_posix()
    text = (tmp_path / "experiments/grid.tex").read_text()
    entry = manifest.texts["experiments/grid.tex"]
    # Without what is traced, and without commands, no digit is left in the table.
    lines = text.split("\n")
    for shown in reversed(entry.shown):
        line = lines[shown.line - 1]
        at = shown.column - 1
        lines[shown.line - 1] = line[:at] + line[at + len(shown.text) :]
    rows = [line for line in lines if line.endswith(r"\\") and "multicolumn" not in line]
    assert len(rows) > 2
    assert not re.search(r"\d", "".join(rows))
    data = evidence.experiments["grid"].model_dump()
    for shown in entry.shown:
        for source in shown.sources:
            assert source.file == grid_file
            lookup(data, source.path)
    drawn = {source.path for source in manifest.figures["experiments/grid"].sources}
    assert "$.points[0].speedup.value" in drawn
    run = evidence.run_files[evidence.experiments["grid"].points[0].run]
    for path in ("experiments/grid.tex", "figures/experiments/grid.png"):
        assert any(f"(measured in {run})" in line for line in describe(tmp_path / path))


def test_a_figure_of_an_experiment_changed_by_hand_is_found(tmp_path):
    paper(tmp_path, "curves")
    with (tmp_path / "figures/experiments/grid.png").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ResultError, match=r"grid\.png: is not what the results are drawn to"):
        manifest_of(tmp_path)


def test_the_paper_takes_the_experiments_in(tmp_path):
    paper(tmp_path, "budget")
    assert r"\input{experiments/grid}" in (tmp_path / "prose.tex").read_text()


DOCUMENT = r"""\documentclass{article}
\usepackage[margin=1in]{geometry}
\usepackage{amsmath}
\usepackage{booktabs}
\usepackage{graphicx}
\begin{document}
%s
\end{document}
"""


@pytest.mark.tex
@pytest.mark.parametrize("prompts", [1, 4])
def test_every_kind_compiles_whatever_its_names_are(tmp_path, prompts):
    inputs = []
    for kind in KINDS:
        experiment = grid(tmp_path / kind, kind, prompts=prompts)
        hostile = experiment.model_copy(
            update={
                "title": HOSTILE,
                "experiment": kind,
                "points": [
                    point.model_copy(update={"label": HOSTILE}) for point in experiment.points
                ],
            }
        )
        write_text(tmp_path / f"{kind}.tex", rendered(hostile).text)
        figure = tmp_path / "figures/experiments" / kind
        save(draw(hostile), figure.with_suffix(".pdf"), figure.with_suffix(".png"))
        inputs.append(rf"\input{{{kind}}}")
    (tmp_path / "main.tex").write_text(DOCUMENT % "\n".join(inputs))
    built = subprocess.run(
        [ROOT / "scripts/build_pdf.sh", tmp_path / "main.tex"], capture_output=True, text=True
    )
    log = (tmp_path / "main.log").read_text(errors="replace")
    assert built.returncode == 0, log[-3000:]
    assert not re.search(r"undefined references|multiply defined", log)
