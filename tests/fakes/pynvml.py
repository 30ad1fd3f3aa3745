"""NVML as far as DynaTree asks it, for tests without a GPU: put this folder first on the path.

What it knows stands in the JSON file that FAKE_NVML names: `gpus`, a list of [uuid, name], and
`processes`, the ids of processes by UUID, or `error` instead. It is read anew at every call.
"""

import json
import os
from pathlib import Path
from types import SimpleNamespace


class NVMLError(Exception):
    pass


def _known():
    return json.loads(Path(os.environ["FAKE_NVML"]).read_text())


def nvmlInit():  # noqa: N802
    if "error" in _known():
        raise NVMLError(_known()["error"])


def nvmlDeviceGetCount():  # noqa: N802
    return len(_known()["gpus"])


def nvmlDeviceGetHandleByIndex(index):  # noqa: N802
    return tuple(_known()["gpus"][index])


def nvmlDeviceGetHandleByUUID(uuid):  # noqa: N802
    return next(tuple(gpu) for gpu in _known()["gpus"] if gpu[0] == uuid)


def nvmlDeviceGetUUID(handle):  # noqa: N802
    return handle[0]


def nvmlDeviceGetName(handle):  # noqa: N802
    return handle[1]


def nvmlDeviceGetComputeRunningProcesses(handle):  # noqa: N802
    processes = _known().get("processes", {})
    if processes is None:
        raise NVMLError("Not Supported")
    return [SimpleNamespace(pid=pid) for pid in processes.get(handle[0], [])]
