"""Environment and tool markers of all tests. Imports no torch: many tests need none."""

import os
import shutil
import signal
import tempfile
from collections import Counter
from pathlib import Path

import pytest

# A shell that starts a command in the background has it ignore Ctrl-C, and its children as well.
signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
if not Path("/proc/driver/nvidia/version").exists():
    # Its kernels are interpreted where there is no GPU. Read when Triton is imported.
    os.environ["TRITON_INTERPRET"] = "1"
# Jobs of other tests, and of the user's own work, are none to wait for.
LOCKS = tempfile.TemporaryDirectory(prefix="dynatree-locks-")
os.environ["DYNATREE_LOCKS"] = LOCKS.name
if "PYTEST_XDIST_WORKER" in os.environ:
    # The cores are shared out already.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

TOOLS = {
    "tex": ("latexmk", "latexmk texlive-latex-base texlive-latex-recommended"),
    "compiler": ("g++", "g++"),
    "browser": ("chromium", "chromium"),
    "node": ("node", "nodejs"),
    "slurm": ("sbatch", "slurm-wlm munge"),
    "rsync": ("rsync", "rsync"),
}
"""What a marker needs: the command, and the packages that have it."""


@pytest.fixture(scope="session")
def compiled_kernel():
    """The C++ operators, loaded; where there is a compiler, one that fails is no reason to skip."""
    from dynatree import kernel

    assert kernel.available()


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
    for marker, (tool, packages) in TOOLS.items():
        if item.get_closest_marker(marker) is not None and shutil.which(tool) is None:
            reason = f"{tool} is missing; install the Debian packages {packages}"
            if os.environ.get("DYNATREE_REQUIRE_TOOLS") == "1":
                pytest.fail(reason)
            pytest.skip(reason)


def pytest_terminal_summary(terminalreporter):
    """Says how much was injected and mutated by the tests that passed, of all workers."""
    counts = Counter()
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties:
            if name in ("faults injected", "mutants valid", "mutants refused"):
                counts[name] += value
    if counts["faults injected"]:
        terminalreporter.write_line(f"faults injected: {counts['faults injected']}")
    valid, refused = counts["mutants valid"], counts["mutants refused"]
    if valid + refused:
        terminalreporter.write_line(
            f"mutants: {valid + refused} ({valid} valid, {refused} refused)"
        )
