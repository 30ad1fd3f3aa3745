"""The real Snakefile on a micro pair: what reruns, what is refused, and what a crash leaves."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from dynatree.ablation import read_ablation
from dynatree.experiments import read_experiment
from dynatree.failures import failure_path
from dynatree.results import read_result

PROJECT = Path(__file__).resolve().parent.parent
TABLE = "paper/ablation.tex"
RUN = Path("results/runs/micro/tree.json")
NAMES = ("ar", "linear", "tree", "single_path")
RENDERED = {"section_text": 1, "section_figure": 1, "all": 1}
HANGS = 900
"""Seconds after which a command is taken to hang; far more than any takes on a busy machine."""
AGGREGATED = {"aggregate": 1, **RENDERED}


def command(folder, *arguments, path="", **options):
    """Runs a command in `folder` with the code of that folder; returns the finished process."""
    environment = os.environ | {
        "PATH": f"{path}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(folder / "src"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return subprocess.run(
        arguments,
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=HANGS,
        **options,
    )


def snakemake(folder, *arguments, path=""):
    return command(folder, "python", "-m", "snakemake", *arguments, path=path)


def planned(folder, *targets):
    """The jobs that a dry run lists, as {rule: count}."""
    done = snakemake(folder, "-n", *targets)
    assert done.returncode == 0, done.stdout
    if "Nothing to be done" in done.stdout:
        return {}
    jobs = dict(re.findall(r"^(\w+) +(\d+)$", done.stdout, flags=re.MULTILINE))
    total = int(jobs.pop("total"))
    assert sum(map(int, jobs.values())) == total
    return {rule: int(count) for rule, count in jobs.items()}


def copy_project(folder):
    """A copy of what the pipeline is made of, with the configuration of the micro pair."""
    for name in ("rules", "scripts", "src", "profiles", "envs", "paper/templates"):
        shutil.copytree(
            PROJECT / name,
            folder / name,
            ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"),
        )
    for name in ("Snakefile", "paper/main.tex", "paper/references.bib"):
        shutil.copy2(PROJECT / name, folder / name)
    shutil.copy2(PROJECT / "tests/micro.yaml", folder / "config.yaml")
    return folder


def replace(path, old, new):
    text = path.read_text()
    assert text.count(old) >= 1
    path.write_text(text.replace(old, new, 1))


def append(path, text):
    path.write_text(path.read_text() + text)


@pytest.fixture(scope="session")
def first(tmp_path_factory):
    """A copy of the project that was run to the end once, and what that run printed."""
    folder = copy_project(tmp_path_factory.mktemp("first") / "project")
    where = command(folder, "python", "-c", "import dynatree; print(dynatree.__file__)").stdout
    assert where.strip() == str(folder / "src/dynatree/__init__.py")
    # One thread each: only `gpu` is left to keep two jobs from running side by side.
    threads = ("--set-threads", "measure=1", "train_pair=1")
    done = snakemake(folder, "--cores", "4", "--resources", "gpu=1", *threads)
    assert done.returncode == 0, done.stdout
    return folder, done.stdout


@pytest.fixture
def project(first, tmp_path):
    """A finished project of one's own, file times included."""
    return Path(shutil.copytree(first[0], tmp_path / "project", symlinks=True))


# The first run.


def test_the_pair_is_trained_once_for_all_measurements(first):
    assert len(re.findall(r"^(?:local)?rule train_pair:", first[1], flags=re.MULTILINE)) == 1
    assert len(re.findall(r"^(?:local)?rule measure:", first[1], flags=re.MULTILINE)) == len(NAMES)
    digests = {read_result(first[0] / RUN.with_stem(name)).pair_digest for name in NAMES}
    assert len(digests) == 1


def test_one_gpu_serialises_jobs_whatever_the_cores(first):
    events = re.findall(
        r"^(?:local)?(rule|Finished) .*(?:measure|train_pair)\b", first[1], flags=re.MULTILINE
    )
    assert events == ["rule", "Finished"] * (1 + len(NAMES))
    results = [read_result(first[0] / RUN.with_stem(name)) for name in NAMES]
    results.sort(key=lambda result: result.started)
    for before, after in pairwise(results):
        assert before.finished < after.started


@pytest.mark.parametrize("arguments", [("--cores", "1", "--resources", "gpu=1"), (TABLE,)])
def test_the_users_commands_find_nothing_to_do(project, arguments):
    done = snakemake(project, *arguments)
    assert done.returncode == 0, done.stdout
    assert "Nothing to be done" in done.stdout


@pytest.mark.tex
def test_the_paper_is_built_by_one_command(project):
    done = snakemake(project, "paper/main.pdf", "--cores", "2")
    assert done.returncode == 0, done.stdout
    assert (project / "paper/main.pdf").read_bytes().startswith(b"%PDF")
    assert planned(project, "paper/main.pdf") == {}
    trace = command(project, "python", "-c", "from dynatree.cli import app; app()", "trace", TABLE)
    assert trace.returncode == 0, trace.stdout
    assert "$.configurations[2].speedup.value" in trace.stdout
    assert f"(measured in {RUN})" in trace.stdout
    append(project / "paper/prose.tex", "% more\n")
    refused = command(
        project, "python", "-c", "from dynatree.cli import app; app()", "trace", "paper/prose.tex"
    )
    assert refused.returncode == 1
    assert "error: paper/prose.tex: is not the file that paper/manifest.json" in refused.stdout


def test_missing_tex_names_the_packages(project):
    bare = {"PATH": "/nonexistent"}
    bash = shutil.which("bash")
    done = subprocess.run(
        [bash, project / "scripts/build_pdf.sh", project / "paper/main.tex"],
        env=bare,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "apt-get install latexmk texlive-latex-base texlive-latex-recommended" in done.stderr


# Staleness. A copy of the finished project is up to date (see above); each change makes stale:

CONFIG = "config.yaml"
CHANGES = {
    "one configuration": (
        lambda at: replace(at / CONFIG, "num_draft_tokens: 3", "num_draft_tokens: 2"),
        {"measure": 1, "certify": 1, **AGGREGATED},
    ),
    "two values swapped": (
        lambda at: replace(
            at / CONFIG, "depth: 4\n    branch_factor: 8", "depth: 8\n    branch_factor: 4"
        ),
        {"measure": 1, "certify": 1, **AGGREGATED},
    ),
    "the rows of a table in another order": (
        lambda at: replace(at / CONFIG, "[ar, linear, tree]", "[linear, ar, tree]"),
        AGGREGATED,
    ),
    "a row that is the best of a sweep": (
        lambda at: (
            replace(at / CONFIG, "[ar, linear, tree]", "[ar, tuned, tree]"),
            replace(
                at / CONFIG,
                "\ntables:",
                "  linear2:\n    strategy: linear\n    num_draft_tokens: 2\n\n"
                "sweeps:\n  tuned: {best_of: [linear2, linear]}\n\ntables:",
            ),
        ),
        {"measure": 1, "certify": 1, **AGGREGATED},
    ),
    "what the certificate compares": (
        lambda at: replace(at / CONFIG, "certificate:\n  prompts: 2", "certificate:\n  prompts: 1"),
        {"certify": 1, **AGGREGATED},
    ),
    "a measuring setting": (
        lambda at: replace(at / CONFIG, "max_new_tokens: 8", "max_new_tokens: 9"),
        {"measure": 4, **AGGREGATED},
    ),
    "the recipe": (
        lambda at: replace(at / CONFIG, "target_steps: 2", "target_steps: 3"),
        {"train_pair": 1, "measure": 4, "certify": 1, **AGGREGATED},
    ),
    "a pair of local directories": (
        lambda at: replace(at / CONFIG, "pair: micro", "pair: local"),
        {"measure": 4, "certify": 1, **AGGREGATED},
    ),
    "an engine module": (
        lambda at: append(at / "src/dynatree/tree.py", "\nEXTRA = 1\n"),
        {"measure": 4, "certify": 1, **AGGREGATED},
    ),
    "the C++ operators": (
        lambda at: append(at / "src/dynatree/kernel.cpp", "\n// more\n"),
        {"measure": 4, "certify": 1, **AGGREGATED},
    ),
    "the training module": (
        lambda at: append(at / "src/dynatree/embedded/train.py", "\nEXTRA = 1\n"),
        {"train_pair": 1, "measure": 4, "certify": 1, **AGGREGATED},
    ),
    "the aggregation module": (
        lambda at: append(at / "src/dynatree/aggregate.py", "\nEXTRA = 1\n"),
        AGGREGATED,
    ),
    "the table module": (
        lambda at: append(at / "src/dynatree/render.py", "\nEXTRA = 1\n"),
        {"section_text": 1, "all": 1},
    ),
    "the text of the workload": (
        lambda at: (
            (at / "text.txt").write_text("Return a list of all the items.\n" * 9),
            replace(
                at / CONFIG,
                '    prompts:\n      - "The with statement"\n      - "Return a list"\n',
                "    file: text.txt\n    count: 2\n",
            ),
        ),
        {"measure": 4, "certify": 1, **AGGREGATED},
    ),
    "the template": (
        lambda at: append(at / "paper/templates/ablation.tex.j2", "% more\n"),
        {"section_text": 1, "all": 1},
    ),
    "the figure module": (
        lambda at: append(at / "src/dynatree/figures.py", "\nEXTRA = 1\n"),
        {"section_figure": 1, "all": 1},
    ),
    "a removed result": (
        lambda at: (at / RUN).unlink(),
        {"measure": 1, **AGGREGATED},
    ),
}


@pytest.mark.parametrize(("change", "jobs"), CHANGES.values(), ids=CHANGES)
def test_a_change_reruns_what_depends_on_it(project, change, jobs):
    change(project)
    assert planned(project) == jobs


def test_comments_order_of_keys_and_file_times_rerun_nothing(project):
    config = project / CONFIG
    data = yaml.safe_load(config.read_text())
    for section in ("pairs", "configs"):
        data[section] = {
            name: dict(reversed(entry.items())) for name, entry in reversed(data[section].items())
        }
    reordered = yaml.safe_dump(dict(reversed(data.items())), sort_keys=False)
    config.write_text("# A comment.\n" + reordered)
    for path in (project / "src").rglob("*.py"):
        path.touch()
    assert planned(project) == {}


# What is stale, in words.


def plan(folder, *targets):
    """What `dynatree plan` prints, and its exit status."""
    main = "from dynatree.cli import app; app()"
    done = command(folder, "python", "-c", main, "plan", *targets)
    return done.stdout, done.returncode


def test_a_finished_project_has_nothing_to_do(project):
    assert plan(project) == ("Nothing is stale.\n", 0)


def test_the_plan_names_the_changed_field_and_what_follows(project):
    CHANGES["one configuration"][0](project)
    text, code = plan(project)
    assert code == 0
    # The recorded seconds of the run before stand for the next.
    assert re.match(r"5 jobs, about (\d+ min )?\d+ s as last time\n", text)
    assert re.search(
        r"^measure micro/linear, about \d+ s as last time\n"
        r"    strategy\.num_draft_tokens: before 3, now 2\n\w",
        text,
        flags=re.MULTILINE,
    )
    assert "    strategies.linear.num_draft_tokens: before 3, now 2\n" in text
    assert "    configs.linear.run.num_draft_tokens: before 3, now 2\n" in text
    assert "    follows certify, measure\n" in text
    assert plan(project, str(RUN)) == ("Nothing is stale.\n", 0)


def test_the_plan_names_the_changed_module_once_for_all_jobs(project):
    CHANGES["an engine module"][0](project)
    CHANGES["two values swapped"][0](project)
    text, _ = plan(project, TABLE)
    assert text.startswith("7 jobs, about ")
    assert "measure micro/ar, micro/linear, micro/single_path, about " in text
    assert re.search(
        r"^measure micro/tree, about .*\n    changed: src/dynatree/tree\.py\n"
        r"    strategy\.branch_factor: before 8, now 4; strategy\.depth: before 4, now 8\n",
        text,
        flags=re.MULTILINE,
    )


def test_what_has_no_result_takes_the_time_of_its_rule_where_there_is_one(project):
    (project / RUN).unlink()
    text, _ = plan(project)
    assert re.search(
        r"^measure micro/tree, about \d+ s as last time\n    its output is missing\n",
        text,
        flags=re.MULTILINE,
    )
    shutil.rmtree(project / ".snakemake")
    text, _ = plan(project, str(RUN))
    assert text == "1 job\nmeasure micro/tree\n    its output is missing\n"


def test_a_plan_of_what_cannot_be_made_is_one_message(project):
    text, code = plan(project, "nowhere.txt")
    assert code == 1
    assert text.startswith("error: snakemake cannot plan: ")
    assert "nowhere.txt" in text
    replace(project / CONFIG, "warmup: 0", "warmups: 0")
    text, code = plan(project)
    assert code == 1
    assert "measure.warmups" in text
    assert "Traceback" not in text


# Experiments.

EXPERIMENTS = """
experiments:
  sweep:
    configs: [tree]
    grid: {branch_factor: [1, 2], depth: [4]}
  lengths:
    configs: [tree, ar]
    grid: {workload: lines, prompt_tokens: [4, 6], runs: 1, max_new_tokens: 4}
"""


@pytest.fixture
def experimental(project):
    """The finished project with two experiments, of which one reads a file, and their runs."""
    (project / "data").mkdir()
    (project / "data/lines.txt").write_text("Return a list of all the items.\n" * 20)
    append(project / CONFIG, EXPERIMENTS)
    return project


def test_experiments_are_targets_of_their_own(experimental):
    assert planned(experimental) == {}
    # Of the two points, a table shows one.
    assert planned(experimental, "sweep") == {"measure": 1, **made("sweep")}
    assert planned(experimental, "sweep", "lengths") == {
        "measure": 5,
        **{rule: 2 for rule in made("sweep") if rule != "sweep"},
        "sweep": 1,
        "lengths": 1,
    }


def made(experiment):
    """The jobs that make an experiment of its runs."""
    rules = ("aggregate_experiment", "experiment_text", "experiment_figure", experiment)
    return dict.fromkeys(rules, 1)


def test_sections_are_targets_too(project):
    details = planned(project, "ablation")
    assert details == {"section_detail": 3, "ablation": 1}


@pytest.mark.parametrize(
    "target",
    [
        "results/runs/elsewhere/tree.json",
        "results/runs/micro/more/tree.json",
        # There are no experiments at all.
        "results/experiments/sweep.json",
    ],
)
def test_nothing_is_made_under_a_name_that_the_configuration_has_not(project, target):
    done = snakemake(project, "-n", target)
    assert done.returncode == 1
    assert f"No rule to produce {target}" in done.stdout


def test_the_environment_for_conda_installs_the_project(project, tmp_path):
    """Snakemake runs the script in the project's folder; a path in the YAML file would lead from
    the folder of its copy."""
    environment = yaml.safe_load((project / "envs/dynatree.yaml").read_text())
    assert all(isinstance(package, str) for package in environment["dependencies"])
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    script = "envs/dynatree.post-deploy.sh"
    done = subprocess.run(
        ["bash", script],
        cwd=PROJECT,
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "-m pip install --constraint constraints.txt --editable .\n"
    assert (PROJECT / "constraints.txt").is_file()


def test_the_paper_takes_in_the_experiments_that_it_names(experimental):
    append(experimental / CONFIG, "paper: {experiments: [sweep]}\n")
    assert planned(experimental) == {}
    jobs = planned(experimental, "paper/manifest.json")
    assert {rule: jobs[rule] for rule in made("sweep") if rule != "sweep"} == {
        "aggregate_experiment": 1,
        "experiment_text": 1,
        "experiment_figure": 1,
    }
    assert jobs["measure"] == 1
    replace(experimental / CONFIG, "experiments: [sweep]", "experiments: [sweeps]")
    done = snakemake(experimental, "-n")
    assert "paper.experiments.0: unknown experiment 'sweeps'; did you mean 'sweep'" in done.stdout


def test_an_experiment_is_run_to_the_end_and_reruns_what_is_stale(experimental):
    done = snakemake(experimental, "lengths", "--cores", "1")
    assert done.returncode == 0, done.stdout
    experiment = read_experiment(experimental / "results/experiments/lengths.json")
    assert [point.name for point in experiment.points] == [
        f"lengths-{name}-prompt{length}" for name in ("tree", "ar") for length in (4, 6)
    ]
    assert [point.prompt_tokens_mean for point in experiment.points] == [4, 6, 4, 6]
    assert (experimental / "results/experiments/lengths.csv").is_file()
    assert "prompt tokens" in (experimental / "paper/experiments/lengths.tex").read_text()
    for ending in ("pdf", "png"):
        assert (experimental / f"paper/figures/experiments/lengths.{ending}").is_file()
    assert planned(experimental, "lengths") == {}
    rerun = made("lengths")
    # Another place in the grid measures what is new; a changed text measures all.
    replace(experimental / CONFIG, "prompt_tokens: [4, 6]", "prompt_tokens: [4, 5]")
    assert planned(experimental, "lengths") == {"measure": 2, **rerun}
    replace(experimental / CONFIG, "prompt_tokens: [4, 5]", "prompt_tokens: [6, 4]")
    assert planned(experimental, "lengths") == rerun
    replace(experimental / CONFIG, "prompt_tokens: [6, 4]", "prompt_tokens: [4, 6]")
    (experimental / experiment_file(experiment, 0)).unlink()
    assert planned(experimental, "lengths") == {"measure": 1, **rerun}
    append(experimental / "data/lines.txt", "More.\n")
    assert planned(experimental, "lengths") == {"measure": 4, **rerun}
    assert planned(experimental) == {}


def experiment_file(experiment, index):
    return f"results/runs/micro/{experiment.points[index].run}.json"


def test_a_missing_text_is_named_and_concerns_nothing_else(experimental):
    (experimental / "data/lines.txt").unlink()
    assert planned(experimental) == {}
    done = snakemake(experimental, "-n", "lengths")
    assert done.returncode != 0
    assert "data/lines.txt" in done.stdout


def test_an_experiment_with_the_name_of_a_rule_is_refused(experimental):
    replace(experimental / CONFIG, "\n  sweep:", "\n  measure:")
    done = snakemake(experimental, "-n")
    assert done.returncode != 0
    assert "experiments.measure: is the name of a rule; choose another name" in done.stdout


# Faults.


KILLS = {
    "train_pair.py": ("the training module", {"train_pair": 1, "measure": 4, "certify": 1}),
    "measure.py": ("two values swapped", {"measure": 1, "certify": 1}),
    "aggregate.py": ("the aggregation module", {}),
}


@pytest.mark.parametrize(("script", "change", "jobs"), [(k, *v) for k, v in KILLS.items()])
def test_the_old_table_is_not_taken_for_current_after_a_killed_job(
    project, tmp_path, script, change, jobs
):
    CHANGES[change][0](project)
    shim = tmp_path / "bin" / "python"
    shim.parent.mkdir()
    shim.write_text(f'#!/bin/sh\necho "shim: $1"\ntest "$1" != scripts/{script} || kill -9 $$\n')
    shim.chmod(0o755)
    done = command(
        project,
        *(sys.executable, "-m", "snakemake", "--cores", "1", "--keep-going", TABLE),
        path=shim.parent,
    )
    assert done.returncode != 0
    assert f"shim: scripts/{script}" in done.stdout
    # The shim makes nothing, so that whatever was to be made is still to be made.
    assert planned(project, TABLE) == {**jobs, "aggregate": 1, "section_text": 1}


def test_the_old_table_is_not_taken_for_current_after_an_engine_failure(project):
    # That the job fails shows as well that the jobs run the code of the copy.
    append(project / "src/dynatree/tree.py", "\nraise RuntimeError('the edited engine')\n")
    done = snakemake(project, TABLE)
    assert done.returncode != 0
    assert "RuntimeError: the edited engine" in done.stdout
    left = {"measure": 4, "certify": 1, "aggregate": 1, "section_text": 1}
    assert planned(project, TABLE) == left


NO_MEMORY = """
import sys
import psutil
from types import SimpleNamespace
if '"name":"tree"' in " ".join(sys.argv) + " ".join(sys.orig_argv):
    psutil.virtual_memory = lambda: SimpleNamespace(available=2**10, total=2**34)
"""
"""A `sitecustomize`: the job that measures the configuration `tree` finds no memory."""


def test_what_does_not_fit_is_marked_as_missing_and_the_others_are_rendered(project):
    CHANGES["a measuring setting"][0](project)
    injected = project / "src/sitecustomize.py"
    injected.write_text(NO_MEMORY)
    done = snakemake(project, "--keep-going")
    assert done.returncode != 0
    reason = "measure tree: out of memory on the host: pairs.micro needs at least 0.00 GiB"
    assert f"error: {reason}" in done.stdout
    assert "0.00 GiB of 16.00 GiB were free" in done.stdout
    assert not (project / RUN).exists()
    assert all((project / RUN.with_stem(name)).exists() for name in NAMES if name != "tree")

    marked = snakemake(project, "--config", "missing=mark")
    assert marked.returncode == 0, marked.stdout
    assert not re.search(r"^(?:local)?rule (measure|certify|train_pair):", marked.stdout, re.M)
    ablation = read_ablation(project / "results/ablation.json")
    assert [facts.name for facts in ablation.configurations] == ["ar", "linear", "single_path"]
    assert {facts.lossless for facts in ablation.configurations} == {"equal"}
    assert ablation.setting.max_new_tokens == 9
    for table, below in zip(ablation.tables, (2, 0), strict=True):
        (row,) = table.missing
        assert (row.label, row.below) == ("tree", below)
        assert row.reason.startswith(reason)
    assert (project / TABLE).read_text().count(r"\emph{missing}") == 2

    # The marked table is none of the finished ones.
    assert planned(project, "--config", "missing=mark") == {}
    assert planned(project) == {"measure": 1, **AGGREGATED}
    injected.unlink()
    done = snakemake(project)
    assert done.returncode == 0, done.stdout
    assert "missing}" not in (project / TABLE).read_text()
    assert not failure_path(project / RUN).exists()


def test_what_is_there_is_certified_where_missing_rows_are_marked(project):
    (project / RUN).unlink()
    (project / "results/certificate.json").unlink()
    marked = snakemake(project, "--config", "missing=mark")
    assert marked.returncode == 0, marked.stdout
    ablation = read_ablation(project / "results/ablation.json")
    assert {facts.name: facts.lossless for facts in ablation.configurations} == {
        name: "equal" for name in NAMES if name != "tree"
    }
    assert planned(project) == {"measure": 1, "certify": 1, **AGGREGATED}


def test_only_marking_may_be_asked_of_missing_rows(project):
    for options in (("missing=drop",), ("missing=mark", "results=results")):
        done = snakemake(project, "-n", "--config", *options)
        assert done.returncode != 0
        assert "give missing=mark, without results=, or leave it out" in done.stdout


def test_jobs_that_share_the_gpus_share_the_cores(project):
    CHANGES["a measuring setting"][0](project)
    for gpus, threads in ((1, 4), (2, 2), (8, 1)):
        done = snakemake(project, "-n", "--cores", "4", "--resources", f"gpu={gpus}")
        found = re.findall(r"rule measure:.*?(?:threads: (\d+))?\n    resources", done.stdout, re.S)
        assert found, done.stdout
        assert {int(count or 1) for count in found} == {threads}


def truncate(path):
    path.write_bytes(path.read_bytes()[:-200])


def edit(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


DAMAGES = {
    "cut short": (truncate, "not a valid result file"),
    "edited sums": (
        lambda path: edit(path, lambda data: data["totals"].update(tokens=99)),
        "totals are not the sums",
    ),
    "edited specification": (
        lambda path: edit(path, lambda data: data["spec"]["strategy"].update(depth=5)),
        "spec_digest is not the digest of spec",
    ),
    "result of another configuration": (
        lambda path: shutil.copy(path.with_stem("single_path"), path),
        "measured with another configuration",
    ),
}


@pytest.mark.parametrize(("damage", "reason"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_result_is_refused_with_its_name_and_the_cure(project, damage, reason):
    damage(project / RUN)
    done = snakemake(project, TABLE)
    assert done.returncode != 0
    assert f"error: {RUN}: " in done.stdout
    assert reason in done.stdout
    assert f"run: snakemake {RUN}" in done.stdout
    assert planned(project, TABLE) == {"aggregate": 1, "section_text": 1}
    if "remove it" in done.stdout:
        (project / RUN).unlink()
    assert planned(project, str(RUN)) == {"measure": 1}


HALF = """
import os, pathlib, runpy, sys
write = pathlib.Path.write_text
def half(self, text, **options):
    write(self, text[:len(text) // 2], **options)
    os.kill(os.getpid(), 9)
pathlib.Path.write_text = half
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_measurement_killed_while_it_writes_leaves_no_result(project):
    spec = json.dumps(json.loads((project / RUN).read_text())["spec"])
    out = project / "out" / "tree.json"
    done = command(
        project, "python", "-c", HALF, "scripts/measure.py", "--spec", spec, "--out", str(out)
    )
    assert done.returncode == -9
    assert "4 of 8 generations" in done.stdout
    left = list(out.parent.iterdir())
    assert [path.suffix for path in left] == [".tmp"]


WRITER = """
import sys
from pathlib import Path
from dynatree.files import write_text
print("ready", flush=True)
while True:
    write_text(Path(sys.argv[1]), "x" * 10_000_000)
"""


def test_a_writer_killed_at_any_moment_leaves_a_whole_file_or_none(tmp_path):
    moments = random.Random(0)
    path = tmp_path / "result.json"
    for _ in range(8):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE
        ) as writer:
            writer.stdout.readline()
            time.sleep(moments.uniform(0, 0.2))
            writer.kill()
        assert not path.exists() or path.stat().st_size == 10_000_000


# Configurations that cannot be run.

INVALID = {
    "threshold 1.0": ("prune_threshold: 0", "prune_threshold: 1.0", "would prune every node"),
    "key given twice": ("  runs: 2", "  runs: 2\n  runs: 3", "key 'runs' is given twice"),
    "unknown key": ("  warmup: 0", "  warmups: 0", "measure.warmups"),
}


@pytest.mark.parametrize(("old", "new", "message"), INVALID.values(), ids=INVALID)
def test_an_invalid_configuration_stops_before_any_job(project, old, new, message):
    replace(project / CONFIG, old, new)
    done = snakemake(project)
    assert done.returncode != 0
    assert message in done.stdout
    assert "Traceback" not in done.stdout
    assert "Building DAG" not in done.stdout


# The page of draft trees, which no other target needs.

PAGE = "results/trees.html"
TREE_CHANGES = {
    "what is recorded": (
        lambda at: replace(
            at / CONFIG,
            "prompts: 2\n  max_new_tokens: 8\n\nconfigs",
            "prompts: 1\n  max_new_tokens: 8\n\nconfigs",
        ),
        {"record_trees": 2, "tree_page": 1},
    ),
    "one configuration": (
        lambda at: replace(at / CONFIG, "num_draft_tokens: 3", "num_draft_tokens: 2"),
        {"record_trees": 1, "tree_page": 1},
    ),
    "an engine module": (
        lambda at: append(at / "src/dynatree/tree.py", "\nEXTRA = 1\n"),
        {"record_trees": 2, "tree_page": 1},
    ),
    "the script of the page": (
        lambda at: append(at / "paper/templates/trees.js", "// more\n"),
        {"tree_page": 1},
    ),
}


def test_the_page_of_trees_is_made_and_goes_stale(project):
    done = snakemake(project, PAGE, "--cores", "1")
    assert done.returncode == 0, done.stdout
    assert '"name":"linear"' in (project / PAGE).read_text(encoding="utf-8")
    assert planned(project, PAGE) == {}
    for change, jobs in TREE_CHANGES.values():
        before = {path: path.read_bytes() for path in map(project.joinpath, TREE_SOURCES)}
        change(project)
        assert planned(project, PAGE) == jobs
        for path, content in before.items():
            path.write_bytes(content)
    # Measurements and tables know nothing of it.
    TREE_CHANGES["what is recorded"][0](project)
    assert planned(project) == {}


TREE_SOURCES = (CONFIG, "src/dynatree/tree.py", "paper/templates/trees.js")


def test_the_logs_of_jobs_are_a_few_plain_lines(first):
    folder = first[0] / "results/logs"
    said = {
        "measure/micro/tree.log": "tree: run 2 of 2, 8 of 8 generations, ",
        "certify.log": "certificate: 4 of 4 configurations, ",
        "train_pair/micro.log": "micro: draft, loss ",
    }
    for name, words in said.items():
        lines = (folder / name).read_bytes().decode().split("\n")
        assert any(line.startswith(words) for line in lines)
        assert len(lines) < 40
        assert all(line.isprintable() for line in lines), name
    # What goes to the log is shown, too.
    assert said["measure/micro/tree.log"] in first[1]
