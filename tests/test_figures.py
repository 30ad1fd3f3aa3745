"""The figure files are complete, deterministic and carry the labels as plain text."""

import pytest
import synthetic
from matplotlib import rc_context

from dynatree import figures


def test_both_files_are_written_and_equal_data_gives_equal_bytes(tmp_path):
    ablation = synthetic.ablation(tmp_path, speedups={"tree": [1.0, 1.5, 2.0, 2.5]})
    written = []
    for name in ("a", "b"):
        pdf, png = tmp_path / f"{name}.pdf", tmp_path / f"{name}.png"
        figures.draw(ablation, pdf, png)
        written.append((pdf.read_bytes(), png.read_bytes()))
    assert written[0] == written[1]
    assert written[0][0].startswith(b"%PDF")
    assert written[0][1].startswith(b"\x89PNG")
    assert b"CreationDate" not in written[0][0]
    # TrueType fonts as they are, no Type 3.
    assert b"/FontFile2" in written[0][0]
    assert b"/Type3" not in written[0][0]
    assert b"Software" not in written[0][1]


@pytest.mark.parametrize("label", ["$x", r"50% $\alpha_{$ & \input{x}", "a" * 60])
def test_a_label_is_text_and_no_formula(tmp_path, label):
    study = synthetic.config(labels={"tree": label})
    figures.draw(synthetic.ablation(tmp_path, study), tmp_path / "a.pdf", tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1_000


def test_bars_and_annotations_show_the_measured_values(tmp_path):
    ablation = synthetic.ablation(tmp_path, speedups={"linear": 2.0, "tree": 3.0})
    with rc_context(figures.STYLE):
        forward, backward = figures.build(ablation).axes
    assert [bar.get_width() for bar in forward.patches] == pytest.approx([50.0, 100.0, 150.0])
    assert [text.get_text() for text in forward.texts] == [
        f"{speedup}.00\N{MULTIPLICATION SIGN}" for speedup in (1, 2, 3)
    ]
    assert [label.get_text() for label in forward.get_yticklabels()] == ["ar", "linear", "tree"]
    assert [bar.get_width() for bar in backward.patches] == pytest.approx([150.0, 50.0])
    # The first row of the table is the topmost bar.
    low, high = forward.get_ylim()
    assert low > high


def test_a_single_prompt_is_drawn_without_interval(tmp_path):
    ablation = synthetic.ablation(tmp_path, synthetic.config(prompts=1))
    assert figures.build(ablation).axes[0].lines[:] == []
