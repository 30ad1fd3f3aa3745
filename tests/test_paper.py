"""The paper says what was measured, types no number, and every value can be traced."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import synthetic

from dynatree.ablation import write_ablation
from dynatree.aggregate import aggregate
from dynatree.cli import app
from dynatree.config import TEXTS, load_config
from dynatree.drawing import save
from dynatree.errors import ResultError
from dynatree.evidence import read_evidence
from dynatree.experiment_figures import draw
from dynatree.facts import SEAL, sealed
from dynatree.figures import bars
from dynatree.files import digest_of
from dynatree.manifest import (
    Manifest,
    describe,
    make_manifest,
    pages,
    read_manifest,
    write_manifest,
)
from dynatree.numbers import macro_name, text
from dynatree.trace import lookup

ROOT = Path(__file__).parent.parent
PAPER = ROOT / "paper"
TEMPLATES = PAPER / "templates"
REFERENCE = Path("docs/reference")
SECTIONS = ["ablation", "families"]
EXPERIMENTS = [
    name
    for name in load_config(ROOT / "config.yaml").paper.experiments
    if (ROOT / REFERENCE / f"experiments/{name}.json").is_file()
]
"""Those whose results are committed."""
HOSTILE = r"A & B 50% a_b #1 ~ $x$ \ { } ^ \input{/etc/passwd}"


def results(folder, study=None, speedups=None, edit=None, **options):
    """A folder of synthetic results with one section, whose aggregate `edit` may change."""
    ablation = synthetic.ablation(folder / "runs", study, speedups, **options)
    data = ablation.model_dump()
    if edit is not None:
        edit({facts["name"]: facts for facts in data["configurations"]})
    write_ablation(folder / "ablation.json", type(ablation).model_validate(data))
    return read_evidence(folder, ["ablation"], [], folder / "runs")


def rendered(evidence, name):
    return text(evidence, TEMPLATES / f"{name}.tex.j2").text


def macro(tex, name):
    """The text of a macro, its lines joined."""
    body = re.search(rf"\\newcommand{{\\{name}}}{{(.*?)^}}$", tex, re.DOTALL | re.MULTILINE)
    assert body is not None, name
    return " ".join(re.sub(r"(?<!\\)%\n", "", body[1]).split())


def say(folder, name, *arguments, **options):
    return macro(rendered(results(folder, *arguments, **options), "prose"), f"say{name}")


# Byte for byte.


@pytest.fixture
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_the_reference_results_render_to_the_committed_files(at_root, tmp_path):
    """Texts, figures and the manifest itself: all made again, and compared byte for byte."""
    again = remade(REFERENCE)
    write_manifest(tmp_path / "manifest.json", again)
    grids = [f"experiments/{name}" for name in EXPERIMENTS]
    assert set(again.texts) == {f"{name}.tex" for name in (*SECTIONS, *TEXTS, *grids)}
    assert set(again.figures) == {*SECTIONS, *grids}
    assert (tmp_path / "manifest.json").read_bytes() == (REFERENCE / "manifest.json").read_bytes()


FORMS = (
    lambda value: f"{value}",
    lambda value: f"{value:.1f}",
    lambda value: f"{value:.2f}",
    lambda value: f"{1000 * value:.1f}",
    lambda value: f"{abs(100 * value):.1f}",
    lambda value: f"{value / 2**20:.0f}",
    lambda value: f"{value / 10**6:.1f}",
)


def test_what_stands_at_each_place_is_what_is_shown(at_root):
    manifest = read_manifest(REFERENCE / "manifest.json")
    parsed = {file: json.loads(Path(file).read_bytes()) for file in manifest.results}
    for file, entry in manifest.results.items():
        assert entry.sha256 == digest_of(Path(file))
    compared = 0
    for name, entry in manifest.texts.items():
        lines = (REFERENCE / name).read_text().split("\n")
        for shown in entry.shown:
            assert lines[shown.line - 1][shown.column - 1 :].startswith(shown.text.split("\n")[0])
            values = [lookup(parsed[source.file], source.path) for source in shown.sources]
            if len(values) <= 3 and all(isinstance(value, int | float) for value in values):
                numbers = re.findall(r"\d+(?:\.\d+)?", shown.text)
                if len(numbers) == len(values):
                    compared += 1
                    for value in values:
                        assert any(form(value) in numbers for form in FORMS), (shown, value)
    assert compared > 300


def test_a_figure_has_the_values_that_its_bars_show(at_root):
    sources = read_manifest(REFERENCE / "manifest.json").figures["ablation"].sources
    paths = {source.path for source in sources}
    assert {"$.configurations[1].throughput.value", "$.configurations[1].throughput.interval.low",
            "$.configurations[1].speedup.value", "$.tables[1].rows[2].label"} <= paths  # fmt: skip
    assert not any("acceptance" in path for path in paths)


@pytest.fixture
def copied(at_root, tmp_path, monkeypatch):
    """The reference results in a folder of one's own."""
    shutil.copytree(ROOT / REFERENCE, tmp_path / "reference")
    monkeypatch.chdir(tmp_path)
    return Path("reference")


def remade(folder):
    return make_manifest(folder, SECTIONS, EXPERIMENTS, folder / "runs", TEMPLATES, folder, folder)


def test_a_digit_changed_by_hand_is_found(copied):
    path = copied / "tables.tex"
    lines = path.read_text().split("\n")
    number = next(at for at, line in enumerate(lines) if r"\measured{" in line)
    lines[number] = lines[number].replace("measured{", "measured{9", 1)
    path.write_text("\n".join(lines))
    with pytest.raises(ResultError, match=rf"tables\.tex: line {number + 1} is not what"):
        remade(copied)


def test_a_text_cut_short_is_found(copied):
    path = copied / "prose.tex"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ResultError, match=r"prose\.tex: line \d+ is not what the results"):
        remade(copied)


def test_a_figure_changed_by_hand_is_found(copied):
    with (copied / "families.png").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ResultError, match=r"families\.png: is not what the results are drawn to"):
        remade(copied)


def test_a_changed_result_is_found(copied):
    path = copied / "ablation.json"
    data = json.loads(path.read_text())
    data["configurations"][0]["speedup"]["value"] += 0.5
    del data[SEAL]
    path.write_text(sealed(json.dumps(data)))
    with pytest.raises(ResultError, match=r"ablation\.tex: line \d+ is not what"):
        remade(copied)


def test_a_source_that_is_no_listed_result_is_refused(at_root):
    data = read_manifest(REFERENCE / "manifest.json").model_dump()
    del data["results"]["docs/reference/families.json"]
    with pytest.raises(ValueError, match=r"families\.json is not among the results"):
        Manifest.model_validate(data)


# dynatree trace.


def run(capsys, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["dynatree", *arguments])
    try:
        app()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    output = capsys.readouterr()
    return code, output.out, output.err


def test_trace_prints_value_place_run_and_digests(at_root, capsys, monkeypatch):
    code, out, _ = run(capsys, monkeypatch, "trace", "docs/reference/ablation.tex")
    assert code == 0
    value = json.loads((REFERENCE / "ablation.json").read_text())["configurations"][1]["speedup"]
    run_file = "docs/reference/runs/embedded/linear_k6.json"
    assert (
        f"    docs/reference/ablation.json $.configurations[1].speedup.value = {value['value']}  "
        f"(measured in {run_file})"
    ) in out.splitlines()
    assert f"{run_file}  sha256 {digest_of(Path(run_file))}" in out
    low, high = value["interval"]["low"], value["interval"]["high"]
    cell = rf"\measured{{{value['value']:.2f}}}{{[{low:.2f}, {high:.2f}]}}"
    assert re.search(rf"^\d+:\d+  {re.escape(cell)}$", out, re.MULTILINE)


def test_trace_speaks_of_figures_too(at_root):
    lines = list(describe(REFERENCE / "families.png"))
    assert any('families.json $.tables[1].rows[0].label = "Tuned' in line for line in lines)


def test_trace_refuses_what_the_manifest_was_not_made_with(copied, capsys, monkeypatch):
    # The manifest names files from the project's folder, which here lie elsewhere.
    write_manifest(copied / "manifest.json", remade(copied))
    assert list(describe(copied / "numbers.tex"))
    (copied / "runs/embedded/ar.json").write_text("{}")
    code, _, err = run(capsys, monkeypatch, "trace", "reference/numbers.tex")
    assert code == 1
    assert "ar.json: is not the file that reference/manifest.json was made with" in err
    (copied / "numbers.tex").write_text("")
    with pytest.raises(ResultError, match=r"numbers\.tex: is not the file that"):
        list(describe(copied / "numbers.tex"))
    with pytest.raises(ResultError, match=r"does not speak of 'main\.tex', but of ablation\.tex"):
        list(describe(copied / "main.tex"))
    (copied / "manifest.json").unlink()
    with pytest.raises(ResultError, match=r"no manifest\.json beside it; run: snakemake"):
        list(describe(copied / "numbers.tex"))


# Sentences follow the sign and its interval.


def test_the_headline_follows_the_interval_of_the_speedup(tmp_path):
    said = {
        name: say(tmp_path / name, "Headline", speedups={"tree": speedups})
        for name, speedups in {
            "gain": [1.4, 1.5, 1.5, 1.6],
            "loss": [0.5, 0.5, 0.6, 0.6],
            "noise": [0.8, 0.9, 1.1, 1.3],
        }.items()
    }
    assert "is faster than autoregressive decoding, by a factor of 1.50 $[1.4" in said["gain"]
    assert "is slower than autoregressive decoding: it reaches 0.55 $[0.5" in said["loss"]
    assert "makes no measurable difference to the speed" in said["noise"]
    single = say(tmp_path / "one", "Headline", synthetic.config(prompts=1), {"tree": [2.0]})
    assert "measures 2.00 times the speed" in single
    assert not re.search("faster|slower|difference", single)


def test_additions_and_removals_follow_the_intervals_of_their_changes(tmp_path):
    study = synthetic.config(
        tables={"forward": ["ar", "linear", "tree"], "backward": ["tree", "linear", "ar"]}
    )
    speedups = {"linear": 2.0, "tree": [1.5, 1.6, 1.7, 1.8]}
    said = say(tmp_path, "Additions", study, speedups)
    assert "``linear'' improves the speed by 100.0" in said
    assert re.search(r"``tree'' costs 17\.\d.* of the speed\.$", said)
    said = say(tmp_path, "Removals", study, speedups)
    assert re.search(r"``linear'' improves the speed by 2\d\.\d", said)
    assert re.search(r"``ar'' costs 39\.\d", said)
    noise = say(tmp_path, "Additions", study, {"linear": [0.8, 0.9, 1.1, 1.3], "tree": 1.0})
    assert "``linear'' makes no measurable difference ($" in noise


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ((0.2, 0.1, 0.3), r"comes 20.0\,\% $[10.0, 30.0]$ later than"),
        ((-0.2, -0.3, -0.1), r"yet comes 20.0\,\% $[10.0, 30.0]$ sooner than"),
        ((0.0, -0.1, 0.1), r"makes no measurable difference ($0.0$\,\%"),
    ],
)  # fmt: skip
def test_the_wait_for_the_first_token_follows_its_interval(tmp_path, change, said):
    def edit(configurations):
        value, low, high = change
        configurations["tree"]["latency"]["first_token_change"] = {
            "value": value, "interval": {"low": low, "high": high},
        }  # fmt: skip

    assert said in say(tmp_path, "Latency", edit=edit)


def test_a_baseline_that_differs_from_itself_is_said_to(tmp_path):
    assert "holds one, as it should" in say(tmp_path / "a", "Null")
    assert "does not hold one" in say(tmp_path / "b", "Null", None, {"ar": [1.1, 1.2, 1.2, 1.3]})


def test_outputs_and_certificate_are_told(tmp_path):
    assert say(tmp_path / "a", "Lossless").startswith("All 12 outputs")
    assert "Not every configuration was compared" in say(tmp_path / "a", "Certificate")
    study = synthetic.config(dtype="bfloat16")
    outputs = [synthetic.unequal(0, 0.125), *synthetic.result(study.spec("tree")).outputs[1:]]
    certified = synthetic.certificate(study, {"tree": [synthetic.departure(0.15)]})
    options = {"changes": {"tree": {"outputs": outputs}}, "certified": certified}
    assert "Of 12 outputs" in (said := say(tmp_path / "b", "Lossless", study, **options))
    assert "1 differs from autoregressive decoding" in said
    assert "only rounding separates" in say(tmp_path / "b", "Certificate", study, **options)


def test_the_fastest_row_is_named_unless_it_is_the_full_system(tmp_path):
    other = say(tmp_path / "a", "Fastest", None, {"linear": 2.0, "tree": 1.5})
    assert "2.00 $[2.00, 2.00]$, is that of ``K = 6''" in other
    assert "No other" in say(tmp_path / "b", "Fastest", None, {"linear": 1.5, "tree": 2.0})


# Macros and tables.


def test_macros_hold_the_measured_values(tmp_path):
    tex = rendered(results(tmp_path, speedups={"tree": 2.0}), "numbers")
    for name, value in {
        "numPrompts": "4 prompts", "numThreads": "2 threads", "numTreeSpeedup": "2.00",
        "numTreeFirstToken": r"10.0\,ms", "numTreePerToken": r"10.0\,ms",
        "numTreeMemory": r"1\,MiB",
        "numTreeAcceptance": r"25.0\,\%", "numTreeAcceptedLength": "1.00", "numArAcceptance": "--",
        "roleFullSpeedup": "2.00", "roleFastestDescription": "depth 4, branch 8",
        "numTorch": "of unknown version",
    }.items():  # fmt: skip
        assert rf"\newcommand{{\{name}}}{{{value}" in tex


def test_names_become_letters():
    assert macro_name("linear_k6") == "LinearKSix"
    assert macro_name("tree-depth10") == "TreeDepthOneZero"


def test_two_configurations_of_one_macro_name_are_refused(tmp_path):
    study = synthetic.config().model_dump()
    study["configs"]["Linear"] = {**study["configs"]["linear"]}
    study["tables"]["forward"].append("Linear")
    evidence = results(tmp_path, type(synthetic.config()).model_validate(study))
    with pytest.raises(ResultError, match="'linear' and 'Linear' would have macros of the same"):
        rendered(evidence, "numbers")


def test_tables_of_latency_and_memory_hold_the_measured_values(tmp_path):
    tex = " ".join(rendered(results(tmp_path, speedups={"tree": 2.0}), "tables").split())
    assert (
        r"\raggedright depth 4, branch 8, threshold 0.05, budget 256 & "
        r"\measured{10.0}{[10.0, 10.0]} & 10.0 & \measured{0.0}{[0.0, 0.0]} & "
        r"\measured{10.0}{[10.0, 10.0]} & 20.8 \\"
    ) in tex
    assert r"\raggedright K = 6 & 1 & eager & 0.0 & 0 \\" in tex
    # A configuration in two tables has one row in each of these.
    assert tex.count("branch 8") == 2


def test_no_digit_is_typed_in_the_paper():
    source = (PAPER / "main.tex").read_text()
    body = source.partition(r"\begin{document}")[2]
    prose = re.sub(r"(?<!\\)%.*", "", body)
    prose = re.sub(r"\\\[.*?\\\]|\$[^$]*\$", "", prose, flags=re.DOTALL)
    prose = re.sub(r"\\(cite[pt]?|ref|label|bibliography)\{[^}]*\}", "", prose)
    # EAGLE-2 is a name.
    assert re.findall(r"[^\s]*\d[^\s]*", prose.replace("EAGLE-2", "")) == []
    assert len(prose) > 5_000


def test_the_paper_uses_only_what_any_study_defines(tmp_path):
    used = set(re.findall(r"\\((?:num|role|say)[A-Z][A-Za-z]*)", (PAPER / "main.tex").read_text()))
    evidence = results(tmp_path)
    defined = "".join(rendered(evidence, name) for name in ("numbers", "prose"))
    assert used <= set(re.findall(r"\\newcommand\{\\(\w+)\}", defined))
    assert len(used) > 20


@pytest.mark.tex
@pytest.mark.parametrize("kind", ["hostile", "single prompt", "reference"])
def test_the_whole_paper_compiles(tmp_path, kind, monkeypatch):
    if kind == "reference":
        monkeypatch.chdir(ROOT)
        evidence = read_evidence(REFERENCE, SECTIONS, EXPERIMENTS, REFERENCE / "runs")
    elif kind == "hostile":
        labels = {
            "ar": "[a]*",
            "linear": HOSTILE,
            "tree": "a_very_long_name_without_any_space " * 2,
        }
        evidence = results(tmp_path, synthetic.config(labels=labels), {"linear": 90.0, "tree": 0.5})
    else:
        evidence = results(tmp_path, synthetic.config(prompts=1))
    build = tmp_path / "build"
    (build / "figures/experiments").mkdir(parents=True)
    (build / "experiments").mkdir()
    for name in ("main.tex", "references.bib"):
        shutil.copy(PAPER / name, build)
    for name, page in pages(evidence, TEMPLATES).items():
        (build / name).write_text(page.text, encoding="utf-8")
    for section, ablation in evidence.sections.items():
        figure = build / "figures" / section
        save(bars(ablation), figure.with_suffix(".pdf"), figure.with_suffix(".png"))
    for name, experiment in evidence.experiments.items():
        figure = build / "figures/experiments" / name
        save(draw(experiment), figure.with_suffix(".pdf"), figure.with_suffix(".png"))
    built = subprocess.run(
        [ROOT / "scripts/build_pdf.sh", build / "main.tex"], capture_output=True, text=True
    )
    log = (build / "main.log").read_text(errors="replace")
    assert built.returncode == 0, log[-3000:]
    assert not re.search(r"undefined (references|citations)|multiply defined", log)
    if kind == "reference":
        assert "Overfull" not in log


# Rows that are missing, or of another device.


def test_no_other_row_is_taken_for_a_full_system_that_is_missing(tmp_path):
    study = synthetic.config(labels={"tree": "DynaTree"})
    synthetic.write(study, tmp_path / "runs")
    (tmp_path / "runs/micro/tree.json").unlink()
    ablation = aggregate(study, tmp_path / "runs", synthetic.SOURCE, mark_missing=True)
    write_ablation(tmp_path / "ablation.json", ablation)
    evidence = read_evidence(tmp_path, ["ablation"], [], tmp_path / "runs")
    with pytest.raises(ResultError, match=r"'DynaTree', the full system .* \(not measured\)"):
        rendered(evidence, "numbers")


def test_the_numbers_are_of_one_device(tmp_path):
    changes = {
        "linear": {
            "provenance": {
                "device": {"type": "cpu", "name": "Other CPU", "threads": 2},
                "git": {"commit": None, "dirty": None},
            }
        }
    }
    study = synthetic.config(devices={"mixed": "group"})
    with pytest.raises(ResultError, match="the results are of different devices"):
        rendered(results(tmp_path, study, changes=changes), "numbers")
