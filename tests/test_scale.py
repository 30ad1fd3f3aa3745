"""The simulation of large studies: its stubs are results, and docs/scale.md says what it found."""

import json
import sys
from pathlib import Path

import pytest

from dynatree.aggregate import aggregate
from dynatree.readme import with_benchmarks
from dynatree.sources import PACKAGE, imported_sources, source_digest

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

import scale

ROOT = Path(__file__).parent.parent
RECORD = scale.read(ROOT / "bench/results/scale.json")
ENTRIES = {entry["configurations"]: entry for entry in RECORD["entries"]}


def test_the_stubs_are_results_of_their_study(tmp_path):
    study = scale.prepare(tmp_path, 12)
    assert len({study.strategy(name).model_dump_json() for name in study.measured}) == 12
    # The stub of a script is made of all that the script is made of.
    stub, script = tmp_path / "scripts/measure.py", ROOT / "scripts/measure.py"
    assert imported_sources(stub) == imported_sources(script)
    (tmp_path / "runs").mkdir()
    (tmp_path / "ready").rename(tmp_path / "runs/stub")
    certificate = (tmp_path / "runs/stub/certificate.json", source_digest(PACKAGE / "certify.py"))
    digest = source_digest(PACKAGE / "measure.py")
    ablation = aggregate(study, tmp_path / "runs", digest, certificate)
    assert len(ablation.configurations) == 12
    assert all(facts.lossless for facts in ablation.configurations)


def test_the_page_shows_the_committed_record():
    table = (ROOT / "bench/results/scale.md").read_text()
    assert table == scale.table(RECORD)
    page = (ROOT / "docs/scale.md").read_text()
    assert table in page
    assert with_benchmarks(page, ROOT / "bench/results") == page


def test_the_record_is_of_small_and_large_studies():
    assert set(ENTRIES) == {10, 100, 300, 1000}
    assert all(set(entry["seconds"]) == set(scale.STEPS) for entry in ENTRIES.values())
    assert json.dumps(RECORD).count('"commit"') == len(ENTRIES) + 1


@pytest.mark.parametrize("step", ["plan", "measure", "aggregate", "current"])
def test_no_step_grows_faster_than_the_study_by_much(step):
    """Ten times the study takes less than fifteen times as long."""
    assert ENTRIES[1000]["seconds"][step] < 15 * ENTRIES[100]["seconds"][step]
