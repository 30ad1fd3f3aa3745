"""What a bug report needs, and common trouble with its fix.

`examine` collects the facts of this machine; each check is a function of some of them and yields
what it finds, so that any machine can be described and checked.
"""

import base64
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Literal, get_args

import psutil
from packaging.requirements import Requirement

from dynatree import __version__, devices
from dynatree.config import Config, load_config
from dynatree.errors import ConfigError
from dynatree.facts import Fact

Level = Literal["error", "warning", "remark"]
"""An error makes a run fail, a warning spoils one or a part of it, a remark explains."""

GIB = 2**30
LOW_DISK = GIB
"""Bytes free below which a run fails; ten times as much is what a large pair needs."""

HUB = "https://huggingface.co"
HUB_TIMEOUT = 2.0
"""Seconds to wait for the hub."""

TOOLS = {
    "latexmk": ("paper/main.pdf", "latexmk texlive-latex-base texlive-latex-recommended"),
    "booktabs.sty": ("paper/main.pdf", "texlive-latex-base texlive-latex-recommended"),
    "chromium": ("the tests of the tree page", "chromium"),
    "node": ("the tests of the tree page", "nodejs"),
    "g++": ("fast linear layers and runtime: compiled on a CPU", "g++"),
    "git": ("the commit in a result's provenance", "git"),
}
"""Commands, and a style of TeX: what needs them, and the Debian packages that have them."""

DRIVER = Path("/proc/driver/nvidia/version")
"""Where Linux tells of an NVIDIA driver."""


class Finding(Fact):
    """Something found, and what to do about it."""

    level: Level
    what: str
    fix: str


class GpuUser(Fact):
    """A process that holds memory of a GPU."""

    gpu: int
    pid: int
    name: str
    memory_bytes: int | None


class Gpus(Fact):
    """What the driver and torch say of the GPUs.

    Attributes:
        build: the CUDA version that torch was built for; None for a build for CPUs.
        usable: torch finds a device that it can use.
        driver: version of the NVIDIA driver; None without one.
        driver_cuda: the newest CUDA version that the driver runs, such as 12.4.
        nvml: the driver was asked through NVML; else only torch was.
        lockable: GPUs that a job may take: those that the driver lists and nothing hides.
        names: of the GPUs.
        unsupported: GPUs that the build has no code for.
        users: other processes on the GPUs.
        unread: GPUs that NVML cannot read, or not the users of, and what it said.
        trouble: what CUDA said when torch, which finds a GPU, used it.
    """

    build: str | None = None
    usable: bool = False
    driver: str | None = None
    driver_cuda: str | None = None
    nvml: bool = False
    lockable: int = 0
    names: tuple[str, ...] = ()
    unsupported: tuple[str, ...] = ()
    users: tuple[GpuUser, ...] = ()
    unread: tuple[str, ...] = ()
    trouble: str | None = None


class Machine(Fact):
    """The facts that a bug report needs; those that the checks look at have a field of their own.

    Attributes:
        versions: of what DynaTree depends on, None for what is missing.
        disk: bytes free by folder.
        hub: why the hub cannot be reached; None if it answered.
        tools: where the commands of `TOOLS` are, None for those that are missing.
        torch_error: why torch cannot be imported.
        origin: device, machine, commit: as the provenance of a result has it.
    """

    dynatree: str
    python: str
    system: str
    versions: dict[str, str | None]
    cores: int | None
    memory_bytes: int
    disk: dict[str, int]
    hub: str | None
    tools: dict[str, str | None]
    gpus: Gpus
    torch_error: str | None
    origin: dict[str, Any]


class Report(Fact):
    """What `dynatree doctor --json` prints."""

    machine: Machine
    findings: list[Finding]

    @property
    def healthy(self) -> bool:
        """Nothing was found that makes a run fail."""
        return all(finding.level != "error" for finding in self.findings)


def diagnose(config: Path, folder: Path) -> Report:
    """Examines this machine and the project in `folder` with the configuration `config`."""
    machine = examine(folder)
    findings: list[Finding] = []
    study: Config | None = None
    try:
        study = load_config(config)
    except ConfigError as error:
        findings.append(
            Finding(level="error", what=str(error), fix=f"correct {config} as the message says")
        )
    wanted = study.pair_spec.device if study is not None else "auto"
    findings += check_requirements(requirements(), machine.versions)
    if machine.torch_error is not None:
        findings.append(_torch(machine.torch_error))
    findings += check_cuda(machine.gpus, wanted)
    findings += check_users(machine.gpus)
    findings += check_disk(machine.disk)
    findings += check_hub(machine.hub, study)
    findings += check_tools(machine.tools, study, machine.gpus.usable)
    findings += check_snakemake(folder, snakemakes(folder))
    if study is not None:
        findings += check_inputs(study)
    return Report(machine=machine, findings=findings)


def examine(folder: Path) -> Machine:
    """The facts of this machine; asks the hub, and waits for it for `HUB_TIMEOUT` at most."""
    names = dict.fromkeys(requirement.name for requirement in requirements())
    origin: dict[str, Any] = {}
    torch_error = None
    try:
        origin, gpus = _with_torch()
    except (ImportError, OSError, RuntimeError) as error:
        # A broken installation is what this command is for.
        torch_error, gpus = f"{type(error).__name__}: {error}", Gpus(**_nvml())
    return Machine(
        dynatree=__version__,
        python=f"{platform.python_version()} ({sys.executable})",
        system=platform.platform(),
        versions={name: _version(name) for name in names},
        cores=psutil.cpu_count(logical=False),
        memory_bytes=psutil.virtual_memory().total,
        disk={
            str(place): shutil.disk_usage(place).free
            for place in (folder.resolve(), Path(tempfile.gettempdir()))
        },
        hub=reach(os.environ.get("HF_ENDPOINT", HUB)),
        tools={tool: _where(tool) for tool in TOOLS},
        gpus=gpus,
        torch_error=torch_error,
        origin=origin,
    )


def requirements() -> list[Requirement]:
    """What the installed DynaTree needs; nothing where it runs from its folder, uninstalled."""
    try:
        found = map(Requirement, requires("dynatree") or [])
    except PackageNotFoundError:
        return []
    return [entry for entry in found if entry.marker is None or entry.marker.evaluate()]


def reach(hub: str) -> str | None:
    """Why `hub` cannot be reached; None if anything answers."""
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        return "HF_HUB_OFFLINE is set"
    try:
        # urllib goes through a proxy where the environment names one.
        with urllib.request.urlopen(
            urllib.request.Request(hub, method="HEAD"), timeout=HUB_TIMEOUT
        ):
            return None
    except urllib.error.HTTPError:
        return None
    except (OSError, ValueError) as error:
        return f"{hub}: {getattr(error, 'reason', error)}"


def snakemakes(folder: Path) -> list[int]:
    """The process ids of pipelines that run in `folder`, as far as they may be seen."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline"]):
        words = process.info["cmdline"] or []
        if any(Path(word).name == "snakemake" for word in words[:4]):
            try:
                if Path(process.cwd()) == folder.resolve():
                    found.append(process.info["pid"])
            except (psutil.Error, OSError):
                continue
    return found


def _where(tool: str) -> str | None:
    if not tool.endswith(".sty"):
        return shutil.which(tool)
    try:
        found = subprocess.run(["kpsewhich", tool], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _with_torch() -> tuple[dict[str, Any], Gpus]:
    """Provenance as a result would have it, and what torch and the driver say of the GPUs."""
    import torch

    from dynatree.provenance import provenance

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts = _nvml()
    try:
        origin = provenance(device, seed=0)
        if device.type == "cuda":
            built = torch.cuda.get_arch_list()
            indices = range(torch.cuda.device_count())
            names = [torch.cuda.get_device_name(index) for index in indices]
            facts["names"] = names
            facts["unsupported"] = [
                names[index]
                for index in indices
                if not runs_on(torch.cuda.get_device_capability(index), built)
            ]
    except RuntimeError as error:
        # A GPU that is found may still not be opened.
        device = torch.device("cpu")
        origin = provenance(device, seed=0)
        facts["trouble"] = str(error).strip().partition("\n")[0]
    facts["lockable"] = sum(unit is not None for unit in devices.gpus(lambda _: None))
    gpus = Gpus(build=torch.version.cuda, usable=device.type == "cuda", **facts)
    return {key: origin[key] for key in ("device", "machine", "git")}, gpus


def runs_on(capability: tuple[int, int], built: Sequence[str]) -> bool:
    """Whether a build for the architectures `built` (sm_90, compute_90, ...) runs on a GPU.

    Code runs on later minor versions of its own generation, and `compute` code on all later ones.
    """
    own = capability[0] * 10 + capability[1]
    for name in built:
        kind, _, digits = name.partition("_")
        if not digits.rstrip("af").isdigit():
            continue
        number = int(digits.rstrip("af"))
        if number <= own and (kind == "compute" or number // 10 == capability[0]):
            return True
    return not built


def _nvml() -> dict[str, Any]:
    """Fields of `Gpus` that the driver knows; its version at most without NVML."""
    pynvml = devices.nvml()
    if isinstance(pynvml, str):
        try:
            found = re.search(r"Kernel Module\D+([\d.]+)", DRIVER.read_text(encoding="utf-8"))
        except OSError:
            return {}
        return {"driver": found[1] if found else "of unknown version"}
    try:
        newest = pynvml.nvmlSystemGetCudaDriverVersion()
        facts: dict[str, Any] = {
            "nvml": True,
            "driver": pynvml.nvmlSystemGetDriverVersion(),
            "driver_cuda": f"{newest // 1000}.{newest % 1000 // 10}",
            "names": [],
            "users": [],
            "unread": [],
        }
        count = pynvml.nvmlDeviceGetCount()
    except pynvml.NVMLError as error:
        return {"driver": f"does not answer: {error}"}
    for index in range(count):
        try:
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            facts["names"].append(pynvml.nvmlDeviceGetName(handle))
            facts["users"] += [
                GpuUser(
                    gpu=index,
                    pid=entry.pid,
                    name=_name(entry.pid),
                    memory_bytes=entry.usedGpuMemory,
                )
                for entry in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
                if entry.pid != os.getpid()
            ]
        except pynvml.NVMLError as error:
            facts["unread"].append(f"GPU {index} ({error})")
    return facts


def _name(pid: int) -> str:
    try:
        return psutil.Process(pid).name()
    except psutil.Error:
        return "not visible from here"


def check_requirements(
    wanted: Sequence[Requirement], installed: dict[str, str | None]
) -> Iterator[Finding]:
    """Packages that are missing, or have a version that DynaTree was not written for."""
    if not wanted:
        yield Finding(
            level="remark",
            what="dynatree is not installed, so that versions cannot be checked",
            fix="pip install --constraint constraints.txt --editable .",
        )
    for requirement in wanted:
        found = installed.get(requirement.name)
        needed = f"'{requirement.name}{requirement.specifier}'"
        fix = f"pip install --constraint constraints.txt {needed}"
        if found is None:
            yield Finding(level="error", what=f"{requirement.name} is not installed", fix=fix)
        elif not requirement.specifier.contains(found, prereleases=True):
            what = f"{requirement.name} {found} is not {requirement.specifier}"
            yield Finding(level="error", what=what, fix=fix)


def _torch(reason: str) -> Finding:
    return Finding(
        level="error",
        what=f"torch cannot be imported: {reason}",
        fix="pip install --force-reinstall --constraint constraints.txt torch",
    )


def check_cuda(gpus: Gpus, wanted: str) -> Iterator[Finding]:
    """Whether torch, driver and GPU go together, and whether the device `wanted` is there."""
    asked = wanted.startswith("cuda")
    level: Level = "error" if asked else "warning"
    # What a job with `auto` refuses as well; see `devices.require_agreement`.
    refused: Level = "warning" if wanted == "cpu" else "error"
    if gpus.unsupported:
        yield Finding(
            level=refused,
            what=f"torch is built for CUDA {gpus.build}, without code for "
            f"{', '.join(gpus.unsupported)}",
            fix="install a newer torch, or set device: cpu for the pair",
        )
    if gpus.trouble is not None:
        yield Finding(
            level=refused,
            what=f"torch finds a GPU and cannot use it: {gpus.trouble}",
            fix="see with nvidia-smi whether it is in order and free (compute mode, processes), or "
            "set device: cpu for the pair",
        )
        return
    if gpus.usable and gpus.lockable == 0:
        yield Finding(
            level=refused,
            what="torch finds a GPU and no NVIDIA driver lists one: no job can lock it",
            fix="pip install 'dynatree[gpu]', or set device: cpu for the pair; other than NVIDIA's "
            "GPUs are not supported",
        )
    elif gpus.usable:
        index = wanted.partition(":")[2]
        if index and int(index) >= len(gpus.names):
            yield Finding(
                level="error",
                what=f"the pair asks for device: {wanted}, and torch finds {len(gpus.names)} "
                f"({', '.join(gpus.names)}), counted from 0",
                fix="set a smaller index, cuda or auto for the pair, or look at "
                "CUDA_VISIBLE_DEVICES",
            )
    elif gpus.build is None and gpus.driver is not None:
        yield Finding(
            level=level,
            what=f"a driver ({gpus.driver}) for {', '.join(gpus.names) or 'a GPU'} is here, and "
            "torch is built for CPUs only",
            fix="pip install torch from an index for CUDA, see https://pytorch.org/get-started",
        )
    elif gpus.build is not None and gpus.driver is None:
        yield Finding(
            level="error" if asked else "remark",
            what=f"torch is built for CUDA {gpus.build}, and no GPU or driver can be seen",
            fix="install the driver; without a GPU, a torch from PyTorch's CPU index is smaller",
        )
    elif gpus.build is not None and gpus.driver is not None:
        newest = f", which runs CUDA up to {gpus.driver_cuda}" if gpus.driver_cuda else ""
        yield Finding(
            level=refused if gpus.lockable else level,
            what=f"torch is built for CUDA {gpus.build} and cannot use the driver {gpus.driver}"
            f"{newest}",
            fix="update the driver, or install a torch built for a CUDA that it runs; nvidia-smi "
            "must list the GPU, and CUDA_VISIBLE_DEVICES must not hide it",
        )
    elif asked:
        yield Finding(
            level="error",
            what=f"the pair asks for device: {wanted}, and this torch and machine have no CUDA",
            fix="set device: auto or cpu for the pair",
        )


def check_users(gpus: Gpus) -> Iterator[Finding]:
    """Other processes on the GPUs, which would be measured too."""
    for user in gpus.users:
        held = "" if user.memory_bytes is None else f" with {user.memory_bytes / GIB:.1f} GiB"
        yield Finding(
            level="warning",
            what=f"GPU {user.gpu} is in use by process {user.pid} ({user.name}){held}",
            fix="wait for it, or choose another GPU with CUDA_VISIBLE_DEVICES",
        )
    for gpu in gpus.unread:
        yield Finding(
            level="warning",
            what=f"NVML cannot tell who uses {gpu}",
            fix="see with nvidia-smi whether it is in order; one that is lost needs a reset, one "
            "that is virtual or in parts does not tell",
        )
    if gpus.usable and not gpus.nvml:
        yield Finding(
            level="remark",
            what="other users of the GPU cannot be seen, because NVML is not installed",
            fix="pip install 'dynatree[gpu]'",
        )


def check_disk(disk: dict[str, int]) -> Iterator[Finding]:
    """Folders on full disks."""
    for place, free in disk.items():
        if free < 10 * LOW_DISK:
            yield Finding(
                level="error" if free < LOW_DISK else "warning",
                what=f"{place}: {free / GIB:.1f} GiB free",
                fix="make room, or set TMPDIR or HF_HOME to a folder on another disk",
            )


def check_hub(trouble: str | None, study: Config | None) -> Iterator[Finding]:
    """No access to models and data sets of the hub."""
    if trouble is None:
        return
    pair = None if study is None else study.pair_spec
    sources = () if pair is None else (pair.target, pair.draft)
    needs = [source.hub for source in sources if source is not None and source.hub]
    yield Finding(
        level="remark",
        what=f"the model hub cannot be reached ({trouble})"
        + (f"; {' and '.join(needs)} must be in its cache" if needs else ""),
        fix="give models as path, or use the pair embedded, which needs no hub",
    )


def check_tools(
    tools: dict[str, str | None], study: Config | None, usable_gpu: bool
) -> Iterator[Finding]:
    """Commands that are missing."""
    compiled = study is not None and study.pair_spec.runtime == "compiled" and not usable_gpu
    for tool, (purpose, packages) in TOOLS.items():
        if tools.get(tool) is None:
            yield Finding(
                level="error" if tool == "g++" and compiled else "warning",
                what=f"{tool} is missing; needed for {purpose}",
                fix=f"Debian: apt-get install {packages}",
            )


def check_snakemake(folder: Path, running: Sequence[int]) -> Iterator[Finding]:
    """What an interrupted pipeline left behind; `running` are those that still run."""
    state = folder / ".snakemake"
    locks = sorted((state / "locks").glob("*.lock"))
    if locks and running:
        yield Finding(
            level="remark",
            what=f"a pipeline is running here, process {', '.join(map(str, running))}",
            fix="wait for it before you start another",
        )
    elif locks:
        yield Finding(
            level="error",
            what=f"{state / 'locks'} holds the locks of a pipeline that does not run here any more",
            fix="snakemake --unlock, if none runs on another machine or in a container",
        )
    marks = [path for path in sorted((state / "incomplete").rglob("*")) if path.is_file()]
    if marks and not running:
        names = [_marked(path.relative_to(state / "incomplete")) for path in marks]
        yield Finding(
            level="warning",
            what=f"jobs were broken off while they made: {', '.join(names)}",
            fix="run snakemake again; the default profile makes such files anew",
        )
    for place in (state, folder / "results"):
        if place.exists() and not os.access(place, os.W_OK):
            yield Finding(
                level="error",
                what=f"{place} cannot be written to",
                fix=f"chown or chmod it for the user {psutil.Process().username()}",
            )


def _marked(path: Path) -> str:
    """The file that a mark of Snakemake stands for; long names are split into folders."""
    encoded = "".join(part.removeprefix("@") for part in path.parts)
    try:
        return base64.urlsafe_b64decode(encoded).decode()
    except ValueError:
        return str(path)


def check_inputs(study: Config) -> Iterator[Finding]:
    """Local models and texts of the configuration that are not there."""
    for role, source in (("target", study.pair_spec.target), ("draft", study.pair_spec.draft)):
        if source is not None and source.path is not None and not Path(source.path).is_dir():
            yield Finding(
                level="error",
                what=f"pairs.{study.pair}.{role}.path: no directory {source.path!r}",
                fix="give the folder that holds config.json",
            )
    file = study.workload.file
    if file is not None and not Path(file).is_file():
        yield Finding(
            level="error",
            what=f"workloads.{study.measurement.workload}.file: no file {file!r}",
            fix="give the path of the text, from the project's folder",
        )


def lines(report: Report) -> list[str]:
    """The report as text: the facts, then what was found."""
    machine, gpus = report.machine, report.machine.gpus
    git, device = machine.origin.get("git", {}), machine.origin.get("device", {})
    commit = (git.get("commit") or "unknown") + (" with changes" if git.get("dirty") else "")
    facts = {
        "dynatree": f"{machine.dynatree}, commit {commit}",
        "python": machine.python,
        "system": machine.system,
        "versions": ", ".join(f"{name} {found}" for name, found in machine.versions.items()),
        "processor": f"{machine.origin.get('machine', {}).get('processor', platform.machine())}, "
        f"{machine.cores} cores, {device.get('threads', 'unknown')} threads",
        "memory": f"{machine.memory_bytes / GIB:.1f} GiB",
        "GPU": ", ".join(gpus.names) or "none",
        "CUDA": f"driver {gpus.driver or 'none'}, torch built for {gpus.build or 'CPUs'}",
        "disk": ", ".join(f"{free / GIB:.1f} GiB free, {at}" for at, free in machine.disk.items()),
        "hub": machine.hub or "answers",
        "tools": ", ".join(f"{tool} {at or 'missing'}" for tool, at in machine.tools.items()),
    }
    text = [f"{key:<10} {value}" for key, value in facts.items()]
    for finding in report.findings:
        text += ["", f"{finding.level}: {finding.what}", f"  fix: {finding.fix}"]
    levels = Counter(finding.level for finding in report.findings)
    counts = (
        f"{levels[level]} {level}{'' if levels[level] == 1 else 's'}" for level in get_args(Level)
    )
    return [*text, "", ", ".join(counts)]
