"""Every number in the README's table comes from a committed result file."""

import ast
import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from dynatree.ablation import read_ablation
from dynatree.aggregate import aggregate
from dynatree.certificate import read_certificate
from dynatree.config import parse_config
from dynatree.errors import ResultError
from dynatree.readme import update, with_benchmarks, with_reference
from dynatree.results import read_result

ROOT = Path(__file__).parent.parent
REFERENCE = Path("docs/reference")
BENCHMARKS = Path("bench/results")


def leaves(data):
    if isinstance(data, dict):
        return [leaf for key in sorted(data) for leaf in (key, *leaves(data[key]))]
    if isinstance(data, list):
        return [leaf for item in data for leaf in leaves(item)]
    return [data]


def test_the_table_is_what_the_reference_results_render_to(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert Path("README.md").read_text() == update(Path("README.md"), REFERENCE, BENCHMARKS)


def test_a_benchmark_table_is_what_the_file_says(tmp_path):
    (tmp_path / "machine").mkdir()
    (tmp_path / "machine/peers.md").write_text("| 2 |\n")
    readme = "a\n<!-- bench:machine/peers -->\n| 1 |\n<!-- bench:end -->\nb\n"
    assert with_benchmarks(readme, tmp_path) == readme.replace("1", "2")
    with pytest.raises(ResultError, match=r"README\.md shows .*other\.md, which cannot be read"):
        with_benchmarks(readme.replace("peers", "other"), tmp_path)


def test_every_committed_benchmark_table_has_its_record():
    tables = sorted((ROOT / BENCHMARKS).rglob("*.md"))
    assert len(tables) > 8
    for path in tables:
        record = json.loads(path.with_suffix(".json").read_text())
        assert record["provenance"]["git"]["commit"]


@pytest.mark.parametrize("section", ["ablation", "families"])
def test_the_reference_aggregate_follows_from_its_runs(section):
    """The aggregate is recomputed from the raw records, under the configuration they hold."""
    kept = read_ablation(ROOT / REFERENCE / f"{section}.json")
    folder = ROOT / REFERENCE / "runs"
    runs = [read_result(path) for path in sorted(folder.rglob("*.json"))]
    study = yaml.safe_load((ROOT / "config.yaml").read_text())
    study["tables"] = {
        table.name: [row.sweep or row.configuration for row in table.rows] for table in kept.tables
    }
    study["sections"] = {section: list(study["tables"])}
    certificate = ROOT / REFERENCE / "certificate.json"
    digest = read_certificate(certificate).source_digest
    again = aggregate(parse_config(study), folder, runs[0].source_digest, (certificate, digest))
    for one, other in zip(leaves(again.model_dump()), leaves(kept.model_dump()), strict=True):
        # Another processor may round the last digit of a logarithm differently.
        assert one == (pytest.approx(other, rel=1e-9) if isinstance(other, float) else other)


def test_a_readme_without_markers_is_refused():
    with pytest.raises(ResultError, match="put it back"):
        with_reference("# no markers", ROOT / REFERENCE)


def texts(path):
    """The strings of a Python file, with a gap for each value in them; all of another file."""
    source = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return [source]
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
        elif isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
            found.append("".join(parts))
    return found


def messages():
    section = (ROOT / "README.md").read_text().split("## Troubleshooting\n")[1].split("\n## ")[0]
    return re.findall(r"^\| `(.+?)` \| .+ \|$", section, flags=re.MULTILINE)


def test_every_message_under_troubleshooting_is_one_that_is_printed():
    paths = [
        *(ROOT / "src").rglob("*.py"),
        *(ROOT / "rules").glob("*.smk"),
        *(ROOT / "scripts").glob("*.sh"),
        Path(find_spec("snakemake").origin).with_name("exceptions.py"),
    ]
    printed = [text for path in paths for text in texts(path)]
    assert len(messages()) > 15
    for message in messages():
        # The end of a message that is given in part, and its values, are open.
        pattern = ".*".join(re.escape(part) for part in message.split("…"))
        assert any(re.search(pattern, text, flags=re.DOTALL) for text in printed), message
        # Values alone would be found anywhere.
        assert max(map(len, message.split("…"))) >= 12, message
