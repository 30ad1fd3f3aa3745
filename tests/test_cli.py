"""The `dynatree` command."""

import re
import sys

import pytest
import yaml
from micro_pair import micro, study  # noqa: F401 - a fixture

from dynatree.certificate import read_certificate
from dynatree.cli import app
from dynatree.results import read_result


@pytest.fixture
def run(micro, tmp_path, monkeypatch, capsys):  # noqa: F811
    config = study(
        micro,
        ["The with statement"],
        {"ar": {"strategy": "autoregressive"}, "dynatree": {"strategy": "tree"}},
        runs=1,
        warmup=0,
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["dynatree", *arguments])
        try:
            app()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        output = capsys.readouterr()
        return code, output.out, output.err

    return call


def test_measure_prints_what_was_measured_and_writes_on_request(run, tmp_path):
    code, out, _ = run(
        "measure", "--depth", "3", "--branch", "1", "--threshold", "0.1", "--tokens", "6",
        "--out", "result.json",
    )  # fmt: skip
    assert code == 0
    assert "depth 3, branch 1, threshold 0.1" in out
    assert re.search(r"outputs equal to AR\W+1 of 1", out)
    result = read_result(tmp_path / "result.json")
    assert result.spec.strategy.depth == 3
    assert result.spec.measure.max_new_tokens == 6


def test_generate_streams_the_same_text_with_every_configuration(run):
    texts = []
    for name in ("ar", "dynatree"):
        code, out, _ = run("generate", "The with", "--name", name, "--tokens", "12")
        assert code == 0
        assert "12 tokens in" in out
        texts.append(out.split("\n\n12 tokens in")[0])
    assert texts[0] == texts[1]
    assert texts[0].startswith("The with")


def test_generate_samples(run):
    options = ("--tokens", "12", "--temperature", "1.0", "--top-k", "50", "--top-p", "0.95")
    texts = {}
    for name in ("ar", "dynatree"):
        for mode in ("coupled", "rejection"):
            for seed in ("1", "2"):
                code, out, _ = run(
                    "generate", "The with", "--name", name, *options, "--seed", seed,
                    "--sampling", mode,
                )  # fmt: skip
                assert code == 0
                texts[name, mode, seed] = out.split("\n\n12 tokens in")[0]
    for seed in ("1", "2"):
        assert texts["ar", "coupled", seed] == texts["dynatree", "coupled", seed]
    assert texts["ar", "coupled", "1"] != texts["ar", "coupled", "2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("measure", "--threshold", "1"), "would prune every node"),
        (("measure", "--name", "dynatre"), "did you mean 'dynatree'"),
        (("measure", "--pair", "pythia"), "unknown pair 'pythia'"),
        (("generate", "x", "--config", "nowhere.yaml"), "no such file"),
        (("generate", ""), "has no tokens"),
        (("measure", "--name", "ar", "--depth", "3"), "depth: unknown key"),
        (("measure", "--tokens", "1000"), "need a context of"),
        (("generate", "x", "--temperature", "-1"), "temperature: Input should be greater than"),
        (("generate", "x", "--sampling", "typical"), "got 'typical'"),
    ],
)
def test_errors_are_one_message_without_a_traceback(run, arguments, message):
    code, _, err = run(*arguments)
    assert code != 0
    assert message in err
    assert "Traceback" not in err


def test_certify_writes_the_certificate_and_says_so(run, tmp_path):
    code, out, _ = run("certify", "--tokens", "6", "--configs", "dynatree,ar")
    assert code == 0
    assert "dynatree: equal" in out
    certificate = read_certificate(tmp_path / "results/certificate.json")
    assert certificate.passed
    assert list(certificate.spec.strategies) == ["dynatree", "ar"]


def test_certify_fails_where_the_engine_does(run, tmp_path, monkeypatch):
    monkeypatch.setattr("dynatree.decode._as_set", lambda eos: frozenset())
    code, _, err = run("certify", "--tokens", "6", "--configs", "ar")
    assert code == 1
    assert "not lossless" in err
    assert not read_certificate(tmp_path / "results/certificate.json").passed


def test_certify_names_an_unknown_configuration(run):
    code, _, err = run("certify", "--configs", "dynatre")
    assert code == 1
    assert "unknown configuration 'dynatre'; did you mean 'dynatree'?" in err
