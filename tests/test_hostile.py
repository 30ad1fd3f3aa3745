"""Input that means harm, or is only wrong: names, texts, models that bring code with them."""

import json
import pickle
import re
import shutil
import sys
from contextlib import suppress
from pathlib import Path

import mutants
import pytest
import synthetic
import trees
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from micro_pair import micro, study  # noqa: F401 - micro is a fixture
from test_workflow import command, copy_project

from dynatree.config import load_config, parse_config
from dynatree.errors import ConfigError, DecodeError, PairError
from dynatree.pairs import load_models
from dynatree.render import render
from dynatree.specs import parse_spec
from dynatree.tree_page import render_page
from dynatree.workloads import encode_prompts

PROJECT = Path(__file__).resolve().parent.parent
CONFIGS = {"tree": {"strategy": "tree"}}

# Names, which become files below results/ and words of a shell.

NAMES = (
    *("../owned", "/tmp/owned", "a/b", "a\\b", "..", ".", "", " ", "a b", "a\n", "\na", "a\0b"),
    *("-rf", "--config", "$(touch owned)", "`id`", "a;b", "a|b", "a&b", "a'b", 'a"b', "{name}"),
    *("\N{FULLWIDTH FULL STOP}" * 2, "a\N{DIVISION SLASH}b", "a\N{FULLWIDTH SOLIDUS}b", "a\u202eb"),
    *("\N{LATIN SMALL LETTER E WITH ACUTE}", "e\u0301", "a\u200bb", "a\ud800", "\U0001f600"),
    *("\N{CYRILLIC SMALL LETTER A}r", "a\N{ARABIC-INDIC DIGIT THREE}", "a%2e", "CON.", "x" * 65),
    *("&", "%", "a#", "~", "a^", "\\input{/etc/passwd}", "a.b", "a:b", "a*"),
)


def named(kind, name):
    """A study in which a configuration, a pair, an experiment or the like is called `name`."""
    data = study(Path("/models"), ["Return"], dict(CONFIGS))
    if kind == "pair":
        data["pairs"][name] = data["pairs"]["micro"]
        data["pair"] = name
    elif kind == "configuration":
        data["configs"][name] = CONFIGS["tree"]
        data["tables"]["forward"] = [name]
    elif kind == "section":
        data["sections"] = {name: ["forward"]}
    elif kind == "table":
        data["tables"][name] = ["tree"]
    elif kind == "experiment":
        data["experiments"] = {name: {"configs": ["tree"]}}
    elif kind == "workload":
        data["workloads"][name] = {"prompts": ["a"]}
        data["measure"]["workload"] = name
    else:
        data["sweeps"] = {name: {"best_of": ["tree", "tree"]}}
    return data


KINDS = ("pair", "configuration", "section", "table", "experiment", "workload", "sweep")


@pytest.mark.parametrize("kind", KINDS)
def test_a_name_that_is_no_plain_word_is_refused(kind):
    for name in NAMES:
        with pytest.raises(ConfigError, match="valid") as raised:
            parse_config(named(kind, name))
        assert all(line.isprintable() for line in str(raised.value).split("\n"))


@given(st.sampled_from(KINDS[:5]), st.text(max_size=70))
@example("configuration", "CON")
@example("experiment", "grid")
def test_whatever_is_accepted_stays_below_results(kind, name):
    try:
        config = parse_config(named(kind, name))
    except ConfigError:
        return
    words = [config.pair, *config.measured, *config.sections, *config.tables, *config.experiments]
    words += [point.name for entry in config.experiments for point in config.points(entry)]
    for word in words:
        assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", word)
        assert Path("results", f"{word}.json").resolve().parent == Path("results").resolve()


@pytest.mark.parametrize("device", ["cuda:\N{ARABIC-INDIC DIGIT THREE}", "cpu; id", "cuda:0\n", ""])
def test_a_device_is_one_of_few_words(device):
    data = study(Path("/models"), ["Return"], CONFIGS)
    data["pairs"]["micro"]["device"] = device
    with pytest.raises(ConfigError, match=r"pairs\.micro\.device"):
        parse_config(data)


SHIM = """#!{python}
import json, os, sys
with open("{seen}/" + str(os.getpid()), "w") as file:
    json.dump(sys.argv[1:], file)
sys.exit(3)
"""
HOSTILE = (
    "$(touch owned) `touch owned` ; touch owned | touch owned & \n touch owned # ' \" \\ \0 {} {x} "
    "{input} %s !! ~ * ? < > \u202e"
)


def test_no_text_reaches_the_shell(micro, tmp_path):  # noqa: F811
    project = copy_project(tmp_path / "project")
    text = project / "it's $(touch owned) ; touch owned.txt"
    text.write_text("Return a list of all the items.\n" * 9)
    data = study(micro, [HOSTILE], {"ar": {"strategy": "autoregressive"}, **CONFIGS})
    data["pairs"]["micro"]["note"] = HOSTILE
    data["configs"]["tree"]["labels"] = {"forward": HOSTILE}
    data["workloads"]["file"] = {"file": text.name, "count": 1}
    data["trees"] = {"configs": ["tree"]}
    data["experiments"] = {"files": {"configs": ["tree"], "grid": {"workload": ["file"]}}}
    (project / "config.yaml").write_text(yaml.safe_dump(data))
    config = load_config(project / "config.yaml")
    seen = tmp_path / "seen"
    (tmp_path / "bin").mkdir()
    seen.mkdir()
    shim = tmp_path / "bin" / "python"
    shim.write_text(SHIM.format(python=sys.executable, seen=seen))
    shim.chmod(0o755)
    done = command(
        project,
        *(sys.executable, "-m", "snakemake", "--cores", "1", "--keep-going"),
        *("paper/manifest.json", "results/trees.html", "files"),
        path=shim.parent,
    )
    assert done.returncode != 0
    calls = [json.loads(path.read_text()) for path in seen.iterdir()]
    # The jobs that need no other, each with its specification as one word.
    scripts = sorted(call[0] for call in calls)
    once = ["scripts/certify.py", "scripts/record_trees.py"]
    assert scripts == sorted([*once, *["scripts/measure.py"] * 3]), done.stdout
    specs = [call[2] for call in calls if call[0] == "scripts/measure.py"]
    by_name = {parse_spec(spec).name: spec for spec in specs}
    assert parse_spec(by_name["tree"]).prompts == [HOSTILE]
    assert by_name["tree"] == config.spec("tree").canonical()
    assert not list(project.rglob("owned"))


# Prompts.

TEXT = st.text(st.characters(exclude_categories=()), max_size=40)


@pytest.fixture(scope="module")
def pair(micro):  # noqa: F811
    config = parse_config(study(micro, ["Return"], CONFIGS))
    return load_models(config.pair, config.pair_spec)


@given(text=TEXT)
@example("")
@example("\0")
@example("\ud800")
@example("\udfff\ud800")
@example("e\u0301" * 30)
@example("\u202e\u200b\ufeff\uffff\U0010ffff")
@example("\r\n\x1b[31m\x07")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_prompt_is_encoded_or_refused_by_name(pair, text):
    data = study(Path("/models"), ["Return", text], CONFIGS)
    if text == "" or any("\ud800" <= character <= "\udfff" for character in text):
        with pytest.raises(ConfigError, match=r"workloads\.w\.prompts") as raised:
            parse_config(data)
        str(raised.value).encode()
        return
    config = parse_config(data)
    spec = parse_spec(config.spec("tree").canonical())
    assert spec.prompts == ["Return", text]
    if pair.tokenizer(text).input_ids:
        assert all(0 <= int(token) < 300 for token in encode_prompts(spec, pair)[1])
    else:
        with pytest.raises(DecodeError, match="prompt 1"):
            encode_prompts(spec, pair)


# Models that bring code.


class Evil:
    """Whoever unpickles it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def copied(micro, tmp_path):  # noqa: F811
    return Path(shutil.copytree(micro, tmp_path / "pair"))


def models(folder):
    return parse_config(study(folder, ["Return"], CONFIGS)).pair_spec


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_refused_with_the_cure(copied, tmp_path, name):
    (copied / "draft" / "model.safetensors").unlink()
    owned = tmp_path / "owned"
    (copied / "draft" / name).write_bytes(pickle.dumps(Evil(owned)))
    with pytest.raises(
        PairError, match=rf"pairs\.p\.draft\.path: .*{name} only, a pickle.*convert"
    ):
        load_models("p", models(copied))
    assert not owned.exists()


def test_a_pickle_beside_safetensors_is_left_alone(copied, tmp_path):
    owned = tmp_path / "owned"
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pkl"):
        (copied / "target" / name).write_bytes(pickle.dumps(Evil(owned)))
    load_models("p", models(copied))
    assert not owned.exists()


def test_a_pickle_in_the_place_of_safetensors_is_damaged(copied, tmp_path):
    owned = tmp_path / "owned"
    (copied / "target" / "model.safetensors").write_bytes(pickle.dumps(Evil(owned)))
    with pytest.raises(PairError, match=r"pairs\.p\.target: .*(damaged|cannot be loaded)"):
        load_models("p", models(copied))
    assert not owned.exists()


CODE = {
    "a model of its own": ("config.json", {"model_type": "evil"}, True),
    "a model that Transformers has": ("config.json", {}, False),
    "a tokenizer of its own": ("tokenizer_config.json", {"tokenizer_class": "Evil"}, False),
}


@pytest.mark.parametrize(("file", "changes", "refused"), CODE.values(), ids=CODE)
def test_code_of_a_model_is_never_run(copied, tmp_path, file, changes, refused):
    """Without it the model cannot be had, and is refused; or it can, and is loaded without."""
    folder = copied / "target"
    owned = tmp_path / "owned"
    code = f"from pathlib import Path\nPath({str(owned)!r}).touch()\nclass Evil: pass\n"
    for name in ("evil.py", "modeling_evil.py", "custom_generate/generate.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(code)
    kinds = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer")
    data = json.loads((folder / file).read_text())
    (folder / file).write_text(
        json.dumps({**data, **changes, "auto_map": dict.fromkeys(kinds, "evil.Evil")})
    )
    loaded = None
    with pytest.raises(PairError, match=r"pairs\.p\.target") if refused else suppress(PairError):
        loaded = load_models("p", models(copied))
    if loaded is not None:
        assert type(loaded.target).__module__.startswith("transformers.")
        assert type(loaded.tokenizer).__module__.startswith("transformers.")
    assert not owned.exists()
    assert not any(name.rpartition(".")[2].endswith("evil") for name in sys.modules)


# Pages and tables.


def test_texts_of_results_are_escaped_in_the_table(tmp_path):
    hostile = r"\input{/etc/passwd} & % _ # ~ $ ^ { } \ <script>"
    study = synthetic.config()
    origin = {
        "device": {"type": "cpu", "name": hostile, "threads": 2},
        "git": {"commit": hostile, "dirty": True},
    }
    changes = {name: {"provenance": origin} for name in study.measured}
    ablation = synthetic.ablation(tmp_path, study, changes=changes)
    template = PROJECT / "paper/templates/ablation.tex.j2"
    text = render(ablation, template, "results/ablation.json").text.replace(r"\allowbreak{}", "")
    assert r"\input" not in text
    assert "/etc/passwd" in text
    assert text.count(r"\textbackslash{}input\{/etc/passwd\} \& \% \_ \#") >= 1


@given(st.text() | st.sampled_from(mutants.TEXTS))
@example("</script>")
@example("<!--<script>")
@settings(max_examples=50, deadline=None)
def test_no_token_ends_the_script_of_the_page(token):
    record = trees.record()
    vocabulary = {**record.vocabulary, 1: token}
    record = record.model_copy(update={"vocabulary": vocabulary})
    plain = render_page([trees.record()], PROJECT / "paper/templates/trees.html.j2")
    page = render_page([record], PROJECT / "paper/templates/trees.html.j2")
    for tag in ("<script", "</script", "<!--"):
        assert page.lower().count(tag) == plain.lower().count(tag)
