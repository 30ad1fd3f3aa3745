"""Faults, injected: nothing is lost, and the message says what to do."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
import synthetic
import yaml
from micro_pair import micro, study  # noqa: F401 - micro is a fixture
from safetensors.torch import load_file, save_file
from test_workflow import command, copy_project, planned, snakemake

from dynatree import clock
from dynatree.aggregate import aggregate
from dynatree.certificate import read_certificate, write_certificate
from dynatree.clock import Timespan
from dynatree.config import parse_config
from dynatree.errors import ClockError, FileError, PairError, ResultError
from dynatree.facts import SEAL, sealed
from dynatree.failures import failure_path
from dynatree.files import write_text
from dynatree.measure import measure
from dynatree.pairs import load_models
from dynatree.results import read_result, write_result
from dynatree.sources import PACKAGE, source_digest

CONFIGS = {
    "ar": {"strategy": "autoregressive"},
    "tree": {"strategy": "tree", "depth": 2, "branch_factor": 2},
}
FAULTS = "faults injected"
PATHS = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
"""What a process needs to run the same code as the tests."""


@pytest.fixture(scope="session")
def config(micro):  # noqa: F811
    return parse_config(
        study(micro, ["Return a list"], CONFIGS, runs=1, warmup=1, max_new_tokens=4)
    )


class Jobs:
    """Measuring jobs of one configuration, in forks of a process that has loaded everything."""

    def __init__(self, spec, folder):
        self.spec, self.folder = spec.canonical(), folder
        self.out = folder / "runs" / "tree.json"
        self._process = subprocess.Popen(
            [sys.executable, Path(__file__).parent / "zygote.py", self.spec],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | PATHS,
        )
        assert self._process.stdout.readline() == "ready\n"

    def run(self, load=False, spec=None, out=None, **fault):
        """The exit status of a job, and what it printed."""
        log = self.folder / "log"
        request = {
            "spec": spec or self.spec,
            "out": str(out or self.out),
            "log": str(log),
            "load": load,
            **fault,
        }
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline()), log.read_text()

    def left(self):
        """The names of the files where the result should be, beside it and why there is none."""
        known = (self.out, failure_path(self.out))
        return [path.name for path in self.out.parent.glob("*") if path not in known]

    def close(self):
        self._process.stdin.close()
        self._process.wait()


@pytest.fixture(scope="module")
def preloaded(config, tmp_path_factory):
    started = Jobs(config.spec("tree"), tmp_path_factory.mktemp("jobs"))
    yield started
    started.close()


@pytest.fixture
def jobs(preloaded):
    """The jobs, with no result yet."""
    shutil.rmtree(preloaded.out.parent, ignore_errors=True)
    return preloaded


# A measuring job is stopped.

STOPPED = {
    signal.SIGKILL: -signal.SIGKILL,
    signal.SIGTERM: 143,
    signal.SIGINT: 130,
}
STAGES = {
    "the models": ("from_pretrained", 1),
    "the prompts": ("encode_prompts", 1),
    "preparation": ("prepare", 1),
    "the warm-up": ("timed", 1),
    "a timed run": ("timed", 4),
    "a forward": ("forward", 9),
    "the comparison": ("compare", 1),
    "provenance": ("provenance", 1),
    "validation": ("_validated", 1),
    # The first temporary file is that of `require_writable`.
    "the temporary file": ("mkstemp", 2),
    "written, not yet safe": ("fsync", 1),
    "safe, not yet in its place": ("chmod", 1),
}


@pytest.mark.parametrize("number", STOPPED, ids=lambda number: number.name)
def test_a_job_stopped_at_any_stage_leaves_no_result(jobs, number, record_property):
    for stage, moment in STAGES.items():
        status, said = jobs.run(load=stage == "the models", kill=[moment, number])
        assert status == STOPPED[number], (stage, said)
        assert not jobs.out.exists(), stage
        if number != signal.SIGKILL:
            assert "run the same command again" in said
            assert "Traceback" not in said
            assert jobs.left() == [], stage
    # The last one is of the record of an earlier failure: the result is in its place.
    count = jobs.folder / "count"
    assert jobs.run(count=str(count))[0] == 0
    jobs.out.unlink()
    last = json.loads(count.read_text())["unlink"]
    status, said = jobs.run(kill=[("unlink", last), number])
    assert status == STOPPED[number], said
    assert read_result(jobs.out).spec.name == "tree"
    record_property(FAULTS, len(STAGES) + 1)


RANDOM_MOMENTS = 60


@pytest.mark.parametrize("number", STOPPED, ids=lambda number: number.name)
def test_a_job_stopped_at_any_moment_leaves_a_whole_result_or_none(jobs, number, record_property):
    count = jobs.folder / "count"
    assert jobs.run(count=str(count))[0] == 0
    counted = json.loads(count.read_text())
    first, whole = read_result(jobs.out), jobs.out.read_bytes()
    moments = random.Random(int(number))
    written = 0
    for index in range(RANDOM_MOMENTS):
        # Half of them while the result is written, which takes next to no time; half of them where
        # there is an older result.
        begin = counted["calls before writing"] if index % 2 else 50
        moment = moments.randrange(begin, counted["calls"])
        older = index % 4 < 2
        jobs.out.unlink(missing_ok=True)
        if older:
            jobs.out.write_bytes(whole)
        status, said = jobs.run(kill=[moment, number])
        # An interrupt that comes in a callback, such as a weak reference's, is lost: the job ends.
        assert status in (STOPPED[number], 0), (moment, said)
        assert "Traceback" not in said or "Exception ignored" in said, (moment, said)
        if older or jobs.out.exists():
            assert read_result(jobs.out).spec == first.spec
            written += jobs.out.read_bytes() != whole
        assert status != 0 or jobs.out.read_bytes() != whole
        assert all(name.startswith(".tree.json.") for name in jobs.left())
    assert written < RANDOM_MOMENTS
    # What is left over is in nobody's way.
    assert jobs.run()[0] == 0
    assert read_result(jobs.out).started > first.started
    record_property(FAULTS, RANDOM_MOMENTS)


# Files that cannot be written.


@pytest.mark.parametrize("older", [False, True])
def test_a_full_disk_is_said_and_the_older_result_stays(jobs, older, record_property):
    if older:
        assert jobs.run()[0] == 0
    before = jobs.out.read_bytes() if older else None
    status, said = jobs.run(file_size=2000)
    assert status == 1
    assert f"error: {jobs.out}: cannot be written (File too large)" in said
    assert "free space" in said
    assert "run the same command again" in said
    assert (jobs.out.read_bytes() if jobs.out.exists() else None) == before
    assert jobs.left() == []
    record_property(FAULTS, 1)


def test_a_full_file_system_is_said(tmp_path, record_property):
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    # In a mount namespace of its own, so that nothing is left mounted whatever happens.
    script = """
import sys
from pathlib import Path
from dynatree.errors import FileError
from dynatree.files import write_text
out = Path(sys.argv[1]) / "out.txt"
write_text(out, "old")
try:
    write_text(out, "x" * 200_000)
except FileError as error:
    print(error)
assert out.read_text() == "old" and list(out.parent.iterdir()) == [out]
"""
    mounted = f"mount -t tmpfs -o size=64k none {tmp_path} && exec {sys.executable} -c '{script}' "
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", f"{mounted} {tmp_path}"],
        env=os.environ | PATHS,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if "unshare" in done.stdout or "mount:" in done.stdout:
        pytest.skip(f"no file system can be mounted here: {done.stdout}")
    assert "cannot be written (No space left on device); what was there before" in done.stdout
    assert done.returncode == 0, done.stdout
    record_property(FAULTS, 1)


def test_a_read_only_folder_is_said_before_anything_is_measured(jobs, record_property):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        results = folder / "results"
        results.mkdir(mode=0o555)
        results.chmod(0o555)
        status, said = jobs.run(out=results / "tree.json", unprivileged=os.geteuid() == 0)
        assert list(results.iterdir()) == []
    assert status == 1
    assert "cannot be written (Permission denied)" in said
    assert "make its folder writable" in said
    assert "generations" not in said
    record_property(FAULTS, 1)


def test_a_file_in_the_place_of_the_folder_is_said(tmp_path, record_property):
    (tmp_path / "results").write_text("a file")
    with pytest.raises(FileError, match=r"run\.json: cannot be written \(File exists\).*correct"):
        write_text(tmp_path / "results" / "run.json", "text")
    record_property(FAULTS, 1)


# Models.


@pytest.mark.parametrize("role", ["target", "draft"])
def test_logits_that_are_no_numbers_give_an_error_and_no_result(
    config,
    jobs,
    micro,  # noqa: F811
    tmp_path,
    role,
    record_property,
):
    shutil.copytree(micro, tmp_path / "pair")
    weights = tmp_path / "pair" / role / "model.safetensors"
    tensors = load_file(weights)
    tensors["gpt_neox.final_layer_norm.weight"].fill_(float("nan"))
    save_file(tensors, weights, metadata={"format": "pt"})
    data = json.loads(config.spec("tree").canonical())
    for name in ("target", "draft"):
        data["models"][name]["path"] = str(tmp_path / "pair" / name)
    status, said = jobs.run(load=True, spec=json.dumps(data))
    assert status == 1
    assert "error: " in said
    assert "NaN" in said
    assert role in said
    assert not jobs.out.exists()
    record_property(FAULTS, 1)


@pytest.fixture
def copied(micro, tmp_path):  # noqa: F811
    return Path(shutil.copytree(micro, tmp_path / "pair"))


def test_truncated_weights_are_refused_wherever_they_end(config, copied, record_property):
    models = parse_config(study(copied, ["Return"], CONFIGS)).spec("ar").models
    weights = copied / "draft" / "model.safetensors"
    whole = weights.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    sizes = [0, 1, 7, 8, 9, header // 2, header + 7, header + 8, header + 9, len(whole) - 1]
    for size in sizes:
        weights.write_bytes(whole[:size])
        with pytest.raises(PairError, match=r"pairs\.p\.draft: .*(damaged|cannot be loaded)"):
            load_models("p", models)
    weights.write_bytes(b"\xff" * 8 + whole[8:])
    with pytest.raises(PairError, match=r"pairs\.p\.draft: .*(damaged|cannot be loaded)"):
        load_models("p", models)
    record_property(FAULTS, len(sizes) + 1)


def test_models_that_change_between_jobs_are_noticed(copied, tmp_path, record_property):
    config = parse_config(study(copied, ["Return a list"], CONFIGS, runs=1, max_new_tokens=4))
    for name in ("ar", "tree"):
        spec = config.spec(name)
        result = measure(spec, load_models(spec.pair, spec.models))
        write_result(tmp_path / "runs" / "micro" / f"{name}.json", result)
        weights = copied / "draft" / "model.safetensors"
        tensors = load_file(weights)
        tensors["gpt_neox.final_layer_norm.bias"] += 1
        save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ResultError, match=r"ar\.json.*other model weights") as raised:
        aggregate(config, tmp_path / "runs", source_digest(PACKAGE / "measure.py"))
    # The targets are equal: the drafts' digests must be shown too.
    one, other = re.findall(r"\b(\w{12}:\w{12})\b", str(raised.value))
    assert one != other
    assert "remove it and run: snakemake" in str(raised.value)
    record_property(FAULTS, 1)


def test_models_that_change_while_they_are_loaded_are_refused(copied, monkeypatch, record_property):
    models = parse_config(study(copied, ["Return"], CONFIGS)).spec("ar").models
    weights = copied / "target" / "model.safetensors"
    monkeypatch.setattr("dynatree.pairs._check_vocabularies", lambda *_: os.utime(weights, (1, 1)))
    with pytest.raises(PairError, match=r"target/model\.safetensors was written while .* again"):
        load_models("p", models)
    record_property(FAULTS, 1)


# Clocks.


def test_a_time_of_day_that_is_set_back_changes_no_result(monkeypatch, record_property):
    class SetBack(datetime):
        hour = 12

        @classmethod
        def now(cls, zone=None):
            cls.hour -= 1
            return datetime(2026, 1, 1, cls.hour, tzinfo=UTC)

    monkeypatch.setattr(clock, "datetime", SetBack)
    span = Timespan()
    assert span.now > span.started
    assert (span.now - span.started).total_seconds() < 3600
    record_property(FAULTS, 1)


@pytest.mark.parametrize("step", [-1.0, 0.0])
def test_a_monotonic_clock_that_is_not_is_an_error(config, monkeypatch, step, record_property):
    spec = config.spec("tree")
    pair = load_models(spec.pair, spec.models)
    now = [1e6]

    def backwards():
        now[0] += step
        return now[0]

    monkeypatch.setattr("time.perf_counter", backwards)
    with pytest.raises(ClockError, match=r"clock moved by .* run the same command again"):
        measure(spec, pair)
    record_property(FAULTS, 1)


# Result files that are not what was written.


def test_a_changed_bit_anywhere_is_refused(tmp_path, record_property):
    config = synthetic.config(prompts=1, runs=1)
    path = tmp_path / "tree.json"
    result = synthetic.result(config.spec("tree"))
    write_result(path, result)
    whole = path.read_bytes()
    moments = random.Random(0)
    flips = 400
    refused = 0
    for _ in range(flips):
        data = bytearray(whole)
        data[moments.randrange(len(data))] ^= 1 << moments.randrange(8)
        path.write_bytes(data)
        try:
            read = read_result(path)
        except ResultError:
            refused += 1
        else:
            # White space between entries has become other white space.
            assert read == result
            assert json.loads(data) == json.loads(whole)
    assert refused > 0.8 * flips
    record_property(FAULTS, flips)


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda data: data.update(peak_memory_bytes=5), f"{SEAL} is not the digest"),
        (lambda data: data["provenance"].update(seed=9), f"{SEAL} is not the digest"),
        (lambda data: data.pop(SEAL), f"holds no {SEAL}: written by an older DynaTree, or edited"),
        (lambda data: data.update({SEAL: None}), f"holds no {SEAL}"),
    ],
)
def test_an_edit_that_makes_sense_is_refused_too(tmp_path, edit, reason, record_property):
    config = synthetic.config()
    path = tmp_path / "tree.json"
    write_result(path, synthetic.result(config.spec("tree")))
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ResultError, match=f"{reason}.*remove it and run: snakemake"):
        read_result(path)
    record_property(FAULTS, 1)


def test_a_key_given_twice_is_refused(tmp_path):
    path = tmp_path / "tree.json"
    write_result(path, synthetic.result(synthetic.config().spec("tree")))
    text = path.read_text()
    path.write_text(text.replace(' "pair_digest"', ' "pair_digest": "x",\n "pair_digest"', 1))
    with pytest.raises(ResultError, match="pair_digest is given twice"):
        read_result(path)


def test_layout_may_change_and_meaning_not(tmp_path):
    path = tmp_path / "tree.json"
    result = synthetic.result(synthetic.config().spec("tree"))
    write_result(path, result)
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data))
    assert read_result(path) == result
    path.write_text(json.dumps(data, sort_keys=True))
    with pytest.raises(ResultError, match="is not the digest"):
        read_result(path)


@pytest.mark.parametrize("version", [1, 2, 4, "3", None, True])
def test_a_result_of_another_schema_is_refused_by_its_version(tmp_path, version, record_property):
    path = tmp_path / "tree.json"
    write_result(path, synthetic.result(synthetic.config().spec("tree")))
    data = json.loads(path.read_text())
    del data[SEAL]
    # What it holds besides would not fit either, and is not what is said.
    data.update(schema_version=version, tokens_per_second=1.0)
    path.write_text(sealed(json.dumps(data)))
    with pytest.raises(
        ResultError,
        match=f"schema_version is {version!r}, and this DynaTree reads 3; .*remove it and run",
    ):
        read_result(path)
    record_property(FAULTS, 1)


def test_a_certificate_is_sealed_too(tmp_path, record_property):
    path = tmp_path / "certificate.json"
    write_certificate(path, synthetic.certificate(synthetic.config()))
    text = path.read_text()
    assert text.count(synthetic.WEIGHTS) == 1
    path.write_text(text.replace(synthetic.WEIGHTS, "d" * 64))
    with pytest.raises(ResultError, match=f"not a valid certificate .{SEAL} is not the digest"):
        read_certificate(path)
    record_property(FAULTS, 1)


# Pipelines.

GATE = """#!/bin/sh
echo $$ >> {folder}/waiting
while [ ! -e {folder}/open ]; do sleep 0.05; done
exec {python} "$@"
"""


def until(condition, seconds=300):
    """Waits for `condition`; what it returns."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)
    return found


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"


def test_pipelines_side_by_side_and_jobs_that_outlive_theirs(
    micro,  # noqa: F811
    tmp_path,
    record_property,
):
    """A second pipeline in the folder is refused. The first is killed and its job goes on; after
    `--unlock` the pipeline is run again beside it, and both jobs write the same result.
    """
    project = copy_project(tmp_path / "project")
    data = study(micro, ["Return a list"], CONFIGS, runs=1, max_new_tokens=4)
    data["tables"] = {"forward": ["ar"]}
    (project / "config.yaml").write_text(yaml.safe_dump(data))
    run = project / "results/runs/micro/ar.json"
    target = str(run.relative_to(project))
    gate = tmp_path / "gate"
    gate.mkdir()
    (gate / "python").write_text(GATE.format(folder=gate, python=sys.executable))
    (gate / "python").chmod(0o755)
    waiting = gate / "waiting"
    # Snakemake by its path, so that the gate is in the way of jobs alone.
    pipeline = (sys.executable, "-m", "snakemake", "--cores", "1", target)
    environment = os.environ | {
        "PATH": f"{gate}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(project / "src"),
        "OMP_NUM_THREADS": "1",
    }
    with (tmp_path / "first.log").open("w") as log:
        first = subprocess.Popen(
            pipeline,
            cwd=project,
            env=environment,
            stdout=log,
            stderr=log,
        )
    try:
        orphan = int(until(lambda: waiting.exists() and waiting.read_text()))

        second = command(project, *pipeline, path=gate)
        assert second.returncode != 0
        assert "--unlock" in second.stdout
        assert waiting.read_text() == f"{orphan}\n"

        first.kill()
        first.wait()
        assert alive(orphan)
        killed = command(project, *pipeline, path=gate)
        assert killed.returncode != 0
        assert "--unlock" in killed.stdout
        assert not run.exists()

        assert snakemake(project, "--unlock").returncode == 0
        (gate / "open").touch()
        again = command(project, *pipeline, path=gate)
        assert again.returncode == 0, again.stdout
        until(lambda: not alive(orphan))
        assert len(waiting.read_text().split()) == 2
        assert read_result(run).spec.name == "ar"
        assert planned(project, target) == {}
        record_property(FAULTS, 3)
    finally:
        first.kill()
        (gate / "open").touch()
