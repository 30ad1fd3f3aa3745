"""Facts about the machine, the software and the commit behind a measurement."""

import platform
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import psutil
import torch

from dynatree import gpu, kernel

LIBRARIES = ("torch", "triton", "transformers", "tokenizers", "safetensors", "snakemake")


def device_facts(device: torch.device) -> dict[str, Any]:
    """Type and name of the device, the threads in use, and the GPU's driver and clocks; whether our
    kernels are at hand: `dynatree.kernel` on a CPU, `dynatree.cuda_kernels` on a GPU."""
    facts: dict[str, Any] = {
        "type": device.type,
        "name": _cpu_name(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "kernel": gpu.kernels(device) is not None,
            **_nvml_facts(device),
        }
    else:
        frequency = psutil.cpu_freq()
        facts["clock_mhz"] = round(frequency.current) if frequency else None
        facts["capability"] = torch.backends.cpu.get_cpu_capability()
        facts["kernel"] = kernel.loaded()
    return facts


def provenance(device: torch.device, seed: int) -> dict[str, Any]:
    """Everything that a reader needs to judge or repeat a measurement, as plain JSON data."""
    return {
        "device": device_facts(device),
        "machine": {
            "system": platform.platform(),
            "processor": _cpu_name(),
            "cores": psutil.cpu_count(logical=False),
        },
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in LIBRARIES},
        "git": git_facts(),
        "seed": seed,
        "command": sys.argv,
    }


def git_facts() -> dict[str, Any]:
    """The commit checked out, and whether tracked files differ from it; None outside of git."""
    commit = _git("rev-parse", "HEAD")
    status = _git("status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if status is None else bool(status)}


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory held since the process started: the device's on CUDA, else the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows, which has no CUDA-free users of this pipeline either

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _version(name: str) -> str | None:
    # Benchmarks run where the pipeline is not installed, and triton is there with CUDA only.
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    try:
        return subprocess.run(
            ["git", *arguments], capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123
            names = [line.split(":", 1)[1] for line in file if line.startswith("model name")]
        return names[0].strip()
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def _nvml_facts(device: torch.device) -> dict[str, Any]:
    """Driver, clocks, power and temperature where NVML is installed and answers; under `nvml`, what
    it said instead.
    """
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception as error:  # NVML is optional, and its absence is itself a fact
        return {"nvml": f"not readable: {error}"}

    def uuid() -> str:
        return str(torch.cuda.get_device_properties(device).uuid)

    def handle() -> Any:
        return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid()}")

    asked: dict[str, Callable[[], Any]] = {
        "driver": pynvml.nvmlSystemGetDriverVersion,
        "uuid": uuid,
        "clock_mhz": lambda: pynvml.nvmlDeviceGetClockInfo(handle(), pynvml.NVML_CLOCK_SM),
        "memory_clock_mhz": lambda: pynvml.nvmlDeviceGetClockInfo(handle(), pynvml.NVML_CLOCK_MEM),
        "power_w": lambda: pynvml.nvmlDeviceGetPowerUsage(handle()) / 1000,
        "temperature_c": lambda: pynvml.nvmlDeviceGetTemperature(
            handle(), pynvml.NVML_TEMPERATURE_GPU
        ),
    }
    facts: dict[str, Any] = {}
    unread = []
    for name, ask in asked.items():
        try:
            facts[name] = ask()
        except Exception as error:  # a part of a GPU, or a virtual one, has not all of them
            unread.append(f"{name} ({error})")
    return facts | ({"nvml": f"not readable: {', '.join(unread)}"} if unread else {})
