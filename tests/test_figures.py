"""The figure files are complete, deterministic, and show the values that they were given."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import synthetic
from matplotlib.figure import Figure

from dynatree import breakdown, drawing, figures
from dynatree.ablation import Estimate, Interval, read_ablation
from dynatree.errors import ResultError
from dynatree.experiment_figures import heatmap
from dynatree.points import Cell, Point, RoundTime
from dynatree.results import read_result
from dynatree.roofline import read_roofline

ROOT = Path(__file__).parent.parent
REFERENCE = ROOT / "docs/reference"
RECORD = ROOT / "bench/results/amd-epyc-avx512/roofline-embedded-cpu-auto.json"


def around(value, by=0.1):
    return Estimate(value=value, interval=Interval(low=value - by, high=value + by))


def round_times(ablation, milliseconds=None):
    time = RoundTime(
        milliseconds=milliseconds or {"draft": 2.0, "verify": 5.0, "other": 1.0},
        total=around(8.0),
        tokens=2.5,
    )
    return {facts.name: time for facts in ablation.configurations}


def every_figure(ablation):
    return {
        "bars": figures.bars(ablation),
        "waterfall": figures.waterfall(ablation),
        "rounds": figures.round_times(ablation, round_times(ablation)),
        "acceptance": figures.acceptance(ablation, {"tree": [Point(1, around(0.5))]}),
        "heatmap": heatmap({"": [Cell(1, 2, around(1.0))]}, "x", "y", "speedup"),
        "roofline": figures.roofline(read_roofline(RECORD)),
    }


@pytest.fixture
def ablation(tmp_path):
    return synthetic.ablation(tmp_path, speedups={"tree": [1.0, 1.5, 2.0, 2.5]})


def test_both_files_are_written_and_equal_data_gives_equal_bytes(tmp_path, ablation):
    written = []
    for attempt in ("a", "b"):
        files = {}
        for name, figure in every_figure(ablation).items():
            pdf, png = (tmp_path / attempt / f"{name}.{ending}" for ending in ("pdf", "png"))
            drawing.save(figure, pdf, png)
            files[name] = (pdf.read_bytes(), png.read_bytes())
        written.append(files)
    assert written[0] == written[1]
    for pdf, png in written[0].values():
        assert pdf.startswith(b"%PDF")
        assert png.startswith(b"\x89PNG")
        assert b"CreationDate" not in pdf
        # TrueType fonts as they are, no Type 3.
        assert b"/FontFile2" in pdf
        assert b"/Type3" not in pdf
        assert b"Software" not in png


@pytest.mark.parametrize("label", ["$x", r"50% $\alpha_{$ & \input{x}", "a" * 60])
def test_a_label_is_text_and_no_formula(tmp_path, label):
    study = synthetic.config(labels={"tree": label})
    for name, figure in every_figure(synthetic.ablation(tmp_path, study)).items():
        drawing.save(figure, tmp_path / "a.pdf", tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 1_000


def test_bars_and_annotations_show_the_measured_values(tmp_path):
    ablation = synthetic.ablation(tmp_path, speedups={"linear": 2.0, "tree": 3.0})
    forward, backward = figures.bars(ablation).axes
    assert [bar.get_width() for bar in forward.patches] == pytest.approx([50.0, 100.0, 150.0])
    assert texts(forward) == [f"{speedup}.00\N{MULTIPLICATION SIGN}" for speedup in (1, 2, 3)]
    assert [label.get_text() for label in forward.get_yticklabels()] == ["ar", "linear", "tree"]
    assert [bar.get_width() for bar in backward.patches] == pytest.approx([150.0, 50.0])
    # The first row of the table is the topmost bar.
    low, high = forward.get_ylim()
    assert low > high


def texts(axes):
    return [text.get_text() for text in axes.texts]


def spans(axes):
    return [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in axes.patches]


def test_a_single_prompt_is_drawn_without_interval(tmp_path):
    ablation = synthetic.ablation(tmp_path, synthetic.config(prompts=1))
    assert figures.bars(ablation).axes[0].lines[:] == []
    # Every mark of an interval has two ends at one height; a waterfall has only its steps left.
    heights = [line.get_ydata() for line in figures.waterfall(ablation).axes[0].lines]
    assert all(len(set(height)) == 2 for height in heights)


def test_a_waterfall_leads_from_the_first_row_to_the_last(tmp_path):
    ablation = synthetic.ablation(
        tmp_path, speedups={"linear": [1.9, 2.0, 2.0, 2.1], "tree": [0.99, 1.0, 1.0, 1.01]}
    )
    # The backward table adds nothing and has no panel.
    (axes,) = figures.waterfall(ablation).axes
    first, gain, loss, last = spans(axes)
    assert first == pytest.approx((0.0, 1.0))
    assert gain == pytest.approx((1.0, 2.0), rel=0.01)
    assert loss == pytest.approx((1.0, 2.0), rel=0.01)
    assert last == pytest.approx((0.0, 1.0), rel=0.01)
    assert axes.patches[2].get_hatch()
    assert not axes.patches[1].get_hatch()
    minus = "\N{MINUS SIGN}"
    assert texts(axes)[1:3] == ["+100 %", f"{minus}50 %"]
    # The interval of a change stands where the change ends.
    _, facts, _ = ablation.configurations
    change = ablation.tables[0].rows[1].versus_previous
    drawn = [list(line.get_xdata()) for line in axes.lines]
    assert [pytest.approx(1 + end) for end in (change.interval.low, change.interval.high)] in drawn
    assert facts.name == "linear"


def test_a_change_within_noise_is_neither_gain_nor_loss(tmp_path):
    ablation = synthetic.ablation(tmp_path, speedups={"linear": [0.8, 0.9, 1.1, 1.3]})
    colors = [bar.get_facecolor()[:3] for bar in figures.waterfall(ablation).axes[0].patches]
    grey = colors[1]
    assert grey[0] == grey[1] == grey[2]


def test_a_waterfall_needs_a_table_that_adds(tmp_path):
    study = synthetic.config(tables={"backward": ["tree", "ar"]})
    with pytest.raises(ResultError, match="takes them away"):
        figures.waterfall(synthetic.ablation(tmp_path, study))


def test_the_phases_of_a_round_are_stacked_without_gap(ablation):
    forward, _ = figures.round_times(ablation, round_times(ablation)).axes
    assert spans(forward)[:3] == [(0.0, 2.0), (2.0, 7.0), (7.0, 8.0)]
    assert texts(forward) == ["2.50 tokens"] * 3
    without = {"tree": round_times(ablation)["tree"]}
    assert len(figures.round_times(ablation, without).axes[0].patches) == 3
    with pytest.raises(ResultError, match="no configuration has a round"):
        figures.round_times(ablation, {})


def test_acceptance_has_a_curve_for_each_row_that_drafts(ablation):
    shares = {"tree": [Point(1, around(0.8)), Point(2, around(0.6))], "ar": []}
    forward, backward = figures.acceptance(ablation, shares).axes
    curve, *whiskers = forward.lines
    assert list(curve.get_ydata()) == [0.8, 0.6]
    assert [list(line.get_ydata()) for line in whiskers] == [
        pytest.approx([0.7, 0.9]),
        pytest.approx([0.5, 0.7]),
    ]
    assert [text.get_text() for text in backward.get_legend().get_texts()] == ["tree"]
    with pytest.raises(ResultError, match="drafts"):
        figures.acceptance(ablation, {})


def test_a_heatmap_writes_each_value_into_its_cell_and_leaves_gaps():
    cells = [Cell(1, 4, around(1.0)), Cell(2, 4, around(2.0)), Cell(2, 8, around(3.0))]
    first, second, _ = heatmap({"a": cells, "b": cells[:1]}, "branch", "depth", "speedup").axes
    placed = {(text.xy, text.get_text()) for text in first.texts}
    assert ((1, 1), "3.00") in placed
    assert ((0, 0), "[0.90, 1.10]") in placed
    assert not [text for text in first.texts if text.xy == (0, 1)]
    assert first.images[0].get_array().mask.sum() == 1
    # One scale of colours for all panels.
    assert first.images[0].get_clim() == second.images[0].get_clim() == (1.0, 3.0)
    for wrong in ({}, {"a": []}, {"a": [*cells, cells[0]]}):
        with pytest.raises(ResultError, match="one value for each place"):
            heatmap(wrong, "branch", "depth", "speedup")


def test_no_tick_stands_where_its_label_would_be_cut(tmp_path):
    # At this speed a tick falls on the edge of the axis.
    ablation = synthetic.ablation(tmp_path, speedups={"tree": 200 / 59})
    axes = figures.bars(ablation).axes[-1]
    assert axes.get_xlim()[1] == pytest.approx(200)
    assert max(axes.get_xticks()) < 0.97 * 200


def test_the_roofline_is_what_its_record_says(tmp_path):
    record = read_roofline(RECORD)
    data = json.loads(RECORD.read_text())
    limit = {point.x: point.y.value for point in record.limits()}
    assert limit[8] == pytest.approx(8000 / data["steps"]["verify 8"]["floor_ms"])
    measured = {point.x: point.y for point in record.measured()}
    assert measured[8].value == pytest.approx(8000 / data["steps"]["verify 8"]["ms"], rel=0.02)
    assert measured[8].interval.low < measured[8].value < measured[8].interval.high
    assert sorted(measured) == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    labels = [text.get_text() for text in figures.roofline(record).axes[0].get_legend().get_texts()]
    assert "generated by dynatree" in labels
    del data["steps"]["verify 8"]["floor_ms"]
    (tmp_path / "r.json").write_text(json.dumps(data))
    with pytest.raises(ResultError, match=r"steps\.verify 8\.floor_ms: Field required"):
        read_roofline(tmp_path / "r.json")
    with pytest.raises(ResultError, match="cannot be read"):
        read_roofline(tmp_path / "nowhere.json")


@pytest.mark.parametrize("section", ["ablation", "families"])
def test_no_text_of_the_reference_figures_leaves_the_figure_or_meets_another(section):
    ablation = read_ablation(REFERENCE / f"{section}.json")
    results = {
        facts.name: read_result(REFERENCE / "runs/embedded" / f"{facts.name}.json")
        for facts in ablation.shown
    }
    drawn: list[Figure] = [
        figures.bars(ablation),
        figures.waterfall(ablation),
        figures.round_times(
            ablation, {name: breakdown.round_time(result) for name, result in results.items()}
        ),
        figures.acceptance(
            ablation, {name: breakdown.acceptance(result) for name, result in results.items()}
        ),
    ]
    for figure in drawn:
        figure.draw_without_rendering()
        whole = figure.bbox
        for axes in figure.axes:
            found = [*axes.texts, *axes.get_yticklabels(), axes.xaxis.label, axes.title]
            boxes = [text.get_window_extent() for text in found if text.get_text()]
            for box in boxes:
                assert box.x0 >= whole.x0 - 1
                assert box.x1 <= whole.x1 + 1
            ticks = [text.get_window_extent() for text in axes.get_yticklabels()]
            for upper, lower in pairwise(ticks):
                assert not upper.overlaps(lower)
