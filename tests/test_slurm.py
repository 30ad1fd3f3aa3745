"""The real pipeline on a real SLURM: what jobs ask for, and what is left when jobs and nodes go."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from slurm_cluster import slurm, wait_for  # noqa: F401 - a fixture
from test_workflow import HANGS, TABLE, copy_project, planned, replace

from dynatree.ablation import read_ablation
from dynatree.results import RunResult, read_result

pytestmark = pytest.mark.slurm

RUNS = Path("results/runs/micro")
NAMES = {"linear", "tree"}
CLUSTER = """
cluster: {threads: 1, memory_mb: 500, minutes: 7, gpu_model: h200}

tables:
  forward: [linear, tree]
"""
# Clusters are asked less often, have slower file systems, and keep accounts, which `sacct` reads.
HASTE = (
    "--slurm-status-command=squeue",
    "--slurm-init-seconds-before-status-checks=1",
    "--seconds-between-status-checks=1",
)


class Pipeline:
    """`snakemake` with the profile for SLURM, in a copy of the project."""

    def __init__(self, folder: Path, cluster):
        self.folder = folder
        self.cluster = cluster
        self.process = None

    def start(self, *arguments: str) -> None:
        environment = os.environ | {
            "PATH": f"{self.cluster.bin}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(self.folder / "src"),
            "OMP_NUM_THREADS": "1",
        }
        profile = ("--workflow-profile", "profiles/slurm")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "snakemake", TABLE, *profile, *HASTE, *arguments],
            cwd=self.folder,
            env=environment,
            text=True,
            stdout=(self.folder / "out.txt").open("w"),
            stderr=subprocess.STDOUT,
        )

    def measuring(self, but: str = "") -> str:
        """Id of a measuring job that runs, other than `but`, as soon as there is one."""

        def running():
            if self.process.poll() is not None:
                pytest.fail(f"ended before a measurement ran:\n{self.output()}")
            return [job for job in self.cluster.running("measure") if job != but]

        return wait_for(running, "a measurement", self.cluster, 300)[0]

    def finish(self) -> int:
        try:
            return self.process.wait(timeout=HANGS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            pytest.fail(self.output()[-4000:])

    def output(self) -> str:
        return (self.folder / "out.txt").read_text()

    def results(self) -> dict[str, RunResult]:
        return {path.stem: read_result(path) for path in (self.folder / RUNS).glob("*.json")}

    def check(self) -> None:
        """All is measured, the table is of it, and nothing is left to do."""
        results = self.results()
        assert set(results) == NAMES
        assert all(output.equal for result in results.values() for output in result.outputs)
        threads = {result.provenance["device"]["threads"] for result in results.values()}
        assert threads == {1}
        ablation = read_ablation(self.folder / "results/ablation.json")
        assert {facts.name for facts in ablation.configurations} == NAMES
        assert all(facts.lossless for facts in ablation.configurations)
        assert planned(self.folder, TABLE) == {}


@pytest.fixture
def pipeline(slurm, tmp_path):  # noqa: F811
    folder = tmp_path / "project"
    copy_project(folder)
    config = folder / "config.yaml"
    text, _, _ = config.read_text().partition("\ntables:")
    config.write_text(text + CLUSTER)
    pipeline = Pipeline(folder, slurm)
    yield pipeline
    if pipeline.process.poll() is None:
        pipeline.process.kill()


def test_lost_jobs_and_a_lost_node_end_in_a_complete_table(pipeline):
    cluster = pipeline.cluster
    # One configuration's job is taken away while it runs.
    pipeline.start()
    job = pipeline.measuring()
    facts = cluster.ask("scontrol", "show", "job", job)
    assert "TresPerJob=gres:gpu:h200:1" in facts
    assert "MinMemoryNode=500M" in facts
    assert "TimeLimit=00:07:00" in facts
    assert "Requeue=0" in facts
    cluster.ask("scancel", job)
    # The node goes while the other's runs on it, and comes back.
    assert pipeline.measuring(but=job) != job
    cluster.pull_node()
    cluster.start_node()
    assert pipeline.finish() != 0, pipeline.output()
    # Which is said of the others depends on what of the node was heard last, and how many there
    # are on what had been begun by then.
    # They are told in the order in which Snakemake asks, so each is known by its number.
    ends = dict(
        re.findall(r"SLURM-job '(\d+)' failed.*, SLURM status is: '(\w+)'", pipeline.output())
    )
    assert ends.pop(job) == "CANCELLED"
    assert len(ends) >= 1
    assert set(ends.values()) <= {"NODE_FAIL", "FAILED"}
    assert pipeline.results() == {}
    assert not (pipeline.folder / TABLE).exists()

    pipeline.start()
    assert pipeline.finish() == 0, pipeline.output()
    pipeline.check()

    # Asking a cluster for more makes nothing stale; other measurements are made as an array.
    replace(pipeline.folder / "config.yaml", "minutes: 7", "minutes: 9")
    assert planned(pipeline.folder, TABLE) == {}
    replace(pipeline.folder / "config.yaml", "runs: 2", "runs: 3")
    pipeline.start("--slurm-array-jobs=measure")
    assert pipeline.finish() == 0, pipeline.output()
    assert "Submitted array job" in pipeline.output()
    pipeline.check()
