"""What large studies cost apart from measuring: planning, scheduling and aggregating.

The real pipeline runs on studies of growing size in which each measurement is a copy of a committed
result, so that all that is left is what Snakemake and the aggregation do. See docs/scale.md.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import harness
import torch
import yaml

from dynatree.certificate import read_certificate
from dynatree.config import Config, load_config
from dynatree.errors import reporting
from dynatree.facts import opened, sealed
from dynatree.files import write_text
from dynatree.packed import pack
from dynatree.provenance import git_facts, provenance
from dynatree.results import read_result
from dynatree.sources import PACKAGE, source_digest

PROJECT = Path(__file__).resolve().parent.parent
REFERENCE = PROJECT / "docs/reference"
COPIED = ("rules", "scripts", "src", "profiles", "envs", "paper/templates")
TARGET = "results/ablation.json"
PAIR = "stub"

# Stands before the text of a script, which then says on what the job depends, but does not run.
STUB = """\
import shutil, sys
if __name__ == "__main__":
    out = sys.argv[sys.argv.index("--out") + 1]
    shutil.copyfile("ready/" + out.rpartition("/")[2], out)
    sys.exit()
"""

STEPS = {
    "plan": "`snakemake -n`, all to be made",
    "measure": "all measuring jobs, stubs",
    "aggregate": "the aggregation, and the certificate's stub",
    "current": "`snakemake -n`, all made",
    "job": "`snakemake -n` of one job",
}
"""What is timed, in seconds of wall-clock, each once."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--sizes", type=harness.positive, nargs="+", default=[10, 100, 300, 1000],
        help="numbers of configurations; the record keeps its entries of other sizes",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder")
    arguments = parser.parse_args()
    path = arguments.out / "scale.json"
    entries: dict[int, dict[str, Any]] = {}
    if path.exists():
        entries = {entry["configurations"]: entry for entry in read(path)["entries"]}
    for size in arguments.sizes:
        entries[size] = simulate(size, lambda text: print(text, flush=True))
        record = {
            "benchmark": "scale",
            "entries": [entries[key] for key in sorted(entries)],
            "provenance": provenance(torch.device("cpu"), 0),
        }
        write_text(path, sealed(json.dumps(record, indent=1)))
        write_text(path.with_suffix(".md"), table(record))
    print(f"{path.with_suffix('.md').read_text(encoding='utf-8')}\nwritten to {path} and .md")


def read(path: Path) -> dict[str, Any]:
    """A record of this benchmark."""
    record, _ = opened(path.read_bytes())
    return record


def simulate(size: int, progress: Callable[[str], None]) -> dict[str, Any]:
    """Runs a study of `size` configurations with stubs for measurements.

    Returns:
        The entry of the record: seconds by step, bytes of what goes through files and arguments.
    """
    started = datetime.now(UTC)
    with tempfile.TemporaryDirectory(prefix="scale-") as name:
        folder = Path(name)
        study = prepare(folder, size)
        seconds: dict[str, float] = {}

        def step(name: str, *given: str) -> None:
            seconds[name] = snakemake(folder, *given)
            progress(f"{size}: {name} {seconds[name]:.1f} s")

        step("plan", TARGET, "-n")
        step("measure", TARGET, "--cores", "1", "--until", "measure")
        step("aggregate", TARGET, "--cores", "1")
        step("current", TARGET, "-n")
        step("job", f"results/runs/{PAIR}/c0.json", "-n")
        aggregated = json.loads((folder / TARGET).read_text(encoding="utf-8"))
        assert len(aggregated["configurations"]) == size
        text = study.section("ablation").canonical()
        sizes = {
            "study": len(text),
            "packed_study": len(pack(text)),
            "results": sum(path.stat().st_size for path in (folder / "results/runs").rglob("*.*")),
        }
    return {
        "configurations": size,
        "seconds": seconds,
        "bytes": sizes,
        "started": started.isoformat(),
        "finished": datetime.now(UTC).isoformat(),
        "load_average": os.getloadavg()[1],
        "cores": len(os.sched_getaffinity(0)),
        "git": git_facts(),
    }


def prepare(folder: Path, size: int) -> Config:
    """Makes a project in `folder` whose results only wait to be copied."""
    for name in COPIED:
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(PROJECT / name, folder / name, ignore=ignored)
    shutil.copy2(PROJECT / "Snakefile", folder)
    for script in ("measure.py", "certify.py"):
        path = folder / "scripts" / script
        path.write_text(STUB + path.read_text(encoding="utf-8"), encoding="utf-8")
    template = read_result(REFERENCE / "runs/embedded/dynatree.json").model_dump(mode="json")
    certificate = read_certificate(REFERENCE / "certificate.json").model_dump(mode="json")
    config = study_of(size, template["spec"], certificate["spec"])
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    study = load_config(folder / "config.yaml")
    ready = folder / "ready"
    ready.mkdir()
    # The copy lies elsewhere, and digests know files by folder and name.
    measured_by = source_digest(PACKAGE / "measure.py")
    for name in study.measured:
        spec = study.spec(name)
        facts = {"spec": spec.model_dump(mode="json"), "spec_digest": spec.digest}
        result = {**template, **facts, "source_digest": measured_by}
        (ready / f"{name}.json").write_text(sealed(json.dumps(result)), encoding="utf-8")
    check = next(c for c in certificate["configurations"] if c["name"] == "dynatree")
    certificate |= {
        "spec": study.certificate_spec(study.measured).model_dump(mode="json"),
        "source_digest": source_digest(PACKAGE / "certify.py"),
        "configurations": [{**check, "name": name} for name in study.measured],
    }
    (ready / "certificate.json").write_text(sealed(json.dumps(certificate)), encoding="utf-8")
    return study


def study_of(size: int, run: dict[str, Any], certificate: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a study of `size` trees with the prompts and settings of `run`."""
    names = [f"c{index}" for index in range(size)]
    trees = [
        {
            "strategy": "tree",
            "depth": 1 + index % 10,
            "branch_factor": 1 + index // 10 % 10,
            "prune_threshold": round(0.01 + 0.001 * (index // 100), 3),
        }
        for index in range(size)
    ]
    models = {"target": {"path": "/models/target"}, "draft": {"path": "/models/draft"}}
    return {
        "pair": PAIR,
        "pairs": {PAIR: {**models, "dtype": run["models"]["dtype"]}},
        "workloads": {run["measure"]["workload"]: {"prompts": run["prompts"]}},
        "measure": run["measure"],
        "certificate": {
            "prompts": len(certificate["prompts"]),
            "max_new_tokens": certificate["max_new_tokens"],
        },
        "configs": dict(zip(names, trees, strict=True)),
        "tables": {"forward": names},
    }


def snakemake(folder: Path, *arguments: str) -> float:
    """Runs Snakemake in `folder` and returns its seconds; raises CalledProcessError."""
    bin_folder = Path(sys.executable).parent
    environment = os.environ | {
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
        "PYTHONPATH": str(folder / "src"),
    }
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", *arguments, "--quiet"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    seconds = time.perf_counter() - began
    if done.returncode:
        sys.stderr.write(done.stdout[-2000:] + done.stderr[-2000:])
        done.check_returncode()
    return seconds


def table(record: dict[str, Any]) -> str:
    """What the record says, in Markdown."""
    entries = record["entries"]
    sizes = [f"{entry['configurations']} configurations" for entry in entries]
    rows = [
        [f"{what}, s", *(f"{entry['seconds'][step]:.1f}" for entry in entries)]
        for step, what in STEPS.items()
    ]
    rows += [
        [f"{what}, ms per configuration", *(f"{1000 * each(entry):.1f}" for entry in entries)]
        for what, each in PER_CONFIGURATION.items()
    ]
    rows += [
        [f"{what}, kB", *(f"{entry['bytes'][key] / 1000:.0f}" for entry in entries)]
        for key, what in (
            ("study", "the study as JSON"),
            ("packed_study", "as a word of a command line"),
            ("results", "result files"),
        )
    ]
    loads = ", ".join(f"{entry['load_average']:.1f}" for entry in entries)
    facts = record["provenance"]
    cores = max(entry["cores"] for entry in entries)
    return (
        harness.markdown(["step", *sizes], rows)
        + f"\nOn {cores} of the cores of {facts['machine']['processor']}, each step once; mean "
        f"load of the machine over 5 minutes at the end of each size: {loads}; "
        f"Snakemake {facts['versions']['snakemake']}, Python {facts['python']}.\n"
    )


PER_CONFIGURATION: dict[str, Callable[[dict[str, Any]], float]] = {
    "scheduling, with the stub's process": lambda entry: (
        (entry["seconds"]["measure"] - entry["seconds"]["plan"]) / entry["configurations"]
    ),
    "aggregating": lambda entry: (
        (entry["seconds"]["aggregate"] - entry["seconds"]["current"]) / entry["configurations"]
    ),
}
"""Seconds for each configuration, from an entry of the record."""


if __name__ == "__main__":
    reporting(main)
