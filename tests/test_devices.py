"""Each job has a GPU or cores to itself: real processes, a pretended NVML, no GPU."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from dynatree import devices
from dynatree.devices import DeviceError, Unit, cores, flagged, gpus, taken
from dynatree.jobs import running

FAKES = Path(__file__).parent / "fakes"
GPUS = [[f"GPU-{letter * 4}", f"Pretended {letter.upper()}"] for letter in "abcd"]
UUIDS = [uuid for uuid, _ in GPUS]

JOB = """
import os, sys
from dynatree.devices import taken
device, threads, what, busy = sys.argv[1:]
with taken(device, int(threads), what, busy):
    print("has", os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
    sys.stdin.read()
"""
"""Takes a device and has it until its input ends."""


@pytest.fixture
def nvml(tmp_path, monkeypatch):
    """A host with four GPUs, for this process and those it starts; changes what NVML says."""
    path = tmp_path / "nvml.json"
    monkeypatch.setenv("FAKE_NVML", str(path))
    monkeypatch.setenv(devices.FOLDER, str(tmp_path / "locks"))
    # First set, so that it is put back to what it was whatever a test's jobs make of it.
    monkeypatch.setenv(devices.VISIBLE, "")
    monkeypatch.delenv(devices.VISIBLE)
    monkeypatch.syspath_prepend(str(FAKES))
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    source = str(Path(devices.__file__).parents[1])
    monkeypatch.setenv("PYTHONPATH", f"{FAKES}:{source}")
    monkeypatch.setattr(devices, "POLL", 0.01)

    def say(**known):
        path.write_text(json.dumps({"gpus": GPUS, **known}))

    say()
    yield say
    sys.modules.pop("pynvml", None)


@pytest.fixture
def start():
    """Starts jobs, and ends them with the test."""
    jobs = []

    def started(device="cuda", what="a job", busy="wait", threads=1, code=JOB):
        job = subprocess.Popen(
            [sys.executable, "-c", code, device, str(threads), what, busy],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        jobs.append(job)
        return job

    yield started
    for job in jobs:
        job.kill()
        with job:
            pass


def got(job):
    """What the job sees once it has a device."""
    for line in job.stdout:
        if line.startswith("has "):
            return line.split()[1]
    raise AssertionError(f"the job ended with {job.wait()} and took nothing")


def said(job):
    """The next thing that the job says."""
    return job.stdout.readline().strip()


# Locks, between real processes.


def test_four_jobs_have_four_gpus_and_a_fifth_waits_for_one_that_is_killed(nvml, start):
    jobs = [start(what=f"measure {name}") for name in "wxyz"]
    has = [got(job) for job in jobs]
    assert sorted(has) == UUIDS
    fifth = start(what="measure late")
    waiting = said(fifth)
    assert waiting.startswith("measure late: waits, ")
    for job, name, uuid in zip(jobs, "wxyz", has, strict=True):
        gpu = f"GPU {UUIDS.index(uuid)} (Pretended {uuid[-1].upper()})"
        assert f"{gpu} is held by process {job.pid} (measure {name})" in waiting
    jobs[2].send_signal(signal.SIGKILL)
    assert got(fifth) == has[2]


def test_a_job_that_ends_gives_its_gpu_back(nvml, start):
    nvml(gpus=GPUS[:1])
    first = start()
    assert got(first) == UUIDS[0]
    second = start(what="second")
    assert "is held by process" in said(second)
    first.stdin.close()
    assert got(second) == UUIDS[0]


STARTER = """
import subprocess, sys
job = subprocess.Popen([sys.executable, "-c", *sys.argv[1:]], stdin=subprocess.PIPE)
print("started", job.pid, flush=True)
job.wait()
"""


def test_an_orphan_goes_on_holding_its_gpu(nvml, start):
    nvml(gpus=GPUS[:1])
    with subprocess.Popen(
        [sys.executable, "-c", STARTER, SLEEPER, "cuda", "1", "orphan", "wait"],
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        lines = [parent.stdout.readline() for _ in range(3)]
        (pid,) = (int(line.split()[1]) for line in lines if line.startswith("started"))
        assert any(line.startswith("has ") for line in lines)
        parent.kill()
    late = start(what="late")
    assert f"is held by process {pid} (orphan)" in said(late)
    os.kill(pid, signal.SIGKILL)
    assert got(late) == UUIDS[0]


# Its input would end with its parent.
SLEEPER = JOB.replace("import os, sys", "import os, sys, time").replace(
    "sys.stdin.read()", "time.sleep(100)"
)


def test_jobs_on_the_cpu_do_not_share_cores(nvml, start):
    every = len(cores())
    first = start("cpu", "first", threads=every + 1)
    assert said(first) == f"first: runs on all {every} cores"
    second = start("cpu", "second")
    assert said(second) == f"second: waits, a core is held by process {first.pid} (first)"
    first.kill()
    assert said(second).startswith("second: runs on ")


def test_jobs_with_few_threads_have_cores_of_their_own(nvml, monkeypatch):
    pinned = []
    monkeypatch.setattr(devices, "cores", lambda: [Unit(f"core-{n}", f"core {n}") for n in "0123"])
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, wanted: pinned.append(set(wanted)))
    allowed = os.sched_getaffinity(0)
    with taken("cpu", 2, "one", say=print) as one, taken("cpu", 2, "other", say=print) as other:
        assert (one.name, other.name) == ("core 0, core 1", "core 2, core 3")
        assert pinned == [{0, 1}, {2, 3}]
        assert one.shared_with() == []
    assert pinned[-1] == allowed


def test_half_of_the_cores_are_given_back_while_a_job_waits_for_all(nvml, start, monkeypatch):
    four = [Unit(f"core-{n}", f"core {n}") for n in "0123"]
    monkeypatch.setattr(devices, "cores", lambda: four)
    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: None)
    waits = []

    def hear(text):
        waits.append(text)
        if "waits" in text:
            # Another takes what the waiting job could not use, and both get done.
            with taken("cpu", 2, "small", say=waits.append):
                pass
            first.kill()

    monkeypatch.setenv("PYTHONPATH", f"{FAKES}:{Path(devices.__file__).parents[1]}")
    first = subprocess.Popen(
        [sys.executable, "-c", FOUR_CORES + JOB, "cpu", "2", "first", "wait"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    got(first)
    with taken("cpu", 4, "large", say=hear):
        pass
    first.communicate()
    held = f"a core is held by process {first.pid} (first)"
    assert waits == [
        f"large: waits, {held}",
        "small: runs on core 2, core 3",
        "large: runs on all 4 cores",
    ]


FOUR_CORES = """
import os
from dynatree import devices
devices.cores = lambda: [devices.Unit(f"core-{n}", f"core {n}") for n in "0123"]
os.sched_setaffinity = lambda *_: None
"""


def test_every_user_can_take_the_locks(nvml, tmp_path):
    before = os.umask(0o077)
    try:
        with taken("cuda", 1, "mine", say=print):
            pass
    finally:
        os.umask(before)
    folder = tmp_path / "locks"
    assert folder.stat().st_mode & 0o7777 == 0o777
    modes = {path.name: path.stat().st_mode & 0o666 for path in folder.glob("*.lock")}
    assert modes == {"taking.lock": 0o666, f"{UUIDS[0]}.lock": 0o666}


def test_a_folder_that_cannot_be_used_is_named_with_the_cure(nvml, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv(devices.FOLDER, str(tmp_path / "file"))
    with pytest.raises(DeviceError, match=rf"{tmp_path}/file: .*set DYNATREE_LOCKS to a folder"):
        taken("cuda", 1, "mine").__enter__()


ENDING = f"""{JOB}
print("released", flush=True)
import time
time.sleep(100)
"""
"""Lives on without its lock, as a process does whose CUDA context is torn down."""


@pytest.mark.parametrize("busy", ["wait", "refuse", "flag"])
def test_a_job_that_is_ending_is_waited_for_and_no_stranger(nvml, start, busy):
    first = start(what="first", code=ENDING)
    assert got(first) == UUIDS[0]
    nvml(gpus=GPUS[:1], processes={UUIDS[0]: [first.pid]})
    first.stdin.close()
    assert said(first) == "released"
    heard = []

    def hear(text):
        heard.append(text)
        first.kill()
        first.wait()
        nvml(gpus=GPUS[:1])

    with taken("cuda", 1, "second", busy, say=hear) as lease:
        assert lease.shared_with() == []
    held = f"GPU 0 (Pretended A) is held by process {first.pid} (first), which is ending"
    assert heard == [f"second: waits, {held}", "second: runs on GPU 0 (Pretended A)"]


def test_a_process_that_was_given_the_id_of_a_former_job_is_a_stranger(nvml, start, tmp_path):
    nvml(gpus=GPUS[:1])
    other = start(code=ENDING)
    assert got(other) == UUIDS[0]
    other.stdin.close()
    assert said(other) == "released"
    # As if it were written before that process began.
    os.utime(tmp_path / "locks" / f"{UUIDS[0]}.json", (0, 0))
    nvml(gpus=GPUS[:1], processes={UUIDS[0]: [other.pid]})
    with pytest.raises(DeviceError, match=f"is used by process {other.pid} "):
        taken("cuda", 1, "mine", "refuse", print).__enter__()


# Which GPUs there are.


@pytest.mark.parametrize(
    ("listed", "seen"),
    [
        (None, UUIDS),
        ("1", [UUIDS[1]]),
        ("2,0", [UUIDS[2], UUIDS[0]]),
        ("GPU-cc", [UUIDS[2]]),
        (f"{UUIDS[3]}, 1", [UUIDS[3], UUIDS[1]]),
        ("1,1", [UUIDS[1]]),
        # As for CUDA, what follows something that is no GPU does not count.
        ("0,9,1", [UUIDS[0]]),
        ("0,-1,1", [UUIDS[0]]),
        # Not clear which.
        ("GPU-", []),
        ("", []),
        ("NoDevFiles", []),
        ("MIG-1234", ["MIG-1234"]),
    ],
)
def test_visible_devices_are_honoured(nvml, monkeypatch, listed, seen):
    if listed is not None:
        monkeypatch.setenv(devices.VISIBLE, listed)
    assert [gpu.key for gpu in gpus(print)] == seen


def test_a_gpu_asked_for_by_its_index_keeps_it(nvml, monkeypatch):
    monkeypatch.setenv(devices.VISIBLE, "3,1,0")
    with taken("cuda:1", 1, "second", say=print) as lease:
        assert lease.name == "GPU 1 (Pretended B)"
        assert os.environ[devices.VISIBLE] == f"{UUIDS[3]},{UUIDS[1]}"


def test_what_is_not_there_is_refused(nvml, monkeypatch):
    with pytest.raises(DeviceError, match="'cuda:4' asked for, 4 found; use a smaller index"):
        taken("cuda:4", 1, "mine").__enter__()
    monkeypatch.setenv(devices.VISIBLE, "")
    with pytest.raises(
        DeviceError, match="'cuda' asked for, no GPU is found with CUDA_VISIBLE_DEVICES=''"
    ):
        taken("cuda", 1, "mine").__enter__()
    nvml(error="Driver Not Loaded")
    with pytest.raises(DeviceError, match=r"no GPU is found.*\(NVML: Driver Not Loaded\)"):
        taken("cuda", 1, "mine").__enter__()


@pytest.mark.parametrize(("cuda", "name"), [(True, "GPU 0 (Pretended A)"), (False, "core")])
def test_auto_takes_a_gpu_if_torch_can_use_one(nvml, monkeypatch, cuda, name):
    monkeypatch.setattr(devices, "_torch_has_cuda", lambda: cuda)
    with taken("auto", 1, "mine", say=print) as lease:
        assert name in lease.name


@pytest.fixture
def sees(monkeypatch):
    """Sets whether torch finds a GPU."""
    return lambda found: monkeypatch.setattr(torch.cuda, "is_available", lambda: found)


def test_a_gpu_that_only_torch_finds_is_not_used_without_a_lock(nvml, sees, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(devices, "PROC", tmp_path / "none")
    sees(True)
    with pytest.raises(DeviceError) as error:
        running("auto", None, "mine").__enter__()
    assert "no NVIDIA driver lists one (NVML: pynvml is not installed)" in str(error.value)
    cure = "install nvidia-ml-py (pip install 'dynatree[gpu]'), or set device: cpu"
    assert cure in str(error.value)
    with running("cpu", None, "mine") as lease:
        assert lease.gpu is None
    sees(False)
    with running("auto", None, "mine") as lease:
        assert lease.gpu is None
    # One of AMD's is listed by no NVIDIA driver, whatever is installed.
    monkeypatch.setattr("torch.version.hip", "6.2")
    sees(True)
    with pytest.raises(DeviceError, match=r"cannot be locked; set device: cpu$"):
        running("auto", None, "mine").__enter__()


@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:0"])
def test_a_gpu_that_torch_cannot_use_is_no_reason_for_cores_without_a_lock(
    nvml, sees, monkeypatch, device
):
    monkeypatch.setattr(devices, "_torch_has_cuda", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    sees(False)
    with pytest.raises(
        DeviceError,
        match=rf"'{device}' asked for, GPU 0 \(Pretended A\) is there and torch, built for CUDA "
        "13.0, cannot use it; .*too old.* or set device: cpu",
    ):
        running(device, None, "mine").__enter__()
    sees(True)
    with running(device, None, "mine") as lease:
        assert lease.gpu.key == UUIDS[0]


def test_a_torch_for_cpus_goes_on_beside_a_gpu(nvml, sees, monkeypatch):
    monkeypatch.setattr(devices, "_torch_has_cuda", lambda: False)
    sees(False)
    with running("auto", None, "mine") as lease:
        assert lease.gpu is None


def test_without_nvml_the_driver_lists_the_gpus_and_that_is_said(nvml, tmp_path, monkeypatch):
    for bus, uuid, model in (("0000:81:00.0", "GPU-2", "Two"), ("0000:01:00.0", "GPU-1", "One")):
        path = tmp_path / bus / "information"
        path.parent.mkdir()
        path.write_text(f"Model: \t\t {model}\nIRQ:   \t\t 64\nGPU UUID: \t {uuid}\n")
    monkeypatch.setattr(devices, "PROC", tmp_path)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    remarks = []
    assert gpus(remarks.append) == [Unit("GPU-1", "GPU 0 (One)"), Unit("GPU-2", "GPU 1 (Two)")]
    (remark,) = remarks
    assert "NVML cannot be read (pynvml is not installed)" in remark
    assert "install dynatree[gpu]" in remark
    with taken("cuda", 1, "mine", say=print) as lease:
        assert lease.shared_with() == []


def test_a_host_without_gpus_is_no_reason_for_a_remark(nvml, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(devices, "PROC", tmp_path / "none")
    remarks = []
    assert gpus(remarks.append) == []
    assert remarks == []


def test_a_gpu_that_does_not_tell_its_processes_is_said(nvml):
    nvml(gpus=GPUS[:1], processes=None)
    remarks = []
    with taken("cuda", 1, "mine", say=remarks.append):
        pass
    assert remarks == [
        "GPU 0 (Pretended A): NVML does not say which processes use it (Not Supported)",
        "mine: runs on GPU 0 (Pretended A)",
    ]


def lost(monkeypatch, *indices):
    """Breaks GPUs: NVML counts them and says no more of them."""
    import pynvml

    def handle(index):
        if index in indices:
            raise pynvml.NVMLError("GPU is lost")
        return tuple(GPUS[index])

    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", handle)


@pytest.mark.parametrize("listed", [None, "0,1,2,3"])
def test_a_broken_gpu_is_said_and_left_out(nvml, monkeypatch, listed):
    lost(monkeypatch, 0)
    if listed is not None:
        monkeypatch.setenv(devices.VISIBLE, listed)
    heard = []
    with taken("cuda", 1, "mine", say=heard.append) as lease:
        assert lease.gpu.key == os.environ[devices.VISIBLE] == UUIDS[1]
    assert heard == [
        "GPU 0: NVML cannot read it (GPU is lost); it is left out",
        "mine: runs on GPU 1 (Pretended B)",
    ]


def test_gpus_after_a_broken_one_keep_their_indices(nvml, monkeypatch):
    lost(monkeypatch, 1)
    with taken("cuda:0", 1, "mine", say=print) as lease:
        assert lease.gpu.key == UUIDS[0]
    monkeypatch.setenv(devices.VISIBLE, "2")
    with taken("cuda:0", 1, "mine", say=print) as lease:
        assert lease.gpu.key == UUIDS[2]
    monkeypatch.delenv(devices.VISIBLE)
    for index in (1, 2):
        with pytest.raises(DeviceError, match=rf"'cuda:{index}' .*number 1 .*cannot be read; set"):
            taken(f"cuda:{index}", 1, "mine", say=print).__enter__()


def test_where_all_gpus_are_broken_there_is_none(nvml, monkeypatch):
    lost(monkeypatch, 0, 1, 2, 3)
    monkeypatch.setattr(devices, "_torch_has_cuda", lambda: True)
    with taken("auto", 1, "mine", say=print) as lease:
        assert lease.gpu is None
    with pytest.raises(DeviceError, match="'cuda' asked for, no GPU is found; use auto"):
        taken("cuda", 1, "mine", say=print).__enter__()


# Others, who take no locks.

ME = f"process {os.getpid()} of {psutil.Process().username()} ("


def test_a_gpu_that_nobody_uses_is_preferred(nvml):
    nvml(processes={uuid: [os.getpid()] for uuid in (UUIDS[0], UUIDS[1], UUIDS[3])})
    for busy in ("wait", "refuse", "flag"):
        with taken("cuda", 1, "mine", busy, say=print) as lease:
            assert lease.gpu.key == UUIDS[2]
            assert lease.strangers == {}


def test_a_used_gpu_is_waited_for(nvml):
    nvml(gpus=GPUS[:1], processes={UUIDS[0]: [os.getpid()]})
    heard = []

    def hear(text):
        heard.append(text)
        nvml(gpus=GPUS[:1])

    with taken("cuda", 1, "mine", "wait", say=hear):
        pass
    assert heard[0].startswith(f"mine: waits, GPU 0 (Pretended A) is used by {ME}")
    assert heard[1:] == ["mine: runs on GPU 0 (Pretended A)"]


def test_a_used_gpu_is_refused_with_the_process_named(nvml, monkeypatch):
    gone = 2**22 + 1
    nvml(gpus=GPUS[:2], processes={UUIDS[0]: [os.getpid()], UUIDS[1]: [gone]})
    with pytest.raises(DeviceError) as error:
        taken("cuda", 1, "mine", "refuse", print).__enter__()
    assert f"mine: GPU 0 (Pretended A) is used by {ME}" in str(error.value)
    assert f"GPU 1 (Pretended B) is used by process {gone} (not of this con" in str(error.value)
    assert "set devices.busy to wait or flag" in str(error.value)


def test_a_lock_is_waited_for_even_where_others_are_refused(nvml, start):
    nvml(gpus=GPUS[:2], processes={UUIDS[1]: [os.getpid()]})
    first = start(busy="refuse")
    assert got(first) == UUIDS[0]
    second = start(what="second", busy="refuse")
    assert f"held by process {first.pid}" in said(second)
    first.kill()
    assert got(second) == UUIDS[0]


def test_a_used_gpu_is_flagged(nvml):
    nvml(gpus=GPUS[:1], processes={UUIDS[0]: [os.getpid()]})
    heard = []
    with taken("cuda", 1, "mine", "flag", say=heard.append) as lease:
        (stranger,) = lease.shared_with()
    assert stranger.startswith(ME)
    assert heard == [f"mine: runs on GPU 0 (Pretended A), shared with {stranger}"]
    facts = flagged({"device": {"name": "A"}, "seed": 0}, [stranger])
    assert facts == {"device": {"name": "A", "shared_with": [stranger]}, "seed": 0}
    assert flagged({"device": {"name": "A"}}, []) == {"device": {"name": "A"}}


def test_who_comes_during_the_measurement_spoils_it_or_is_flagged(nvml):
    other = os.getppid()
    for busy in ("wait", "refuse", "flag"):
        nvml(gpus=GPUS[:1])
        with taken("cuda", 1, "mine", busy, say=print) as lease:
            nvml(gpus=GPUS[:1], processes={UUIDS[0]: [os.getpid()]})
            assert lease.shared_with() == []
            # In a container this process has another id for NVML.
            nvml(gpus=GPUS[:1], processes={UUIDS[0]: [2**22 + 1]})
            assert lease.shared_with() == []
            nvml(gpus=GPUS[:1], processes={UUIDS[0]: [os.getpid(), other]})
            if busy == "flag":
                (stranger,) = lease.shared_with()
                assert stranger.startswith(f"process {other} ")
            else:
                with pytest.raises(DeviceError, match=rf"used by others .*process {other} "):
                    lease.shared_with()
