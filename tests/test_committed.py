"""Results of another machine are rendered where they fit, and measured nowhere."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from test_workflow import PROJECT, command, replace

from dynatree.committed import committed
from dynatree.config import load_config, parse_config
from dynatree.errors import ResultError
from dynatree.files import weights_digest
from dynatree.results import read_result, write_result

REFERENCE = PROJECT / "docs/reference"


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(REFERENCE, tmp_path / "reference"))


SHIPPED = load_config(PROJECT / "config.yaml")


def same_texts(experiment):
    """Whether this Python comes with the texts that the committed results are of."""
    runs = {point.run for point in SHIPPED.points(experiment)}
    specs = [read_result(REFERENCE / f"runs/embedded/{run}.json").spec for run in runs]
    return all(spec.prompts == SHIPPED.spec(spec.name).prompts for spec in specs)


EXPERIMENTS = [
    name
    for name in SHIPPED.paper.experiments
    if (REFERENCE / f"experiments/{name}.json").is_file() and same_texts(name)
]
"""Those whose results are committed, and fit this Python."""


@pytest.fixture
def study():
    return changed(lambda data: data["paper"].update(experiments=EXPERIMENTS))


def changed(edit):
    data = yaml.safe_load((PROJECT / "config.yaml").read_text())
    edit(data)
    return parse_config(data)


def rewrite(folder, name, **changes):
    path = folder / "runs/embedded" / f"{name}.json"
    write_result(path, read_result(path).model_copy(update=changes))


def test_the_reference_fits_the_configuration(study, tmp_path):
    found = committed(study, REFERENCE, tmp_path)
    assert (found.sections, found.experiments) == (["ablation", "families"], EXPERIMENTS)
    assert found.source_digest == read_result(REFERENCE / "runs/embedded/ar.json").source_digest


def test_every_misfit_is_named_with_its_field_and_configurations(tmp_path):
    def edit(data):
        data["configs"]["linear_k6"]["num_draft_tokens"] = 7
        data["pairs"]["embedded"]["measure"]["runs"] = 5
        data["certificate"]["max_new_tokens"] = 25

    with pytest.raises(ResultError, match="does not fit the configuration") as error:
        committed(changed(edit), REFERENCE, tmp_path)
    message = str(error.value)
    assert "strategy.num_draft_tokens: measured 6, configured 7 (linear_k6)" in message
    assert "strategies.linear_k6.num_draft_tokens: measured 6, configured 7 (certificate" in message
    assert "measure.runs: measured 3, configured 5 (ar, linear_k6, tree_unpruned" in message
    assert "and 13 more)" in message
    assert "max_new_tokens: measured 24, configured 25 (certificate.json)" in message


def test_results_of_several_codes_or_weights_do_not_fit_each_other(study, folder, tmp_path):
    rewrite(folder, "ar", source_digest="0" * 64)
    rewrite(folder, "auto", pair_digest="1" * 64)
    with pytest.raises(ResultError) as error:
        committed(study, folder, tmp_path)
    assert "measured by different code (" in str(error.value)
    assert f"{'0' * 12}: ar" in str(error.value)
    assert "measured with different weights (" in str(error.value)
    assert f"{'1' * 12}: auto" in str(error.value)


def test_other_code_is_a_remark(study, tmp_path, monkeypatch):
    found = committed(study, REFERENCE, tmp_path)
    digests = {"measure.py": found.source_digest, "certify.py": found.certifying_digest}
    monkeypatch.setattr("dynatree.committed.source_digest", lambda path: digests[path.name])
    assert committed(study, REFERENCE, tmp_path).remarks == []
    digests["measure.py"] = "0" * 64
    (remark,) = committed(study, REFERENCE, tmp_path).remarks
    assert "measured by other code than this checkout's (source digest" in remark
    assert f"here {'0' * 12}" in remark


def test_other_weights_on_this_machine_are_a_remark(study, tmp_path):
    for role in ("target", "draft"):
        model = tmp_path / "embedded" / role
        model.mkdir(parents=True)
        (model / "config.json").write_text("{}")
        (model / "model.safetensors").write_bytes(b"weights")
    remarks = "\n".join(committed(study, REFERENCE, tmp_path).remarks)
    here = weights_digest(tmp_path / "embedded/target")[:12]
    assert f"other weights than those in {tmp_path / 'embedded/target'}" in remarks
    assert f"here {here}" in remarks
    shutil.rmtree(tmp_path / "embedded")
    assert "weights" not in "\n".join(committed(study, REFERENCE, tmp_path).remarks)


def test_an_incomplete_section_is_left_out_and_said_so(study, folder, tmp_path):
    (folder / "runs/embedded/auto.json").unlink()
    found = committed(study, folder, tmp_path)
    assert found.sections == ["ablation"]
    assert any("section families is left out" in line for line in found.remarks)
    (folder / "runs/embedded/ar.json").unlink()
    with pytest.raises(ResultError, match=r"no section is complete.*ar\.json"):
        committed(study, folder, tmp_path)


def test_an_experiment_on_the_text_of_another_python_is_left_out(monkeypatch, tmp_path):
    monkeypatch.setattr("dynatree.texts.language_reference", lambda: "Other words.")
    found = committed(SHIPPED, REFERENCE, tmp_path)
    assert found.experiments == [
        name for name in SHIPPED.paper.experiments if name not in ("main", "prompt_length")
    ]
    assert any(
        "another Python than this one: main, prompt_length" in line for line in found.remarks
    )


def test_an_experiment_is_checked_as_a_section_is(folder, tmp_path):
    def edit(data):
        data["experiments"] = {
            "lengths": {"configs": ["dynatree"], "grid": {"max_new_tokens": [64]}},
            "absent": {"configs": ["dynatree"], "grid": {"depth": [3]}},
        }
        data["paper"] = {"experiments": ["lengths", "absent"]}

    found = committed(changed(edit), folder, tmp_path)
    assert found.experiments == ["lengths"]
    assert any("experiment absent is left out; missing" in line for line in found.remarks)
    run = changed(edit).points("absent")[0].run
    result = read_result(folder / "runs/embedded/dynatree.json")
    write_result(folder / f"runs/embedded/{run}.json", result)
    with pytest.raises(ResultError, match=rf"strategy\.depth: measured 7, configured 3 \({run}\)"):
        committed(changed(edit), folder, tmp_path)


def test_a_damaged_file_is_named(study, folder, tmp_path):
    path = folder / "runs/embedded/ar.json"
    data = json.loads(path.read_text())
    data["totals"]["tokens"] += 1
    path.write_text(json.dumps(data))
    with pytest.raises(ResultError, match=r"ar\.json: not a valid .*; take the file again"):
        committed(study, folder, tmp_path)


# The pipeline itself.

TAKEN = ("--config", "results=docs/reference")


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """A fresh copy of the project, rendered from its committed results, and what that printed."""
    folder = tmp_path_factory.mktemp("taken") / "project"
    for name in ("rules", "scripts", "src", "profiles", "envs", "paper", "docs/reference"):
        shutil.copytree(
            PROJECT / name,
            folder / name,
            ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "figures", "*.pdf"),
        )
    for name in ("Snakefile", "config.yaml"):
        shutil.copy2(PROJECT / name, folder / name)
    for section in ("ablation", "families"):
        (folder / f"paper/{section}.tex").unlink(missing_ok=True)
    done = snakemake(folder, "--cores", "2", *TAKEN, "--", "rendered")
    assert done.returncode == 0, done.stdout
    return folder, done.stdout


def snakemake(folder, *arguments):
    return command(folder, "python", "-m", "snakemake", *arguments)


def test_everything_is_rendered_and_nothing_measured(rendered):
    folder, printed = rendered
    rules = set(re.findall(r"^(?:local)?rule (\w+):", printed, flags=re.MULTILINE))
    grids = (
        {"aggregate_experiment", "experiment_text", "experiment_figure"} if EXPERIMENTS else set()
    )
    sections = {"aggregate", "section_text", "section_figure", "section_detail"}
    assert rules == {*sections, *grids, "rendered"}
    assert not (folder / "results/runs").exists()
    for section in ("ablation", "families"):
        for kind in ("", "_waterfall", "_rounds", "_acceptance"):
            for ending in ("pdf", "png"):
                assert (folder / f"paper/figures/{section}{kind}.{ending}").is_file()
        # The numbers of the tables are those that were rendered where they were measured.
        assert (folder / f"paper/{section}.tex").read_text() == (
            REFERENCE / f"{section}.tex"
        ).read_text()
    for name in EXPERIMENTS:
        assert (folder / f"paper/figures/experiments/{name}.pdf").is_file()
        assert (folder / f"paper/experiments/{name}.tex").read_text() == (
            REFERENCE / f"experiments/{name}.tex"
        ).read_text()


def test_file_times_and_the_measuring_code_make_nothing_stale(rendered):
    folder, _ = rendered
    for path in (*(folder / "docs").rglob("*.json"), *(folder / "src").rglob("*.py")):
        path.touch()
    engine = folder / "src/dynatree/tree.py"
    text = engine.read_text()
    engine.write_text(text + "\nEXTRA = 1\n")
    done = snakemake(folder, "-n", *TAKEN, "--", "rendered")
    engine.write_text(text)
    assert "Nothing to be done" in done.stdout
    assert "measured by other code than this checkout's" in done.stdout


def test_the_report_holds_the_figures(rendered):
    folder, _ = rendered
    done = snakemake(folder, *TAKEN, "--report", "report.html", "--", "rendered")
    assert done.returncode == 0, done.stdout
    page = (folder / "report.html").read_text()
    for name in ("ablation_waterfall.png", "families_acceptance.png", "ablation.csv"):
        assert name in page


def test_results_that_do_not_fit_stop_before_any_job(rendered, tmp_path):
    folder = Path(shutil.copytree(rendered[0], tmp_path / "project"))
    replace(folder / "config.yaml", "num_draft_tokens: 6", "num_draft_tokens: 7")
    done = snakemake(folder, *TAKEN, "--", "rendered")
    assert done.returncode != 0
    assert "strategy.num_draft_tokens: measured 6, configured 7 (linear_k6)" in done.stdout
    assert "Traceback" not in done.stdout
    assert "Building DAG" not in done.stdout
    replace(folder / "config.yaml", "num_draft_tokens: 7", "num_draft_tokens: 6")
    nowhere = snakemake(folder, "--config", "results=nowhere", "--", "rendered")
    assert nowhere.returncode != 0
    assert "nowhere: no section is complete" in nowhere.stdout


def test_without_taken_results_the_pipeline_measures_again(rendered):
    done = snakemake(rendered[0], "-n", "--", "paper/ablation.tex")
    assert re.search(r"^measure +6$", done.stdout, flags=re.MULTILINE)
    assert re.search(r"^section_text +1$", done.stdout, flags=re.MULTILINE)
