"""Each check of `dynatree doctor`, on machines described to it."""

import base64
import json
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from packaging.requirements import Requirement

from dynatree import doctor
from dynatree.cli import app
from dynatree.config import parse_config
from dynatree.doctor import Finding, Gpus, GpuUser, Machine, Report

GIB = 2**30


def config(**pair):
    return {
        "pair": "p",
        "pairs": {"p": {"target": {"hub": "a/b"}, "draft": {"hub": "c/d"}, **pair}},
        "workloads": {"w": {"prompts": ["x"]}},
        "measure": {"workload": "w"},
        "configs": {"ar": {"strategy": "autoregressive"}},
        "tables": {"forward": ["ar"]},
    }


def said(findings):
    """The findings as (level, what), each with a fix."""
    found = list(findings)
    assert all(finding.fix for finding in found)
    return [(finding.level, finding.what) for finding in found]


def test_versions_are_compared_with_what_the_package_asks_for():
    wanted = [Requirement("torch>=2.11"), Requirement("transformers>=5.17,<6")]
    assert not said(
        doctor.check_requirements(wanted, {"torch": "2.13.0+cpu", "transformers": "5.20.0"})
    )
    assert said(doctor.check_requirements(wanted, {"torch": "2.9.1", "transformers": None})) == [
        ("error", "torch 2.9.1 is not >=2.11"),
        ("error", "transformers is not installed"),
    ]
    assert said(doctor.check_requirements([], {}))[0][0] == "remark"


def test_the_installed_package_names_torch_and_transformers_and_no_extra():
    names = {requirement.name for requirement in doctor.requirements()}
    assert {"torch", "transformers", "snakemake"} <= names
    assert not names & {"pytest", "nvidia-ml-py"}


DRIVER = {
    "driver": "535.1",
    "driver_cuda": "12.2",
    "nvml": True,
    "lockable": 1,
    "names": ("H100",),
}
CUDA = {
    "cpu everywhere": ({}, "auto", None, ""),
    "gpu in order": ({"build": "12.8", "usable": True, **DRIVER}, "cuda", None, ""),
    "driver too old": (
        {"build": "13.0", **DRIVER},
        "auto",
        "error",
        "built for CUDA 13.0 and cannot use the driver 535.1, which runs CUDA up to 12.2",
    ),
    "driver too old and no GPU to take": (
        {"build": "13.0", **DRIVER, "lockable": 0},
        "auto",
        "warning",
        "cannot use the driver",
    ),
    "driver too old and not asked for": ({"build": "13.0", **DRIVER}, "cpu", "warning", "535.1"),
    "found by torch alone": (
        {"build": "12.8", "usable": True},
        "auto",
        "error",
        "torch finds a GPU and no NVIDIA driver lists one",
    ),
    "found by torch alone and not asked for": (
        {"build": "12.8", "usable": True},
        "cpu",
        "warning",
        "no job can lock it",
    ),
    "driver too old, cuda asked for": ({"build": "13.0", **DRIVER}, "cuda:1", "error", "12.2"),
    "cuda build without gpu": ({"build": "13.0"}, "auto", "remark", "no GPU or driver"),
    "cuda asked for without gpu": ({"build": "13.0"}, "cuda", "error", "no GPU or driver"),
    "cpu build with gpu": (
        DRIVER,
        "auto",
        "warning",
        "for H100 is here, and torch is built for CPUs",
    ),
    "cuda asked for with nothing": ({}, "cuda", "error", "asks for device: cuda"),
    "gpu too new": (
        {"build": "12.1", "usable": True, "unsupported": ("B200",), **DRIVER},
        "auto",
        "error",
        "without code for B200",
    ),
    "index too large": (
        {"build": "12.8", "usable": True, **DRIVER},
        "cuda:1",
        "error",
        "asks for device: cuda:1, and torch finds 1 (H100), counted from 0",
    ),
    "last index": ({"build": "12.8", "usable": True, **DRIVER}, "cuda:0", None, ""),
    "found and not to be used": (
        {"build": "12.8", "trouble": "CUDA error: busy", **DRIVER},
        "auto",
        "error",
        "torch finds a GPU and cannot use it: CUDA error: busy",
    ),
    "found, not to be used and not asked for": (
        {"build": "12.8", "trouble": "CUDA error: busy", **DRIVER},
        "cpu",
        "warning",
        "CUDA error: busy",
    ),
}


@pytest.mark.parametrize(("facts", "wanted", "level", "words"), CUDA.values(), ids=CUDA)
def test_torch_driver_and_gpu_must_go_together(facts, wanted, level, words):
    found = said(doctor.check_cuda(Gpus(**facts), wanted))
    if level is None:
        assert found == []
    else:
        ((seen, what),) = found
        assert seen == level
        assert words in what


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ((9, 0), ["sm_80", "sm_90"], True),
        ((8, 6), ["sm_80", "sm_90"], True),
        ((7, 5), ["sm_80", "sm_90"], False),
        ((10, 0), ["sm_80", "sm_90"], False),
        ((10, 0), ["sm_90", "compute_90"], True),
        ((9, 0), ["sm_90a"], True),
        ((9, 0), [], True),
    ],
)
def test_a_build_runs_on_its_own_generation(capability, built, runs):
    assert doctor.runs_on(capability, built) is runs


def test_other_users_of_a_gpu_are_named():
    user = GpuUser(gpu=1, pid=77, name="python", memory_bytes=3 * GIB)
    assert said(doctor.check_users(Gpus(usable=True, nvml=True, users=(user,)))) == [
        ("warning", "GPU 1 is in use by process 77 (python) with 3.0 GiB")
    ]
    assert said(doctor.check_users(Gpus(usable=True)))[0][0] == "remark"
    assert said(doctor.check_users(Gpus())) == []
    assert said(doctor.check_users(Gpus(nvml=True, unread=("GPU 1 (GPU is lost)",)))) == [
        ("warning", "NVML cannot tell who uses GPU 1 (GPU is lost)")
    ]


class FakeNvml:
    """A driver with one GPU that this process and another use."""

    class NVMLError(Exception):
        pass

    def __getattr__(self, name):
        answers = {
            "nvmlInit": None,
            "nvmlSystemGetCudaDriverVersion": 12040,
            "nvmlSystemGetDriverVersion": "550.54",
            "nvmlDeviceGetCount": 1,
            "nvmlDeviceGetHandleByIndex": 0,
            "nvmlDeviceGetName": "NVIDIA H100",
            "nvmlDeviceGetComputeRunningProcesses": [
                SimpleNamespace(pid=doctor.os.getpid(), usedGpuMemory=1),
                SimpleNamespace(pid=2**22 + 1, usedGpuMemory=None),
            ],
        }
        return lambda *_: answers[name]


def test_the_driver_is_asked_for_its_facts(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    gpus = Gpus(**doctor._nvml())
    assert (gpus.driver, gpus.driver_cuda, gpus.names) == ("550.54", "12.4", ("NVIDIA H100",))
    # Not this process; the other one does not exist any more.
    assert [(user.pid, user.name) for user in gpus.users] == [(2**22 + 1, "not visible from here")]


def test_a_gpu_that_refuses_hides_no_other(monkeypatch):
    driver = FakeNvml()

    def handle(index):
        if index == 0:
            raise FakeNvml.NVMLError("GPU is lost")
        return index

    def processes(index):
        if index == 1:
            raise FakeNvml.NVMLError("Not Supported")
        return [SimpleNamespace(pid=2**22 + 1, usedGpuMemory=None)]

    driver.nvmlDeviceGetCount = lambda: 3
    driver.nvmlDeviceGetHandleByIndex = handle
    driver.nvmlDeviceGetComputeRunningProcesses = processes
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    gpus = Gpus(**doctor._nvml())
    assert (gpus.nvml, gpus.driver, len(gpus.names)) == (True, "550.54", 2)
    assert gpus.unread == ("GPU 0 (GPU is lost)", "GPU 1 (Not Supported)")
    assert [user.gpu for user in gpus.users] == [2]


def test_a_driver_that_does_not_answer_is_no_crash(monkeypatch, tmp_path):
    broken = FakeNvml()

    def fails(*_):
        raise FakeNvml.NVMLError("Driver/library version mismatch")

    broken.nvmlInit = lambda: None
    broken.nvmlSystemGetCudaDriverVersion = fails
    monkeypatch.setitem(sys.modules, "pynvml", broken)
    assert doctor._nvml() == {"driver": "does not answer: Driver/library version mismatch"}
    broken.nvmlInit = fails
    monkeypatch.setattr(doctor, "DRIVER", tmp_path / "version")
    assert doctor._nvml() == {}
    doctor.DRIVER.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun\n")
    assert doctor._nvml() == {"driver": "535.183.01"}


def test_a_full_disk_is_an_error_and_a_nearly_full_one_a_warning():
    disk = {"/a": GIB // 2, "/b": 4 * GIB, "/c": 400 * GIB}
    assert said(doctor.check_disk(disk)) == [
        ("error", "/a: 0.5 GiB free"),
        ("warning", "/b: 4.0 GiB free"),
    ]


def test_no_hub_is_a_remark_that_names_the_models_in_question():
    ((level, what),) = said(doctor.check_hub("no route", parse_config(config())))
    assert level == "remark"
    assert "a/b and c/d must be in its cache" in what
    assert said(doctor.check_hub(None, None)) == []


def test_the_hub_is_not_waited_for(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert doctor.reach("http://127.0.0.1:9") == "HF_HUB_OFFLINE is set"
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("no_proxy", "*")
    assert "refused" in doctor.reach("http://127.0.0.1:9")


def test_missing_commands_name_their_packages():
    tools = dict.fromkeys(doctor.TOOLS, "/usr/bin/x") | {"latexmk": None, "g++": None}
    found = list(doctor.check_tools(tools, None, usable_gpu=False))
    assert [finding.level for finding in found] == ["warning", "warning"]
    assert found[0].fix == (
        "Debian: apt-get install latexmk texlive-latex-base texlive-latex-recommended"
    )
    compiled = parse_config(config(runtime="compiled"))
    levels = [finding.level for finding in doctor.check_tools(tools, compiled, usable_gpu=False)]
    assert levels == ["warning", "error"]


def marked(folder, name, chunks=1):
    """A mark of Snakemake for an unfinished file, its name split into folders as it does."""
    encoded = base64.urlsafe_b64encode(name.encode()).decode()
    size = -(-len(encoded) // chunks)
    parts = [encoded[at : at + size] for at in range(0, len(encoded), size)]
    path = folder.joinpath(*(f"@{part}" for part in parts[:-1]), parts[-1])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")


def test_what_a_killed_pipeline_left_is_found(tmp_path):
    assert said(doctor.check_snakemake(tmp_path, [])) == []
    marked(tmp_path / ".snakemake/incomplete", "results/runs/p/ar.json")
    marked(tmp_path / ".snakemake/incomplete", "results/runs/p/long.json", chunks=3)
    assert said(doctor.check_snakemake(tmp_path, [])) == [
        (
            "warning",
            "jobs were broken off while they made: results/runs/p/long.json, "
            "results/runs/p/ar.json",
        )
    ]
    (tmp_path / ".snakemake/locks").mkdir()
    (tmp_path / ".snakemake/locks/0.input.lock").write_text("x\n")
    error, _ = doctor.check_snakemake(tmp_path, [])
    assert error.level == "error"
    assert error.fix.startswith("snakemake --unlock")
    assert said(doctor.check_snakemake(tmp_path, [4, 5])) == [
        ("remark", "a pipeline is running here, process 4, 5")
    ]


def test_folders_that_cannot_be_written_to_are_an_error(tmp_path, monkeypatch):
    (tmp_path / "results").mkdir()
    # root may write anywhere
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: path.name != "results")
    assert said(doctor.check_snakemake(tmp_path, [])) == [
        ("error", f"{tmp_path / 'results'} cannot be written to")
    ]


def test_missing_models_and_texts_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    data = config(target={"path": "there"}, draft={"path": "gone"})
    data["workloads"]["w"] = {"file": "gone.txt", "count": 1, "prompt_tokens": 4}
    assert said(doctor.check_inputs(parse_config(data))) == [
        ("error", "pairs.p.draft.path: no directory 'gone'"),
        ("error", "workloads.w.file: no file 'gone.txt'"),
    ]


def test_a_running_pipeline_is_seen_by_its_folder(tmp_path, monkeypatch):
    here = SimpleNamespace(
        info={"pid": 7, "cmdline": ["python", "/bin/snakemake", "-n"]}, cwd=lambda: str(tmp_path)
    )
    there = SimpleNamespace(
        info={"pid": 8, "cmdline": ["python", "-m", "snakemake"]}, cwd=lambda: "/elsewhere"
    )
    other = SimpleNamespace(
        info={"pid": 9, "cmdline": ["vi", "Snakefile"]}, cwd=lambda: str(tmp_path)
    )
    monkeypatch.setattr(doctor.psutil, "process_iter", lambda _: [here, there, other])
    assert doctor.snakemakes(tmp_path) == [7]


@pytest.fixture
def machine(monkeypatch):
    """A machine without faults, instead of this one."""
    described = Machine(
        dynatree="0",
        python="3",
        system="s",
        versions={entry.name: "99" for entry in doctor.requirements()},
        cores=2,
        memory_bytes=8 * GIB,
        disk={"/": 100 * GIB},
        hub=None,
        tools=dict.fromkeys(doctor.TOOLS, "/usr/bin/x"),
        gpus=Gpus(),
        torch_error=None,
        origin={"git": {"commit": "abc", "dirty": True}},
    )
    monkeypatch.setattr(doctor, "requirements", lambda: [Requirement("torch>=2.11")])
    monkeypatch.setattr(doctor, "examine", lambda folder: described)
    return described


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["dynatree", "doctor", *arguments])
    code = 0
    try:
        app()
    except SystemExit as stop:
        code = stop.code
    return code, capsys.readouterr().out


def test_the_command_fails_exactly_if_a_run_would(machine, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config()))
    code, out = run(monkeypatch, capsys)
    assert code == 0
    assert "commit abc with changes" in out
    assert out.endswith("0 errors, 0 warnings, 0 remarks\n")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config() | {"pair": "q"}))
    code, out = run(monkeypatch, capsys, "--json")
    assert code == 1
    report = Report.model_validate(json.loads(out))
    assert report.machine == machine
    ((level, what),) = said(report.findings)
    assert level == "error"
    assert "unknown pair 'q'" in what


def test_a_torch_that_cannot_be_imported_is_reported(monkeypatch, tmp_path):
    def broken():
        raise ImportError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(doctor, "_with_torch", broken)
    monkeypatch.setattr(doctor, "reach", lambda hub: None)
    report = doctor.diagnose(tmp_path / "config.yaml", tmp_path)
    errors = [what for level, what in said(report.findings) if level == "error"]
    assert any("libcudart.so.13" in what for what in errors)
    assert any("config.yaml: no such file" in what for what in errors)
    assert not report.healthy


def test_a_gpu_that_cannot_be_opened_is_no_broken_installation(monkeypatch, tmp_path):
    def busy(_):
        raise torch.AcceleratorError("CUDA error: CUDA-capable device(s) is/are busy\nMore")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", busy)
    monkeypatch.setattr(doctor, "reach", lambda hub: None)
    machine = doctor.examine(tmp_path)
    assert machine.torch_error is None
    assert machine.gpus.trouble == "CUDA error: CUDA-capable device(s) is/are busy"
    assert not machine.gpus.usable
    assert machine.origin["machine"]["processor"]


def test_this_machine_is_described(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "reach", lambda hub: "not asked")
    described = doctor.examine(tmp_path)
    assert described.torch_error is None
    assert described.origin["machine"]["processor"]
    assert described.versions["torch"]
    assert str(tmp_path.resolve()) in described.disk
    text = "\n".join(
        doctor.lines(
            Report(machine=described, findings=[Finding(level="remark", what="w", fix="f")])
        )
    )
    assert described.origin["machine"]["processor"] in text
    assert "remark: w\n  fix: f\n\n0 errors, 0 warnings, 1 remark" in text
