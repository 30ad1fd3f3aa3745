"""The simulation of large studies: its stubs are results."""

import sys
from pathlib import Path

from dynatree.aggregate import aggregate
from dynatree.sources import PACKAGE, imported_sources, source_digest

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

import scale

ROOT = Path(__file__).parent.parent


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
