"""Workloads: which text becomes which tokens, and what is said when it cannot be had."""

import hashlib
import json
import os
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from micro_pair import micro, study  # noqa: F401 - a fixture

from dynatree.certify import certify
from dynatree.config import parse_config
from dynatree.embedded.corpus import language_reference
from dynatree.errors import ConfigError, WorkloadError
from dynatree.measure import measure
from dynatree.pairs import load_pair
from dynatree.results import read_result, write_result
from dynatree.schema import digest
from dynatree.specs import parse_certificate_spec, parse_spec
from dynatree.texts import Selection
from dynatree.workloads import encode_prompts, select

LINES = [f"Line {number} tells that {number * number} is a square." for number in range(40)]
QUESTIONS = [
    {"category": category, "turns": [f"{category} question {number}", "And then?"], "id": number}
    for number, category in enumerate(["writing", "math", "writing", "translation", "math"])
]


def encode(text):
    """One token for each character."""
    return [ord(letter) for letter in text]


def decode(tokens):
    return "".join(map(chr, tokens))


def selection(seed=0, **options):
    options = {"count": 3, **options}
    path = Path(options.get("file", ""))
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
    return Selection.model_validate({**options, "seed": seed, "sha256": sha256})


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    # Headings between blank lines, as in WikiText.
    blocks = [f" \n = Part {part} = \n \n" + "\n".join(LINES[part::4]) for part in range(4)]
    path.write_text("\n".join(blocks) + "\n")
    return str(path)


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "question.jsonl"
    path.write_text("\n".join(map(json.dumps, QUESTIONS)) + "\n")
    return str(path)


def test_prompts_have_the_wanted_length_begin_at_lines_and_share_none(text):
    prompts = select(selection(file=text, count=8, prompt_tokens=70), encode)
    assert [len(prompt) for prompt in prompts] == [70] * 8
    whole = "\n".join(line.rstrip() for line in Path(text).read_text().split("\n"))
    starts = []
    for prompt in map(decode, prompts):
        assert whole.count(prompt) == 1
        start = whole.index(prompt)
        assert start == 0 or whole[start - 1] == "\n"
        assert not prompt.startswith("\n")
        starts.append(start)
    starts.sort()
    assert all(after - before >= 70 for before, after in pairwise(starts))


def test_the_seed_says_which_and_fewer_are_the_first_of_more(text):
    def chosen(count, seed):
        return select(selection(file=text, count=count, prompt_tokens=50, seed=seed), encode)

    assert chosen(6, 1) == chosen(6, 1)
    assert chosen(6, 1) != chosen(6, 2)
    assert chosen(3, 1) == chosen(6, 1)[:3]


def test_the_choice_is_the_same_everywhere(tmp_path):
    """Written down, so that a change of Python, of a library or of this code is noticed."""
    path = tmp_path / "ten.txt"
    path.write_text("".join(f"{number}\n" for number in range(10)))
    prompts = select(selection(file=str(path), count=10), encode)
    assert [int(decode(prompt)) for prompt in prompts] == [7, 4, 9, 3, 8, 2, 6, 0, 5, 1]


def test_without_a_length_a_line_that_is_not_blank_is_a_prompt(text):
    prompts = {decode(prompt) for prompt in select(selection(file=text, count=44), encode)}
    assert prompts == {*LINES, *(f"= Part {part} =" for part in range(4))}


def test_too_little_text_says_how_much_there_is(text):
    with pytest.raises(WorkloadError, match=r"text\.txt: 45 prompts wanted, 44 there; lower count"):
        select(selection(file=text, count=45), encode)
    with pytest.raises(WorkloadError, match=r"2 prompts of 9000 tokens wanted, the text gave 0"):
        select(selection(file=text, count=2, prompt_tokens=9000), encode)


def test_a_category_is_a_workload_of_its_own(questions):
    def texts(**options):
        chosen = select(selection(file=questions, field="turns.0", **options), encode)
        return sorted(map(decode, chosen))

    assert texts(count=2, where={"category": "writing"}) == [
        "writing question 0",
        "writing question 2",
    ]
    assert texts(count=3, where={"category": ["translation", "math"]}) == [
        "math question 1",
        "math question 4",
        "translation question 3",
    ]
    assert texts(count=1, where={"category": "math", "id": 4}) == ["math question 4"]
    assert len(texts(count=5)) == 5


def test_records_are_joined_where_a_length_is_wanted(questions):
    prompts = select(selection(file=questions, field="turns.0", count=1, prompt_tokens=40), encode)
    assert decode(prompts[0]) in "\n".join(question["turns"][0] for question in QUESTIONS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"field": "turns"}, r"question\.jsonl: field 'turns' of record 1 is no text but list"),
        ({"field": "text"}, r"record 1 has no field 'text'; it has category, turns, id"),
        ({"field": "turns.2"}, r"record 1 has no field 'turns\.2'"),
        ({"field": "turns.x"}, r"record 1 has no field 'turns\.x'"),
        (
            {"field": "turns.0", "where": {"category": "qa"}},
            r"no record fits where: \{'category': 'qa'\}; category has 'math', 'translation', 'wri",
        ),
    ],
)
def test_a_field_that_is_not_there_is_named(questions, options, message):
    with pytest.raises(WorkloadError, match=message):
        select(selection(file=questions, **options), encode)


def test_what_is_no_json_is_named_with_its_line(tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": \n')
    with pytest.raises(WorkloadError, match=r"broken\.jsonl: line 3 is not JSON"):
        select(selection(file=str(path)), encode)
    path.write_text("[1]\n")
    with pytest.raises(WorkloadError, match=r"line 1 is not a JSON object"):
        select(selection(file=str(path)), encode)


def test_a_file_that_changed_under_a_waiting_job_is_refused(text):
    chosen = selection(file=text, prompt_tokens=20)
    Path(text).write_text("Another text.\n" * 40)
    with pytest.raises(WorkloadError, match=r"changed while the job was waiting"):
        select(chosen, encode)


def test_the_corpus_needs_no_file():
    prompts = select(selection(corpus="python_reference", count=4, prompt_tokens=300), encode)
    whole = "\n".join(line.rstrip() for topic in language_reference() for line in topic.split("\n"))
    assert [len(prompt) for prompt in prompts] == [300] * 4
    assert all(decode(prompt).split("\n")[0] in whole for prompt in prompts)


# The optional extra.


def extra():
    """The packages of the extra; CI must have them."""
    if os.environ.get("DYNATREE_REQUIRE_TOOLS") != "1":
        pytest.importorskip("datasets")
        pytest.importorskip("pyarrow")


def test_parquet_gives_the_prompts_of_jsonl(questions, tmp_path):
    extra()
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "question.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(QUESTIONS), path)
    options = {"field": "turns.0", "where": {"category": ["writing", "math"]}, "count": 4}
    one, other = (
        select(selection(file=str(file), **options), encode) for file in (questions, path)
    )
    assert one == other
    with pytest.raises(WorkloadError, match=r"record 1 has no field 'text'"):
        select(selection(file=str(path)), encode)
    path.write_bytes(b"PAR1 and nothing else")
    with pytest.raises(WorkloadError, match=r"question\.parquet: cannot be read as parquet"):
        select(selection(file=str(path)), encode)


def test_a_dataset_gives_the_prompts_of_the_file(text, tmp_path, monkeypatch):
    extra()
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "hub"
    folder.mkdir()
    # As WikiText lies on the hub: a record for each line, its end included, blank ones empty.
    lines = Path(text).read_text().removesuffix("\n").split("\n")
    records = [{"text": f"{line}\n" if line.strip() else ""} for line in lines]
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, records)))
    options = {"count": 5, "prompt_tokens": 60}
    loaded = selection(dataset=str(folder), split="test", **options)
    assert select(loaded, encode) == select(selection(file=text, **options), encode)
    for change in ({"split": "train"}, {"dataset": str(tmp_path / "nowhere"), "split": "test"}):
        wrong = selection(**{"dataset": str(folder), **options, **change})
        with pytest.raises(WorkloadError, match=r"cannot be had: .*check dataset, name, split"):
            select(wrong, encode)


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"")
    for module in ("datasets", "pyarrow"):
        monkeypatch.setitem(sys.modules, module, None)
    for source in ({"dataset": "org/name", "split": "test"}, {"file": str(path)}):
        with pytest.raises(WorkloadError, match=r"pip install 'dynatree\[datasets\]'"):
            select(selection(**source), encode)


# In the configuration.


def configured(folder, **workload):
    data = study(folder, [], {"tree": {"strategy": "tree", "depth": 3}}, runs=1, warmup=0)
    data["workloads"]["w"] = workload
    data["certificate"] = {"prompts": 2, "max_new_tokens": 6}
    return parse_config(data)


@pytest.mark.parametrize(
    ("workload", "message"),
    [
        ({}, r"workloads\.w: give exactly one of prompts \(a list\), file, dataset and corpus"),
        ({"prompts": ["a"], "file": "b"}, r"workloads\.w: give exactly one"),
        ({"file": "a.txt"}, r"workloads\.w: count is missing: add"),
        ({"file": "a.txt", "count": 0}, r"workloads\.w\.count: .*got 0"),
        ({"file": "a.txt", "count": 2, "field": "text"}, r"w: field belongs to a dataset or a \.j"),
        ({"file": "a.txt", "count": 2, "where": {"a": 1}}, r"w: where belongs to"),
        ({"file": "a.jsonl", "count": 2, "split": "test"}, r"w: split belongs to a dataset"),
        ({"dataset": "a/b", "count": 2}, r"w: a dataset needs its split"),
        ({"prompts": ["a"], "count": 1}, r"w: count does not go with prompts"),
        ({"prompts": ["a"], "prompt_tokens": 9}, r"w: prompt_tokens does not go with prompts"),
        ({"corpus": "books", "count": 1}, r"workloads\.w\.corpus: .*got 'books'"),
        (
            {"file": "a.jsonl", "count": 1, "where": {"a": []}},
            r"workloads\.w\.where\.a: must hold a value",
        ),
        (
            {"file": "a.jsonl", "count": 1, "where": {"a": [None]}},
            r"workloads\.w\.where\.a: must be a number, a text, .*got None",
        ),
    ],
)
def test_a_workload_that_cannot_be_had_is_refused(workload, message):
    with pytest.raises(ConfigError, match=message):
        configured(Path(), **workload)


def test_a_missing_file_is_named_with_its_key(tmp_path):
    config = configured(tmp_path, file=str(tmp_path / "no.txt"), count=2)
    with pytest.raises(ConfigError, match=r"workloads\.w\.file: '.*no\.txt' cannot be read"):
        config.spec("tree")


def test_the_spec_follows_the_content_of_the_file_the_seed_and_the_options(text, tmp_path):
    def made(seed=0, **options):
        config = configured(tmp_path, file=text, **{"count": 4, "prompt_tokens": 9, **options})
        measured = config.measure.model_copy(update={"seed": seed})
        return config.model_copy(update={"measure": measured}).spec("tree")

    before = made()
    assert parse_spec(before.canonical()) == before
    assert len(before.prompts) == 4
    assert len({made(**change).digest for change in ({}, {"seed": 1}, {"count": 5})}) == 3
    Path(text).write_text(Path(text).read_text().replace("Line 7", "Line 8"))
    assert made().digest != before.digest
    assert made().prompts.sha256 == hashlib.sha256(Path(text).read_bytes()).hexdigest()


def test_a_result_has_the_digest_of_the_exact_prompt_tokens(micro, text, tmp_path):  # noqa: F811
    config = configured(micro, file=text, count=3, prompt_tokens=12)
    pair = load_pair(config)
    prompts = encode_prompts(config.spec("tree"), pair)
    assert [len(prompt) for prompt in prompts] == [12] * 3
    path = tmp_path / "tree.json"
    write_result(path, measure(config.spec("tree"), pair))
    result = read_result(path)
    assert result.prompts_digest == digest([prompt.tolist() for prompt in prompts])
    assert [output.prompt_tokens for output in result.outputs] == [12] * 3
    spec = config.certificate_spec(["tree"])
    assert parse_certificate_spec(spec.canonical()) == spec
    # The certificate compares the first prompts of those that are measured.
    certified = encode_prompts(spec, pair)
    assert [prompt.tolist() for prompt in certified] == [prompt.tolist() for prompt in prompts[:2]]
    assert certify(spec, pair).passed
