"""Experiments as data: what a grid expands to, what is measured once, what comes out."""

import csv
import io
import json
from collections import Counter
from pathlib import Path

import pytest
import synthetic
import yaml

from dynatree.aggregate import aggregate
from dynatree.aggregate_experiment import aggregate_experiment, experiment_csv
from dynatree.config import load_config, parse_config
from dynatree.errors import ConfigError, ResultError
from dynatree.experiments import Experiment, read_experiment, write_experiment
from dynatree.specs import parse_spec

SHIPPED = Path(__file__).parent.parent / "config.yaml"
TUNED = {"tuned": {"best_of": ["linear", "linear2"], "labels": {"grid": "Tuned"}}}


def study(experiments, sweeps=None, **options):
    """The synthetic study with a workload of a corpus, and experiments."""
    data = json.loads(synthetic.config(sweeps=sweeps, **options).canonical())
    data["workloads"]["manual"] = {"corpus": "python_reference", "count": 3, "prompt_tokens": 20}
    return parse_config({**data, "experiments": experiments})


def one(configs, grid, **options):
    return study({"grid": {"configs": configs, "grid": grid}}, **options)


def runs(config, experiment="grid"):
    return {point.name: point.run for point in config.points(experiment)}


def test_a_grid_expands_in_order_to_names_that_say_it_all():
    config = one(["tree"], {"depth": [4, 8], "branch_factor": [2], "prune_threshold": [0.1, 0]})
    assert list(runs(config)) == [
        "grid-depth4-branch2-threshold0.1",
        "grid-depth4-branch2-threshold0",
        "grid-depth8-branch2-threshold0.1",
        "grid-depth8-branch2-threshold0",
    ]
    spec = config.spec(runs(config)["grid-depth8-branch2-threshold0.1"])
    assert spec.strategy.model_dump() == {
        **config.strategy("tree").model_dump(),
        "depth": 8,
        "branch_factor": 2,
        "prune_threshold": 0.1,
    }
    assert spec.measure == config.measure
    assert parse_spec(spec.canonical()) == spec


def test_measurement_and_workload_are_fields_too():
    config = one(
        ["ar", "tree"],
        {"workload": "manual", "prompt_tokens": [8, 20], "max_new_tokens": [5], "runs": 2},
    )
    assert list(runs(config)) == [
        f"grid-{name}-prompt{length}-tokens5" for name in ("ar", "tree") for length in (8, 20)
    ]
    spec = config.spec(runs(config)["grid-ar-prompt8-tokens5"])
    assert (spec.measure.workload, spec.measure.runs, spec.measure.max_new_tokens) == (
        "manual",
        2,
        5,
    )
    assert (spec.prompts.prompt_tokens, len(spec.prompts)) == (8, 3)
    assert config.workloads["manual"].prompt_tokens == 20


def test_several_grids_are_measured_one_after_the_other():
    config = one(["tree"], [{"depth": [2, 4]}, {"branch_factor": [8, 3]}, {}])
    assert runs(config)["grid-depth4"] == runs(config)["grid-branch8"] == runs(config)["grid"]
    assert list(runs(config)) == [
        "grid-depth2",
        "grid-depth4",
        "grid-branch8",
        "grid-branch3",
        "grid",
    ]


def test_what_is_the_same_is_measured_once_whatever_it_is_called():
    config = study(
        {
            "one": {"configs": ["tree"], "grid": {"depth": [4, 6], "branch_factor": [8]}},
            "two": {"configs": ["tree"], "grid": {"branch_factor": 8, "depth": [6]}},
            "three": {"configs": ["linear"], "grid": {"num_draft_tokens": [2, 6, 9]}},
        }
    )
    # A configuration of a table, and one that is in no table.
    assert runs(config, "one")["one-depth4-branch8"] == "tree"
    assert runs(config, "three")["three-k2"] == "linear2"
    assert runs(config, "three")["three-k6"] == "linear"
    shared = runs(config, "one")["one-depth6-branch8"]
    assert shared == runs(config, "two")["two-depth6"]
    assert shared.startswith("tree-")
    assert runs(config, "three")["three-k9"].startswith("linear-")


def test_runs_are_called_by_what_they_measure_and_not_by_their_experiment():
    before = one(["tree"], {"depth": [3, 6]})
    renamed = study({"other": {"configs": ["tree"], "grid": [{"depth": [6]}, {"depth": [3]}]}})
    assert set(runs(before).values()) == set(runs(renamed, "other").values())
    changed = one(["tree"], {"depth": [3, 6], "runs": 2})
    assert not set(runs(before).values()) & set(runs(changed).values())


def test_overrides_of_the_pair_hold_where_the_grid_says_nothing():
    config = one(
        ["tree"], {"depth": [3]}, overrides={"tree": {"depth": 5, "prune_threshold": 0.02}}
    )
    strategy = config.spec(runs(config)["grid-depth3"]).strategy
    assert (strategy.depth, strategy.prune_threshold) == (3, 0.02)


@pytest.mark.parametrize(
    ("experiment", "message"),
    [
        ({"configs": ["tre"]}, r"experiments\.x\.configs\.0: unknown configuration or sweep 'tre'"),
        ({"configs": ["tree", "tree"]}, r"experiments\.x\.configs: 'tree' is listed twice"),
        ({"configs": []}, r"experiments\.x\.configs"),
        ({"configs": ["tree"], "grids": {}}, r"experiments\.x\.grids: unknown key"),
        ({"configs": ["tree"], "grid": {"dept": [3]}}, r"experiments\.x\.grid\.dept: unknown key"),
        (
            {"configs": ["tree"], "grid": {"depth": [3, 0]}},
            r"experiments\.x\.grid\.depth: .*got 0",
        ),
        (
            {"configs": ["tree"], "grid": {"prune_threshold": [1.0]}},
            r"experiments\.x\.grid\.prune_threshold: .*would prune every node",
        ),
        ({"configs": ["tree"], "grid": {"depth": []}}, r"depth: must hold a value"),
        ({"configs": ["tree"], "grid": {"depth": [None]}}, r"depth: must be a number.*got None"),
        ({"configs": ["tree"], "grid": {"depth": [3, 3]}}, r"'x-depth3' comes out twice"),
        ({"configs": ["ar", "tree"], "grid": {"depth": [3]}}, r"x\.grid\.depth: unknown key"),
        ({"configs": ["tree"], "grid": {"runs": [0]}}, r"experiments\.x\.grid\.runs: .*got 0"),
        (
            {"configs": ["tree"], "grid": {"workload": ["manul"]}},
            r"experiments\.x\.grid\.workload: unknown workload 'manul'; did you mean 'manual'",
        ),
        (
            {"configs": ["tree"], "grid": {"prompt_tokens": [9]}},
            r"experiments\.x\.grid: prompt_tokens does not go with prompts",
        ),
    ],
)
def test_an_experiment_that_cannot_be_run_is_refused(experiment, message):
    with pytest.raises(ConfigError, match=message) as error:
        study({"x": experiment})
    assert len(str(error.value).splitlines()) == 2


def test_a_name_that_is_no_target_is_refused():
    with pytest.raises(ConfigError, match=r"experiments\.a-b"):
        study({"a-b": {"configs": ["tree"]}})
    with pytest.raises(ConfigError, match=r"unknown experiment 'gird'; did you mean 'grid'"):
        one(["tree"], {}).points("gird")


def test_experiments_survive_json_and_concern_no_section():
    config = one(["tree"], {"prune_threshold": [0.1], "depth": [2, 3]})
    again = parse_config(json.loads(config.canonical()))
    assert again == config
    assert again.points("grid") == config.points("grid")
    alone = study({"grid": {"configs": ["tree"]}, "more": {"configs": ["ar"]}}).experiment("grid")
    assert list(alone.experiments) == ["grid"]
    assert parse_config(json.loads(alone.canonical())) == alone
    without = one(["tree"], {"depth": [9]})
    assert without.section("ablation").canonical() == config.section("ablation").canonical()
    assert without.measured == config.measured == ["ar", "linear", "tree"]


def test_the_shipped_experiments_share_their_runs():
    config = load_config(SHIPPED)
    names = list(config.experiments)
    assert set(names) == {
        "main",
        "fixed_tree_sweep",
        "sensitivity",
        "length_scaling",
        "prompt_length",
        "node_budget",
    }
    assert config.paper.experiments == names
    # What the paper measures on two cores must stay a matter of half an hour.
    jobs = {*config.measured, *(run for name in names for run in runs(config, name).values())}
    assert len(jobs) <= 55
    longest = max(config.run(run).measure.max_new_tokens for run in jobs)
    assert longest <= 400
    main = runs(config, "main")
    assert main["main-dynatree-python_docs"] == "dynatree"
    assert runs(config, "length_scaling")["length_scaling-auto-tokens64"] == "auto"
    prompts = runs(config, "prompt_length")
    assert prompts["prompt_length-auto-prompt64"] == main["main-auto-python_reference"]
    sensitivity = runs(config, "sensitivity")
    assert Counter(sensitivity.values())["dynatree_adaptive"] == 4
    sweep = runs(config, "fixed_tree_sweep")
    assert sweep["fixed_tree_sweep-depth8-branch3-threshold0.1"] == "tree_d8_b3"
    fixed = config.strategy("tree_d8_b3")
    assert (fixed.depth, fixed.branch_factor, fixed.prune_threshold) == (8, 3, 0.1)


# Aggregation.


def measured(config, folder, speedups=None, experiment="grid"):
    for point in config.points(experiment):
        synthetic.write_result(
            folder / config.pair / f"{point.run}.json",
            synthetic.result(config.spec(point.run), (speedups or {}).get(point.name)),
        )
    return aggregate_experiment(config, experiment, folder, synthetic.SOURCE)


def test_each_point_has_its_own_numbers(tmp_path):
    config = one(["tree"], {"workload": "manual", "depth": [2, 4], "max_new_tokens": [13, 20]})
    speedups = {name: 1.5 + index / 4 for index, name in enumerate(runs(config))}
    experiment = measured(config, tmp_path, speedups)
    assert experiment.axes == ["depth", "max_new_tokens"]
    for point in experiment.points:
        assert point.speedup.value == pytest.approx(speedups[point.name])
        assert (point.workload, point.prompts, point.runs) == ("manual", 3, 3)
        assert point.max_new_tokens == point.values["max_new_tokens"]
        assert point.spec_digest == config.spec(point.run).digest
        assert f"depth {point.values['depth']}," in point.description
        assert point.shown
    path = tmp_path / "grid.json"
    write_experiment(path, experiment)
    assert read_experiment(path) == experiment
    lines = list(csv.DictReader(io.StringIO(experiment_csv(experiment))))
    assert [line["point"] for line in lines] == list(speedups)
    assert [line["grid_depth"] for line in lines] == ["2", "2", "4", "4"]
    assert float(lines[3]["speedup"]) == pytest.approx(2.25)
    assert lines[0]["prompts_digest"] == "b" * 64


def test_a_point_that_a_table_measures_has_the_numbers_of_the_table(tmp_path):
    config = one(["tree"], {"depth": [4, 6]})
    experiment = measured(config, tmp_path, {"grid-depth4": [1.0, 2.0, 4.0, 2.5]})
    synthetic.write(config, tmp_path, {"tree": [1.0, 2.0, 4.0, 2.5]})
    table = aggregate(config, tmp_path, synthetic.SOURCE)
    same = experiment.points[0].model_dump(include=set(type(table.facts("tree")).model_fields))
    assert {**same, "name": "tree"} == table.facts("tree").model_dump()


def test_of_a_sweep_the_fastest_of_each_place_is_shown(tmp_path):
    grid = {"max_new_tokens": [13, 20]}
    config = one(["tuned", "tree"], grid, sweeps=TUNED)
    experiment = measured(
        config,
        tmp_path,
        {
            "grid-linear-tokens13": 2.0,
            "grid-linear2-tokens13": 1.5,
            "grid-linear-tokens20": 1.2,
            "grid-linear2-tokens20": 1.3,
        },
    )
    assert [point.name for point in experiment.shown] == [
        "grid-linear-tokens13",
        "grid-linear2-tokens20",
        "grid-tree-tokens13",
        "grid-tree-tokens20",
    ]
    assert [point.label for point in experiment.shown] == [
        "Tuned (K = 6)",
        "Tuned (K = 2)",
        "tree",
        "tree",
    ]
    data = json.loads(experiment.model_dump_json())
    for point in data["points"]:
        point["shown"] = True
    with pytest.raises(ValueError, match="the fastest candidate of its row must be shown"):
        Experiment.model_validate(data)


def test_overrides_that_the_grid_replaces_are_not_marked(tmp_path):
    config = one(["tree"], {"depth": [3]}, overrides={"tree": {"depth": 5, "node_budget": 9}})
    (point,) = measured(config, tmp_path).points
    assert [(entry.key, entry.value) for entry in point.overrides] == [("node_budget", 9)]


def test_missing_or_other_results_are_refused_with_the_run(tmp_path):
    config = one(["tree"], {"depth": [3, 4]})
    measured(config, tmp_path)
    path = tmp_path / "micro" / f"{runs(config)['grid-depth3']}.json"
    with pytest.raises(ResultError, match="measured by other code"):
        aggregate_experiment(config, "grid", tmp_path, "7" * 64)
    data = yaml.safe_load(config.canonical())
    data["pairs"]["micro"]["dtype"] = "bfloat16"
    with pytest.raises(ResultError, match=r"models\.dtype: measured 'float32'"):
        aggregate_experiment(parse_config(data), "grid", tmp_path, synthetic.SOURCE)
    path.unlink()
    with pytest.raises(ResultError, match=rf"{path.name}: missing; run: snakemake .*{path.stem}"):
        aggregate_experiment(config, "grid", tmp_path, synthetic.SOURCE)
