"""Mutated configurations and results: a valid reading or one clear error, never anything else."""

import json

import fuzzing
import mutants
import pytest

from dynatree.config import load_config
from dynatree.errors import ConfigError
from dynatree.facts import sealed
from dynatree.files import write_text
from dynatree.provenance import git_facts

MUTANTS = 10_000
CAMPAIGN = 25_000
KINDS = {"configurations": fuzzing.configurations, "results": fuzzing.results}


@pytest.mark.parametrize("kind", KINDS)
def test_a_mutant_is_read_or_refused(kind, tmp_path, record_property):
    counts = KINDS[kind](range(MUTANTS), tmp_path)
    assert counts["valid"] + counts["refused"] == MUTANTS
    # Neither is everything refused for one reason, nor anything let through.
    assert min(counts["valid"], counts["refused"]) > MUTANTS / 100
    record_property("mutants valid", counts["valid"])
    record_property("mutants refused", counts["refused"])


def test_bombs_are_refused(tmp_path, record_property):
    path = tmp_path / "config.yaml"
    found = 0
    for text in mutants.bombs():
        path.write_text(text)
        with fuzzing.limited("a bomb"), pytest.raises(ConfigError) as raised:
            load_config(path)
        assert len(str(raised.value)) < 20_000
        found += 1
    record_property("mutants refused", found)


@pytest.mark.campaign
def test_campaign(tmp_path, pytestconfig):
    """`pytest -m campaign tests/test_fuzz.py`; other mutants than those of every run."""
    record = {"code": git_facts(), "first": MUTANTS, "kinds": {}}
    for kind, fuzz in KINDS.items():
        counts = fuzz(range(MUTANTS, MUTANTS + CAMPAIGN), tmp_path)
        record["kinds"][kind] = {key: counts[key] for key in ("valid", "refused")}
    text = sealed(json.dumps(record, indent=1))
    write_text(pytestconfig.rootpath / "bench/results/fuzz.json", text)
