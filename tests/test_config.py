"""One schema: what is wrong in config.yaml is said once, with path, value and fix."""

import copy
import re
from contextlib import suppress
from pathlib import Path

import pytest
import synthetic
import yaml
from hypothesis import given
from hypothesis import strategies as st

import dynatree
from dynatree.config import parse_config
from dynatree.errors import ConfigError
from dynatree.specs import parse_spec

SHIPPED = Path(__file__).parent.parent / "config.yaml"


@pytest.fixture
def data():
    return yaml.safe_load(SHIPPED.read_text())


def put(data, path, value):
    *parents, last = path.split(".")
    for key in parents:
        data = data[key]
    data[last] = value


def test_shipped_names_and_strategies():
    config = dynatree.load_config(SHIPPED)
    assert config.tables["forward"] == ["ar", "linear_k6", "tree_unpruned", "dynatree"]
    assert config.tables["backward"] == [
        "dynatree",
        "tree_unpruned",
        "tree_single_path",
        "tree_depth1",
        "ar",
    ]
    assert len(config.measured) == 17
    assert set(config.pairs) >= {"embedded", "pythia"}
    shipped = {name: run.run for name, run in config.configs.items()}
    tree = dynatree.Tree
    assert shipped["ar"] == dynatree.Autoregressive()
    assert shipped["linear_k6"] == dynatree.Linear(num_draft_tokens=6)
    assert shipped["tree_unpruned"] == tree(
        depth=7, branch_factor=2, prune_threshold=0, node_budget=256
    )
    assert shipped["dynatree"] == tree(
        depth=7, branch_factor=2, prune_threshold=0.01, node_budget=256
    )
    assert shipped["tree_single_path"] == tree(depth=7, branch_factor=1, prune_threshold=0.01)
    assert shipped["tree_depth1"] == tree(depth=1, branch_factor=2, prune_threshold=0.01)
    assert shipped["dynatree_adaptive"] == dynatree.DynamicTree()
    assert shipped["best_first"] == dynatree.BestFirst()
    assert shipped["best_first_ngram"] == dynatree.BestFirst(ngram=True)
    assert shipped["auto"] == dynatree.Auto()


def test_a_sweep_is_a_row_that_measures_all_of_its_candidates(data):
    config = dynatree.load_config(SHIPPED)
    candidates = [f"linear_k{count}" for count in (2, 3, 4, 6, 8)]
    assert config.candidates("linear_tuned") == candidates
    assert [config.strategy(name).num_draft_tokens for name in candidates] == [2, 3, 4, 6, 8]
    assert set(candidates) <= set(config.measured)
    del data["sections"]
    put(data, "tables", {})
    put(data, "tables.forward", ["ar", "linear_tuned", "dynatree"])
    put(data, "tables.backward", ["dynatree", "linear_tuned", "linear_tuned2"])
    put(data, "sweeps.linear_tuned2", {"best_of": ["tree_depth1", "tree_unpruned"]})
    config = parse_config(data)
    assert config.measured == ["ar", *candidates, "dynatree", "tree_depth1", "tree_unpruned"]
    assert config.label("linear_tuned", "beyond") == "Tuned linear draft"
    assert config.label("linear_tuned", "backward") == "linear_tuned"
    assert parse_config(yaml.safe_load(config.canonical())) == config


def test_a_configuration_in_two_rows_through_a_sweep_is_refused(data):
    put(data, "tables.forward", ["ar", "linear_k6", "linear_tuned"])
    with pytest.raises(ConfigError, match=r"tables\.forward: 'linear_k6' may stand in two rows"):
        parse_config(data)


def test_threshold_one_is_refused_with_the_explanation(data):
    put(data, "configs.dynatree.prune_threshold", 1.0)
    with pytest.raises(ConfigError, match=r"configs\.dynatree\.prune_threshold: .*got 1\.0") as e:
        parse_config(data)
    assert "would prune every node" in str(e.value)
    assert "prune_threshold: 0" in str(e.value)
    assert "no pruning" in dynatree.Tree(prune_threshold=0).describe()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("pair", "embeded", r"pair: unknown pair 'embeded'; did you mean 'embedded'"),
        ("typo", 1, r"typo: unknown key"),
        (
            "configs.ar.strategy",
            "automatic",
            r"configs\.ar\.strategy: unknown strategy 'automatic'",
        ),
        ("configs.dynatree.dept", 3, r"configs\.dynatree\.dept: unknown key"),
        ("configs.dynatree.depth", 0, r"configs\.dynatree\.depth: .*got 0"),
        ("configs.dynatree.depth", "7", r"configs\.dynatree\.depth: .*integer, got '7'"),
        ("configs.dynatree.depth", True, r"configs\.dynatree\.depth: .*got True"),
        ("configs.dynatree.prune_threshold", -0.1, r"prune_threshold: .*got -0\.1"),
        ("configs.dynatree.prune_threshold", float("nan"), r"prune_threshold"),
        ("configs.tree", {"depth": 3}, r"configs\.tree\.strategy: missing"),
        ("configs.a/b", {"strategy": "autoregressive"}, r"letters, digits"),
        ("measure.runs", 0, r"measure\.runs: .*got 0"),
        ("devices.busy", "ignore", r"devices\.busy: .*'wait', 'refuse' or 'flag', got 'ignore'"),
        ("devices.mixed", "merge", r"devices\.mixed: .*'refuse' or 'group', got 'merge'"),
        ("measure.workload", "wiki", r"measure\.workload: unknown workload 'wiki'"),
        ("tables.forward", ["ar", "linear"], r"tables\.forward\.1: unknown configuration"),
        ("tables.forward", ["ar", "ar"], r"tables\.forward: 'ar' is listed twice"),
        ("tables.forward", ["ar", "linear_tuend"], r"sweep 'linear_tuend'; did you mean"),
        ("sweeps.linear_tuned.best_of", ["linear_k2"], r"sweeps\.linear_tuned\.best_of: .*2 items"),
        ("sweeps.linear_tuned.best_of", ["ar", "ar"], r"best_of: 'ar' is listed twice"),
        ("sweeps.linear_tuned.best_of", ["ar", "k9"], r"best_of\.1: unknown configuration 'k9'"),
        ("sweeps.linear_tuned.bestof", ["ar"], r"sweeps\.linear_tuned\.bestof: unknown key"),
        ("sweeps.ar", {"best_of": ["ar", "dynatree"]}, r"sweeps\.ar: is a configuration too"),
        ("workloads.python_docs.prompts", [], r"workloads\.python_docs\.prompts"),
        ("workloads.python_docs.prompts", [""], r"workloads\.python_docs\.prompts\.0"),
        ("pairs.pythia.draft", None, r"pairs\.pythia: give either both"),
        ("pairs.pythia.target", {"hub": "a", "path": "b"}, r"exactly one of hub"),
        ("pairs.pythia.dtype", "int8", r"pairs\.pythia\.dtype: .*got 'int8'"),
        ("pairs.embedded.measure", {"runz": 1}, r"pairs\.embedded\.measure\.runz: unknown key"),
        ("pairs.embedded.strategies", {"x": {}}, r"pairs\.embedded\.strategies\.x: unknown"),
        (
            "pairs.embedded.strategies",
            {"dynatree": {"prune_threshold": 2}},
            r"pairs\.embedded\.strategies\.dynatree\.prune_threshold: must lie",
        ),
        ("configs.dynatree_adaptive.depth_gain", float("inf"), r"depth_gain: .*finite"),
        ("measure.seed", 2**63, r"whole number lies beyond"),
        ("experiments.main.grid", {"depth": [1] * 101, "runs": [1] * 100}, r"10100 points is more"),
        (
            "measure.workload",
            [[[]]] * 99_999,
            r"stands for \d+ values in \d levels; .* at most 200000 and 32",
        ),
        ("tables", {f"t{at}": 1 for at in range(60)}, r"and 20 more"),
        ("pairs.embedded.recipe.context", 64, r"pairs\.embedded\.recipe: context 64 is shorter"),
    ],
)
def test_a_wrong_value_is_named_with_its_path(data, path, value, message):
    put(data, path, value)
    with pytest.raises(ConfigError, match=message):
        parse_config(data)


def test_duplicate_keys_are_refused(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(SHIPPED.read_text() + "\npair: pythia\n")
    with pytest.raises(ConfigError, match="'pair' is given twice"):
        dynatree.load_config(path)


@pytest.mark.parametrize(
    "text", ["", "- 1", "a: [", "? [1]\n: 2", "\x00", "&a {b: *a}", "a: !!bool x"]
)
def test_what_is_no_configuration_gives_one_clear_error(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        dynatree.load_config(path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such file"):
        dynatree.load_config(tmp_path / "nowhere.yaml")


def test_pair_overrides_change_the_strategy_and_the_spec(data):
    before = parse_config(copy.deepcopy(data))
    put(data, "pairs.embedded.strategies.dynatree", {"prune_threshold": 0.02})
    put(data, "pairs.embedded.measure", {"runs": 2})
    after = parse_config(data)
    assert after.strategy("dynatree").prune_threshold == 0.02
    assert after.strategy("tree_depth1") == before.strategy("tree_depth1")
    assert after.measurement.runs == 2
    assert after.spec("dynatree").digest != before.spec("dynatree").digest
    put(data, "pair", "pythia")
    assert parse_config(data).strategy("dynatree").prune_threshold == 0.01


def test_the_spec_holds_what_is_measured_and_nothing_else(data):
    before = parse_config(copy.deepcopy(data))
    put(data, "configs.dynatree.labels", {"forward": "renamed"})
    put(data, "pairs.pythia.dtype", "float16")
    put(data, "tables.forward", ["ar"])
    data = {key: data[key] for key in reversed(data)}
    assert parse_config(data).spec("dynatree").digest == before.spec("dynatree").digest
    for path, value in [
        ("configs.dynatree.depth", 8),
        ("pairs.embedded.recipe.seed", 1),
        ("pairs.embedded.dtype", "bfloat16"),
        ("measure.warmup", 2),
        ("workloads.python_docs.prompts", ["other"]),
    ]:
        changed = copy.deepcopy(data)
        put(changed, path, value)
        assert parse_config(changed).spec("dynatree").digest != before.spec("dynatree").digest


def test_swapped_values_are_another_spec(data):
    put(data, "configs.dynatree", {"strategy": "tree", "depth": 4, "branch_factor": 8})
    one = parse_config(copy.deepcopy(data)).spec("dynatree")
    put(data, "configs.dynatree", {"strategy": "tree", "depth": 8, "branch_factor": 4})
    assert parse_config(data).spec("dynatree").digest != one.digest


def test_specs_and_configurations_survive_json():
    config = dynatree.load_config(SHIPPED)
    for name in config.configs:
        assert parse_spec(config.spec(name).canonical()) == config.spec(name)
    assert parse_config(yaml.safe_load(config.canonical())) == config


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
        max_leaves=8,
    ),
    st.sampled_from(["pair", "pairs", "measure", "configs.dynatree", "tables", "workloads"]),
)
def test_any_value_anywhere_is_valid_or_one_config_error(value, path):
    data = yaml.safe_load(SHIPPED.read_text())
    put(data, path, value)
    with suppress(ConfigError):
        parse_config(data)


def test_the_order_of_the_tables_counts_and_no_other(data):
    config = parse_config(copy.deepcopy(data))
    assert list(yaml.safe_load(config.canonical())["tables"]) == list(data["tables"])
    for section in ("pairs", "configs"):
        data[section] = dict(reversed(data[section].items()))
    assert parse_config(copy.deepcopy(data)).canonical() == config.canonical()
    data["tables"] = dict(reversed(data["tables"].items()))
    assert parse_config(data).canonical() != config.canonical()


def test_a_section_has_its_own_tables_only(data):
    config = parse_config(data)
    assert list(config.sections) == ["ablation", "families"]
    ablation = config.section("ablation")
    assert list(ablation.tables) == ["forward", "backward"]
    assert set(ablation.measured) < set(config.measured)
    # What another section shows is no reason to make this one again.
    put(data, "tables.adaptive", ["tree_fixed"])
    assert parse_config(data).section("ablation").canonical() == ablation.canonical()
    assert parse_config(yaml.safe_load(ablation.canonical())) == ablation


def test_without_sections_all_tables_are_the_ablation(data):
    del data["sections"]
    assert parse_config(data).sections == {"ablation": list(data["tables"])}


def test_a_section_may_not_be_called_as_another_part_of_the_paper(data):
    for name in ("main", "prose"):
        put(data, "sections", {name: ["adaptive"]})
        with pytest.raises(ConfigError, match=rf"sections\.{name}: .*rename the section"):
            parse_config(data)


def test_a_section_of_an_unknown_table_is_refused(data):
    put(data, "sections.families", ["adaptve"])
    with pytest.raises(ConfigError, match=r"sections\.families\.0: unknown table .*'adaptive'"):
        parse_config(data)


# What a job asks a cluster for.


def test_a_pair_changes_what_a_job_asks_a_cluster_for():
    data = {**synthetic.config().model_dump(), "cluster": {"threads": 4, "memory_mb": 9000}}
    data["pairs"]["micro"]["cluster"] = {"memory_mb": 40_000, "gpu_model": "h100"}
    job = parse_config(data).job
    assert (job.threads, job.memory_mb, job.minutes, job.gpu_model) == (4, 40_000, 60, "h100")


def test_no_result_depends_on_what_a_job_asks_a_cluster_for():
    plain = synthetic.config()
    data = {**plain.model_dump(), "cluster": {"threads": 4, "minutes": 5}}
    data["pairs"]["micro"]["cluster"] = {"memory_mb": 40_000}
    asking = parse_config(data)
    assert asking.job != plain.job
    assert asking.canonical() == plain.canonical()
    assert asking.section("ablation").canonical() == plain.section("ablation").canonical()
    assert asking.spec("tree") == plain.spec("tree")


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("study", {"minutes": 0}, "cluster.minutes: input should be greater than or equal to 1"),
        ("study", {"memory": 5}, "cluster.memory: unknown key; remove it or correct its name"),
        ("pair", {"threads": 1.5}, "pairs.micro.cluster.threads: input should be a valid integer"),
        ("pair", {"gpu_model": "h100; rm"}, "pairs.micro.cluster.gpu_model: string should match"),
    ],
)
def test_a_wrong_request_to_a_cluster_is_named(where, value, message):
    data = synthetic.config().model_dump()
    (data if where == "study" else data["pairs"]["micro"])["cluster"] = value
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_config(data)
