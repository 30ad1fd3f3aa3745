"""The real pipeline on a real SLURM: what jobs ask for, and what is left when jobs and nodes go."""

import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from slurm_cluster import MARK, slurm, wait_for  # noqa: F401 - a fixture
from test_workflow import NAMES, TABLE, append, copy_project, planned

from dynatree.ablation import read_ablation
from dynatree.results import read_result

pytestmark = pytest.mark.slurm

RUNS = Path("results/runs/micro")
CLUSTER = "\ncluster: {threads: 1, memory_mb: 500, minutes: 7, gpu_model: h200}\n"
# Clusters are asked less often, have slower file systems, and keep accounts, which `sacct` reads.
HASTE = (
    "--slurm-status-command=squeue",
    "--slurm-init-seconds-before-status-checks=1",
    "--seconds-between-status-checks=1",
    "--latency-wait=5",
)


class Pipeline:
    """`snakemake` with the profile for SLURM, in a copy of the project."""

    def __init__(self, folder: Path, cluster):
        self.folder = folder
        self.cluster = cluster

    def start(self) -> subprocess.Popen:
        environment = os.environ | {
            "PATH": f"{self.cluster.bin}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(self.folder / "src"),
            "OMP_NUM_THREADS": "1",
            MARK: str(self.cluster.folder),
        }
        profile = ("--workflow-profile", "profiles/slurm")
        return subprocess.Popen(
            [sys.executable, "-m", "snakemake", TABLE, *profile, *HASTE],
            cwd=self.folder,
            env=environment,
            text=True,
            stdout=(self.folder / "out.txt").open("w"),
            stderr=subprocess.STDOUT,
        )

    def measuring(self, process: subprocess.Popen) -> list[str]:
        """Ids of the measuring jobs that run."""
        if process.poll() is not None:
            pytest.fail(f"ended before a measurement ran:\n{self.output()}")
        return self.cluster.running("measure")

    def output(self) -> str:
        return (self.folder / "out.txt").read_text()

    def finish(self, process: subprocess.Popen) -> int:
        try:
            return process.wait(timeout=120)
        except subprocess.TimeoutExpired:
            process.kill()
            pytest.fail(self.output()[-4000:])

    def results(self) -> set[str]:
        return {path.stem for path in (self.folder / RUNS).iterdir()}


@pytest.fixture
def pipeline(slurm, tmp_path):  # noqa: F811
    folder = tmp_path / "project"
    copy_project(folder)
    append(folder / "config.yaml", CLUSTER)
    # What runs on the node is called by its mark; this process must not be.
    assert MARK not in psutil.Process().environ()
    return Pipeline(folder, slurm)


def test_lost_jobs_and_a_lost_node_end_in_a_complete_table(pipeline):
    cluster = pipeline.cluster
    # A configuration's job is taken away while it runs; the others go on.
    process = pipeline.start()
    job = wait_for(lambda: pipeline.measuring(process), "a measurement", cluster, 120)[0]
    facts = cluster.ask("scontrol", "show", "job", job)
    assert re.search(r"ArrayJobId=\d+ ArrayTaskId=\d", facts)
    assert "TresPerJob=gres:gpu:h200:1" in facts
    assert "MinMemoryNode=5" in facts  # the plugin adds what an array needs to know of its tasks
    assert "TimeLimit=00:07:00" in facts
    assert "Requeue=0" in facts
    cluster.ask("scancel", job)
    assert pipeline.finish(process) != 0, pipeline.output()
    left = set(NAMES) - pipeline.results()
    assert len(left) == 1
    for name in pipeline.results():
        read_result(pipeline.folder / RUNS / f"{name}.json")
    assert not (pipeline.folder / TABLE).exists()

    # The node goes while the next attempt runs on it, and comes back.
    process = pipeline.start()
    wait_for(lambda: pipeline.measuring(process), "the lost measurement", cluster)
    cluster.pull_node()
    assert not (pipeline.folder / RUNS / f"{left.pop()}.json").exists()
    cluster.start_node()
    assert pipeline.finish(process) != 0, pipeline.output()
    assert not (pipeline.folder / TABLE).exists()

    assert pipeline.finish(pipeline.start()) == 0, pipeline.output()
    assert pipeline.results() == set(NAMES)
    results = [read_result(pipeline.folder / RUNS / f"{name}.json") for name in NAMES]
    assert all(output.equal for result in results for output in result.outputs)
    assert {result.provenance["device"]["threads"] for result in results} == {1}
    ablation = read_ablation(pipeline.folder / "results/ablation.json")
    assert sorted(facts.name for facts in ablation.configurations) == sorted(NAMES)
    assert all(facts.lossless for facts in ablation.configurations)
    assert (pipeline.folder / TABLE).read_text().count(r"\\") >= len(NAMES)
    # Nothing is left to do, and asking a cluster for more makes nothing stale.
    assert planned(pipeline.folder, TABLE) == {}
    text = (pipeline.folder / "config.yaml").read_text()
    (pipeline.folder / "config.yaml").write_text(text.replace("minutes: 7", "minutes: 9"))
    assert planned(pipeline.folder, TABLE) == {}
