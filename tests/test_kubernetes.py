"""The profile for Kubernetes and the images: what pods are asked for, and that jobs share no files.

No cluster and no container engine is needed: an API server that only pretends takes the jobs and
runs their containers' commands as processes in empty folders, with the volume where it would be.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from micro_pair import micro  # noqa: F401 - a fixture
from test_workflow import HANGS, append, command, copy_project

from dynatree.results import read_result

PROJECT = Path(__file__).resolve().parent.parent
RUN = "results/runs/local/linear.json"
CLUSTER = "\ncluster: {threads: 2, memory_mb: 700}\n"


class PretendCluster(ThreadingHTTPServer):
    """Answers what the plugin asks of an API server.

    Attributes:
        jobs: what was submitted, by name.
        ended: exit status and output of each job's container.
    """

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.jobs = {}
        self.ended = {}

    def run(self, job):
        name = job["metadata"]["name"]
        self.jobs[name] = job
        container = job["spec"]["template"]["spec"]["containers"][0]
        workdir = self.folder / name
        tools = self.folder / "tools"
        workdir.mkdir()
        tools.mkdir(exist_ok=True)
        # What pods install is there already.
        (tools / "pip").write_text("#!/bin/sh\n")
        (tools / "pip").chmod(0o755)
        environment = os.environ | {
            "PATH": f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(workdir / "src"),
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(
            [*container["command"], *container["args"]],
            cwd=workdir,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=HANGS,
        )
        self.ended[name] = (done.returncode, done.stdout)


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path.endswith("/jobs"):
            self.server.run(body)
        self._answer(body, 201)

    def do_GET(self):
        if "/jobs/" in self.path:
            status, _ = self.server.ended[self.path.split("/")[-2]]
            self._answer({"kind": "Job", "status": {"failed" if status else "succeeded": 1}})
        else:
            self._answer({"kind": "PodList", "items": []})

    def do_DELETE(self):
        self._answer({"kind": "Status", "status": "Success"})

    def log_message(self, *arguments):
        pass

    def _answer(self, body, status=200):
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def cluster(tmp_path):
    server = PretendCluster(tmp_path)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def volume(tmp_path, micro):  # noqa: F811
    """A checkout on the volume, with a pair that is there already."""
    folder = tmp_path / "volume"
    copy_project(folder)
    config = folder / "config.yaml"
    text = config.read_text().replace("pair: micro", "pair: local")
    config.write_text(text.replace("results/pairs/micro", str(micro)))
    append(config, CLUSTER)
    for arguments in (("init", "-q"), ("add", ".")):
        assert command(folder, "git", *arguments).returncode == 0
    return folder


def kubeconfig(cluster, path):
    """A file that names the pretended cluster."""
    host, port = cluster.server_address
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {"server": f"http://{host}:{port}"}}],
        "users": [{"name": "u", "user": {"token": "none"}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "c",
    }
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.rsync
def test_a_measurement_in_a_pod_that_shares_no_files(cluster, volume, tmp_path, monkeypatch):
    monkeypatch.setenv("KUBECONFIG", str(kubeconfig(cluster, tmp_path / "kubeconfig")))
    done = command(
        volume,
        *("python", "-m", "snakemake", RUN, "--workflow-profile", "profiles/kubernetes"),
        *("--default-storage-prefix", str(volume), "--seconds-between-status-checks", "1"),
        *("--kubernetes-persistent-volumes", f"dynatree:{volume}"),
        *("--container-image", "example/dynatree:1"),
    )
    told = done.stdout[-3000:] + "".join(output[-3000:] for _, output in cluster.ended.values())
    assert done.returncode == 0, told
    result = read_result(volume / RUN)
    assert result.spec.pair == "local"
    (job,) = cluster.jobs.values()
    pod = job["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert container["image"] == "example/dynatree:1"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert container["resources"]["requests"] == {
        "cpu": "1900m",
        "memory": "700M",
        "nvidia.com/gpu": "1",
        "ephemeral-storage": container["resources"]["requests"]["ephemeral-storage"],
    }
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounted == {"workdir": "/workdir", "dynatree": str(volume)}
    claims = [entry.get("persistentVolumeClaim") for entry in pod["volumes"]]
    assert {"claimName": "dynatree"} in claims
    # The job wrote into its own folder, and Snakemake took the result from there.
    (workdir,) = tmp_path.glob("snakejob-*")
    assert (workdir / "scripts/measure.py").is_file()
    assert not (workdir / RUN).exists()


def lines(name):
    return (PROJECT / name).read_text().splitlines()


def test_the_images_copy_what_is_there():
    kept = {line[1:] for line in lines(".dockerignore") if line.startswith("!")}
    copied = [
        source
        for line in lines("Dockerfile")
        if line.startswith("COPY ")
        for source in shlex.split(line)[1:-1]
    ]
    assert copied
    assert {source.rstrip("/").split("/")[0] for source in copied} == kept
    text = (PROJECT / "envs/dynatree.def").read_text()
    files = re.search(r"^%files\n((?:    .*\n)+)", text, flags=re.MULTILINE)[1].splitlines()
    assert {line.split()[0] for line in files} == set(copied)
    assert all((PROJECT / source).exists() for source in copied)


def test_both_images_install_the_same():
    def installed(name):
        text = (PROJECT / name).read_text().replace("\\\n", " ")
        packages = re.search(r"apt-get install --yes --no-install-recommends ([\w+ -]+)", text)[1]
        extras = re.search(r"pip install .*'\.\[(.*)\]'", text)[1]
        return packages.split(), extras.split(",")

    assert installed("Dockerfile") == installed("envs/dynatree.def")
