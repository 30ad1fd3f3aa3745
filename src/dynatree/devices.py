"""Which GPU, or which cores, a job has to itself on this host.

Snakemake counts GPUs but assigns none, and two runs of it know nothing of each other. So every job
that loads models takes a lock on the GPU that it uses, or on its cores, and waits while there is
none to take. The locks are `flock`s on files of a folder that all jobs of the host share: one dies
with its process however that ends, and an orphan goes on holding its own.

A lock says nothing of programs that know nothing of it; whether one uses a GPU is asked of NVML.

A device is taken before torch looks for GPUs, which it does once and for good; scripts therefore
import what loads models afterwards.
"""

import json
import os
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import psutil
from filelock import FileLock, Timeout

from dynatree.errors import DynaTreeError

Busy = Literal["wait", "refuse", "flag"]
"""What a job does about a GPU that a process without a lock uses."""

FOLDER: Final = "DYNATREE_LOCKS"
"""Environment variable: the folder of the locks, instead of `DEFAULT_FOLDER`."""

# Not `tempfile.gettempdir()`: TMPDIR gives every job of a cluster a folder of its own.
DEFAULT_FOLDER: Final = Path("/tmp/dynatree-locks")

VISIBLE: Final = "CUDA_VISIBLE_DEVICES"
PROC: Final = Path("/proc/driver/nvidia/gpus")

CORE: Final = "core-"
"""What the keys of cores begin with."""

POLL: Final = 0.5
"""Seconds between two looks at locks that others hold."""


class DeviceError(DynaTreeError):
    """There is no GPU to take, torch and the driver disagree about it, somebody else uses it, or
    its memory is too small.
    """


@dataclass(frozen=True)
class Unit:
    """What one lock stands for: a GPU (`key` is its UUID), or a core.

    Attributes:
        name: what messages call it.
    """

    key: str
    name: str


@dataclass(frozen=True)
class Lease:
    """What a job has to itself.

    Attributes:
        name: in words.
        gpu: None for cores.
        strangers: processes by id, and what they are, that used the GPU when it was taken.
        busy: what to do about such processes.
    """

    name: str
    gpu: Unit | None
    strangers: Mapping[int, str]
    busy: Busy

    def shared_with(self) -> list[str]:
        """The other processes that used the GPU since it was taken; to be asked after the work.

        Raises:
            DeviceError: there are some, and `busy` does not let them be.
        """
        if self.gpu is None:
            return []
        now = _processes(self.gpu)
        own = {os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))}
        fresh = [pid for pid in now if pid not in self.strangers and pid not in own]
        if not own & now.keys() and len(fresh) == 1:
            # In a container NVML gives the host's process ids: the one newcomer is this process.
            fresh = []
        found = [*self.strangers.values(), *(now[pid] for pid in fresh)]
        if found and self.busy != "flag":
            raise DeviceError(
                f"{self.gpu.name} was used by others while this job measured "
                f"({', '.join(found)}), so no result was written; run it again when they are done, "
                "or set devices.busy: flag to mark the result instead"
            )
        return found


@contextmanager
def taken(
    device: str,
    threads: int,
    what: str,
    busy: Busy = "wait",
    say: Callable[[str], None] = lambda text: print(text, flush=True),
) -> Iterator[Lease]:
    """Waits for a GPU or cores and has them, and sees no other GPU, until the end of the block.

    Args:
        device: as a pair's `device` says: `auto`, `cpu`, `cuda` or `cuda:<index>`.
        threads: cores to take where there is no GPU; all if there are fewer.
        what: what the job does, for those that wait for it.
        say: told what is waited for, and what was taken.

    Raises:
        DeviceError: there is no such GPU, the folder of the locks cannot be used, or all GPUs are
            used by others and `busy` is `refuse`.
    """
    visible = [] if device == "cpu" else gpus(say)
    if device == "auto" and not (any(visible) and _torch_has_cuda()):
        device = "cpu"
    candidates = cores() if device == "cpu" else _wanted(device, visible)
    count = min(max(1, threads), len(candidates)) if device == "cpu" else 1
    with ExitStack() as held:
        units, strangers = _waited_for(candidates, count, what, busy, say, held)
        if device == "cpu":
            whole = len(units) == len(candidates)
            names = ", ".join(unit.name for unit in units)
            lease = Lease(f"all {len(units)} cores" if whole else names, None, {}, busy)
            if hasattr(os, "sched_setaffinity"):
                held.callback(os.sched_setaffinity, 0, os.sched_getaffinity(0))
                os.sched_setaffinity(0, [int(unit.key.removeprefix(CORE)) for unit in units])
        else:
            (unit,) = units
            # By UUID, which means the same in whatever order CUDA counts. What stands before a
            # device that is asked for by its index stays, so that the index stays as well.
            before = visible[: visible.index(unit)] if device.startswith("cuda:") else []
            os.environ[VISIBLE] = ",".join(entry.key for entry in (*before, unit) if entry)
            lease = Lease(unit.name, unit, strangers, busy)
        others = f", shared with {', '.join(strangers.values())}" if strangers else ""
        say(f"{what}: runs on {lease.name}{others}")
        yield lease


def require_agreement(device: str, lease: Lease) -> None:
    """torch must see a GPU exactly where one was taken: a job runs on what torch sees.

    Args:
        device: what the lease was asked for.

    Raises:
        DeviceError: the job would run on a GPU, or on cores, that it has no lock on.
    """
    import torch

    if device == "cpu" or torch.cuda.is_available() == (lease.gpu is not None):
        return
    if lease.gpu is None:
        unread = isinstance(nvml(), str) and torch.version.hip is None
        install = "install nvidia-ml-py (pip install 'dynatree[gpu]'), or " if unread else ""
        raise DeviceError(
            f"device: {device!r} asked for, torch finds a GPU and no NVIDIA driver lists one"
            f"{_limits()}, so it cannot be locked; {install}set device: cpu"
        )
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs only"
    raise DeviceError(
        f"device: {device!r} asked for, {lease.gpu.name} is there and torch, built for {built}, "
        "cannot use it; see `dynatree doctor` (is the driver too old, or torch a build for CPUs?), "
        "or set device: cpu"
    )


def flagged(provenance: Mapping[str, Any], others: Sequence[str]) -> dict[str, Any]:
    """The provenance of a result whose GPU `others` used as well; unchanged if there are none."""
    if not others:
        return dict(provenance)
    return {**provenance, "device": {**provenance["device"], "shared_with": list(others)}}


def cores() -> list[Unit]:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        allowed = sorted(os.sched_getaffinity(0))
    else:
        allowed = list(range(os.cpu_count() or 1))
    return [Unit(f"{CORE}{core}", f"core {core}") for core in allowed]


def gpus(say: Callable[[str], None]) -> list[Unit | None]:
    """The GPUs that `CUDA_VISIBLE_DEVICES` lets this process use, in its order.

    Entries are indices in the order of `nvidia-smi`, UUIDs or their beginnings. As for CUDA, the
    first that names no GPU ends the list. None stands for a GPU that is broken, so that those after
    it keep their indices.

    Args:
        say: told if NVML cannot be read although there are GPUs, or one of them cannot.
    """
    driver = nvml()
    found: list[Unit | None] = []
    if isinstance(driver, str):
        found += _gpus_of_proc()
        if found:
            say(
                f"NVML cannot be read ({driver}): whether somebody else uses a GPU is not known; "
                "install dynatree[gpu]"
            )
    else:
        for index in range(driver.nvmlDeviceGetCount()):
            try:
                handle = driver.nvmlDeviceGetHandleByIndex(index)
                name = f"GPU {index} ({driver.nvmlDeviceGetName(handle)})"
                found.append(Unit(driver.nvmlDeviceGetUUID(handle), name))
            except driver.NVMLError as error:
                say(f"GPU {index}: NVML cannot read it ({error}); it is left out")
                found.append(None)
                continue
            try:
                driver.nvmlDeviceGetComputeRunningProcesses(handle)
            except driver.NVMLError as error:
                say(f"{name}: NVML does not say which processes use it ({error})")
    listed = os.environ.get(VISIBLE)
    if listed is None:
        return found
    visible: list[Unit | None] = []
    for entry in map(str.strip, listed.split(",")):
        if entry.startswith("MIG-") and found:
            # A part of a GPU is no entry of the driver's list.
            unit: Unit | None = Unit(entry, f"GPU part {entry}")
        elif entry.isdecimal() and int(entry) < len(found):
            unit = found[int(entry)]
        else:
            matching = [gpu for gpu in found if gpu and entry and gpu.key.startswith(entry)]
            if len(matching) != 1:
                break
            (unit,) = matching
        if unit not in visible:
            visible.append(unit)
    return visible


def _wanted(device: str, visible: Sequence[Unit | None]) -> Sequence[Unit]:
    intact = [unit for unit in visible if unit is not None]
    if not intact:
        raise DeviceError(
            f"device: {device!r} asked for, no GPU is found{_limits()}; use auto or cpu"
        )
    _, _, index = device.partition(":")
    if not index:
        return intact
    if int(index) >= len(visible):
        raise DeviceError(
            f"device: {device!r} asked for, {len(visible)} found{_limits()}; use a smaller index, "
            "cuda or auto"
        )
    counted = visible[: int(index) + 1]
    if None in counted:
        # CUDA may count without it, and nothing can stand in its place.
        raise DeviceError(
            f"device: {device!r} asked for, number {counted.index(None)} of the GPUs cannot be "
            f"read{_limits()}; set {VISIBLE} to the index of an intact one, and device: cuda"
        )
    return [intact[int(index)]]


def _limits() -> str:
    """What keeps GPUs from being found, as a part of a message."""
    listed, driver = os.environ.get(VISIBLE), nvml()
    limited = "" if listed is None else f" with {VISIBLE}={listed!r}"
    return limited + (f" (NVML: {driver})" if isinstance(driver, str) else "")


def _waited_for(
    candidates: Sequence[Unit],
    count: int,
    what: str,
    busy: Busy,
    say: Callable[[str], None],
    held: ExitStack,
) -> tuple[list[Unit], dict[int, str]]:
    """`count` of the candidates, locked until `held` closes, and who else uses the first."""
    said = None
    while True:
        with _folder() as folder:
            units, obstacles = _free(candidates, count, what, busy, folder, held)
        if units:
            return units, _processes(units[0])
        strangers = [text for text, locked in obstacles if not locked]
        if busy == "refuse" and len(strangers) == len(obstacles):
            raise DeviceError(
                f"{what}: {'; '.join(strangers)}; wait until they are done, stop them, or set "
                "devices.busy to wait or flag"
            )
        # All cores that one job holds are one obstacle.
        waiting = "; ".join(dict.fromkeys(text for text, _ in obstacles))
        if waiting != said:
            say(f"{what}: waits, {waiting}")
            said = waiting
        time.sleep(POLL)


def _free(
    candidates: Sequence[Unit],
    count: int,
    what: str,
    busy: Busy,
    folder: Path,
    held: ExitStack,
) -> tuple[list[Unit], list[tuple[str, bool]]]:
    """Locks `count` candidates or none; what is in the way of the others, and whether by a lock."""
    obstacles: list[tuple[str, bool]] = []
    free: dict[Unit, FileLock] = {}
    used: dict[Unit, FileLock] = {}
    for unit in candidates:
        if len(free) == count:
            break
        lock = FileLock(folder / f"{unit.key}.lock", mode=0o666)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            called = "a core" if unit.key.startswith(CORE) else unit.name
            obstacles.append((f"{called} is held by {_holder(folder, unit)}", True))
            continue
        strangers = _processes(unit)
        if strangers and _ending(folder, unit) in strangers:
            lock.release()
            held_by = _holder(folder, unit)
            obstacles.append((f"{unit.name} is held by {held_by}, which is ending", True))
            continue
        (used if strangers else free)[unit] = lock
        if strangers:
            obstacles.append((f"{unit.name} is used by {', '.join(strangers.values())}", False))
    chosen = [*free, *(used if busy == "flag" else ())][:count]
    if len(chosen) < count:
        chosen = []
    for unit, lock in (free | used).items():
        if unit not in chosen:
            lock.release()
            continue
        held.callback(lock.release)
        # Made anew, because it may be another user's, who is gone.
        note = folder / f"{unit.key}.json"
        note.unlink(missing_ok=True)
        with note.open("w", encoding="utf-8") as file:
            json.dump({"pid": os.getpid(), "what": what}, file)
    return chosen, obstacles


def _holder(folder: Path, unit: Unit) -> str:
    try:
        note = json.loads((folder / f"{unit.key}.json").read_text(encoding="utf-8"))
        return f"process {note['pid']} ({note['what']})"
    except (OSError, ValueError, KeyError):
        return "another process"


def _ending(folder: Path, unit: Unit) -> int | None:
    """The process that had a GPU last, if it lives: it uses the GPU for longer than its lock."""
    note = folder / f"{unit.key}.json"
    try:
        pid = json.loads(note.read_text(encoding="utf-8"))["pid"]
        # Not another process that was given its id since.
        same = psutil.Process(pid).create_time() <= note.stat().st_mtime
    except (OSError, ValueError, KeyError, psutil.Error):
        return None
    return pid if same and pid != os.getpid() else None


@contextmanager
def _folder() -> Iterator[Path]:
    """The folder of the locks, while no other process takes any, so that none gets half.

    Raises:
        DeviceError: it cannot be used.
    """
    folder = Path(os.environ.get(FOLDER) or DEFAULT_FOLDER)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Every user's, and not sticky: Linux would let nobody open the lock of another user.
        with suppress(PermissionError):
            folder.chmod(0o777)
        with FileLock(folder / "taking.lock", mode=0o666):
            yield folder
    except OSError as error:
        raise DeviceError(
            f"{folder}: locks cannot be kept there ({error}); set {FOLDER} to a folder of this "
            "host that all its users can write to"
        ) from None


def nvml() -> Any:
    """The module `pynvml`, ready for use, or why there is none, as text."""
    try:
        import pynvml
    except ImportError:
        return "pynvml is not installed"
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return str(error)
    return pynvml


def _processes(unit: Unit) -> dict[int, str]:
    """The processes that compute on a GPU, by id, and what they are; of a core none are known."""
    driver = None if unit.key.startswith(CORE) else nvml()
    if driver is None or isinstance(driver, str):
        return {}
    try:
        handle = driver.nvmlDeviceGetHandleByUUID(unit.key)
        listed = driver.nvmlDeviceGetComputeRunningProcesses(handle)
    except driver.NVMLError:
        # That it cannot be asked was said when the GPUs were listed.
        return {}
    return {entry.pid: _process(entry.pid) for entry in listed}


def _process(pid: int) -> str:
    try:
        process = psutil.Process(pid)
        command = shlex.join(process.cmdline())
        shown = command if len(command) <= 80 else f"{command[:77]}..."
        return f"process {pid} of {process.username()} ({shown})"
    except psutil.Error:
        return f"process {pid} (not of this container, or gone)"


def _gpus_of_proc() -> list[Unit]:
    """The GPUs that the driver lists, in the order of NVML, which is that of the bus."""
    found = []
    for index, path in enumerate(sorted(PROC.glob("*/information"))):
        lines = path.read_text(encoding="utf-8").splitlines()
        fields = {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in lines)}
        found.append(Unit(fields["GPU UUID"], f"GPU {index} ({fields['Model']})"))
    return found


def _torch_has_cuda() -> bool:
    # The import itself looks for no GPU.
    import torch

    return torch.version.cuda is not None
